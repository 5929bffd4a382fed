"""Sweeps: many runs of one specification, here or on a Ray cluster, as a grid or as an Optuna search."""
