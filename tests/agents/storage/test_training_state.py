import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
import pytest
import torch

from driftrl import PolicyFlow
from driftrl.agents.storage import files as durable
from driftrl.agents.storage import format as checkpoint
from driftrl.agents.storage import saving as resume
from driftrl.commands import train, training
from driftrl.envs import make_vec
from driftrl.runs import log as run_log
from driftrl.runs.folder import checkpoints, load_agent
from driftrl.runs.signals import StopOnSignal

ROOT = Path(__file__).parents[3]
TINY = ["--actor-hidden", "8", "--critic-hidden", "8", "--batch-size", "16", "--device", "cpu", "--seed", "3"]
FLOW = ["policyflow", "--n-envs", "2", "--n-steps", "16", "--n-epochs", "1", *TINY]
MODEL = ["mbpo", "--learning-starts", "30", "--gradient-steps", "1", "--model-interval", "20", *TINY]
MODEL += ["--model-rollouts", "10", "--model-epochs", "2", "--model-hidden", "8", "--diagnostics-interval", "25"]
PENDULUM = ["--env", "InvertedPendulum-v5"]


@pytest.fixture(scope="module")
def comparison() -> ModuleType:
    path = Path(__file__).parents[2] / "oracles" / "run_differences.py"
    spec = importlib.util.spec_from_file_location("run_differences", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def few_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_FINAL_EPISODES", 2)


def run(root: Path, *arguments: str) -> Path:
    """A complete run, with all its checkpoints."""
    assert train.main([*arguments, "--keep-checkpoints", "1000", "--run-dir", str(root)]) == 0
    return next(root.glob("*/*/*"))


def interrupted(folder: Path, copy: Path) -> Path:
    """A copy of a complete run as it was when it had one checkpoint, and had gone on a bit since then."""
    shutil.copytree(folder, copy)
    for file in checkpoints(copy)[:-1]:
        file.unlink()
    for name in ("final.zip", "eval.json"):
        (copy / name).unlink()
    with (copy / "progress.csv").open("a") as progress:
        progress.write("1,2")  # half a row
    return copy


@pytest.mark.parametrize(
    ("arguments", "steps", "interval"),
    [
        ([*FLOW, *PENDULUM], 384, 64),
        ([*FLOW, "--env", "Hopper-v5", "--exploration-noise", "ou", "--ema-decay", "0.9"], 256, 64),
        ([*FLOW, *PENDULUM, "--exploration-noise", "fractional", "--lr-schedule", "linear"], 192, 64),
        pytest.param([*FLOW, "--env", "Ant-v5"], 192, 64, marks=pytest.mark.slow),
        ([*FLOW, "--env", "driftrl/MultiGoal-v0"], 192, 64),
        ([*MODEL, *PENDULUM, "--n-envs", "1", "--members", "3", "--elites", "2"], 90, 25),
        ([*MODEL, "--env", "Hopper-v5", "--n-envs", "2", "--termination", "learned"], 90, 25),
    ],
)
def test_resumed_is_uninterrupted(
    arguments: list[str], steps: int, interval: int, tmp_path: Path, comparison: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = ["--total-timesteps", str(steps), "--checkpoint-interval", str(interval)]
    whole = run(tmp_path / "whole", *arguments, *options)
    resumed = interrupted(whole, tmp_path / "resumed")
    assert comparison.differences(whole, resumed)
    capsys.readouterr()
    assert train.main(["--resume", str(resumed)]) == 0
    assert "all restored: as if it had not been interrupted" in capsys.readouterr().out
    assert comparison.differences(whole, resumed) == []


def test_more_steps_are_those_of_a_longer_run(tmp_path: Path, comparison: ModuleType) -> None:
    whole = run(tmp_path / "whole", *FLOW, *PENDULUM, "--total-timesteps", "256")
    short = run(tmp_path / "short", *FLOW, *PENDULUM, "--total-timesteps", "128")
    assert train.main(["--resume", str(short), "--total-timesteps", "256"]) == 0
    assert not [
        each for each in comparison.differences(whole, short) if not each.startswith("best")
    ]  # looked for oftener


def test_all_random_generators_are_put_back() -> None:
    agent = PolicyFlow("MlpPolicy", make_vec("InvertedPendulum-v5", 1, 0), n_steps=16, batch_size=16, seed=0).learn(16)

    def draw() -> list[Any]:
        numbers = torch.rand(()).item(), torch.rand((), generator=agent._generator).item()
        return [random.random(), np.random.rand(), *numbers, agent.action_space.sample().item()]

    state = resume.capture(agent)
    first = draw()
    assert draw() != first
    assert resume.restore(agent, state) == []
    assert draw() == first


@pytest.mark.parametrize("lost", [["eval.json"], ["final.zip", "eval.json"]])
def test_a_run_that_broke_off_at_its_end_is_completed(lost: list[str], tmp_path: Path, comparison: ModuleType) -> None:
    whole = run(tmp_path / "whole", *FLOW, *PENDULUM, "--total-timesteps", "64")
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    for name in lost:
        (broken / name).unlink()
    assert train.main(["--resume", str(broken)]) == 0
    assert comparison.differences(whole, broken) == []


def test_what_is_not_restored_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path, *FLOW, "--env", "Pendulum-v1", "--total-timesteps", "64", "--checkpoint-interval", "32")
    resume = ["--resume", str(folder), "--total-timesteps"]
    assert train.main([*resume, "96"]) == 0
    out = capsys.readouterr().out
    assert "not restored: the environments, which cannot tell their state: they start new episodes\n" in out
    shutil.rmtree(folder / "checkpoints")
    assert train.main([*resume, "128"]) == 0
    assert "not restored: all but the agent: the file is no checkpoint\n" in capsys.readouterr().out
    assert load_agent(folder, "cpu").num_timesteps == 128

    (folder / "final.zip").rename(folder / "best.zip")
    shutil.rmtree(folder / "checkpoints")
    assert train.main([*resume, "160"]) == 0
    assert f"resumed from {folder / 'best.zip'} at 128 steps" in capsys.readouterr().out


def test_broken_checkpoints_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path, *FLOW, *PENDULUM, "--total-timesteps", "160", "--checkpoint-interval", "32")
    (folder / "final.zip").unlink()
    newest, second, third = checkpoints(folder)[:3]
    newest.write_bytes(newest.read_bytes()[:-100])
    second.write_bytes(b"")
    (folder / "checkpoints" / "step_999.zip.part").touch()
    assert train.main(["--resume", str(folder)]) == 0
    out, error = capsys.readouterr()
    assert f"resumed from {third} at 96 steps" in out
    assert [f"warning: skipped no checkpoint: {file}" in error for file in (newest, second)] == [True, True]
    assert load_agent(newest, "cpu").num_timesteps == 160  # it was replaced
    assert not list(folder.rglob("*.part"))

    for file in folder.rglob("*.zip"):
        file.write_bytes(b"")
    assert train.main(["--resume", str(folder)]) == 2
    assert "error: no checkpoint of" in capsys.readouterr().err


