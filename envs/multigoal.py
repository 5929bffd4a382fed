"""Point masses with several equally good goals: does a policy that starts between them find them all?

    env = make_vec("driftrl/MultiGoal-v0", n_envs=256, seed=0, start=(0, 0))     # batched
    env = gymnasium.make("driftrl/SoftMultiGoal-v0")                             # one

A `GoalTask` holds goals, dynamics, reward and termination, on batches. The single environment is a batch of one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from .batch import Array, StatesVecEnv, make_prototype
from .known import bare_task_of_id

Start: TypeAlias = Literal["random"] | Sequence[float]
"""Where episodes begin: drawn as the task defines it, or at rest at a point (x, y)."""


class GoalTask(ABC):
    """A point in the plane that shall go to one of G goals. States are float64 [N, S], position (x, y) first.

    Attributes:
        goals: their positions, [G, 2].
        half_width: the point is to stay in [-half_width, half_width]^2.
        evaluation_steps: length of the trajectories that show which goals are found.
        observation_space: bounds of the observation, which is the state in float32.
        action_space: bounds of the action, [2].
    """

    goals: Array
    half_width: float
    evaluation_steps: int
    observation_space: spaces.Box
    action_space: spaces.Box
    goal_radius: ClassVar[float] = 1.0

    @abstractmethod
    def draw_start(self, rng: np.random.Generator) -> Array:
        """Position [2] where an episode begins."""

    @abstractmethod
    def step(self, state: Array, action: Array) -> tuple[Array, Array, Array]:
        """Next states [N, S], rewards [N] and terminated [N] after the actions [N, 2], float64."""

    def at_rest(self, positions: Array) -> Array:
        """States [N, S] without velocity at positions [N, 2]."""
        size = self.observation_space.shape[0]
        return np.concatenate([positions, np.zeros((len(positions), size - 2))], axis=1)

    def squared_distances(self, positions: Array) -> Array:
        """From positions [N, 2] to every goal, [N, G]."""
        squares: Array = np.square(positions[:, None] - self.goals)
        return squares[..., 0] + squares[..., 1]

    def reward_map(self, positions: Array) -> Array:
        """Reward [N] of staying at positions [N, 2] by no action."""
        return self.step(self.at_rest(positions), np.zeros((len(positions), 2)))[1]


class MultiGoal(GoalTask):
    """PolicyFlow's task (Yang, Liu, Chen 2026, arXiv 2602.01156): a mass that is accelerated, and six goals.

    A step is 0.1 s of ``p += 0.1 v`` and ``v += 0.1 clip(a, -5, 5)``, both from the old state. With m the squared
    distance from the position reached to the nearest goal, it earns ``0.1 (exp(-0.3 m) + exp(-0.1 m) - 0.01 |a|^2)``.
    The goals lie on a circle of radius 5, episodes begin at rest, uniformly in [-7, 7]^2, and terminate beyond +-8.
    """

    half_width = 8.0
    evaluation_steps = 100

    def __init__(self) -> None:
        angles = np.pi / 3 * np.arange(6)
        self.goals = 5 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        # In [-8, 8]^2 no speed above 13.5 can be reached: 26 steps of full acceleration cross it.
        bounds = np.array([10, 10, 15, 15], dtype=np.float32)
        self.observation_space = spaces.Box(-bounds, bounds)
        self.action_space = spaces.Box(-5, 5, (2,))

    def draw_start(self, rng: np.random.Generator) -> Array:
        """Uniform in [-7, 7]^2."""
        return rng.uniform(-7, 7, 2)

    def step(self, state: Array, action: Array) -> tuple[Array, Array, Array]:
        """One step of 0.1 s."""
        position, velocity = state[:, :2], state[:, 2:]
        position = position + 0.1 * velocity
        velocity = velocity + 0.1 * action.clip(-5, 5)
        m = self.squared_distances(position).min(axis=1)
        reward = 0.1 * (np.exp(-0.3 * m) + np.exp(-0.1 * m) - 0.01 * _squared_norm(action))
        terminated = np.any(np.abs(position) > self.half_width, axis=1)
        return np.concatenate([position, velocity], axis=1), reward, terminated


class SoftMultiGoal(GoalTask):
    """Soft Q-learning's task (Haarnoja et al. 2017, arXiv 1702.08165): a point that is moved, and four goals.

    ``p = clip(p + a, -7, 7)`` for a in [-1, 1]^2 costs ``30 |a|^2`` and the squared distance from the position reached
    to the nearest goal. Within 1 of a goal the episode terminates with 10 more. Episodes begin at a normal distance
    from the origin, standard deviation 0.1.
    """

    half_width = 7.0
    evaluation_steps = 30

    def __init__(self) -> None:
        self.goals = np.array([[5.0, 0.0], [-5.0, 0.0], [0.0, 5.0], [0.0, -5.0]])
        self.observation_space = spaces.Box(-7, 7, (2,))
        self.action_space = spaces.Box(-1, 1, (2,))

    def draw_start(self, rng: np.random.Generator) -> Array:
        """Normal around the origin."""
        return rng.normal(0, 0.1, 2).clip(-7, 7)

    def step(self, state: Array, action: Array) -> tuple[Array, Array, Array]:
        """One step."""
        action = action.clip(-1, 1)
        position = (state + action).clip(-7, 7)
        m = self.squared_distances(position).min(axis=1)
        terminated = m < self.goal_radius**2
        return position, 10 * terminated - 30 * _squared_norm(action) - m, terminated


def _squared_norm(vectors: Array) -> Array:
    squares: Array = np.square(vectors)
    return squares[:, 0] + squares[:, 1]


GOAL_TASKS: dict[str, GoalTask] = {"driftrl/MultiGoal-v0": MultiGoal(), "driftrl/SoftMultiGoal-v0": SoftMultiGoal()}
"""The tasks by their Gymnasium id."""


class GoalEnv(gym.Env[Array, Array]):
    """A `GoalTask` as a Gymnasium environment; ``info["is_success"]`` tells whether a goal is within 1.

    Args:
        id: key of `GOAL_TASKS`; the registered ids set it.
        start: "random", as the task defines it, or a point (x, y) where all episodes begin at rest.
        render_mode: None, or "rgb_array" for pictures of 240 x 240: the reward in grey, goals green, the point red.

    Raises:
        ValueError: if start is neither "random" nor a point of the plane.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012  as gymnasium has it

    task: ClassVar[GoalTask]

    def __init__(self, start: Start = "random", render_mode: str | None = None) -> None:
        self._start = None if start == "random" else self._checked(start)
        self.render_mode = render_mode
        self.observation_space, self.action_space = self.task.observation_space, self.task.action_space
        self.state = self.task.at_rest(np.zeros((1, 2)))  # [1, S]; written in place: it may be a row of a batch

    def _checked(self, start: Any) -> Array:
        """The start as a point [2]."""
        width = self.task.half_width
        point: Array = np.array([np.nan]) if isinstance(start, str) else np.asarray(start, dtype=np.float64)
        if point.shape != (2,) or not (np.abs(point) <= width).all():
            raise ValueError(f"start: got {start!r}, expected 'random' or a point (x, y) in [-{width:g}, {width:g}]^2")
        return point

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Begin an episode; returns the observation [S].

        Raises:
            ValueError: if options are given: the start is an argument of the environment.
        """
        super().reset(seed=seed)
        if options:
            raise ValueError(f"options: got {options}, expected none; the environment's argument start sets the start")
        position = self.task.draw_start(self.np_random) if self._start is None else self._start
        self.state[:] = self.task.at_rest(position[None])
        return self.state[0].astype(np.float32), {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Act by an action [2]; never truncates."""
        obs, reward, terminated, info = advance(self.task, self.state, np.asarray(action)[None])
        return (
            obs[0],
            float(reward[0]),
            bool(terminated[0]),
            False,
            {key: bool(value[0]) for key, value in info.items()},
        )

    def render(self) -> Array | None:
        """The picture [240, 240, 3] of render_mode "rgb_array", else None."""
        if self.render_mode is None:
            return None
        axis = np.linspace(-self.task.half_width, self.task.half_width, 240)
        x, y = np.meshgrid(axis, -axis)
        plane = np.stack([x.ravel(), y.ravel()], axis=1)
        reward = self.task.reward_map(plane).reshape(x.shape)
        grey = 255 - 150 * (reward - reward.min()) / np.ptp(reward)
        picture = np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
        picture[self.task.squared_distances(plane).min(axis=1).reshape(x.shape) < 0.3**2] = (0, 140, 0)
        picture[np.square(x - self.state[0, 0]) + np.square(y - self.state[0, 1]) < 0.25**2] = (220, 0, 0)
        return picture


