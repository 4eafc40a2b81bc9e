"""The training loop, the events, and the state of one fit that they share.

Knows data, optimizers and records; no concrete callback, and no Learner.
"""
