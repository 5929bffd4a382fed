"""`--config FILE`: options of `train.py AGENT` from YAML or JSON, or from the config.json of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, get_type_hints

from ..agents.registry import AGENTS
from ..runs.fields import fitted
from ..runs.kinds import is_group
from .arguments import Arguments

_OF_A_RUN = {"versions", "git", "resumed", "demonstrations_digest"}
"""What a run's config.json records and no option sets."""


@dataclass(frozen=True)
class ConfigFile:
    """What a file sets.

    Args:
        path: of the file; None where there is none.
        agent: its agent, None if it names none.
        run: options of the run, by the fields of `Arguments`.
        fields: fields of the agent's Config.
        is_of_a_run: whether a run wrote it. Then it holds all options, and one that flags leave without effect goes
            back to its default, as one of a preset does.
    """

    path: Path | None = None
    agent: str | None = None
    run: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_of_a_run: bool = False

    @property
    def chosen(self) -> set[str]:
        """The names that somebody wrote down, so that they have to mean something."""
        return set() if self.is_of_a_run else {*self.run, *self.fields}

    @contextlib.contextmanager
    def blamed(self, flags: Collection[str] = ()) -> Iterator[None]:
        """Name the file in a ValueError about something that it sets, and that no flag sets after it."""
        try:
            yield
        except ValueError as error:
            name = str(error).partition(":")[0]
            if name in flags or name not in {*self.run, *self.fields}:
                raise
            raise ValueError(f"{self.path}: {error}") from None


def read_config_file(path: Path, agent: str | None) -> ConfigFile:
    """Read options from a file, or from the config.json of a run folder. Nothing in it is executed.

    Args:
        path: what the user gave.
        agent: the agent that the command names; None: the file does.

    Raises:
        ValueError: if there is none, it cannot be read, or a key or a value is none of this agent's, in one line.
    """
    given = path
    if given.is_dir():
        path = given / "config.json"
    if is_group(given):
        one = next(iter(sorted(given.glob("*/config.json"))), given / "s0" / "config.json").parent
        raise ValueError(f"config: got {given}, a group of runs, expected one of them, such as {one}")
    if not path.is_file():
        raise ValueError(f"config: got {given}, expected a .yaml or .json file, or a run folder; check the path")
    return options_of(read_names(path), path, agent)


def options_of(data: dict[str, Any], path: Path, agent: str | None) -> ConfigFile:
    """The options that names and values stand for.

    Args:
        data: what a file holds, by name.
        path: of the file, for errors.
        agent: the agent that the command names; None: the data do.

    Raises:
        ValueError: if a key or a value is none of this agent's, in one line.
    """
    data = dict(data)
    named = data.pop("agent", None)
    if named is not None and not (isinstance(named, str) and named in AGENTS):
        raise ValueError(f"{path}: agent: got {named!r}, expected {' or '.join(AGENTS)}")
    if named and agent and named != agent:
        raise ValueError(f"{path}: agent: got {named}, but the command is for {agent}; name one of them")
    if named is None and agent is None:
        raise ValueError(f"{path}: agent: got none, expected {' or '.join(AGENTS)}, there or in the command")
    is_of_a_run = "versions" in data
    nested = data.pop("config", {})
    if not isinstance(nested, dict):
        raise ValueError(f"{path}: config: got {nested!r}, expected names with values")
    if both := sorted(nested.keys() & data.keys(), key=str):
        raise ValueError(f"{path}: {both[0]}: got it twice, expected it in config or beside it")
    run_hints = get_type_hints(Arguments)
    del run_hints["config"]
    hints = get_type_hints(AGENTS[agent or str(named)].config)
    run: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    try:
        options = AGENTS[agent or str(named)].upgraded({**data, **nested})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for key, value in options.items():
        name = "env" if key == "env_id" else str(key).replace("-", "_")
        if is_of_a_run and name in _OF_A_RUN:
            continue
        if name not in run_hints and name not in hints:
            near = difflib.get_close_matches(name, [*run_hints, *hints], 1)
            hint = f"did you mean {near[0]}?" if near else "train.py AGENT --help-all lists them"
            raise ValueError(f"{path}: {key}: unknown key; {hint}")
        if name in run or name in fields:
            raise ValueError(f"{path}: {key}: got it twice, as {name} in two spellings; expected it once")
        try:
            if name in hints:
                fields[name] = fitted(name, value, hints[name])
            elif name == "env_kwargs" and isinstance(value, dict):
                run[name] = (_as_json(name, value),)
            else:
                run[name] = fitted(name, value, run_hints[name])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return ConfigFile(path, agent or named, run, fields, is_of_a_run)


def _as_json(name: str, value: Any) -> str:
    try:
        return json.dumps(value)
    except TypeError as error:  # of a date, which YAML knows and JSON does not
        raise ValueError(f"{name}: got {value}, expected what JSON can say ({error}); put text in quotes") from None


def read_names(path: Path) -> dict[str, Any]:
    """The names and values of a JSON or YAML file.

    Raises:
        ValueError: if it is none, or a name stands there twice.
    """
    try:
        with path.open(encoding="utf-8") as file:
            data = _read_json(file) if path.suffix == ".json" else _read_yaml(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: no {'JSON' if path.suffix == '.json' else 'YAML'} that we can read: {error}"
        ) from None
    if data is None:
        raise ValueError(f"{path}: the file is empty, expected names with values, such as gamma: 0.99")
    if not isinstance(data, dict):
        kind = "a list" if isinstance(data, list) else repr(data)
        raise ValueError(f"{path}: got {kind}, expected names with values, such as gamma: 0.99")
    return data


def _read_json(file: IO[str]) -> Any:
    """The content of a JSON file; None where it is empty, as of YAML."""
    text = file.read()
    return json.loads(text, object_pairs_hook=_once) if text.strip() else None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of pairs, each name once."""
    _check_once([name for name, _ in pairs])
    return dict(pairs)


def _check_once(names: list[Any]) -> None:
    """Refuse equal names; json and yaml would keep the last of them without a word."""
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(f"{name} stands there twice")


def _read_yaml(file: IO[str]) -> Any:
    """The content of a YAML file: plain data, no objects."""
    import yaml  # costs some 20 ms, which only those pay who use it

    checked: list[Any] = []

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # it ships no types
        def flatten_mapping(self, node: Any) -> None:
            if node not in checked:  # what is merged (`<<`) comes to stand in the node, and its own names win
                checked.append(node)
                own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
                _check_once([self.construct_object(key, deep=True) for key in own])
            super().flatten_mapping(node)

    try:
        return yaml.load(file, Loader)  # a SafeLoader
    except (yaml.YAMLError, LookupError, AttributeError, TypeError) as error:  # the last three of `!!bool x`, say
        raise ValueError(" ".join(str(error).split())) from None
