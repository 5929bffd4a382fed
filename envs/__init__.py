"""Environments: any registered Gymnasium id, vectorised for Stable-Baselines3."""

from .make import check_env, make_vec, parse_env_kwargs

__all__ = ["check_env", "make_vec", "parse_env_kwargs"]
