"""A point that must get past obstacles: six routes lead to the goal line, and only reaching it is rewarded.

    env = make_vec("driftrl/Avoid-v0", n_envs=64, seed=0)     # batched
    env = gymnasium.make("driftrl/Avoid-v0")                  # one

The task is of the kind of D3IL's Avoiding (Jia et al. 2024, arXiv 2402.14606), whose simulated arm leaves 24 routes.
The single environment is a batch of one. Scripted demonstrations are in `avoid_demonstrations.py`.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from .batch import Array, StatesVecEnv, make_prototype
from .known import bare_task_of_id

AVOID = "driftrl/Avoid-v0"


class Avoid:
    """The task: states (x, y, last move in x, in y), float64 [N, 4]; lengths in units of half the arena's width.

    Episodes begin at rest at y = -1, x uniform in +-0.05. A step is ``p += 0.1 clip(a, -1, 1)``. The last move, a
    clipped action, tells where the point is heading. The episode terminates where the way of the step touches an
    obstacle, or leaves the arena by the sides or the bottom, with reward 0; and where the point reaches y >= 1, with
    reward 1. Every other step earns 0.

    Attributes:
        rows: y and the obstacles' x of each row, from the start to the goal.
        radius: of an obstacle.
        edge: largest coordinate that is seen.
        n_routes: ways to pass all rows: a gap of each row, numbered with the first row's gap as the slowest.
        steps: time limit.
    """

    rows: tuple[tuple[float, tuple[float, ...]], ...] = ((-0.4, (0.0,)), (0.4, (-0.45, 0.45)))
    radius = 0.25
    step_length = 0.1
    edge = 1.1
    start_y, start_half_width, goal_y = -1.0, 0.05, 1.0
    steps = 50
    n_routes = 6

    def __init__(self) -> None:
        self.obstacles: Array = np.array([(x, y) for y, xs in self.rows for x in xs])
        bounds = np.array([self.edge, self.edge, 1, 1], dtype=np.float32)  # a step beyond the arena is the last
        self.observation_space = spaces.Box(-bounds, bounds)
        self.action_space = spaces.Box(-1, 1, (2,))

    def draw_start(self, rng: np.random.Generator) -> Array:
        """State [4] in which an episode begins."""
        return np.array([rng.uniform(-self.start_half_width, self.start_half_width), self.start_y, 0.0, 0.0])

    def step(self, state: Array, action: Array) -> tuple[Array, Array, Array]:
        """Next states [N, 4], rewards [N] and terminated [N] after the actions [N, 2], float64."""
        before, move = state[:, :2], action.clip(-1, 1)
        after = before + self.step_length * move
        hit = self.touched(before, after)
        success = self.succeeded(after) & ~hit
        outside = (np.abs(after[:, 0]) > 1) | (after[:, 1] < self.start_y - 0.5 * self.step_length)
        place = after.clip(-self.edge, self.edge)  # within the observation space, also where the episode has ended
        return np.concatenate([place, move], axis=1), success.astype(np.float64), success | outside | hit

    def succeeded(self, position: Array) -> Array:
        """Whether positions [N, 2] are at the goal line, within the arena; [N]."""
        return (position[:, 1] >= self.goal_y) & (np.abs(position[:, 0]) <= 1)

    def touched(self, before: Array, after: Array) -> Array:
        """Whether the straight ways from positions [N, 2] to others touch an obstacle, [N]."""
        way, to = after - before, self.obstacles - before[:, None]  # [N, 2], [N, obstacles, 2]
        length = way[:, 0] * way[:, 0] + way[:, 1] * way[:, 1]
        along = to[..., 0] * way[:, None, 0] + to[..., 1] * way[:, None, 1]
        share = (along / np.where(length > 0, length, 1)[:, None]).clip(0, 1)  # of the way, to its nearest point
        gap_x, gap_y = to[..., 0] - share * way[:, None, 0], to[..., 1] - share * way[:, None, 1]
        inside: Array = gap_x * gap_x + gap_y * gap_y < self.radius**2
        return np.asarray(inside.any(axis=1))

    def routes(self, positions: Array) -> Array:
        """The route of each trajectory, 0 .. n_routes - 1, or -1 where it does not end at the goal line; [N].

        The gap of a row is the one where the trajectory first crosses the row's y.

        Args:
            positions: [T + 1, N, 2]; after the end of an episode, where it ended.
        """
        route = np.zeros(positions.shape[1], dtype=np.int64)
        for y, xs in self.rows:
            first = np.maximum((positions[..., 1] >= y).argmax(axis=0), 1)  # 0 where it never gets there
            columns = np.arange(len(route))
            before, after = positions[first - 1, columns], positions[first, columns]
            rise = after[:, 1] - before[:, 1]
            share = np.where(rise > 0, (y - before[:, 1]) / np.where(rise > 0, rise, 1), 0)
            x = before[:, 0] + share * (after[:, 0] - before[:, 0])
            route = route * (len(xs) + 1) + np.searchsorted(np.array(xs), x)
        return np.where(self.succeeded(positions[-1]), route, -1)


class AvoidEnv(gym.Env[Array, Array]):
    """``driftrl/Avoid-v0``, see `Avoid`; 50 steps. ``info["is_success"]`` tells whether the goal line is reached.

    Args:
        render_mode: None, or "rgb_array" for pictures of 240 x 240: obstacles grey, the goal line green, the point red.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012  as gymnasium has it

    task = Avoid()

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space, self.action_space = self.task.observation_space, self.task.action_space
        self.state: Array = np.zeros((1, 4))  # written in place: it may be a row of a batch

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Begin an episode; returns the observation, the state [4] in float32.

        Raises:
            ValueError: if options are given: there are none.
        """
        super().reset(seed=seed)
        if options:
            raise ValueError(f"options: got {options}, expected none")
        self.state[0] = self.task.draw_start(self.np_random)
        return self.state[0].astype(np.float32), {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Act by an action [2]; never truncates."""
        obs, reward, terminated, info = advance(self.task, self.state, np.asarray(action)[None])
        success = bool(info["is_success"][0])
        return obs[0], float(reward[0]), bool(terminated[0]), False, {"is_success": success}

    def render(self) -> Array | None:
        """The picture [240, 240, 3] of render_mode "rgb_array", else None."""
        if self.render_mode is None:
            return None
        axis = np.linspace(-1.1, 1.1, 240)
        x, y = np.meshgrid(axis, -axis)
        picture = np.full((240, 240, 3), 255, dtype=np.uint8)
        plane = np.stack([x.ravel(), y.ravel()], axis=1)
        picture[self.task.touched(plane, plane).reshape(x.shape)] = (120, 120, 120)
        picture[np.abs(y - self.task.goal_y) < 0.01] = (0, 140, 0)
        picture[np.square(x - self.state[0, 0]) + np.square(y - self.state[0, 1]) < 0.04**2] = (220, 0, 0)
        return picture


