"""Numbers that are not finite: found where they arise, named, and treated as an agent's Config says.

    raise      an error that names the environment or the term, before anything is learned from it
    skip       a transition with such an observation or reward is left out, and so is an update with such a loss or
               gradient. On CUDA every update then waits for the device
    rollback   transitions as with skip; after such an update, or of weights that are not finite, the weights, their
               average and the optimizer go back to what they were before the agent's last call of `train`

Where an observation is not finite the agent acts on the last one that was, until the environment recovers or its
episode ends, and learns nothing from it. An action that is not finite is always an error: weights that only the actions
betray were changed from outside. What a restarted worker reports (`SupervisedVecEnv`) is left out, too. The transition
model of LipschitzMBPO has its own error.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import MaybeCallback
from torch import Tensor

from .observations import batch_of_one, observation_vectors, row_of, with_rows
from .policy import JoinedPolicy
from .update import Batch

LEFT_OUT = "left_out"
"""Key of the infos of transitions that are not to be learned from."""
_SUMS = ("train/loss", "train/grad_norm")  # not finite for what another term is to blame for


class Guarded(BaseAlgorithm):
    """The part of an agent that looks at its numbers; comes before Stable-Baselines3's class among the bases."""

    config: Any  # with the field `nonfinite`
    policy: JoinedPolicy
    _held: np.ndarray  # [N], environments whose last observation is an older one, held
    _transitions_left_out = _updates_left_out = _rollbacks = _worker_restarts = 0  # so far

    def _setup_learn(
        self, total_timesteps: int, callback: MaybeCallback = None, reset_num_timesteps: bool = True,
        tb_log_name: str = "run", progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:  # fmt: skip
        begins = reset_num_timesteps or self._last_obs is None  # else it goes on where it was, maybe in a saved file
        result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        for _, fault in _faults(observation_vectors(self._last_obs, self.observation_space), "observation"):
            raise ValueError(fault)  # there is none before it to act on
        if begins or not hasattr(self, "_held"):
            self._held = np.zeros(self.n_envs, bool)
        return result

    def _check_actions(self, actions: np.ndarray) -> None:
        """Refuse actions [N, ...] that are not finite, and name the weight to blame."""
        for _, fault in _faults(actions.reshape(len(actions), -1), "action"):
            raise ValueError(f"{fault}; {_blame(self.policy)}")

    def _screen(self, new_obs: Any, rewards: np.ndarray, dones: np.ndarray, infos: Any) -> tuple[Any, np.ndarray]:
        """Look at what the environments returned to the last observation.

        Returns:
            The observations, finite ones, and which transitions to leave out, [N]; their infos have `LEFT_OUT`, and
            finite terminal observations.

        Raises:
            ValueError: if an observation or a reward is not finite, with nonfinite="raise".
        """
        held, space, left_out = self._last_obs, self.observation_space, self._held
        vectors = observation_vectors(new_obs, space)
        self._held = ~np.isfinite(vectors).all(1)
        faults = dict(_faults(vectors, "observation"))
        for i in np.flatnonzero(dones).tolist():
            last = infos[i].get("terminal_observation", row_of(new_obs, i))
            if found := dict(_faults(observation_vectors(batch_of_one(last), space), "observation", i)):
                faults |= found
                infos[i]["terminal_observation"] = row_of(held, i)
            restarted = infos[i].get("worker_restarted", False)
            left_out[i] |= restarted
            self._worker_restarts += int(restarted)
        faults |= dict(_faults(rewards[:, None], "reward"))
        for i, fault in faults.items():
            if self.config.nonfinite == "raise":
                raise ValueError(f"{fault}; check the environment, or set nonfinite to skip")
            warnings.warn(f"{fault}; the transition is left out", RuntimeWarning, stacklevel=2)
            left_out[i] = True
        if left_out.any():
            new_obs = with_rows(new_obs, self._held, held)
            self._transitions_left_out += int(left_out.sum())
            for i in np.flatnonzero(left_out).tolist():
                infos[i][LEFT_OUT] = True
        return new_obs, left_out

    def _before_updates(self) -> Callable[[], None] | None:
        """What puts the weights back to what they are now; None where that is not wanted."""
        return self.policy.snapshot() if self.config.nonfinite == "rollback" else None

    def _refuses(self, terms: Batch) -> bool:
        """Whether to leave an update out, because one of its terms (a scalar each) is not finite."""
        if self.config.nonfinite != "skip" or torch.stack(list(terms.values())).isfinite().all():
            return False
        self._updates_left_out += 1
        fault = _first_fault(list(terms), torch.stack(list(terms.values()))[None])
        warnings.warn(f"{fault}; the update is left out", RuntimeWarning, stacklevel=2)
        return True

    def _settle(self, terms: Batch, metrics: list[Tensor], restore: Callable[[], None] | None) -> dict[str, float]:
        """Means of the terms over the updates that were made. The one point at which the host waits for the device.

        Args:
            terms: by name, of any update.
            metrics: the terms of each update, [number of terms]; emptied where the updates were taken back.
            restore: what `_before_updates` returned.

        Returns:
            The means; none where the updates were taken back.

        Raises:
            ValueError: if a term or a weight is not finite and nothing can be taken back, or every update was left out.
        """
        if not metrics:
            raise ValueError("non-finite losses: got no update whose terms are finite; lower learning_rate")
        table, weights = torch.stack(metrics), self.policy.joined().detach()
        *means, total = torch.cat([table.mean(0), weights.sum()[None]]).tolist()
        if np.isfinite([*means, total]).all():
            return dict(zip(terms, means, strict=True))
        fault = _first_fault(list(terms), table) or f"non-finite weights: {_blame(self.policy)}"
        if restore is None:
            remedy = "lower learning_rate, or set nonfinite to rollback"
            raise ValueError(f"{fault} at step {self.num_timesteps}; {remedy}")
        restore()
        metrics.clear()
        self._rollbacks += 1
        warnings.warn(f"{fault}; the weights go back to those before the updates", RuntimeWarning, stacklevel=2)
        return {}

    def _record_faults(self) -> None:
        """Log how many there were so far."""
        self.logger.record("rollout/transitions_left_out", self._transitions_left_out)
        self.logger.record("rollout/worker_restarts", self._worker_restarts)
        self.logger.record("train/updates_left_out", self._updates_left_out)
        self.logger.record("train/rollbacks", self._rollbacks)


class GuardedOffPolicy(Guarded, OffPolicyAlgorithm):
    """An off-policy agent that looks at every transition before it stores it."""

    def _store_transition(
        self, replay_buffer: ReplayBuffer, buffer_action: np.ndarray, new_obs: Any, reward: np.ndarray,
        dones: np.ndarray, infos: list[dict[str, Any]],
    ) -> None:  # fmt: skip
        self._check_actions(buffer_action)
        new_obs, _ = self._screen(new_obs, reward, dones, infos)
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)


