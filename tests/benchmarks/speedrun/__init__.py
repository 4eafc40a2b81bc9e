"""A speed run on CIFAR-10 written twice: with the Learner (`ours`) and as a loop by hand (`plain`)."""
