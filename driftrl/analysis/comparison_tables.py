"""A comparison of runs as text, as rows of a CSV file, as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from .comparison import WORDS, Group, Section, settings_table
from .logs import thinned

COLUMNS = (
    "environment", "group", "measure", "runs", "runs_counted", "iqm", "iqm_low", "iqm_high", "each_run",
    "threshold", "runs_reaching_threshold", "steps_to_threshold", "seconds_to_threshold",
)  # fmt: skip
"""Of the CSV file; a cell is empty where there is no number, `inf` where half of the runs never reach the threshold."""


_WIDEST = 120
"""Characters of the table of settings, above which groups are numbered in it."""


def printable(text: str) -> str:
    """Text with escapes in place of what UTF-8 cannot say: bytes of file names, halves of characters in JSON."""
    return text.encode("utf-8", "backslashreplace").decode()


def number(value: float | None) -> str:
    """A return for readers: four digits, or all before the point."""
    if value is None or math.isnan(value):
        return "-" if value is None else "nan"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def level_of(section: Section) -> str:
    """The threshold, for readers."""
    return "the threshold" if math.isnan(section.threshold) else number(section.threshold)


def iqm_of(group: Group) -> str:
    """The IQM of a group, for readers."""
    return number(group.iqm if group.scores else None)


def interval(bounds: tuple[float, float] | None) -> str:
    """An interval for readers."""
    return f"[{number(bounds[0])}, {number(bounds[1])}]" if bounds else "-"


def each_run(group: Group) -> str:
    """The returns of a group's runs; those that do not count in parentheses."""
    return ", ".join(number(run.score) if run.counts else f"({number(run.score)})" for run in group.runs)


def until(value: float, unit: str = "") -> str:
    """Median steps or seconds to the threshold, for readers."""
    if math.isnan(value):
        return "-"
    return "not reached" if math.isinf(value) else f"{value:,.0f}{unit}"


def reaching(group: Group) -> str:
    """How many complete runs reach the threshold, of how many."""
    complete = [run for run in group.runs if run.record.complete]
    if math.isnan(group.steps):
        return "-"
    return f"{sum(run.reached is not None for run in complete)} of {len(complete)}"


def format_section(section: Section) -> str:
    """One environment's tables, for a terminal."""
    level = level_of(section)
    heads = ["group", "runs", "IQM", "95 % interval", "each run", f"reached {level}", "steps to it", "seconds to it"]
    names = [group.name for group in section.groups]
    columns = [[key, *values] for key, values in settings_table(section)]
    settings = _aligned([["setting that differs", *names], *columns]) if columns else ""
    if len(settings.partition("\n")[0]) > _WIDEST:  # numbers in place of names, which are settings themselves
        numbers = [f"({i})" for i in range(1, len(names) + 1)]
        settings = _aligned([["setting that differs", *numbers], *columns])
        names = [" ".join(both) for both in zip(numbers, names, strict=True)]
    rows = [
        [
            name, f"{len(group.scores)} of {len(group.runs)}", iqm_of(group), interval(group.interval),
            each_run(group), reaching(group), until(group.steps), until(group.seconds),
        ]
        for name, group in zip(names, section.groups, strict=True)
    ]  # fmt: skip
    parts = [f"{section.env}: {WORDS[section.measure]}", _aligned([heads, *rows])]
    if not math.isnan(section.threshold):
        parts.append(f"threshold {level}: {section.threshold_note}; medians over runs, of the {section.curve} return")
    if section.improvement:
        lines = [
            f"{better} > {worse}: {chance:.2f} {interval(bounds) if bounds else ''}".rstrip()
            for (better, worse), (chance, bounds) in section.improvement.items()
        ]
        parts.append("\n".join(["probability of improvement [95 %]:", *(f"  {line}" for line in lines)]))
    if settings:
        parts.append(settings)
    return "\n\n".join([*parts, "\n".join(f"note: {note}" for note in section.notes)]).rstrip()


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def csv_rows(sections: Iterable[Section]) -> list[list[Any]]:
    """The rows of the CSV file, one per group, with COLUMNS on top."""
    rows: list[list[Any]] = [list(COLUMNS)]
    for section in sections:
        for group in section.groups:
            low, high = group.interval or ("", "")
            rows.append([
                section.env, group.name, section.measure, len(group.runs), len(group.scores), _cell(group.iqm), low,
                high, " ".join(map(repr, group.scores)), _cell(section.threshold),
                sum(run.reached is not None for run in group.runs if run.record.complete),
                _cell(group.steps), _cell(group.seconds),
            ])  # fmt: skip
    return rows


def _cell(value: float) -> float | str:
    return "" if math.isnan(value) else value


def as_json(sections: Sequence[Section], problems: Sequence[str]) -> dict[str, Any]:
    """All of a comparison as JSON knows it: null stands for a number that is not there or not finite."""
    return {"sections": [_section(each) for each in sections], "problems": list(problems)}


def _section(section: Section) -> dict[str, Any]:
    pairs = section.improvement.items()
    return {
        "env": section.env,
        "measure": section.measure,
        "curve": section.curve,
        "threshold": _finite(section.threshold),
        "threshold_note": section.threshold_note,
        "groups": [_group(group, section) for group in section.groups],
        "improvement": [
            {"better": better, "than": worse, "probability": chance, "interval": bounds}
            for (better, worse), (chance, bounds) in pairs
        ],
        "differing": list(section.differing),
        "notes": list(section.notes),
    }


def _group(group: Group, section: Section) -> dict[str, Any]:
    return {
        "name": group.name,
        "iqm": _finite(group.iqm),
        "interval": group.interval,
        "steps_to_threshold": _finite(group.steps),
        "seconds_to_threshold": _finite(group.seconds),
        "settings": json.loads(json.dumps(dict(group.settings)), parse_constant=str),  # "NaN": JSON has no such number
        "mean": None if group.mean is None else _short(group.mean.tolist()),
        "runs": [
            {
                "label": run.record.label,
                "seed": run.record.seed,
                "folder": str(run.record.folder),
                "score": _finite(run.score),
                "counts": run.counts,
                "complete": run.record.complete,
                "state": run.record.state,
                "steps": run.record.steps,
                "steps_to_threshold": run.reached and _finite(run.reached[0]),
                "seconds_to_threshold": run.reached and _finite(run.reached[1]),
                "versions": dict(run.record.versions),
                "curve": _curve(run.record.curves.get(section.curve)),
                "evaluations": _short(run.record.evaluations()) if section.curve == "training" else [],
            }
            for run in group.runs
        ],
    }


def _curve(curve: Any) -> list[list[float | None]]:
    """Points (step, return, seconds)."""
    if curve is None:
        return []
    few = thinned(curve)
    return _short(list(zip(few.steps.tolist(), few.returns.tolist(), few.seconds.tolist(), strict=True)))


def _short(rows: Iterable[Iterable[float]]) -> list[list[float | None]]:
    """Numbers with six digits, all before the point: the page holds thousands of them."""
    return [
        [None if not math.isfinite(x) else round(x) if abs(x) >= 1e6 else float(f"{x:.6g}") for x in row]
        for row in rows
    ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
