"""The picture of the README: a flow policy and a Gaussian one, both pretrained on the same demonstrations of Avoid.

    OMP_NUM_THREADS=1 python benchmarks/front_picture.py

Writes docs/figures/front.png and prints what it shows. Takes two minutes. Needs matplotlib (a dev dependency); the
demonstrations are scripted and made anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from driftrl import PolicyFlow
from driftrl.agents.common.demonstrations import Demonstrations
from driftrl.agents.policyflow.policy import FlowPolicy
from driftrl.agents.policyflow.pretraining import PretrainSettings
from driftrl.analysis.multimodality import play_from_start, route_metrics
from driftrl.dynamics import odeint_path
from driftrl.envs.avoid import AVOID, Avoid
from driftrl.envs.avoid_demonstrations import avoid_demonstrations

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "front.png"
NETWORKS: dict[str, Any] = {"activation": "relu", "actor_hidden": (128, 128), "critic_hidden": (128, 128)}
POLICIES: dict[str, dict[str, Any]] = {
    "Flow policy": {"base": "gaussian", "base_std": 0.5, "action_std": 0.05, "solver_steps": 8},
    "Gaussian policy": {"base": "standard", "base_std": 0, "ratio": "endpoint", "action_std": 0.3},
}
"""Avoid's preset, with the flow's action noise of 0.02 for pretraining alone, is measured in docs/demonstrations.md."""
STATE = (0.0, -1.0, 0.0, 0.0)
"""Where one decision is shown: at the start, straight below the first obstacle."""
ROUTES = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377")
"""Colors of the six routes from left to right: Paul Tol's "bright", told apart by the color-blind."""
EPISODES, DRAWN, SAMPLES, LINES = 1000, 90, 20_000, 60


def train(settings: dict[str, Any], data: Demonstrations, steps: int) -> PolicyFlow:
    """A policy pretrained on the demonstrations."""
    agent = PolicyFlow("MlpPolicy", AVOID, seed=0, device="cpu", **NETWORKS, **settings)
    agent.pretrain(data, settings=PretrainSettings(steps, learning_rate=1e-2))
    return agent


@torch.inference_mode()
def one_decision(policy: FlowPolicy) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """In STATE: paths [steps + 1, SAMPLES, 2] of latents along the flow, and the actions [SAMPLES, 2]."""
    actor = policy.actor if policy.averaged_actor is None else policy.averaged_actor
    obs = policy.obs_norm(policy.features(policy.obs_to_tensor(np.array(STATE, np.float32))[0])).expand(SAMPLES, -1)
    mean, log_std = actor.base(obs)
    z = mean + log_std.exp() * torch.randn(SAMPLES, 2)
    path = odeint_path(actor.field, z, steps=actor.solver_steps, solver=actor.solver, cond=obs)
    action = path[-1] + actor.noise_log_std().exp() * torch.randn(SAMPLES, 2)
    return path.numpy(), action.numpy()


def draw_decision(axes: tuple[Axes, Axes, Axes], path: NDArray[np.float32], action: NDArray[np.float32]) -> None:
    """The first entry of the action: histogram of z, lines along flow time, histogram of the actions."""
    left, middle, right = axes
    sides = np.where(action[:LINES, 0] < 0, ROUTES[0], ROUTES[4])
    for line, color in zip(path[:, :LINES, 0].T, sides, strict=True):
        middle.plot(np.linspace(0, 1, len(line)), line, color=color, linewidth=1, alpha=0.7)
    limit = float(np.abs(np.concatenate([path[0, :, 0], action[:, 0]])).max()) * 1.02
    edges = np.linspace(-limit, limit, 61)
    for axis, values, title in ((left, path[0, :, 0], "draw z"), (right, action[:, 0], "act")):
        axis.hist(values, edges.tolist(), orientation="horizontal", color="0.55")
        axis.set(title=title, xticks=[])
        axis.spines[["top", "right", "left", "bottom"]].set_visible(False)
    left.invert_xaxis()
    middle.set(title="follow the flow", xticks=[0, 1], xlim=(0, 1), xlabel="flow time")
    for axis in axes:
        axis.set(ylim=(-limit, limit), yticks=[])
    left.set(ylabel="left       right")


