r"""Learning side by side: PolicyFlow with both ratios against Stable-Baselines3's PPO.

    python benchmarks/learning.py --seeds 0 1 2 --jobs 2      # run what is missing, then print the table
    python benchmarks/learning.py --table-only                # the table and the figure from the kept results
    python benchmarks/learning.py --envs HalfCheetah-v5 --total-timesteps 300000 \
        --arms policyflow:solver_steps=1 policyflow:solver=midpoint,solver_steps=10

Every run is a process of its own with one thread. Its result, good or bad, is kept in
`benchmarks/results/learning/<env>-<thousand steps>k/<arm>/s<seed>.json`; a run whose file exists is not repeated.
"""

from __future__ import annotations

import concurrent.futures
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

RESULTS = Path(__file__).parent / "results" / "learning"
EVALUATION_EPISODES = 20
CURVE_POINTS = 100
LOGGED = (
    "flow/ratio_correlation", "flow/ratio_error", "flow/ratio_bias", "flow/exact_clip_fraction", "flow/jacobian_norm",
    "flow/entropy", "train/clip_fraction", "train/approx_kl",
)  # fmt: skip
"""PolicyFlow's measurements that are kept over training, all of the iterations that have the first."""

# rl_zoo3 2.9.2, hyperparams/ppo.yml, entries of the v4 tasks (it has none for v5). Ant's are SB3's defaults.
ZOO: dict[str, dict[str, Any]] = {
    "HalfCheetah-v5": {
        "n_steps": 512, "batch_size": 64, "n_epochs": 20, "learning_rate": 2.0633e-05, "gamma": 0.98,
        "gae_lambda": 0.92, "clip_range": 0.1, "ent_coef": 0.000401762, "vf_coef": 0.58096, "max_grad_norm": 0.8,
    },
    "Hopper-v5": {
        "n_steps": 512, "batch_size": 32, "n_epochs": 5, "learning_rate": 9.80828e-05, "gamma": 0.999,
        "gae_lambda": 0.99, "clip_range": 0.2, "ent_coef": 0.00229519, "vf_coef": 0.835671, "max_grad_norm": 0.7,
    },
    "Walker2d-v5": {
        "n_steps": 512, "batch_size": 32, "n_epochs": 20, "learning_rate": 5.05041e-05, "gamma": 0.99,
        "gae_lambda": 0.95, "clip_range": 0.1, "ent_coef": 0.000585045, "vf_coef": 0.871923, "max_grad_norm": 1.0,
    },
    "Humanoid-v5": {
        "n_steps": 512, "batch_size": 256, "n_epochs": 5, "learning_rate": 3.56987e-05, "gamma": 0.95,
        "gae_lambda": 0.9, "clip_range": 0.3, "ent_coef": 0.00238306, "vf_coef": 0.431892, "max_grad_norm": 2.0,
    },
    "Ant-v5": {"gamma": 0.99},
}  # fmt: skip


def result_folder(env: str, arm: str, total_timesteps: int) -> Path:
    """Where the seeds of one row of the table are kept."""
    return RESULTS / f"{env}-{total_timesteps // 1000}k" / re.sub(r"[^\w.+-]+", "_", arm)


@dataclass(frozen=True)
class Run:
    """One training run of the comparison."""

    env: str
    arm: str
    seed: int
    total_timesteps: int

    @property
    def path(self) -> Path:
        return result_folder(self.env, self.arm, self.total_timesteps) / f"s{self.seed}.json"


