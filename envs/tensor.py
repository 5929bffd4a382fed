"""Environments as one program of tensors: observations, rewards and ends stay on the device where they are made.

    env = make_vec("driftrl/MultiGoal-v0", n_envs=4096, seed=0, backend="tensor", device="cuda")

`TensorVecEnv.step_tensor` waits for nothing: no number goes to the host. PolicyFlow collects its rollouts by it. For
everybody else it is a VecEnv of Stable-Baselines3, which hands out NumPy arrays.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn
from torch import Tensor

Array: TypeAlias = NDArray[Any]


class TensorTask(ABC):
    """What a task is, on batches of states [N, S], which are all that determines its course.

    Attributes:
        observation_space: Box of vectors.
        action_space: Box with finite bounds, [D].
        limit: steps after which an episode is truncated; math.inf: never.
        spec: Gymnasium's, where it is one of Gymnasium's tasks.
    """

    observation_space: spaces.Box
    action_space: spaces.Box
    limit: float
    spec: EnvSpec | None = None

    @abstractmethod
    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """States [count, S] in which episodes begin, on the generator's device."""

    @abstractmethod
    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Mapping[str, Tensor]]:
        """Next states [N, S], rewards [N], terminated [N] and entries of info, after actions [N, D] within the bounds.

        Entries of info are [N] or [N, k]. Two have a meaning: "is_success" is reported of episodes that end, and a step
        with "simulation_diverged" is counted.
        """

    def observe(self, state: Tensor) -> Tensor:
        """Observations [N, O] of states, float32."""
        return state.float()

    def look(self) -> None:  # noqa: B027  nothing to do for most tasks
        """Called where the host waits for the device anyway: the place to warn of what went wrong there."""


class TensorStep(NamedTuple):
    """What a step of N environments came to; episodes that ended have begun anew."""

    obs: Tensor  # that follow, [N, O]
    reward: Tensor  # [N], as are the next two
    terminated: Tensor
    truncated: Tensor
    reached: Tensor  # observations reached, before episodes begin anew, [N, O]
    ends: Ends  # for `TensorVecEnv.infos`


class Ends(NamedTuple):
    """What is known of the episodes that ended in a step, [N]; elsewhere of those that go on."""

    ended: Tensor  # of those that are reported
    returns: Tensor
    lengths: Tensor
    info: Mapping[str, Tensor]


_STATE = {
    "states": "state", "returns": "_returns", "lengths": "_lengths", "limits": "_limits", "observation": "obs",
}  # fmt: skip
"""What `get_state` returns -> the attribute that holds it."""


_KNOWN_INFO = ("is_success", "simulation_diverged")
"""Entries of info that have a meaning here: one value per environment."""


