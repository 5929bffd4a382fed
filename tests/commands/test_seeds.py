"""Groups of runs, with real processes: the runs are those of single commands, whatever happens in between."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from driftrl.commands import train
from driftrl.runs.folder import checkpoints, is_complete, load_agent
from driftrl.runs.group import members
from driftrl.runs.lock import alone

SMALL = ["--n-envs", "1", "--n-steps", "16", "--batch-size", "16", "--n-epochs", "2", "--device", "cpu"]
SMALL += ["--actor-hidden", "8", "8", "--critic-hidden", "8", "8", "--total-timesteps", "96", "--compile", "off"]
SMALL += ["--checkpoint-interval", "1000"]  # at the end, and where a signal stops it
TASK = """
import os, signal, time
from pathlib import Path
import gymnasium as gym, numpy as np

class Task(gym.Env):  # what the files `slow`, `broken` and `killed` say happens in the run whose seed they hold
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,))
    steps, first = 0, None

    def reset(self, *, seed=None, options=None):
        self.first = seed if self.first is None else self.first
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        if Path("slow").exists():
            time.sleep(0.02)
        if self.steps == 40 and Path("broken").exists() and Path("broken").read_text() == str(self.first):
            raise RuntimeError("the task broke")
        if self.steps == 40 and Path("killed").exists() and Path("killed").read_text() == str(self.first):
            os.kill(os.getpid(), signal.SIGKILL)
        return np.zeros(2, np.float32), float(action[0]), False, self.steps % 5 == 0, {}

gym.register("Task-v0", Task, max_episode_steps=10)
"""


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("seeds_task.py").write_text(TASK)
    monkeypatch.syspath_prepend(tmp_path)


def command(*seeds: int, jobs: int = 2) -> list[str]:
    numbers = [str(seed) for seed in seeds]
    return ["policyflow", "--env", "seeds_task:Task-v0", *SMALL, "--seeds", *numbers, "--jobs", str(jobs)]


def only_group() -> Path:
    (file,) = Path("runs").glob("*/*/*/group.json")
    return file.parent


def same_policy(one: Path, other: Path) -> bool:
    a, b = (load_agent(each / "final.zip", "cpu").get_parameters()["policy"] for each in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def single_run(seed: int) -> Path:
    root = Path(f"single{seed}")
    assert (
        train.main(["policyflow", "--env", "seeds_task:Task-v0", *SMALL, "--seed", str(seed), "--run-dir", root.name])
        == 0
    )
    (folder,) = root.glob("*/*/*")
    return folder


def test_runs_of_a_group_are_those_of_single_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(command(3, 1)) == 0
    out, group = capsys.readouterr().out, only_group()
    assert [each.name for each in members(group)] == ["s3", "s1"]
    assert all(
        text in out for text in ("seeds 3 1", "seed 3", "complete", "IQM of 2 [95 %]", f"evaluate.py {group}"[-20:])
    )
    for seed in (3, 1):
        assert same_policy(group / f"s{seed}", single_run(seed))
        assert "trained 96 steps" in (group / f"s{seed}" / "output.log").read_text()
    report = json.loads((group / "s3" / "eval.json").read_text())
    (row,) = [line for line in out.splitlines() if line.startswith("3 ")]
    assert row.split()[1:] == ["96", f"{report['deterministic']['mean']:.1f}", f"{report['sampled']['mean']:.1f}"]

    before = (group / "s1" / "final.zip").stat().st_mtime_ns
    capsys.readouterr()
    assert train.main(["--resume", str(group)]) == 0
    assert "IQM of 2" in capsys.readouterr().out
    assert (group / "s1" / "final.zip").stat().st_mtime_ns == before
    assert train.main(["--resume", str(group), "--total-timesteps", "128", "--jobs", "2"]) == 0
    assert all(load_agent(each, "cpu").num_timesteps == 128 for each in members(group))

    (group / "s1" / "eval.json").write_text("{}")  # damaged: the run is evaluated again, the other stays as it is
    capsys.readouterr()
    assert train.main(["--resume", str(group), "--total-timesteps", "128"]) == 0
    assert "s1/eval.json is damaged" in capsys.readouterr().err
    assert json.loads((group / "s1" / "eval.json").read_text())["timesteps"] == 128

    with alone(group):
        assert train.main(["--resume", str(group)]) == 2
    assert "run in use: another process trains" in capsys.readouterr().err
    assert train.main(["--resume", str(group), "--jobs", "0"]) == 2
    assert "jobs: got 0" in capsys.readouterr().err
    assert train.main(["--resume", str(group / "s1"), "--jobs", "2"]) == 2
    assert "--jobs is for groups" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("broken", "failed (exit code 1: seeds_task:Task-v0 ended training at"),
        ("killed", "failed (killed by signal 9); see "),
    ],
)
def test_a_run_that_fails_does_not_stop_the_others(
    fault: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("driftrl.commands.seeds.available_cores", lambda: 1)
    Path(fault).write_text("1")
    assert train.main(command(0, 1, 2)) == 1
    (out, error), group = capsys.readouterr(), only_group()
    assert "jobs: 2 runs at a time share 1 core; each gets slower" in error
    assert [is_complete(each) for each in members(group)] == [True, False, True]
    assert says in out
    assert str(group / "s1" / "output.log") in out
    assert "IQM of 2" in out
    Path(fault).unlink()
    assert train.main(command(0, 1, 2)) == 0  # the same command again
    assert f"{group} has these runs and is not complete: going on with it" in capsys.readouterr().out
    assert only_group() == group
    assert all(map(is_complete, members(group)))


def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_free(folder: Path) -> bool:
    with contextlib.suppress(ValueError), alone(folder):
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_stops_all_runs_with_checkpoints_and_the_group_goes_on(number: int) -> None:
    Path("slow").touch()
    root = str(Path(train.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    call = [sys.executable, "-m", "driftrl.commands.train", *command(0, 1, 2)]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    until(lambda: sum(file.stat().st_size > 0 for file in Path("runs").glob("*/*/*/s*/progress.csv")) == 2, 60)
    begun = time.monotonic()
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    group = only_group()
    until(lambda: all(map(is_free, members(group))), 20)
    assert time.monotonic() - begun < 15
    assert "Traceback" not in error
    assert [len(checkpoints(each)) for each in members(group)] == [1, 1, 0]
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert out.count("stopped at ") == out.count(" steps, with a checkpoint") == 4
        for each in members(group)[:2]:
            assert f"stopped at {int(checkpoints(each)[0].stem.removeprefix('step_')):,} of " in out
        assert out.count("not begun") == 2
        assert f"--resume {group}" in out
    Path("slow").unlink()
    assert train.main(["--resume", str(group), "--jobs", "2"]) == 0
    assert same_policy(group / "s2", single_run(2))
    assert all(map(is_complete, members(group)))
