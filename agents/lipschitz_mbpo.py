"""LipschitzMBPO: model-based RL with one dynamics model and a Lipschitz-regularized value function.

Zheng, Wang, Xu, Huang 2023 (arXiv 2302.01244) on top of MBPO (Janner et al. 2019, arXiv 1906.08253): SAC learns from
short rollouts of a learned model that begin in states really visited. The error of the learned Bellman operator is
bounded by how much V changes between predicted and true next state, ``gamma^2 E[(V(s'_hat) - V(s'))^2]``: a smooth V
needs no ensemble of models.

Differences from the papers (docs/lipschitz_mbpo.md): SAC's networks step at the same time (agents/sac.py); the model's
targets are normalised and its predictions clipped to the range of the data; the radius is in units of each
observation's running standard deviation; spectral norms are bounded by projection after an environment step's updates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from torch import Tensor

from ..dynamics.lipschitz import spectral_bound_
from ..dynamics.transition import TRANSITIONS, GaussianTransition
from ..dynamics.transition_base import TransitionModel, TransitionSettings
from ..envs.termination import termination_function
from .checkpoint import storable
from .compiling import Batch, Objective, prepared
from .config import given_at_load, require, resolve, validate
from .diagnostics import model_diagnostics, record, runs_away, value_diagnostics
from .lipschitz import adversary, search_noise, value_gap
from .nonfinite import GuardedOffPolicy
from .replay import CheckpointedReplay, TensorReplay, Transitions
from .sac import SACPolicy, sac_losses


@storable
@dataclass(frozen=True)
class LipschitzMBPOConfig:
    """Hyperparameters of LipschitzMBPO; those that SAC has too bear Stable-Baselines3's names.

    Raises:
        ValueError: if a field is outside its range.
    """

    learning_rate: float = 3e-4
    """Learning rate of actor, critics and temperature, > 0."""
    buffer_size: int = 1_000_000
    """Transitions of the environment that are kept, >= 1."""
    learning_starts: int = 5000
    """Steps of uniformly random actions before learning, >= 1."""
    batch_size: int = 256
    """Transitions per update, >= 1."""
    gradient_steps: int = 20
    """Updates per environment step, >= 1."""
    tau: float = 0.005
    """Weight of the critics in their slow copy, per update, in [0, 1]."""
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
    model: Literal["none", "deterministic", "probabilistic", "flow", "langevin"] = "probabilistic"
    """Transition model; none: SAC alone."""
    members: int = 1
    """Networks of a deterministic or probabilistic model, >= 1; MBPO's ensemble has 7."""
    elites: int = 1
    """Members that predict, those of least hold-out error, 1 .. members; MBPO has 5."""
    model_hidden: tuple[int, ...] = (200, 200, 200, 200)
    """Widths of the model's hidden layers."""
    model_epochs: int = 100
    """Passes of a fit at most, >= 1; it ends when the hold-out error stops falling."""
    model_interval: int = 250
    """Environment steps from one fit to the next, >= 1."""
    model_rollouts: int = 400
    """Model rollouts begun per environment step, >= 1 (all of an interval's at once, after the fit)."""
    model_retain: int = 1000
    """Environment steps whose model rollouts are kept, >= model_interval."""
    horizon: tuple[int, int, int, int] = (20_000, 150_000, 1, 15)
    """(a, b, x, y): length of model rollouts, x up to environment step a, linearly to y at step b."""
    real_ratio: float = 0.05
    """Share of real transitions in what is learned from, in [0, 1]; exact over updates, not only in the mean."""
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
    pairing: Literal["paper", "same_action", "policy"] = "paper"
    """Actions compared, (at the changed state, at the state): (pi, a), (a, a) or (pi, pi)."""
    spectral_bound: float = 4.0
    """Largest spectral norm of each layer of the critics, > 0 (spectral)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the update; auto: where the run is long enough and a C++ compiler is found."""
    nonfinite: Literal["raise", "skip", "rollback"] = "raise"
    """Numbers that are not finite: an error; leave the transition or update out; or take updates back (docs)."""
    diagnostics_interval: int = 1000
    """Environment steps between the diagnostics of model and value, >= 0; 0: never."""

    def __post_init__(self) -> None:
        validate(
            self,
            {
                "a number above 0": "learning_rate temperature robust_radius adversary_temperature spectral_bound",
                "a number of at least 0": "robust_coef",
                "a number in [0, 1]": "tau gamma real_ratio",
                "an integer of at least 1": "buffer_size learning_starts batch_size gradient_steps members elites "
                "model_epochs model_interval model_rollouts model_retain adversary_steps",
                "an integer of at least 0": "diagnostics_interval",
                "positive integers, at least one": "actor_hidden critic_hidden model_hidden",
                "True or False": "learn_temperature normalize_observation",
            },
        )
        start, end, first, last = self.horizon
        require(self, "horizon", 0 <= start <= end and 1 <= min(first, last), "(a, b, x, y), 0 <= a <= b, x and y >= 1")
        require(self, "elites", self.elites <= self.members, f"at most members = {self.members}")
        gaussian = self.model in ("deterministic", "probabilistic")
        require(self, "members", gaussian or self.members == 1, f"1 for the model {self.model}")
        require(self, "model_retain", self.model_retain >= self.model_interval, "at least model_interval")

    def horizon_at(self, step: int) -> int:
        """Length of model rollouts at an environment step."""
        start, end, first, last = self.horizon
        progress = min(max((step - start) / max(end - start, 1), 0.0), 1.0)
        return int(first + progress * (last - first))


