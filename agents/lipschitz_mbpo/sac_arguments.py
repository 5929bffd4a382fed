"""SAC's arguments and attributes: what they mean in LipschitzMBPO, and ours where they mean nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor
from torch import Tensor

from ..common.arguments import Neutral, without_neutral
from ..common.config import Configured
from ..common.networks import activation_name

if TYPE_CHECKING:
    from .sac import SACPolicy

_SDE = "this noise is not available; target_entropy and temperature say how much the agent explores"
_BUFFER = "the model learns from the agent's own buffer, of buffer_size transitions"
ARGUMENTS = {
    "action_noise": ((None,), "the policy is stochastic; target_entropy and temperature say how much it explores"),
    "replay_buffer_class": ((None,), _BUFFER),
    "replay_buffer_kwargs": ((None, {}, {"handle_timeout_termination": True}), _BUFFER),
    "optimize_memory_usage": ((False,), "next observations are stored as such; lower buffer_size"),
    "n_steps": ((1,), "returns of several steps come from the model's rollouts, of rollout_min to rollout_max steps"),
    "target_update_interval": ((1,), "the slow critics follow at each update; lower tau"),
    "use_sde": ((False,), _SDE),
    "sde_sample_freq": ((-1,), _SDE),
    "use_sde_at_warmup": ((False,), _SDE),
}
"""Of SAC; see `without_neutral`."""
POLICY_ARGUMENTS: Neutral = {
    "use_sde": ((False,), _SDE),
    "share_features_extractor": ((False,), "actor and critics share no layers"),
    "features_extractor_class": ((None, FlattenExtractor, CombinedExtractor), "features extractors are not available"),
    "features_extractor_kwargs": ((None, {}), "features extractors are not available"),
    "normalize_images": ((True, False), "observations are vectors"),
    "log_std_init": ((-3,), "the first standard deviation is about 1; temperature says how much the agent explores"),
    "use_expln": ((False,), _SDE),
    "clip_mean": ((2.0,), _SDE),
    "bounded_values": ((), "value_gradient bounds values"),
    "spectral_bound": ((), "give it to the agent, with regularizer='spectral'"),
}
"""Of the policy of SAC."""

POLICY_FIELDS = (
    "n_critics", "critic_layer_norm", "spectral_layers", "tau", "ema_decay", "temperature", "learn_temperature",
    "normalize_observation",
)  # fmt: skip
"""Fields of the Config that are arguments of `SACPolicy` under the same name."""


def own_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the Config that SAC's arguments stand for, and the others as they are.

    Raises:
        ValueError: if an argument asks for what is not available, or says something else than a field given beside it.
    """
    fields = without_neutral(fields, ARGUMENTS)
    if fields.get("target_entropy") == "auto":
        fields["target_entropy"] = None
    if "ent_coef" not in fields:
        return fields
    ent_coef = fields.pop("ent_coef")
    if both := [name for name in ("temperature", "learn_temperature") if name in fields]:
        raise ValueError(f"ent_coef: got it beside {both[0]}, expected one of them; they say the same")
    start, learns = ent_coef, False
    if isinstance(ent_coef, str):
        name, _, number = ent_coef.partition("_")
        try:
            start, learns = float(number or 1.0), True
        except ValueError:
            name = ""
        if name != "auto":
            raise ValueError(f"ent_coef: got {ent_coef!r}, expected a number above 0, auto, or such as auto_0.1")
    if isinstance(start, bool) or not isinstance(start, int | float) or not 0 < start < math.inf:
        raise ValueError(f"ent_coef: got {ent_coef!r}, expected a number above 0, auto, or such as auto_0.1")
    return {**fields, "temperature": start, "learn_temperature": learns}


def implied_fields(policy_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Fields of the Config that arguments of `SACPolicy` stand for."""
    fields = {name: policy_kwargs[name] for name in POLICY_FIELDS if name in policy_kwargs}
    if (net_arch := policy_kwargs.get("net_arch")) is not None:
        both = net_arch if isinstance(net_arch, dict) else {"pi": net_arch, "qf": net_arch}
        if both.keys() != {"pi", "qf"}:
            raise ValueError(f"net_arch: got {', '.join(both)}, expected one list, or pi and qf")
        fields |= {"actor_hidden": tuple(both["pi"]), "critic_hidden": tuple(both["qf"])}
    if "activation_fn" in policy_kwargs:
        fields["activation"] = activation_name(policy_kwargs["activation_fn"])
    return fields


class SACAttributes(Configured):
    """What is called in LipschitzMBPO as in SAC, but is not a field of the Config."""

    policy: SACPolicy

    actor = property(attrgetter("policy.actor"))
    critic = property(attrgetter("policy.critic"))
    critic_target = property(attrgetter("policy.target_critic"))

    @property
    def target_update_interval(self) -> int:
        """Updates from one step of the slow critics to the next."""
        return 1

    @property
    def log_ent_coef(self) -> Tensor | None:
        """Log of the entropy temperature where it is learned, else None."""
        return self.policy.log_alpha if self.config.learn_temperature else None

    @property
    def ent_coef_tensor(self) -> Tensor:
        """The present entropy temperature."""
        return self.policy.log_alpha.detach().exp().squeeze()

    @property
    def ent_coef(self) -> float | str:
        """The entropy temperature, or "auto" where it is learned."""
        return "auto" if self.config.learn_temperature else self.config.temperature

    @ent_coef.setter
    def ent_coef(self, value: Any) -> None:
        raise ValueError(f"ent_coef: got {value}, but it is learned, or fixed when the agent is made (temperature)")

    @property
    def target_entropy(self) -> float:
        """Entropy that the temperature drives the policy to, in nats."""
        given = self.config.target_entropy
        return -float(self.policy.action_dim) if given is None else given

    @target_entropy.setter
    def target_entropy(self, value: float | None) -> None:
        self._assign("target_entropy", self, value)
