"""What a Learner tries out and undoes, to say something about it."""