def sb3_zoo(run: Run) -> tuple[Any, dict[str, Any]]:
    """SB3's PPO with rl_zoo3's hyperparameters, one environment, VecNormalize."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize
    from torch import nn

    settings = ZOO[run.env]
    network = {
        "log_std_init": -2,
        "ortho_init": False,
        "activation_fn": nn.ReLU,
        "net_arch": {"pi": [256, 256], "vf": [256, 256]},
    }
    stated: dict[str, Any] = {"net_arch": [256, 256], "log_std_init": -2, "activation": "relu"}
    if run.env == "Ant-v5":
        network, stated = {}, {}
    env = VecNormalize(make_vec_env(run.env, n_envs=1, seed=run.seed), gamma=settings["gamma"])
    agent = PPO("MlpPolicy", env, policy_kwargs=network, seed=run.seed, device="cpu", **settings)
    return agent, settings | stated | {"n_envs": 1}


def preset(env_id: str, **overrides: Any) -> tuple[int, Any]:
    """Number of environments and Config that `train.py` uses for this environment."""
    from driftrl.agents.registry import AGENTS

    run, config = AGENTS["policyflow"].settings(env_id, "standard", **overrides)
    return run["n_envs"], config


def sb3_preset(run: Run, **overrides: Any) -> tuple[Any, dict[str, Any]]:
    """SB3's PPO with the hyperparameters of our preset, VecNormalize in place of our normalisers.

    The KL-adaptive learning rate, which SB3 lacks, is added.
    """
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize
    from torch import nn

    from driftrl.agents.registry import policy_alias

    n_envs, config = preset(run.env, **overrides)

    class AdaptivePPO(PPO):
        """PPO whose learning rate keeps the KL within a factor of 2 of desired_kl."""

        rate = config.learning_rate

        def train(self) -> None:
            super().train()
            kl = self.logger.name_to_value["train/approx_kl"]
            factor = 1 / 1.5 if kl > 2 * config.desired_kl else 1.5 if kl < config.desired_kl / 2 else 1.0
            self.rate = min(max(self.rate * factor, config.lr_min), config.lr_max)

        def _update_learning_rate(self, optimizers: Any) -> None:
            if config.lr_schedule == "adaptive":
                for group in optimizers.param_groups:
                    group["lr"] = self.rate
            else:
                super()._update_learning_rate(optimizers)

    names = (
        "n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "clip_range", "clip_range_vf", "ent_coef",
        "vf_coef", "max_grad_norm", "normalize_advantage",
    )  # fmt: skip
    settings = {name: getattr(config, name) for name in names}
    rate = (lambda left: left * config.learning_rate) if config.lr_schedule == "linear" else config.learning_rate
    activation = {"silu": nn.SiLU, "mish": nn.Mish, "tanh": nn.Tanh, "elu": nn.ELU}[config.activation]
    # The spread of our first actions: base and action noise together.
    std = math.hypot(config.base_std, config.action_std)
    network = {
        "log_std_init": math.log(std),
        "activation_fn": activation,
        "net_arch": {"pi": list(config.actor_hidden), "vf": list(config.critic_hidden)},
    }
    env = VecNormalize(make_vec_env(run.env, n_envs=n_envs, seed=run.seed), gamma=config.gamma)
    agent = AdaptivePPO(policy_alias(env), env, rate, policy_kwargs=network, seed=run.seed, device="cpu", **settings)
    adaptive = {
        "learning_rate": config.learning_rate,
        "lr_schedule": config.lr_schedule,
        "desired_kl": config.desired_kl,
    }
    return agent, settings | adaptive | {
        "n_envs": n_envs, "net_arch": network["net_arch"], "initial_std": std, "activation": config.activation
    }  # fmt: skip


def policyflow(run: Run, **overrides: Any) -> tuple[Any, dict[str, Any]]:
    """PolicyFlow as `python train.py policyflow --env ENV` makes it."""
    from driftrl import PolicyFlow
    from driftrl.agents.registry import policy_alias
    from driftrl.envs import make_vec

    n_envs, config = preset(run.env, **overrides)
    env = make_vec(run.env, n_envs, run.seed)
    agent = PolicyFlow(policy_alias(env), env, config=config, seed=run.seed, device="cpu")
    return agent, asdict(config) | {"n_envs": n_envs}


def mbpo(run: Run, **overrides: Any) -> tuple[Any, dict[str, Any]]:
    """LipschitzMBPO as `python train.py mbpo --preset fast --env ENV` makes it; model=none is SAC alone."""
    from driftrl import LipschitzMBPO
    from driftrl.agents.registry import AGENTS, policy_alias
    from driftrl.envs import make_vec

    settings, config = AGENTS["mbpo"].settings(run.env, "fast", **overrides)
    env = make_vec(run.env, settings["n_envs"], run.seed)
    agent = LipschitzMBPO(policy_alias(env), env, config=config, seed=run.seed, device="cpu")
    return agent, asdict(config) | {"n_envs": 1}


# Of SAC alone against SB3's: SB3's defaults, but for widths that a small machine can train.
SAC: dict[str, Any] = {
    "learning_rate": 3e-4, "buffer_size": 1_000_000, "learning_starts": 100, "batch_size": 256, "gradient_steps": 1,
    "tau": 0.005, "gamma": 0.99,
}  # fmt: skip
SAC_HIDDEN = (128, 128)


def sac(run: Run, **overrides: Any) -> tuple[Any, dict[str, Any]]:
    """LipschitzMBPO without model and regularizer, with the hyperparameters of the arm sb3-sac."""
    from driftrl import LipschitzMBPO, LipschitzMBPOConfig
    from driftrl.agents.registry import policy_alias
    from driftrl.envs import make_vec

    plain = {"model": "none", "regularizer": "none", "actor_hidden": SAC_HIDDEN, "critic_hidden": SAC_HIDDEN}
    config = LipschitzMBPOConfig(**(SAC | plain | overrides))
    env = make_vec(run.env, 1, run.seed)
    agent = LipschitzMBPO(policy_alias(env), env, config=config, seed=run.seed, device="cpu")
    return agent, asdict(config) | {"n_envs": 1}


def sb3_sac(run: Run, **overrides: Any) -> tuple[Any, dict[str, Any]]:
    """SB3's SAC, one environment."""
    from stable_baselines3 import SAC as Peer

    from driftrl.agents.registry import policy_alias
    from driftrl.envs import make_vec

    settings = SAC | overrides
    network = {"net_arch": list(SAC_HIDDEN)}
    env = make_vec(run.env, 1, run.seed)
    agent = Peer(policy_alias(env), env, policy_kwargs=network, seed=run.seed, device="cpu", **settings)
    return agent, settings | network | {"n_envs": 1}


