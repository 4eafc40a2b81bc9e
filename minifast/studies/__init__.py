"""What a Trainer tries out and undoes, to say something about it.

Nobody below knows it; `Learner` offers it.
"""
