"""The script that runs Stable-Baselines3's tests, on a few of our own in their place; its reasons are in the page."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TESTS = """
import pytest
from stable_baselines3 import A2C, PPO, SAC

@pytest.mark.parametrize("kind", [A2C, PPO, SAC])
def test_params(kind):
    assert kind.__module__.startswith(("stable" if kind is A2C else "driftrl"))

def test_body():
    PPO("MlpPolicy", "CartPole-v1", n_steps=16)  # becomes Pendulum-v1

def test_wrong():
    assert PPO("MlpPolicy", "Pendulum-v1") is None

def test_of_another():
    A2C("MlpPolicy", "Nowhere-v0")
"""


@pytest.mark.slow
def test_only_tests_of_the_stand_ins_run_and_a_failure_ends_the_script_with_an_error(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_few.py").write_text(TESTS)
    command = [sys.executable, str(ROOT / "benchmarks" / "sb3_tests.py"), "--tests", "tests", "--select", "test"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--output", "out.json"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "1 tests end otherwise than expected" in result.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["PPO"]["passed"] == ["test_few.py::test_body", "test_few.py::test_params[PolicyFlow]"]
    assert list(found["PPO"]["failed"]) == ["test_few.py::test_wrong"]
    assert found["SAC"]["passed"] == ["test_few.py::test_params[LipschitzMBPO]"]


def test_the_page_names_each_reason() -> None:
    page = " ".join((ROOT / "docs" / "sb3.md").read_text().split())
    lists = runpy.run_path(str(ROOT / "benchmarks" / "sb3_test_exceptions.py"))
    excepted = {why for cases in lists["EXCEPTIONS"].values() for _, why in cases}
    reasons = excepted | {why for *_, why in lists["CHANGES"]}
    assert len(reasons) > 20
    assert {why for why in reasons if why not in page} == set()