ARMS: dict[str, Callable[..., tuple[Any, dict[str, Any]]]] = {
    "policyflow": policyflow,
    "mbpo": mbpo,
    "sac": sac,
    "sb3-sac": sb3_sac,
    "sb3-preset": sb3_preset,
    "sb3-zoo": sb3_zoo,
}
POLICYFLOW_ARMS = ("policyflow:ratio=interpolation", "policyflow:ratio=endpoint", "sb3-preset", "sb3-zoo")
LABELS = {
    "policyflow:ratio=interpolation": "PolicyFlow, interpolation ratio",
    "policyflow:ratio=endpoint": "PolicyFlow, endpoint ratio",
    "sac": "SAC alone (LipschitzMBPO without model and regularizer)",
    "sb3-sac": "SB3 SAC",
    "sb3-preset": "SB3 PPO, our preset's hyperparameters",
    "sb3-zoo": "SB3 PPO, rl_zoo3's tuned hyperparameters",
}


def build(run: Run) -> tuple[Any, dict[str, Any]]:
    """The agent of an arm, "name" or "name:field=value,field=value", and the settings to keep.

    Kept results go on under the name they have: an arm may call fields as an earlier version did.
    """
    from driftrl.agents.lipschitz_mbpo import config as mbpo_config
    from driftrl.agents.policyflow import config as policyflow_config

    name, _, overrides = run.arm.partition(":")
    fields = {key: _value(text) for key, text in (pair.split("=", 1) for pair in overrides.split(",") if pair)}
    upgraded = mbpo_config.upgraded if name in ("mbpo", "sac") else policyflow_config.upgraded
    return ARMS[name](run, **upgraded(fields))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def execute(run: Run) -> None:
    """Train, evaluate and write one run's result."""
    import gymnasium
    import mujoco
    import stable_baselines3
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecNormalize

    from driftrl.analysis.multimodality import has_several_solutions, multimodality

    class Curve(BaseCallback):
        """Mean return of the last training episodes, 100 at most, at CURVE_POINTS times; and what LOGGED names."""

        def __init__(self) -> None:
            super().__init__()
            self.points: list[list[float]] = []
            self.logged: dict[str, list[list[float]]] = {}

        def _on_step(self) -> bool:
            buffer = self.model.ep_info_buffer
            if buffer and self.num_timesteps >= run.total_timesteps / CURVE_POINTS * (len(self.points) + 1):
                self.points.append([self.num_timesteps, sum(e["r"] for e in buffer) / len(buffer)])
            return True

        def _on_rollout_start(self) -> None:  # what the last update recorded waits for the log here
            found = self.logger.name_to_value
            if LOGGED[0] in found:
                for name in LOGGED:
                    self.logged.setdefault(name, []).append([self.num_timesteps, found[name]])

        _on_training_end = _on_rollout_start

    torch.set_num_threads(1)
    agent, settings = build(run)
    curve = Curve()
    start, cpu_start = time.perf_counter(), time.process_time()
    agent.learn(run.total_timesteps, callback=curve)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start

    evaluation: dict[str, dict[str, Any]] = {}
    for mode, deterministic in (("deterministic", True), ("sampled", False)):
        env = make_vec_env(run.env, n_envs=EVALUATION_EPISODES, seed=10_000 + run.seed)  # one episode in each
        normalizer = agent.get_vec_normalize_env()
        if normalizer is not None:
            env = VecNormalize(env, training=False, norm_reward=False)
            env.obs_rms = normalizer.obs_rms
        returns, lengths = evaluate_policy(
            agent, env, EVALUATION_EPISODES, deterministic=deterministic, return_episode_rewards=True
        )
        evaluation[mode] = {"returns": returns, "lengths": lengths}
        if has_several_solutions(run.env):
            goals = multimodality(agent, run.env, {}, (0, 0), 10_000 + run.seed, deterministic=deterministic)
            evaluation[mode]["multimodality"] = goals

    result = {
        "env": run.env, "arm": run.arm, "seed": run.seed, "total_timesteps": run.total_timesteps,
        "settings": settings, "evaluation": evaluation, "curve": curve.points, "logged": curve.logged,
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


def run_missing(runs: Sequence[Run], jobs: int) -> None:
    """Execute those whose result is not kept yet, `jobs` at a time, each in a process of its own with one thread."""

    def launch(run: Run) -> None:
        code = (
            f"import learning; learning.execute(learning.Run(*{(run.env, run.arm, run.seed, run.total_timesteps)!r}))"
        )
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
        start = time.perf_counter()
        outcome = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
        state = "done" if outcome.returncode == 0 else f"FAILED with code {outcome.returncode}"
        print(f"{run.env} {run.arm} seed {run.seed}: {state} in {time.perf_counter() - start:.0f} s", flush=True)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(launch, [run for run in runs if not run.path.exists()]))