def whole_percents(fractions: Sequence[float]) -> list[int]:
    """Shares as whole percents whose sum is that of the shares, rounded: those that lose most are rounded up."""
    percents = 100 * np.array(fractions)
    found = np.floor(percents).astype(int)
    missing = round(percents.sum()) - int(found.sum())
    found[np.argsort(found - percents, kind="stable")[:missing]] += 1
    return [int(each) for each in found]


def draw_routes(axis: Axes, positions: NDArray[np.float64], routes: NDArray[np.int64], task: Avoid) -> None:
    """Obstacles, the goal line, and the first DRAWN episodes in the colors of their routes; failed ones end in a cross.

    Args:
        axis: where.
        positions: [T + 1, N, 2].
        routes: of each episode, -1 where it fails, [N].
        task: the task.
    """
    from matplotlib.patches import Circle

    for x, y in task.obstacles:
        axis.add_patch(Circle((x, y), task.radius, color="0.75", linewidth=0))
    axis.axhline(task.goal_y, color="0.25", linewidth=2)
    for k in range(DRAWN):
        color = "0.2" if routes[k] < 0 else ROUTES[routes[k]]
        axis.plot(*positions[:, k].T, color=color, linewidth=0.9, alpha=0.8)
        if routes[k] < 0:
            axis.plot(*positions[-1, k], "x", color="black", markersize=7, markeredgewidth=1.6, zorder=4)
    axis.set(xlim=(-1.25, 1.25), ylim=(-1.04, 1.22), aspect="equal", xticks=[], yticks=[])
    axis.spines[["top", "right", "left", "bottom"]].set_visible(False)


def label_routes(axis: Axes, percents: Sequence[int]) -> None:
    """The share of each route above the place where it arrives, in its color: left of the place if it first goes left.

    Args:
        axis: of `draw_routes`.
        percents: of each route.
    """
    for exit_, x in enumerate((-0.86, 0.0, 0.86)):
        for route, side, gap in ((exit_, "right", -0.02), (exit_ + 3, "left", 0.02)):
            axis.text(
                x + gap, 1.12, f"{percents[route]}%", color=ROUTES[route], ha=side, fontsize=17, fontweight="bold",
                in_layout=False,
            )  # fmt: skip


def main(steps: int = 10_000, figure: Path = FIGURE) -> None:
    """Pretrain both policies and draw.

    Args:
        steps: gradient updates of each policy.
        figure: the file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    torch.set_num_threads(1)
    task = Avoid()
    episodes = [(f"episode {i}", each) for i, each in enumerate(avoid_demonstrations(600, 0))]
    data = Demonstrations.of(episodes, task.observation_space, task.action_space)
    with plt.rc_context({"font.size": 17, "axes.titlesize": 17}):
        picture = plt.figure(figsize=(8, 8), layout="constrained")
        decision, below = picture.subfigures(2, 1, height_ratios=(1, 1.6), hspace=0.03)
        fields = below.subfigures(1, 2, wspace=0.03)
        decision.suptitle("One decision at the start, below an obstacle", fontsize=19)
        for field, (name, settings) in zip(fields, POLICIES.items(), strict=True):
            agent = train(settings, data, steps)
            if agent.policy.actor.has_latent:
                axes = decision.subplots(1, 3, sharey=True, width_ratios=(0.5, 1.7, 0.5))
                draw_decision(tuple(axes), *one_decision(agent.policy))
            agent.set_random_seed(1)
            played, _ = play_from_start(agent, AVOID, {}, (), EPISODES, 1, deterministic=False)
            routes = task.routes(played.positions)
            found = route_metrics(routes, task.n_routes)
            axis = field.subplots()
            draw_routes(axis, played.positions, routes, task)
            percents = whole_percents(found["fractions"])
            label_routes(axis, percents)
            field.suptitle(f"{name}:\n{sum(percents)} % arrive", fontsize=19)
            print(f"{name}: {EPISODES} episodes, {found}")
        figure.parent.mkdir(parents=True, exist_ok=True)
        picture.savefig(figure, dpi=100)
        plt.close(picture)


if __name__ == "__main__":
    tyro.cli(main)
