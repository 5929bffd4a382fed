"""The report page: whole in itself, true to the comparison, drawn and hovered in a real browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))

from browser import BROWSER, look

from driftrl.analysis.comparison import compare
from driftrl.analysis.comparison_tables import as_json
from driftrl.analysis.logs import Curve
from driftrl.analysis.records import Record
from driftrl.analysis.report import report_page

SCRIPT = Path(__file__).parents[2] / "driftrl" / "analysis" / "report.js"
EVIL = "</script><script>alert(1)</script>"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Two groups of three seeds, the last run unfinished; one has a small video and one that is too large."""
    folder = tmp_path_factory.mktemp("runs")
    for name, size in (("small.mp4", 10), ("large clip.mp4", 2_000_001)):
        (folder / name).write_bytes(b"0" * size)
    steps, found = np.linspace(1000, 20_000, 20), []
    for i, agent in enumerate(("policyflow", "ppo")):
        for seed in range(3):
            line = Curve(steps, steps / 100 * (i + 1) + seed, steps / 1000)
            found.append(Record(
                folder / f"{agent}-{seed}", agent, "InvertedPendulum-v5", seed, {"note": EVIL, "gamma": 0.9 + 0.05 * i},
                {"training": line}, float(line.returns[-1]), 20_000, (i, seed) != (1, 2),
                versions={"torch": "2.13"}, videos=tuple(folder.glob("*.mp4")) if (i, seed) == (0, 0) else (),
            ))  # fmt: skip
    return found