def indexed(device: torch.device | str) -> torch.device:
    """A device by its number: "cuda" is the present one, as the tensors say that are made there.

    Raises:
        ValueError: if there is no such device.
    """
    try:
        named = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}, expected cpu, cuda or cuda:N") from error
    if named.type == "cuda" and (named.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {named}, but torch finds {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", torch.cuda.current_device()) if str(named) == "cuda" else named


def _check_task(task: Any, n_envs: Any) -> None:
    """Raise ValueError unless it is a task, with all that a task has, for a number of environments."""
    if not isinstance(task, TensorTask):
        raise ValueError(f"task: got {task}, expected a TensorTask")
    name = type(task).__name__
    if missing := [each for each in ("observation_space", "action_space", "limit") if not hasattr(task, each)]:
        raise ValueError(f"task: got a {name} without {', '.join(missing)}")
    for what in ("observation_space", "action_space"):
        space = getattr(task, what)
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise ValueError(f"task: got a {name} whose {what} is {space}, expected a Box of vectors")
    limit: Any = task.limit
    if not isinstance(limit, int | float) or not limit >= 1:
        raise ValueError(f"limit: got a task whose episodes have {limit} steps, expected 1 at least, or inf")
    if not isinstance(n_envs, int | np.integer) or isinstance(n_envs, bool) or n_envs < 1:
        raise ValueError(f"n_envs: got {n_envs!r}, expected an integer of at least 1")


class TensorVecEnv(VecEnv):
    """N environments of a `TensorTask` on one device.

    Args:
        task: the task.
        n_envs: N, at least 1.
        device: where all tensors are.
        dtype: of the states.
        stagger: whether the first episodes after a reset have random limits, uniform in 1 .. limit, so that not all
            environments are truncated in the same step. Return and length of an episode with a shorter limit are not
            reported, wherever it ends: it is no sample of the task's episodes.

    Raises:
        ValueError: if the task is none or has other spaces, n_envs is no integer of at least 1, there is no such device
            or no limit to stagger; by `reset` and `step_tensor`, if what the task returns has other shapes or types.

    Attributes:
        obs: the present observations, [N, O]; after the first reset.
        diverged: unstable simulations so far, those since the last call of `episodes` or `step_wait` left out.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  as gymnasium has it

    def __init__(
        self, task: TensorTask, n_envs: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
        stagger: bool = False,
    ) -> None:  # fmt: skip
        _check_task(task, n_envs)
        if stagger and task.limit == math.inf:
            raise ValueError("stagger: got True, but episodes of the task have no limit")
        self.task, self.device, self.dtype = task, indexed(device), dtype
        self.stagger, self.diverged = stagger, 0
        self.render_mode = None
        self._generator = torch.Generator(self.device)
        self._generator.seed()
        self._ends: list[Ends] = []
        self._began = time.time()
        bounds = torch.as_tensor(np.stack([task.action_space.low, task.action_space.high]), dtype=torch.float32)
        self._low, self._high = bounds.to(self.device)
        super().__init__(n_envs, task.observation_space, task.action_space)

    def reset_tensor(self) -> Tensor:
        """Begin a new episode everywhere; a seed set by `seed` applies once. Returns observations [N, O]."""
        if self._seeds[0] is not None:
            # Not the seed itself: an agent with the same one would draw the same numbers for its actions.
            mixed = np.random.SeedSequence([self._seeds[0], 1]).generate_state(1, np.uint64)[0]
            self._generator.manual_seed(int(mixed >> np.uint64(1)))
        self._reset_seeds()
        self._reset_options()
        state: Any = self.task.start(self.num_envs, self._generator)
        self._check("start", "states", state, _row(state))
        self.state = state.to(self.dtype)
        self._returns = torch.zeros(self.num_envs, device=self.device)
        self._lengths = torch.zeros(self.num_envs, dtype=torch.long, device=self.device)
        self._limits = torch.full((self.num_envs,), self.task.limit, dtype=torch.float64, device=self.device)
        if self.stagger:
            self._limits.random_(1, int(self.task.limit) + 1, generator=self._generator)
        self._ends.clear()
        obs = self.task.observe(self.state)
        self._check("start and observe", "observations", obs, self.task.observation_space.shape)
        self.obs = obs.float()
        return self.obs

    def _check(self, methods: str, what: str, values: Any, shape: tuple[int, ...], dtype: Any = None) -> None:
        """Raise ValueError unless a task made a tensor of a row per environment, of this shape and type."""
        expected = [self.num_envs, *shape]
        if not isinstance(values, Tensor) or list(values.shape) != expected or dtype not in (None, values.dtype):
            got = f"{list(values.shape)}, {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
            kind = "" if dtype is None else f", {dtype}"
            raise ValueError(f"{type(self.task).__name__}.{methods}: got {what} {got}, expected {expected}{kind}")

    @torch.no_grad()
    def step_tensor(self, actions: Tensor) -> TensorStep:
        """Act by actions [N, D] in the task's units, which are clipped to its bounds. Nothing waits for the device."""
        if not hasattr(self, "state"):
            raise RuntimeError("step: got no first observation yet, call reset before")
        task, inside = self.task, torch.minimum(torch.maximum(actions, self._low), self._high)
        result: Any = task.step(self.state, inside.to(self.dtype))
        if not isinstance(result, tuple) or len(result) != 4 or not isinstance(result[3], Mapping):
            raise ValueError(f"{type(task).__name__}.step: expected states, rewards, terminated and a mapping of info")
        state, reward, terminated, info = result
        self._check("step", "states", state, self.state.shape[1:])
        self._check("step", "rewards", reward, ())
        self._check("step", "terminated", terminated, (), torch.bool)
        for key, values in info.items():
            self._check("step", f"info[{key!r}]", values, () if key in _KNOWN_INFO else _row(values, ()))
        state = state.to(self.dtype)
        self._lengths = self._lengths + 1
        self._returns = self._returns + reward.float()
        truncated = (self._lengths >= self._limits) & ~terminated
        ended = terminated | truncated
        whole = ended
        if self.stagger:
            whole = ended & (self._limits >= task.limit)
            self._limits = self._limits.masked_fill(ended, task.limit)
        ends = Ends(whole, self._returns, self._lengths, info)
        self._ends.append(ends)
        reached = task.observe(state).float()
        begun = task.start(self.num_envs, self._generator).to(self.dtype)
        self.state = torch.where(ended[:, None], begun, state)
        self._returns, self._lengths = self._returns.masked_fill(ended, 0), self._lengths * ~ended
        self.obs = torch.where(ended[:, None], task.observe(self.state).float(), reached)
        return TensorStep(self.obs, reward.float(), terminated, truncated, reached, ends)

    def episodes(self) -> list[dict[str, Any]]:
        """The infos of the episodes that ended since this was last called, as Monitor's; waits for the device."""
        ends, self._ends = self._ends, []
        self.task.look()
        if diverged := [each.info["simulation_diverged"] for each in ends if "simulation_diverged" in each.info]:
            self.diverged += int(torch.stack(diverged).sum())
        return self._said(ends)

    def _said(self, ends: list[Ends]) -> list[dict[str, Any]]:
        if not ends:
            return []
        ended, returns, lengths = (torch.stack(each) for each in zip(*(each[:3] for each in ends), strict=True))
        now = round(time.time() - self._began, 6)
        rows = zip(returns[ended].tolist(), lengths[ended].tolist(), strict=True)
        said: list[dict[str, Any]] = [{"episode": {"r": round(r, 6), "l": int(n), "t": now}} for r, n in rows]
        if "is_success" in ends[0].info:
            success = torch.stack([each.info["is_success"] for each in ends])[ended].tolist()
            said = [each | {"is_success": bool(won)} for each, won in zip(said, success, strict=True)]
        return said

    def reset(self) -> Array:
        """Begin a new episode everywhere. Returns observations [N, O]."""
        obs: Array = self.reset_tensor().cpu().numpy()
        return obs.copy()

    def step_async(self, actions: Array) -> None:
        """Take the actions [N, D]; `step_wait` steps."""
        actions = np.asarray(actions, np.float32)
        expected = (self.num_envs, *self.task.action_space.shape)
        if actions.shape != expected:
            raise ValueError(f"actions: got shape {actions.shape}, expected {expected}")
        self._actions = torch.from_numpy(actions).to(self.device)

    def step_wait(self) -> VecEnvStepReturn:
        """Observations [N, O], rewards [N], dones [N] and infos, as Stable-Baselines3's DummyVecEnv."""
        step = self.step_tensor(self._actions)
        dones, infos = (step.terminated | step.truncated).cpu().numpy(), self.infos(step)
        self.episodes()
        return step.obs.cpu().numpy().copy(), step.reward.cpu().numpy(), dones, infos

    def infos(self, step: TensorStep) -> list[dict[str, Any]]:
        """The infos of a step; waits for the device."""
        ends = step.ends
        columns = {"TimeLimit.truncated": step.truncated, **ends.info}
        rows = zip(*(_column(each) for each in columns.values()), strict=True)
        infos: list[dict[str, Any]] = [dict(zip(columns, row, strict=True)) for row in rows]
        for i in (step.terminated | step.truncated).nonzero().squeeze(1).tolist():
            infos[i]["terminal_observation"] = step.reached[i].cpu().numpy()
        for i, said in zip(ends.ended.nonzero().squeeze(1).tolist(), self._said([ends]), strict=True):
            infos[i] |= said
        return infos

    def get_state(self) -> dict[str, Any]:
        """All that determines the course of the environments, as arrays, for `set_state`; after the first reset."""
        parts = {name: getattr(self, mine).cpu().numpy().copy() for name, mine in _STATE.items()}
        return parts | {"generator": self._generator.get_state()}

    def set_state(self, state: dict[str, Any]) -> Array:
        """Go on where `get_state` was called; returns the observations. On another kind of device, other random starts.

        Raises:
            ValueError: if it is the state of another number of environments or of another task.
        """
        if not hasattr(self, "state"):
            self.reset_tensor()
        if state["states"].shape != self.state.shape:
            raise ValueError(f"state: got states of shape {state['states'].shape}, expected {tuple(self.state.shape)}")
        for name, mine in _STATE.items():
            setattr(self, mine, torch.as_tensor(state[name].copy(), device=self.device))
        if state["generator"].numel() == self._generator.get_state().numel():
            self._generator.set_state(state["generator"])
        observation: Array = state["observation"].copy()
        return observation

    def close(self) -> None:
        """Nothing is open."""

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of the task, which all environments share."""
        if attr_name == "render_mode":
            return [None for _ in self._get_indices(indices)]
        return [getattr(self.task, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Refused: the environments share one task."""
        raise ValueError(f"set_attr: got {attr_name}, but the environments of a TensorVecEnv share one task")

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Refused: there are no single environments."""
        raise ValueError(f"env_method: got {method_name}, but a TensorVecEnv has no single environments")

    def env_is_wrapped(self, wrapper_class: Any, indices: VecEnvIndices = None) -> list[bool]:
        """True for Monitor, whose episode statistics the infos have."""
        name = getattr(wrapper_class, "__name__", "")
        return [name == "Monitor" for _ in self._get_indices(indices)]


def _row(values: Any, plain: tuple[int, ...] = (1,)) -> tuple[int, ...]:
    """The shape of a row of a matrix; `plain` for what is none."""
    return tuple(values.shape[1:]) if isinstance(values, Tensor) and values.ndim == 2 else plain


def _column(values: Tensor) -> Any:
    """Values [N] as Python's, [N, k] as rows of an array."""
    return values.tolist() if values.ndim == 1 else values.cpu().numpy()


class OnDemand(Sequence[Any], np.lib.mixins.NDArrayOperatorsMixin):
    """A list or array that is made when somebody looks: callbacks mostly do not, and making it waits for the device.

    An array is read-only. To write to it would change nothing in the training, where the values lie on the device.

    Args:
        length: of it.
        make: what makes it; an array can be calculated with as one.
    """

    def __init__(self, length: int, make: Callable[[], Any]) -> None:
        self._length, self._make = length, make
        self._made: Any = None

    def _value(self) -> Any:
        if self._made is None:
            self._made = self._make()
            if isinstance(self._made, np.ndarray):
                self._made.flags.writeable = False
        return self._made

    def __bool__(self) -> bool:
        return bool(self._value())

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        return self._value()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._value())

    def __getattr__(self, name: str) -> Any:  # sum, shape, any, ...
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._value(), name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        array = np.asarray(self._value(), dtype=dtype)
        return array.copy() if copy else array

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **keywords: Any) -> Any:
        made, out = (
            [each._value() if isinstance(each, OnDemand) else each for each in given]
            for given in (inputs, keywords.get("out", ()))
        )
        return getattr(ufunc, method)(*made, **(keywords | {"out": tuple(out)} if out else keywords))
