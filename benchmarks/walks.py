"""How many files and lines a reader walks through: from an observation to the gradient, and from --resume to ready.

    OMP_NUM_THREADS=1 python benchmarks/walks.py --output benchmarks/results/walks.json

A trace of Python's calls (`sys.setprofile`) on Hopper-v5 with the standard presets, eager, with small rollouts and few
updates. What counts are files of this repository (links resolved; not benchmarks/ nor tests/) in which a function was
called, and the source lines of the called functions, docstrings included, each line once. Code of modules and classes,
and what imports call, does not count.

Observation to gradient: the agent learns with its `collect_rollouts` and `train` wrapped. The trace begins when
`collect_rollouts` is entered for the first time after a call of `train`, is off between the two, and what a call of
`train` does after its last optimizer step is dropped. So everything that happens once in `learn` is left out (setup,
choice of compilation, the first statistics and LipschitzMBPO's first fit), and so is what follows the last minibatch
(diagnostics, logs). PolicyFlow: two iterations. LipschitzMBPO: the steps up to the second fit of its model; "with the
model" also that fit and the model rollouts after it. The simulator is the folder envs/.

All of learn: the whole call of `learn` with `diagnostics_interval=0`, simulator and model included.

Hops: changes of file between one optimizer step and the next. A call from a file of ours to another one and the return
from it are two. The median over minibatches, those left out that come first in `train`.

Resume to ready: `main` of train.py with --resume, in this process, up to the call of the agent's `learn`. The run was
made by another process, so no cache is warm.

Before the redesign (commit 8470cbc, flat agents/; a copy of this file ran there with --label before): PolicyFlow 11
files and 689 lines, 13 and 836 with the simulator; LipschitzMBPO 10 and 440, 12 and 587 with the simulator, 17 and 918
with the model, too; all of learn 15 and 962, 17 and 1,017; 36 hops in a minibatch of either; 21 files to resume.

The redesign was to bring the walks to 8 files and 1,000 lines, with 4 in the algorithm's folder, and resume to 12
files. PolicyFlow takes 9 files, 4 of them its own; LipschitzMBPO 11 with the model rollouts that go on between two
fits, 4 its own. --resume takes 46, nearly all of them what a new run takes, too: the Config, networks, flow and
environments are made, the run's folder, log and signals, the command. Beyond a new run it is 7 files and 259 lines.
Value gradients came after the redesign: every imagined step calls actor, model and termination rule, each in its file.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import runpy
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, TypeAlias

import tyro

ENV = "Hopper-v5"
NOT_OURS = ("benchmarks", "tests")
SIMULATOR = "envs/"
BEFORE = Path(__file__).parent / "results/walks.json"
STEPS = {"policyflow": 3 * 512, "mbpo": 250}
SMALL: dict[str, dict[str, Any]] = {
    "policyflow": {"n_envs": 8, "n_steps": 64, "batch_size": 128, "n_epochs": 2},
    "mbpo": {"learning_starts": 50, "gradient_steps": 3, "batch_size": 32, "model_epochs": 2, "model_rollouts": 4,
             "value_gradient": 0},
}  # fmt: skip
HORIZON = 5  # of the preset's value gradients, which came after the redesign
SECOND_FIT = {"model_interval": 100}  # so that a second one falls into STEPS, which it does not with the preset's 250
TINY_RUN = (
    "policyflow --n-envs 2 --n-steps 16 --batch-size 16 --n-epochs 1 --total-timesteps 32 --compile off --device cpu"
)

Walk: TypeAlias = dict[str, int]
"""Lines of the called functions by file."""


class Trace:
    """Which functions of a folder are called, and how often a call leads from one file of it to another.

    Args:
        root: the folder; hidden folders in it and those of `NOT_OURS` do not count.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.called: set[tuple[str, CodeType]] = set()  # with their file: equal code may stand in two
        self.hops = 0
        self._files: dict[str, str | None] = {}

    def __enter__(self) -> Trace:
        sys.setprofile(self._see)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def walk(self) -> Walk:
        """Lines of the called functions by file; nested functions lie within lines that count once."""
        found: dict[str, set[int]] = {}
        for file, code in self.called:
            lines, first = inspect.getsourcelines(code)
            found.setdefault(file, set()).update(range(first, first + len(lines)))
        return {file: len(lines) for file, lines in sorted(found.items())}

    def _see(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or (file := self._file(frame.f_code)) is None:
            return
        came_from, caller = None, frame.f_back
        while caller is not None:
            if caller.f_code.co_filename.startswith("<frozen importlib"):
                return
            came_from = came_from or self._file(caller.f_code)
            caller = caller.f_back
        self.called.add((file, frame.f_code))
        self.hops += came_from not in (None, file)

    def _file(self, code: CodeType) -> str | None:
        """The file of a function, relative to the folder; None elsewhere, for a module and for a class body."""
        if not code.co_flags & inspect.CO_OPTIMIZED:
            return None
        if code.co_filename not in self._files:
            self._files[code.co_filename] = self._find(Path(code.co_filename).resolve())
        return self._files[code.co_filename]

    def _find(self, path: Path) -> str | None:
        if not path.is_file() or not path.is_relative_to(self.root):  # generated code is in no file
            return None
        parts = path.relative_to(self.root).parts
        return None if parts[0] in NOT_OURS or any(part.startswith(".") for part in parts) else "/".join(parts)


class Updates:
    """An agent's way from observation to gradient, traced while it learns.

    Attributes:
        called: functions called up to the last optimizer step of a `train`.
        hops: calls from file to file, one number for each minibatch but the first of a `train`.
    """

    def __init__(self, agent: Any, trace: Trace) -> None:
        self.trace, self.called, self.hops = trace, set[tuple[str, CodeType]](), list[int]()
        self._trained = False
        self._before_step: int | None = None
        self._collect, self._train = agent.collect_rollouts, agent.train
        agent.collect_rollouts, agent.train = self.collect_rollouts, self.train

    def collect_rollouts(self, *arguments: Any, **keywords: Any) -> Any:
        self.trace.called.clear()  # what the last `train` did after its last optimizer step
        with self.trace if self._trained else contextlib.nullcontext():
            return self._collect(*arguments, **keywords)

    def train(self, *arguments: Any, **keywords: Any) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self._before_step = None
        handle = register_optimizer_step_post_hook(self._stepped)
        with self.trace if self._trained else contextlib.nullcontext():
            self._train(*arguments, **keywords)
        handle.remove()
        self._trained = True

    def _stepped(self, *arguments: object) -> None:
        self.called |= self.trace.called
        if self._before_step is not None and self._trained:
            self.hops.append(self.trace.hops - self._before_step)
        self._before_step = self.trace.hops


def build(name: str, **settings: Any) -> Any:
    """An agent as train.py makes it, with small rollouts and few updates."""
    from driftrl.agents.registry import AGENTS, policy_alias
    from driftrl.envs import make_vec

    entry = AGENTS[name]
    run, config = entry.settings(ENV, "standard", **SMALL[name] | {"compile": "off"} | settings)
    env = make_vec(ENV, run["n_envs"], 0)
    return entry.agent(policy_alias(env), env, config=config, seed=0, device="cpu")


def observation_to_gradient(root: Path, name: str, **settings: Any) -> tuple[Walk, int]:
    """The walk, simulator included, and the hops of a minibatch."""
    agent, trace = build(name, **settings), Trace(root)
    updates = Updates(agent, trace)
    agent.learn(STEPS[name], log_interval=None)
    assert updates.hops, "no step of a torch optimizer was seen"
    trace.called = updates.called
    return trace.walk(), 2 * statistics.median_low(updates.hops)


def all_of_learn(root: Path, name: str) -> Walk:
    agent = build(name, diagnostics_interval=0)
    with Trace(root) as trace:
        agent.learn(STEPS[name])
    return trace.walk()


def command_to_ready(root: Path) -> tuple[Walk, Walk]:
    """The walks of a new run and of one that is resumed."""
    from driftrl.agents.registry import AGENTS

    train = runpy.run_path(str(root / "train.py"))["main"]
    agent: Any = AGENTS["policyflow"].agent
    learn = agent.learn

    class ReadyError(BaseException):
        """Raised in place of learning."""

    def stop(*arguments: Any, **keywords: Any) -> None:
        sys.setprofile(None)
        raise ReadyError

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        options = [*TINY_RUN.split(), "--env", ENV, "--run-dir", folder]
        subprocess.run([sys.executable, str(root / "train.py"), *options], check=True, stdout=subprocess.DEVNULL)
        (run,) = Path(folder).glob("*/*/*")
        agent.learn = stop
        with Trace(root) as resumed, contextlib.suppress(ReadyError):
            train(["--resume", str(run), "--total-timesteps", "64"])
        with Trace(root) as new, contextlib.suppress(ReadyError):
            train([*options, "--seed", "1"])
        agent.learn = learn
    return new.walk(), resumed.walk()


def measure(root: Path) -> dict[str, Any]:
    """All walks, {"walks": {title: files}, "hops": {agent: number}}."""
    new, resumed = command_to_ready(root)
    beyond = {file: lines for file, lines in resumed.items() if file not in new}
    walks = {"--resume to ready": resumed, "a new run to ready": new, "--resume beyond a new run": beyond}
    hops = dict[str, int]()
    for name in SMALL:
        walk, hops[name] = observation_to_gradient(root, name)
        ways = {"": walk}
        if name == "mbpo":
            ways[" with the model"] = observation_to_gradient(root, name, **SECOND_FIT)[0]
            differentiated = observation_to_gradient(root, name, value_gradient=HORIZON)
            ways[f" with value gradients, H = {HORIZON}"], hops["mbpo with value gradients"] = differentiated
        for way, files in ways.items():
            ours = {file: lines for file, lines in files.items() if not file.startswith(SIMULATOR)}
            walks[f"{name}{way}"] = ours
            walks[f"{name}{way}{' and' if way else ' with'} the simulator"] = files
        walks[f"{name}, all of learn"] = all_of_learn(root, name)
    return {"walks": walks, "hops": hops}


def size(walk: Walk) -> str:
    return f"{len(walk)} files, {sum(walk.values()):,} lines"


def folders(walk: Walk) -> str:
    counts = Counter(file.rpartition("/")[0] or "top level" for file in walk)
    return ", ".join(f"{folder} {count}" for folder, count in counts.most_common())


def table(before: dict[str, Any] | None, now: dict[str, Any]) -> str:
    """Markdown: every walk before and now, and the folders of its files now."""
    empty: dict[str, Any] = {"walks": {}, "hops": {}}
    then = before or empty
    rows = ["| walk | before | now | files now, by folder |", "|---|---|---|---|"]
    for title, walk in now["walks"].items():
        old = size(then["walks"][title]) if title in then["walks"] else "-"
        rows.append(f"| {title} | {old} | {size(walk)} | {folders(walk)} |")
    for name, hops in now["hops"].items():
        rows.append(f"| {name}, hops in a minibatch | {then['hops'].get(name, '-')} | {hops} | |")
    return "\n".join(rows)


def main(output: Path | None = None, label: str = "after") -> None:
    """Print the walks.

    Args:
        output: JSON file that keeps them, under the label; what it holds under "before" is the table's other column.
            Without one, the committed file's is.
        label: before or after the redesign.
    """
    import driftrl

    source = output or BEFORE
    kept = json.loads(source.read_text()) if source.exists() else {}
    now = measure(Path(driftrl.__file__).resolve().parents[1])
    print(table(kept.get("before"), now))
    if output is not None:
        output.write_text(json.dumps(kept | {label: now}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
