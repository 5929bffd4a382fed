"""The documentation site: what is wrong fails its build, and a browser shows it whole on a desk and on a phone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "oracles"))

from browser import BROWSER, look

pytestmark = pytest.mark.slow
pytest.importorskip("sphinx")
ROOT = Path(__file__).parents[1]
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


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_in_a_browser(source: Path, tmp_path: Path, page: str, width: int) -> None:
    site = source / "build" / "site"
    found = look(site / f"{page}.html", PROBE, tmp_path, width)
    assert found["errors"] == [] and found["foreign"] == [] and found["broken"] == 0
    assert found["images"] == {"index": 2, "docs/policyflow": 1, "docs/reference/agents": 0}[page]
    assert found["width"] == width and found["needed"] <= width, "the page scrolls sideways"
    assert found["smallest"] >= 12
    wide = width == 1280
    assert (found["pages"], found["menu"], found["after"]) == (wide, not wide, True), "the list of pages"
