"""The documentation site: what is wrong fails its build, and a browser shows it whole on a desk and on a phone."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
pytest.importorskip("sphinx")
ROOT = Path(__file__).parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PAGES = ("index", "docs/policyflow", "docs/reference/agents")


def build(source: Path) -> subprocess.CompletedProcess[str]:
    """What `make docs` does, in another folder."""
    command = [sys.executable, "-m", "sphinx", "-q", "-n", "-W", "--keep-going", "-b", "html", "-c", "docs"]
    command += [".", "build/site", "-d", "build/doctrees"]
    return subprocess.run(
        command, cwd=source, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the pages, with links to the packages, and the site built of it."""
    folder = tmp_path_factory.mktemp("site")
    for name in ("docs", "benchmarks/notes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "CITATION.cff"):
        shutil.copy(ROOT / name, folder)
    for name in ("driftrl", "agents", "envs", "dynamics"):
        (folder / name).symlink_to(ROOT / name)
    result = build(folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize(
    ("page", "old", "new", "message"),
    [
        ("docs/faq.md", "(compare.md)", "(compares.md)", "compares.md"),
        ("docs/faq.md", "(policyflow.md#numbers-", "(policyflow.md#number-", "number-that-are-not-finite"),
        ("docs/reference/envs.rst", ".. autofunction:: driftrl.envs.make_vec\n", "", "driftrl.envs.make_vec"),
    ],
    ids=["page", "heading", "name"],
)
def test_what_leads_nowhere_fails_the_build(source: Path, page: str, old: str, new: str, message: str) -> None:
    text = (source / page).read_text()
    assert old in text
    (source / page).write_text(text.replace(old, new))
    result = build(source)
    (source / page).write_text(text)
    assert result.returncode != 0 and message in result.stderr


PROBE = """<script>
const errors = [];
window.addEventListener("error", (event) => errors.push(String(event.message || event.target.src)), true);
const all = (query) => [...document.querySelectorAll(query)];
const shown = (query) => all(query).some((each) => each.checkVisibility({ checkVisibilityCSS: true }));
window.addEventListener("load", () => setTimeout(() => {
  const images = all("article img"), named = performance.getEntriesByType("resource").map((each) => each.name);
  const found = { errors, width: innerWidth, needed: document.documentElement.scrollWidth, images: images.length };
  found.broken = images.filter((each) => !each.naturalWidth).length;
  const text = all("article p, article li, article td, article code");
  found.smallest = Math.min(...text.map((each) => parseFloat(getComputedStyle(each).fontSize)));
  found.foreign = named.filter((name) => !name.startsWith("file:"));
  Object.assign(found, { pages: shown("#pst-primary-sidebar li a"), menu: shown(".primary-toggle") });
  if (found.menu) document.querySelector(".primary-toggle").click();
  found.after = found.pages || all("#pst-primary-sidebar-modal[open] li a").length > 10;
  parent.postMessage(JSON.stringify(found), "*");
}, 300));
</script>"""
FRAME = """<!DOCTYPE html><body><iframe src="{page}" style="border:0;width:{width}px;height:900px"></iframe>
<script>
addEventListener("message", (event) => {{
  const shown = document.createElement("pre");
  shown.textContent = event.data;
  document.body.append(shown);
}});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_in_a_browser(source: Path, tmp_path: Path, page: str, width: int) -> None:
    site = source / "build" / "site"
    path = site / f"{page}.html"
    probed = path.with_name(f"probed-{path.name}")
    probed.write_text(path.read_text(encoding="utf-8").replace("<head>", f"<head>{PROBE}", 1), encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.format(page=probed.as_uri(), width=width))
    found = look(tmp_path / "frame.html")
    assert found["errors"] == [] and found["foreign"] == [] and found["broken"] == 0
    assert found["images"] == {"index": 2, "docs/policyflow": 1, "docs/reference/agents": 0}[page]
    assert found["width"] == width and found["needed"] <= width, "the page scrolls sideways"
    assert found["smallest"] >= 12
    wide = width == 1280
    assert (found["pages"], found["menu"], found["after"]) == (wide, not wide, True), "the list of pages"


def look(frame: Path) -> dict[str, Any]:
    """What the script that is added to a page tells of it."""
    assert BROWSER is not None
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--allow-file-access-from-files", "--window-size=1400,1000", f"--user-data-dir={frame.with_name('profile')}",
        "--virtual-time-budget=8000", "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    match = re.search(r"<pre>(.*?)</pre>", shown, flags=re.DOTALL)
    assert match, shown
    found: dict[str, Any] = json.loads(html.unescape(match[1]))
    return found
