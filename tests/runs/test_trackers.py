"""--track and TensorBoard's tables: what others show of a run is what the run logged, with its settings by name."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import sqlite3
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from driftrl.commands import train, training
from driftrl.runs.folder import RunSettings, is_complete
from driftrl.runs.trackers import hyperparameters

SMALL = [
    "policyflow", "--env", "InvertedPendulum-v5", "--n-envs", "1", "--n-steps", "16", "--batch-size", "16",
    "--n-epochs", "2", "--actor-hidden", "8", "4", "--compile", "off", "--device", "cpu", "--seed", "0",
]  # fmt: skip


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "_FINAL_EPISODES", 1)


def test_the_hyperparameters_say_what_a_run_was_pretrained_on() -> None:
    settings = RunSettings("policyflow", "driftrl/Avoid-v0", {}, 1, 0, 16, 16, "cpu", 1, {})
    plain = hyperparameters(settings)
    assert not [name for name in plain if "pretrain" in name or "demonstration" in name]
    shown = hyperparameters(dataclasses.replace(settings, demonstrations="avoid-v0", pretrain_steps=7))
    added = {name: value for name, value in shown.items() if name not in plain}
    assert added == {
        "demonstrations": "avoid-v0", "demonstration_keys": settings.demonstration_keys, "pretrain_steps": 7,
        "pretrain_batch_size": 512, "pretrain_learning_rate": 3e-3,
    }  # fmt: skip


def train_twice(track: str) -> Path:
    """A run of 32 steps that goes on to 64."""
    assert train.main([*SMALL, "--track", track, "--total-timesteps", "32"]) == 0
    (run,) = (path.parent for path in Path("runs").rglob("config.json") if "wandb" not in path.parts)
    assert train.main(["--resume", str(run), "--total-timesteps", "64"]) == 0
    return run


def logged(run: Path, name: str) -> list[tuple[int, float]]:
    """A column of progress.csv by steps."""
    with (run / "progress.csv").open() as file:
        return [(int(row["time/total_timesteps"]), float(row[name])) for row in csv.DictReader(file) if row[name]]


def assert_same(found: list[tuple[int, float]], rows: list[tuple[int, float]]) -> None:
    assert [step for step, _ in found] == [step for step, _ in rows] == [32, 48, 64]
    assert [value for _, value in found] == pytest.approx([value for _, value in rows])


def test_tensorboard_has_the_settings_as_hparams_and_text() -> None:
    run = train_twice("none")
    events = EventAccumulator(str(run)).Reload()
    assert events.Tags()["tensors"] == ["settings/text_summary"]
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| actor_hidden | [8, 4] |" in text
    assert "| env | InvertedPendulum-v5 |" in text
    plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"learning_rate" in plugin
    assert b"actor_hidden" in plugin
    assert not (run / "tracker.json").exists()


class FakeRun:
    """A run of a tracker whose server goes away."""

    def __init__(self, fails_at: int) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.fails_at, self.calls = fails_at, 0

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.calls += 1
        if step >= self.fails_at:
            raise ConnectionError("gone")
        self.rows.append((step, numbers))

    def finish(self) -> None:
        raise ConnectionError("still gone")


def fake(monkeypatch: pytest.MonkeyPatch, init: Any) -> None:
    module = ModuleType("trackio")
    module.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    vars(module)["init"] = init
    monkeypatch.setitem(sys.modules, "trackio", module)


def test_a_tracker_that_fails_does_not_end_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, given = FakeRun(fails_at=32), {}

    def init(**options: Any) -> FakeRun:
        given.update(options)
        return run

    fake(monkeypatch, init)
    assert train.main([*SMALL, "--track", "trackio", "--total-timesteps", "64"]) == 0
    error = capsys.readouterr().err
    assert error.count("warning: trackio failed at 32 steps (gone); training goes on without it") == 1
    assert "still gone" not in error  # a tracker that has failed is not waited for once more
    assert ([step for step, _ in run.rows], run.calls) == ([16], 2)
    assert given["config"] | {"actor_hidden": [8, 4], "seed": 0, "env": "InvertedPendulum-v5"} == given["config"]
    assert is_complete(next(Path("runs").glob("*/*/*")))


def test_a_tracker_that_fails_at_its_end_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, lambda **options: FakeRun(fails_at=1000))
    assert train.main([*SMALL, "--track", "trackio", "--total-timesteps", "32"]) == 0
    assert capsys.readouterr().err.count("warning: trackio failed at its end (still gone)") == 1


@pytest.mark.parametrize("content", ["garbage", "[]", '{"trackio": 3}', "[" * 200_000])
def test_a_damaged_file_of_ids_is_named_and_the_run_is_untouched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    fake(monkeypatch, lambda **options: FakeRun(fails_at=1000))
    assert train.main([*SMALL, "--track", "trackio", "--total-timesteps", "32"]) == 0
    (run,) = Path("runs").glob("*/*/*")
    (run / "tracker.json").write_text(content)
    before = (run / "config.json").read_bytes()
    capsys.readouterr()
    assert train.main(["--resume", str(run), "--total-timesteps", "64"]) == 2
    assert capsys.readouterr().err.startswith(f"error: track: {run / 'tracker.json'} is damaged; restore it")
    assert (run / "config.json").read_bytes() == before


def test_mlflow_is_not_waited_for_longer_than_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own patience with a server that does not answer is some minutes, for each request."""
    seen: dict[str, str | None] = {}
    names = ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT")

    class Client:
        def __init__(self) -> None:
            seen.update({name: os.environ.get(name) for name in names})
            raise ConnectionError("nobody listens")

    for name in ("mlflow", "mlflow.tracking"):
        module = ModuleType(name)
        module.__spec__ = SimpleNamespace()  # type: ignore[assignment]
        vars(module)["MlflowClient"] = Client
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv(names[0], "3")
    monkeypatch.setenv(names[1], "")
    monkeypatch.delenv(names[1])
    assert train.main([*SMALL, "--track", "mlflow", "--total-timesteps", "32"]) == 2
    assert seen == {names[0]: "3", names[1]: "10"}