def losses(policy: SACPolicy, batch: Batch, config: LipschitzMBPOConfig, target_entropy: float) -> Batch:
    """SAC's losses and the robust penalty ``mean max_s~ (Q(s~, pi(s~)) - Q(s, a))^2`` (arXiv 2302.01244)."""
    values = policy.critic(batch["obs"], batch["action"])
    terms = sac_losses(policy, batch, values, config.gamma, target_entropy)
    if config.regularizer == "robust":
        gap = value_gap(policy, batch, values, config.pairing)
        radius, way = config.robust_radius * policy.unit(), config.adversary
        states = adversary(gap, batch, radius, way, config.adversary_steps, config.adversary_temperature)
        terms["lipschitz/penalty"] = gap(states).mean()
        terms["train/loss"] = terms["train/loss"] + config.robust_coef * terms["lipschitz/penalty"]
    return terms


class LipschitzMBPO(CheckpointedReplay, GuardedOffPolicy):
    """SAC on the rollouts of one learned model, with a Lipschitz-regularized value (arXiv 2302.01244, 1906.08253).

    A Stable-Baselines3 algorithm: `learn`, `save`, `load`, `predict`, `save_replay_buffer`, callbacks and loggers are
    those of its SAC. Steps are those of the environment; the model's do not count.

    Args:
        policy: "MlpPolicy", "MultiInputPolicy" (Dict observations) or a subclass of `SACPolicy`.
        env: environment, vectorised environment or registered id, with Box actions; None only to load.
        learning_rate: in place of config.learning_rate; may be a function of the remaining progress (1 to 0).
        config: hyperparameters.
        terminated: rule of the task, next_obs [B, O] -> bool [B], in place of the known ones.
        policy_kwargs: arguments of `SACPolicy` that take precedence over the config.
        stats_window_size, tensorboard_log, verbose, seed, device, _init_setup_model: as Stable-Baselines3's.
        **fields: fields of `LipschitzMBPOConfig` by keyword, which take precedence over config.

    Raises:
        TypeError: if a keyword is no field of the config.
        ValueError: if a field is outside its range, a space is not supported, or the task's rule is asked for and not
            known.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": SACPolicy, "MultiInputPolicy": SACPolicy}
    policy: SACPolicy
    transition: TransitionModel | None
    _remade = ("imagined", "_gradient", "_terminated")

    def __init__(
        self, policy: str | type[SACPolicy] = "MlpPolicy", env: GymEnv | str | None = None,
        learning_rate: float | Schedule | None = None, *, config: LipschitzMBPOConfig | None = None,
        terminated: Callable[[Tensor], Tensor] | None = None, policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100, tensorboard_log: str | None = None, verbose: int = 0, seed: int | None = None,
        device: torch.device | str = "auto", _init_setup_model: bool = True, **fields: Any,
    ) -> None:  # fmt: skip
        if env is None and _init_setup_model:
            raise ValueError("env: got None, expected an environment, a vectorised environment or a registered id")
        if learning_rate is not None and not callable(learning_rate):
            fields["learning_rate"] = learning_rate
        self.config = resolve(config or LipschitzMBPOConfig(), fields)
        self.terminated = terminated
        self._fitted_at = self._diagnosed_at = self._seen = 0  # environment steps, and rows of the replay buffer
        self._carry = 0.0  # real transitions owed by the minibatches so far
        super().__init__(
            policy, env,  # type: ignore[arg-type]
            learning_rate=learning_rate if callable(learning_rate) else self.config.learning_rate,
            **{name: getattr(self.config, name) for name in _SB3_ARGUMENTS}, replay_buffer_class=TensorReplay,
            policy_kwargs=policy_kwargs, stats_window_size=stats_window_size, tensorboard_log=tensorboard_log,
            verbose=verbose, device=device, support_multi_env=True, seed=seed, sde_support=False,
        )  # fmt: skip
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self.config = config = given_at_load(self.config, self)
        if self._vec_normalize_env is not None:
            raise ValueError("env: got a VecNormalize, expected raw observations; use normalize_observation=True")
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self._convert_train_freq()
        defaults: dict[str, Any] = {
            "net_arch": {"pi": list(config.actor_hidden), "qf": list(config.critic_hidden)},
            "activation_fn": config.activation, "tau": config.tau, "temperature": config.temperature,
            "learn_temperature": config.learn_temperature, "normalize_observation": config.normalize_observation,
        }  # fmt: skip
        if "optimizer_class" not in self.policy_kwargs:
            defaults["optimizer_kwargs"] = {"fused": True}
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space, self.action_space, self.lr_schedule, **(defaults | self.policy_kwargs)
        ).to(self.device)
        policy = self.policy
        if self.replay_buffer is None:
            self.replay_buffer = TensorReplay(
                self.buffer_size, self.observation_space, self.action_space, self.device, self.n_envs
            )
        target_entropy = -float(policy.action_dim) if config.target_entropy is None else config.target_entropy
        terms = partial(losses, config=config, target_entropy=target_entropy)
        self._gradient = Objective(policy, terms, "train/loss", None).gradient
        self.transition = None
        if config.model != "none":
            rule = self._termination_rule()
            self._learns_end = vars(self).get("_learns_end", rule is None)  # as it did when it was saved
            self._terminated = None if self._learns_end else rule
            self.transition = self._build_model().to(self.device)
            rollouts = config.model_rollouts * config.model_retain
            self.imagined = Transitions(rollouts, policy.obs_dim, policy.action_dim, policy.device)

    def _build_model(self) -> TransitionModel:
        config, dims = self.config, (self.policy.obs_dim, self.policy.action_dim)
        settings = TransitionSettings(terminal_head=self._learns_end)
        if config.model in ("flow", "langevin"):  # the spread of the data stays in their hold-out loss: gains are small
            return TRANSITIONS[config.model](*dims, replace(settings, min_gain=1e-3), hidden=config.model_hidden)
        sizes = {"members": config.members, "elites": config.elites}
        probabilistic = config.model == "probabilistic"
        return GaussianTransition(*dims, settings, hidden=config.model_hidden, probabilistic=probabilistic, **sizes)

    def _termination_rule(self) -> Callable[[Tensor], Tensor] | None:
        """The rule that ends model rollouts; None: the model learns it."""
        choice = self.config.termination
        if choice == "learned":
            return None
        if choice == "never":
            return lambda next_obs: torch.zeros(len(next_obs), dtype=torch.bool, device=next_obs.device)
        rule = self.terminated
        spec = None if rule or self.env is None else self.env.get_attr("spec")[0]
        if spec is not None:
            rule = termination_function(spec.id, spec.kwargs)
        if rule is None and choice == "task" and self.env is not None:
            raise ValueError("termination: got task, but no rule of this environment is known; give one or use learned")
        return rule

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names = ["policy", "policy.optimizer"]
        return (names if self.transition is None else [*names, "transition", "transition.optimizer"]), []

    def learn(
        self, total_timesteps: int, callback: MaybeCallback = None, log_interval: int = 4,
        tb_log_name: str = "LipschitzMBPO", reset_num_timesteps: bool = True, progress_bar: bool = False,
    ) -> LipschitzMBPO:  # fmt: skip
        """Train for total_timesteps environment steps, as Stable-Baselines3's `SAC.learn`.

        Raises:
            ValueError: if numbers are not finite (`nonfinite`), the model diverges, or compile="on" finds no compiler.
        """
        done = 0 if reset_num_timesteps else self.num_timesteps  # a run that goes on is compiled as the whole would be
        updates = (done + total_timesteps) * self.config.gradient_steps
        self._gradient = prepared(self._gradient, self.config.compile, updates, torch.device(self.device))
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """Learn from what was seen and imagined: gradient_steps updates per environment."""
        config, policy = self.config, self.policy
        if len(self._real) < config.learning_starts:  # loaded without its replay buffer: see something first
            return
        policy.set_training_mode(True)
        self._update_learning_rate(policy.optimizer)
        if self._seen == 0 or self.num_timesteps - self._fitted_at >= config.model_interval:
            self._fitted_at = self.num_timesteps
            self._learn_scales()
            if self.transition is not None:
                self._fit_model(self.transition)
                self._imagine(self.transition, config.horizon_at(self.num_timesteps))
        vector, metrics, restore = policy.joined(), [], self._before_updates()
        for batch in self._minibatches(gradient_steps * self.n_envs, batch_size):
            vector.grad, terms = self._gradient(batch)
            if self._refuses(terms):
                continue
            policy.optimizer.step()
            policy.average(vector.detach())
            metrics.append(torch.stack(list(terms.values())))
        record(self.logger, self._settle(terms, metrics, restore))
        self._record_faults()
        if config.regularizer == "spectral":
            spectral_bound_(policy.critic, config.spectral_bound)
        self._n_updates += len(metrics)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if config.diagnostics_interval and self.num_timesteps - self._diagnosed_at >= config.diagnostics_interval:
            self._diagnosed_at = self.num_timesteps
            self._diagnose(batch)

    @property
    def _real(self) -> Transitions:
        assert self.replay_buffer is not None
        return self.replay_buffer.transitions

    def _minibatches(self, count: int, size: int) -> list[Batch]:
        """Minibatches of real and imagined transitions, with all noise that the losses need."""
        config, policy, real = self.config, self.policy, self._real
        share = config.real_ratio if self.transition is not None and len(self.imagined) else 1.0
        owed = [int(self._carry + share * size * i) for i in range(count + 1)]
        self._carry = (self._carry + share * size * count) % 1.0
        drawn = real.draw(owed[-1], self._generator)
        if share < 1:
            imagined = self.imagined.draw(count * size - owed[-1], self._generator)
        noise = torch.randn(2, count, size, policy.action_dim, generator=self._generator, device=self.device)
        batches = []
        for i in range(count):
            rows = drawn[owed[i] : owed[i + 1]]
            if share < 1:
                rows = torch.cat([rows, imagined[i * size - owed[i] : (i + 1) * size - owed[i + 1]]])
            batch = real.unpack(rows)
            obs = policy.normalize(torch.cat([batch["obs"], batch["next_obs"]]))
            batch["obs"], batch["next_obs"] = obs.split(size)
            batch |= {"noise": noise[0, i], "next_noise": noise[1, i]}
            if config.regularizer == "robust":
                batch |= search_noise(batch["obs"], config.adversary, config.adversary_steps, self._generator)
            batches.append(batch)
        return batches

    def _learn_scales(self) -> None:
        """Let the observation statistics see what is new."""
        new = self._real.unpack(self._real.newest(self.num_timesteps - self._seen))
        self.policy.obs_norm.update(new["obs"])
        self._seen = self.num_timesteps

    def _fit_model(self, model: TransitionModel) -> None:
        """Go on with the model's fit on all that was seen."""
        seen = self._real.all()
        fitted = model.fit(
            seen["obs"], seen["action"], seen["reward"], seen["next_obs"],
            seen["terminated"] > 0 if self._learns_end else None,
            generator=self._generator, max_epochs=self.config.model_epochs,
        )  # fmt: skip
        record(self.logger, fitted)

    @torch.no_grad()
    def _imagine(self, model: TransitionModel, horizon: int) -> None:
        """Begin model rollouts in states that were seen and follow the present policy, at most `horizon` steps."""
        config, policy, real = self.config, self.policy, self._real
        self.imagined.resize(config.model_rollouts * config.model_retain * horizon)
        obs = real.unpack(real.draw(config.model_rollouts * config.model_interval, self._generator))["obs"]
        begun, rule = len(obs), self._terminated
        for _ in range(horizon):
            noise = torch.randn(len(obs), policy.action_dim, generator=self._generator, device=obs.device)
            action = policy.actor.sample(policy.normalize(obs), noise).action
            next_obs, reward = model.sample(obs, action, self._generator)
            terminated = model.terminal(obs, action, next_obs) if rule is None else rule(next_obs)
            self.imagined.append(obs, action, next_obs, reward, terminated)
            obs = next_obs[~terminated]
            if not len(obs):
                break
        self.logger.record("model/horizon", horizon)
        self.logger.record("model/terminated_share", 1 - len(obs) / begun)

    def _diagnose(self, batch: Batch) -> None:
        """Log what model and value are worth; warn of critics that run away."""
        found = value_diagnostics(self.policy, batch, self.config.robust_radius)
        if self.transition is not None:
            found |= model_diagnostics(self.transition, self.policy, self._real, self.n_envs)
        runaway = runs_away(found["lipschitz/largest_value"], self._real, self.config.gamma)
        found["lipschitz/runaway"] = float(runaway)
        record(self.logger, found)


_SB3_ARGUMENTS = ("buffer_size", "learning_starts", "batch_size", "tau", "gamma", "gradient_steps")
