"""The part of PolicyFlow that learns from demonstrations: before reinforcement learning, and beside it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from stable_baselines3.common.type_aliases import MaybeCallback

from ..common.demonstrations import Demonstrations
from ..common.weights import Weights
from .fine_tuning import two_rates
from .pretraining import Follow, Pretraining, PretrainResult, PretrainSettings, Steps
from .ratios import Samples
from .rollout import FlowRollouts


class Imitation(FlowRollouts):
    """An on-policy agent that can begin from demonstrations."""

    _is_pretrained = False
    """Whether it was: the statistics of its observations are then those of the demonstrations and stay so."""

    _expert_data: Steps | None = None
    """The demonstrations, with raw observations."""
    _chose_expert = False
    """Whether somebody said which of them the update imitates."""
    _bc_factor = 1.0
    """By which the weight of their loss has adapted."""
    _bc_reference: float | None = None
    """What their loss was in the first iteration, where the weight adapts."""

    def use_demonstrations(self, data: Demonstrations) -> None:
        """Learn from demonstrations beside the rollouts, with weight bc_coef; saved agents do not hold them.

        Raises:
            ValueError: if the demonstrations are of other spaces.
        """
        self._expert_data, self._chose_expert = Steps.of(self.policy, self._decisions(data)), True

    def _decisions(self, data: Demonstrations) -> Demonstrations:
        """Demonstrations in chunks as the policy acts in."""
        normalizer = self.get_vec_normalize_env()
        if normalizer is not None and normalizer.norm_obs:
            raise ValueError(
                "demonstrations: got raw observations for an agent behind VecNormalize, which sees others; use "
                "normalize_observation=True in place of VecNormalize's norm_obs"
            )
        data = data.chunked(self.config.chunk)
        expected = (self.policy.obs_dim, self.policy.action_dim)
        got = (data.observations.shape[1], data.actions.shape[1])
        if expected != got:
            raise ValueError(f"demonstrations: got {got} observations and actions per step, expected {expected}")
        return data

    def _setup_learn(
        self, total_timesteps: int, callback: MaybeCallback = None, reset_num_timesteps: bool = True,
        tb_log_name: str = "run", progress_bar: bool = False,
    ) -> Any:  # fmt: skip
        if self.config.bc_coef > 0 and self._expert_data is None:
            got = self.config.bc_coef
            raise ValueError(f"bc_coef: got {got} without demonstrations; call agent.use_demonstrations(data) first")
        if self._expert_data is not None and self.config.bc_coef == 0:
            warnings.warn("demonstrations: they change nothing with bc_coef 0", UserWarning, stacklevel=3)
        if self.config.freeze_flow:
            self._check_steering()
        iterations = -(-total_timesteps // (self.config.n_steps * self.n_envs))
        if self._iteration + iterations <= self.config.critic_warmup:
            text = f"critic_warmup: got {self.config.critic_warmup}, and no more than {iterations} iterations to come"
            warnings.warn(f"{text}: the policy stays as it is", UserWarning, stacklevel=3)
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)

    def _check_steering(self) -> None:
        """Raise ValueError unless there is a flow to steer that stays as it is."""
        field, like = self.policy.actor.field, self.policy.actor.log_std
        if any(each.requires_grad for each in field.parameters()):
            raise ValueError("freeze_flow: got a velocity field that learns; freeze it (requires_grad_(False))")
        with torch.no_grad():
            ones = like.new_ones(1, max(self.policy.action_dim, self.policy.obs_dim))
            velocity = field(0.5, ones[:, : self.policy.action_dim], ones[:, : self.policy.obs_dim])
        if self.config.base == "learned" and not velocity.any():
            raise ValueError("freeze_flow: got a velocity field that is 0, expected a trained one; call pretrain first")

    def _with_expert(self, epoch: Samples) -> Samples:
        """An epoch with as many demonstrated steps beside its own."""
        if self._expert_data is None:
            return epoch
        steps = self._expert_data
        rows = torch.randint(len(steps.obs), epoch.values.shape, generator=self._generator, device=steps.obs.device)
        return epoch._replace(expert=steps.rows(rows).normalised(self.policy).with_noise(self._generator))

    def _present_weight(self) -> float:
        schedule, weight = self.config.bc_schedule, float(self.config.bc_coef)
        if schedule == "adaptive":
            return weight * self._bc_factor
        return weight * self._current_progress_remaining if schedule == "linear" else weight

    def _adapt_weight(self, means: Mapping[str, float]) -> dict[str, float]:
        """Steer the weight after an iteration, by its mean imitation loss; returns what is to be logged."""
        if self.config.bc_coef == 0:
            return {}
        used, loss = self._present_weight(), means["flow/bc_loss"]
        if self.config.bc_schedule == "adaptive" and not self.is_warming_up:  # until then the actor stays
            if self._bc_reference is None:
                self._bc_reference = loss
            # Losses of a Gaussian policy can be negative: the tenth is of its size.
            rises = loss > self._bc_reference + 0.1 * abs(self._bc_reference)
            self._bc_factor = min(max(self._bc_factor * (1.2 if rises else 1 / 1.2), 0.01), 100.0)
        return {"flow/bc_coef": used}

    @property
    def is_warming_up(self) -> bool:
        """Whether only the critic learns yet."""
        return self._iteration < int(self.config.critic_warmup)

    def _use_two_rates(self, weights: Weights) -> None:
        """For the updates of an iteration, where the critic has a rate of its own or learns alone at first."""
        config, rate = self.config, self._rate_at(self._current_progress_remaining)
        weights.shares = ()
        if config.critic_learning_rate is None and not config.critic_warmup:
            return
        critic_rate = rate if config.critic_learning_rate is None else config.critic_learning_rate
        if config.critic_learning_rate is not None and config.lr_schedule == "linear":
            critic_rate *= self._current_progress_remaining
        two_rates(weights, 0.0 if self.is_warming_up else rate, critic_rate)

    @property
    def is_pretrained(self) -> bool:
        """Whether `pretrain` has finished."""
        return self._is_pretrained

    def pretrain(
        self, data: Demonstrations, steps: int | None = None, *, settings: PretrainSettings | None = None,
        state: dict[str, Any] | None = None, follow: Follow | None = None,
    ) -> PretrainResult:  # fmt: skip
        """Learn to act as demonstrated, by conditional flow matching from the policy's own base.

        The weights kept are the average that has the best loss on episodes held out. `learn` goes on from them.

        Args:
            data: demonstrations, see `read_demonstrations`.
            steps: gradient updates at most, in place of settings.
            settings: how, in place of steps. With bc_coef above 0 the update imitates the same demonstrations
                afterwards, unless `use_demonstrations` chose others.
            state: of a `Pretraining` that was broken off, to go on with.
            follow: called after each look at the validation loss, for example to log it.

        Raises:
            ValueError: unless either steps or settings are given, if one is outside its range, the demonstrations are
                of other spaces or no episode is as long as a chunk, or the loss is not finite.
        """
        if (steps is None) == (settings is None):
            raise ValueError(f"steps: got {steps} with settings {settings}, expected one of the two")
        settings = settings or PretrainSettings(steps or 0)
        decisions = self._decisions(data)
        # Steering freezes the field after pretraining; what the user froze stays as it is.
        every = self.config.freeze_flow
        frozen = [name for name, each in self.policy.actor.named_parameters() if not (every or each.requires_grad)]
        pretraining = Pretraining(self.policy, decisions, settings, (self.seed or 0) % 2**31, frozen)
        if state is not None:
            pretraining.set_state(state)
        while not pretraining.is_over:
            metrics = pretraining.advance()
            if follow is not None:
                follow(pretraining, metrics)
        pretraining.finish()
        self._is_pretrained = True
        if self.config.bc_coef > 0 and not (self._chose_expert and self._expert_data is not None):
            self._expert_data = Steps.of(self.policy, decisions)
        return PretrainResult(pretraining.step, pretraining.best_loss, pretraining.check_solver())