def load(env: str, arm: str, total_timesteps: int) -> list[dict[str, Any]]:
    """All kept results of one row of the table, by seed."""
    paths = result_folder(env, arm, total_timesteps).glob("s*.json")
    return sorted((json.loads(path.read_text()) for path in paths), key=lambda r: r["seed"])


def interval(scores: np.ndarray, digits: int = 0) -> str:
    """IQM of the scores of all seeds and its 95 % bootstrap interval, for a table."""
    from driftrl.analysis.statistics import bootstrap_interval, interquartile_mean

    low, high = bootstrap_interval(scores, interquartile_mean, rng=np.random.default_rng(0))
    return f"**{interquartile_mean(scores):.{digits}f}** [{low:.{digits}f}, {high:.{digits}f}]"


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
            curves = [np.array(r["curve"]) for r in load(env, arm, total_timesteps)]
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
        figure: where the learning curves are drawn.
    """
    if not table_only:
        run_missing([Run(env, arm, seed, total_timesteps) for seed in seeds for env in envs for arm in arms], jobs)
    print(table(envs, arms, total_timesteps))
    if "sb3-zoo" in arms:
        print("\n" + time_table(envs, arms, total_timesteps))
    plot(envs, arms, total_timesteps, figure)


if __name__ == "__main__":
    tyro.cli(main)
