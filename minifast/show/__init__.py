"""What a person sees: tables, plots, pictures, and the screen that lines and bars are written to."""
