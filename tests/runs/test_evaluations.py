import csv
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stable_baselines3.common.vec_env import VecEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from driftrl.analysis.evaluation import evaluation_env
from driftrl.commands import train, training
from driftrl.runs import evaluations
from driftrl.runs.folder import find_checkpoint, load_agent

SMALL = {
    "policyflow": "--n-envs 2 --n-steps 16 --batch-size 16 --n-epochs 1 --actor-hidden 8 8 --critic-hidden 8 8",
    "mbpo": "--n-envs 1 --learning-starts 20 --model-epochs 1 --model-hidden 8 --model-rollouts 2 --compile off",
}
STEPS = {"policyflow": 224, "mbpo": 60}
EVALUATED = {"policyflow": [64, 128, 192, 224], "mbpo": [20, 40, 60]}
EVALUATION = {"policyflow": ("--eval-interval", "64"), "mbpo": ("--eval-interval", "20")}


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "_FINAL_EPISODES", 1)


def start(name: str, root: str, *options: str) -> int:
    fixed = ["--env", "InvertedPendulum-v5", "--seed", "1", "--device", "cpu", "--total-timesteps", str(STEPS[name])]
    return train.main([name, *fixed, *SMALL[name].split(), "--run-dir", root, *options])


def folder(root: str) -> Path:
    (found,) = Path(root).glob("*/*/*")
    return found


def log(root: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The rows of training, without times, and those of evaluations."""
    with (folder(root) / "progress.csv").open() as file:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    evaluated = [row for row in rows if "eval/mean_return" in row]
    timeless = {"time/fps", "time/time_elapsed", "time/cpu_time", "time/seconds"}
    others = [{key: row[key] for key in row.keys() - timeless} for row in rows if row not in evaluated]
    return [{k: v for k, v in row.items() if "time" not in k or "total" in k} for row in others], evaluated


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


@pytest.mark.parametrize("name", ["policyflow", "mbpo"])
def test_evaluation_does_not_move_training(name: str) -> None:
    assert start(name, "without") == 0
    assert start(name, "with", *EVALUATION[name], "--eval-episodes", "2") == 0
    agents = [load_agent(folder(root) / "final.zip", "cpu").get_parameters() for root in ("without", "with")]
    assert same(agents[0]["policy"], agents[1]["policy"])
    (trained, none), (still_trained, rows) = log("without"), log("with")
    assert trained == still_trained
    assert not none
    assert [int(row["time/total_timesteps"]) for row in rows] == EVALUATED[name]
    assert all(row.keys() >= {"eval/mean_return", "eval/std_return", "eval/mean_length"} for row in rows)
    scalars = EventAccumulator(str(folder("with"))).Reload().Scalars("eval/mean_return")
    assert [each.step for each in scalars] == EVALUATED[name]
    best = json.loads((folder("with") / "best.json").read_text())
    returns = [float(row["eval/mean_return"]) for row in rows]
    assert best["mean_return"] == pytest.approx(max(returns))
    assert best["timesteps"] == EVALUATED[name][returns.index(max(returns))]
    assert load_agent(folder("with") / "best.zip", "cpu").num_timesteps == best["timesteps"]


@pytest.mark.parametrize("calls", [1, 2])
def test_evaluations_go_on_after_an_interruption(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [*EVALUATION["policyflow"], "--eval-episodes", "3"]
    assert start("policyflow", "whole", *options) == 0
    made, original = 0, evaluation_env

    def with_signal(*args: Any, **kwargs: Any) -> VecEnv:
        nonlocal made
        made += 1
        if made == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(evaluations, "evaluation_env", with_signal)
    assert start("policyflow", "broken", *options) == 128 + signal.SIGTERM
    broken = folder("broken")
    assert find_checkpoint(broken).stem == f"step_{64 * calls}"
    assert len(log("broken")[1]) == calls - 1
    assert train.main(["--resume", str(broken)]) == 0
    assert log("broken") == log("whole")
    assert (broken / "best.json").read_text() == (folder("whole") / "best.json").read_text()


def test_episodes_without_an_interval_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert start("policyflow", "none", "--eval-episodes", "2") == 2
    assert "eval_episodes: got 2, which changes nothing without eval_interval" in capsys.readouterr().err
    assert start("policyflow", "none", "--eval-interval", "0") == 2
    assert "eval_interval: got 0, expected an integer of at least 1, or None" in capsys.readouterr().err
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("steps", "evaluated_at", "due"),
    [
        (63, 0, False),
        (64, 0, True),
        (70, 64, False),
        (127, 70, False),
        (128, 70, True),
        (134, 128, False),
        (200, 70, True),
    ],
)
def test_evaluations_are_due_at_multiples_of_the_interval(steps: int, evaluated_at: int, due: bool) -> None:
    """One that came late, at the end of an iteration, does not put off all that follow."""
    settings: Any = SimpleNamespace(eval_interval=64)
    stop: Any = None
    assert evaluations.Evaluations(settings, stop).are_due(steps, evaluated_at) == due
