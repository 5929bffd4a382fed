"""PolicyFlow: PPO whose policy is a continuous normalizing flow (Yang, Liu, Chen 2026, arXiv 2602.01156)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, cast

import torch
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import LinearSchedule, explained_variance, update_learning_rate
from torch import Tensor

from ...dynamics.regularize import jacobian_penalty, local_error_penalty
from ..common.config import given_at_load, resolve
from ..common.nonfinite import record
from ..common.update import Objective, prepared
from .config import PolicyFlowConfig
from .diagnostics import flow_diagnostics
from .monitor import Guard
from .other_ratios import RATIOS
from .policy import FlowPolicy
from .ratios import Ratio, draw_interpolation, interpolate, record_velocities
from .regularizers import record_spread, spread_loss, steer, transport_cost
from .rollout import Batch, FlowRollouts


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float | None) -> Tensor:
    """Mean squared error of values [B], with PPO's pessimistic clipping around old_values.

    The maximum of both errors, as in PPO's original code: without it a value outside the band gets no gradient.
    """
    error = (values - returns).square()
    if clip_range is not None:
        clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
        error = torch.maximum(error, (clipped - returns).square())
    return error.mean()


def losses(policy: FlowPolicy, batch: Batch, ratio: Ratio, config: PolicyFlowConfig) -> dict[str, Tensor]:
    """The objective "train/loss" of a minibatch, its unweighted terms and what is logged beside them; scalars.

    The entropy is that of action noise and base, in nats per sample, up to what does not depend on the parameters.
    """
    actor, obs = policy.actor, batch["obs"]
    old_to_new = ratio.terms(actor, batch)
    policy_loss = ratio.surrogate(old_to_new.log_ratio, batch["advantages"], config.clip_range)
    critic_loss = value_loss(policy.value(obs), batch["values"], batch["returns"], config.clip_range_vf)
    base_log_std = actor.base_log_std.nan_to_num(neginf=0.0)  # a base without spread adds no entropy
    entropy = (actor.noise_log_std() + base_log_std + math.log(2 * math.pi * math.e)).sum()
    total = policy_loss + config.vf_coef * critic_loss - config.ent_coef * entropy
    terms = {
        "train/policy_gradient_loss": policy_loss,
        "train/value_loss": critic_loss,
        "train/entropy_loss": -entropy,
        "train/approx_kl": old_to_new.kl.mean(),
        "train/clip_fraction": (old_to_new.log_ratio.expm1().abs() > config.clip_range).float().mean(),
    }
    if config.brownian_coef > 0:
        spread = spread_loss(actor, batch, old_to_new.velocity, config.brownian, config.brownian_std)
        total, terms["flow/brownian_loss"] = total + batch["brownian_weight"][0] * spread, spread
    if config.transport_coef > 0:
        terms["flow/transport_cost"] = transport_cost(actor, batch)
        total = total + config.transport_coef * terms["flow/transport_cost"]
    if config.jacobian_coef > 0:
        terms["flow/jacobian_loss"] = jacobian_penalty(actor.field, batch["t"], interpolate(batch), obs).mean()
        total = total + config.jacobian_coef * terms["flow/jacobian_loss"]
    if config.solver_error_coef > 0:
        t, x = batch["t_error"], interpolate(batch | {"t": batch["t_error"]})
        terms["flow/solver_error"] = local_error_penalty(actor.field, t, x, obs, h=0.5).mean()
        total = total + config.solver_error_coef * terms["flow/solver_error"]
    return terms | {"train/loss": total}


_SB3_ARGUMENTS = ("n_steps", "gamma", "gae_lambda", "ent_coef", "vf_coef", "max_grad_norm")  # of OnPolicyAlgorithm


class PolicyFlow(FlowRollouts):
    """PPO with a continuous normalizing flow as its policy (Yang, Liu, Chen 2026, arXiv 2602.01156).

    A Stable-Baselines3 algorithm: `learn`, `save`, `load`, `predict`, callbacks and loggers are those of its PPO.
    ``predict(deterministic=True)`` follows the ODE from the mean of the base (z = 0) and adds no action noise;
    otherwise it samples, as training does, but with noise that is independent from call to call.

    Args:
        policy: "MlpPolicy", "MultiInputPolicy" (Dict observations) or a subclass of `FlowPolicy`.
        env: environment, vectorised environment or registered id, with Box actions; None only to load.
        learning_rate: in place of config.learning_rate; a function of what remains (1 to 0) also replaces lr_schedule.
        config: hyperparameters.
        policy_kwargs, **fields: of `FlowPolicy` and of `PolicyFlowConfig`; both take precedence over the config.
        stats_window_size, tensorboard_log, verbose, seed, device, _init_setup_model: as Stable-Baselines3's.

    Raises:
        TypeError: if a keyword is no field of the config.
        ValueError: if a field is outside its range, a space is not supported, or batch_size exceeds the rollout.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": FlowPolicy, "MultiInputPolicy": FlowPolicy}

    def __init__(
        self, policy: str | type[FlowPolicy] = "MlpPolicy", env: GymEnv | str | None = None,
        learning_rate: float | Schedule | None = None, *, config: PolicyFlowConfig | None = None,
        policy_kwargs: dict[str, Any] | None = None, stats_window_size: int = 100, tensorboard_log: str | None = None,
        verbose: int = 0, seed: int | None = None, device: torch.device | str = "auto", _init_setup_model: bool = True,
        **fields: Any,
    ) -> None:  # fmt: skip
        if env is None and _init_setup_model:
            raise ValueError("env: got None, expected an environment, a vectorised environment or a registered id")
        if learning_rate is not None and not callable(learning_rate):
            fields["learning_rate"] = learning_rate
        self.config = resolve(config or PolicyFlowConfig(), fields)
        self._iteration, self._rate = 0, self.config.learning_rate  # the adaptive learning rate
        self._brownian_weight = self.config.brownian_coef
        super().__init__(
            policy, env,  # type: ignore[arg-type]
            learning_rate=learning_rate if callable(learning_rate) else self.config.learning_rate,
            **{name: getattr(self.config, name) for name in _SB3_ARGUMENTS}, use_sde=False, sde_sample_freq=-1,
            stats_window_size=stats_window_size, tensorboard_log=tensorboard_log, policy_kwargs=policy_kwargs,
            verbose=verbose, seed=seed, device=device, _init_setup_model=False,
        )  # fmt: skip
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        before, self.config = self.config, given_at_load(self.config, self)
        if self.config.learning_rate != before.learning_rate:  # given to `load`
            self._rate = self.config.learning_rate
        if self.config.brownian_coef != before.brownian_coef:
            self._brownian_weight = self.config.brownian_coef
        config, samples = self.config, self.config.n_steps * self.n_envs
        if config.batch_size > samples:
            most = f"n_steps x environments = {config.n_steps} x {self.n_envs} = {samples}"
            raise ValueError(f"batch_size: got {config.batch_size}, expected at most {most}; lower it or raise n_steps")
        if not callable(self.learning_rate) and config.lr_schedule == "linear":
            self.learning_rate = LinearSchedule(config.learning_rate, 0.0, 1.0)
        if config.normalize_advantage and samples < 2:
            raise ValueError("n_steps: got a rollout of 1 sample, expected 2 or more to normalise advantages over")
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        defaults: dict[str, Any] = {
            "net_arch": {"pi": list(config.actor_hidden), "vf": list(config.critic_hidden)},
            "activation_fn": config.activation, "base": config.base, "base_std": config.base_std,
            "log_std_init": math.log(config.action_std), "solver": config.solver, "solver_steps": config.solver_steps,
            "normalize_observation": config.normalize_observation, "ema_decay": config.ema_decay,
            "langevin_eps": config.langevin_eps if config.sampler == "sde" else 0.0,
            "chained": config.ratio.startswith("chain"), "critic_gain": config.critic_gain,
        }  # fmt: skip
        if "optimizer_class" not in self.policy_kwargs:
            defaults["optimizer_kwargs"] = {"weight_decay": config.weight_decay, "eps": 1e-5, "fused": True}
        self.policy = cast(type[FlowPolicy], self.policy_class)(
            self.observation_space, self.action_space, self.lr_schedule, **(defaults | self.policy_kwargs)
        ).to(self.device)
        self._ratio, self.normalize_reward = RATIOS[config.ratio](config.ratio_draws), config.normalize_reward
        self._act = self.policy.act
        self._guard = Guard(config.guard, config.guard_drop, config.desired_kl, self.policy.action_dim)
        terms = partial(losses, ratio=self._ratio, config=config)
        self._gradient = Objective(self.policy, terms, "train/loss", config.max_grad_norm).gradient
        self._setup_rollout(config.exploration_noise, config.noise_time, config.hurst)

    def learn(
        self, total_timesteps: int, callback: MaybeCallback = None, log_interval: int = 1,
        tb_log_name: str = "PolicyFlow", reset_num_timesteps: bool = True, progress_bar: bool = False,
    ) -> PolicyFlow:  # fmt: skip
        """Train for total_timesteps environment steps, as Stable-Baselines3's `PPO.learn`.

        Raises:
            ValueError: if an observation or a reward is not finite, or compile="on" finds no compiler.
        """
        done = 0 if reset_num_timesteps else self.num_timesteps  # a run that goes on is compiled as the whole would be
        updates = (done + total_timesteps) * self.config.n_epochs // self.config.batch_size
        for name in ("_act", "_gradient"):
            setattr(self, name, prepared(getattr(self, name), self.config.compile, updates, self.device))
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def train(self) -> None:
        """Fit actor and critic to the rollout (the paper's Algorithm 1), then let the observation statistics see it."""
        config, policy, batch = self.config, self.policy, self.batch
        policy.set_training_mode(True)
        self._update_learning_rate(policy.optimizer)
        if config.normalize_advantage:
            advantages = batch["advantages"]
            batch["advantages"] = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        # The references are taken now, while the policy still is the one that acted: no copy of it is needed.
        batch = self._ratio.record(policy.actor, batch, self._generator)
        steered: dict[str, float] = {}
        if config.target_entropy is not None:
            given = (batch["obs"], self._brownian_weight, config.target_entropy, self._current_progress_remaining)
            self._brownian_weight, steered = steer(policy.actor, *given)
        if config.brownian_coef > 0:
            weight = steered.get("flow/brownian_coef", config.brownian_coef)
            batch = record_spread(policy.actor, batch, config.brownian, weight, self._generator)
        if config.jacobian_coef > 0 and "v_nodes" not in batch:
            batch = record_velocities(policy.actor, batch)
        passes, restore = list[dict[str, float]](), self._before_updates()
        for _ in range(config.n_epochs):
            epoch = draw_interpolation(policy.actor, batch, self._generator) if "v_nodes" in batch else batch
            if config.solver_error_coef > 0:
                epoch["t_error"] = torch.empty_like(batch["values"]).uniform_(0, 0.5, generator=self._generator)
            means = self._fit_once(epoch, restore)
            passes = [*passes, means] if means else []
            if not means or (config.target_kl is not None and means["train/approx_kl"] > 1.5 * config.target_kl):
                break
        record(self.logger, steered)
        if passes:
            self._report(passes, batch, epoch)
        if self._iteration > 0:  # the first rollout's are known already
            policy.obs_norm.update(self.rollout_buffer["features"][:-1].flatten(0, 1))
        self._iteration += 1

    def _report(self, passes: list[dict[str, float]], batch: Batch, epoch: Batch) -> None:
        """Adapt the learning rate to the iteration's epochs and log them."""
        config, policy = self.config, self.policy
        self._n_updates += len(passes)
        means = {name: sum(each[name] for each in passes) / len(passes) for name in passes[0]}
        if self._is_adaptive:
            self._adapt_learning_rate(means["train/approx_kl"])
        self._rate, guarded = self._guard.watch(policy, means, self.ep_info_buffer, self._rate)
        self._update_learning_rate(policy.optimizer)
        if config.diagnostics_interval and self._iteration % config.diagnostics_interval == 0:
            means |= flow_diagnostics(policy.actor, self._ratio, epoch, config.clip_range)
        means["train/explained_variance"] = explained_variance(*(batch[k].cpu().numpy() for k in ("values", "returns")))
        means |= {"train/clip_range": config.clip_range, "train/learning_rate": policy.optimizer.param_groups[0]["lr"]}
        means["train/std"] = policy.actor.noise_log_std().exp().mean().item()
        means["flow/base_std"] = policy.actor.base_log_std.exp().mean().item()
        record(self.logger, means | guarded)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _fit_once(self, epoch: Batch, restore: Callable[[], None] | None) -> dict[str, float]:
        """One pass over the rollout in random minibatches; returns the means of `losses`, none if it was taken back."""
        policy, config, vector = self.policy, self.config, self.policy.joined()
        order = torch.randperm(len(epoch["obs"]), generator=self._generator, device=self.device)
        shuffled = {name: tensor[order] for name, tensor in epoch.items()}
        metrics = []
        for start in range(0, len(order), config.batch_size):
            minibatch = {name: tensor[start : start + config.batch_size] for name, tensor in shuffled.items()}
            vector.grad, terms = self._gradient(minibatch)
            if self._refuses(terms):
                continue
            policy.optimizer.step()
            policy.average(vector.detach())
            metrics.append(torch.stack(list(terms.values())))
        return self._settle(terms, metrics, restore)

    @property
    def _is_adaptive(self) -> bool:
        return self.config.lr_schedule == "adaptive" and not callable(self.learning_rate)

    def _update_learning_rate(self, optimizers: Any) -> None:
        if self._is_adaptive:
            update_learning_rate(optimizers, self._rate)
        else:
            super()._update_learning_rate(optimizers)

    def _adapt_learning_rate(self, kl: float) -> None:
        """Keep the KL within a factor of 2 of desired_kl (Schulman et al. 2017, section 4, on the learning rate)."""
        if kl > 2 * self.config.desired_kl:
            self._rate = max(self._rate / 1.5, self.config.lr_min)
        elif kl < self.config.desired_kl / 2:
            self._rate = min(self._rate * 1.5, self.config.lr_max)
