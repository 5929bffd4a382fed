"""Several runs in one table, with the interquartile mean over runs that differ in their seed only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .statistics import bootstrap_interval, interquartile_mean

MODES = ("deterministic", "sampled")


class Row(NamedTuple):
    """A run in the table.

    Args:
        name: what the table calls it.
        report: of `evaluate_modes`, None where there is none.
        note: what the row says beside its report, or in place of it.
    """

    name: str
    report: dict[str, Any] | None
    note: str = ""


def over_runs(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """IQM of the runs' mean returns with a 95 % bootstrap interval, by mode; each run counts once."""
    found: dict[str, Any] = {"runs": len(reports)}
    for mode in (mode for mode in MODES if all(mode in report for report in reports)):
        means = [report[mode]["mean"] for report in reports]
        low, high = bootstrap_interval(means, interquartile_mean, rng=np.random.default_rng(0))
        found[mode] = {"iqm": float(interquartile_mean(means)), "iqm_low": low, "iqm_high": high}
    return found


def format_runs(head: str, rows: Sequence[Row], summaries: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """A row for each run with its mean returns, and one for each summary of `over_runs`."""
    reports = [row.report for row in rows if row.report is not None]
    modes = [mode for mode in MODES if reports and all(mode in report for report in reports)]
    lines = [([head, "steps", *modes], "")]
    for row in rows:
        cells = [row.name]
        if row.report is not None:
            cells += [f"{row.report['timesteps']:,}", *(f"{row.report[mode]['mean']:.1f}" for mode in modes)]
        lines.append((cells, row.note))
    for name, summary in summaries:
        intervals = (format_interval(summary[mode]) for mode in modes)
        lines.append(([name, f"IQM of {summary['runs']} [95 %]", *intervals], ""))
    columns = range(2 + len(modes))
    widths = [max(len(cells[i]) for cells, _ in lines if i < len(cells)) for i in columns]
    return "\n".join(
        "  ".join([f"{cells[0]:{widths[0]}}", *map(str.rjust, cells[1:], widths[1:]), note]).rstrip()
        for cells, note in lines
    )


def format_interval(summary: dict[str, float]) -> str:
    """An IQM with its interval, of `over_runs`."""
    return f"{summary['iqm']:.1f} [{summary['iqm_low']:.1f}, {summary['iqm_high']:.1f}]"
