"""Loaders: the batches of a pass, where they come from, what can be asked of any loader.

Knows batches, the machine and the screen; nothing of models, losses or fits.
"""
