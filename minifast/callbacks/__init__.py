"""The toolbox: callbacks with one concern each, known to no other part of minifast.

They know the state of a fit, and a Trainer where they predict.
"""
