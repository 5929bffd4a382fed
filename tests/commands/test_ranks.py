"""What torchrun does with train.py: two processes that train one agent."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))

from run_differences import differences, progress_rows
from several_ranks import Said, train_on_ranks

from driftrl.commands import sweep, train, training
from driftrl.envs.mujoco_batch import MujocoVecEnv
from driftrl.runs.callbacks import Checkpoints, Follows
from driftrl.runs.evaluations import Evaluations
from driftrl.runs.folder import checkpoints, load_agent

SMALL = [
    "--n-envs", "2", "--n-steps", "16", "--batch-size", "16", "--n-epochs", "1", "--actor-hidden", "8",
    "--critic-hidden", "8", "--compile", "off", "--device", "cpu", "--seed", "3", "--checkpoint-interval", "64",
]  # fmt: skip
PENDULUM = ["policyflow", "--env", "InvertedPendulum-v5", *SMALL]


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "_FINAL_EPISODES", 1)


def run_in(root: str) -> Path:
    (run,) = (path.parent for path in Path(root).rglob("config.json"))
    return run


def started(root: str, steps: int, *options: str, size: int = 2) -> list[Said]:
    return train_on_ranks(size, [*PENDULUM, "--run-dir", root, "--total-timesteps", str(steps), *options])


def interrupted(run: Path, copy: Path) -> Path:
    """A copy of a complete run as it was when it had its first checkpoint but two."""
    shutil.copytree(run, copy)
    for file in checkpoints(copy)[:2]:
        file.unlink()
    for name in ("final.zip", "eval.json"):
        (copy / name).unlink()
    return copy


def test_rank_0_prints_logs_and_saves_and_a_resumed_run_is_the_uninterrupted_one() -> None:
    options = ("--exploration-noise", "ou", "--ema-decay", "0.9", "--normalize-reward", "--eval-interval", "128")
    first, second = started("runs", 448, *options)
    assert (first.code, second) == (0, Said(0, ""))
    assert "2 environments on each of 2 ranks" in first.out and "trained 448 steps" in first.out
    whole = run_in("runs")
    assert [row["time/total_timesteps"] for row in progress_rows(whole) if row["time/fps"]] == [
        str(steps) for steps in range(64, 449, 64)
    ]
    resumed = interrupted(whole, Path("resumed"))
    first, second = train_on_ranks(2, ["--resume", str(resumed)])
    assert (first.code, second.code) == (0, 0)
    assert "all restored: as if it had not been interrupted" in first.out
    assert differences(whole, resumed) == []


@pytest.mark.parametrize("size", [1, 4])
def test_a_run_goes_on_with_another_number_of_ranks(size: int) -> None:
    started("runs", 128)
    before = load_agent(run_in("runs"), "cpu")
    after = ["--resume", str(run_in("runs")), "--total-timesteps", "384"]
    said = train_on_ranks(size, after)
    assert [each.code for each in said] == [0] * size
    missing = "not restored: environments and random numbers, which were those of 2 processes: they begin anew\n"
    assert missing in said[0].out and "resumed from" in said[0].out
    agent: Any = load_agent(run_in("runs"), "cpu")
    assert agent.num_timesteps == 384
    rollout = 16 * 2 * size
    seen = 128 + -(-256 // rollout) * rollout
    assert int(agent.policy.obs_norm.count) == seen
    step = next(iter(agent.policy.optimizer.state.values()))["step"]
    assert step == next(iter(before.policy.optimizer.state.values()))["step"] + 2 * (256 // rollout)


def on_rank_1(at: int, action: Callable[[], Any]) -> Callable[[int], None]:
    """Does something in the environments' step of that number on rank 1, which may change the observations."""

    def change(rank: int) -> None:
        original, count = MujocoVecEnv.step_wait, [0]

        def step_wait(self: MujocoVecEnv) -> Any:
            obs, *others = cast(Any, original(self))
            count[0] += 1
            if rank == 1 and count[0] == at and action() == "nan":
                obs[:] = np.nan
            return obs, *others

        MujocoVecEnv.step_wait = step_wait  # type: ignore[method-assign]

    return change


def fail() -> None:
    raise KeyError("the user's")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_stops_all_and_saves(number: signal.Signals) -> None:
    arguments = [*PENDULUM, "--total-timesteps", "100000", "--checkpoint-interval", "100000"]
    said = train_on_ranks(2, arguments, on_rank_1(40, lambda: os.kill(os.getpid(), number)))
    assert [each.code for each in said] == [128 + number] * 2
    assert said[0].out.count("stopped at 192 of 100,000 steps; last saved in ") == 1 and said[1].out == ""
    assert [path.stem for path in checkpoints(run_in("runs"))] == ["step_192"]
    (_, other) = train_on_ranks(2, ["--resume", str(run_in("runs")), "--total-timesteps", "256"])
    assert other.code == 0


def test_a_signal_while_rank_0_evaluates_stops_all_where_nothing_is_lost() -> None:
    options = ("--checkpoint-interval", "100000", "--eval-interval", "192", "--eval-episodes", "3")

    def signalled(rank: int) -> None:
        if rank == 0:
            play = Evaluations._play

            def interrupted(self: Evaluations, agent: Any) -> Any:
                os.kill(os.getpid(), signal.SIGTERM)
                return play(self, agent)

            Evaluations._play = interrupted  # type: ignore[method-assign]

    said = train_on_ranks(2, [*PENDULUM, "--total-timesteps", "100000", *options], signalled)
    assert [each.code for each in said] == [143, 143] and said[1].out == ""
    assert "stopped at 192 of 100,000 steps; last saved in " in said[0].out
    resumed = run_in("runs")
    first, second = train_on_ranks(2, ["--resume", str(resumed), "--total-timesteps", "256"])
    assert (first.code, second.code) == (0, 0) and "all restored" in first.out
    started("whole", 256, *options)
    assert differences(run_in("whole"), resumed) == []


