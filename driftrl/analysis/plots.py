"""Pictures of a policy on a task with several solutions: its trajectories, its actions and, of a flow, its velocities.

Needs the extra `plot`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.type_aliases import PolicyPredictor

from ..agents.policyflow.policy import FlowActor, FlowNoise, FlowPolicy
from ..dynamics.ode import odeint_path, time_grid
from ..envs.avoid import Avoid
from ..envs.multigoal import GoalTask
from .multimodality import MAZE_TRAJECTORIES, count_visits, free_cells, is_maze, play_from_start

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRAJECTORIES = 200
_ACTIONS = 50_000


def draw_pictures(
    agent: BaseAlgorithm, policy: PolicyPredictor, env_id: str, env_kwargs: dict[str, Any], start: Sequence[float],
    seed: int, folder: Path,
) -> list[Path]:  # fmt: skip
    """Write <task>_trajectories.png, <task>_actions.png and, if the policy is a flow, <task>_velocity.png.

    Args:
        agent: the agent, whose random generator is seeded and whose field is drawn.
        policy: what chooses the agent's actions.
        env_id: Gymnasium id of a task with several solutions (`has_several_solutions`).
        env_kwargs: arguments of the environment.
        start: point (x, y) where the trajectories of a goal task begin.
        seed: seed of the environments and the sampled actions.
        folder: where the pictures are written; made if it does not exist.

    Returns:
        The files written.

    Raises:
        ValueError: if matplotlib is missing, or the start is no point of the task.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"plot: {error.name} is not installed; run pip install 'driftrl[plot]'") from error
    agent.set_random_seed(seed)
    number = MAZE_TRAJECTORIES if is_maze(env_id) else _TRAJECTORIES
    played, task = play_from_start(policy, env_id, env_kwargs, start, number, seed, deterministic=False)
    only, _ = play_from_start(policy, env_id, env_kwargs, start, 1, seed, deterministic=True)
    trajectories = Figure(figsize=(10.5, 5) if is_maze(env_id) else (6.2, 5.4), layout="compressed")
    if isinstance(task, GoalTask):
        views = _goal_views(task, start)
        _draw_plane(trajectories, task)
    elif isinstance(task, Avoid):
        views = _avoid_views()
        _draw_obstacles(trajectories, task)
    else:
        views = _maze_views(task)
        _draw_maze(trajectories, task, played.positions)
    _draw_trajectories(trajectories.axes[0], played.positions, only.positions)
    pictures = {"trajectories": trajectories, "actions": Figure(figsize=(4 * len(views), 4.3), layout="compressed")}
    _draw_actions(pictures["actions"], agent, policy, views)
    if isinstance(agent.policy, FlowPolicy) and agent.policy.chunk == 1:  # a chunk's field has more dimensions
        pictures["velocity"] = Figure(figsize=(12, 4.9), layout="compressed")
        _draw_velocity(pictures["velocity"], agent.policy, *next(iter(views.items())))
    folder.mkdir(parents=True, exist_ok=True)
    name = env_id.rpartition("/")[2].rpartition(":")[2].rpartition("-")[0].lower()
    paths = [folder / f"{name}_{kind}.png" for kind in pictures]
    for path, picture in zip(paths, pictures.values(), strict=True):
        picture.savefig(path, dpi=90, bbox_inches="tight")
    return paths


def _goal_views(task: GoalTask, start: Sequence[float]) -> dict[str, Any]:
    """Observations where the distribution of actions is drawn: the start, and between goals near and far."""
    points = [tuple(start), (-2.5, 0.0), (2.5, 2.5)]  # the latter two as in soft Q-learning
    rest = task.at_rest(np.array(points)).astype(np.float32)
    return {f"at rest at ({x:g}, {y:g})": obs for (x, y), obs in zip(points, rest, strict=True)}


def _avoid_views() -> dict[str, Any]:
    """Observations where ways part: the start, and behind the first obstacle on the left and the right."""
    points = [(0.0, -1.0, 0.0), (-0.55, -0.2, 1.0), (0.55, -0.2, 1.0)]
    return {f"at ({x:g}, {y:g})": np.array([x, y, 0, up], np.float32) for x, y, up in points}


