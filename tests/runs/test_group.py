"""Groups and the evaluations of their runs: what is damaged is named, and a run without an evaluation is not over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from driftrl.runs.folder import is_complete
from driftrl.runs.group import members, runs_in
from driftrl.runs.results import read_results


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"runs": []}', '{"runs": ["s0", "s0"]}', '{"runs": [3]}', '{"runs": 3}', '{"runs": ["../s0"]}',
     '{"runs": [[]]}', "[" * 200_000],
)  # fmt: skip
def test_a_damaged_group_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "group.json").write_text(content)
    with pytest.raises(ValueError, match=r"unreadable group: .*group\.json is damaged; restore it"):
        members(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{}", "[" * 200_000, '{"timesteps": 5}', '{"timesteps": 5, "deterministic": {"returns": [1]}}']
)
def test_a_run_with_a_damaged_evaluation_is_not_complete(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "final.zip").touch()
    (tmp_path / "eval.json").write_text(content)
    assert not is_complete(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path / 'eval.json'} is damaged; --resume {tmp_path} evaluates again")


def test_the_evaluation_of_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_results(tmp_path) is None
    written = {"timesteps": 5, "deterministic": {"mean": 1.5, "returns": [1.0, 2.0]}, "file": "final.zip"}
    (tmp_path / "eval.json").write_text(json.dumps(written))
    (tmp_path / "final.zip").touch()
    assert read_results(tmp_path) == written
    assert is_complete(tmp_path)


def test_runs_behind_links_are_found_once(tmp_path: Path) -> None:
    for name in ("elsewhere/b", "group/s0", "runs/a"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "best.zip").touch()
    (tmp_path / "group" / "group.json").write_text('{"runs": ["s0"]}')
    runs = tmp_path / "runs"
    links = {"b": "../elsewhere/b", "again": "a", "group": "../group", "c": "../group/s0", "loop": "."}
    for name, target in links.items():
        (runs / name).symlink_to(target)
    assert sorted(run.resolve().name for run in runs_in(runs)) == ["a", "b", "s0"]
