"""`compare.py`: from folders to tables, files and one line for what is wrong."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from driftrl.commands.compare import main

ROOT = Path(__file__).parents[2]
PROGRESS = "rollout/ep_rew_mean,time/time_elapsed,time/total_timesteps\n1,1,100\n{},2,200\n"


def run_folder(folder: Path, seed: int, score: float, **changes: Any) -> None:
    folder.mkdir(parents=True)
    config = {"agent": "policyflow", "env_id": "Hopper-v5", "env_kwargs": {}, "seed": seed, "config": {"gamma": 0.9}}
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "progress.csv").write_text(PROGRESS.format(score))
    mode = {"returns": [score], "mean": score}
    (folder / "eval.json").write_text(json.dumps({"timesteps": 200, "deterministic": mode}))
    (folder / "final.zip").write_text("")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with three runs of ours and two logs of Stable-Baselines3."""
    monkeypatch.chdir(tmp_path)
    for seed in range(3):
        run_folder(tmp_path / "runs" / f"s{seed}", seed, 10.0 + seed)
    for seed in range(2):
        (tmp_path / "logs" / f"s{seed}").mkdir(parents=True)
        (tmp_path / "logs" / f"s{seed}" / "progress.csv").write_text(PROGRESS.format(5 + seed))
    return tmp_path


def test_table_and_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["runs", "ppo=logs", "--html", "r.html", "--csv", "t.csv", "--json", "t.json", "--threshold", "6"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "policyflow  3 of 3  11" in out and "ppo         2 of 2  5.5" in out
    assert "policyflow > ppo: 1.00 [1, 1]" in out and "wrote r.html, t.csv, t.json" in out
    rows = list(csv.DictReader((folder / "t.csv").read_text().splitlines()))
    assert [(row["group"], row["iqm"], row["runs_reaching_threshold"]) for row in rows] == [
        ("policyflow", "11.0", "3"), ("ppo", "5.5", "1"),
    ]  # fmt: skip
    (section,) = json.loads((folder / "t.json").read_text())["sections"]
    assert [group["iqm"] for group in section["groups"]] == [11.0, 5.5]
    assert (folder / "r.html").read_text().startswith("<!DOCTYPE html>")


def test_json_alone_on_stdout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--json", "-", "--csv", "t.csv"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["problems"] == [] and "wrote t.csv" in captured.err


def test_pictures_have_labelled_axes(folder: Path) -> None:
    assert main(["runs", "ppo=logs", "--plot", "pictures"]) == 0
    assert (folder / "pictures" / "Hopper-v5.png").read_bytes().startswith(b"\x89PNG")
    svg = (folder / "pictures" / "Hopper-v5.svg").read_text()
    for words in ("environment steps", "return while training", "ppo (2 runs)"):
        assert f"<!-- {words}" in svg  # matplotlib draws text as paths and keeps it as a comment


def test_without_matplotlib_one_line_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["nowhere", "--plot", "pictures"]) == 2  # before anything is read
    assert capsys.readouterr().err.splitlines() == [
        "error: plot: matplotlib is not installed; run pip install 'driftrl[plot]'"
    ]


