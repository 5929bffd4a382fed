"""Hyperparameters of PolicyFlow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from ...dynamics.ode import least_growth
from ..common.config import require, validate
from ..storage.values import storable
from .other_ratios import RATIOS, RatioName
from .policy import LOG_STD_RANGE


@storable(upgrade=lambda fields: upgraded(fields))
@dataclass(frozen=True)
class PolicyFlowConfig:
    """Hyperparameters of PolicyFlow; those that PPO has too bear Stable-Baselines3's names.

    Raises:
        ValueError: if a field is outside its range.
    """

    learning_rate: float = 3e-4
    """Learning rate (initial one if lr_schedule is adaptive or linear), >= 0."""
    critic_learning_rate: float | None = None
    """Learning rate of the critic, > 0; None: the same. It falls as learning_rate does if lr_schedule is linear."""
    critic_warmup: int = 0
    """Iterations at the start of training in which only the critic learns, >= 0."""
    n_steps: int = 2048
    """Steps per environment and rollout, >= 1. The rollout holds n_steps x number of environments samples."""
    batch_size: int = 64
    """Samples per minibatch, >= 1; more than the rollout holds: all of them, with a warning."""
    n_epochs: int = 10
    """Passes over the rollout per iteration, >= 1."""
    gamma: float = 0.99
    """Discount factor, in [0, 1]."""
    gae_lambda: float = 0.95
    """Decay of generalized advantage estimation, in [0, 1]."""
    clip_range: float = 0.2
    """Clip range of the ratio, >= 0 (PPO's epsilon)."""
    clip_range_vf: float | None = 0.2
    """Clip range of the value, in units of normalised returns, > 0; None: no clipping."""
    normalize_advantage: bool = True
    """Standardise the advantages over the whole rollout."""
    ent_coef: float = 0.0
    """Weight of the entropy of the Gaussian noises, w_g of the paper, >= 0."""
    vf_coef: float = 0.5
    """Weight of the value loss, >= 0."""
    max_grad_norm: float = 1.0
    """Largest norm of the joint gradient of actor and critic, > 0."""
    weight_decay: float = 0.0
    """Weight decay of AdamW, >= 0."""
    lr_schedule: Literal["adaptive", "linear", "constant", "function"] = "adaptive"
    """Course of the learning rate. adaptive: KL near desired_kl; linear: falls to 0; function: learning_rate is one."""
    desired_kl: float = 0.01
    """Mean KL of an iteration's minibatches that the adaptive learning rate aims at, > 0, in nats."""
    desired_kl_end: float | None = None
    """The same at the end of training, > 0; it moves there linearly. None: it stays."""
    lr_min: float = 1e-6
    """Lower bound of the adaptive learning rate, > 0."""
    lr_max: float = 1e-2
    """Upper bound of the adaptive learning rate, >= lr_min."""
    target_kl: float | None = None
    """End the epochs of an iteration when the KL exceeds 1.5 x this, > 0; None: never."""
    ratio: RatioName = "interpolation"
    """Importance ratio: the paper's, the exact one given z, or one of docs/flow_ratios.md."""
    ratio_draws: int = 8
    """ratio marginal: latents, ratio fpo, fpo++: pairs (time, noise), per sample, >= 1."""
    solver: Literal["euler", "midpoint", "heun", "rk4"] = "euler"
    """ODE solver of the flow."""
    solver_steps: int = 2
    """Fixed steps of the solver from flow time 0 to 1, >= 1."""
    langevin_eps: float = 0.0
    """Noise of the flow while sampling, in [0, 1], in units of the base's variance / flow time. 0: the flow is an ODE;
    above 0 an SDE, by Euler and Maruyama (solver euler)."""
    base: Literal["standard", "learned", "gaussian", "mixture"] = "learned"
    """Law of z: standard N(0, base_std^2); learned, its std; gaussian N(m(obs), s^2); mixture of points."""
    base_std: float = 0.1
    """(Initial) standard deviation of the base, >= 0, in units of half the action range; 0: Gaussian PPO."""
    components: int = 5
    """base mixture: its points, >= 2; each makes a Gaussian of the action."""
    action_std: float = 0.5
    """Initial standard deviation of the action noise, > 0, in half action ranges (chains: of all steps)."""
    action_std_min: float | None = None
    """Floor of the action noise's standard deviation, > 0; None: exp(-5)."""
    exploration_noise: Literal["gaussian", "ou", "fractional"] = "gaussian"
    """Action noise over an episode: independent, Ornstein-Uhlenbeck, increments of fractional Brownian motion."""
    noise_time: float = 2.0
    """exploration_noise ou: correlation time in steps, > 0."""
    hurst: float = 0.7
    """exploration_noise fractional: Hurst exponent in [0.3, 1): below 1/2 alternating, above persistent."""
    spread: Literal["paper", "consistent", "score"] = "consistent"
    """Regularizer that spreads actions. paper: Brownian, as published; consistent: Brownian, aims at spread_std; score:
    gradient of the entropy."""
    spread_coef: float = 0.0
    """(Initial) weight of it, w_b of the paper, >= 0; 0 switches it off."""
    target_entropy: tuple[float, float] | None = None
    """Entropy of actions, in nats, at start and end of the run, to which spread_coef is adapted; None: it is fixed."""
    spread_std: float = 0.5
    """spread consistent: standard deviation that the flow's samples are driven to, > 0."""
    transport_coef: float = 0.0
    """Weight of the transport cost ``|x1 - z|^2``, >= 0: the flow moves z only as far as advantages ask for; 0: off."""
    jacobian_coef: float = 0.0
    """Weight of the squared Frobenius norm of the field's Jacobian, >= 0; 0 switches it off."""
    solver_error_coef: float = 0.0
    """Weight of the estimated error of a DOPRI5 step of half the flow time, >= 0; 0 switches it off."""
    bc_coef: float = 0.0
    """(Initial) weight of the imitation loss on demonstrations, >= 0; above 0 the agent needs demonstrations."""
    bc_schedule: Literal["constant", "linear", "adaptive"] = "constant"
    """Course of it. linear: falls to 0; adaptive: keeps the loss within a tenth of what it was at first."""
    chunk: int = 1
    """Steps that one action of the policy covers (an action chunk), >= 1; n_steps and gamma stay those of a step."""
    execute: int | None = None
    """Steps of a chunk that are done before the policy decides anew, 1 .. chunk; None: all."""
    freeze_flow: bool = False
    """Steering: the velocity field does not learn, only base and action noise; the ratio is exact."""
    actor_hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of the velocity field (and of the base's mean); none: both are linear."""
    critic_hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of the critic; none: the value is linear."""
    critic_gain: float = 1.0
    """Gain of the critic's last layer at the start, >= 0; with 0 all values begin at 0."""
    activation: Literal["silu", "mish", "tanh", "elu", "relu"] = "silu"
    """Activation of all networks."""
    ema_decay: float = 0.0
    """Decay of the weight average that predict() uses, in [0, 1); 0: predict with the last weights."""
    normalize_observation: bool = True
    """Standardise observations with running statistics kept in the policy."""
    observation_epsilon: float = 1e-8
    """Added to the variance they are standardised by, > 0: entries that hardly vary stay as small as they are."""
    normalize_reward: bool = True
    """Divide rewards by the running standard deviation of the discounted return."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile rollout and update, once for all runs of a kind: the same up to rounding. auto: in long runs."""
    nonfinite: Literal["raise", "skip", "rollback"] = "raise"
    """Numbers that are not finite: an error; leave the transition or update out; or take updates back (docs)."""
    on_collapse: Literal["ignore", "warn", "lower_rate", "rollback"] = "ignore"
    """Where training collapses: ignore it, warn, halve the adaptive learning rate, go back to good weights."""
    collapse_drop: float = 0.5
    """on_collapse: fall of the mean return that counts as a collapse, in (0, 1], as a share of its range so far."""
    diagnostics_interval: int = 10
    """Iterations between the flow/ diagnostics in the log, >= 0; 0: never."""

    def __post_init__(self) -> None:
        ranges = {
            "a number above 0": "max_grad_norm desired_kl lr_min lr_max action_std spread_std noise_time "
            "observation_epsilon",
            "a number above 0, at most 1": "collapse_drop",
            "a number in [0.3, 1)": "hurst",
            "a number above 0, or None": "clip_range_vf target_kl critic_learning_rate action_std_min desired_kl_end",
            "a number of at least 0": "learning_rate clip_range ent_coef vf_coef weight_decay spread_coef "
            "transport_coef "
            "jacobian_coef solver_error_coef base_std critic_gain bc_coef",
            "a number in [0, 1]": "gamma gae_lambda langevin_eps",
            "a number in [0, 1)": "ema_decay",
            "an integer of at least 2": "components",
            "an integer of at least 1": "n_steps batch_size n_epochs solver_steps ratio_draws chunk",
            "an integer of at least 1, or None": "execute",
            "an integer of at least 0": "diagnostics_interval critic_warmup",
            "positive integers": "actor_hidden critic_hidden",
            "two numbers, or None": "target_entropy",
            "True or False": "normalize_advantage normalize_observation normalize_reward freeze_flow",
        }
        validate(self, ranges)
        require(self, "solver", not self.langevin_eps or self.solver == "euler", "euler with langevin_eps above 0")
        adaptive = self.on_collapse != "lower_rate" or self.lr_schedule == "adaptive"
        require(self, "lr_schedule", adaptive, "adaptive with on_collapse lower_rate")
        steered = self.target_entropy is None or self.spread_coef > 0
        require(self, "spread_coef", steered, "a number above 0 with target_entropy")
        low, high = (math.exp(bound) for bound in LOG_STD_RANGE)
        for name in ("action_std", "base_std"):
            inside = low <= getattr(self, name) <= high or (name == "base_std" and self.base_std == 0)
            require(self, name, inside, f"a number in [{low:.3g}, {high:.3g}], where its logarithm is kept")
        floor = self.action_std_min or low
        require(self, "action_std", self.action_std >= floor, f"a number of at least action_std_min = {floor:.3g}")
        require(self, "execute", (self.execute or 1) <= self.chunk, f"at most chunk = {self.chunk}")
        require(
            self,
            "n_steps",
            self.n_steps >= self.decision_steps,
            f"at least the {self.decision_steps} steps of a decision",
        )
        memoryless = self.chunk == 1 or self.exploration_noise == "gaussian"
        require(self, "exploration_noise", memoryless, "gaussian with chunk above 1")
        same = self.critic_learning_rate is None or self.lr_schedule != "function"
        require(self, "critic_learning_rate", same, "None with lr_schedule function")
        if self.freeze_flow:
            steers = self.base in ("learned", "gaussian")
            require(self, "base", steers, "learned or gaussian with freeze_flow: else nothing steers")
            for name in ("spread_coef", "transport_coef", "jacobian_coef", "solver_error_coef", "bc_coef"):
                require(self, name, getattr(self, name) == 0, "0 with freeze_flow")
        gaussian = {} if self.base_std else {"base": "standard", "ratio": "endpoint", "langevin_eps": 0.0}
        gaussian |= {"spread": "score"} if gaussian and self.spread_coef else {}
        mixture: dict[str, object] = {"ratio": "mixture", "spread_coef": 0, "transport_coef": 0}
        needs = {f"ratio {self.ratio}": RATIOS[self.ratio].requires, "base_std 0": gaussian}
        for why, needed in (needs | ({"base mixture": mixture} if self.base == "mixture" else {})).items():
            for name, value in needed.items():
                require(self, name, getattr(self, name) == value, f"{value} with {why}")
        aims = self.spread == "consistent" and self.spread_coef > 0 and self.ratio not in ("chain", "chain_steps")
        if aims and not self.langevin_eps:
            least = self.base_std * least_growth(self.solver) ** self.solver_steps
            what = f"at least {least:.3g}, to which {self.solver} can shrink base_std in {self.solver_steps} steps"
            require(self, "spread_std", self.spread_std >= least, what)
        require(self, "lr_max", self.lr_max >= self.lr_min, f"a number of at least lr_min = {self.lr_min}")
        if self.lr_schedule == "adaptive" and self.learning_rate:  # 0: to act only, as rl_zoo3's enjoy asks
            inside = self.lr_min <= self.learning_rate <= self.lr_max
            require(self, "learning_rate", inside, f"lr_min to lr_max, {self.lr_min} to {self.lr_max}, or 0")

    @property
    def decision_steps(self) -> int:
        """Steps from one decision of the policy to the next, unless the episode ends."""
        return self.execute or self.chunk

    def kl_goal(self, remaining: float) -> float:
        """KL that the adaptive learning rate aims at when a share of training remains, 1 to 0."""
        first, last = self.desired_kl, self.desired_kl_end
        return first if last is None else last + (first - last) * remaining

    def decisions(self, envs: int) -> int:
        """Samples of a rollout of so many environments."""
        return -(-self.n_steps // self.decision_steps) * envs

    def switched_off(self) -> dict[str, str]:
        """Fields that change nothing as the others are -> what would switch them on."""
        off = {}
        if self.exploration_noise != "ou":
            off["noise_time"] = "exploration_noise ou"
        if self.exploration_noise != "fractional":
            off["hurst"] = "exploration_noise fractional"
        if self.base != "mixture":
            off["components"] = "base mixture"
        if not RATIOS[self.ratio].has_draws:
            off["ratio_draws"] = f"ratio {', '.join(name for name, kind in RATIOS.items() if kind.has_draws)}"
        if self.freeze_flow and not self.langevin_eps:
            off |= dict.fromkeys(("ratio", "ratio_draws"), "freeze_flow off, which has an exact ratio of its own")
        if self.gamma == 0 or self.n_steps <= self.decision_steps:
            off["gae_lambda"] = "gamma above 0 and rollouts of more than one decision"
        if not (self.actor_hidden or self.critic_hidden):
            off["activation"] = "hidden layers of actor or critic"
        if not self.normalize_observation:
            off["observation_epsilon"] = "normalize_observation"
        if self.bc_coef == 0:
            off["bc_schedule"] = "bc_coef above 0"
        if self.vf_coef == 0:
            off |= dict.fromkeys(("critic_learning_rate", "critic_warmup"), "vf_coef above 0")
        if self.spread_coef == 0:
            off["spread"] = "spread_coef above 0"
        if self.spread_coef == 0 or self.spread != "consistent":
            off["spread_std"] = "spread_coef above 0 and spread consistent"
        if self.n_epochs == 1:
            off["target_kl"] = "n_epochs above 1"
        if self.vf_coef == 0:
            off["clip_range_vf"] = "vf_coef above 0"
        if self.on_collapse == "ignore":
            off["collapse_drop"] = "on_collapse warn, lower_rate or rollback"
        if self.lr_schedule != "adaptive":
            off |= dict.fromkeys(("lr_min", "lr_max", "desired_kl_end"), "lr_schedule adaptive")
            if self.on_collapse == "ignore":
                off["desired_kl"] = "lr_schedule adaptive, or on_collapse"
        return off


RENAMED = {
    "brownian": "spread", "brownian_coef": "spread_coef", "brownian_std": "spread_std", "guard": "on_collapse",
    "guard_drop": "collapse_drop",
}  # fmt: skip
"""Fields of earlier versions -> what they are called now."""


def upgraded(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields as an earlier version named them, in saved runs and benchmarks, by their present names.

    Raises:
        ValueError: if one is there by both names, with two values.
    """
    if both := [old for old, name in RENAMED.items() if old in fields and fields.get(name, fields[old]) != fields[old]]:
        raise ValueError(f"{both[0]}: got it and {RENAMED[both[0]]}, its present name; keep the latter")
    fields = {RENAMED.get(name, name): value for name, value in fields.items()}
    if fields.get("on_collapse") == "off":
        fields["on_collapse"] = "ignore"
    if "sampler" in fields:
        fields["langevin_eps"] = fields.get("langevin_eps", 0.1) if fields.pop("sampler") == "sde" else 0.0
    return fields


GROUPS: dict[str, tuple[str, ...]] = {
    "basics": (
        "learning_rate", "lr_schedule", "critic_learning_rate", "desired_kl", "desired_kl_end", "target_kl", "n_steps",
        "batch_size", "n_epochs", "gamma", "gae_lambda", "clip_range", "clip_range_vf", "normalize_advantage",
        "vf_coef", "max_grad_norm", "normalize_observation", "observation_epsilon", "normalize_reward", "actor_hidden",
        "critic_hidden", "activation",
    ),
    "flow": ("ratio", "ratio_draws", "solver", "solver_steps", "langevin_eps", "base", "base_std", "components"),
    "demonstrations": (
        "chunk", "execute", "critic_warmup", "bc_coef", "bc_schedule", "freeze_flow",
    ),
    "exploration": ("action_std", "action_std_min", "ent_coef", "exploration_noise", "noise_time", "hurst"),
    "spread": ("spread", "spread_coef", "spread_std", "target_entropy"),
    "regularizers": ("weight_decay", "transport_coef", "jacobian_coef", "solver_error_coef"),
    "numerics": (
        "lr_min", "lr_max", "critic_gain", "ema_decay", "compile", "nonfinite", "on_collapse", "collapse_drop",
        "diagnostics_interval",
    ),
}  # fmt: skip
"""Fields by the group in which `train.py policyflow --help-all` shows them; each in one group."""
