"""The callbacks of every fit: the record, metrics, the check of what is not finite, progress.

They know the state of a fit; not each other's insides, and no Learner.
"""
