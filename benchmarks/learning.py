r"""Learning side by side: PolicyFlow with both ratios against Stable-Baselines3's PPO.

    python benchmarks/learning.py --seeds 0 1 2 --jobs 2      # run what is missing, then print the table
    python benchmarks/learning.py --table-only                # the table and the figure from the kept results
    python benchmarks/learning.py --envs HalfCheetah-v5 --total-timesteps 300000 \
        --arms policyflow:solver_steps=1 policyflow:solver=midpoint,solver_steps=10

Every run is a process of its own with one thread. Its result, good or bad, is kept in
`benchmarks/results/learning/<env>-<thousand steps>k/<arm>/s<seed>.json`; a run whose file exists is not repeated. A
run of our agents that was interrupted goes on from its last checkpoint, `s<seed>.run` beside the result.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from learning_arms import LABELS, LATE_NOISE_SHARE, POLICYFLOW_ARMS, Run, build, result_folder

EVALUATION_EPISODES = 20
LATE_EVALUATIONS, LATE_EPISODES = 10, 5
"""Looks at the deterministic policy over the last fifth of a run, with and without its average of weights."""
CURVE_POINTS = 100
CHECKPOINT_SECONDS = 300
"""Processor time from one checkpoint to the next."""
LOGGED = (
    "flow/ratio_correlation", "flow/ratio_error", "flow/ratio_bias", "flow/exact_clip_fraction", "flow/jacobian_norm",
    "flow/entropy", "train/clip_fraction", "train/approx_kl",
)  # fmt: skip
"""PolicyFlow's measurements that are kept over training, all of the iterations that have the first."""


