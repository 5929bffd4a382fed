"""Hyperparameters of LipschitzMBPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..common.config import require, validate
from ..storage.values import storable

NETWORKS = ("deterministic", "probabilistic", "homoscedastic")
"""Models that are networks of a mean, alone or as an ensemble."""


@storable(upgrade=lambda fields: upgraded(fields))
@dataclass(frozen=True)
class LipschitzMBPOConfig:
    """Hyperparameters of LipschitzMBPO; those that SAC has too bear Stable-Baselines3's names.

    Raises:
        ValueError: if a field is outside its range.
    """

    learning_rate: float = 3e-4
    """Learning rate of actor, critics and temperature, >= 0 (initial one if lr_schedule is linear)."""
    lr_schedule: Literal["constant", "linear", "function"] = "constant"
    """Course of the learning rate. linear: falls to 0; function: learning_rate is one."""
    buffer_size: int = 1_000_000
    """Transitions of the environment that are kept, >= 1."""
    learning_starts: int = 5000
    """Steps of uniformly random actions before learning, >= 0."""
    batch_size: int = 256
    """Transitions per update, >= 1."""
    gradient_steps: int = 20
    """Updates per environment step (per train_freq steps), >= 1; -1: as many as transitions were added."""
    tau: float = 0.005
    """Weight of the critics in their slow copy, per update, in [0, 1]."""
    ema_decay: float = 0.0
    """Decay, per update, of the average of the actor's weights that acts deterministically, in [0, 1); 0: none. The
    first averages span a ninth of the updates so far."""
    actor_noise: float = 0.0
    """Temperature T of Langevin noise on the actor's weights, >= 0: an update adds N(0, 2 learning_rate T); 0: none."""
    observation_noise: float = 0.0
    """Standard deviation of noise on what the actor sees in differentiated rollouts, >= 0, in running standard
    deviations of the observations."""
    gamma: float = 0.99
    """Discount factor, in [0, 1]."""
    temperature: float = 1.0
    """(Initial) entropy temperature alpha, > 0."""
    learn_temperature: bool = True
    """Drive the policy's entropy to target_entropy by the temperature."""
    target_entropy: float | None = None
    """In nats; None: minus the number of action dimensions."""
    actor_hidden: tuple[int, ...] = (256, 256)
    """Widths of the actor's hidden layers."""
    critic_hidden: tuple[int, ...] = (256, 256)
    """Widths of the critics' hidden layers."""
    activation: Literal["relu", "silu", "mish", "tanh", "elu"] = "relu"
    """Activation of actor and critics."""
    normalize_observation: bool = False
    """Standardise what actor and critics see with running statistics kept in the policy."""
    n_critics: int = 2
    """Critics, >= 1; with more than two, two drawn at random make the target of each update."""
    critic_layer_norm: bool = False
    """Normalise the inputs of the critics' layers but the first."""
    value_gradient: int = 0
    """Length of the rollouts that are differentiated through the model, >= 0; 0: actor and critics learn by SAC."""
    model: Literal["none", "deterministic", "probabilistic", "homoscedastic", "flow", "langevin"] = "probabilistic"
    """Transition model; none: SAC alone. homoscedastic: a Gaussian of the same noise everywhere."""
    members: int = 1
    """Networks of a Gaussian or deterministic model, >= 1; MBPO's ensemble has 7."""
    elites: int = 1
    """Members that predict, those of least hold-out error, 1 .. members; MBPO has 5."""
    model_hidden: tuple[int, ...] = (200, 200, 200, 200)
    """Widths of the model's hidden layers."""
    model_layer_norm: bool = False
    """Normalise the inputs of a Gaussian or deterministic model's layers but the first."""
    model_dropout: float = 0.0
    """Share of its first layer's outputs left out in a fit, in [0, 1); falls linearly to 0 in the last layer."""
    rollout_dropout: bool = False
    """Leave them out in model rollouts, too, for each row anew: what an ensemble does, in one network."""
    model_weight_decay: float | None = None
    """AdamW's, in the model's last layer; less in earlier ones, >= 0; None: MBPO's L2 of 5e-5."""
    snapshots: int = 0
    """Networks along a Langevin path after each fit that take turns as an ensemble's members do; 0: none."""
    model_batch_size: int = 256
    """Transitions per update of the model, >= 1."""
    model_jacobian_coef: float = 0.0
    """Weight of a prior that keeps d next state / d state of the model small where it can be, >= 0; 0: off."""
    model_epochs: int = 100
    """Passes of a fit at most, >= 1; it ends when the hold-out error stops falling."""
    model_patience: int = 0
    """Updates without a gain after which a fit may end, >= 0; five epochs at least."""
    model_ema_decay: float = 0.0
    """Of a running average of the model's weights, per update, which a fit judges and keeps, in [0, 1); 0: none."""
    model_interval: int = 250
    """Environment steps from one fit to the next, >= 1."""
    rollout_interval: int | None = None
    """Environment steps from one batch of model rollouts to the next, >= 1; None: one after each fit."""
    model_rollouts: int = 400
    """Model rollouts begun per environment step, >= 1 (all of an interval's at once)."""
    model_retain: int = 1000
    """Environment steps whose model rollouts are kept, at least the interval of rollouts."""
    rollout_min: int = 1
    """Length of model rollouts up to environment step rollout_start, >= 1."""
    rollout_max: int = 15
    """Length of model rollouts from environment step rollout_end on, >= 1; linear in between."""
    rollout_start: int = 20_000
    """Environment step at which the length begins to change, >= 0."""
    rollout_end: int = 150_000
    """Environment step from which the length is rollout_max, >= rollout_start."""
    real_ratio: float = 0.05
    """Share of real transitions in the minibatches, in [0, 1)."""
    termination: Literal["auto", "task", "learned", "never"] = "auto"
    """Ends of model rollouts: by the task's own rule, a learned one, never; auto: the task's where it is known."""
    regularizer: Literal["robust", "spectral", "none"] = "robust"
    """Of the critics: robust against adversarial states, or bounded spectral norms."""
    robust_coef: float = 0.01
    """Weight of the robust penalty, >= 0 (lambda)."""
    robust_radius: float = 0.1
    """Largest change of a state, > 0, in running standard deviations of each observation (epsilon)."""
    adversary: Literal["fgsm", "pgd", "langevin"] = "fgsm"
    """How the states are sought: one sign step, several, or Langevin ascent."""
    adversary_steps: int = 4
    """Steps of pgd and langevin, >= 1."""
    adversary_temperature: float = 1.0
    """Temperature of langevin, > 0, in units of the squared value."""
    robust_actions: Literal["paper", "same_action", "policy"] = "paper"
    """Actions compared, (at the changed state, at the state): (pi, a), (a, a) or (pi, pi)."""
    spectral_bound: float = 4.0
    """Largest spectral norm of each hidden layer of the critics, > 0 (spectral); the last layer is free."""
    spectral_layers: Literal["all", "last"] = "all"
    """Hidden layers of the critics that are bounded: all, or the last alone (Gogianu et al., arXiv 2105.05246)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the update; auto: where the run is long enough and a C++ compiler is found."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of products of hidden layers in updates and fits; bfloat16: faster on GPUs and CPUs that have it."""
    nonfinite: Literal["raise", "skip", "rollback"] = "raise"
    """Numbers that are not finite: an error; leave the transition or update out; or take updates back (docs)."""
    diagnostics_interval: int = 1000
    """Environment steps between the diagnostics of model and value, >= 0; 0: never."""

    def __post_init__(self) -> None:
        validate(
            self,
            {
                "a number above 0": "temperature robust_radius adversary_temperature spectral_bound",
                "a number of at least 0": "learning_rate robust_coef model_jacobian_coef actor_noise observation_noise",
                "a number, or None": "target_entropy",
                "a number of at least 0, or None": "model_weight_decay",
                "a number in [0, 1]": "tau gamma real_ratio",
                "a number in [0, 1)": "model_dropout model_ema_decay ema_decay",
                "an integer of at least 1": "buffer_size batch_size n_critics members elites "
                "model_epochs model_batch_size model_interval model_rollouts model_retain rollout_min rollout_max "
                "adversary_steps",
                "an integer of at least 1, or -1": "gradient_steps",
                "an integer of at least 0": "learning_starts diagnostics_interval rollout_start value_gradient "
                "model_patience snapshots",
                "an integer of at least 1, or None": "rollout_interval",
                "positive integers": "actor_hidden critic_hidden",
                "positive integers, at least one": "model_hidden",
                "True or False": "learn_temperature normalize_observation critic_layer_norm model_layer_norm "
                "rollout_dropout",
            },
        )
        later = f"at least rollout_start = {self.rollout_start}"
        require(self, "rollout_end", self.rollout_end >= self.rollout_start, later)
        require(self, "elites", self.elites <= self.members, f"at most members = {self.members}")
        require(self, "members", self.model in NETWORKS or self.members == 1, f"1 for the model {self.model}")
        single = self.members == 1 and self.model in ("probabilistic", "homoscedastic")
        require(self, "snapshots", single or not self.snapshots, "0 without one Gaussian network")
        leaves_out = self.model in NETWORKS and self.model_dropout > 0
        require(self, "rollout_dropout", leaves_out or not self.rollout_dropout, "off without model_dropout above 0")
        require(self, "value_gradient", self.model != "none" or not self.value_gradient, "0 without a model")
        bounded = self.regularizer != "spectral" or self.critic_hidden
        require(self, "regularizer", bool(bounded), "none or robust without hidden layers of the critics")
        imagines = self.model == "none" or self.value_gradient > 0 or self.real_ratio < 1
        require(self, "real_ratio", imagines, "below 1 with a model; without imagined transitions use model none")
        interval = self.rollout_interval or self.model_interval
        kept = self.model == "none" or self.model_retain >= interval
        require(self, "model_retain", kept, f"at least the interval of rollouts, {interval}")
        require(self, "model_jacobian_coef", self.model != "none" or not self.model_jacobian_coef, "0 without a model")

    def rollout_length(self, step: int) -> int:
        """Length of model rollouts at an environment step."""
        progress = (step - self.rollout_start) / max(self.rollout_end - self.rollout_start, 1)
        return int(self.rollout_min + min(max(progress, 0.0), 1.0) * (self.rollout_max - self.rollout_min))

    @property
    def bfloat16(self) -> bool:
        """Whether hidden layers multiply in bfloat16."""
        return self.precision == "bfloat16"

    def switched_off(self) -> dict[str, str]:
        """Fields that change nothing as the others are -> what would switch them on."""
        off = {}
        if not self.learn_temperature:
            off["target_entropy"] = "learn_temperature"
        if self.model == "none":
            names = (
                "model_hidden model_jacobian_coef model_epochs model_patience model_batch_size model_weight_decay "
                "model_ema_decay rollout_interval model_rollouts model_retain rollout_min rollout_max rollout_start "
                "rollout_end real_ratio termination"
            )
            off |= dict.fromkeys(names.split(), "a model")
            if not self.normalize_observation:
                off["model_interval"] = "a model, or normalize_observation"
        if self.model not in NETWORKS:
            off |= dict.fromkeys(("model_layer_norm", "model_dropout"), "a Gaussian or deterministic model")
        if self.value_gradient:
            off["real_ratio"] = "value_gradient 0"
        else:
            off["observation_noise"] = "value_gradient above 0"
        if not (self.actor_hidden or self.critic_hidden):
            off["activation"] = "hidden layers of actor or critics"
        if not self.critic_hidden:
            off["critic_layer_norm"] = "hidden layers of the critics"
        if self.rollout_end == 0:
            off["rollout_min"] = "rollout_end above 0: rollouts have rollout_max steps from the start"
        if self.rollout_min == self.rollout_max:
            off |= dict.fromkeys(("rollout_start", "rollout_end"), "rollout_min other than rollout_max")
        if self.regularizer != "robust" or self.robust_coef == 0:
            names = "adversary adversary_steps adversary_temperature robust_actions"
            off |= dict.fromkeys(names.split(), "regularizer robust and robust_coef above 0")
            if not self.diagnostics_interval:
                off["robust_radius"] = "regularizer robust and robust_coef above 0, or diagnostics"
        if self.regularizer != "robust":
            off["robust_coef"] = "regularizer robust"
        elif self.adversary == "fgsm":
            off["adversary_steps"] = "adversary pgd or langevin"
        if self.adversary != "langevin":
            off["adversary_temperature"] = "adversary langevin"
        model_hidden = self.model_hidden if self.model in NETWORKS else ()
        if max(map(len, (self.actor_hidden, self.critic_hidden, model_hidden))) < 2:
            off["precision"] = "two hidden layers of actor, critics or a Gaussian model"
        if len(self.critic_hidden) < 2:
            off["spectral_layers"] = "two hidden layers of the critics"
        if self.regularizer != "spectral":
            off |= dict.fromkeys(("spectral_bound", "spectral_layers"), "regularizer spectral")
        return off


