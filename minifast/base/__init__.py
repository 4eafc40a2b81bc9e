"""The ground: nests and batches of tensors, losses, random states, copies that are put back, hooks.

Knows torch and `errors`; nothing of training.
"""
