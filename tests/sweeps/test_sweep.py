"""Sweeps on this machine, with real processes: whatever is killed, the same command goes on and ends with the same."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from driftrl.analysis.records import find_records
from driftrl.commands import sweep, train
from driftrl.runs.folder import is_complete
from driftrl.runs.group import members
from driftrl.runs.lock import alone
from driftrl.sweeps.executors import Local
from driftrl.sweeps.plan import begin as begin_group
from driftrl.sweeps.plan import grid
from driftrl.sweeps.spec import read_spec
from driftrl.sweeps.study import StudySource

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
from killing import EXACT, EXACT_SETTINGS, begin, finish, kill, processes_of, run_folders, until, write_spec
from run_differences import differences

pytestmark = pytest.mark.slow
HAS_OPTUNA = importlib.util.find_spec("optuna") is not None


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def _has(folder: Path, pattern: str, count: int = 1) -> bool:
    return len(list(folder.glob(pattern))) >= count


def test_a_grid_is_groups_of_runs_and_is_trained_once(capsys: pytest.CaptureFixture[str]) -> None:
    write_spec(Path("grid.yaml"), seeds=[0, 1], grid={"gamma": [0.9], "actor_hidden": [[8], [4, 4]]}, jobs=2)
    assert sweep.main(["grid.yaml"]) == 0
    out = capsys.readouterr().out
    groups = [Path(f"grid/slow_task_Task-v0/policyflow/gamma=0.9,actor_hidden={name}") for name in ("8", "4x4")]
    assert [[each.name for each in members(group)] for group in groups] == [["s0", "s1"], ["s0", "s1"]]
    assert all(map(is_complete, run_folders(Path("grid"))))
    assert out.count("2 of 2") == 2
    found = find_records([(None, Path("grid"))])
    assert [(record.seed, record.settings["actor_hidden"], record.complete) for record in found.records] == [
        (0, [4, 4], True), (1, [4, 4], True), (0, [8], True), (1, [8], True)
    ]  # fmt: skip

    before = {file: file.stat().st_mtime_ns for file in Path("grid").rglob("final.zip")}
    assert sweep.main(["grid.yaml"]) == 0
    assert "4 of 4 runs were complete" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in Path("grid").rglob("final.zip")}

    # a damaged evaluation is named and made anew; the other runs stay as they are
    (groups[0] / "s1" / "eval.json").write_text("")
    assert sweep.main(["grid.yaml"]) == 0
    out, error = capsys.readouterr()
    assert "s1/eval.json is damaged" in error
    assert "3 of 4 runs were complete" in out
    assert is_complete(groups[0] / "s1")
    others = [file for file in before if file.parent != groups[0] / "s1"]
    assert [before[file] for file in others] == [file.stat().st_mtime_ns for file in others]

    # the run of a sweep is that of a single command
    options = ["--config", str(groups[1] / "s1"), "--run-dir", "single"]
    assert train.main(options) == 0
    (single,) = Path("single").glob("*/*/*")
    assert differences(groups[1] / "s1", single) == []

    # more seeds and more steps are added, other settings are refused
    grid = {"gamma": [0.9], "actor_hidden": [[8]]}
    write_spec(Path("grid.yaml"), seeds=[0, 2], grid=grid, settings={"total_timesteps": 160}, jobs=2)
    assert sweep.main(["grid.yaml"]) == 0
    assert sorted(each.name for each in members(groups[0])) == ["s0", "s1", "s2"]
    steps = [json.loads((groups[0] / name / "eval.json").read_text())["timesteps"] for name in ("s0", "s1", "s2")]
    assert steps == [160, 128, 160]
    capsys.readouterr()
    write_spec(Path("grid.yaml"), seeds=[0], grid=grid, settings={"total_timesteps": 160, "n_epochs": 2})
    assert sweep.main(["grid.yaml"]) == 2
    assert "s0 holds a run with n_epochs 1, the sweep says 2; move it away" in capsys.readouterr().err


def test_a_sweep_that_is_killed_ends_with_the_results_of_one_that_was_not() -> None:
    for name in ("whole", "killed"):
        grid = {"gamma": [0.9, 0.99]}
        write_spec(Path(f"{name}.yaml"), EXACT, seeds=[0, 1], grid=grid, jobs=2, settings=EXACT_SETTINGS)
    finish(begin(Path("whole.yaml").resolve()), Path("whole.yaml"))
    spec, folder = Path("killed.yaml").resolve(), Path("killed").resolve()
    for checkpoints in (1, 4):  # the command is killed twice
        process = begin(spec)
        until(partial(_has, folder, "*/*/*/*/checkpoints/step_*.zip", checkpoints))
        kill(process)
    process = begin(spec)
    until(lambda: list(folder.glob("*/*/gamma=0.99/s1/checkpoints/*.zip")))
    for number in processes_of(f"gamma=0.99{os.sep}s1"):  # and one of the runs
        os.kill(number, signal.SIGKILL)
    finish(process, spec)
    pairs = list(zip(run_folders(Path("whole")), run_folders(Path("killed")), strict=True))
    assert len(pairs) == 4
    assert [differences(one, other) for one, other in pairs] == [[]] * 4
    log = (Path("killed/InvertedPendulum-v5/policyflow/gamma=0.99/s1/output.log")).read_text()
    assert "resumed from" in log
    assert "all restored: as if it had not been interrupted" in log


def test_a_signal_stops_a_sweep_and_a_run_that_fails_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    write_spec(Path("some.yaml"), seeds=[0, 1], jobs=1)
    Path("slow").touch()
    process = begin(Path("some.yaml").resolve())
    until(lambda: len(list(Path("some").rglob("step_*.zip"))) >= 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert Path("some.log").read_text().count("steps, with a checkpoint  (0 of 2 runs complete)") == 1
    assert Path("some.log").read_text().count("not begun  (0 of 2 runs complete)") == 1
    for checkpoint in Path("some/slow_task_Task-v0/policyflow/all/s0/checkpoints").iterdir():
        checkpoint.write_bytes(b"damaged")
    Path("slow").unlink()
    assert sweep.main(["some.yaml"]) == 1
    out = capsys.readouterr().out
    assert "s0: failed (exit code" in out
    assert "s1: complete" in out
    assert "all                1 of 2" in out


def test_two_commands_share_a_grid() -> None:
    write_spec(Path("grid.yaml"), seeds=[0, 1, 2, 3], grid={"gamma": [0.9]}, settings={"total_timesteps": 16})
    for process in [begin(Path("grid.yaml").resolve()) for _ in range(2)]:
        finish(process, Path("grid.yaml"))
    runs = run_folders(Path("grid"))
    assert len(runs) == 4
    assert [(run / "output.log").read_text().count("trained 16 steps") for run in runs] == [1] * 4


def test_a_race_to_begin_a_group_makes_it_once() -> None:
    write_spec(Path("grid.yaml"), seeds=[0, 1, 2, 3])
    (group,) = grid(read_spec(Path("grid.yaml")))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(begin_group, [group] * 64))
    assert [each.name for each in members(group.folder)] == ["s0", "s1", "s2", "s3"]


def test_a_run_waits_for_another_process_that_trains_it() -> None:
    write_spec(Path("some.yaml"), seeds=[0], settings={"total_timesteps": 16})
    (group,) = grid(read_spec(Path("some.yaml")))
    begin_group(group)
    (job,) = (Local(1, 0).job(group.run_folder(run), "run", run.total_timesteps) for run in group.runs)
    with alone(job.folder):
        job.start()
        until(lambda: "waiting for another process" in job.log.read_text())
    job.wait()
    assert job.state.ended == "complete"


@pytest.mark.skipif(not HAS_OPTUNA, reason="needs Optuna")
def test_values_that_do_not_go_together_fail_their_trial_and_not_the_search(capsys: pytest.CaptureFixture[str]) -> None:
    search = {"trials": 8, "pruner": "none", "space": {"chunk": {"choices": [8, 4]}, "execute": {"choices": [1, 8]}}}
    write_spec(Path("pairs.yaml"), seeds=[0], search=search, settings={"total_timesteps": 16, "actor_hidden": [4]})
    source = StudySource(read_spec(Path("pairs.yaml")), Local(1, 0))
    for _ in range(8):
        source._new()
    states = [(trial.params, trial.state.name) for trial in source.study.get_trials()]
    assert len(states) == 8
    assert {state for params, state in states if params == {"chunk": 4, "execute": 8}} == {"FAIL"}
    assert "FAIL" not in {state for params, state in states if params != {"chunk": 4, "execute": 8}}
    text = "counts as failed: pairs.yaml: search.space.execute: got 8, expected at most chunk = 4"
    assert text in capsys.readouterr().err


@pytest.mark.skipif(not HAS_OPTUNA, reason="needs Optuna")
def test_a_search_prunes_and_goes_on_whatever_is_killed(capsys: pytest.CaptureFixture[str]) -> None:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    search = {
        "trials": 8, "pruner_startup": 1, "space": {
            "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "n_epochs": {"low": 1, "high": 3},
            "critic_hidden": {"choices": [[4], [8, 8]]},
        },
    }  # fmt: skip
    settings = {"eval_interval": 16, "eval_episodes": 1}
    write_spec(Path("search.yaml"), seeds=[0, 1], search=search, jobs=2, settings=settings)
    Path("slow").touch()
    spec, folder = Path("search.yaml").resolve(), Path("search").resolve()
    for trial in (0, 2):
        process = begin(spec)
        until(partial(_has, folder, f"*/*/trial-{trial:04}/s*/checkpoints/*.zip"))
        kill(process)
    with (folder / "study.journal").open("ab") as journal:
        journal.write(b'{"op_code": 8, "half')  # as of a process that was killed while it wrote
    both = [begin(spec), begin(spec)]  # two share the study
    until(lambda: list(folder.glob("*/*/trial-0004/s*/checkpoints/*.zip")), 200)
    kill(both[0])
    finish(both[1], spec)
    assert "(8 of 8 trials over)" in Path("search.log").read_text()
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    trials = optuna.load_study(study_name="sweep", storage=storage).trials
    assert [trial.number for trial in trials if "lost" not in trial.user_attrs] == list(range(8))
    states = [trial.state.name for trial in trials]
    assert set(states) == {"COMPLETE", "PRUNED"}
    for trial in trials:
        (group,) = folder.glob(f"*/*/trial-{trial.number:04}")
        config = json.loads((group / "s0" / "config.json").read_text())["config"]
        assert config["learning_rate"] == trial.params["learning_rate"]
        assert config["critic_hidden"] == json.loads(trial.params["critic_hidden"])
        assert all(map(is_complete, members(group))) == (trial.state.name == "COMPLETE")
        if trial.state.name == "COMPLETE":
            reports = [json.loads((run / "eval.json").read_text()) for run in members(group)]
            assert trial.value == pytest.approx(sum(each["deterministic"]["mean"] for each in reports) / 2)
            assert sorted(trial.intermediate_values) == list(range(1, 9))
    write_spec(Path("search.yaml"), seeds=[0], search=search, settings=settings)
    assert sweep.main(["search.yaml"]) == 2
    assert "seeds: got [0], but the search of" in capsys.readouterr().err
