"""Fits that outlive a kill: checkpoints, what `resume=` finds, and how it is taken up.

Knows the loop, the callbacks of every fit and files; no Learner.
"""
