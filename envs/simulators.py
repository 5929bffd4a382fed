"""N MuJoCo simulators of one task, and what is read of them after each step as arrays over all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

import mujoco
import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]


class Fields(Protocol):
    """The prototype `env`, and fields of MjData [N, ...] by their names."""

    env: Any

    def __getitem__(self, field: str, /) -> Array: ...


class Simulators:
    """N simulators of one model, and what the step functions read of them.

    ``s["qpos"]`` is that field of every MjData in one array [N, ...], copied at the first access after a step.

    Attributes:
        env: the prototype, with the task's arguments as attributes.
        models: of every simulator its model, one for all unless a user asked for one.
        own_models: whether a user did.
        actions: the actions of this step, [N, nu], in the dtype in which they came.
        before: the tracked point before the step, [N] or [N, 2].
        after: the tracked point after the step.
        views: of each field that was read so far, the simulators' own arrays.
    """

    actions: Array
    before: Array
    after: Array

    def __init__(self, env: Any, n: int) -> None:
        self.env, self.model = env, env.model
        self.models, self.own_models = [self.model] * n, False
        self.datas = [mujoco.MjData(self.model) for _ in range(n)]
        self.views: dict[str, list[Array]] = {}
        self._arrays: dict[str, Array] = {}

    def __getitem__(self, field: str) -> Array:
        if field not in self._arrays:
            views = self.view(field)
            self._arrays[field] = np.concatenate(views).reshape(len(views), *views[0].shape)
        return self._arrays[field]

    def view(self, field: str) -> list[Array]:
        """A field of each MjData, not copied."""
        if field not in self.views:
            self.views[field] = [getattr(data, field) for data in self.datas]
        return self.views[field]

    def forget(self, copies: Mapping[str, Array] | None = None) -> None:
        """Drop the copies, for the simulators have moved; those of some fields may be given anew."""
        self._arrays = dict(copies or {})

    def body(self, name: str | int) -> Array:
        """Position [N, 3] of a body."""
        return self["xpos"][:, self.model.body(name).id]

    def velocity(self) -> Array:
        """Velocity of the tracked point, averaged over the step, [N] or [N, 2]."""
        seconds = self.timestep * self.env.frame_skip
        if isinstance(seconds, np.ndarray) and self.after.ndim == 2:
            seconds = seconds[:, None]
        return cast(Array, (self.after - self.before) / seconds)

    @property
    def timestep(self) -> float | Array:
        """Seconds of a step of the simulators; [N] where they have models of their own."""
        if self.own_models:
            return np.array([model.opt.timestep for model in self.models])
        return float(self.model.opt.timestep)


Reader: TypeAlias = Callable[[Any], Array]
"""What is read of `Simulators`, or of `Fields` that have what it reads: [N, k] or [N]."""


@dataclass(frozen=True)
class Field:
    """Part of an observation: a field of MjData without its first rows, flattened to [N, k].

    Args:
        name: field of MjData.
        skip: entries (of the position: only if positions are excluded) or bodies to leave out.
        clip: bound of the magnitude, or the attribute of the environment that holds (low, high).
        when: attribute of the environment that switches it on.
    """

    name: str
    skip: int = 0
    clip: float | str | None = None
    when: str | None = None

    def __call__(self, s: Fields) -> Array:
        """The part of each observation, [N, k]."""
        """The part of each observation, [N, k]."""
        values, start = s[self.name], self.start(s.env)
        if start is None:
            return np.empty((len(values), 0))
        bounds = self.bounds(s.env)
        if bounds is not None:
            values = np.clip(values, *bounds)
        return values[:, start:].reshape(len(values), -1)

    def start(self, env: Any) -> int | None:
        """The first row that is observed; None if it is switched off."""
        if self.when and not getattr(env, self.when):
            return None
        shown = self.skip and self.name == "qpos" and not env._exclude_current_positions_from_observation
        return 0 if shown else self.skip

    def bounds(self, env: Any) -> tuple[Any, Any] | None:
        """The lowest and the highest value."""
        if isinstance(self.clip, str):
            low, high = getattr(env, self.clip)
            return low, high
        return None if self.clip is None else (-self.clip, self.clip)
