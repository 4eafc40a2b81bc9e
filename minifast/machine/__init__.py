"""The machine: signals, worker processes, how many CPUs and how much memory there are.

Knows the operating system; nothing of training.
"""
