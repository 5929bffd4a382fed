"""What both algorithms stand on: networks, policy, update step, checks of numbers and of hyperparameters."""
