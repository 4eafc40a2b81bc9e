"""Fits that outlive a kill: checkpoints, what `resume=` finds, and how it is taken up."""
