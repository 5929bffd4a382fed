"""`train.py ... | head`: where nobody reads the output any longer, commands end quietly and keep what was learned."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))

from run_differences import differences

from driftrl.runs.folder import load_agent

ROOT = Path(__file__).parents[2]
TRAIN = [
    str(ROOT / "train.py"), "policyflow", "--env", "InvertedPendulum-v5", "--n-envs", "2", "--n-steps", "32",
    "--batch-size", "64", "--n-epochs", "1", "--compile", "off", "--device", "cpu", "--seed", "0",
    "--total-timesteps", "640",
]  # fmt: skip


def read_lines(command: list[str], lines: int, folder: Path) -> tuple[int, str]:
    """Run a command and close its output after some lines; returns exit code and what it wrote to stderr."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    for _ in range(lines):
        process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    return process.wait(), error


def test_training_is_saved_where_its_output_is_closed(tmp_path: Path) -> None:
    code, error = read_lines(TRAIN, 4, tmp_path)  # three that describe the run, one with its folder
    assert code == 141
    (run,) = (path.parent for path in tmp_path.rglob("config.json"))
    assert error.startswith("output closed at ") and f"kept {run.relative_to(tmp_path)}" in error
    assert error.count("\n") == 1
    assert 0 < load_agent(run, "cpu").num_timesteps < 640

    resumed = subprocess.run(
        [sys.executable, TRAIN[0], "--resume", str(run)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "all restored: as if it had not been interrupted" in resumed.stdout
    subprocess.run([sys.executable, *TRAIN, "--run-dir", "whole"], cwd=tmp_path, capture_output=True, check=True)
    (whole,) = (path.parent for path in (tmp_path / "whole").rglob("config.json"))
    assert differences(whole, run) == []


@pytest.mark.parametrize("command", ["train.py policyflow --help-all", "evaluate.py --help", "train.py --version"])
def test_help_ends_quietly_where_nobody_reads_it(command: str, tmp_path: Path) -> None:
    script, *options = command.split()
    code, error = read_lines([str(ROOT / script), *options], 0, tmp_path)
    assert code in (0, 141)  # argparse's own help takes no notice
    assert error == ""
