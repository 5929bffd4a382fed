"""Agents: one algorithm, one file, on Stable-Baselines3's base classes."""
