"""Run folders are found, however deep, and say whose run they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from driftrl.analysis.records import find_records

LAST_RELEASE = Path(__file__).parents[1] / "runs" / "last_release"
PROGRESS = "rollout/ep_rew_mean,time/time_elapsed,time/total_timesteps\n1,1,100\n2,2,200\n"
MONITOR = '#{"t_start": 0.0, "env_id": "Hopper-v5"}\nr,l,t\n1,10,1\n'


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def ours(folder: Path, returns: Any = (3.0, 5.0), **changes: Any) -> Path:
    """A complete run folder of ours, with what a comparison reads."""
    config = {
        "agent": "policyflow",
        "env_id": "Hopper-v5",
        "env_kwargs": {},
        "seed": 4,
        "n_envs": 2,
        "config": {"gamma": 0.9},
    }
    write(folder / "config.json", json.dumps(config | changes))
    write(folder / "progress.csv", PROGRESS)
    write(folder / "eval.json", json.dumps({"timesteps": 256, "deterministic": {"returns": returns, "mean": 0}}))
    write(folder / "final.zip", "")
    return folder


def test_a_run_folder_written_by_the_library() -> None:
    found = find_records([(None, LAST_RELEASE)])
    assert found.problems == []
    assert [each.agent for each in found.records] == ["mbpo", "policyflow", "policyflow"]
    run = found.records[1]
    assert (run.env_id, run.seed, run.complete, run.evaluation) == ("driftrl/MultiGoal-v0", 1, False, None)
    assert run.settings["ratio"] == "endpoint" and run.settings["n_envs"] == 4
    assert not {"seed", "keep_checkpoints", "versions"} & run.settings.keys()
    assert run.versions["driftrl"] == "0.1.0.dev0" and run.curves["training"].steps[-1] == 512


def test_a_complete_run_has_the_mean_of_its_evaluation(tmp_path: Path) -> None:
    ours(tmp_path / "deep" / "er" / "run")
    (run,) = find_records([(None, tmp_path)]).records
    assert (run.evaluation, run.steps, run.complete, run.label) == (4.0, 256, True, "seed 4")


def test_damaged_files_are_named_in_one_line_and_the_others_go_on(tmp_path: Path) -> None:
    write(tmp_path / "a" / "config.json", "{half")
    write(tmp_path / "a" / "progress.csv", PROGRESS)
    ours(tmp_path / "b", seed="four")
    write(ours(tmp_path / "c") / "eval.json", "{}")
    write(ours(tmp_path / "d") / "progress.csv", "no,steps\n1,2\n")
    write(tmp_path / "e" / "monitor.csv", "no header")
    found = find_records([(None, tmp_path)])
    assert [each.folder.name for each in found.records] == ["c", "d"]
    assert [problem.partition(" is damaged")[0] for problem in found.problems] == [
        str(tmp_path / name) for name in ("a/config.json", "b/config.json", "e/monitor.csv")
    ]
    assert "eval.json is damaged" in found.records[0].notes[0] and not math.isfinite(
        found.records[0].evaluation or math.nan
    )
    assert "progress.csv is damaged" in found.records[1].notes[0] and found.records[1].evaluation == 4.0


def test_an_evaluation_after_infinite_steps_is_damaged(tmp_path: Path) -> None:
    write(ours(tmp_path) / "eval.json", '{"timesteps": 1e999, "deterministic": {"returns": [1]}}')
    (run,) = find_records([(None, tmp_path)]).records
    assert run.evaluation is None and "eval.json is damaged" in run.notes[0]


def test_runs_of_sb3_are_named_by_their_folders(tmp_path: Path) -> None:
    for folder in ("ppo/s0", "ppo/seed_1", "ppo/2", "tb/PPO_1", "sac/Hopper-v5/s3", "a2c-s5", "plain"):
        write(tmp_path / folder / "progress.csv", PROGRESS)
    found = {str(run.folder.relative_to(tmp_path)): run for run in find_records([(None, tmp_path)]).records}
    assert {folder: (run.agent, run.seed) for folder, run in found.items()} == {
        "ppo/s0": ("ppo", 0), "ppo/seed_1": ("ppo", 1), "ppo/2": ("ppo", 2), "tb/PPO_1": ("PPO", None),
        "sac/Hopper-v5/s3": ("sac", 3), "a2c-s5": ("a2c", 5), "plain": ("plain", None),
    }  # fmt: skip
    assert {folder for folder, run in found.items() if run.env_id == "Hopper-v5"} == {"sac/Hopper-v5/s3"}


def test_a_folder_of_rl_zoo3(tmp_path: Path) -> None:
    folder = tmp_path / "ppo" / "Hopper-v5_1"
    write(folder / "0.monitor.csv", MONITOR)
    np.savez(folder / "evaluations.npz", timesteps=[10, 20], results=[[1.0, 2.0], [3.0, 4.0]])
    head = "!!python/object/apply:collections.OrderedDict\n"
    write(
        folder / "Hopper-v5" / "args.yml",
        f"{head}- - - algo\n    - ppo\n  - - env\n    - Hopper-v5\n  - - n_timesteps\n    - 20\n  - - seed\n    - 12\n",
    )
    write(folder / "Hopper-v5" / "config.yml", f"{head}- - - n_steps\n    - 512\n  - - n_timesteps\n    - 1000000\n")
    (run,) = find_records([(None, tmp_path)]).records
    assert (run.agent, run.env_id, run.seed, run.evaluation) == ("ppo", "Hopper-v5", 12, 3.5)
    assert run.settings == {"n_steps": "512", "n_timesteps": "20"} and set(run.curves) == {"training", "evaluation"}


def test_our_own_evaluations_while_training_are_read(tmp_path: Path) -> None:
    ours(tmp_path / "group" / "s4")
    write(tmp_path / "group" / "group.json", '{"runs": ["s4"]}')
    write(
        tmp_path / "group" / "s4" / "progress.csv", "eval/mean_return,rollout/ep_rew_mean,time/total_timesteps\n"
        "2.5,,64\n,1,64\n3.5,,128\n",
    )  # fmt: skip
    (run,) = find_records([(None, tmp_path)]).records
    assert run.curves["evaluation"].returns.tolist() == [2.5, 3.5] and run.group == "group"
    assert run.evaluations() == [(64, 2.5), (128, 3.5), (256, 4.0)]


def test_a_run_found_twice_counts_once_and_its_name_wins(tmp_path: Path) -> None:
    ours(tmp_path / "a")
    ours(tmp_path / "b")
    records = find_records([("mine", tmp_path / "a"), (None, tmp_path), (None, tmp_path / "b")]).records
    assert sorted((run.folder.name, run.name) for run in records) == [("a", "mine"), ("b", None)]


def test_other_programs_folders_are_no_runs(tmp_path: Path) -> None:
    write(tmp_path / "a" / "config.json", '{"model_type": "bert"}')
    write(tmp_path / "b" / "config.json", "[]")
    with pytest.raises(ValueError, match="no runs: got "):
        find_records([(None, tmp_path)])


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder: got"):
        find_records([(None, tmp_path / "nothing")])


def test_a_folder_below_the_working_directory_is_named_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours(tmp_path / "a" / "run")
    write(tmp_path / "ppo" / "s0" / "progress.csv", PROGRESS)
    monkeypatch.chdir(tmp_path)
    assert [str(run.folder) for run in find_records([(None, tmp_path)]).records] == ["a/run", "ppo/s0"]
    monkeypatch.chdir(tmp_path / "ppo" / "s0")
    (run,) = find_records([(None, Path())]).records
    assert (run.agent, run.seed, run.label) == ("ppo", 0, "seed 0")


def test_a_second_learn_that_counts_from_nothing_is_noted(tmp_path: Path) -> None:
    text = PROGRESS + "3,1,100\n"
    write(tmp_path / "ppo" / "s0" / "progress.csv", text)
    (run,) = find_records([(None, tmp_path)]).records
    assert run.curves["training"].returns.tolist() == [3]
    assert "go back to an earlier step; the 2 returns before" in run.notes[0]
    write(ours(tmp_path / "ppo") / "progress.csv", text)  # our own runs go on from checkpoints
    (run,) = find_records([(None, tmp_path)]).records
    assert run.notes == ()


DAMAGED = [
    "", "[]", "{}", "[" * 200_000, '{"timesteps": 5, "deterministic": {"mean": 1, "returns": []}}',
    '{"timesteps": 5, "deterministic": {"mean": 1, "returns": ["x"]}}',
    '{"timesteps": "5", "deterministic": {"mean": 1, "returns": [1]}}', '{"timesteps": 5, "deterministic": 3}',
    '{"timesteps": 5, "deterministic": {"returns": [1]}}',
    f'{{"timesteps": 1{"0" * 400}, "deterministic": {{"mean": 1, "returns": [1]}}}}',
]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_evaluation_is_left_out_in_one_line(tmp_path: Path, content: str) -> None:
    write(ours(tmp_path) / "eval.json", content)
    (run,) = find_records([(None, tmp_path)]).records
    assert run.evaluation is None
    assert run.notes == (f"{tmp_path / 'eval.json'} is damaged; the run counts as not evaluated",)


def test_a_config_of_endless_brackets_is_damaged_and_the_others_go_on(tmp_path: Path) -> None:
    write(ours(tmp_path / "a") / "config.json", "[" * 200_000)
    ours(tmp_path / "b")
    write(tmp_path / "c" / "monitor.csv", "[" * 200_000 + "\nr,l,t\n1,2,3\n")
    found = find_records([(None, tmp_path)])
    assert [run.folder.name for run in found.records] == ["b"]
    assert [line.partition(" is damaged")[0] for line in found.problems] == [
        str(tmp_path / "a" / "config.json"), str(tmp_path / "c" / "monitor.csv")
    ]  # fmt: skip


def test_a_run_without_its_last_save_is_unfinished(tmp_path: Path) -> None:
    (ours(tmp_path) / "final.zip").unlink()
    (run,) = find_records([(None, tmp_path)]).records
    assert (run.complete, run.state) == (False, "unfinished")


def test_links_to_runs_are_followed_and_each_run_counts_once(tmp_path: Path) -> None:
    ours(tmp_path / "elsewhere" / "b")
    ours(tmp_path / "elsewhere" / "deep" / "c")
    ours(tmp_path / "runs" / "a")
    for name, target in {"b": "../elsewhere/b", "c": "../elsewhere/deep", "again": "a", "loop": "."}.items():
        (tmp_path / "runs" / name).symlink_to(target)
    found = find_records([(None, tmp_path / "runs")])
    assert [run.folder.name for run in found.records] == ["a", "b", "c"]


def test_a_run_with_two_names_is_refused(tmp_path: Path) -> None:
    ours(tmp_path / "a")
    with pytest.raises(ValueError, match=r"a: got it as x and as y, expected one name for each run"):
        find_records([("x", tmp_path), ("y", tmp_path / "a")])
