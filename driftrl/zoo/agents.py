"""The agents as rl_zoo3 makes and loads them; learning and saving are those of the agents themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stable_baselines3.common.utils import ConstantSchedule
from stable_baselines3.common.vec_env import VecEnv
from typing_extensions import Self

from ..agents.lipschitz_mbpo import LipschitzMBPO, sac_arguments
from ..agents.policyflow import PolicyFlow, ppo_arguments
from ..agents.registry import policy_alias


class _ForTheZoo:
    """What both agents need of rl_zoo3's way to make and load them."""

    @staticmethod
    def policy_for(policy: Any, env: Any) -> Any:
        """The policy: MultiInputPolicy where a preset says MlpPolicy and observations are a dictionary."""
        return policy_alias(env) if policy == "MlpPolicy" and isinstance(env, VecEnv) else policy

    @classmethod
    def load(cls, path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load a saved agent, with hyperparameters from YAML in place of its own; see the agents' own `load`."""
        load: Any = super().load  # type: ignore[misc]  # of the agent that this class is mixed into
        return load(path, *args, **zoo_fields(kwargs))  # type: ignore[no-any-return]


class ZooPolicyFlow(_ForTheZoo, PolicyFlow):
    """PolicyFlow with the values that rl_zoo3 reads from YAML; what it samples as policy_kwargs comes after them."""

    def __init__(self, policy: Any = "MlpPolicy", env: Any = None, learning_rate: Any = None, **fields: Any) -> None:
        implied = ppo_arguments.implied_fields(fields.get("policy_kwargs") or {})
        fields = {name: value for name, value in fields.items() if name not in implied}
        super().__init__(self.policy_for(policy, env), env, **zoo_fields({"learning_rate": learning_rate, **fields}))


class ZooLipschitzMBPO(_ForTheZoo, LipschitzMBPO):
    """LipschitzMBPO with the values that rl_zoo3 reads from YAML; what it samples as policy_kwargs comes after them."""

    def __init__(self, policy: Any = "MlpPolicy", env: Any = None, learning_rate: Any = None, **fields: Any) -> None:
        implied = sac_arguments.implied_fields(fields.get("policy_kwargs") or {})
        fields = {name: value for name, value in fields.items() if name not in implied}
        super().__init__(self.policy_for(policy, env), env, **zoo_fields({"learning_rate": learning_rate, **fields}))


ALGORITHMS: dict[str, type[ZooPolicyFlow] | type[ZooLipschitzMBPO]] = {
    "policyflow": ZooPolicyFlow,
    "mbpo": ZooLipschitzMBPO,
}
"""By the names that `--algo` takes, which are those of `train.py`."""


def zoo_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters as the agents take them: lists of YAML as tuples, constant schedules as their numbers."""
    found = {}
    for name, value in fields.items():
        if isinstance(value, ConstantSchedule):
            value = value.val
        found[name] = tuple(value) if isinstance(value, list) else value
    return found