def upgraded(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields as an earlier version named them, in saved runs and benchmarks, by their present names."""
    fields = {"robust_actions" if name == "pairing" else name: value for name, value in fields.items()}
    if "horizon" in fields:
        names = ("rollout_start", "rollout_end", "rollout_min", "rollout_max")
        fields |= dict(zip(names, fields.pop("horizon"), strict=True))
    return fields


GROUPS: dict[str, tuple[str, ...]] = {
    "basics": (
        "learning_rate", "lr_schedule", "buffer_size", "learning_starts", "batch_size", "gradient_steps", "tau",
        "ema_decay", "gamma", "normalize_observation", "actor_hidden", "critic_hidden", "activation", "n_critics",
        "critic_layer_norm", "value_gradient",
    ),
    "model": (
        "model", "model_interval", "model_epochs", "model_patience", "model_hidden", "model_layer_norm",
        "model_dropout", "rollout_dropout", "model_weight_decay", "model_ema_decay", "model_batch_size",
        "model_jacobian_coef", "members", "elites", "snapshots", "rollout_interval", "model_rollouts", "model_retain",
        "rollout_min", "rollout_max", "rollout_start", "rollout_end", "real_ratio", "termination",
    ),
    "critic regularizer": (
        "regularizer", "robust_coef", "robust_radius", "robust_actions", "adversary", "adversary_steps",
        "adversary_temperature", "spectral_bound", "spectral_layers",
    ),
    "exploration": ("temperature", "learn_temperature", "target_entropy", "actor_noise", "observation_noise"),
    "numerics": ("compile", "precision", "nonfinite", "diagnostics_interval"),
}  # fmt: skip
"""Fields by the group in which `train.py mbpo --help-all` shows them; each in one group."""
