"""LipschitzMBPO: SAC on the rollouts of one learned model, with a Lipschitz-regularized value function."""

from .algorithm import LipschitzMBPO
from .config import LipschitzMBPOConfig
from .sac import SACPolicy

__all__ = ["LipschitzMBPO", "LipschitzMBPOConfig", "SACPolicy"]