def execute(run: Run) -> None:
    """Train, evaluate and write one run's result."""
    import gymnasium
    import mujoco
    import stable_baselines3
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.vec_env import VecNormalize

    from driftrl.agents.storage.saving import Checkpointed, restore
    from driftrl.analysis.multimodality import has_several_solutions, multimodality
    from driftrl.runs.folder import checkpoints, load_newest, save_checkpoint

    unfinished = run.path.with_suffix(".run")

    def is_averaged(agent: Any) -> bool:
        return getattr(agent.policy, "averaged_actor", None) is not None

    def evaluate(agent: Any, episodes: int, mode: str) -> dict[str, Any]:
        """Returns and lengths; mode: deterministic, sampled, or "last weights", without their average."""
        env = make_vec_env(  # one episode in each
            run.env, n_envs=episodes, seed=10_000 + run.seed, env_kwargs=settings.get("env_kwargs")
        )
        normalizer = agent.get_vec_normalize_env()
        if normalizer is not None:
            env = VecNormalize(env, training=False, norm_reward=False)
            env.obs_rms = normalizer.obs_rms
        average = getattr(agent.policy, "averaged_actor", None)
        if mode == "last weights":
            agent.policy.averaged_actor = None
        returns, lengths = evaluate_policy(
            agent, env, episodes, deterministic=mode != "sampled", return_episode_rewards=True
        )
        if mode == "last weights":
            agent.policy.averaged_actor = average
        return {"returns": returns, "lengths": lengths}

    class Curve(BaseCallback):
        """Mean return of the last training episodes, 100 at most, at CURVE_POINTS times; and what LOGGED names."""

        def __init__(self) -> None:
            super().__init__()
            self.points: list[list[float]] = []
            self.late: list[dict[str, float]] = []
            self.logged: dict[str, list[list[float]]] = {}
            self.seconds = self.cpu_seconds = self.saved_at = 0.0

        def _on_step(self) -> bool:
            buffer = self.model.ep_info_buffer
            if buffer and self.num_timesteps >= run.total_timesteps / CURVE_POINTS * (len(self.points) + 1):
                self.points.append([self.num_timesteps, sum(e["r"] for e in buffer) / len(buffer)])
            return True

        def _on_training_start(self) -> None:
            self.start_clock()
            self.saved_at = self.cpu_seconds

        def start_clock(self) -> None:
            self.begun = time.perf_counter() - self.seconds, time.process_time() - self.cpu_seconds

        def measure(self) -> None:
            self.seconds, self.cpu_seconds = time.perf_counter() - self.begun[0], time.process_time() - self.begun[1]

        def _on_rollout_start(self) -> None:
            self.read_log()
            self.measure()
            share = self.num_timesteps / run.total_timesteps
            model: Any = self.model
            if late_noise and share >= 1 - LATE_NOISE_SHARE and not model.config.actor_noise:
                model.config = dataclasses.replace(model.config, actor_noise=late_noise)
            if is_averaged(self.model) and share >= 1 - 0.2 * (1 - len(self.late) / LATE_EVALUATIONS):
                self.late.append({"steps": self.num_timesteps} | {
                    name: float(np.mean(evaluate(self.model, LATE_EPISODES, mode)["returns"]))
                    for name, mode in (("averaged", "deterministic"), ("last", "last weights"))
                })  # fmt: skip
                self.start_clock()  # evaluations do not count as training
            if isinstance(self.model, Checkpointed) and self.cpu_seconds - self.saved_at > CHECKPOINT_SECONDS:
                self.saved_at = self.cpu_seconds
                names = ("points", "late", "logged", "seconds", "cpu_seconds")
                save_checkpoint(self.model, unfinished, 1, {name: getattr(self, name) for name in names})

        def read_log(self) -> None:  # what the last update recorded waits for the log here
            found = self.logger.name_to_value
            if LOGGED[0] in found:
                for name in LOGGED:
                    self.logged.setdefault(name, []).append([self.num_timesteps, found[name]])

        def _on_training_end(self) -> None:
            self.read_log()
            self.measure()

    torch.set_num_threads(1)
    agent, settings = build(run)
    late_noise = settings.get("late_noise")
    curve, done = Curve(), 0
    env = agent.get_env()
    if isinstance(agent, Checkpointed) and env and checkpoints(unfinished):
        found = load_newest(unfinished, "cpu", env)
        assert found.state is not None
        agent, done = found.agent, found.agent.num_timesteps
        agent.set_logger(Logger(None, []))
        restore(agent, found.state)
        vars(curve).update(found.state["progress"])
    agent.learn(run.total_timesteps - done, callback=curve, reset_num_timesteps=not done)
    seconds, cpu_seconds = curve.seconds, curve.cpu_seconds

    evaluation: dict[str, dict[str, Any]] = {}
    for mode in ("deterministic", "sampled", *(["last weights"] if is_averaged(agent) else [])):
        evaluation[mode] = evaluate(agent, EVALUATION_EPISODES, mode)
        if has_several_solutions(run.env):
            goals = multimodality(agent, run.env, {}, (0, 0), 10_000 + run.seed, deterministic=mode != "sampled")
            evaluation[mode]["multimodality"] = goals

    result = {
        "env": run.env, "arm": run.arm, "seed": run.seed, "total_timesteps": run.total_timesteps,
        "settings": settings, "evaluation": evaluation, "late": curve.late,
        "curve": curve.points, "logged": curve.logged,
        "last_returns": [float(e["r"]) for e in list(agent.ep_info_buffer)[-20:]],  # of training
        "seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "gymnasium": gymnasium.__version__,
            "mujoco": mujoco.__version__, "stable_baselines3": stable_baselines3.__version__,
        },
    }  # fmt: skip
    run.path.parent.mkdir(parents=True, exist_ok=True)
    partial = run.path.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(run.path)
    shutil.rmtree(unfinished, ignore_errors=True)