def test_names_that_are_hard_to_show_are_shown(folder: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """Formulas and hidden labels of matplotlib, bytes that are not UTF-8, half a character, links and folders."""
    for i, agent in enumerate(("a$x_{$", "_hidden", "half \ud800")):
        run_folder(folder / "runs" / f"other{i}", 0, 1.0, agent=agent)
    raw = Path(os.fsdecode(b"raw \xff"))
    run_folder(raw, 9, 1.0)
    (raw / "no.mp4").mkdir()
    (raw / "broken.mp4").symlink_to("nowhere")
    (raw / "large.mp4").write_bytes(b"0" * 2_000_001)
    arguments = ["runs", str(raw), "--html", "r.html", "--csv", "t.csv", "--json", "t.json", "--plot", "pictures"]
    assert main(arguments) == 0
    assert b"half \\ud800" in capfdbinary.readouterr().out
    page = (folder / "r.html").read_text(encoding="utf-8")
    assert "half \\ud800" in page and "raw \\udcff" in page
    assert 'href="raw%20%FF/large.mp4"' in page and "no.mp4" not in page and "broken.mp4" not in page
    svg = (folder / "pictures" / "Hopper-v5.svg").read_text(encoding="utf-8")
    assert {"a$x_{$ (1 run)", " _hidden (1 run)", r"half \ud800 (1 run)"} <= set(re.findall("<!-- (.*) -->", svg))


def test_environments_whose_names_become_the_same_have_pictures_of_their_own(folder: Path) -> None:
    for i, env_id in enumerate(("NS/E-v0", "NS_E-v0")):
        run_folder(folder / "two" / str(i), 0, 1.0, env_id=env_id)
    assert main(["two", "--plot", "pictures"]) == 0
    names = [f"NS_E-v0{number}.{kind}" for number in ("", "-2") for kind in ("png", "svg")]
    assert sorted(each.name for each in (folder / "pictures").iterdir()) == sorted(names)


def test_damaged_runs_are_one_line_each_and_the_others_go_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "runs" / "s1" / "config.json").write_text("{")
    assert main(["runs"]) == 0
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("warning: left out: ") and "s1/config.json is damaged" in line
    assert "policyflow  2 of 2" in captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: [NAME=]FOLDER"),
        (["nowhere"], "no such folder: got nowhere"),
        (["a=runs", "b=runs"], "runs/s0: got it as a and as b, expected one name for each run"),
        (["=runs"], "got =runs, expected NAME=FOLDER"),
        (["empty"], "no runs: got empty, expected folders of train.py"),
        (["runs", "ppo=empty"], "no runs: got empty, expected folders of train.py"),
        (["runs", "--title", "Mine"], "title: got Mine, which changes nothing without html"),
        (["runs", "--threshold", "nan"], "threshold: got nan, expected a finite number"),
        (["runs", "--html", "empty"], "html: got empty, expected a file"),
        (["runs", "--csv", "no/t.csv"], "csv: got no/t.csv, expected a file"),
        (["runs", "--plot", "runs/s0/config.json"], "plot: got the file"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty").mkdir()
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_a_folder_of_which_nothing_is_compared_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder(folder / "runs" / "other", 0, 1.0, env_id="HalfCheetah-v5")
    assert main(["runs", "ppo=logs", "--html", "r.html"]) == 2
    *warnings, error = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    says = "logs/s0 does not tell its environment; add --env ID"
    assert error == f"error: ppo=logs: got no run that can be compared; {says}"
    assert not (folder / "r.html").exists()
    assert main(["runs", "ppo=logs", "--env", "Hopper-v5"]) == 0


def test_a_folder_with_an_equals_sign_is_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "runs").rename(folder / "lr=3")
    assert main(["lr=3"]) == 0
    assert "policyflow  3 of 3" in capsys.readouterr().out


def test_neither_torch_nor_matplotlib_is_loaded(folder: Path) -> None:
    code = (
        "import sys; from driftrl.commands.compare import main; main(['runs', '--html', 'r.html']); "
        "print({'torch', 'matplotlib', 'stable_baselines3'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "set()"


@pytest.mark.slow
def test_the_example_of_the_page(tmp_path: Path) -> None:
    """The commands of docs/compare.md after the set-up, with fewer steps; `make train` was tried before."""
    run_folder(tmp_path / "runs" / "HalfCheetah-v5", 0, 1.0, env_id="HalfCheetah-v5")
    page = (ROOT / "docs" / "compare.md").read_text().partition("## Example")[2].partition("```python")[0]
    commands = re.findall(r"^    \.venv/bin/python (.*)$", page, flags=re.MULTILINE)
    assert commands == re.findall(r"^    \.venv/bin/python (.*)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    for command in commands:
        result = subprocess.run(
            [sys.executable, *f"{ROOT}/{command}".replace("30000", "4096").split()],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
    assert len(commands) == 3
    assert "InvertedPendulum-v5: return of the last evaluation, deterministic policy" in result.stdout
    assert "policyflow  3 of 3" in result.stdout and "ppo         3 of 3" in result.stdout
    assert (tmp_path / "report.html").stat().st_size > 20_000
