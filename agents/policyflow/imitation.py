"""The part of PolicyFlow that learns from demonstrations: before reinforcement learning."""

from __future__ import annotations

from typing import Any

from ..common.demonstrations import Demonstrations
from .pretraining import Follow, Pretraining, PretrainResult, PretrainSettings
from .rollout import FlowRollouts


class Imitation(FlowRollouts):
    """An on-policy agent that can begin from demonstrations."""

    _is_pretrained = False
    """Whether it was: the statistics of its observations are then those of the demonstrations and stay so."""

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
            settings: how, in place of steps.
            state: of a `Pretraining` that was broken off, to go on with.
            follow: called after each look at the validation loss, for example to log it.

        Raises:
            ValueError: unless either steps or settings are given, if one is outside its range, the demonstrations are
                of other spaces, or the loss is not finite.
        """
        if (steps is None) == (settings is None):
            raise ValueError(f"steps: got {steps} with settings {settings}, expected one of the two")
        settings = settings or PretrainSettings(steps or 0)
        expected = (self.policy.obs_dim, self.policy.action_dim)
        got = (data.observations.shape[1], data.actions.shape[1])
        if expected != got:
            raise ValueError(f"demonstrations: got {got} observations and actions per step, expected {expected}")
        pretraining = Pretraining(self.policy, data, settings, (self.seed or 0) % 2**31)
        if state is not None:
            pretraining.set_state(state)
        while not pretraining.is_over:
            metrics = pretraining.advance()
            if follow is not None:
                follow(pretraining, metrics)
        pretraining.finish()
        self._is_pretrained = True
        return PretrainResult(pretraining.step, pretraining.best_loss)