class MultiGoalEnv(GoalEnv):
    """``driftrl/MultiGoal-v0``, 50 steps."""

    task = GOAL_TASKS["driftrl/MultiGoal-v0"]


class SoftMultiGoalEnv(GoalEnv):
    """``driftrl/SoftMultiGoal-v0``, 30 steps as in soft Q-learning's example."""

    task = GOAL_TASKS["driftrl/SoftMultiGoal-v0"]


def advance(task: GoalTask, state: Array, action: Array) -> tuple[Array, Array, Array, dict[str, Array]]:
    """Move states [N, S] in place by actions [N, 2]: observations, rewards, terminated and the entries of info."""
    state[:], reward, terminated = task.step(state, action.astype(np.float64))
    near = task.squared_distances(state[:, :2]).min(axis=1) < task.goal_radius**2
    return state.astype(np.float32), reward, terminated, {"is_success": near}


class GoalVecEnv(StatesVecEnv):
    """A batch of one of the `GOAL_TASKS` as a Stable-Baselines3 VecEnv, with what its DummyVecEnv and Monitor report.

    Args:
        id: Gymnasium id of one of the `GOAL_TASKS`: of its class, not wrapped.
        n_envs: number of environments, N.
        **env_kwargs: arguments of the environment, see `GoalEnv`. With render_mode="rgb_array", `render` shows all
            environments, or the environment `render_index`.

    Raises:
        ValueError: if the id is of none of the `GOAL_TASKS`, n_envs is below 1, or render_mode is "human".
    """

    def __init__(self, id: str, n_envs: int, **env_kwargs: Any) -> None:
        task = bare_task_of_id(id)
        if task not in GOAL_TASKS:
            raise ValueError(f"batched: got {id!r}, expected one of {', '.join(GOAL_TASKS)}; use another backend")
        prototype = make_prototype(id, n_envs, env_kwargs)
        self.task = GOAL_TASKS[task]
        self.states = self.task.at_rest(np.zeros((n_envs, 2)))
        super().__init__(prototype, n_envs)

    def _advance(self, actions: Array) -> tuple[Array, Array, Array, dict[str, Array]]:
        return advance(self.task, self.states, actions)