def test_a_signal_that_comes_while_ranks_agree_stops_them_the_next_time() -> None:
    def late(rank: int) -> None:
        kind = Follows if rank else Checkpoints
        original, count = kind._on_rollout_start, [0]

        def start(self: Any) -> None:
            count[0] += 1
            if count[0] == 3 and rank:
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
            elif count[0] == 3:
                time.sleep(1.0)  # rank 1 has said that nothing stops it, and waits
            original(self)

        kind._on_rollout_start = start  # type: ignore[method-assign]

    arguments = [*PENDULUM, "--total-timesteps", "100000", "--checkpoint-interval", "100000"]
    said = train_on_ranks(2, arguments, late)
    assert [each.code for each in said] == [143, 143] and said[1].out == ""
    assert [path.stem for path in checkpoints(run_in("runs"))] == ["step_192"]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: "nan", "ValueError: non-finite observation: got nan in entry 0 of environment 0"),
        (fail, 'KeyError: "the user\'s"'),
    ],
)
def test_an_error_on_one_rank_ends_all_and_what_was_learned_is_kept(action: Callable[[], Any], message: str) -> None:
    begin = time.monotonic()
    arguments = [*PENDULUM, "--total-timesteps", "100000", "--checkpoint-interval", "100000"]
    first, second = train_on_ranks(2, arguments, on_rank_1(40, action))
    assert time.monotonic() - begin < 30  # on a busy machine
    assert first.code == 2 and f"error: rank 1 ended: {message}" in first.out
    assert f"kept {run_in('runs')}" in first.out and "Traceback" not in first.out
    assert ("Traceback" in second.out) == (second.code is None) == (action is fail)
    assert "error:" not in second.out.replace("KeyError:", "")
    (saved,) = checkpoints(run_in("runs"))
    assert load_agent(saved, "cpu").num_timesteps == 192
    assert train_on_ranks(2, ["--resume", str(run_in("runs")), "--total-timesteps", "256"])[0].code == 0


def test_a_killed_rank_is_noticed_and_the_run_goes_on_from_its_checkpoint() -> None:
    begin = time.monotonic()
    said: list[Any] = train_on_ranks(2, [*PENDULUM, "--total-timesteps", "100000"], on_rank_1(60, lambda: os._exit(9)))
    first, second = said
    assert time.monotonic() - begin < 30
    assert second is None and first.code == 2
    assert "error: another rank was lost, or does not answer" in first.out
    assert [path.stem for path in checkpoints(run_in("runs"))] == ["step_192", "step_128", "step_64"]
    assert train_on_ranks(2, ["--resume", str(run_in("runs")), "--total-timesteps", "256"])[0].code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mbpo", "--env", "InvertedPendulum-v5"], "ranks: got 2 for mbpo, which trains in one process"),
        ([*PENDULUM[:3], "--seeds", "1", "2"], "ranks: got 2 for a group of runs, which trains in one process"),
        ([*PENDULUM, "--gamma", "2"], "gamma: got 2"),
        (["--resume", "missing"], "no such run: got missing"),
        (
            ["policyflow", "--env", "driftrl/Avoid-v0", "--demonstrations", "avoid-v0", "--pretrain-steps", "10"],
            "ranks: got 2 for pretraining on demonstrations, which trains in one process",
        ),
    ],
)
def test_what_ranks_cannot_do_is_refused_in_one_line(arguments: list[str], message: str) -> None:
    if "avoid-v0" in arguments:
        pytest.importorskip("h5py")
        from driftrl.commands import demonstrate

        assert demonstrate.main(["avoid-v0", "--episodes", "2"]) == 0
    first, second = train_on_ranks(2, arguments)
    assert (first.code, second) == (2, Said(2, ""))
    assert first.out.startswith(f"error: {message}") and first.out.count("\n") == 1
    assert not Path("runs").exists()


def test_a_refusal_on_one_rank_alone_is_said(tmp_path: Path) -> None:
    def elsewhere(rank: int) -> None:
        folder = tmp_path / str(rank)
        folder.mkdir()
        os.chdir(folder)

    started("0/runs", 64)
    run = run_in("0/runs")
    shutil.move("0", "kept")

    def moved(rank: int) -> None:
        elsewhere(rank)
        if rank == 0:
            shutil.move(tmp_path / "kept" / "runs", tmp_path / "0" / "runs")

    first, second = train_on_ranks(2, ["--resume", str(run.relative_to("0")), "--total-timesteps", "128"], moved)
    assert (first.code, second) == (2, Said(2, ""))
    assert first.out.startswith("error: rank 1 ended: ValueError: no such run: got runs")


def test_sweeps_are_refused_under_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sweep.main(["spec.yaml"]) == 2
    assert capsys.readouterr().err == (
        "error: ranks: got 2 for a sweep, whose runs are one process each; start it without torchrun\n"
    )


def test_torchrun_with_one_process_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert train.main([*PENDULUM, "--total-timesteps", "32"]) == 0
