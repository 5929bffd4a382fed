"""The command line over a dataclass of defaults, by tyro, with errors of one line and numbers as people write them."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, get_args, get_type_hints

import tyro

from .errors import whole_number

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
        text = re.sub("[│╭╮╰╯]", "", box.getvalue())
        message = re.split("[─-]{5,}", text)[1].strip().removeprefix("Error parsing config: ")  # below the title
        wrong = next((flag for arg in args if (flag := arg.split("=")[0].replace("_", "-")) in _MEANT), None)
        meant = re.search(r"Perhaps you meant:\s*(--[\w-]+)", text)
        found = _MEANT[wrong] if wrong else meant[1] if meant else None
        hint = f"did you mean {found}? " if found else ""
        raise ValueError(f"{message.rstrip('.')}; {hint}see {program} --help-all") from None


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
