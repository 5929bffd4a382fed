"""Training that is killed again and again, resumed, and compared with training that was left alone, bit for bit.

    OMP_NUM_THREADS=1 python benchmarks/kill_test.py --kills 100

Each process is killed (SIGKILL) at a random moment after its first checkpoint, often while it writes one, and resumed
from what it left. After as many kills as it takes a run is complete and must equal the reference: final weights and
optimizers, best agent, the state of simulators and random generators, progress.csv (but for its times) and evaluation.
Then the next run begins, until all kills are done.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "oracles"))
from run_differences import differences, progress_rows

from driftrl.agents.storage import format as checkpoint
from driftrl.agents.storage.values import CheckpointError
from driftrl.commands import train, training
from driftrl.runs.callbacks import Progress
from driftrl.runs.folder import checkpoints

SMALL = ["--actor-hidden", "8", "8", "--critic-hidden", "8", "8", "--batch-size", "16"]
TRAINING = {
    "policyflow": ["--n-envs", "2", "--n-steps", "16", "--n-epochs", "2", "--total-timesteps", "3000"],
    "mbpo": [
        "--n-envs", "1", "--learning-starts", "100", "--gradient-steps", "2", "--total-timesteps", "600",
        "--model-interval", "50", "--model-rollouts", "20", "--model-hidden", "8", "8", "--model-epochs", "5",
    ],
}  # fmt: skip
INTERVAL = {"policyflow": 64, "mbpo": 20}
"""Steps between checkpoints: some ten milliseconds of training."""
STEPS = "time/total_timesteps"
WRONG = ("corrupt files", "kills that lost more than an interval", "runs that differ")


def main(
    kills: int = 100,
    agents: tuple[Literal["policyflow", "mbpo"], ...] = ("policyflow", "mbpo"),
    env_id: str = "InvertedPendulum-v5",
    seed: int = 0,
) -> int:
    """Print what was counted; returns 1 if anything differs, was corrupt or lost, else 0.

    Args:
        kills: of each agent.
        agents: which to train.
        env_id: Gymnasium id of a batched environment.
        seed: of the moments of the kills.
    """
    failed = False
    for agent in agents:
        with tempfile.TemporaryDirectory() as folder:
            count = KillTest(Path(folder), agent, env_id, random.Random(seed)).run(kills)
        print(f"{agent} on {env_id}: {', '.join(f'{value} {name}' for name, value in count.items())}", flush=True)
        failed |= any(count[name] for name in WRONG)
    return int(failed)


class KillTest:
    """Runs of one agent, in a folder."""

    def __init__(self, folder: Path, agent: str, env_id: str, rng: random.Random) -> None:
        self._root, self._interval, self._rng = folder, INTERVAL[agent], rng
        self._agent = agent
        self._arguments = [
            agent, "--env", env_id, "--seed", "3", "--device", "cpu", "--compile", "off",
            "--checkpoint-interval", str(self._interval), *TRAINING[agent], *SMALL,
        ]  # fmt: skip

    def run(self, kills: int) -> dict[str, int]:
        """Kill so many times; returns what was counted."""
        warmup = self._root / "warmup"
        warmup.mkdir()
        _quietly(
            warmup, [*self._arguments, "--total-timesteps", "1", "--run-dir", str(warmup)]
        )  # imports what is needed, once
        reference = self._root / "reference"
        process = self._start(reference)
        begun = time.monotonic()
        _wait_until(lambda: (_folder(reference) / "final.zip").exists(), process)
        interval = (time.monotonic() - begun) * self._interval / int(progress_rows(_folder(reference))[-1][STEPS])
        _wait(process)
        count = dict.fromkeys(("kills", "in the middle of a write", "runs", *WRONG), 0)
        while count["kills"] < kills:
            root = self._root / f"run_{count['runs']}"
            process = self._start(root)
            _wait_until(lambda root=root: bool(checkpoints(_folder(root))), process)  # type: ignore[misc]
            while process.is_alive() and count["kills"] < kills:
                process.join(self._rng.uniform(0, 6 * interval))
                if process.is_alive():
                    process.kill()
                    process.join()
                    self._look(_folder(root), count)
                    process = self._start(root, "--resume", str(_folder(root)))
            _wait(process)
            count["runs"] += 1
            if found := differences(_folder(reference), _folder(root)):
                count["runs that differ"] += 1
                print(f"run {count['runs']} of {self._agent} differs: {', '.join(found)}", file=sys.stderr)
            shutil.rmtree(root)
        return count

    def _start(self, root: Path, *resume: str) -> Any:
        """Train in a copy of this process, where nothing needs to be imported anew; returns when training begins.

        One in five does not wait: it is killed, perhaps, while it reads its checkpoint.
        """
        root.mkdir(exist_ok=True)
        mark, arguments = root / "training", resume or (*self._arguments, "--run-dir", str(root))
        mark.unlink(missing_ok=True)
        process = multiprocessing.get_context("fork").Process(target=_train, args=(mark, arguments))
        process.start()
        if not resume or self._rng.random() < 0.8:
            _wait_until(mark.exists, process)
        return process

    def _look(self, folder: Path, count: dict[str, int]) -> None:
        """Count a kill and what it did."""
        count["kills"] += 1
        count["in the middle of a write"] += any(folder.rglob("*.part"))
        for file in (*checkpoints(folder), folder / "best.zip"):
            with contextlib.suppress(FileNotFoundError), file.open("rb") as stream:
                try:
                    for name in ("agent", "run") if file.parent.name == "checkpoints" else ("agent",):
                        checkpoint.read(stream, name, str(file))
                except CheckpointError:
                    count["corrupt files"] += 1
        done, kept = progress_rows(folder)[-1][STEPS], checkpoints(folder)[0].stem.removeprefix("step_")
        count[WRONG[1]] += int(done) - int(kept) > self._interval


def _train(mark: Path, arguments: Sequence[str]) -> None:
    """Run train.py, and make the file `mark` when training begins."""

    class Marking(Progress):
        def _on_training_start(self) -> None:
            super()._on_training_start()
            mark.touch()

    vars(training)["Progress"] = Marking
    sys.exit(_quietly(mark.parent, arguments))


def _quietly(folder: Path, arguments: Sequence[str]) -> int:
    with (folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        return train.main(arguments)


def _wait(process: Any) -> None:
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"training ended with exit code {process.exitcode}, expected 0")


def _wait_until(condition: Callable[[], bool], process: Any) -> None:
    while process.is_alive() and not condition():
        time.sleep(0.001)


def _folder(root: Path) -> Path:
    """The one run in a folder."""
    return next(root.glob("*/*/*/config.json"), root / "none" / "config.json").parent


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
