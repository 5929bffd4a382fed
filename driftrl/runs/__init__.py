"""Training runs: their folders, callbacks, signals and logs."""
