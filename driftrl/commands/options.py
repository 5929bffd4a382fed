"""The command line over a dataclass of defaults, by tyro, with errors of one line and numbers as people write them."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, get_args, get_type_hints

import tyro

from .errors import whole_number
from .help import expected

T = TypeVar("T")
_MEANT = {
    "--lr": "--learning-rate", "--timesteps": "--total-timesteps", "--steps": "--total-timesteps",
    "--envs": "--n-envs", "--num-envs": "--n-envs", "--epochs": "--n-epochs", "--entropy-coef": "--ent-coef",
    "--environment": "--env", "--env-id": "--env",
    "--sampler": "--langevin-eps", "--brownian": "--spread", "--brownian-coef": "--spread-coef",
    "--brownian-std": "--spread-std", "--guard": "--on-collapse", "--guard-drop": "--collapse-drop",
    "--pairing": "--robust-actions", "--horizon": "--rollout-min, --rollout-max, --rollout-start or --rollout-end",
}  # fmt: skip
"""What other programs, and earlier versions, call an option -> what it is here."""


def read_options(program: str, args: Sequence[str], defaults: T) -> T:
    """The command line over the defaults.

    Args:
        program: as the user calls it.
        args: what follows.
        defaults: a dataclass; its field `config` is one, too, whose fields are flags of their own.

    Raises:
        ValueError: if an option is unknown or its value is none, in one line with a hint.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(type(defaults), prog=program, args=_plain(args, defaults), default=defaults, add_help=False)
    except SystemExit as stop:
        if not stop.code:  # tyro wrote a shell's completions
            raise
        text = re.sub("[│╭╮╰╯|]", "", box.getvalue())  # or its likes in ASCII
        _, *lines = (line.strip() for line in text.strip().splitlines())
        parts = [
            " ".join(part) for rule, part in itertools.groupby(lines, lambda each: not set(each) - {*"─-"}) if not rule
        ]
        message = parts[0]  # below the title; what follows it is help
        message = _said_plainly(message.removeprefix("Error parsing config: ").rstrip("."), defaults)
        wrong = next((flag for arg in args if (flag := arg.split("=")[0].replace("_", "-")) in _MEANT), None)
        meant = re.search(r"Perhaps you meant:\s*(--[\w-]+)", text)
        found = _MEANT[wrong] if wrong else meant[1] if meant else None
        hint = f"did you mean {found}? " if found else ""
        raise ValueError(f"{message}; {hint}see {program} --help-all") from None


def _said_plainly(message: str, defaults: Any) -> str:
    """The message of a value that is none as ours are: "--seed: got abc, expected INT or None"."""
    flag = re.search(r"(?:parsing|for argument) '?(--[\w-]+)", message)
    given = re.search(r"\[(.*)\]$|: ('.*')$|choice ('.*') for|(Missing) value", message)
    if not flag or not given:
        return message.replace("Unrecognized options", "unknown options")
    name = flag[1].removeprefix("--").replace("-", "_")
    hints = {name: hint for each in (defaults.config, defaults) for name, hint in get_type_hints(type(each)).items()}
    quoted = " ".join(re.findall("'(.*?)'", given[0])) or "none"
    return f"{flag[1]}: got {quoted}, expected {' or '.join(expected(hints[name]))}"


def named_options(args: Sequence[str]) -> set[str]:
    """The fields whose options a command line names."""
    flags = [arg.split("=")[0].replace("-", "_") for arg in args if arg.startswith("--")]
    return {flag.removeprefix("__").removeprefix("no_") for flag in flags}


def _plain(args: Sequence[str], defaults: Any) -> list[str]:
    """The arguments, with integers like 1e6 or 1_000_000 written out where an option takes one."""
    flags = {f"--{name.replace('_', '-')}" for each in (defaults, defaults.config) for name in _integers(each)}
    found: list[str] = []
    for arg in args:
        flag, equals, value = arg.partition("=")
        if flag.replace("_", "-") in flags and equals:
            arg = f"{flag}={_written_out(value)}"
        elif found and found[-1].replace("_", "-") in flags:
            arg = _written_out(arg)
        found.append(arg)
    return found


def _integers(defaults: Any) -> Iterator[str]:
    for name, hint in get_type_hints(type(defaults)).items():
        if hint is int or (int in get_args(hint) and float not in get_args(hint)):
            yield name


def _written_out(text: str) -> str:
    with contextlib.suppress(ValueError, OverflowError):
        return str(whole_number(text))
    return text
