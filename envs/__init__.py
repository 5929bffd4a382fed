"""Environments: any registered Gymnasium id, vectorised for Stable-Baselines3."""

from .make import check_env, make_vec, parse_env_kwargs
from .observation_mask import ObservationMask

__all__ = ["ObservationMask", "check_env", "make_vec", "parse_env_kwargs"]
