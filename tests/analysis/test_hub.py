"""The folder for the Hugging Face Hub: its card says what is true, its code runs, its agent is the evaluated one."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from driftrl import PolicyFlow
from driftrl.analysis.hub import model_card, write_hub_folder
from driftrl.analysis.records import find_records
from driftrl.commands import evaluate, train, training
from driftrl.runs.folder import checkpoints, load_agent, read_settings, write_settings

SMALL = [
    "policyflow", "--env", "InvertedPendulum-v5", "--n-envs", "1", "--n-steps", "16", "--batch-size", "16",
    "--n-epochs", "2", "--actor-hidden", "8", "4", "--compile", "off", "--device", "cpu", "--seed", "7",
    "--total-timesteps", "32", "--env-kwargs", "reset_noise_scale=0.02",
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "_FINAL_EPISODES", 1)
    assert train.main(SMALL) == 0
    (found,) = Path("runs").glob("*/*/*")
    return found


def test_the_folder_can_be_pushed_and_used(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = checkpoints(run)[0]
    assert evaluate.main([str(file), "--episodes", "5", "--hub", "hub/one", "--json", "own.json"]) == 0
    out, folder = capsys.readouterr().out, Path("hub/one")
    assert "push it:   hf upload USER/NAME hub/one" in out
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "agent.zip", "config.json", "results.json"]
    report = json.loads(Path("own.json").read_text())
    assert report == {"file": str(file), **json.loads((folder / "results.json").read_text())}

    _, head, card = (folder / "README.md").read_text().split("---\n", 2)
    data = yaml.safe_load(head)
    assert data["library_name"] == "driftrl"
    assert {"InvertedPendulum-v5", "policyflow", "reinforcement-learning"} <= set(data["tags"])
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"]["name"] == "InvertedPendulum-v5"
    returns = report["deterministic"]["returns"]
    assert result["metrics"][0]["value"] == f"{np.mean(returns):.2f} +/- {np.std(returns):.2f}"
    low, high = report["sampled"]["iqm_low"], report["sampled"]["iqm_high"]
    assert f"| [{low:.1f}, {high:.1f}] |" in card
    for text in (
        "played 5 episodes",
        "On-policy PPO",
        "seed 7",
        "| actor_hidden | [8, 4] |",
        f"- torch {torch.__version__}",
        "32 steps",
    ):
        assert text in card
    assert str(Path.cwd()) not in card

    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code.replace('"agent.zip"', '"hub/one/agent.zip"'), "card", "exec"), names)
    expected, _ = load_agent(file, "cpu").predict(np.asarray(names["obs"]), deterministic=True)
    assert names["action"] == pytest.approx(expected)
    assert isinstance(names["agent"], PolicyFlow)
    assert (folder / "agent.zip").stat().st_size < file.stat().st_size  # no training state

    (folder / "replay.mp4").write_text("of another agent")
    assert evaluate.main([str(run), "--episodes", "1", "--hub", "hub/one"]) == 0  # written anew
    assert not (folder / "replay.mp4").exists()


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        ("/home/me/avoid-v0/data/main_data.hdf5", "avoid-v0"),
        ("/home/me/avoid-v0/main_data.hdf5", "avoid-v0"),
        ("/home/me/low.hdf5", "low.hdf5"),
        ("/main_data.hdf5", "main_data.hdf5"),
        ("a/b-v0", "a/b-v0"),
    ],
)
def test_where_a_data_set_lies_is_not_shared(run: Path, tmp_path: Path, stored: str, shown: str) -> None:
    settings = dataclasses.replace(read_settings(run), demonstrations=stored)
    write_settings(run, settings)
    write_hub_folder(tmp_path / "hub", load_agent(run), run, settings, json.loads((run / "eval.json").read_text()))
    assert read_settings(tmp_path / "hub").demonstrations == shown
    card = (tmp_path / "hub" / "README.md").read_text()
    assert f"| demonstrations | {shown} |" in card and "/home/me" not in card


def test_no_value_of_a_setting_breaks_its_row(run: Path) -> None:
    settings = dataclasses.replace(read_settings(run), env_kwargs={"x": "a|b\nc"})
    mode = dict.fromkeys(("mean", "std", "iqm", "iqm_low", "iqm_high"), 1.0) | {"lengths": [1]}
    report = {"env_id": "E-v0", "env_kwargs": {}, "timesteps": 1, "episodes": 1, "seed": 0, "deterministic": mode}
    card = model_card(settings, report, {})
    assert r"| env_kwargs.x | a\|b<br>c |" in card.splitlines()


def test_the_folder_is_evaluated_and_is_no_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(run), "--episodes", "1", "--hub", "hub"]) == 0
    Path("hub/.gitattributes").touch()  # as a download has it
    capsys.readouterr()
    assert evaluate.main(["hub", "--episodes", "1", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {**json.loads(Path("hub/results.json").read_text()), "file": "hub/agent.zip"}
    assert [record.folder for record in find_records([(None, Path())]).records] == [run]
    assert train.main(["--resume", "hub"]) == 2
    assert capsys.readouterr().err.startswith("error: resume: got hub, a folder for the Hub without training state")


def test_what_cannot_be_shared_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("full").mkdir()
    Path("full/secret.txt").touch()
    Path("notours").mkdir()
    Path("notours/README.md").write_text("hello")
    Path("alone.zip").write_bytes((run / "final.zip").read_bytes())
    capsys.readouterr()
    for arguments, says in (
        ([str(run), "--hub", "full"], "hub: got full, expected a new folder: all that lies in it will be pushed"),
        ([str(run), "--hub", "notours"], "hub: got notours, expected a new folder"),
        ([str(run), "--hub", "alone.zip"], "hub: got alone.zip, expected a new folder"),
        (["alone.zip", "--env", "InvertedPendulum-v5", "--hub", "new"], "hub: got alone.zip, which lies in no run"),
        ([str(run), "--hub", "new", "--video", "a.gif"], "video: got a.gif, expected a name that ends in .mp4"),
        ([str(run), str(run), "--hub", "new"], "hub: got several runs, expected one"),
        ([str(run), "--hub", "new", "--env-kwargs", "reset_noise_scale=0.5"], "hub: got another task than the run's"),
    ):
        assert evaluate.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {says}")
        assert error.count("\n") == 1
    assert not Path("new").exists()
    assert Path("notours/README.md").read_text() == "hello"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_hub_reads_the_card_and_what_package_to_hub_cannot(run: Path) -> None:
    card_of = pytest.importorskip("huggingface_hub").ModelCard
    assert evaluate.main([str(run), "--episodes", "2", "--hub", "hub"]) == 0
    card = card_of.load("hub/README.md")
    (result,) = card.data.eval_results
    assert (result.task_type, result.dataset_name, result.metric_type) == (
        "reinforcement-learning", "InvertedPendulum-v5", "mean_reward"
    )  # fmt: skip
    push = pytest.importorskip("huggingface_sb3").push_to_hub
    steps = __import__(push.__module__, fromlist=["_generate_config"])
    with pytest.raises(FileNotFoundError, match="data"):  # Stable-Baselines3's file of pickled attributes
        steps._generate_config("agent", Path("hub").resolve())


def test_the_card_imports_the_package_that_registers_the_environment(run: Path) -> None:
    settings = dataclasses.replace(read_settings(run), env_id="FetchPush-v4", env_kwargs={})
    report = json.loads((run / "eval.json").read_text()) | {"env_id": "FetchPush-v4", "env_kwargs": {}}
    assert 'gym.make("gymnasium_robotics:FetchPush-v4")' in model_card(settings, report, {})
