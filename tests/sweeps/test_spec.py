"""Bad specifications are refused in one line that names the field, before anything is made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from driftrl.commands import sweep
from driftrl.sweeps.cluster import Cluster
from driftrl.sweeps.plan import begin, check_runs, grid
from driftrl.sweeps.spec import RayOptions, Search, read_spec
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


def test_a_rays_cluster_may_be_chosen_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    Path("spec.yaml").write_text(yaml.safe_dump({**GOOD, "ray": {"cpus": 2}}))
    assert sweep.main(["spec.yaml"]) == 2
    assert "spec.yaml: ray: got it, but it changes nothing without executor: ray" in capsys.readouterr().err
    assert sweep.main(["spec.yaml", "--executor", "ray"]) == 2
    assert "executor: ray is not installed" in capsys.readouterr().err


class Ray:
    """A cluster of two machines that are alive, as `ray.nodes` tells of it."""

    def __init__(self) -> None:
        machines: list[tuple[bool, dict[str, float]]] = [
            (True, {"CPU": 4.0, "GPU": 1.0}), (True, {"CPU": 7.0}), (False, {"CPU": 64.0, "GPU": 8.0})
        ]  # fmt: skip
        self.machines = [{"Alive": alive, "Resources": resources} for alive, resources in machines]
        self.is_connected = False

    def init(self, **_: Any) -> None:
        self.is_connected = True

    def shutdown(self) -> None:
        self.is_connected = False

    def nodes(self) -> list[dict[str, Any]]:
        return self.machines

    def remote(self, **_: Any) -> Any:
        return lambda function: function


def test_a_cluster_has_room_for_whole_runs_on_single_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", ray := Ray())
    for options, room in (
        (RayOptions(cpus=2), 5), (RayOptions(cpus=3), 3), (RayOptions(gpus=0.5), 2), (RayOptions(cpus=0), 1)
    ):  # fmt: skip
        with Cluster(options, None, 0) as cluster:
            assert cluster.at_a_time == room
    with Cluster(RayOptions(cpus=2), 1, 0) as cluster:
        assert cluster.at_a_time == 1
    for options, says in (
        (RayOptions(cpus=8), "a run needs 8 CPU; no machine has that, the most of each is 7 CPU"),
        (RayOptions(cpus=5, gpus=1), "a run needs 5 CPU, 1 GPU; no machine has that, the most of each is 7 CPU, 1 GPU"),
        (RayOptions(resources={"fast": 1}), "a run needs 1 CPU, 1 fast; no machine has that"),
    ):
        with pytest.raises(ValueError, match=f"^ray: {says}"), Cluster(options, 1, 0):
            pass
        assert not ray.is_connected


def test_more_steps_are_added_and_other_settings_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def groups(seeds: list[int], **settings: Any) -> Any:
        data = {**GOOD, "seeds": seeds, "grid": {"gamma": [0.9]}, "settings": {**GOOD["settings"], **settings}}
        Path("spec.yaml").write_text(yaml.safe_dump(data))
        spec = read_spec(Path("spec.yaml"))
        return grid(spec), spec

    ours, _ = groups([0], total_timesteps=1000)
    begin(ours[0])
    for settings in ({"total_timesteps": 2000}, {"total_timesteps": 2_000_000}):  # the default interval is another one
        check_runs(*groups([0, 1], **settings))
    for settings, says in (
        ({"total_timesteps": 500}, "total_timesteps 1000, the sweep says 500"),
        ({"total_timesteps": 2000, "checkpoint_interval": 50}, "checkpoint_interval 100, the sweep says 50"),
        ({"total_timesteps": 1000, "checkpoint_interval": 50}, "checkpoint_interval 100, the sweep says 50"),
        ({"total_timesteps": 1000, "n_epochs": 3}, "n_epochs 10, the sweep says 3"),
    ):
        found, spec = groups([0], **settings)
        with pytest.raises(ValueError, match=says):
            check_runs(found, spec)
        with pytest.raises(ValueError, match=says):  # as a trial of a search does, whose settings come one by one
            begin(found[0])


def test_a_search_does_not_take_the_runs_of_another_for_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text(yaml.safe_dump({**GOOD, "search": SEARCH}))
    pytest.importorskip("optuna")
    assert sweep.main(["spec.yaml", "--dry-run"]) == 0
    assert capsys.readouterr().out == "out  0 of 3 trials over; space: learning_rate; 2 runs each\n"
    assert not Path("out").exists()
    assert sweep.main(["spec.yaml"]) == 0
    capsys.readouterr()
    assert sweep.main(["spec.yaml", "--dry-run"]) == 0
    assert capsys.readouterr().out == "out  3 of 3 trials over; space: learning_rate; 2 runs each\n"
    Path("out/study.journal").rename("elsewhere")
    for options in ([], ["--dry-run"], []):
        assert sweep.main(["spec.yaml", *options]) == 2
        error = capsys.readouterr().err
        assert "trial-0000 is of a search whose study.journal is gone; choose another folder, or move out away" in error
    Path("elsewhere").rename("out/study.journal")
    Path("spec.yaml").write_text(yaml.safe_dump({**GOOD, "seeds": [0, 1, 2], "search": SEARCH}))
    assert sweep.main(["spec.yaml", "--dry-run"]) == 2
    assert "was begun with [0, 1]; choose another folder, or move out away" in capsys.readouterr().err


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
