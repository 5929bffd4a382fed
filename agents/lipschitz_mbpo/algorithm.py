"""LipschitzMBPO: model-based RL with one dynamics model and a Lipschitz-regularized value function.

Zheng, Wang, Xu, Huang 2023 (arXiv 2302.01244) on top of MBPO (Janner et al. 2019, arXiv 1906.08253): SAC learns from
short rollouts of a learned model that begin in states really visited. The error of the learned Bellman operator is at
most ``gamma^2 E[(V(s'_hat) - V(s'))^2]``: a smooth V needs no ensemble of models.

Differences from the papers (docs/lipschitz_mbpo.md): SAC's networks step at the same time (sac.py); the model's targets
are normalised and its predictions clipped to the range of the data; the radius is in units of each observation's
running standard deviation; the last layer of critics with bounded spectral norms is free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import update_learning_rate
from torch import Tensor

from ...dynamics.transition_base import TransitionModel
from ..common.arguments import without_neutral
from ..common.compiling import compiles, eager
from ..common.config import agreeing, resolve
from ..common.learning_rate import rate_fields
from ..common.networks import check_default_dtype, check_weights
from ..common.observations import FiniteReplay
from ..common.update import Gradient, Updates
from .config import LipschitzMBPOConfig
from .critic_regularizers import draw_search, losses
from .diagnostics import GRADIENTS, gradient_diagnostics, model_diagnostics, runs_away, value_diagnostics
from .model import build_model, fit_gradient, termination_rule
from .replay import CheckpointedReplay, Minibatch, TensorReplay, TransitionRing
from .sac import SACPolicy
from .sac_arguments import ARGUMENTS, POLICY_ARGUMENTS, POLICY_FIELDS, SACAttributes, implied_fields, own_fields
from .user_functions import KnownStep, Rule, UsersStep, check_ends, check_functions, check_rule, check_step, made_with
from .value_gradients import RANGE_RATE, Start, draw_blur, value_gradient_losses, value_range

_SB3_ARGUMENTS = ("buffer_size", "learning_starts", "batch_size", "tau", "gamma", "gradient_steps")


class LipschitzMBPO(CheckpointedReplay, SACAttributes, Updates, FiniteReplay):
    """SAC on the rollouts of one learned model, with a Lipschitz-regularized value (arXiv 2302.01244, 1906.08253).

    A Stable-Baselines3 algorithm: `learn`, `save`, `load`, `predict`, `save_replay_buffer`, callbacks and loggers are
    those of its SAC. Steps are those of the environment; the model's do not count.

    Args:
        policy: "MlpPolicy", "MultiInputPolicy" (Dict observations) or a subclass of `SACPolicy`.
        env: environment, vectorised environment or registered id, with Box actions; None only to load.
        learning_rate: in place of config.learning_rate; may be a function of the remaining progress (1 to 0).
        config: hyperparameters.
        terminated: rule of the task, next_obs [B, O] -> bool [B], in place of the known ones.
        known_step: what is known of the environment's step, (obs [B, O], action [B, A]) -> next_obs [B, O], all in its
            own units, as a simple physics of it: the model learns the difference.
        train_freq: steps per environment between calls of `train`, or (number, "step" or "episode").
        policy_kwargs: arguments of `SACPolicy` that take precedence over the config.
        stats_window_size, tensorboard_log, verbose, seed, device, _init_setup_model: as Stable-Baselines3's.
        **fields: fields of `LipschitzMBPOConfig` by keyword, which take precedence over config. SAC's arguments are
            understood, or refused by the name of ours (`sac_arguments`).

    Raises:
        TypeError: if a keyword is no field of the config.
        ValueError: if a field is outside its range, a space is not supported, or the task's rule is asked for and not
            known.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": SACPolicy, "MultiInputPolicy": SACPolicy}
    policy: SACPolicy
    transition: TransitionModel | None
    config_class = LipschitzMBPOConfig
    _fixed = frozenset(
        ("buffer_size", "actor_hidden", "critic_hidden", "activation", "value_gradient", "model", "members", "elites",
         "model_hidden", "model_jacobian_coef", "model_layer_norm", "model_dropout", "rollout_dropout",
         "model_weight_decay", "model_ema_decay", "model_batch_size", "model_patience", "precision", "snapshots",
         "model_rollouts", "model_retain", "termination", "regularizer", "spectral_bound", *POLICY_FIELDS)
    )  # fmt: skip
    _learned = frozenset(
        ("actor_hidden", "critic_hidden", "n_critics", "critic_layer_norm", "temperature", "model", "members",
         "snapshots", "model_hidden", "model_jacobian_coef", "model_layer_norm", "model_weight_decay")
    )  # fmt: skip
    _remade = ("model_buffer", "_differentiated", "_objective", "_gradient", "_step", "_fits", "_terminated")
    _ran_away = False  # whether critics ever did
    _fits: Callable[..., Any] | None = None  # the gradient of the model's fits, perhaps compiled

    def __init__(
        self, policy: str | type[SACPolicy] = "MlpPolicy", env: GymEnv | str | None = None,
        learning_rate: float | Schedule | None = None, *, config: LipschitzMBPOConfig | None = None,
        terminated: Rule | None = None, known_step: KnownStep | None = None,
        train_freq: int | tuple[int, str] = 1, policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100, tensorboard_log: str | None = None, verbose: int = 0, seed: int | None = None,
        device: torch.device | str = "auto", _init_setup_model: bool = True, **fields: Any,
    ) -> None:  # fmt: skip
        if env is None and _init_setup_model:
            raise ValueError("env: got None, expected an environment, a vectorised environment or a registered id")
        config, fields = config or LipschitzMBPOConfig(), own_fields(fields)
        policy_kwargs = without_neutral(policy_kwargs or {}, POLICY_ARGUMENTS)
        rate = rate_fields(learning_rate, resolve(config, fields))
        fields = agreeing(agreeing(fields, rate, "learning_rate"), implied_fields(policy_kwargs), "policy_kwargs")
        self.config = resolve(config, fields)
        check_functions(self.config, terminated, known_step)
        self.terminated, self.known_step = terminated, known_step
        self._fitted_at = self._imagined_at = self._diagnosed_at = self._seen = 0  # environment steps
        self._carry = 0.0  # real transitions owed by the minibatches so far
        super().__init__(
            policy, env,  # type: ignore[arg-type]
            learning_rate=learning_rate if callable(learning_rate) else self.config.learning_rate,
            **{name: getattr(self.config, name) for name in _SB3_ARGUMENTS}, replay_buffer_class=TensorReplay,
            train_freq=train_freq, policy_kwargs=policy_kwargs, stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log, verbose=verbose, device=device, support_multi_env=True, seed=seed,
            sde_support=False,
        )  # fmt: skip
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        check_default_dtype()
        self._take_attributes(implied_fields(self.policy_kwargs))
        config = self.config
        self._check_env()
        check_weights(
            self.device, actor_hidden=(1, config.actor_hidden), critic_hidden=(config.n_critics, config.critic_hidden),
            model_hidden=(config.members, config.model_hidden),
        )  # fmt: skip
        self.set_random_seed(self.seed)
        self._convert_train_freq()
        defaults: dict[str, Any] = {
            "net_arch": {"pi": list(config.actor_hidden), "qf": list(config.critic_hidden)},
            "activation_fn": config.activation,
            "spectral_bound": config.spectral_bound if config.regularizer == "spectral" else None,
            "bounded_values": config.value_gradient > 0, **{name: getattr(config, name) for name in POLICY_FIELDS},
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
        self.transition = None
        if config.model != "none":
            self._choose_rule()
            self._knows_step = vars(self).get("_knows_step", self.known_step is not None)  # as when it was saved
            sizes = policy.obs_dim, policy.action_dim
            known = UsersStep.of(self.known_step, self.action_space)
            self.transition = build_model(config, *sizes, self._learns_end, known).to(self.device)
            rollouts = config.model_rollouts * config.model_retain
            self.model_buffer = TransitionRing(rollouts, policy.obs_dim, policy.action_dim, policy.device)
        self._config_changed()

    def _check_env(self) -> None:
        if self._vec_normalize_env is not None:
            raise ValueError("env: got a VecNormalize, expected raw observations; use normalize_observation=True")

    def _choose_rule(self) -> None:
        """Take the rule by which the present environment ends, or leave the ends to the model."""
        rule = termination_rule(self.config.termination, self.terminated, self.env)
        self._learns_end = vars(self).get("_learns_end", rule is None)  # as it did when it was saved
        check_ends(self.config.termination, self.terminated, rule, self._learns_end)
        self._terminated = None if self._learns_end else rule

    @property
    def learns_end(self) -> bool:
        """Whether the model learns how episodes end, because no rule of the environment is known or asked for."""
        return self.transition is not None and self._learns_end

    @classmethod
    def load(cls, path: Any, *args: Any, **kwargs: Any) -> LipschitzMBPO:
        """As `Checkpointed.load`; arguments of SAC may be given as to the constructor."""
        return super().load(path, *args, **own_fields(kwargs))

    def _config_changed(self) -> None:
        """Make anew what an update reads of the Config."""
        self._differentiated = self.transition, vars(self).get("_terminated")
        terms: Any = partial(losses, config=self.config, target_entropy=self.target_entropy)
        if self.transition is not None and self.config.value_gradient:
            terms = partial(
                value_gradient_losses, model=self.transition, ended=self._ended, config=self.config,
                target_entropy=self.target_entropy,
            )  # fmt: skip
        self._use_gradient(Gradient(self.policy, terms, None, self.config.nonfinite == "skip", self.config.bfloat16))

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "terminated", "known_step"]  # files hold no functions

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names = ["policy"] if self.transition is None else ["policy", "transition"]
        return [*names, *(f"{name}.optimizer" for name in names)], []

    def learn(
        self, total_timesteps: int, callback: MaybeCallback = None, log_interval: int = 4,
        tb_log_name: str = "LipschitzMBPO", reset_num_timesteps: bool = True, progress_bar: bool = False,
    ) -> LipschitzMBPO:  # fmt: skip
        """Train for total_timesteps environment steps, as Stable-Baselines3's `SAC.learn`.

        Raises:
            ValueError: if numbers are not finite (`nonfinite`), the model diverges, compile="on" finds no compiler, or
                the weights were changed so that some would not learn.
        """
        self._check_neutral(ARGUMENTS)
        self._adopt_policy()
        self._check_env()
        if (self.transition is None) != (self.config.model == "none"):
            raise ValueError(f"transition: got {self.transition} with model={self.config.model!r}")
        if self.transition is not None:
            self._choose_rule()  # another environment may have been set
            if (self.transition, self._terminated) != self._differentiated:
                self._config_changed()
            made_with("terminated", self._learns_end or self._terminated is not None)
            check_step(self.transition, UsersStep.of(self.known_step, self.action_space), self._knows_step)
            self.transition.adopt_weights()
            if self.learns_end and self.verbose:
                print("the model learns how episodes end")
        done = self.num_timesteps  # a run that goes on is compiled as the whole would be
        if reset_num_timesteps:  # the clock starts anew, what was done by it lies before its start
            for name in ("_fitted_at", "_imagined_at", "_diagnosed_at", "_seen"):
                setattr(self, name, getattr(self, name) - done)
            done = 0
        updates, device = (done + total_timesteps) * abs(self.config.gradient_steps), torch.device(self.device)
        self._compile_updates(compiles(self.policy, self.config.compile, updates, device))
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """Learn from what was seen and imagined: gradient_steps updates per environment, or as many as it saw if -1."""
        config, policy = self.config, self.policy
        fewest = 1 if self.transition is None else 2  # one to fit the model to, one to hold out
        if len(self._real) < max(min(config.learning_starts, self._real.capacity), fewest):  # also loaded without them
            return
        updates = gradient_steps * (self.n_envs if config.gradient_steps > 0 else 1)
        policy.set_training_mode(True)
        update_learning_rate(policy.optimizer, rate := self._rate_at(self._current_progress_remaining))
        self.logger.record("train/learning_rate", rate)
        knows = policy.obs_norm.count and (self.transition is None or self.transition.is_fitted)
        if fits := not knows or self.num_timesteps - self._fitted_at >= config.model_interval:
            self._fitted_at = self.num_timesteps
            self._learn_scales()
        if self.transition is not None:
            if fits:
                self._fit_model(self.transition)
            waited, interval = self.num_timesteps - self._imagined_at, config.rollout_interval
            due = fits if interval is None else waited >= interval
            if due or not len(self.model_buffer):
                self._imagined_at = self.num_timesteps
                self._imagine(self.transition, config.rollout_length(self.num_timesteps))
        weights, before, metrics = self._weights(), self._before_updates(), list[Tensor]()
        draw = self._starts if config.value_gradient else self._minibatches
        for batch in draw(updates, batch_size):
            # The gradient of the sum of `losses`, the optimizer's step, then the slow critics follow.
            scalars = self._update(weights, batch)
            if scalars is None:  # it was left out
                continue
            metrics.append(scalars)
            if config.value_gradient:
                low, high = (scalars[self._names.index(f"value_gradient/{end}_value")] for end in ("lowest", "highest"))
                policy.move_value_range(low, high, RANGE_RATE)
            if config.regularizer == "spectral":
                policy.power_iteration()
            policy.heat_actor(config.actor_noise, self._generator)
            policy.average_actor(self._n_updates + len(metrics))
        self._record(self._settle(metrics, before))
        self._record_faults()
        self._n_updates += len(metrics)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if config.diagnostics_interval and self.num_timesteps - self._diagnosed_at >= config.diagnostics_interval:
            self._diagnosed_at = self.num_timesteps
            self._diagnose()

    @property
    def _real(self) -> TransitionRing:
        assert self.replay_buffer is not None
        return self.replay_buffer.transitions

    def _minibatches(self, count: int, size: int) -> list[Minibatch]:
        """Minibatches of real and imagined transitions, with all noise that the losses need."""
        config, policy, real = self.config, self.policy, self._real
        share = config.real_ratio if self.transition is not None and len(self.model_buffer) else 1.0
        owed = [int(self._carry + share * size * i) for i in range(count + 1)]
        self._carry = (self._carry + share * size * count) % 1.0
        drawn = real.draw(owed[-1], self._generator)
        if share < 1:
            of_model = self.model_buffer.draw(count * size - owed[-1], self._generator)
        noise, next_noise = torch.randn(
            2, count, size, policy.action_dim, generator=self._generator, device=self.device
        )
        batches, radius = [], config.robust_radius * policy.obs_std()
        for i in range(count):
            rows = drawn[owed[i] : owed[i + 1]]
            if share < 1:
                rows = torch.cat([rows, of_model[i * size - owed[i] : (i + 1) * size - owed[i + 1]]])
            drawn_now = real.unpack(rows)
            obs, next_obs = policy.obs_norm(torch.cat([drawn_now.obs, drawn_now.next_obs])).split(size)
            search = None
            if config.regularizer == "robust":
                search = draw_search(obs, radius, config.adversary, config.adversary_steps, self._generator)
            transitions = (obs, drawn_now.action, next_obs, drawn_now.reward, drawn_now.terminated)
            batches.append(Minibatch(*transitions, noise[i], next_noise[i], search, self._pair(self._generator)))
        return batches

    def _pair(self, generator: torch.Generator) -> Tensor | None:
        """Two critics drawn at random, [2], where there are more."""
        if (critics := self.policy.critic.number) <= 2:
            return None
        return torch.randperm(critics, generator=generator, device=self.device)[:2]

    def _starts(self, count: int, size: int, generator: torch.Generator | None = None) -> Iterator[Start]:
        """States of the model rollouts in which differentiated ones begin, with all noise that the losses need."""
        config, policy, model = self.config, self.policy, self.transition
        generator = generator or self._generator
        assert model is not None
        horizon, radius = config.value_gradient, config.robust_radius * policy.obs_std()
        for _ in range(count):
            obs = self.model_buffer.unpack(self.model_buffer.draw(size, generator)).obs
            noise = torch.randn(horizon + 1, size, policy.action_dim, generator=generator, device=obs.device)
            search = None
            if config.regularizer == "robust":
                search = draw_search(obs, radius, config.adversary, config.adversary_steps, generator)
            model_noise = tuple(model.draw(size, generator) for _ in range(horizon))
            blur = draw_blur(config.observation_noise, policy.obs_std(), (horizon + 1, *obs.shape), generator)
            yield Start(obs, noise, model_noise, self._pair(generator), search, blur)

    def _ended(self, obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        """Whether a transition of the model terminates, bool [B]."""
        if self._terminated is not None:
            return self._terminated(next_obs)
        assert self.transition is not None
        return self.transition.terminal(obs, action, next_obs)

    def _learn_scales(self) -> None:
        """Let the observation statistics see what is new."""
        stored = self.num_timesteps - self._transitions_left_out
        unseen = stored - self._seen if self.policy.obs_norm.count else len(self._real)
        new = self._real.unpack(self._real.newest(unseen))
        # Where the learning rate falls to 0 the networks can no longer follow statistics that move.
        self.policy.obs_norm.update(new.obs, weight=max(self._rate_share, 1e-3))
        self._seen = stored

    def _fit_model(self, model: TransitionModel) -> None:
        """Go on with the model's fit on all that was seen, which must have ended as the rule says."""
        if self._terminated is not None and self.config.termination != "never":
            check_rule(self._terminated, self._real, self.config.termination)
        seen, wanted = self._real.all(), self.config.compile if self._step is not None else ""
        self._fits = fit_gradient(self._fits, model, wanted)
        fitted = model.fit(
            seen.obs, seen.action, seen.reward, seen.next_obs, seen.terminated > 0 if self._learns_end else None,
            generator=self._generator, max_epochs=self.config.model_epochs, gradient=self._fits,
        )  # fmt: skip
        self._record(fitted)
        if self.config.value_gradient and not self._n_updates and not self.policy.has_value_range:
            low, high = value_range(seen.reward, self.config.gamma)
            self.policy.move_value_range(low.clamp(max=-1), high.clamp(min=1), 1.0)

    @torch.no_grad()
    def _imagine(self, model: TransitionModel, horizon: int) -> None:
        """Begin model rollouts in states that were seen and follow the present policy, at most `horizon` steps."""
        config, policy, real = self.config, self.policy, self._real
        self.model_buffer.resize(config.model_rollouts * config.model_retain * horizon)
        interval = config.rollout_interval or config.model_interval
        obs = real.unpack(real.draw(config.model_rollouts * interval, self._generator)).obs
        begun = len(obs)
        for _ in range(horizon):
            noise = torch.randn(len(obs), policy.action_dim, generator=self._generator, device=obs.device)
            action = policy.actor.sample(policy.obs_norm(obs), noise).action
            next_obs, reward = model.sample(obs, action, self._generator)
            terminated = self._ended(obs, action, next_obs)
            self.model_buffer.append(obs, action, next_obs, reward, terminated)
            obs = next_obs[~terminated]
            if not len(obs):
                break
        self.logger.record("model/horizon", horizon)
        self.logger.record("model/terminated_share", 1 - len(obs) / begun)

    def _diagnose(self) -> None:
        """Log what model and value are worth; warn of critics that run away."""
        found = value_diagnostics(self.policy, self._real, self.config.robust_radius)
        if self.transition is not None:
            found |= model_diagnostics(self.transition, self.policy, self._real, self.n_envs)
        if self.config.value_gradient:
            generator = torch.Generator(self.device).manual_seed(0)  # its own: measuring must not change training
            starts = self._starts(GRADIENTS, self.batch_size, generator)
            gradients = (eager(self._gradient)(start)[0] for start in starts)
            found |= gradient_diagnostics(self.policy, gradients, self._real)
        runaway = runs_away(found["lipschitz/largest_value"], self.policy, self._real, self.config.gamma)
        self._ran_away |= runaway
        if self._ran_away:
            found["lipschitz/runaway"] = float(runaway)
        self._record(found)
