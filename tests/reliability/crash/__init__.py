"""Kills fits at random and at every system call of a save, resumes them, and compares bits."""
