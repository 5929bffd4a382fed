"""Bad specifications are refused in one line that names the field, before anything is made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from driftrl.commands import sweep
from driftrl.sweeps.spec import Search
from driftrl.sweeps.study import trial_seed

GOOD: dict[str, Any] = {
    "folder": "out", "agent": "policyflow", "envs": ["InvertedPendulum-v5"], "seeds": [0, 1],
    "settings": {"n_envs": 1, "n_steps": 16, "batch_size": 16, "total_timesteps": 32, "device": "cpu"},
}  # fmt: skip
SEARCH = {"trials": 3, "pruner": "none", "space": {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}}}
RANGE = {"low": 1, "high": 2}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"agent": "ppo"}, "agent: got 'ppo', expected policyflow or mbpo"),
        ({"agent": None}, "agent: got None"),
        ({"envs": []}, "envs: got [], expected a list of Gymnasium ids"),
        ({"envs": ["NoSuchTask-v0"]}, "NoSuchTask"),
        ({"seeds": [0, 0]}, "seeds: got [0, 0]"),
        ({"seeds": [-1]}, "seeds: got -1"),
        ({"seed": 3}, "seed: unknown field; did you mean seeds?"),
        ({"jobs": 0}, "jobs: got 0, expected an integer of at least 1"),
        ({"retries": -1}, "retries: got -1"),
        ({"executor": "slurm"}, "executor: got 'slurm', expected local or ray"),
        ({"ray": {"cpus": 1}}, "ray: got it, but it changes nothing without executor: ray"),
        ({"executor": "ray", "ray": {"cpu": 1}}, "ray.cpu: unknown field; did you mean cpus?"),
        ({"executor": "ray", "ray": {"gpus": -1}}, "ray.gpus: got -1.0, expected a number of at least 0"),
        ({"executor": "ray", "ray": {"resources": {"tpu": "x"}}}, "ray.resources.tpu: got 'x', expected a number"),
        ({"settings": {"gama": 0.9}}, "settings.gama: unknown option; did you mean gamma?"),
        ({"settings": {"gamma": 3}}, "settings.gamma: got 3.0, expected a number in [0, 1]"),
        ({"settings": {"gamma": "much"}}, "settings.gamma: got 'much', expected a number"),
        ({"settings": {"seed": 1}}, "settings.seed: got it there, expected it as seeds of the sweep"),
        ({"settings": {"eval_episodes": 3}}, "settings.eval_episodes: got 3, which changes nothing without"),
        ({"settings": {"env_kwargs": {"no_such": 1}}}, "no_such"),
        ({"grid": {"gamma": 0.9}}, "grid.gamma: got 0.9, expected a list of values"),
        ({"grid": {"gamma": [0.9, 2]}}, "grid.gamma: got 2.0, expected a number in [0, 1]"),
        ({"grid": {"gamma": [0.9, "9e-1"]}}, "grid: got gamma=0.9 for InvertedPendulum-v5 twice"),
        ({"grid": {"n_envs": [1, 2]}}, "grid.n_envs: got it in settings, too; expected it once"),
        ({"grid": {"gamma": [0.9]}, "search": SEARCH}, "grid: got it beside search, expected one of them"),
        ({"search": {**SEARCH, "trials": 0}}, "search.trials: got 0, expected an integer of at least 1"),
        ({"search": {"space": SEARCH["space"]}}, "search.trials: got none"),
        ({"search": {"trials": 3}}, "search.space: got none"),
        ({"search": {**SEARCH, "pruner": "median"}}, "search.pruner: got median, which compares evaluations"),
        ({"search": {**SEARCH, "pruner_startup": 1}}, "search.pruner_startup: got 1, which changes nothing"),
        ({"search": {**SEARCH, "sampler": "grid"}}, "search.sampler: got 'grid', expected tpe or random"),
        ({"search": SEARCH, "envs": ["InvertedPendulum-v5", "Hopper-v5"]}, "envs: got 2 of them with search"),
        ({"search": {**SEARCH, "space": {"gamma": {"low": 1, "high": 0}}}}, "search.space.gamma: got low 1.0"),
        ({"search": {**SEARCH, "space": {"gamma": {"low": 0.5, "high": 1.5}}}}, "search.space.gamma: got 1.5"),
        ({"search": {**SEARCH, "space": {"gamma": {"high": 1}}}}, "search.space.gamma: got {'high': 1}, expected low"),
        (
            {"search": {**SEARCH, "space": {"n_epochs": {"low": 3, "high": 20, "step": 1.5}}}},
            "search.space.n_epochs.step: got 1.5, expected integers for this option",
        ),
        ({"search": {**SEARCH, "space": {"n_epochs": {"low": 3, "high": 9, "step": 0.5}}}}, "n_epochs.step: got 0.5"),
        (
            {"search": {**SEARCH, "space": {"gamma": {"low": 0, "high": 1, "step": float("inf")}}}},
            "gamma.step: got inf",
        ),
        ({"search": {**SEARCH, "space": {"n_epochs": {"low": 1.5, "high": 3}}}}, "search.space.n_epochs: got 1.5"),
        ({"search": {**SEARCH, "space": {"gamma": {"choices": []}}}}, "search.space.gamma: got [], expected a list"),
        ({"search": {**SEARCH, "space": {"gama": RANGE}}}, "search.space.gama: unknown option; did you mean gamma?"),
        ({"search": {**SEARCH, "space": {"gamma": {**RANGE, "log": True, "step": 1}}}}, "search.space.gamma.step"),
        ({"search": {**SEARCH, "space": {"gamma": {"low": 0, "high": 1, "log": True}}}}, "search.space.gamma.low"),
    ],
)
def test_a_bad_field_is_named_in_one_line(
    change: dict[str, Any],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {**GOOD["settings"], **change.get("settings", {})}
    Path("spec.yaml").write_text(yaml.safe_dump({**GOOD, **change, "settings": settings}))
    assert sweep.main(["spec.yaml"]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: spec.yaml: ")
    assert says in error
    assert error.count("\n") == 1
    assert not out
    assert [path.name for path in tmp_path.iterdir()] == ["spec.yaml"]


def test_options_of_the_command_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text(yaml.safe_dump({**GOOD, "grid": {"gamma": ["99e-2", 0.9]}}))
    assert sweep.main(["nothing.yaml"]) == 2
    assert sweep.main(["spec.yaml", "--jobs", "0"]) == 2
    assert "jobs: got 0" in capsys.readouterr().err
    assert sweep.main(["spec.yaml", "--dry-run"]) == 0
    assert [line.split("  ") for line in capsys.readouterr().out.splitlines()] == [
        ["out/InvertedPendulum-v5/policyflow/gamma=0.99", "0 of 2 runs complete"],
        ["out/InvertedPendulum-v5/policyflow/gamma=0.9", "0 of 2 runs complete"],
    ]


@pytest.mark.parametrize(("module", "change"), [("ray", {"executor": "ray"}), ("optuna", {"search": SEARCH})])
def test_a_missing_extra_is_one_line(
    module: str, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    Path("spec.yaml").write_text(yaml.safe_dump({**GOOD, **change}))
    assert sweep.main(["spec.yaml"]) == 2
    error = capsys.readouterr().err
    assert f"{module} is not installed; run pip install 'driftrl[sweep]'" in error
    assert error.count("\n") == 1


def test_the_seeds_of_two_searches_do_not_overlap() -> None:
    """Two searches of neighbouring seeds would else share all suggestions but one."""
    seeds = [trial_seed(Search(6, {}, seed=seed), count) for seed in range(50) for count in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert 0 <= min(seeds) and max(seeds) < 2**32


def test_a_search_that_is_over_says_that_nothing_is_left_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a search whose trials have all failed, too: nothing would be trained, without a word."""

    class Over:
        jobs: ClassVar[list[Any]] = []
        is_open, study = False, None

        def __init__(self, *arguments: Any) -> None: ...

        def look(self) -> None: ...

        def progress(self) -> str:
            return "2 of 2 trials over"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "StudySource", Over)
    monkeypatch.setattr(sweep, "format_study", lambda spec, study: "trials: 2 fail")
    Path("spec.yaml").write_text(yaml.safe_dump({**GOOD, "search": SEARCH}))
    assert sweep.main(["spec.yaml"]) == 0
    assert "nothing left to do: 2 of 2 trials over; failed trials are not tried again" in capsys.readouterr().out