def replaced(batch: Batch, left_out: Tensor, generator: torch.Generator) -> Batch:
    """The batch, first axis B, with the rows left out, [B], replaced by others drawn at random: its size is the same.

    Raises:
        ValueError: if every row is left out.
    """
    kept = (~left_out).nonzero().squeeze(1)
    if not len(kept):
        raise ValueError("non-finite rollout: got no transition of finite numbers; check the environment")
    drawn = kept[torch.randint(len(kept), (len(left_out),), generator=generator, device=kept.device)]
    rows = torch.where(left_out, drawn, torch.arange(len(left_out), device=kept.device))
    return {name: values[rows] for name, values in batch.items()}


def _faults(values: np.ndarray, what: str, first: int = 0) -> Iterator[tuple[int, str]]:
    """Environment and description of each row of values [N, ...] with an entry that is not finite."""
    if np.isfinite(values).all():
        return
    for i in np.flatnonzero(~np.isfinite(values).all(1)).tolist():
        j = int(np.flatnonzero(~np.isfinite(values[i]))[0])
        where = f" in entry {j}" if values.shape[1] > 1 else ""
        text = f"non-finite {what}: got {values[i, j]}{where} of environment {first + i}, expected finite numbers"
        yield first + i, text


def _first_fault(names: list[str], table: Tensor) -> str:
    """Description of the first number that is not finite in a table [updates, terms]; empty if all are finite."""
    for update, row in enumerate(table.tolist()):
        found = {name: value for name, value in zip(names, row, strict=True) if not np.isfinite(value)}
        for name in sorted(found, key=_SUMS.__contains__):  # terms before what they are part of
            which = f" in update {update}" if len(table) > 1 else ""
            return f"non-finite term of the loss: got {found[name]} for {name}{which}"
    return ""


def _blame(policy: JoinedPolicy) -> str:
    """The weights that are not finite."""
    names = [name for name, weight in policy.named_parameters() if not weight.isfinite().all()]
    return f"got such numbers in {', '.join(names)}" if names else "all weights are finite"


def record(logger: Logger, values: Mapping[str, float]) -> None:
    """Log values by name."""
    for name, value in values.items():
        logger.record(name, value)
