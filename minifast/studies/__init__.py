"""What a Trainer tries out and undoes, to say something about it; nobody below knows it."""
