"""The help of `train.py AGENT`: flags in groups, each with its default, from the fields of dataclasses.

tyro sorts flags by the dataclass they come from, and cannot group the fields of one dataclass. So this module writes
the help; tyro still reads the command line.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import re
import shutil
import sys
import textwrap
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

LEGEND = "Each flag stands with its default; where | separates values, the first is the default."
_LEFT_COLUMN = 28  # widest flag that has its text beside it
_WIDTHS = (60, 120)


@dataclass(frozen=True)
class Option:
    """A flag as the help shows it.

    Args:
        name: the flag with its default and what else may be given, `--solver euler|midpoint`.
        text: what it means.
    """

    name: str
    text: str


def grouped(groups: Mapping[str, Iterable[str]], fields: Iterable[str]) -> dict[str, list[str]]:
    """The fields by group, those of no group in a last one, "other"; names that are no field are left out."""
    left = list(fields)
    found: dict[str, list[str]] = {}
    for title, names in groups.items():
        found[title] = [name for name in names if name in left]
        left = [name for name in left if name not in found[title]]
    return {title: names for title, names in (found | {"other": left}).items() if names}


def options(instance: Any) -> dict[str, Option]:
    """The flags of a dataclass by field name; the instance's values are the defaults."""
    hints, texts = get_type_hints(type(instance)), field_docstrings(type(instance))
    found = {}
    for field in dataclasses.fields(instance):
        default, text, flag = getattr(instance, field.name), texts.get(field.name, ""), field.name.replace("_", "-")
        if hints[field.name] is bool:
            found[field.name] = Option(f"--[no-]{flag}", f"{text} Default: {'on' if default else 'off'}.".strip())
        else:
            found[field.name] = Option(f"--{flag} {_values(hints[field.name], default)}", text)
    return found


def field_docstrings(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass, its base classes' included; none where there is no source."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(each):
            continue
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        except OSError:
            continue
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


def format_help(
    head: str,
    sections: Mapping[str, Iterable[Option]],
    foot: str,
    *,
    width: int | None = None,
    bold: bool | None = None,
) -> str:
    """A page of help.

    Args:
        head: text above the groups, line by line.
        sections: flags by the title of their group.
        foot: text below them.
        width: columns of the page; None: as the terminal, 60 to 120, and 100 where there is none.
        bold: whether titles and flags are bold; None: on a terminal, without NO_COLOR.
    """
    if width is None:
        least, most = _WIDTHS
        width = min(max(shutil.get_terminal_size((100, 24)).columns, least), most)
    if bold is None:
        bold = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    flags = [option for group in sections.values() for option in group]
    column = 4 + max((len(each.name) for each in flags if len(each.name) <= _LEFT_COLUMN), default=0)
    lines = [part for line in head.splitlines() for part in textwrap.wrap(line, width) or [""]]
    for title, group in sections.items():
        lines += ["", _bold(f"{title}:", bold)]
        for option in group:
            first, *more = _layout(option, column, width)
            lines += [first.replace(option.name, _bold(option.name, bold), 1), *more]
    return "\n".join([*lines, "", *textwrap.wrap(foot, width, break_on_hyphens=False)])


def _layout(option: Option, column: int, width: int) -> list[str]:
    """The lines of a flag: its text beside it in a column; where that takes three, below it; or behind it."""

    def wrap(text: str, first: str, indent: int) -> list[str]:
        bound = first + re.sub("(>=?) ", "\\1\xa0", text)  # keeps a bound's sign and number in one line
        lines = textwrap.wrap(bound, width, subsequent_indent=" " * indent, break_on_hyphens=False)
        return [line.replace("\xa0", " ") for line in lines]

    name = f"  {option.name}"
    if not option.text:
        return [name]
    ways = [wrap(option.text, name.ljust(column), column)] if len(name) + 2 <= column else []
    ways.append([name, *wrap(option.text, " " * 6, 6)])
    if len(name) < width - 20:
        ways.append(wrap(option.text, f"{name}  ", 6))
    return next((way for way in ways if len(way) <= 2), min(ways, key=len))


def _bold(text: str, on: bool) -> str:
    return f"\033[1m{text}\033[0m" if on else text


def _values(hint: Any, default: Any) -> str:
    """The default, then what else may be given: the other choices, None, and kinds as FLOAT where it is none."""
    fixed, kinds = _alternatives(hint)
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    if shown in fixed:
        return "|".join([shown, *(each for each in fixed if each != shown), *kinds])
    return "|".join([shown or f"[{'|'.join(kinds)}]", *fixed])


def expected(hint: Any) -> list[str]:
    """What a field of this type takes: values that stand for themselves, and kinds as INT."""
    fixed, kinds = _alternatives(hint)
    return [*kinds, *fixed]


def _alternatives(hint: Any) -> tuple[list[str], list[str]]:
    """Values that stand for themselves, and the kinds of others, that a field of this type takes."""
    parts = get_args(hint)
    if hint is types.NoneType:
        return ["None"], []
    if get_origin(hint) is Literal:
        return [str(each) for each in parts], []
    if get_origin(hint) in (Union, types.UnionType):
        both = [_alternatives(each) for each in parts]
        return [each for fixed, _ in both for each in fixed], [each for _, kinds in both for each in kinds]
    if get_origin(hint) is tuple:
        return [], [" ".join("..." if each is ... else _kind(each) for each in parts)]
    return [], [_kind(hint)]


def _kind(hint: Any) -> str:
    return str(getattr(hint, "__name__", hint)).upper()
