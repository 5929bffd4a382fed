"""Pretrained, fine-tuned and steered policies on demonstrations of Avoid: success and routes, over seeds.

    OMP_NUM_THREADS=1 python benchmarks/demonstrations.py --seeds 0 1 2 3 4

Each run is one `train.py` with Avoid's preset. Its evaluations are kept in `benchmarks/results/demonstrations/`, and a
run that is kept is not repeated. The table of all that are kept is printed at the end and written into
docs/demonstrations.md. The Gaussian is the same policy with a base of width 0, the mixture that with a base of five
points; from scratch is the flow without demonstrations. With chunks of c actions, all of which are done, a rollout
holds a c-th of the decisions. Minibatches are smaller by as much.
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
from learning import write_between
from paired import machine, write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "demonstrations"
ENV = "driftrl/Avoid-v0"
PRETRAIN = ["--pretrain-steps", "5000"]
HEADS = {
    "flow": [],
    "flow with a learned base": ["--base", "gaussian", "--base-std", "0.5"],  # steering needs one
    "gaussian": ["--base-std", "0", "--action-std", "0.3"],
    "mixture": ["--base", "mixture", "--ratio", "mixture", "--action-std", "0.3"],
}
STAGES = {
    "pretrained": ["--total-timesteps", "0"],
    "fine-tuned": [],
    "steering": ["--freeze-flow", "--learning-rate", "3e-4"],
    "from scratch": ["--critic-warmup", "0"],
}
COMPARED = ("flow", "gaussian", "mixture")
ARMS = [
    *(("good", head, "pretrained", chunk) for chunk in (1, 4) for head in COMPARED),
    *(("half", head, "fine-tuned", chunk) for chunk in (1, 4) for head in COMPARED),
    ("half", "flow with a learned base", "steering", 1),
    ("none", "flow", "from scratch", 1),
]
"""Data (all demonstrations good, half of them, or none), head, stage, actions in a chunk."""
CHUNKS = {1: [], 4: ["--chunk", "4", "--batch-size", "166"]}


def dataset(runs: Path, data: str) -> Path:
    """The demonstrations, written if they are not there."""
    target = runs / "data" / f"{data}-v0"
    if not target.exists():
        success = {"good": "1", "half": "0.5"}[data]
        command = [sys.executable, "-m", "driftrl.commands.demonstrate", str(target), "--success", success]
        subprocess.run(command, cwd=ROOT, check=True)
    return target


def kept(data: str, head: str, stage: str, chunk: int, seed: int) -> Path:
    """Where the result of a run is kept."""
    chunks = f"-chunk_{chunk}" if chunk > 1 else ""
    return RESULTS / f"{data}-{head}-{stage}{chunks}".replace(" ", "_") / f"s{seed}.json"


def run(runs: Path, data: str, head: str, stage: str, chunk: int, seed: int) -> None:
    """Train one arm with one seed, unless it is complete, and keep its evaluations."""
    result = kept(data, head, stage, chunk, seed)
    if result.exists():
        return
    folder = runs / result.parent.name / result.stem
    found = next(iter(folder.rglob("config.json")), None)
    if found is not None:
        command = ["--resume", str(found.parent)]
    else:
        command = ["policyflow", "--env", ENV, "--seed", str(seed), *HEADS[head], *STAGES[stage], *CHUNKS[chunk]]
        command += ["--run-dir", str(folder)]
        if data != "none":
            command += ["--demonstrations", str(dataset(runs, data)), *PRETRAIN]
    print(f"{folder.parent.name}, seed {seed} ...", flush=True)
    subprocess.run([sys.executable, "train.py", *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (report,) = folder.rglob("eval.json")
    after, pretrained = json.loads(report.read_text()), report.parent / "pretrained.json"
    before = json.loads(pretrained.read_text()) if pretrained.exists() else after
    write(result, {"machine": machine("torch", "numpy"), "before": before, "after": after})


def rows(data: str, head: str, stage: str, chunk: int) -> list[dict[str, Any]]:
    """What the complete runs of an arm came to: before reinforcement learning, and at the end."""
    return [json.loads(each.read_text()) for each in sorted(kept(data, head, stage, chunk, 0).parent.glob("s*.json"))]


def table() -> str:
    """Success and entropy of routes of each arm: median and range over seeds."""
    lines = ["| data | head | chunk | stage | seeds | policy | success before | after | bits before | after |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for data, head, stage, chunk in ARMS:
        found = rows(data, head, stage, chunk)
        for policy in ("sampled", "deterministic") if found else ():
            cells = []
            for key, form in (("success", "{:.1%}"), ("entropy_bits", "{:.2f}")):
                for when in ("before", "after"):
                    values = [row[when][policy]["multimodality"][key] for row in found]
                    low, middle, high = (form.format(each) for each in np.quantile(values, [0, 0.5, 1]))
                    cells.append(f"{middle} [{low}, {high}]")
            lines.append(f"| {data} | {head} | {chunk} | {stage} | {len(found)} | {policy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--runs", type=Path, default=Path("runs/demonstrations"), help="run folders and data")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4], help="none: only print the table")
    parser.add_argument("--chunks", nargs="+", type=int, choices=tuple(CHUNKS), default=list(CHUNKS))
    parser.add_argument("--stages", nargs="+", choices=tuple(STAGES), default=list(STAGES), help="which to run")
    args = parser.parse_args(argv)
    for arm in ARMS:
        for seed in args.seeds:
            if arm[2] in args.stages and arm[3] in args.chunks:
                run(args.runs.resolve(), *arm, seed)
    print(table())
    write_between(ROOT / "docs" / "demonstrations.md", "demonstrations", table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
