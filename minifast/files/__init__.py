"""Files of tensors: written whole or not at all, read as data, refused in words.

Knows tensors and the disk; nothing of fits.
"""