def test_states_of_other_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path, *FLOW, *PENDULUM, "--total-timesteps", "64")
    file = checkpoints(folder)[0]
    with file.open("rb") as stream:
        content = {name: checkpoint.read(stream, name, "") for name in ("agent", "run")}
    content["run"]["environments"]["physics"] = content["run"]["environments"]["physics"][:1]
    with file.open("wb") as stream:
        checkpoint.write(stream, {name: checkpoint.encode(each) for name, each in content.items()})
    assert train.main(["--resume", str(folder), "--total-timesteps", "96"]) == 2
    assert "error: the checkpoint holds no state of a run of this agent" in capsys.readouterr().err


def failing(function: Callable[..., Any], calls: set[int]) -> Callable[..., Any]:
    """The function, but for the calls of these numbers, which write half and find the disk full."""
    numbers = itertools.count()

    def write(file: IO[bytes], documents: Any) -> None:
        if next(numbers) in calls:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        function(file, documents)

    return write


def test_a_full_disk_keeps_the_last_checkpoint_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint, "write", failing(checkpoint.write, {1, 2}))
    options = ["--total-timesteps", "160", "--checkpoint-interval", "32", "--keep-checkpoints", "1"]
    assert train.main([*FLOW, "--env", "Pendulum-v1", *options, "--run-dir", str(tmp_path)]) == 0
    (folder,) = tmp_path.glob("*/*/*")
    error = capsys.readouterr().err
    for steps in (64, 96):
        assert f"warning: no checkpoint at {steps} steps ([Errno 28] No space left on device)" in error
    assert [file.name for file in checkpoints(folder)] == ["step_160.zip"]
    assert not list(folder.rglob("*.part"))


def test_a_log_that_cannot_be_written_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = run_log.open_logger(tmp_path)

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(logger.output_formats[0]), "write", fail)
        logger.record("a", 1)
        logger.dump(1)
    assert "warning: the log of step 1 is lost ([Errno 28] No space left on device)" in capsys.readouterr().err
    logger.record("b", 2)
    logger.dump(2)
    logger.close()
    assert (tmp_path / "progress.csv").read_text() == "b\n2\n"


def test_a_signal_in_a_long_iteration_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    learn, begun = PolicyFlow.train, []

    def slow(self: PolicyFlow) -> None:
        learn(self)
        if self.num_timesteps == 96:
            begun.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)

    monkeypatch.setattr(StopOnSignal, "PATIENCE", 0.2)
    monkeypatch.setattr(PolicyFlow, "train", slow)
    options = ["--total-timesteps", "160", "--checkpoint-interval", "160", "--run-dir", str(tmp_path)]
    assert train.main([*FLOW, *PENDULUM, *options]) == 143
    assert time.monotonic() - begun[0] < 5
    assert "step_96.zip" in capsys.readouterr().out
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    (folder,) = tmp_path.glob("*/*/*")
    monkeypatch.setattr(PolicyFlow, "train", learn)
    assert train.main(["--resume", str(folder)]) == 0
    assert "not restored: what the last 32 steps teach: the run ended in them\n" in capsys.readouterr().out


def test_best_and_last_checkpoints_are_kept(tmp_path: Path) -> None:
    options = ["--total-timesteps", "640", "--checkpoint-interval", "64", "--keep-checkpoints", "2"]
    assert train.main([*FLOW, *PENDULUM, *options, "--run-dir", str(tmp_path)]) == 0
    (folder,) = tmp_path.glob("*/*/*")
    assert [file.name for file in checkpoints(folder)] == ["step_640.zip", "step_576.zip"]
    best = json.loads((folder / "best.json").read_text())
    assert load_agent(folder / "best.zip", "cpu").num_timesteps == best["timesteps"] < 640


def test_files_are_on_the_disk_before_they_get_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(number: int) -> None:
        order.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{number}')).name}")
        fsync(number)

    def noted_replace(self: Path, target: Path) -> Path:
        order.append(f"rename {self.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    durable.write_json(tmp_path / "a.json", {})
    assert order == ["fsync a.json.part", "rename a.json.part", f"fsync {tmp_path.name}"]


@pytest.mark.slow
def test_killed_runs_end_as_if_they_had_been_left_alone(comparison: ModuleType) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "kill_test.py"), "--kills", "10"]
    assert subprocess.run(command, check=False).returncode == 0
