"""A comparison of runs as one HTML page that needs nothing else: its style, script and figures lie in the file.

The tables are plain HTML. `report.js` draws the curves from the JSON that the page holds.
"""

from __future__ import annotations

import base64
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from .. import __version__
from .comparison import WORDS, Group, Section, settings_table
from .comparison_tables import as_json, interval, iqm_of, level_of, number, reaching, until

_EMBED = 2_000_000
"""Bytes up to which a video is embedded; larger ones are linked."""
_EMBED_ALL = 20_000_000
"""Bytes of embedded videos in all."""
_KINDS = {".mp4": "video/mp4", ".webm": "video/webm", ".gif": "image/gif"}


def report_page(sections: Sequence[Section], problems: Sequence[str], path: Path, title: str) -> str:
    """The page.

    Args:
        sections: the environments.
        problems: what could not be read.
        path: where the page will lie; links to large videos are relative to it.
        title: of the page.
    """
    data = json.dumps(as_json(sections, problems), allow_nan=False).replace("<", "\\u003c")  # no </script> in it
    here = Path(__file__)
    room = _EMBED_ALL
    body = []
    for i, section in enumerate(sections):
        videos, room = _videos(section, path, room)
        body.append(_section(i, section, videos))
    head = f"{len(sections)} environment{'s' * (len(sections) != 1)}, {_count(sections)}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{here.with_name("report.css").read_text()}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="quiet">{head}; written {time.strftime("%Y-%m-%d %H:%M")} by driftrl {__version__}</p>
{_list("problems", "Could not be read", problems)}
{"".join(body)}
</main>
<script type="application/json" id="data">{data}</script>
<script>
{here.with_name("report.js").read_text()}</script>
</body>
</html>
"""


def _count(sections: Sequence[Section]) -> str:
    groups = [group for section in sections for group in section.groups]
    runs = sum(len(group.runs) for group in groups)
    return f"{len(groups)} group{'s' * (len(groups) != 1)}, {runs} run{'s' * (runs != 1)}"


def _section(i: int, section: Section, videos: str) -> str:
    level = level_of(section)
    heads = ["group", "runs", "IQM", "95 % interval", f"reached {level}", f"steps to {level}", f"seconds to {level}"]
    rows = [
        [
            _name(section, group), _runs(group), f"<b>{iqm_of(group)}</b>", interval(group.interval),
            reaching(group), until(group.steps), until(group.seconds),
        ]
        for group in section.groups
    ]  # fmt: skip
    chances = [
        [escape(better), escape(worse), f"{chance:.2f}", interval(bounds)]
        for (better, worse), (chance, bounds) in section.improvement.items()
    ]
    settings = [[escape(key), *map(escape, values)] for key, values in settings_table(section)]
    names = [escape(group.name) for group in section.groups]
    threshold = ""
    if not math.isnan(section.threshold):
        threshold = (
            f'<p class="quiet">Threshold {level}: {escape(section.threshold_note)}. Steps and wall seconds are medians '
            f"over runs until the {section.curve} return first reaches it.</p>"
        )
    dots = " Dots: evaluations of the deterministic policy." if section.curve == "training" else ""
    return f"""<section>
<h2>{escape(section.env)}</h2>
<p>Compared by the {WORDS[section.measure]}. IQM: interquartile mean over runs, with a 95 % bootstrap interval.</p>
{_table(heads, rows)}
{threshold}
<h3>Learning curves</h3>
<figure class="chart" data-section="{i}"><noscript>The curves need JavaScript; the tables do not.</noscript></figure>
<p class="quiet">Thin: every run, dashed if unfinished. Thick: IQM over complete runs, in its 95 % interval.{dots} Point
at a line for its values; press a name to hide its group.</p>
{_titled("Probability of improvement", _table(["group", "better than", "probability", "95 % interval"], chances))}
{_titled("Settings that differ", _table(["setting", *names], settings))}
<h3>Every run</h3>
{_table(["group", "run", "return", "steps", f"steps to {level}", "state", "folder"], _run_rows(section))}
{_versions(section)}
{videos}
{_list("notes", "Notes", section.notes)}
</section>
"""


def _name(section: Section, group: Group) -> str:
    return f'<span><i class="key" data-group="{section.groups.index(group)}"></i>{escape(group.name)}</span>'


def _runs(group: Group) -> str:
    counted, number_of = len(group.scores), len(group.runs)
    return str(counted) if counted == number_of else f"{counted} of {number_of}"


def _run_rows(section: Section) -> list[list[str]]:
    return [
        [
            _name(section, group), escape(run.record.label),
            number(run.score) if run.counts else f"({number(run.score)})", f"{run.record.steps:,}",
            until(run.reached[0]) if run.reached else "not reached",
            run.record.state if run.record.complete else f"<b>{run.record.state}</b>",
            f"<code>{escape(str(run.record.folder))}</code>",
        ]
        for group in section.groups
        for run in group.runs
    ]  # fmt: skip


def _versions(section: Section) -> str:
    """One line per group, or for all groups that have the same; a package with several versions names them all."""
    lines: dict[str, list[str]] = {}
    for group in section.groups:
        used = [run.record.versions for run in group.runs]
        packages = dict.fromkeys(key for each in used for key in each)
        found = [f"{key} {' and '.join(sorted({each[key] for each in used if key in each}))}" for key in packages]
        lines.setdefault(", ".join(found) or "not recorded", []).append(group.name)
    items = (f"<li>{escape(', '.join(names))}: {escape(versions)}</li>" for versions, names in lines.items())
    return f"<h3>Versions</h3>\n<ul>{''.join(items)}</ul>"


def _videos(section: Section, page: Path, room: int) -> tuple[str, int]:
    """The videos of a section's runs, and how many bytes more may be embedded."""
    found = []
    for group in section.groups:
        for run in group.runs:
            for path in run.record.videos:
                caption = f"<figcaption>{escape(f'{group.name}, {run.record.label}: {path.name}')}</figcaption>"
                size, kind = path.stat().st_size, _KINDS[path.suffix]
                if size > min(_EMBED, room):
                    link = quote(os.fsencode(os.path.relpath(path, page.resolve().parent).replace(os.sep, "/")))
                    found.append(f'<figure><a href="{link}">{size / 1e6:.1f} MB</a>{caption}</figure>')
                    continue
                room -= size
                source = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
                shown = (
                    f'<img alt="" src="{source}">'
                    if kind == "image/gif"
                    else f'<video controls src="{source}"></video>'
                )
                found.append(f"<figure>{shown}{caption}</figure>")
    return _titled("Videos", f'<div class="videos">{"".join(found)}</div>' if found else ""), room


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, whose cells name their column where a narrow screen stacks them; nothing where it has no rows."""
    if not rows:
        return ""
    top = "".join(f'<th scope="col">{head}</th>' for head in heads)
    lines = (
        "".join(f'<td data-label="{head}">{cell}</td>' for head, cell in zip(heads, row, strict=True)) for row in rows
    )
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _titled(title: str, content: str) -> str:
    return f"<h3>{title}</h3>\n{content}" if content else ""


def _list(kind: str, title: str, lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<div class="{kind}"><h3>{title}</h3><ul>{items}</ul></div>' if items else ""
