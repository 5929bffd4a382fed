"""The agents that the commands know: one entry each, and no other place where an agent's name decides anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from ..envs.known import task_name
from . import presets
from .common.config import without_inert
from .lipschitz_mbpo import LipschitzMBPO, LipschitzMBPOConfig
from .lipschitz_mbpo import config as lipschitz_mbpo_config
from .policyflow import PolicyFlow, PolicyFlowConfig
from .policyflow import config as policyflow_config
from .storage.saving import Checkpointed


class AgentClass(Protocol):
    """What the commands need of an agent's class: Stable-Baselines3's constructor and `load`, and a config."""

    def __call__(self, policy: str, env: VecEnv, *, config: Any, seed: int, device: str) -> Checkpointed:
        """Make an untrained agent."""

    def load(
        self, path: Path, env: VecEnv | None = None, device: str = "auto", *, force_reset: bool = True
    ) -> Checkpointed:
        """Read a saved agent."""


@dataclass(frozen=True)
class AgentSpec:
    """An agent as the commands see it.

    Args:
        summary: one line for --help.
        agent: its class.
        config: dataclass of its hyperparameters.
        groups: its fields by the title of their group in the help, the basics first.
        presets: by the preset's name, the first being the default, settings by environment id: n_envs, perhaps
            total_timesteps, and fields of config.
        default_presets: settings for every other environment, by the preset's name.
        default_env: environment where none is given.
        upgraded: fields of config as earlier versions named them -> by their present names.
    """

    summary: str
    agent: AgentClass
    config: type[Any]
    groups: Mapping[str, tuple[str, ...]]
    presets: Mapping[str, Mapping[str, Mapping[str, Any]]]
    default_presets: Mapping[str, Mapping[str, Any]]
    default_env: str
    upgraded: Callable[[dict[str, Any]], dict[str, Any]]

    def settings(self, env_id: str, preset: str, **chosen: Any) -> tuple[dict[str, Any], Any]:
        """A preset with fields chosen in place of its own: n_envs and perhaps total_timesteps, and the Config.

        Fields of the preset that mean nothing with the chosen ones go back to their defaults.

        Raises:
            ValueError: if the agent has no preset of that name, or a field is outside its range.
        """
        fields = self.preset(env_id, preset) | chosen
        run: dict[str, Any] = {name: fields.pop(name) for name in ("n_envs", "total_timesteps") if name in fields}
        return run, without_inert(self.config(**fields), chosen)

    def default_preset(self, pretrain_steps: Any) -> str:
        """The name of the preset where none is chosen: the first, or the one for runs that are pretrained."""
        pretrains = str(pretrain_steps) not in ("0", "None") and "demonstrations" in self.presets
        return "demonstrations" if pretrains else next(iter(self.presets))

    def preset(self, env_id: str, name: str) -> dict[str, Any]:
        """Settings for an environment, n_envs among them: its own preset in place of the default one.

        Raises:
            ValueError: if the agent has no presets of that name.
        """
        if name not in self.presets:
            raise ValueError(f"preset: got {name!r}, expected {' or '.join(self.presets)}")
        return dict(self.presets[name].get(task_name(env_id), self.default_presets[name]))


AGENTS: dict[str, AgentSpec] = {
    "policyflow": AgentSpec(
        summary="on-policy PPO whose policy is a continuous normalizing flow",
        agent=PolicyFlow,
        config=PolicyFlowConfig,
        groups=policyflow_config.GROUPS,
        presets={
            "standard": presets.POLICYFLOW,
            "short": presets.POLICYFLOW_SHORT,
            "demonstrations": presets.POLICYFLOW_DEMONSTRATIONS,
        },
        default_presets={
            "standard": presets.DEFAULT,
            "short": presets.SHORT,
            "demonstrations": presets.IMITATION,
        },
        default_env="HalfCheetah-v5",
        upgraded=policyflow_config.upgraded,
    ),
    "mbpo": AgentSpec(
        summary="model-based: value gradients or SAC on one learned model, Lipschitz-regularized critics",
        agent=LipschitzMBPO,
        config=LipschitzMBPOConfig,
        groups=lipschitz_mbpo_config.GROUPS,
        presets={"standard": presets.VALUE_GRADIENTS, "mbpo": presets.MBPO, "fast": presets.MBPO_FAST},
        default_presets={
            "standard": presets.VALUE_GRADIENT,
            "mbpo": presets.MBPO_DEFAULT,
            "fast": presets.MBPO_FAST_DEFAULT,
        },
        default_env="Hopper-v5",
        upgraded=lipschitz_mbpo_config.upgraded,
    ),
}


def policy_alias(env: VecEnv) -> str:
    """Stable-Baselines3's name of the policy that reads the environment's observations."""
    return "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"
