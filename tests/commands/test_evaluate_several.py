import dataclasses
import json
import shutil
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from driftrl import PolicyFlow, PolicyFlowConfig
from driftrl.analysis.several import over_runs
from driftrl.commands.evaluate import main
from driftrl.runs.folder import RunSettings, save_agent
from driftrl.runs.group import members, new_group


class Endless(gym.Env[np.ndarray, np.ndarray]):
    """Never ends; each step is worth 1."""

    action_space, observation_space = spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (2,))

    def reset(self, *, seed: int | None = None, options: object = None) -> tuple[np.ndarray, dict[str, object]]:
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, object]]:
        return np.zeros(2, np.float32), 1.0, False, False, {}


gym.register("DriftRLTest/Endless-v0", lambda **kwargs: Endless(**kwargs), disable_env_checker=True)
SETTINGS = RunSettings("policyflow", "Pendulum-v1", {}, 1, 0, 16, 16, "cpu", 1, {})


def group(root: Path, settings: RunSettings, seeds: tuple[int, ...], saved: int) -> Path:
    """A group whose first runs hold an untrained agent."""
    folder = new_group(root, [dataclasses.replace(settings, seed=seed) for seed in seeds])
    config = PolicyFlowConfig(n_steps=16, batch_size=16, actor_hidden=(8, 8), critic_hidden=(8, 8))
    for seed, run in list(zip(seeds, members(folder), strict=True))[:saved]:
        agent = PolicyFlow("MlpPolicy", settings.env_id, config=config, device="cpu", seed=seed)
        save_agent(agent, run / "final.zip")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return group(tmp_path_factory.mktemp("whole"), SETTINGS, (5, 3, 4), 3)


def test_a_group_has_a_row_per_run_and_one_over_them(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "all.json"
    assert main([str(whole), "--episodes", "2", "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 runs, 2 episodes each"
    assert [line.split()[0] for line in lines[2:5]] == [str(run) for run in members(whole)]
    data = json.loads(file.read_text())
    for run, line, report in zip(members(whole), lines[2:5], data["runs"], strict=True):
        assert main([str(run), "--episodes", "2", "--json", "-"]) == 0
        alone = json.loads(capsys.readouterr().out)
        assert {**report, "file": alone["file"]} == alone
        means = [f"{alone[mode]['mean']:.1f}" for mode in ("deterministic", "sampled")]
        assert line.split()[1:] == ["0", *means]
    means = [report["deterministic"]["mean"] for report in data["runs"]]
    # the middle half of three: the middle one wholly, the others by a quarter each
    expected = (sorted(means) @ np.array([1, 4, 1])) / 6
    (summary,) = data["groups"]
    assert (summary["runs"], len(summary["files"])) == (3, 3)
    assert summary["deterministic"]["iqm"] == pytest.approx(expected)
    assert lines[5].split()[:5] == [str(whole), "IQM", "of", "3", "[95"]
    assert f"{expected:.1f} [" in lines[5]
    assert len({len(line) for line in lines[1:6]}) == 1  # columns end at the same place


def test_a_folder_of_runs_is_all_of_them(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep's folder, say: two groups, a single run, and beside them what is none."""
    for rate in (1, 2):
        group(tmp_path / "sweep", dataclasses.replace(SETTINGS, config={"learning_rate": rate}), (0, 1), 2)
    single = tmp_path / "sweep" / "alone"
    shutil.copytree(members(whole)[0], single)
    shutil.copytree(single, tmp_path / "sweep" / "hub")
    (tmp_path / "sweep" / "hub" / "final.zip").rename(tmp_path / "sweep" / "hub" / "agent.zip")
    assert main([str(tmp_path / "sweep"), "--episodes", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("5 runs, 1 episode each")
    assert out.count("IQM of 2") == 2
    assert f"{single} " in out
    assert main([str(tmp_path / "sweep"), "--export", str(tmp_path / "a.onnx")]) == 2
    assert "export: got several runs, expected one; name one of them, such as " in capsys.readouterr().err
    assert main([str(tmp_path / "sweep"), str(single)]) == 2
    assert f"got {single} twice" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2
    assert f"no run: got {tmp_path / 'empty'}, expected the folder of a run" in capsys.readouterr().err


def test_only_runs_of_equal_settings_are_averaged(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = members(group(tmp_path, dataclasses.replace(SETTINGS, total_timesteps=32), (0,), 1))
    again = group(tmp_path, SETTINGS, (5,), 1)
    runs = [str(each) for each in (*members(whole)[:2], *other, again)]
    assert main([runs[0], "--episodes", "1", *runs[1:], "--sample"]) == 0
    out = capsys.readouterr().out
    assert out.count("IQM of") == 1
    assert "IQM of 2" in out
    assert "deterministic" not in out


def test_longest_episodes_hold_for_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    endless = group(tmp_path, dataclasses.replace(SETTINGS, env_id="DriftRLTest/Endless-v0"), (0, 1), 2)
    assert main([str(endless), "--episodes", "1", "--max-steps", "7", "--json", "-"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [report["deterministic"]["lengths"] for report in data["runs"]] == [[7], [7]]
    assert data["groups"][0]["deterministic"] == {"iqm": 7.0, "iqm_low": 7.0, "iqm_high": 7.0}


def test_a_run_that_has_not_begun_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = group(tmp_path, SETTINGS, (0, 1), 1)
    assert main([str(half), "--episodes", "1"]) == 1
    assert f"{half / 's1'}  nothing saved yet" in capsys.readouterr().out
    assert main([str(group(tmp_path, SETTINGS, (0, 1), 0))]) == 2
    assert "where no run has saved anything yet" in capsys.readouterr().err


def test_bad_input_is_one_line(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(members(whole)[0])
    for args, message in (
        ([str(whole), run], f"got {run} twice, expected different runs"),
        ([str(whole), "--video", str(tmp_path / "a.mp4")], "video: got several runs, expected one"),
        ([str(whole), "--export", str(tmp_path / "a.onnx")], "export: got several runs, expected one"),
        ([run, "missing"], "no such run: got missing"),
        ([str(whole), "--episodes", "0"], "episodes: got 0"),
        ([str(whole), "--env", "Hopper-v5", "--episodes", "1"], "observation_space of Hopper-v5"),
    ):
        assert main(args) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error


def test_over_runs_counts_each_run_once() -> None:
    reports = [{"sampled": {"mean": mean}} for mean in (1.0, 2.0, 3.0, 10.0)]
    found = over_runs(reports)
    assert found["sampled"]["iqm"] == 2.5  # of four values the middle two
    assert 1 <= found["sampled"]["iqm_low"] < 2.5 < found["sampled"]["iqm_high"] <= 10
