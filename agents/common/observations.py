"""Numbers on their way into an agent: observations made vectors and standardised; what is not finite, found and named.

An observation, a reward, a loss, a gradient or a weight that is not finite is treated as an agent's Config says:

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

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import MaybeCallback, RolloutReturn
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from .networks import check_default_dtype
from .ranks import ALONE, Ranks, check_alone

if TYPE_CHECKING:
    from .policy import BoxPolicy

LEFT_OUT = "left_out"
"""Key of the infos of transitions that are not to be learned from."""


def observation_vectors(obs: Any, space: spaces.Space[Any]) -> np.ndarray:
    """Flatten a batch of observations, or of Dicts of them in the order of their space, to vectors [N, O]."""
    if isinstance(space, spaces.Dict):
        return np.concatenate([observation_vectors(obs[key], part) for key, part in space.spaces.items()], axis=1)
    vectors: np.ndarray = obs.reshape(len(obs), -1)
    return vectors


def split_vectors(vectors: np.ndarray, space: spaces.Space[Any]) -> np.ndarray | dict[str, np.ndarray]:
    """Vectors [..., O] as observations of their space: the inverse of `observation_vectors`."""
    if isinstance(space, spaces.Dict):
        sizes = [int(np.prod(part.shape or ())) for part in space.spaces.values()]
        parts = np.split(vectors, np.cumsum(sizes)[:-1], axis=-1)
        shaped = (
            part.reshape(*part.shape[:-1], *(each.shape or ()))
            for part, each in zip(parts, space.values(), strict=True)
        )
        return dict(zip(space.spaces, shaped, strict=True))
    return vectors.reshape(*vectors.shape[:-1], *(space.shape or ()))


def row_of(obs: Any, i: int) -> Any:
    """Observation i of a batch."""
    return {key: part[i] for key, part in obs.items()} if isinstance(obs, dict) else obs[i]


def batch_of_one(obs: Any) -> Any:
    """An observation as a batch."""
    return (
        {key: np.asarray(part)[None] for key, part in obs.items()} if isinstance(obs, dict) else np.asarray(obs)[None]
    )


def with_rows(obs: Any, rows: np.ndarray, other: Any) -> Any:
    """A copy of a batch [N] with the rows that a mask [N] names taken from another batch."""
    if isinstance(obs, dict):
        return {key: with_rows(part, rows, other[key]) for key, part in obs.items()}
    return np.where(rows.reshape(-1, *[1] * (obs.ndim - 1)), other, obs)


class RunningNorm(nn.Module):
    """Running mean and variance of a stream of vectors, merged batch by batch (Chan et al. 1979).

    Args:
        dim: length of the vectors.
        clip: bound on the magnitude of what `forward` returns, in standard deviations.
        epsilon: added to the variance that `forward` divides by the root of, as VecNormalize does.
        enabled: whether `forward` standardises; the statistics are kept in any case.
    """

    mean: Tensor
    var: Tensor
    count: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, dim: int, clip: float = 10.0, *, epsilon: float = 1e-8, enabled: bool = True) -> None:
        super().__init__()
        self.clip, self.epsilon, self.enabled = clip, epsilon, enabled
        # float64: the statistics run over millions of samples. What `forward` needs of them is kept in float32.
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("var", torch.ones(dim, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    @torch.no_grad()
    def reset(self) -> None:
        """Forget all batches."""
        for name, value in RunningNorm(len(self.mean)).named_buffers():
            getattr(self, name).copy_(value)

    @torch.no_grad()
    def update(self, batch: Tensor, ranks: Ranks = ALONE, weight: float = 1.0) -> None:
        """Merge a batch [B, dim] into the statistics, or those of several ranks; a row counts as `weight` rows."""
        batch = batch.double()
        n, mean, var = batch.shape[0], batch.mean(0), batch.var(0, unbiased=False)
        if ranks.size > 1:
            n, mean, var = ranks.merged(n, mean, var)
        rows = weight * n
        total = self.count + rows
        delta = mean - self.mean
        spread = self.var * self.count + var * rows + delta.square() * self.count * rows / total
        self.mean += delta * rows / total
        self.var.copy_(spread / total)
        self.count.copy_(total)
        self.shift.copy_(self.mean)
        self.scale.copy_((self.var + self.epsilon).rsqrt())

    def forward(self, x: Tensor) -> Tensor:
        """Standardise x [B, dim] and clip it to +-clip; before the first batch only clip it. Not enabled: x itself."""
        return ((x - self.shift) * self.scale).clamp(-self.clip, self.clip) if self.enabled else x


class FiniteTransitions(BaseAlgorithm):
    """The part of an agent that looks at what the environments return; goes before Stable-Baselines3's class."""

    config: Any  # with the field `nonfinite`
    trains_on_ranks: ClassVar[bool] = False
    """Whether several processes can train one agent of the class together."""
    _held: np.ndarray  # [N], environments whose last observation is an older one, held
    _transitions_left_out = _worker_restarts = 0  # so far

    def _setup_learn(
        self, total_timesteps: int, callback: MaybeCallback = None, reset_num_timesteps: bool = True,
        tb_log_name: str = "run", progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:  # fmt: skip
        begins = reset_num_timesteps or self._last_obs is None  # else it goes on where it was, maybe in a saved file
        check_default_dtype()
        if not self.trains_on_ranks:
            check_alone(type(self).__name__)
        result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        for _, fault in _faults(observation_vectors(self._last_obs, self.observation_space), "observation"):
            raise ValueError(fault)  # there is none before it to act on
        if begins or not hasattr(self, "_held"):
            self._held = np.zeros(self.n_envs, bool)
        return result

    def _check_actions(self, actions: np.ndarray) -> None:
        """Refuse actions [N, ...] that are not finite, and name the weight to blame."""
        for _, fault in _faults(actions.reshape(len(actions), -1), "action"):
            raise ValueError(f"{fault}; {blame(self.policy)}")

    def _screen(self, new_obs: Any, rewards: np.ndarray, dones: np.ndarray, infos: Any) -> tuple[Any, np.ndarray]:
        """Look at what the environments returned to the last observation.

        Returns:
            The observations, finite ones, and which transitions to leave out, [N]; their infos have `LEFT_OUT`, and
            finite terminal observations.

        Raises:
            ValueError: if an observation or a reward is not finite, with nonfinite="raise".
        """
        held, space, left_out = self._last_obs, self.observation_space, self._held
        vectors = _as_learned(observation_vectors(new_obs, space))
        self._held = np.asarray(~np.isfinite(vectors).all(1))
        seen = dict(_faults(vectors, "observation"))
        begun = {i: fault for i, fault in seen.items() if dones[i]}  # of the next episode: the one that ended is sound
        faults = {i: fault for i, fault in seen.items() if not dones[i]}
        for i in np.flatnonzero(dones).tolist():
            last = infos[i].get("terminal_observation", row_of(new_obs, i))
            if found := dict(_faults(observation_vectors(batch_of_one(last), space), "observation", i)):
                faults |= found
                infos[i]["terminal_observation"] = row_of(held, i)
            restarted = infos[i].get("worker_restarted", False)
            left_out[i] |= restarted
            self._worker_restarts += int(restarted)
        faults |= dict(_faults(rewards[:, None], "reward"))
        for i, fault in (begun | faults).items():
            if self.config.nonfinite == "raise":
                raise ValueError(f"{fault}; check the environment, or set nonfinite to skip")
            warnings.warn(f"{fault}; the transition is left out", RuntimeWarning, stacklevel=2)
            left_out[i] |= i in faults
        if self._held.any():
            new_obs = with_rows(new_obs, self._held, held)
        if left_out.any():
            self._transitions_left_out += int(left_out.sum())
            for i in np.flatnonzero(left_out).tolist():
                infos[i][LEFT_OUT] = True
        return new_obs, left_out

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        """As Stable-Baselines3, without returns that are not finite: one would hide a hundred others."""
        for i in range(len(infos)) if dones is None else np.flatnonzero(dones).tolist():
            episode = infos[i].get("episode")
            if episode is not None and not math.isfinite(episode["r"]):
                infos = [*infos[:i], {**infos[i], "episode": None}, *infos[i + 1 :]]
        super()._update_info_buffer(infos, dones)

    def _record_faults(self) -> None:
        """Log how many there were so far."""
        self._record_counts(
            {
                "rollout/transitions_left_out": self._transitions_left_out,
                "rollout/worker_restarts": self._worker_restarts,
            }
        )

    def _record_counts(self, counts: Mapping[str, int]) -> None:
        """Log counts so far of what should not happen: from the first time on, as rows of zeros hide the others."""
        for name, count in counts.items():
            if count:
                self.logger.record(name, count)


class FiniteReplay(FiniteTransitions, OffPolicyAlgorithm):
    """An off-policy agent that looks at actions before they are taken, and at transitions before they are stored."""

    policy: BoxPolicy
    _generator: torch.Generator

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Actions [N, ...] within the Box, and the same in [-1, 1], both checked.

        Random ones at first, then the policy's, by the agent's own generator: who evaluates the agent meanwhile does
        not change them.
        """
        assert action_noise is None
        if self.num_timesteps < learning_starts:
            drawn = self.policy.scale_action(np.array([self.action_space.sample() for _ in range(n_envs)]))
        else:
            vectors = torch.from_numpy(observation_vectors(self._last_obs, self.observation_space))
            drawn = self.policy.draw(vectors.to(self.device, torch.float32), self._generator)
        self._check_actions(drawn)
        return self.policy.unscale_action(drawn), drawn

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, train_freq: Any, replay_buffer: ReplayBuffer, *arguments: Any,
        **keywords: Any,
    ) -> RolloutReturn:  # fmt: skip
        """As Stable-Baselines3; but where a callback ends training, the last step's transition is stored as well.

        Otherwise an agent that goes on would act on the observation before the last.
        """
        rollout = super().collect_rollouts(env, callback, train_freq, replay_buffer, *arguments, **keywords)
        if not rollout.continue_training:
            last = callback.locals
            self._update_info_buffer(last["infos"], last["dones"])
            named = (last[name] for name in ("buffer_actions", "new_obs", "rewards", "dones", "infos"))
            self._store_transition(replay_buffer, *named)
        return rollout

    def _store_transition(
        self, replay_buffer: ReplayBuffer, buffer_action: np.ndarray, new_obs: Any, reward: np.ndarray,
        dones: np.ndarray, infos: list[dict[str, Any]],
    ) -> None:  # fmt: skip
        new_obs, _ = self._screen(new_obs, reward, dones, infos)
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)


def to_box(scaled: np.ndarray, box: Any) -> np.ndarray:
    """Actions in [-1, 1] to a Box, to the last bit within it: the map alone may round beyond a bound."""
    action: np.ndarray = box.low + 0.5 * (scaled + 1.0) * (box.high - box.low)
    within: np.ndarray = np.minimum(np.maximum(action, box.low), box.high)
    return within


def _as_learned(values: np.ndarray) -> np.ndarray:
    """Numbers in float32, as agents learn from them: infinite beyond its range."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32, copy=False)


def _faults(values: np.ndarray, what: str, first: int = 0) -> Iterator[tuple[int, str]]:
    """Environment and description of each row of values [N, ...] with an entry that is not finite."""
    values = _as_learned(values)
    if np.isfinite(values).all():
        return
    for i in np.flatnonzero(~np.isfinite(values).all(1)).tolist():
        j = int(np.flatnonzero(~np.isfinite(values[i]))[0])
        where = f" in entry {j}" if values.shape[1] > 1 else ""
        text = f"non-finite {what}: got {values[i, j]}{where} of environment {first + i}, expected finite numbers"
        yield first + i, text


def blame(policy: nn.Module) -> str:
    """The weights that are not finite, in words."""
    names = [name for name, weight in policy.named_parameters() if not weight.isfinite().all()]
    return f"got such numbers in {', '.join(names)}" if names else "all weights are finite"