def test_a_tracker_that_does_not_begin_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(**options: Any) -> None:
        raise RuntimeError("no account\n\nlog in first")

    fake(monkeypatch, init)
    assert train.main([*SMALL, "--track", "trackio", "--total-timesteps", "64"]) == 2
    assert capsys.readouterr().err == (
        "error: track: trackio does not begin: no account log in first; see docs/commands.md\n"
    )
    assert not Path("runs").exists()


def test_a_missing_tracker_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("driftrl.runs.trackers.importlib.util.find_spec", lambda name: None)
    assert train.main([*SMALL, "--track", "wandb"]) == 2
    assert capsys.readouterr().err == "error: track: wandb is not installed; run pip install 'driftrl[wandb]'\n"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_trackio_has_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    project = "test-of-driftrl"
    monkeypatch.setenv("TRACKIO_PROJECT", project)
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", Path("trackio").resolve())
    run = train_twice("trackio")
    name = json.loads((run / "tracker.json").read_text())["trackio"]
    rows = SQLiteStorage.get_logs(project, name)
    found = [(row["step"], row["train/value_loss"]) for row in rows if "train/value_loss" in row]
    assert_same(found, logged(run, "train/value_loss"))
    config = SQLiteStorage.get_run_config(project, name)
    assert config is not None
    assert (config["actor_hidden"], config["learning_rate"], config["seed"]) == ([8, 4], 3e-4, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_mlflow_has_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{Path('mlflow.db').resolve()}")
    run = train_twice("mlflow")
    number = json.loads((run / "tracker.json").read_text())["mlflow"]
    with sqlite3.connect("mlflow.db") as file:
        params = dict(file.execute("select key, value from params where run_uuid = ?", [number]).fetchall())
        query = "select step, value from metrics where run_uuid = ? and key = 'train/value_loss' order by step"
        found = file.execute(query, [number]).fetchall()
        ((status,),) = file.execute("select status from runs").fetchall()
    assert (params["actor_hidden"], params["learning_rate"], params["env"]) == (
        "[8, 4]",
        "0.0003",
        "InvertedPendulum-v5",
    )
    assert_same(found, logged(run, "train/value_loss"))
    assert status == "FINISHED"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_wandb_has_the_run_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = train_twice("wandb")
    number = json.loads((run / "tracker.json").read_text())["wandb"]
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert [file.stem for file in files] == [f"run-{number}"] * 2
    contents = [file.read_bytes() for file in files]
    assert all(b"actor_hidden" in content and b"train/value_loss" in content for content in contents)
    # the last logged value, as text of JSON
    steps, value = logged(run, "train/value_loss")[-1]
    assert f"{value:.4g}"[:5].encode() in contents[-1]
    assert steps == 64