def _maze_views(maze: Any) -> dict[str, Any]:
    """Observations at rest where episodes begin, with up to three of the goals."""
    x, y = maze.unique_reset_locations[0]
    position = np.array([x, y])
    return {
        f"at rest at ({x:g}, {y:g}),\ngoal ({goal[0]:g}, {goal[1]:g})": {
            "achieved_goal": position, "desired_goal": np.asarray(goal), "observation": np.array([x, y, 0.0, 0.0]),
        }
        for goal in maze.unique_goal_locations[:3]
    }  # fmt: skip


def _draw_plane(figure: Figure, task: GoalTask) -> None:
    """The reward of staying somewhere, and the goals."""
    axes, width = figure.subplots(), task.half_width
    line = np.linspace(-width, width, 201)
    x, y = np.meshgrid(line, line)
    reward = task.reward_map(np.stack([x.ravel(), y.ravel()], axis=1)).reshape(x.shape)
    image = axes.pcolormesh(x, y, reward, cmap="Blues", shading="gouraud", rasterized=True)
    figure.colorbar(image, ax=axes, label="reward of a step without action, at rest", shrink=0.85)
    axes.plot(*task.goals.T, "*", color="gold", markeredgecolor="black", markersize=14, label="goal", zorder=4)
    axes.set(xlabel="x", ylabel="y", xlim=(-width, width), ylim=(-width, width), aspect="equal")


def _draw_obstacles(figure: Figure, task: Avoid) -> None:
    """The obstacles and the goal line."""
    from matplotlib.patches import Circle

    axes = figure.subplots()
    for x, y in task.obstacles:
        axes.add_patch(Circle((x, y), task.radius, color="0.6"))
    axes.axhline(task.goal_y, color="tab:green", label="goal line")
    axes.set(xlabel="x", ylabel="y", xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal")


def _draw_maze(figure: Figure, maze: Any, positions: NDArray[Any]) -> None:
    """On the left the walls and goals, on the right how often each cell was visited."""
    left, right = figure.subplots(1, 2)
    free = free_cells(maze)
    extent = (-maze.x_map_center, maze.x_map_center, -maze.y_map_center, maze.y_map_center)
    left.imshow(free, cmap="gray", vmin=-1, vmax=1, extent=extent)
    goals = np.array(maze.unique_goal_locations)
    left.plot(*goals.T, "*", color="gold", markeredgecolor="black", markersize=14, label="goal", zorder=4)
    visits = count_visits(positions[1:].reshape(-1, 2), maze)
    share = np.where(free, visits / visits.sum(), np.nan)
    image = right.imshow(share, cmap="Blues", extent=extent)
    right.set_facecolor("0.5")
    right.set_title("share of the steps in each cell")
    figure.colorbar(image, ax=right, shrink=0.85)
    for axes in (left, right):
        axes.set(xlabel="x in m", ylabel="y in m", aspect="equal")


def _draw_trajectories(axes: Axes, sampled: NDArray[Any], deterministic: NDArray[Any]) -> None:
    """Lines with a dot at their end."""
    steps, number, _ = sampled.shape
    axes.plot(sampled[..., 0], sampled[..., 1], color="tab:red", linewidth=0.5, alpha=0.4)
    axes.plot(*sampled[-1].T, ".", color="tab:red", markersize=4, label=f"{number} sampled")
    axes.plot(*deterministic[:, 0].T, color="black", linewidth=1.5, label="deterministic")
    axes.plot(*deterministic[-1].T, "o", color="black", markersize=5)
    axes.set_title(f"{number + 1} trajectories of up to {steps - 1} steps")
    axes.legend(loc="upper right", fontsize=8)


def _draw_actions(figure: Figure, agent: BaseAlgorithm, policy: PolicyPredictor, views: dict[str, Any]) -> None:
    """Densities of sampled actions, in units of the action space; those of a flow before they are clipped to it."""
    space: Any = agent.action_space
    centre, half = (space.low + space.high) / 2, (space.high - space.low) / 2
    is_flow = isinstance(agent.policy, FlowPolicy)
    width = 2.5 if is_flow else 1.1
    edges = [c + h * np.linspace(-width, width, 61) for c, h in zip(centre, half, strict=True)]
    all_axes = figure.subplots(1, len(views), sharey=True, squeeze=False)[0]
    for axes, (title, obs) in zip(all_axes, views.items(), strict=True):
        if isinstance(agent.policy, FlowPolicy):
            actions = centre + half * _sample(agent.policy, obs, _ACTIONS)[-1][:, :2]  # of a chunk the first action
        else:
            actions, _ = policy.predict(_copies(obs, _ACTIONS), deterministic=False)
        mode, _ = policy.predict(_copies(obs, 1), deterministic=True)
        counts, *_ = np.histogram2d(actions[:, 0], actions[:, 1], bins=edges)
        density = counts.T / (len(actions) * np.outer(np.diff(edges[1]), np.diff(edges[0])))
        image = axes.pcolormesh(*edges, density, cmap="Blues", rasterized=True)
        bounds = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]]) * half + centre
        axes.plot(*bounds.T, "--", color="black", linewidth=0.8, label="bounds")
        axes.plot(*mode[0], "x", color="tab:red", markersize=8, label="deterministic", zorder=4)
        axes.set(xlabel="action 1", title=title, aspect="equal")
        figure.colorbar(image, ax=axes, shrink=0.75)
    all_axes[0].set_ylabel("action 2")
    all_axes[0].legend(loc="upper right", fontsize=8)
    clipped = ", before it is clipped to the bounds" if is_flow else ""
    figure.suptitle(f"Probability density of the sampled action{clipped}")