def advance(task: Avoid, state: Array, action: Array) -> tuple[Array, Array, Array, dict[str, Array]]:
    """Move states [N, 4] in place by actions [N, 2]: observations, rewards, terminated and the entries of info."""
    state[:], reward, terminated = task.step(state, action.astype(np.float64))
    return state.astype(np.float32), reward, terminated, {"is_success": reward > 0}


class AvoidVecEnv(StatesVecEnv):
    """A batch of `Avoid` as a Stable-Baselines3 VecEnv, with what its DummyVecEnv and Monitor report.

    Args:
        id: Gymnasium id of the task: of its class, not wrapped.
        n_envs: number of environments, N.
        **env_kwargs: arguments of the environment, see `AvoidEnv`.

    Raises:
        ValueError: if the id is another task's, n_envs is below 1, or render_mode is "human".
    """

    def __init__(self, id: str, n_envs: int, **env_kwargs: Any) -> None:
        if bare_task_of_id(id) != AVOID:
            raise ValueError(f"batched: got {id!r}, expected {AVOID}; use another backend")
        prototype = make_prototype(id, n_envs, env_kwargs)
        self.task = AvoidEnv.task
        self.states: Array = np.zeros((n_envs, 4))
        super().__init__(prototype, n_envs)

    def _advance(self, actions: Array) -> tuple[Array, Array, Array, dict[str, Array]]:
        return advance(self.task, self.states, actions)
