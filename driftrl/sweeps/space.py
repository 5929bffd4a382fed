"""The space of a search: options with ranges or choices, as Optuna and as runs know them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from ..agents.registry import AGENTS
from ..commands.arguments import Arguments
from .plan import Planned, check_runs, planned
from .spec import Dimension, Spec

TRIAL = "trial-"
"""How the names of trials' folders begin; their number follows."""


def distributions(spec: Spec) -> dict[str, Any]:
    """The space as Optuna's distributions, by option.

    Args:
        spec: of the sweep, with a search.
    """
    import optuna

    assert spec.search is not None
    hints = get_type_hints(Arguments) | get_type_hints(AGENTS[spec.agent].config)
    found: dict[str, Any] = {}
    for name, each in spec.search.space.items():
        if each.choices:
            found[name] = optuna.distributions.CategoricalDistribution([_choice(value) for value in each.choices])
        elif _is_integer(hints[name.replace("-", "_")], each):
            assert each.low is not None and each.high is not None
            step = int(each.step or 1)
            found[name] = optuna.distributions.IntDistribution(int(each.low), int(each.high), each.log, step)
        else:
            found[name] = optuna.distributions.FloatDistribution(each.low, each.high, each.log, each.step)
    return found


def _is_integer(hint: Any, each: Dimension) -> bool:
    kinds = {hint, *get_args(hint)}
    return int in kinds and float not in kinds


def _choice(value: Any) -> Any:
    """A choice as Optuna can store it: lists as text."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def trial_group(spec: Spec, number: int, params: Mapping[str, Any]) -> Planned:
    """The runs of a trial.

    Args:
        spec: of the sweep.
        number: of the trial.
        params: what Optuna suggested, by option.
    """
    assert spec.search is not None
    stored = {name: {_choice(value): value for value in each.choices} for name, each in spec.search.space.items()}
    chosen = {name: stored[name][value] if stored[name] else value for name, value in params.items()}
    return planned(spec, spec.envs[0], chosen, f"{TRIAL}{number:04}", "search.space")


def check_space(spec: Spec) -> None:
    """Refuse a space with a value that cannot be trained: both ends of each range and each choice are tried.

    Raises:
        ValueError: if one is outside its option's range, or changes nothing beside the others.
    """
    assert spec.search is not None
    space = {
        name: list(each.choices) or [_number(spec, name, name, end) for end in (each.low, each.high)]
        for name, each in spec.search.space.items()
    }
    for name, each in spec.search.space.items():
        if each.step is not None:
            _number(spec, name, f"{name}.step", each.step)
    first = {name: values[0] for name, values in space.items()}
    tried = [first, *({**first, name: value} for name, values in space.items() for value in values[1:])]
    for chosen in tried:
        group = planned(spec, spec.envs[0], chosen, "all", "search.space")
        text = ", ".join(f"{name}={value}" for name, value in chosen.items())
        check_runs([Planned(text, spec.folder / "no run", group.runs)], spec)


def _number(spec: Spec, name: str, field: str, value: float | None) -> float | int:
    assert value is not None
    hints = get_type_hints(Arguments) | get_type_hints(AGENTS[spec.agent].config)
    if _is_integer(hints[name.replace("-", "_")], Dimension()):
        if value != int(value):
            raise ValueError(f"{spec.path}: search.space.{field}: got {value}, expected integers for this option")
        return int(value)
    return value
