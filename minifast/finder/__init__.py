"""The learning-rate finder: the callback that tries rates, and what its result says.

Knows callbacks and the state of a fit; nothing of a Learner.
"""