def run_missing(runs: Sequence[Run], jobs: int) -> None:
    """Execute those whose result is not kept yet, `jobs` at a time, each in a process of its own with one thread.

    Raises:
        SystemExit: after all of them, if one failed: a table would leave it out in silence.
    """

    def launch(run: Run) -> bool:
        code = (
            f"import learning; learning.execute(learning.Run(*{(run.env, run.arm, run.seed, run.total_timesteps)!r}))"
        )
        path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        start = time.perf_counter()
        outcome = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
        state = "done" if outcome.returncode == 0 else f"FAILED with code {outcome.returncode}"
        print(f"{run.env} {run.arm} seed {run.seed}: {state} in {time.perf_counter() - start:.0f} s", flush=True)
        return outcome.returncode == 0

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(launch, [run for run in runs if not run.path.exists()]))
    if not all(done):
        raise SystemExit(f"{done.count(False)} of {len(done)} runs failed: no table without them")


def load(env: str, arm: str, total_timesteps: int) -> list[dict[str, Any]]:
    """All kept results of one row of the table, by seed."""
    paths = result_folder(env, arm, total_timesteps).glob("s*.json")
    return sorted((json.loads(path.read_text()) for path in paths), key=lambda r: r["seed"])


def interval(scores: np.ndarray, digits: int = 0) -> str:
    """IQM of the scores of all seeds and its 95 % bootstrap interval, for a table."""
    from driftrl.analysis.statistics import bootstrap_interval, interquartile_mean

    low, high = bootstrap_interval(scores, interquartile_mean, rng=np.random.default_rng(0))
    return f"**{interquartile_mean(scores):.{digits}f}** [{low:.{digits}f}, {high:.{digits}f}]"


