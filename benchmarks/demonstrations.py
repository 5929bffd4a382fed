"""Pretrained, fine-tuned and steered policies on demonstrations of Avoid: success and routes, over seeds.

python benchmarks/demonstrations.py --out benchmarks/results/demonstrations --seeds 0 1 2 3 4

Each run is one `train.py` in a folder of its own: what is there and complete is not run again. The table is printed at
the end, from all runs in the folder. Chunks of actions are not measured: policies decide at every step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
ENV = "driftrl/Avoid-v0"
NETWORKS = [
    "--activation", "relu", "--actor-hidden", "128", "128", "--critic-hidden", "128", "128",
    "--pretrain-steps", "10000", "--pretrain-learning-rate", "1e-2",
]  # fmt: skip
HEADS = {
    "flow": ["--base", "gaussian", "--base-std", "0.5", "--action-std", "0.05", "--solver-steps", "8"],
    "gaussian": ["--base", "standard", "--base-std", "0", "--ratio", "endpoint", "--action-std", "0.3"],
}
TUNING = [
    "--gamma", "1", "--critic-warmup", "3", "--critic-learning-rate", "1e-3", "--n-envs", "256", "--n-steps", "64",
    "--batch-size", "4096", "--n-epochs", "10", "--clip-range", "0.1",
]  # fmt: skip
STAGES = {
    "pretrained": ["--total-timesteps", "0"],
    "fine-tuned": [*TUNING, "--learning-rate", "2e-4", "--lr-schedule", "constant", "--total-timesteps", "2000000"],
    "steering": [
        *TUNING, "--learning-rate", "3e-4", "--lr-schedule", "constant", "--freeze-flow", "--total-timesteps", "600000",
    ],
}  # fmt: skip
ARMS = [("good", "flow", "pretrained"), ("good", "gaussian", "pretrained"), ("half", "flow", "fine-tuned"),
        ("half", "gaussian", "fine-tuned"), ("half", "flow", "steering")]  # fmt: skip
"""Data (all demonstrations good, or half of them), head, stage."""


def dataset(out: Path, data: str) -> Path:
    """The demonstrations, written if they are not there."""
    target = out / "data" / f"{data}-v0"
    if not target.exists():
        success = {"good": "1", "half": "0.5"}[data]
        command = [sys.executable, "-m", "driftrl.commands.demonstrate", str(target), "--success", success]
        subprocess.run(command, cwd=ROOT, check=True)
    return target


def run(out: Path, data: str, head: str, stage: str, seed: int) -> None:
    """Train one arm with one seed, unless it is complete."""
    folder = out / f"{data}-{head}-{stage}-{seed}"
    if list(folder.rglob("eval.json")):
        return
    found = next(iter(folder.rglob("config.json")), None)
    if found is not None:
        command = ["--resume", str(found.parent)]
    else:
        what = ["--env", ENV, "--demonstrations", str(dataset(out, data)), "--seed", str(seed)]
        command = ["policyflow", *what, *NETWORKS, *HEADS[head], *STAGES[stage], "--run-dir", str(folder)]
    print(f"{folder.name} ...", flush=True)
    subprocess.run([sys.executable, "train.py", *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def rows(out: Path, data: str, head: str, stage: str) -> list[dict[str, Any]]:
    """What the complete runs of an arm came to: before reinforcement learning, and at the end."""
    found = []
    for path in sorted(out.glob(f"{data}-{head}-{stage}-*")):
        for report in path.rglob("eval.json"):
            before = json.loads((report.parent / "pretrained.json").read_text())
            found.append({"before": before, "after": json.loads(report.read_text())})
    return found


def table(out: Path) -> str:
    """Success and entropy of routes of each arm: median and range over seeds."""
    lines = ["| data | head | stage | seeds | policy | success before | after | bits before | after |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for data, head, stage in ARMS:
        found = rows(out, data, head, stage)
        for policy in ("sampled", "deterministic") if found else ():
            cells = []
            for key, form in (("success", "{:.1%}"), ("entropy_bits", "{:.2f}")):
                for when in ("before", "after"):
                    values = [row[when][policy]["multimodality"][key] for row in found]
                    low, middle, high = (form.format(each) for each in np.quantile(values, [0, 0.5, 1]))
                    cells.append(f"{middle} [{low}, {high}]")
            lines.append(f"| {data} | {head} | {stage} | {len(found)} | {policy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/demonstrations"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4], help="none: only print the table")
    parser.add_argument("--stages", nargs="+", choices=tuple(STAGES), default=list(STAGES), help="which to run")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    for seed in args.seeds:
        for arm in ARMS:
            if arm[2] in args.stages:
                run(out, *arm, seed)
    print(table(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
