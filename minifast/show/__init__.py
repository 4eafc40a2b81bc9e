"""What a person sees: tables, plots, pictures, lines and bars. Knows matplotlib and tqdm; nothing of training."""