def screening(envs: Sequence[str], arms: Sequence[str], total_timesteps: int) -> str:
    """Markdown: an arm a row, an environment a column, to compare many.

    A cell has means over seeds of the deterministic policy's return and, which scatters less, of the training return
    over the second half of the run; and the number of seeds.
    """
    lines = [f"| agent | {' | '.join(envs)} |", "|---" * (len(envs) + 1) + "|"]
    for arm in arms:
        cells = []
        for results in (load(env, arm, total_timesteps) for env in envs):
            last = [np.mean(r["evaluation"]["deterministic"]["returns"]) for r in results]
            late = [np.mean([value for _, value in r["curve"][len(r["curve"]) // 2 :]]) for r in results]
            cells.append(f"{np.mean(last):.0f}, {np.mean(late):.0f} ({len(results)})" if results else "-")
        lines.append(f"| {LABELS.get(arm, arm)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(envs: Sequence[str], arms: Sequence[str], total_timesteps: int) -> str:
    """Markdown: IQM over seeds with a 95 % bootstrap interval, every seed's value, median steps per CPU second."""
    from driftrl.analysis.statistics import interquartile_mean

    lines = [
        "| task | agent | IQM [95 %] | sampled | each seed | steps / CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for env in envs:
        for arm in arms:
            results = load(env, arm, total_timesteps)
            if not results:
                continue
            scores, sampled = (
                np.array([np.mean(r["evaluation"][mode]["returns"]) for r in results])
                for mode in ("deterministic", "sampled")
            )
            # Processor time: it does not count what else the machine did. The first runs did not record it.
            rates = [r["total_timesteps"] / r["cpu_seconds"] for r in results if r.get("cpu_seconds")]
            rate = f"{statistics.median(rates):.0f}" if rates else "-"
            lines.append(
                f"| {env} | {LABELS.get(arm, arm)} | {interval(scores)} "
                f"| {interquartile_mean(sampled):.0f} | {', '.join(f'{score:.0f}' for score in scores)} | {rate} |"
            )
    return "\n".join(lines)


def time_table(envs: Sequence[str], arms: Sequence[str], total_timesteps: int, reference: str = "sb3-zoo") -> str:
    """Markdown: when the training return first reaches what the reference has in the end, in steps and CPU seconds."""
    lines = [
        f"| task | agent | steps to the final return of {LABELS.get(reference, reference)} | CPU s | of its CPU s |",
        "|---|---|---|---|---|",
    ]
    for env in envs:
        references = load(env, reference, total_timesteps)
        peers = [r for r in references if r.get("cpu_seconds")]
        if not peers:
            continue
        goal = float(np.mean([r["curve"][-1][1] for r in references]))
        peer_seconds = statistics.median(r["cpu_seconds"] for r in peers)
        for arm in arms:
            results = [r for r in load(env, arm, total_timesteps) if r.get("cpu_seconds")]
            reached = [next((s for s, value in r["curve"] if value >= goal), math.inf) for r in results]
            if arm == reference or not results:
                continue
            seconds = [s / r["total_timesteps"] * r["cpu_seconds"] for s, r in zip(reached, results, strict=True)]
            steps, middle = float(np.median(reached)), float(np.median(seconds))  # inf: half never do
            lines.append(
                f"| {env} | {LABELS.get(arm, arm)} | {steps:,.0f} to {goal:.0f} | {middle:.0f} | "
                f"{middle / peer_seconds:.2f} |"
            )
    return "\n".join(lines)


def plot(
    envs: Sequence[str], arms: Sequence[str], steps: int | Mapping[str, int], path: Path, columns: int = 4
) -> None:
    """Training returns of every seed (thin) and their mean (thick), over `steps`, which may differ by environment.

    Arms with one label have one color; those that an environment has no results of are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(columns, len(envs))
    rows = math.ceil(len(envs) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6 * columns, 4 * rows), squeeze=False, layout="constrained")
    labels = list(dict.fromkeys(LABELS.get(arm, arm) for arm in arms))
    for axis, env in zip(axes.flat, envs, strict=False):
        total_timesteps = steps if isinstance(steps, int) else steps[env]
        unit, word = (1e6, "million") if total_timesteps >= 1e6 else (1e3, "thousand")
        for arm in arms:
            label = LABELS.get(arm, arm)
            color = f"C{labels.index(label)}"
            curves = [np.array(r["curve"]) for r in load(env, arm, total_timesteps) if r["curve"]]
            if not curves:
                continue
            for curve in curves:
                axis.plot(curve[:, 0] / unit, curve[:, 1], color=color, linewidth=0.6, alpha=0.5)
            grid = np.linspace(max(c[0, 0] for c in curves), min(c[-1, 0] for c in curves), 200)
            mean = np.mean([np.interp(grid, c[:, 0], c[:, 1]) for c in curves], axis=0)
            axis.plot(grid / unit, mean, color=color, linewidth=2, label=f"{label} ({len(curves)} seeds)")
        axis.set(title=env, xlabel=f"{word} environment steps", ylabel="training return, last 100 episodes")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes.flat[len(envs) :]:
        axis.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_between(page: Path, mark: str, text: str) -> None:
    """Replace what lies between ``<!-- mark -->`` and ``<!-- /mark -->`` of a page."""
    before, begin, rest = page.read_text().partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- /{mark} -->")
    assert begin, f"{page} has no <!-- {mark} -->"
    assert end, f"{page} has no <!-- /{mark} -->"
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def main(
    envs: tuple[str, ...] = ("HalfCheetah-v5", "Hopper-v5"),
    arms: tuple[str, ...] = POLICYFLOW_ARMS,
    seeds: tuple[int, ...] = (0, 1, 2),
    total_timesteps: int = 1_000_000,
    jobs: int = 2,
    table_only: bool = False,
    screen: bool = False,
    figure: Path = Path("docs/figures/learning.png"),
) -> None:
    """Run what is missing and print the table.

    Args:
        envs: environment ids.
        arms: what to compare.
        seeds: one run each.
        total_timesteps: length of a run, in environment steps.
        jobs: runs at a time, one thread each.
        table_only: only read the kept results.
        screen: print one small cell for each task, to compare many arms.
        figure: where the learning curves are drawn.
    """
    if not table_only:
        run_missing([Run(env, arm, seed, total_timesteps) for seed in seeds for env in envs for arm in arms], jobs)
    print((screening if screen else table)(envs, arms, total_timesteps))
    if "sb3-zoo" in arms:
        print("\n" + time_table(envs, arms, total_timesteps))
    plot(envs, arms, total_timesteps, figure)


if __name__ == "__main__":
    tyro.cli(main)
