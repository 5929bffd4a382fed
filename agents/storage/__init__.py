"""Saved agents: the file format, Stable-Baselines3's save and load on it, the state that training goes on from."""
