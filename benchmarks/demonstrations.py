"""Pretrained, fine-tuned and steered policies on demonstrations: success and routes, over seeds.

    OMP_NUM_THREADS=1 python benchmarks/demonstrations.py --seeds 0 1 2 3 4
    OMP_NUM_THREADS=1 python benchmarks/demonstrations.py --task push --seeds 0 1 2    # pip install 'driftrl[maze]'
    OMP_NUM_THREADS=1 python benchmarks/demonstrations.py --task pick --seeds 0 1 2
    OMP_NUM_THREADS=1 python benchmarks/demonstrations.py --task maze --seeds 0 1 2 3 4

Each run is one `train.py` with the preset of its task. Its evaluations are kept in benchmarks/results/demonstrations,
and a run that is kept is not repeated. The table of all that are kept is printed at the end and written into
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from learning import write_between
from paired import machine, write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "demonstrations"
HEADS = {
    "flow": [],
    "flow with a learned base": ["--base", "gaussian", "--base-std", "0.5"],  # steering needs one
    "gaussian": ["--base", "standard", "--base-std", "0", "--action-std", "0.3"],
    "mixture": ["--base", "mixture", "--ratio", "mixture", "--action-std", "0.3", "--solver-steps", "1"],
}
COMPARED = ("flow", "gaussian", "mixture")
# What explores while fine-tuning only blurs what a flow has learned; Gaussian and mixture learn their noise.
QUIET = ["--action-std", "0.02", "--action-std-min", "0.02"]
STAGES = {
    "pretrained": ["--total-timesteps", "0"],
    "fine-tuned": [],
    "steering": ["--freeze-flow"],
    "from scratch": ["--critic-warmup", "0"],
}
CHUNKS = (1, 4, 8, 16)


class Pretraining(NamedTuple):
    """How long and how fast a policy learns from demonstrations."""

    steps: int
    learning_rate: float


BRIEF, SLOW, LONG = Pretraining(5000, 3e-3), Pretraining(10_000, 3e-3), Pretraining(10_000, 1e-2)
"""BRIEF is too little for a flow, and better than LONG for a Gaussian (docs/demonstrations.md)."""


class Arm(NamedTuple):
    """What one row of a table is made of."""

    data: str
    """A key of the task's `shares`, or "none"."""
    head: str
    stage: str
    chunk: int = 1
    pretraining: Pretraining = LONG


def pretrained(head: str, chunk: int) -> Arm:
    """From good demonstrations alone."""
    return Arm("good", head, "pretrained", chunk, BRIEF if head == "gaussian" else LONG)


@dataclass(frozen=True)
class Task:
    """What is compared on one environment."""

    env: str
    demonstrations: int
    """Episodes."""
    shares: dict[str, float]
    """Data sets -> share of the episodes that aim at their goal."""
    minibatch: int
    """Of the update, in steps of the environment; without chunks the preset's."""
    steering_rate: float
    """Learning rate."""
    gaussian_steps: int
    """Solver steps of the Gaussian, which carries one fixed point: 1, as the mixture has it, is a plain network."""
    arms: tuple[Arm, ...]
    options: tuple[str, ...] = ()
    """Of all arms."""
    episodes: int | None = None
    """Of an evaluation; None: those that training itself reports of a task with several solutions."""


