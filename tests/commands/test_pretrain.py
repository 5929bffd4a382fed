"""`train.py --demonstrations`: pretraining in a run, broken off and gone on with, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stable_baselines3.common.logger import Logger

from driftrl import PolicyFlow
from driftrl.agents.common.demonstrations import Demonstrations
from driftrl.agents.registry import AGENTS
from driftrl.commands import demonstrate, evaluate, train
from driftrl.commands.progress import RunState
from driftrl.runs import pretraining as module
from driftrl.runs.folder import load_agent
from driftrl.runs.log import write_row

h5py = pytest.importorskip("h5py")

SMALL = [
    "--n-envs", "2", "--n-steps", "16", "--batch-size", "16", "--actor-hidden", "16", "--critic-hidden", "8",
    "--critic-warmup", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data") / "avoid-v0"
    assert demonstrate.main([str(folder), "--episodes", "24"]) == 0
    return str(folder)


def command(data: str, folder: Path, *more: str) -> list[str]:
    what = ["--env", "driftrl/Avoid-v0", "--demonstrations", data, "--seed", "0", "--run-dir", str(folder)]
    return ["policyflow", *what, *SMALL, *more]


def run_in(folder: Path) -> Path:
    return next(path.parent for path in folder.rglob("config.json"))


def test_a_run_is_pretrained_evaluated_and_goes_on(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(command(data, tmp_path, "--pretrain-steps", "600", "--total-timesteps", "0")) == 0
    out = capsys.readouterr().out
    assert "24 episodes" in out and "pretrained by 600 updates" in out and "before reinforcement learning" in out
    run = run_in(tmp_path)
    assert not (run / "pretrain.zip").exists()
    report = json.loads((run / "pretrained.json").read_text())
    assert report["timesteps"] == 0 and {"deterministic", "sampled"} <= report.keys()
    with (run / "pretrain" / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["time/total_timesteps"]) for row in rows] == [250, 500, 600]
    assert float(rows[-1]["pretrain/validation_loss"]) < float(rows[0]["pretrain/validation_loss"])
    assert any(path.name.startswith("events") for path in (run / "pretrain").iterdir())
    assert evaluate.main([str(run), "--episodes", "2"]) == 0
    before = load_agent(run).policy.state_dict()
    assert train.main(["--resume", str(run), "--total-timesteps", "64"]) == 0
    assert "pretrained by" not in capsys.readouterr().out
    after = load_agent(run)
    assert after.num_timesteps == 64
    assert torch.equal(before["obs_norm.mean"], after.policy.state_dict()["obs_norm.mean"])


def test_a_signal_breaks_pretraining_off_and_resume_ends_where_the_whole_would(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--pretrain-steps", "750", "--total-timesteps", "32"]
    assert train.main(command(data, tmp_path / "whole", *options)) == 0

    def interrupted(logger: Logger, metrics: dict[str, float], step: int) -> None:
        write_row(logger, metrics, step)
        if step == 500:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(module, "write_row", interrupted)
    assert train.main(command(data, tmp_path / "half", *options)) == 130
    run = run_in(tmp_path / "half")
    assert (run / "pretrain.zip").exists() and not (run / "pretrained.zip").exists()
    monkeypatch.setattr(module, "write_row", write_row)
    capsys.readouterr()
    assert train.main(["--resume", str(run)]) == 0
    out = capsys.readouterr().out
    assert "pretrained by 750 updates" in out and "all restored" in out
    for file in ("pretrained.zip", "final.zip"):
        whole, half = (load_agent(run_in(tmp_path / name) / file).policy.state_dict() for name in ("whole", "half"))
        for (name, one), other in zip(whole.items(), half.values(), strict=True):
            assert torch.equal(one, other), (file, name)


def test_rows_after_the_last_saved_state_are_dropped_when_a_killed_run_goes_on(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(logger: Logger, metrics: dict[str, float], step: int) -> None:
        write_row(logger, metrics, step)
        if step == 500:  # logged, and not saved
            raise KeyboardInterrupt(signal.SIGTERM)

    monkeypatch.setattr(module, "write_row", killed)
    monkeypatch.setattr(module, "_SAVE_EVERY", -1.0)
    train.main(command(data, tmp_path, "--pretrain-steps", "750", "--total-timesteps", "0"))
    monkeypatch.setattr(module, "write_row", write_row)
    run = run_in(tmp_path)
    assert train.main(["--resume", str(run)]) == 0
    with (run / "pretrain" / "progress.csv").open() as file:
        assert [int(row["time/total_timesteps"]) for row in csv.DictReader(file)] == [250, 500, 750]


def test_a_run_killed_before_its_pretrained_agent_was_evaluated_loses_nothing(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--pretrain-steps", "300", "--bc-coef", "0.1", "--total-timesteps", "32", "--checkpoint-interval", "32"]
    assert train.main(command(data, tmp_path / "whole", *options)) == 0

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate_modes", killed)
        assert train.main(command(data, tmp_path / "half", *options)) == 143
    whole, half = (run_in(tmp_path / name) for name in ("whole", "half"))
    assert (half / "pretrained.zip").exists() and not (half / "pretrained.json").exists()
    capsys.readouterr()
    assert train.main(["--resume", str(half)]) == 0
    out = capsys.readouterr().out
    assert "before reinforcement learning" in out and "pretrained by" not in out
    assert "all restored" in out and "not restored" not in out
    assert (half / "pretrained.json").read_text() == (whole / "pretrained.json").read_text()
    ends = [load_agent(run / "final.zip").policy.state_dict() for run in (whole, half)]
    assert all(torch.equal(one, other) for one, other in zip(*(end.values() for end in ends), strict=True))
    (half / "pretrained.json").unlink()
    (half / "pretrained.zip").write_bytes(b"")
    assert train.main(["--resume", str(half), "--total-timesteps", "64"]) == 0
    assert "warning: the pretrained agent is not evaluated: " in capsys.readouterr().err


def test_a_run_goes_on_with_the_data_that_it_began_with(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, other = (shutil.copytree(data, tmp_path / name / "avoid-v0") for name in ("begun", "elsewhere"))
    monkeypatch.chdir(mine.parent)
    assert train.main(command("avoid-v0", tmp_path, "--bc-coef", "0.1", "--total-timesteps", "32")) == 0
    run = run_in(tmp_path / "driftrl_Avoid-v0")
    config = json.loads((run / "config.json").read_text())
    assert config["demonstrations"] == str(mine.resolve() / "data" / "main_data.hdf5")
    monkeypatch.chdir(other.parent)
    with h5py.File(other / "data" / "main_data.hdf5", "a") as file:
        file["episode_3/actions"][5, 0] *= 0.5
    assert train.main(["--resume", str(run), "--total-timesteps", "64"]) == 0  # not with the data set that lies here
    shutil.copytree(other, mine, dirs_exist_ok=True)
    capsys.readouterr()
    assert train.main(["--resume", str(run), "--total-timesteps", "96"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: demonstrations: got {mine.resolve()}") and "expected" in message
    assert config["demonstrations_digest"][:12] in message
    config.pop("demonstrations_digest")  # as of a run of an earlier version
    (run / "config.json").write_text(json.dumps(config))
    assert train.main(["--resume", str(run), "--total-timesteps", "96"]) == 0
    assert json.loads((run / "config.json").read_text())["demonstrations_digest"]
    again = ["policyflow", "--config", str(run), "--total-timesteps", "32", "--run-dir", str(tmp_path / "again")]
    assert train.main(again) == 0


def test_updates_imitate_the_episodes_that_return_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, given = str(tmp_path / "half-v0"), list[int]()
    assert demonstrate.main([data, "--episodes", "24", "--success", "0.5"]) == 0
    use = PolicyFlow.use_demonstrations

    def noted(self: PolicyFlow, data: Demonstrations) -> None:
        given.append(len(data.lengths))
        use(self, data)

    monkeypatch.setattr(PolicyFlow, "use_demonstrations", noted)
    options = ["--bc-coef", "0.1", "--total-timesteps", "32", "--demonstration-return", "1"]
    assert train.main(command(data, tmp_path / "beside", *options)) == 0
    assert train.main(command(data, tmp_path / "before", *options, "--pretrain-steps", "2")) == 0
    assert train.main(["--resume", str(run_in(tmp_path / "before")), "--total-timesteps", "64"]) == 0
    assert given == [12, 12, 12]
    capsys.readouterr()
    assert train.main(command(data, tmp_path, "--pretrain-steps", "2", "--demonstration-return", "1")) == 2
    assert "demonstration_return: got 1.0, which changes nothing without bc_coef above 0" in capsys.readouterr().err
    assert train.main(["policyflow", *SMALL, "--demonstration-return", "0"]) == 2
    assert "changes nothing without demonstrations" in capsys.readouterr().err


def test_a_data_set_that_was_moved_is_named_anew(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = shutil.copytree(data, tmp_path / "avoid-v0")
    assert train.main(command(str(mine), tmp_path, "--bc-coef", "0.1", "--total-timesteps", "32")) == 0
    run, moved = run_in(tmp_path / "driftrl_Avoid-v0"), mine.rename(tmp_path / "elsewhere-v0")
    go_on = ["--resume", str(run), "--total-timesteps"]
    assert train.main([*go_on, "64"]) == 2
    assert train.main([*go_on, "64", "--demonstrations", str(moved)]) == 0
    assert train.main([*go_on, "96"]) == 0  # it is known from now on
    with h5py.File(moved / "data" / "main_data.hdf5", "a") as file:
        file["episode_3/actions"][5, 0] *= 0.5
    capsys.readouterr()
    assert train.main([*go_on, "128", "--demonstrations", str(moved)]) == 2
    assert "with which" in capsys.readouterr().err


def test_the_preset_of_runs_that_are_pretrained_serves_demonstrations(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--pretrain-steps", "1", "--total-timesteps", "0"]
    assert train.main(command(data, tmp_path / "avoid", *options)) == 0
    assert "preset demonstrations, driftrl/Avoid-v0" in capsys.readouterr().out
    assert train.main([*command(data, tmp_path / "chosen", *options), "--preset", "standard"]) == 0
    assert "preset standard, driftrl/Avoid-v0" in capsys.readouterr().out
    entry = AGENTS["policyflow"]
    for steps, name in ((None, "standard"), (0, "standard"), ("0", "standard"), (10, "demonstrations")):
        assert entry.default_preset(steps) == name
    assert AGENTS["mbpo"].default_preset(10) == "standard"
    for env_id in ("driftrl/PointMazeMedium-v0", "my_tasks:Push-v0"):
        _, config = entry.settings(env_id, "demonstrations")
        assert (config.base, config.base_std, config.solver_steps, config.action_std) == ("standard", 1.0, 5, 0.05)


def test_runs_of_a_group_learn_from_the_same_demonstrations(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = shutil.copytree(data, tmp_path / "avoid-v0")
    assert train.main(command(str(mine), tmp_path, "--bc-coef", "0.1", "--total-timesteps", "32")) == 0
    run = run_in(tmp_path / "driftrl_Avoid-v0")
    group = run.parent / "group"
    shutil.copytree(run, group / "s0")
    (group / "group.json").write_text('{"runs": ["s0", "s1", "s2"]}')
    with h5py.File(mine / "data" / "main_data.hdf5", "a") as file:
        file["episode_3/actions"][5, 0] *= 0.5
    shutil.copytree(run, group / "s1")
    config = json.loads((group / "s1" / "config.json").read_text())
    config.pop("demonstrations_digest")  # it has not begun
    (group / "s1" / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert train.main(["--resume", str(group / "s1"), "--total-timesteps", "64"]) == 2
    assert f"with which {group / 's0'} was begun" in capsys.readouterr().err


def test_pretraining_goes_on_with_the_data_that_it_began_with(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    shutil.copytree(data, tmp_path / "set" / "avoid-v0")

    def interrupted(logger: Logger, metrics: dict[str, float], step: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_row", interrupted)
        assert train.main(command("set/avoid-v0", tmp_path / "runs", "--pretrain-steps", "300")) == 130
    run = run_in(tmp_path / "runs")
    assert json.loads((run / "config.json").read_text())["demonstrations"] == "set/avoid-v0"
    shutil.rmtree(tmp_path / "set")
    assert demonstrate.main([str(tmp_path / "set" / "avoid-v0"), "--episodes", "24", "--seed", "1"]) == 0
    assert train.main(["--resume", str(run)]) == 2
    assert "demonstrations: got set/avoid-v0 with digest" in capsys.readouterr().err


def test_runs_of_a_group_may_only_pretrain(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--pretrain-steps", "5", "--total-timesteps", "0", "--seeds", "0", "1"]
    arguments = command(data, tmp_path, *options)
    at = arguments.index("--seed")
    assert train.main(arguments[:at] + arguments[at + 2 :]) == 0
    assert len(list(tmp_path.rglob("pretrained.json"))) == 2
    state = RunState("seed 0", 0)
    assert state.share == 0
    state.end("complete")
    assert state.share == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bc-coef", "0.1"], "bc_coef: got 0.1 without demonstrations; name them, --demonstrations DATA"),
        (["--pretrain-steps", "5"], "pretrain_steps: got 5, which changes nothing without demonstrations"),
        (
            ["--demonstrations", "DATA"],
            "demonstrations: got them, which change nothing without pretrain_steps or bc_coef above 0",
        ),
        (["--pretrain-batch-size", "5"], "pretrain_batch_size: got 5, which changes nothing without demonstrations"),
        (
            ["--demonstrations", "DATA", "--bc-coef", "0.1", "--pretrain-learning-rate", "123"],
            "pretrain_learning_rate: got 123.0, which changes nothing without pretrain_steps above 0",
        ),
        (["--demonstrations", "nowhere", "--pretrain-steps", "5"], "no data set: got nowhere"),
        (["--total-timesteps", "0"], "total_timesteps: got 0, expected an integer of at least 1"),
        (["--demonstrations", "DATA", "--pretrain-steps", "5", "--env", "Pendulum-v1"], "expected [3]"),
    ],
)
def test_what_means_nothing_is_refused(
    options: list[str], message: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [data if each == "DATA" else each for each in options]
    env = [] if "--env" in options else ["--env", "driftrl/Avoid-v0"]
    assert train.main(["policyflow", *env, *SMALL, *options, "--run-dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("config.json"))


def test_the_model_based_agent_refuses_demonstrations(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--env", "driftrl/Avoid-v0", "--demonstrations", data, "--pretrain-steps", "5"]
    assert train.main(["mbpo", *options, "--run-dir", str(tmp_path)]) == 2
    assert "demonstrations: got them for mbpo, which cannot learn from them" in capsys.readouterr().err


def test_without_h5py_no_run_is_made(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert train.main(command(data, tmp_path, "--pretrain-steps", "5")) == 2
    message = "error: demonstrations: h5py is not installed; run pip install 'driftrl[data]'\n"
    assert capsys.readouterr().err == message
    assert list(tmp_path.iterdir()) == []
