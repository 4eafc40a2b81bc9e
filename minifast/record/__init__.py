"""What a fit did, as numbers: columns of steps, rows of epochs, runs in files.

Knows arrays, tables and plots; nothing of how a fit is made.
"""
