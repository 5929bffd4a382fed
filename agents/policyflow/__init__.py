"""PolicyFlow: PPO whose policy is a continuous normalizing flow."""

from .algorithm import PolicyFlow
from .config import PolicyFlowConfig
from .policy import FlowPolicy

__all__ = ["FlowPolicy", "PolicyFlow", "PolicyFlowConfig"]
