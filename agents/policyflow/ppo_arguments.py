"""PPO's arguments as those of PolicyFlow: what they mean here, and the name of ours where they mean nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor

from ..common.arguments import Neutral, without_neutral
from ..common.networks import activation_name

_SDE = "the flow draws its noise at its base and at the action; see base_std, action_std and exploration_noise"
_BUFFER = "the rollout also stores what the flow's ratio needs"
ARGUMENTS = {
    "use_sde": ((False,), _SDE),
    "sde_sample_freq": ((-1,), _SDE),
    "rollout_buffer_class": ((None,), _BUFFER),
    "rollout_buffer_kwargs": ((None,), _BUFFER),
}
"""Of PPO; see `without_neutral`."""
POLICY_ARGUMENTS: Neutral = {
    "ortho_init": ((True,), "all weights are orthogonal at first; critic_gain is the gain of the critic's last layer"),
    "use_sde": ((False,), _SDE),
    "squash_output": ((False,), "actions are clipped to their bounds"),
    "use_expln": ((False,), _SDE),
    "full_std": ((True,), _SDE),
    "share_features_extractor": ((True, False), "actor and critic share no layers"),
    "chained": ((), "choose the ratio chain or chain_steps"),
    "features_extractor_class": ((None, FlattenExtractor, CombinedExtractor), "features extractors are not available"),
    "features_extractor_kwargs": ((None, {}), "features extractors are not available"),
    "normalize_images": ((True, False), "observations are vectors"),
}
"""Of the policy of PPO."""
POLICY_FIELDS = ("base", "base_std", "components", "solver", "solver_steps", "langevin_eps", "critic_gain", "ema_decay",
                 "action_std_min", "chunk", "execute", "normalize_observation", "observation_epsilon")  # fmt: skip
"""Fields of the Config that are arguments of `FlowPolicy` under the same name."""


def own_policy_kwargs(policy_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `FlowPolicy` that arguments of PPO's policy stand for, and the others as they are.

    Raises:
        ValueError: if an argument asks for what is not available.
    """
    own = without_neutral(policy_kwargs, POLICY_ARGUMENTS)
    match own.get("net_arch"):
        case [dict() as widths]:  # of pipelines older than Stable-Baselines3 1.8, which takes them with a warning, too
            text = f"net_arch: got {own['net_arch']}, a list of one dictionary; give the dictionary itself"
            warnings.warn(text, UserWarning, stacklevel=3)
            own["net_arch"] = widths
    return own


def implied_fields(policy_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the Config that arguments of `FlowPolicy` stand for."""
    fields = {name: policy_kwargs[name] for name in POLICY_FIELDS if name in policy_kwargs}
    if (net_arch := policy_kwargs.get("net_arch")) is not None:
        both = net_arch if isinstance(net_arch, dict) else {"pi": net_arch, "vf": net_arch}
        if not both.keys() <= {"pi", "vf"}:
            raise ValueError(f"net_arch: got {', '.join(both)}, expected one list, or pi and vf")
        fields |= {"actor_hidden": tuple(both.get("pi", ())), "critic_hidden": tuple(both.get("vf", ()))}
    if "activation_fn" in policy_kwargs:
        fields["activation"] = activation_name(policy_kwargs["activation_fn"])
    if "log_std_init" in policy_kwargs:
        fields["action_std"] = math.exp(policy_kwargs["log_std_init"])
    if "weight_decay" in (policy_kwargs.get("optimizer_kwargs") or {}):
        fields["weight_decay"] = policy_kwargs["optimizer_kwargs"]["weight_decay"]
    return fields
