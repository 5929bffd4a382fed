"""Transitions on the device: a ring buffer, minibatches, Stable-Baselines3's replay buffer on top, and its file."""

from __future__ import annotations

import io
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

from ..common.networks import lazy_zeros
from ..common.observations import LEFT_OUT, observation_vectors
from ..storage import format as checkpoint
from ..storage.format import PICKLED
from ..storage.saving import Checkpointed, PathOrFile, label_of, opened
from ..storage.values import CheckpointError, storable


class Transitions(NamedTuple):
    """Transitions of the environment or of the model, raw observations."""

    obs: Tensor  # [B, O]
    action: Tensor  # in [-1, 1], [B, D]
    next_obs: Tensor  # the state reached, before any reset, [B, O]
    reward: Tensor  # [B]
    terminated: Tensor  # 1 where the episode terminated, [B]


class Search(NamedTuple):
    """How far adversarial states may lie from a state, where the search begins, and what shakes it."""

    radius: Tensor  # largest change of each observation, [O]
    start: Tensor  # uniform in [-1, 1], [B, O]
    ascent: Tensor | None = None  # standard normals of Langevin ascent, [B, steps, O]


class Minibatch(NamedTuple):
    """Transitions with observations as the networks see them, and all noise that the losses need."""

    obs: Tensor  # [B, O]
    action: Tensor  # [B, D]
    next_obs: Tensor  # [B, O]
    reward: Tensor  # [B]
    terminated: Tensor  # [B]
    noise: Tensor  # standard normals of the action chosen in obs, [B, D]
    next_noise: Tensor  # of the one in next_obs, [B, D]
    search: Search | None = None  # where critics are made robust
    pair: Tensor | None = None  # the critics of the target where there are more than two, [2]


_CAPACITY = "buffer_size, or model_rollouts and model_retain"
"""What sets the size of a `TransitionRing`."""


