"""What a person sees: tables, plots, pictures, and the screen that lines and bars are written to.

Knows matplotlib and tqdm, imported when used; nothing of training.
"""
