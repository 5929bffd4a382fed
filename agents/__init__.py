"""Agents: one algorithm, one folder, on Stable-Baselines3's base classes."""
