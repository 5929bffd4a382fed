"""Compare runs, ours and those of Stable-Baselines3: `python compare.py runs ppo=logs/ppo --html report.html`."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .. import __version__
from ..agents.storage.files import all_or_nothing, write_json
from ..analysis.comparison import Section, compare
from ..analysis.comparison_tables import as_json, csv_rows, format_section, printable
from ..analysis.curves import draw_curves
from ..analysis.records import find_records
from ..analysis.report import report_page
from .errors import Parser, check_installed, fail, output_closed, until_output_closes

_TITLE = "Comparison of runs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 2 for bad input, or 141 where nobody reads its output."""
    return until_output_closes(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> int:
    usage = "%(prog)s [NAME=]FOLDER ... [options]"
    parser = Parser(
        prog=Path(sys.argv[0]).name, usage=usage, description="Compare the runs in some folders, however deep. Runs "
        "that differ in their seed alone are one group. Logs of Stable-Baselines3 and rl_zoo3 are read as well.",
    )  # fmt: skip
    parser.add_argument(
        "folders", nargs="+", metavar="[NAME=]FOLDER", help="run folder, or folder that holds some; with NAME its runs "
        "are one group of that name",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"driftrl {__version__}")
    parser.add_argument(
        "--measure", choices=("evaluation", "training"), help="the return to compare (default: that of the last "
        "evaluation where every run has one, else that while training)",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=float, metavar="R", help="return whose first time is reported (default: the lowest of "
        "the groups' median last returns while training)",
    )  # fmt: skip
    parser.add_argument("--env", metavar="ID", help="environment of logs that do not tell it")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a report, one page that needs no network")
    parser.add_argument("--title", help=f"of the report (default: {_TITLE})")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="also write learning curves, .png and .svg")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table as CSV, a row per group")
    parser.add_argument("--json", metavar="FILE", help="also write all results as JSON; - for stdout, and nothing else")
    try:
        return _compare(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        if output_closed():
            raise
        return fail(error)
    except KeyboardInterrupt:
        return 130


def _compare(args: argparse.Namespace) -> int:
    if args.threshold is not None and not math.isfinite(args.threshold):
        raise ValueError(f"threshold: got {args.threshold}, expected a finite number")
    if args.title is not None and args.html is None:
        raise ValueError(f"title: got {args.title}, which changes nothing without html")
    files = {"html": args.html, "csv": args.csv, "json": None if args.json in (None, "-") else Path(args.json)}
    for option, path in files.items():
        if path is not None:
            _check_target(option, path)
    if args.plot:
        check_installed("plot", "plot", "matplotlib")
        if args.plot.is_file():
            raise ValueError(f"plot: got the file {args.plot}, expected a folder")
    places = {text: _place(text) for text in args.folders}
    found = find_records(list(places.values()))
    sections, unassigned = compare(found.records, args.threshold, args.measure, args.env)
    problems = found.problems + unassigned
    for problem in problems:
        print(f"warning: left out: {problem}", file=sys.stderr)
    shown = [run.record.folder.resolve() for section in sections for group in section.groups for run in group.runs]
    for text, (_, place) in places.items():
        if not any(folder.is_relative_to(place.resolve()) for folder in shown):
            raise ValueError(f"{text}: got no run that can be compared; {problems[0] if problems else 'name others'}")
    if args.json == "-":
        print(json.dumps(as_json(sections, problems), indent=2, allow_nan=False))
    else:
        print(printable("\n\n\n".join(map(format_section, sections))), flush=True)
    written = _write(sections, problems, files, args)
    if written:
        print(printable(f"\nwrote {', '.join(map(str, written))}"), file=sys.stderr if args.json == "-" else sys.stdout)
    return 0


def _place(text: str) -> tuple[str | None, Path]:
    """A folder, and the name of its group where one is given: ppo=logs/ppo."""
    name, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        return None, Path(text)
    if not name or not path:
        raise ValueError(f"got {text}, expected NAME=FOLDER")
    return name, Path(path)


def _check_target(option: str, path: Path) -> None:
    """Refuse a file that could not be written, before anything is read."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{option}: got {path}, expected a file in an existing folder that can be written to")


def _write(
    sections: Sequence[Section], problems: Sequence[str], files: dict[str, Path | None], args: argparse.Namespace
) -> list[Path]:
    """Write what was asked for; returns the files."""
    written = [path for path in files.values() if path is not None]
    if files["html"]:
        _write_text(files["html"], report_page(sections, problems, files["html"], args.title or _TITLE))
    if files["csv"]:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(csv_rows(sections))
        _write_text(files["csv"], text.getvalue())
    if files["json"]:
        write_json(files["json"], as_json(sections, problems))
    return written + (draw_curves(sections, args.plot) if args.plot else [])


def _write_text(path: Path, text: str) -> None:
    with all_or_nothing(path) as partial_file:
        partial_file.write_text(printable(text), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