@pytest.fixture(scope="module")
def page(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    sections, problems = compare(records)
    path.write_text(report_page(sections, [*problems, f"broken {EVIL}"], path, "Title & more"), encoding="utf-8")
    return path


class Reader(HTMLParser):
    """Collects the page's tags, whether they are closed, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text[self.open[-1]] = self.text.get(self.open[-1], "") + data


@pytest.fixture(scope="module")
def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    reader.close()
    return reader


def test_the_page_is_well_formed_and_asks_for_nothing(read: Reader, page: Path) -> None:
    assert read.open == []
    sources = [value for _, key, value in read.attributes if key in ("src", "href", "srcset", "poster", "action")]
    assert sorted(source.partition(",")[0].rpartition("/")[2] for source in sources) == [
        "large%20clip.mp4", "mp4;base64",
    ]  # fmt: skip
    assert ("meta", "content", "width=device-width, initial-scale=1") in read.attributes
    code = page.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")  # the name of a language
    assert not re.search(r"https?://|@import|fetch\(|XMLHttpRequest|import\(", code)
    assert "alert" not in {tag for tag, _, _ in read.attributes} and code.count("<script") == 2


def test_the_page_holds_the_comparison(read: Reader, records: list[Record]) -> None:
    assert read.text["title"] == "Title & more" and read.text["h2"] == "InvertedPendulum-v5"
    cells = read.text["td"] + read.text["span"]
    for words in ("policyflow", "201", "[200, 202]", "gamma", "0.95", "seed 2", "20,000", "not reached"):
        assert words in cells
    assert read.text["b"].count("unfinished") == 1
    assert "torch 2.13" in read.text["li"] and f"broken {EVIL}" in read.text["li"]
    embedded = json.loads(read.text["script"].partition('\n"use strict"')[0])
    sections, _ = compare(records)
    assert embedded["sections"] == json.loads(json.dumps(as_json(sections, [])["sections"]))


def test_nothing_of_a_run_is_read_as_html(tmp_path: Path) -> None:
    evil = "<i>evil"
    line = Curve(np.array([1.0, 2.0]), np.array([0.0, 1.0]), np.array([1.0, 2.0]))
    records = [
        Record(
            Path(f"{evil}-{i}"), f"{evil}{i}", evil, None, {evil: f"{evil}{i}"}, {"training": line}, float(i), 2, True,
            versions={evil: evil}, notes=(evil,),
        )
        for i in range(2)
    ]  # fmt: skip
    sections, problems = compare(records)
    text = report_page(sections, [*problems, evil], tmp_path / "r.html", evil)
    assert sections[0].improvement and sections[0].differing == [evil]
    assert evil not in text
    for place in ("<h1>", "<h2>", "<title>", "<code>", "<li>"):
        assert f"{place}&lt;i&gt;evil" in text


def test_videos_are_linked_once_the_page_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("driftrl.analysis.report._EMBED_ALL", 15)
    videos = tuple(tmp_path / f"{name}.mp4" for name in "ab")
    for video in videos:
        video.write_bytes(b"0" * 10)
    run = Record(tmp_path, "ppo", "Hopper-v5", 0, {}, {}, 1.0, 2, True, videos=videos)
    sections, _ = compare([run])
    text = report_page(sections, [], tmp_path / "r.html", "")
    assert text.count("data:video/mp4;base64,") == 1
    assert text.count('href="b.mp4"') == 1 and 'href="a.mp4"' not in text


@pytest.mark.skipif(shutil.which("node") is None, reason="no node on this machine")
def test_the_script_finds_the_point_under_the_pointer(read: Reader) -> None:
    code = """
      const data = process.argv[1];
      globalThis.document = { getElementById: () => ({ textContent: data }), querySelectorAll: () => [] };
      const make = new Function(process.argv[2] + "; return { lines, nearest, scales, describe, ticks, short };");
      const { lines, nearest, scales, describe, ticks, short } = make();
      const section = JSON.parse(data).sections[0], all = lines(section), scale = scales(all, section.threshold, 400);
      const found = nearest(all, scale, scale.x(5000) + 1, scale.y(102) - 1);
      console.log(JSON.stringify([all.length, describe(found.line, found.point), ticks(0, 1, 4), short(200000)]));
    """
    data = read.text["script"].partition('\n"use strict"')[0]
    result = subprocess.run(["node", "-e", code, data, SCRIPT.read_text()], capture_output=True, text=True, check=True)
    lines, words, ticks, short = json.loads(result.stdout)
    assert lines == 14  # six runs, the evaluations of each, two means
    assert words == ["ppo, seed 2", "step 5,000, 5 s", "return 102"]
    assert ticks == [0, 0.5, 1] and short == "200k"


PROBE = """<script>
const errors = [];
window.addEventListener("error", (event) => errors.push(event.message));
window.addEventListener("load", () => setTimeout(() => {
  const svg = document.querySelector(".chart svg"), box = svg.getBoundingClientRect();
  const axis = [...svg.querySelectorAll("text")].map((each) => each.textContent);
  const last = [...svg.querySelectorAll("path")].pop().getBoundingClientRect();
  const at = { clientX: last.right, clientY: last.top, bubbles: true };
  svg.dispatchEvent(new PointerEvent("pointermove", at));
  const tip = document.querySelector(".tip"), lines = () => svg.querySelectorAll("path[fill=none]").length;
  const found = { errors, axis, tip: tip.innerText, tipHidden: tip.hidden, before: lines() };
  const [tipBox, figure] = [tip, svg.parentNode].map((each) => each.getBoundingClientRect());
  found.tipInside = tipBox.left >= figure.left - 1 && tipBox.right <= figure.right + 1;
  found.tipBeside = tipBox.top >= box.top - 1 && tipBox.bottom <= box.bottom + 1 && tipBox.top - last.top < 100;
  document.querySelectorAll(".legend button")[1].click();
  found.after = lines();
  document.querySelectorAll(".legend button")[0].click();
  found.none = lines();
  found.width = innerWidth;
  found.needed = document.documentElement.scrollWidth;
  const sizes = [...document.querySelectorAll("main *")].map((each) => parseFloat(getComputedStyle(each).fontSize));
  found.smallest = Math.min(...sizes);
  const colors = getComputedStyle(document.body);
  Object.assign(found, { ground: colors.backgroundColor, text: colors.color });
  parent.postMessage(JSON.stringify(found), "*");
}, 100));
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    found = look(page, PROBE, tmp_path, width, dark)
    assert found["errors"] == [] and found["width"] == width
    assert found["needed"] <= width, "the page scrolls sideways"
    assert found["smallest"] >= 12
    assert {"environment steps", "return while training", "20k"} <= set(found["axis"])
    assert not found["tipHidden"] and found["tipInside"] and found["tipBeside"]
    assert found["tip"].split("\n") == ["ppo, IQM", "step 20,000", "return 400.5"]
    assert (found["before"], found["after"], found["none"]) == (8, 4, 0)
    brightness = [sum(map(int, re.findall(r"\d+", found[key])[:3])) for key in ("ground", "text")]
    assert (brightness[0] < brightness[1]) == dark
