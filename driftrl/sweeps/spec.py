"""What a sweep is: its file, read and checked."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from ..agents.registry import AGENTS
from ..commands.arguments import Arguments
from ..commands.config_file import read_names
from ..runs.fields import fitted

T = TypeVar("T")
_OWN = {
    "agent": "agent", "env": "envs", "env_id": "envs", "seed": "seeds", "seeds": "seeds", "jobs": "jobs",
    "run_dir": "folder", "config": "settings",
}  # fmt: skip
"""Options of a run that the sweep itself gives -> the field of the sweep that does."""


@dataclass(frozen=True)
class Dimension:
    """Values that a search may choose for one option: a range, or a list of choices."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Search:
    """An Optuna search in place of a grid."""

    trials: int
    space: Mapping[str, Dimension]
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["median", "none"] = "median"
    pruner_startup: int = 5
    seed: int = 0


@dataclass(frozen=True)
class RayOptions:
    """A Ray cluster and what a run needs of it."""

    address: str = "auto"
    cpus: float = 1.0
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Spec:
    """A sweep.

    Args:
        path: of its file.
        folder: where its runs lie.
        agent: its agent.
        envs: Gymnasium ids.
        seeds: one run each.
        settings: options of all runs, by the names of `train.py --config`.
        grid: options with several values each; all combinations are trained.
        search: in place of a grid.
        executor: where runs train.
        jobs: runs at a time; None: 1 here, and on a cluster as many as it has room for.
        retries: how many times a run is started again after its process was killed.
        ray: the cluster.
    """

    path: Path
    folder: Path
    agent: str
    envs: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    search: Search | None = None
    executor: Literal["local", "ray"] = "local"
    jobs: int | None = None
    retries: int = 3
    ray: RayOptions | None = None