class TransitionRing:
    """Ring buffer of transitions, each one row of a matrix: a minibatch is gathered by a single kernel.

    Args:
        capacity: rows kept, the newest.
        obs_dim: length of an observation vector, O.
        action_dim: number of action dimensions, D; actions are in [-1, 1].
        device: where the rows live.
    """

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device) -> None:
        self.capacity = capacity
        self._widths = (obs_dim, action_dim, obs_dim, 1, 1)
        self.rows = lazy_zeros(capacity, sum(self._widths), device=device, option=_CAPACITY)
        self.position, self.size = 0, 0

    def get_state(self) -> dict[str, Any]:
        """All that is kept, for `set_state`: capacity, position and the rows in use, which are no copy."""
        return {"capacity": self.capacity, "position": self.position, "rows": self.rows[: self.size]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over what another ring buffer had.

        Raises:
            ValueError: if its rows are of another length, or its numbers do not fit each other.
        """
        capacity, position, used = state["capacity"], state["position"], state["rows"]
        if used.ndim != 2 or used.shape[1] != sum(self._widths) or used.dtype != self.rows.dtype:
            got, expected = f"{used.dtype} {list(used.shape)}", f"{self.rows.dtype} [.., {sum(self._widths)}]"
            raise ValueError(f"transitions: got rows of {got}, expected {expected}; those of this environment")
        if not (len(used) <= capacity and position == (position if len(used) == capacity else len(used)) % capacity):
            raise ValueError(f"transitions: got {len(used)} rows, capacity {capacity} and position {position}")
        self.rows = lazy_zeros(capacity, used.shape[1], device=self.rows.device, option=_CAPACITY)
        self.rows[: len(used)] = used
        self.capacity, self.position, self.size = capacity, position, len(used)

    def __len__(self) -> int:
        return self.size

    def append(self, obs: Tensor, action: Tensor, next_obs: Tensor, reward: Tensor, terminated: Tensor) -> None:
        """Add transitions: obs and next_obs [B, O], action [B, D], reward and terminated [B]."""
        scalars = torch.stack([reward, terminated.to(reward.dtype)], 1)
        self.append_rows(torch.cat([obs, action, next_obs, scalars], 1))

    def append_rows(self, rows: Tensor) -> None:
        """Add transitions as rows [B, W], the columns in the order of `Transitions`."""
        rows = rows[-self.capacity :]
        first = min(len(rows), self.capacity - self.position)
        self.rows[self.position : self.position + first] = rows[:first]
        self.rows[: len(rows) - first] = rows[first:]
        self.position = (self.position + len(rows)) % self.capacity
        self.size = min(self.size + len(rows), self.capacity)

    def resize(self, capacity: int) -> None:
        """Make room for `capacity` rows; the newest stay."""
        if capacity != self.capacity:
            kept = self.newest(capacity)
            self.rows = lazy_zeros(capacity, sum(self._widths), device=self.rows.device, option=_CAPACITY)
            self.rows[: len(kept)] = kept
            self.capacity, self.size, self.position = capacity, len(kept), len(kept) % capacity

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Rows drawn uniformly with replacement, [count, W]."""
        return self.rows[torch.randint(self.size, (count,), generator=generator, device=self.rows.device)]

    def newest(self, count: int) -> Tensor:
        """The last rows added, at most `count`, oldest first, [.., W]."""
        count = min(count, self.size)
        return (
            self.rows.roll(-self.position, 0)[-count:]
            if self.position < count
            else self.rows[self.position - count : self.position]
        )

    def unpack(self, rows: Tensor) -> Transitions:
        """The transitions in rows [B, W], as views."""
        obs, action, next_obs, reward, terminated = rows.split(self._widths, dim=-1)
        return Transitions(obs, action, next_obs, reward.squeeze(-1), terminated.squeeze(-1))

    def all(self) -> Transitions:
        """Everything that is kept, oldest first only until the ring has come round."""
        return self.unpack(self.rows[: self.size])


@storable
class TensorReplay(ReplayBuffer):
    """Stable-Baselines3's replay buffer with its rows in a `TransitionRing`, of observation vectors in float32.

    A transition that a time limit cut off is stored as not terminated, with the observation reached; one whose info has
    `LEFT_OUT` is not stored.

    Args:
        buffer_size: transitions kept, all environments together.
        observation_space: Box, or Dict of Boxes.
        action_space: Box.
        device: where the rows live.
        n_envs: environments that add to it.
        optimize_memory_usage: not supported; here for Stable-Baselines3's constructor.

    Raises:
        ValueError: if optimize_memory_usage is asked for.
    """

    def __init__(
        self, buffer_size: int, observation_space: spaces.Space, action_space: spaces.Space,  # type: ignore[type-arg]
        device: torch.device | str = "auto", n_envs: int = 1, optimize_memory_usage: bool = False,
    ) -> None:  # fmt: skip
        if optimize_memory_usage:
            raise ValueError("optimize_memory_usage: got True, expected False; next observations are stored as such")
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs)
        self.optimize_memory_usage, self.handle_timeout_termination = False, True
        obs_dim = get_flattened_obs_dim(observation_space)
        self.transitions = TransitionRing(buffer_size, obs_dim, self.action_dim, torch.device(self.device))

    def add(
        self, obs: Any, next_obs: Any, action: np.ndarray, reward: np.ndarray, done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:  # fmt: skip
        """Add one transition of each environment; see `ReplayBuffer.add`."""
        truncated = np.array([info.get("TimeLimit.truncated", False) for info in infos])
        vectors = [observation_vectors(each, self.observation_space) for each in (obs, next_obs)]
        kept = np.array([LEFT_OUT not in info for info in infos])
        scalars = reward[:, None], (done & ~truncated)[:, None]
        # One array, as a step of the environments then costs one copy to the device.
        rows = np.concatenate([vectors[0], action.reshape(len(done), -1), vectors[1], *scalars], 1, dtype=np.float32)
        self.transitions.append_rows(torch.from_numpy(rows[kept]).to(self.device))
        self._note()

    def get_state(self) -> dict[str, Any]:
        """See `TransitionRing`."""
        return self.transitions.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """See `TransitionRing`; raises ValueError also where numbers are not finite."""
        if wrong := int((~state["rows"].isfinite().all(1)).sum()):
            raise ValueError(f"transitions: got {wrong} rows with nan or infinity, expected finite numbers")
        self.transitions.set_state(state)
        self.buffer_size = self.transitions.capacity
        self._note()

    def resize(self, capacity: int) -> None:
        """Make room for `capacity` transitions; the newest stay."""
        self.transitions.resize(capacity)
        self.buffer_size = capacity
        self._note()

    def _note(self) -> None:
        self.pos, self.full = self.transitions.position, self.transitions.size == self.buffer_size

    def size(self) -> int:
        """Number of transitions stored."""
        return len(self.transitions)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.transitions.position = self.transitions.size = 0

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """A minibatch in Stable-Baselines3's form, for its callbacks and tools; our agents draw from `transitions`."""
        generator = torch.Generator(self.transitions.rows.device).manual_seed(int(np.random.randint(2**31)))
        batch = self.transitions.unpack(self.transitions.draw(batch_size, generator))
        terminated, reward = batch.terminated.unsqueeze(1), batch.reward.unsqueeze(1)
        return ReplayBufferSamples(batch.obs, batch.action, batch.next_obs, terminated, reward)


_RENAMED = {"imagined": "model_buffer"}
"""Buffers of agents that an earlier version saved -> what they are called now."""


class CheckpointedReplay(Checkpointed, OffPolicyAlgorithm):
    """The same for an agent with a replay buffer, whose file holds data only, too."""

    replay_buffer: TensorReplay | None

    def training_state(self) -> dict[str, Any]:
        """See `Checkpointed`; with all transitions that the agent has, seen or imagined."""
        kept = {name: each for name, each in vars(self).items() if isinstance(each, TransitionRing | TensorReplay)}
        return super().training_state() | {"transitions": {name: each.get_state() for name, each in kept.items()}}

    def set_training_state(self, state: dict[str, Any]) -> None:
        """See `Checkpointed`."""
        super().set_training_state(state)
        for name, each in state["transitions"].items():
            getattr(self, _RENAMED.get(name, name)).set_state(each)

    def save_replay_buffer(self, path: PathOrFile) -> None:
        """Save the replay buffer to a file, with or without .zip, or to a file object."""
        assert self.replay_buffer is not None
        document = checkpoint.encode(self.replay_buffer.get_state())
        with opened(path, "w") as file:
            checkpoint.write(file, {"replay": document})

    def load_replay_buffer(
        self, path: PathOrFile, truncate_last_traj: bool = True, *, allow_pickle: bool = False
    ) -> None:
        """Replace the replay buffer's content by a saved one's: what is newest where that does not fit.

        Args:
            path: file, with or without .zip, or file object.
            truncate_last_traj: for Stable-Baselines3; only its HerReplayBuffer looks at it.
            allow_pickle: read a pickled buffer, too. That executes what is in it.

        Raises:
            CheckpointError: if the file is damaged, pickled without `allow_pickle`, or of other transitions.
        """
        with opened(path, "r") as file:
            label, pickled = label_of(path, file), file.read(1) == b"\x80"
            file.seek(0)
            if pickled and not allow_pickle:
                raise CheckpointError(f"no checkpoint: {label}: {PICKLED}")
            if pickled:
                super().load_replay_buffer(cast(io.BufferedIOBase, file), truncate_last_traj)
                assert self.replay_buffer is not None
                state = self.replay_buffer.get_state()  # those of before had no room for more than they held
            else:
                state = checkpoint.read(file, "replay", label)
        assert self.replay_buffer is not None
        try:
            self.replay_buffer.set_state(state)
            self.replay_buffer.resize(self.buffer_size)
        except Exception as error:  # whatever data of other kinds and sizes lead to
            raise CheckpointError(f"{label}: no replay buffer of this agent: {error}") from error
