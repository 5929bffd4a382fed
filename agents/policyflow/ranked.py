"""The part of an on-policy agent that agrees with its other ranks."""

from __future__ import annotations

from itertools import chain
from typing import Any, ClassVar, NamedTuple

import numpy as np
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor

from ..common.config import Configured
from ..common.ranks import Ranks, present
from ..common.update import Updates
from ..storage.saving import Checkpointed
from .policy import FlowPolicy


class Ended(NamedTuple):
    """An episode that ended in a rollout: at which step, on which rank, and what its infos say."""

    step: int
    rank: int
    info: dict[str, Any]


class Report(NamedTuple):
    """What a rank says of its rollout."""

    stops: bool  # whether a callback ended training
    steps: int  # of all its environments
    counts: list[int]  # of `COUNTS`, in this rollout
    ended: list[Ended]
    config: Any
    rate: float  # of learning


COUNTS = ("_transitions_left_out", "_worker_restarts", "_diverged")
"""Attributes that count what should not happen, over all ranks."""
AGREED = ("n_envs", "num_timesteps", "_iteration", "_rate", "_spread_coef", "_bc_factor", "_is_pretrained")
"""Attributes on which the course of training depends."""


class Ranked(Checkpointed, Configured, Updates, OnPolicyAlgorithm):
    """An agent that trains on several ranks as one on the environments and minibatches of all of them together."""

    trains_on_ranks: ClassVar[bool] = True
    policy: FlowPolicy  # type: ignore[assignment]  # SB3 asks for more of its policies than its loops use
    steps_collected = 0  # of the rollout
    _diverged = 0  # unstable simulations so far
    _iteration: int  # so many times `train` was called
    _before: tuple[int, list[int], list[Any], list[Any]]  # the rollout: steps, counts, episodes, successes
    _ended: list[Ended]

    def set_random_seed(self, seed: int | None = None) -> None:
        """As Stable-Baselines3; each rank has environments and noise of its own, rank 0 those of a single process."""
        ranks = self._ranks = present()
        super().set_random_seed(seed if seed is None else seed + ranks.rank * self.n_envs)
        if seed is not None and ranks.rank:
            self._generator.manual_seed(seed + self.num_timesteps + (ranks.rank << 40))

    def _join_ranks(self, total_timesteps: int, reset_num_timesteps: bool) -> Ranks:
        """Begin to train together: from the weights and statistics of rank 0; what else counts must be the same.

        Raises:
            ValueError: if something is not, or the process group was made after the agent.
        """
        ranks, made = present(), self._ranks
        if (ranks.rank, ranks.size) != (made.rank, made.size):
            raise ValueError(
                f"ranks: got an agent made as rank {made.rank} of {made.size} on rank {ranks.rank} of {ranks.size}; "
                "call torch.distributed.init_process_group before the agent is made or loaded"
            )
        self._ranks = ranks
        if ranks.size == 1:
            return ranks
        ranks.begin()
        groups = [{name: repr(each) for name, each in group.items() if name != "params"}
                  for group in self.policy.optimizer.param_groups]  # fmt: skip
        moments = [each for state in self.policy.optimizer.state.values() for each in state.values()]
        mine = {
            **{name: getattr(self, name) for name in AGREED},
            "config": self.config, "total_timesteps": total_timesteps, "reset_num_timesteps": bool(reset_num_timesteps),
            "spaces": [repr(self.observation_space), repr(self.action_space)], "device": self.device.type,
            "weights": [(name, each.shape, each.requires_grad) for name, each in self.policy.named_parameters()],
            "optimizer": [groups, *(repr(each.double().sum().item()) for each in moments if isinstance(each, Tensor))],
        }  # fmt: skip
        all_of_them = ranks.gather(mine)
        if other := [name for name in mine if any(each[name] != all_of_them[0][name] for each in all_of_them)]:
            raise ValueError(f"ranks: got other {', '.join(other)} on one than on another, expected the same on all")
        ranks.share(chain(self.policy.parameters(), self.policy.buffers()))
        if ranks.rank and not self._custom_logger:  # rank 0 logs
            self.set_logger(Logger(None, []))
        return ranks

    def _note(self, infos: list[dict[str, Any]], dones: np.ndarray) -> None:
        """Keep the episodes that end at a step, for the other ranks."""
        for i in np.flatnonzero(dones).tolist():
            info: dict[str, Any] = {name: infos[i][name] for name in ("episode", "is_success") if name in infos[i]}
            self._ended.append(Ended(self.steps_collected, self._ranks.rank, info))

    def _begin_rollout(self) -> None:
        """Keep what `_agree` adds to."""
        counts = [getattr(self, name) for name in COUNTS]
        self._before = self.num_timesteps, counts, [*(self.ep_info_buffer or ())], [*(self.ep_success_buffer or ())]
        self._ended = []

    def _agree(self, stops: bool) -> bool:
        """After the steps of a rollout: take over the other ranks' episodes and counts.

        Args:
            stops: whether a callback of this rank ended training.

        Returns:
            Whether one of any rank did.

        Raises:
            ValueError: if the Config or the learning rate is another than on another rank.
            RankError: if another rank failed.
        """
        begin, before, episodes, successes = self._before
        steps = (self.num_timesteps - begin) // self._ranks.size
        counts = [getattr(self, name) - old for name, old in zip(COUNTS, before, strict=True)]
        rate = self._rate_at(self._current_progress_remaining)
        reports = self._ranks.gather(Report(stops, steps, counts, self._ended, self.config, rate))
        for what in ("config", "rate"):
            if any(getattr(each, what) != getattr(reports[0], what) for each in reports):
                raise ValueError(f"ranks: got another {what} on one than on another; it must be the same on all")
        self.num_timesteps = begin + sum(each.steps for each in reports)
        for name, old, *new in zip(COUNTS, before, *(each.counts for each in reports), strict=True):
            setattr(self, name, old + sum(new))
        assert self.ep_info_buffer is not None and self.ep_success_buffer is not None
        for buffer, kept in ((self.ep_info_buffer, episodes), (self.ep_success_buffer, successes)):
            buffer.clear()
            buffer.extend(kept)
        for each in sorted((one for report in reports for one in report.ended), key=lambda one: one[:2]):
            self._update_info_buffer([each.info], np.ones(1, bool))
        return any(each.stops for each in reports)