TASKS = {
    "avoid": Task(
        "driftrl/Avoid-v0", 600, {"good": 1.0, "half": 0.5}, 664, 3e-4, 5,
        (
            *(pretrained(head, chunk) for chunk in CHUNKS for head in COMPARED),
            *(Arm("half", head, "fine-tuned", chunk, BRIEF) for chunk in (1, 4) for head in COMPARED),
            Arm("half", "flow with a learned base", "steering", 1, BRIEF),
            Arm("none", "flow", "from scratch"),
        ),
    ),
    "push": Task(
        "FetchPush-v4", 2000, {"mixed": 0.6}, 1000, 7e-4, 1,
        (
            Arm("mixed", "flow", "steering", 1, SLOW),
            *(Arm("mixed", head, "fine-tuned", 1, SLOW) for head in COMPARED),
            *(Arm("mixed", head, "pretrained", chunk) for chunk in (4, 8) for head in COMPARED),
            Arm("none", "flow", "from scratch"),
        ),
        episodes=500,
    ),
    "pick": Task(
        "FetchPickAndPlace-v4", 2000, {"mixed": 0.6}, 1000, 7e-4, 1,
        (Arm("mixed", "flow", "steering"), *(Arm("mixed", head, "fine-tuned") for head in COMPARED)),
        episodes=500,
    ),
    "maze": Task(
        "driftrl/PointMazeMedium-v0", 600, {"good": 1.0}, 256, 3e-4, 1,
        tuple(pretrained(head, chunk) for chunk in CHUNKS for head in COMPARED),
        options=(
            "--preset", "standard", "--base", "standard", "--base-std", "1", "--actor-hidden", "128", "128", "128",
            "--activation", "mish",
        ),
        episodes=100,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One arm of a task with one seed."""

    task: str
    arm: Arm
    seed: int

    @property
    def kept(self) -> Path:
        """Where its result is kept."""
        data, head, stage, chunk, _ = self.arm
        prefix, chunks = "" if self.task == "avoid" else f"{self.task}-", f"-chunk_{chunk}" if chunk > 1 else ""
        return RESULTS / f"{prefix}{data}-{head}-{stage}{chunks}".replace(" ", "_") / f"s{self.seed}.json"

    def execute(self, runs: Path) -> None:
        """Train and evaluate, unless the result is there."""
        if self.kept.exists():
            return
        task, folder = TASKS[self.task], runs / self.kept.parent.name / self.kept.stem
        found = next(iter(folder.rglob("config.json")), None)
        if found is not None:
            options = ["--resume", str(found.parent)]
        else:
            options = ["policyflow", "--env", task.env, "--seed", str(self.seed), "--run-dir", str(folder)]
            options += [*task.options, *HEADS[self.arm.head], *STAGES[self.arm.stage]]
            if self.arm.stage == "pretrained" and self.arm.head == "flow":
                options += QUIET
            if self.arm.chunk > 1:
                options += ["--chunk", str(self.arm.chunk), "--batch-size", str(task.minibatch // self.arm.chunk)]
            if self.arm.head == "gaussian":
                options += ["--solver-steps", str(task.gaussian_steps)]
            if self.arm.stage == "steering":
                options += ["--learning-rate", str(task.steering_rate)]
            if self.arm.data != "none":
                options += ["--demonstrations", str(dataset(runs, self.task, self.arm.data))]
                steps, rate = self.arm.pretraining
                options += ["--pretrain-steps", str(steps), "--pretrain-learning-rate", str(rate)]
        print(f"{folder.parent.name}, seed {self.seed} ...", flush=True)
        call("train.py", *options)
        (report,) = folder.rglob("eval.json")
        pretrained = report.parent / "pretrained.zip"
        after = evaluation(task, report, report.parent)
        before = evaluation(task, pretrained.with_suffix(".json"), pretrained) if pretrained.exists() else after
        write(self.kept, {"machine": machine("torch", "numpy"), "before": before, "after": after})


def call(script: str, *options: str) -> None:
    subprocess.run([sys.executable, script, *options], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def dataset(runs: Path, name: str, data: str) -> Path:
    """The demonstrations, written if they are not there."""
    task = TASKS[name]
    target = runs / "data" / name / f"{data}-v0"
    if not target.exists():
        command = [sys.executable, "-m", "driftrl.commands.demonstrate", str(target), "--env", task.env]
        command += ["--episodes", str(task.demonstrations), "--success", str(task.shares[data])]
        subprocess.run(command, cwd=ROOT, check=True)
    return target


def evaluation(task: Task, report: Path, saved: Path) -> dict[str, Any]:
    """Of a saved agent: the report that training wrote, or one of more episodes."""
    if task.episodes is not None:
        report = report.with_name("evaluation.json")
        call("evaluate.py", str(saved), "--episodes", str(task.episodes), "--json", str(report))
    found: dict[str, Any] = json.loads(report.read_text())
    return found | {"file": Path(found["file"]).name}


def figures(report: dict[str, Any]) -> dict[str, float]:
    """Share of episodes that succeeded, and entropy of the routes in bits where there are several."""
    several = report.get("multimodality", {})
    if "success" not in several:
        return {"success": report["success_rate"]}
    return {"success": several["success"], "bits": several["entropy_bits"]}


def table(name: str) -> str:
    """Success and entropy of routes of each arm of a task: median and range over seeds."""
    lines = list[str]()
    for arm in TASKS[name].arms:
        kept = sorted(Run(name, arm, 0).kept.parent.glob("s*.json"))
        found = [json.loads(each.read_text()) for each in kept]
        for policy in ("sampled", "deterministic") if found else ():
            before, after = ([figures(row[when][policy]) for row in found] for when in ("before", "after"))
            if not lines:
                titles = [f"{key} {when}" for key in before[0] for when in ("before", "after")]
                lines = [f"| data | head | chunk | stage | seeds | policy | {' | '.join(titles)} |"]
                lines.append("|---" * (6 + len(titles)) + "|")
            cells = []
            for key in before[0]:
                for each in (before, after):
                    low, middle, high = np.quantile([row[key] for row in each], [0, 0.5, 1])
                    form = "{:.1%} [{:.1%}, {:.1%}]" if key == "success" else "{:.2f} [{:.2f}, {:.2f}]"
                    cells.append(form.format(middle, low, high))
            stated = f"{arm.data} | {arm.head} | {arm.chunk} | {arm.stage}"
            lines.append(f"| {stated} | {len(found)} | {policy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--task", choices=tuple(TASKS), default="avoid")
    parser.add_argument("--runs", type=Path, default=Path("runs/demonstrations"), help="run folders and data")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4], help="none: only print the table")
    parser.add_argument("--chunks", nargs="+", type=int, choices=CHUNKS, default=list(CHUNKS))
    parser.add_argument("--stages", nargs="+", choices=tuple(STAGES), default=list(STAGES), help="which to run")
    parser.add_argument("--heads", nargs="+", choices=tuple(HEADS), default=list(HEADS), help="which to run")
    args = parser.parse_args(argv)
    for seed in args.seeds:
        for arm in TASKS[args.task].arms:
            if arm.stage in args.stages and arm.chunk in args.chunks and arm.head in args.heads:
                Run(args.task, arm, seed).execute(args.runs.resolve())
    print(table(args.task))
    write_between(ROOT / "docs" / "demonstrations.md", f"demonstrations {args.task}", table(args.task))
    return 0


if __name__ == "__main__":
    sys.exit(main())
