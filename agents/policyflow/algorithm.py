"""PolicyFlow: PPO whose policy is a continuous normalizing flow (Yang, Liu, Chen 2026, arXiv 2602.01156)."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, cast

import torch
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import explained_variance, update_learning_rate
from torch import Tensor

from ...dynamics.regularize import jacobian_penalty, local_error_penalty
from ..common.arguments import without_neutral
from ..common.compiling import compiles, owner, prepared
from ..common.config import agreeing, resolve
from ..common.learning_rate import rate_fields
from ..common.networks import check_default_dtype, check_weights
from ..common.update import Gradient, Loss, Losses
from .config import PolicyFlowConfig
from .diagnostics import flow_diagnostics
from .entropy import policy_entropy, steered_weight
from .fine_tuning import SteeringRatio
from .imitation import Imitation
from .monitor import CollapseMonitor
from .other_ratios import RATIOS
from .policy import FlowPolicy
from .posterior import posterior_noise
from .ppo_arguments import ARGUMENTS, POLICY_FIELDS, implied_fields, own_policy_kwargs
from .pretraining import imitation_loss
from .ratios import Ratio, Samples, chord_point, draw_epoch, record_references
from .regularizers import spread_loss, spread_rate, transport_cost


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float | None) -> Tensor:
    """Mean squared error of values [B], with PPO's pessimistic clipping around old_values.

    The maximum of both errors, as in PPO's original code: without it a value outside the band gets no gradient.
    """
    error = (values - returns).square()
    if clip_range is not None:
        clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
        error = torch.maximum(error, (clipped - returns).square())
    return error.mean()


def losses(
    policy: FlowPolicy, samples: Samples, spread_coef: Tensor, bc_coef: Tensor, ratio: Ratio, config: PolicyFlowConfig
) -> Losses:
    """The terms of the objective for a minibatch, with their weights, and what is logged beside them.

    The entropy is that of all that is drawn, in nats per sample, up to what does not depend on the parameters.

    Args:
        policy: the networks.
        samples: the minibatch.
        spread_coef: weight of the spread's loss, a scalar, which may be steered from iteration to iteration.
        bc_coef: that of the imitation loss, likewise.
        ratio: the importance ratio.
        config: hyperparameters.
    """
    actor, obs = policy.actor, samples.obs
    policy_loss, old_to_new = ratio.loss(actor, samples, config.clip_range)
    critic_loss = value_loss(policy.value(obs), samples.values, samples.returns, config.clip_range_vf)
    table = {
        "train/policy_gradient_loss": Loss(policy_loss),
        "train/value_loss": Loss(critic_loss, config.vf_coef),
        "train/entropy_loss": Loss(-actor.joint_entropy(obs), config.ent_coef),
    }
    if config.spread_coef > 0:
        spread = spread_loss(actor, samples, old_to_new.velocity, config.spread)
        table["flow/spread_loss"] = Loss(spread, spread_coef)
    if config.transport_coef > 0:
        table["flow/transport_cost"] = Loss(transport_cost(actor, samples), config.transport_coef)
    if config.jacobian_coef > 0:
        assert samples.chord is not None
        t = samples.chord.t
        penalty = jacobian_penalty(actor.field, t, chord_point(samples, t), obs).mean()
        table["flow/jacobian_loss"] = Loss(penalty, config.jacobian_coef)
    if config.solver_error_coef > 0:
        assert samples.error_time is not None
        t = samples.error_time
        error = local_error_penalty(actor.field, t, chord_point(samples, t), obs, h=0.5).mean()
        table["flow/solver_error"] = Loss(error, config.solver_error_coef)
    if samples.expert is not None:
        table["flow/bc_loss"] = Loss(imitation_loss(actor, samples.expert), bc_coef)
    return Losses(
        table,
        {
            "train/approx_kl": old_to_new.kl.mean(),
            "train/clip_fraction": (old_to_new.log_ratio.expm1().abs() > config.clip_range).float().mean(),
        },
    )


_SB3_ARGUMENTS = ("n_steps", "gamma", "gae_lambda", "ent_coef", "vf_coef", "max_grad_norm")  # of OnPolicyAlgorithm


class PolicyFlow(Imitation):
    """PPO with a continuous normalizing flow as its policy (Yang, Liu, Chen 2026, arXiv 2602.01156).

    A Stable-Baselines3 algorithm: `learn`, `save`, `load`, `predict`, callbacks and loggers are those of its PPO.
    ``predict(deterministic=True)`` follows the ODE from the mean of the base (z = 0) and adds no action noise;
    otherwise it samples, as training does, but with noise that is independent from call to call.

    Args:
        policy: "MlpPolicy", "MultiInputPolicy" (Dict observations) or a subclass of `FlowPolicy`.
        env: environment, vectorised environment or registered id, with Box actions; None only to load.
        learning_rate: in place of config.learning_rate; a function of what remains (1 to 0) also replaces lr_schedule.
        config: hyperparameters. They can be read, and most of them assigned to, as attributes of the agent.
        policy_kwargs: arguments of `FlowPolicy` that take precedence over the config.
        **fields: fields of `PolicyFlowConfig` by keyword, which take precedence over config.
        stats_window_size, tensorboard_log, verbose, seed, device, _init_setup_model: as Stable-Baselines3's.

    Raises:
        TypeError: if a keyword is no field of the config.
        ValueError: if a field is outside its range or has no effect, or a space is not supported.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": FlowPolicy, "MultiInputPolicy": FlowPolicy}
    config_class = PolicyFlowConfig
    _fixed = frozenset(
        ("n_steps", "ratio", "ratio_draws", "freeze_flow", "critic_warmup", "exploration_noise", "noise_time", "hurst",
         "actor_hidden", "action_std", "critic_hidden", "activation", "weight_decay", *POLICY_FIELDS)
    )  # fmt: skip
    _learned = frozenset(
        ("actor_hidden", "chunk", "action_std", "critic_hidden", "base_std", "components", "critic_gain",
         "weight_decay")
    )  # fmt: skip

    def __init__(
        self, policy: str | type[FlowPolicy] = "MlpPolicy", env: GymEnv | str | None = None,
        learning_rate: float | Schedule | None = None, *, config: PolicyFlowConfig | None = None,
        policy_kwargs: dict[str, Any] | None = None, stats_window_size: int = 100, tensorboard_log: str | None = None,
        verbose: int = 0, seed: int | None = None, device: torch.device | str = "auto", _init_setup_model: bool = True,
        **fields: Any,
    ) -> None:  # fmt: skip
        if env is None and _init_setup_model:
            raise ValueError("env: got None, expected an environment, a vectorised environment or a registered id")
        config, fields = config or PolicyFlowConfig(), without_neutral(fields, ARGUMENTS)
        policy_kwargs = own_policy_kwargs(policy_kwargs or {})
        rate = rate_fields(learning_rate, resolve(config, fields))
        implied = implied_fields(policy_kwargs)
        fields = agreeing(agreeing(fields, rate, "learning_rate"), implied, "policy_kwargs")
        self.config = resolve(config, fields)
        decays = "weight_decay" in implied or "optimizer_class" not in policy_kwargs
        if not decays and self.config.weight_decay:
            got = self.config.weight_decay
            raise ValueError(f"weight_decay: got {got}, which changes nothing without the default optimizer_class")
        self._iteration, self._rate = 0, self.config.learning_rate
        self._spread_coef = self._first_spread_coef = self.config.spread_coef  # the former may be steered
        self._monitor: CollapseMonitor | None = None
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
        check_default_dtype()
        self._take_attributes(implied_fields(self.policy_kwargs))
        if "_brownian_weight" in vars(self):  # as files of earlier versions call it
            self._spread_coef = vars(self).pop("_brownian_weight")
            self._first_spread_coef = self.config.spread_coef
        if self.config.bc_coef and (weight := vars(self).pop("_bc_weight", None)):  # likewise: bc_coef times the factor
            self._bc_factor = weight / self.config.bc_coef
        config = self.config
        check_weights(self.device, actor_hidden=(1, config.actor_hidden), critic_hidden=(1, config.critic_hidden))
        self.set_random_seed(self.seed)
        optimizer_kwargs: dict[str, Any] = {}
        if "optimizer_class" not in self.policy_kwargs:
            optimizer_kwargs = {"weight_decay": config.weight_decay, "eps": 1e-5, "fused": True}
        arguments: dict[str, Any] = {
            "net_arch": {"pi": list(config.actor_hidden), "vf": list(config.critic_hidden)},
            "activation_fn": config.activation, "log_std_init": math.log(config.action_std),
            "chained": config.ratio.startswith("chain"), **{name: getattr(config, name) for name in POLICY_FIELDS},
            **self.policy_kwargs,
            "optimizer_kwargs": optimizer_kwargs | (self.policy_kwargs.get("optimizer_kwargs") or {}),
        }  # fmt: skip
        self.policy = cast(type[FlowPolicy], self.policy_class)(
            self.observation_space, self.action_space, self.lr_schedule, **arguments
        ).to(self.device)
        decay = self.policy.optimizer.defaults.get("weight_decay", 0.0)  # an optimizer_class may have its own default
        self._config = config = replace(config, weight_decay=decay)
        steers = config.freeze_flow and not config.langevin_eps  # a noisy flow moves with the base
        self._ratio = SteeringRatio() if steers else RATIOS[config.ratio](config.ratio_draws)
        self.policy.actor.field.requires_grad_(not config.freeze_flow)
        self._setup_rollout()
        self._config_changed()

    def _check(self, config: PolicyFlowConfig) -> None:
        super()._check(config)
        samples = config.decisions(self.n_envs)
        if config.batch_size > samples and ("_gradient" in vars(self) or not self.num_timesteps):  # else it is loaded
            what, most = "n_steps x environments", f"{config.n_steps} x {self.n_envs}"
            if (steps := config.decision_steps) > 1:
                what, most = f"{what} / steps of a decision", f"{most} / {steps}, rounded up"
            most = f"{what} = {most} = {samples}"
            text = f"batch_size: got {config.batch_size}, more than the rollout's {most} samples; each minibatch is the"
            warnings.warn(f"{text} whole rollout; lower batch_size or raise n_steps", UserWarning, stacklevel=3)
        if config.normalize_advantage and samples < 2:
            raise ValueError("n_steps: got a rollout of 1 sample, expected 2 or more to normalise advantages over")

    def _config_changed(self) -> None:
        """Make anew what an update reads of the Config."""
        config = self.config
        settings = (config.on_collapse, config.collapse_drop, config.desired_kl, self.policy.action_dim)
        if config.on_collapse == "ignore":
            self._monitor = None
        elif self._monitor is None or self._monitor.settings != settings:
            self._monitor = CollapseMonitor(*settings)
        if config.spread_coef != self._first_spread_coef:
            self._spread_coef = self._first_spread_coef = config.spread_coef
        terms = partial(losses, ratio=self._ratio, config=config)
        self._use_gradient(Gradient(self.policy, terms, config.max_grad_norm, config.nonfinite == "skip"))
        if "_act" not in vars(self) or owner(self._act) is not self.policy:
            self._act = self.policy.act

    def learn(
        self, total_timesteps: int, callback: MaybeCallback = None, log_interval: int = 1,
        tb_log_name: str = "PolicyFlow", reset_num_timesteps: bool = True, progress_bar: bool = False,
    ) -> PolicyFlow:  # fmt: skip
        """Train for total_timesteps environment steps, as Stable-Baselines3's `PPO.learn`.

        Where the program has called `torch.distributed.init_process_group`, all its processes train one agent together:
        n_envs and batch_size are of each of them, total_timesteps is of all (docs/gpu.md).

        Raises:
            RankError: if another process failed or is lost.
            ValueError: if an observation or a reward is not finite, compile="on" finds no compiler, or the weights were
                changed so that some would not learn.
        """
        ranks = self._join_ranks(total_timesteps, reset_num_timesteps)
        self._check_neutral(ARGUMENTS)
        self._adopt_policy()
        done = 0 if reset_num_timesteps else self.num_timesteps  # a run that goes on is compiled as the whole would be
        samples = self.config.batch_size * self.config.decision_steps * ranks.size
        updates = (done + total_timesteps) * self.config.n_epochs // samples
        decisions = (done + total_timesteps) // (self.n_envs * self.config.decision_steps * ranks.size)
        compiled = compiles(self.policy, self.config.compile, updates, self.device, decisions)
        self._act = prepared(self._act, compiled, self.device)
        self._compile_updates(compiled)
        shows = progress_bar and ranks.rank == 0
        with ranks.announced():
            super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, shows)
            ranks.gather(None)  # what a callback raises at the end of training ends all
        return self

    def train(self) -> None:
        """Fit actor and critic to the rollout (the paper's Algorithm 1), then let the observation statistics see it."""
        config, policy, actor, generator = self.config, self.policy, self.policy.actor, self._generator
        policy.train()
        update_learning_rate(policy.optimizer, self._rate_at(self._current_progress_remaining))
        weights, before = self._weights(), self._before_updates()
        samples, several = self.samples, self._ranks.size > 1
        if config.normalize_advantage:
            advantages = samples.advantages
            mean, std = self._ranks.mean_and_std(advantages) if several else (advantages.mean(), advantages.std())
            samples = samples._replace(advantages=(advantages - mean) / (std + 1e-8))

        # The references are taken now, while the policy still is the one that acted: no copy of it is needed.
        chord = config.jacobian_coef > 0 or (config.spread_coef > 0 and config.spread != "score")
        references = record_references(actor, self._ratio, samples, generator, chord=chord)
        steered: dict[str, float] = {}
        if config.target_entropy is not None:
            entropy = self._ranks.average(policy_entropy(actor, samples.obs).item())
            given = (entropy, self._spread_coef, config.target_entropy, self._current_progress_remaining)
            self._spread_coef, steered = steered_weight(*given)
        spread_coef = torch.tensor(steered.get("flow/spread_coef", config.spread_coef), device=self.device)
        if config.spread_coef > 0 and config.spread == "score":
            noise = posterior_noise(actor, samples, generator)
            references = references._replace(samples=references.samples._replace(posterior_noise=noise))
        elif config.spread_coef > 0 and config.spread == "consistent":
            rate = spread_rate(actor, config.spread_std).expand_as(samples.z)
            references = references._replace(samples=references.samples._replace(spread_rate=rate))

        bc_coef = torch.tensor(self._present_weight() if config.bc_coef > 0 else 0.0, device=self.device)
        self._use_two_rates(weights)
        passes = list[dict[str, float]]()
        if several:
            self._ranks.begin_updates()
        for _ in range(config.n_epochs):
            epoch, metrics = draw_epoch(actor, self._ratio, references, generator), list[Tensor]()
            if config.solver_error_coef > 0:
                time = torch.empty_like(samples.values).uniform_(0, 0.5, generator=generator)
                epoch = epoch._replace(error_time=time)
            if config.bc_coef > 0:
                epoch = self._with_expert(epoch)
            order = torch.randperm(len(epoch.obs), generator=generator, device=self.device)
            for minibatch in epoch.minibatches(config.batch_size, order):
                # The gradient of the sum of `losses`, its clip, the optimizer's step, then the weight average follows.
                scalars = self._update(weights, minibatch, spread_coef, bc_coef)
                if scalars is not None:  # else it was left out
                    metrics.append(scalars)
            means = self._settle(metrics, before)
            if not means and before is not None:  # the updates were taken back
                passes.clear()
                break
            passes += [means] if means else []
            if means and config.target_kl is not None and means["train/approx_kl"] > 1.5 * config.target_kl:
                break
        if several:
            self._ranks.end_updates()
        self._record(steered)
        if passes:
            self._report(passes, epoch)
        if self._iteration > 0 and not self._is_pretrained:  # the first rollout's are known already
            policy.obs_norm.update(self.storage.features[:-1].flatten(0, 1), self._ranks)
        self._iteration += 1

    def _report(self, passes: list[dict[str, float]], epoch: Samples) -> None:
        """Adapt the learning rate to the iteration's epochs and log them.

        Args:
            passes: means of the scalars over each epoch.
            epoch: what the last of them learned from.
        """
        config, policy = self.config, self.policy
        self._n_updates += len(passes)
        means = {name: sum(each[name] for each in passes) / len(passes) for name in passes[0]}
        means |= self._adapt_weight(means)
        # The KL of an iteration's first update is 0, as is that of an actor that is frozen: it says nothing.
        says = any(each.requires_grad for each in policy.actor.parameters()) and not (
            len(passes) == 1 and len(epoch.obs) <= config.batch_size
        )
        if config.lr_schedule == "adaptive" and says and not self.is_warming_up:
            self._adapt_learning_rate(means["train/approx_kl"])
        if self._monitor is not None:
            self._rate, watched = self._monitor.watch(policy, means, self.ep_info_buffer, self._rate)
            means |= watched
        update_learning_rate(policy.optimizer, self._rate_at(self._current_progress_remaining))
        if config.diagnostics_interval and self._iteration % config.diagnostics_interval == 0:
            means |= flow_diagnostics(policy.actor, self._ratio, epoch, config.clip_range)
        values, returns = (each.cpu().numpy() for each in (self.samples.values, self.samples.returns))
        means["train/explained_variance"] = explained_variance(values, returns)
        means |= {"train/clip_range": config.clip_range, "train/learning_rate": policy.optimizer.param_groups[0]["lr"]}
        means["train/std"] = policy.actor.noise_log_std().exp().mean().item()
        means["flow/base_std"] = policy.actor.base_noise_log_std().exp().mean().item()
        self._record(means)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _adapt_learning_rate(self, kl: float) -> None:
        """Keep the KL within a factor of 2 of desired_kl (Schulman et al. 2017, section 4, on the learning rate)."""
        goal = self.config.kl_goal(self._current_progress_remaining)
        if kl > 2 * goal:
            self._rate = max(self._rate / 1.5, self.config.lr_min)
        elif kl < goal / 2:
            self._rate = min(self._rate * 1.5, self.config.lr_max)