def read_spec(path: Path) -> Spec:
    """Read a sweep from a YAML or JSON file. Nothing in it is executed.

    Raises:
        ValueError: if there is none, or a field is unknown, missing or outside its range, in one line that names it.
    """
    if not path.is_file():
        raise ValueError(f"got {path}, expected the .yaml or .json file of a sweep; check the path")
    data = read_names(path)
    try:
        return _spec(path, data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _spec(path: Path, data: dict[str, Any]) -> Spec:
    data = {"folder": f"runs/{path.stem}", **data}
    parts = {name: _names(name, data.pop(name, {})) for name in ("settings", "grid")}
    search = _search(_names("search", data.pop("search"))) if "search" in data else None
    ray = _made(RayOptions, "ray.", _names("ray", data.pop("ray"))) if "ray" in data else None
    for name in ("envs", "seeds"):
        if isinstance(data.get(name), str | int):
            data[name] = [data[name]]
    hints = get_type_hints(Spec)
    known = ("folder", "agent", "envs", "seeds", "executor", "jobs", "retries")
    _check_names("", data, (*known, *parts, "search", "ray"))
    missing = next((name for name in ("agent", "envs", "seeds") if name not in data), None)
    if missing:
        raise ValueError(f"{missing}: got none, expected {_EXPECTED[missing]}")
    fields = {name: fitted(name, value, hints[name]) for name, value in data.items()}
    grid = {name: _values(name, values) for name, values in parts["grid"].items()}
    spec = Spec(path=path, settings=parts["settings"], grid=grid, search=search, ray=ray, **fields)
    _check(spec)
    return spec


_EXPECTED = {
    "agent": " or ".join(AGENTS),
    "envs": "a list of Gymnasium ids",
    "seeds": "a list of different integers of 0 .. 2**31 - 1",
}


def _check(spec: Spec) -> None:
    """Refuse what the parts do not say alone."""
    if spec.agent not in AGENTS:
        raise ValueError(f"agent: got {spec.agent!r}, expected {_EXPECTED['agent']}")
    for name in ("envs", "seeds"):
        values = getattr(spec, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name}: got {list(values)}, expected {_EXPECTED[name]}, each once")
    if wrong := [seed for seed in spec.seeds if not 0 <= seed < 2**31]:
        raise ValueError(f"seeds: got {wrong[0]}, expected {_EXPECTED['seeds']}")
    _at_least("jobs", spec.jobs, 1)
    _at_least("retries", spec.retries, 0)
    if spec.search is not None and spec.grid:
        raise ValueError("grid: got it beside search, expected one of them")
    if spec.search is not None and len(spec.envs) > 1:
        raise ValueError(
            f"envs: got {len(spec.envs)} of them with search, expected one: returns of several have no mean"
        )
    places = {"settings": spec.settings, "grid": spec.grid, "search.space": spec.search.space if spec.search else {}}
    options = {*get_type_hints(Arguments), *get_type_hints(AGENTS[spec.agent].config)}
    where: dict[str, str] = {}
    for place, names in places.items():
        for raw in names:
            name = raw.replace("-", "_")
            if name in _OWN:
                raise ValueError(f"{place}.{raw}: got it there, expected it as {_OWN[name]} of the sweep")
            if name not in options:
                near = difflib.get_close_matches(name, options - _OWN.keys(), 1)
                hint = f"did you mean {near[0]}?" if near else f"train.py {spec.agent} --help-all lists them"
                raise ValueError(f"{place}.{raw}: unknown option; {hint}")
            if name in where:
                raise ValueError(f"{place}.{raw}: got it in {where[name]}, too; expected it once")
            where[name] = place
    if (
        spec.search
        and spec.search.pruner != "none"
        and "eval_interval" not in {name.replace("-", "_") for name in where}
    ):
        raise ValueError(
            "search.pruner: got median, which compares evaluations while training; add eval_interval to settings, or "
            "choose none"
        )


def _search(data: dict[str, Any]) -> Search:
    space = {name: _dimension(name, value) for name, value in _names("search.space", data.get("space", {})).items()}
    if not space:
        raise ValueError("search.space: got none, expected options, each with low and high, or with choices")
    if "trials" not in data:
        raise ValueError("search.trials: got none, expected an integer of at least 1")
    search = _made(Search, "search.", {**data, "space": None}, {"space": space})
    _at_least("search.trials", search.trials, 1)
    _at_least("search.pruner_startup", search.pruner_startup, 0)
    if not 0 <= search.seed < 2**31:
        raise ValueError(f"search.seed: got {search.seed}, expected an integer of 0 .. 2**31 - 1")
    if search.pruner == "none" and "pruner_startup" in data:
        raise ValueError(f"search.pruner_startup: got {search.pruner_startup}, which changes nothing without pruner")
    return search


def _dimension(name: str, value: Any) -> Dimension:
    where = f"search.space.{name}"
    data = _names(where, value)
    if "choices" in data:
        if len(data) > 1:
            raise ValueError(f"{where}: got choices beside {' '.join(data.keys() - {'choices'})}, expected one of them")
        return Dimension(choices=_values(name, data["choices"], where))
    found = _made(Dimension, f"{where}.", data)
    if found.low is None or found.high is None:
        raise ValueError(f"{where}: got {data}, expected low and high, or choices")
    if not (math.isfinite(found.low) and math.isfinite(found.high) and found.low < found.high):
        raise ValueError(f"{where}: got low {found.low} and high {found.high}, expected low below high")
    if found.step is not None and (not 0 < found.step < math.inf or found.log):
        raise ValueError(f"{where}.step: got {found.step}, expected a number above 0, and no log beside it")
    if found.log and found.low <= 0:
        raise ValueError(f"{where}.low: got {found.low}, expected a number above 0 where log is true")
    return found


def _made(cls: type[T], prefix: str, data: dict[str, Any], ready: Mapping[str, Any] | None = None) -> T:
    """A dataclass of values that the file holds; those of `ready` are read already."""
    hints = get_type_hints(cls)
    assert dataclasses.is_dataclass(cls)
    _check_names(prefix, data, [each.name for each in dataclasses.fields(cls)])
    fields: dict[str, Any] = {}
    for name, value in data.items():
        if ready and name in ready:
            fields[name] = ready[name]
        elif name == "resources":
            amounts = _names(prefix + name, value)
            fields[name] = {key: fitted(f"{prefix}{name}.{key}", each, float) for key, each in amounts.items()}
        else:
            fields[name] = fitted(prefix + name, value, hints[name])
    found: Any = cls(**fields)
    for name in ("cpus", "gpus"):
        if not 0 <= getattr(found, name, 0) < math.inf:
            raise ValueError(f"{prefix}{name}: got {getattr(found, name)}, expected a number of at least 0")
    return found  # type: ignore[no-any-return]  # of what dataclasses.is_dataclass says


def _check_names(prefix: str, data: Mapping[str, Any], known: Any) -> None:
    for name in data:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(known)}"
            raise ValueError(f"{prefix}{name}: unknown field; {hint}")


def _names(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name}: got {value!r}, expected names with values")
    return value


def _values(name: str, value: Any, where: str | None = None) -> tuple[Any, ...]:
    where = where or f"grid.{name}"
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: got {value!r}, expected a list of values")
    if any(each in value[:i] for i, each in enumerate(value)):
        raise ValueError(f"{where}: got {value}, expected each value once")
    return tuple(value)


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"{name}: got {value}, expected an integer of at least {least}")