def _copies(obs: Any, number: int) -> Any:
    """A batch of copies of an observation, or of a Dict of them."""
    if isinstance(obs, dict):
        return {key: _copies(part, number) for key, part in obs.items()}
    return np.repeat(obs[None], number, axis=0)


def _acting(policy: FlowPolicy) -> FlowActor:
    """The actor that `predict` uses."""
    return policy.actor if policy.averaged_actor is None else policy.averaged_actor


@torch.inference_mode()
def _sample(policy: FlowPolicy, obs: Any, number: int) -> NDArray[Any]:
    """z, x1 and action, each [number, D], given one observation, in normalised action units."""
    actor, vector = _acting(policy), policy.obs_norm(policy.features(policy.obs_to_tensor(obs)[0]))
    normals = torch.randn(actor.draws, number, policy.action_dim, device=vector.device)
    return torch.stack(actor.sample(vector.expand(number, -1), FlowNoise.of(normals))).cpu().numpy()


@torch.inference_mode()
def _draw_velocity(figure: Figure, policy: FlowPolicy, title: str, obs: Any) -> None:
    """The velocity field at flow times 0 and about a half, with samples that it has carried there and to 1.

    At 1 the solvers of low order never ask it: nothing was learned there.
    """
    actor, vector = _acting(policy), policy.obs_norm(policy.features(policy.obs_to_tensor(obs)[0]))
    z = torch.as_tensor(_sample(policy, obs, 500)[0], device=vector.device)
    path = odeint_path(
        actor.field, z, steps=actor.solver_steps, solver=actor.solver, cond=vector.expand(len(z), -1)
    ).cpu()
    times = time_grid(actor.solver_steps, "euler")
    width = float(path.abs().quantile(0.99))
    line = torch.linspace(-width, width, 17, device=vector.device)
    grid, step = torch.cartesian_prod(line, line), float(line[1] - line[0])
    chosen = sorted({0, actor.solver_steps // 2, actor.solver_steps})
    velocities = [actor.field(times[k], grid, vector.expand(len(grid), -1)).cpu().numpy() for k in chosen[:-1]]
    # An arrow one grid cell long; an untrained field is zero.
    speed = float(np.quantile(np.linalg.norm(velocities, axis=-1), 0.9)) or 1.0
    x, y = grid.cpu().numpy().T
    for axes, k, velocity in itertools.zip_longest(figure.subplots(1, len(chosen), sharey=True), chosen, velocities):
        axes.plot(*path[k].numpy().T, ".", color="tab:orange", markersize=3, label="samples")
        if velocity is not None:
            axes.quiver(x, y, *velocity.T, angles="xy", scale_units="xy", scale=speed / step, width=0.003)
        axes.set(xlabel="normalised action 1", xlim=(-width, width), ylim=(-width, width), aspect="equal")
        axes.set_title(f"flow time {times[k]:g}" if velocity is not None else "samples at flow time 1")
    figure.axes[0].set_ylabel("normalised action 2")
    figure.axes[0].legend(loc="upper right", fontsize=8)
    unit = f"{speed:.2g} half action ranges per unit of flow time"
    figure.suptitle(f"Velocity field {title}; an arrow of one grid cell: {unit}".replace("\n", " "))
