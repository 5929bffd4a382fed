"""How Sphinx builds the documentation site: `make docs`.

The source folder is the root of the checkout, so that a link of a page goes to the same file on the site as on GitHub.
Every page is named in NAVIGATION; a page that is missing there fails the build.
"""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphinx.util.logging import getLogger

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout is documented, not another installed version

from driftrl import __version__  # noqa: E402

LOGGER = getLogger(__name__)
NAVIGATION = {
    "Begin": ["docs/choose", "docs/commands", "docs/compare", "docs/faq"],
    "How to": [
        "docs/howto/environment", "docs/howto/network", "docs/howto/resume", "docs/demonstrations", "docs/export",
        "docs/gpu", "docs/sweep", "docs/sb3",
    ],
    "Agents": ["docs/policyflow", "docs/flow_ratios", "docs/lipschitz_mbpo", "docs/multimodal"],
    "Below the agents": ["docs/dynamics", "docs/solvers", "docs/recipes", "docs/checkpoints", "docs/performance"],
    "Reference": ["docs/reference/agents", "docs/reference/envs", "docs/reference/dynamics"],
    "Project": ["CHANGELOG", "CONTRIBUTING"],
    "Notes on trials": [
        "benchmarks/notes/policyflow", "benchmarks/notes/flow_ratios", "benchmarks/notes/lipschitz_mbpo",
        "benchmarks/notes/multimodal", "benchmarks/notes/performance",
    ],
}  # fmt: skip
PUBLIC = ("driftrl", "driftrl.dynamics", "driftrl.envs")
"""Packages whose __all__ the reference must hold."""

project, author, release = "DriftRL", "The DriftRL authors", __version__
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/**", "benchmarks/notes/*.md"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
myst_heading_anchors = 4  # the anchors that GitHub gives to headings
highlight_language = "text"  # indented blocks: commands, tables of a terminal

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "undoc-members": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # else fields of a dataclass stand in the index twice
default_role = "literal"  # what docstrings put between single backticks
nitpick_ignore_regex = [
    # Other libraries: their pages would have to be fetched to be linked.
    ("py:.*", r"(abc|collections|gymnasium|io|numpy|os|pathlib|stable_baselines3|torch|typing)\..*"),
    ("py:class", r"driftrl\..*\.(_\w+|Bound|BoxPolicy|Pretraining|Self)"),  # ours, of the inner parts
    # Names that a module imports for its annotations only: autodoc sees their text.
    ("py:exc", "RankError"),  # likewise
    ("py:class", r"Array|BasePolicy|FlowPolicy|GymEnv|KnownStep|MaybeCallback|Rule"),
    ("py:class", r"SACPolicy|Schedule|Tensor|TransitionModel"),
]

html_theme = "pydata_sphinx_theme"
html_title = "DriftRL"
html_theme_options: dict[str, Any] = {
    "navbar_center": [], "navbar_persistent": ["search-button-field"], "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": ["page-toc"], "show_toc_level": 2, "navigation_with_keys": False,
    "footer_start": [], "footer_end": [],
}  # fmt: skip
html_sidebars = {"**": ["globaltoc.html"]}  # all pages on the left; the theme's own shows a section
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False


def add_navigation(app: Sphinx, name: str, content: list[str]) -> None:
    """Put the table of pages under the README, which GitHub shows without it."""
    if name == root_doc:
        trees = "\n\n".join(
            "\n".join([f"```{{toctree}}\n:hidden:\n:caption: {caption}\n", *(f"/{page}" for page in pages), "```"])
            for caption, pages in NAVIGATION.items()
        )
        content[0] += f"\n\n{trees}\n"


def check_public_names(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn, which fails the build, where a public name is not in the reference."""
    documented = env.domains.python_domain.objects
    names = {package: importlib.import_module(package).__all__ for package in PUBLIC}
    missing = [
        f"{package}.{name}"
        for package, public in names.items()
        for name in public
        if not name.endswith("__") and not any(re.fullmatch(rf"{package}\.(\w+\.)?{name}", each) for each in documented)
    ]
    if missing:
        LOGGER.warning("docs/reference/ does not have the public names %s", ", ".join(missing))


def check_docstring(app: Sphinx, kind: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Warn, which fails the build, where something in the reference has no docstring."""
    if kind in ("module", "class", "exception", "function", "method", "property") and not any(lines):
        LOGGER.warning("%s: a public %s without a docstring", name, kind)


def keep_sentences(app: Sphinx, kind: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Take the docstrings of attributes as they stand: napoleon takes what precedes a colon there for a type."""
    if kind in ("attribute", "data", "property"):
        if name in sentences:
            lines[:] = sentences.pop(name)
        else:
            sentences[name] = list(lines)


sentences: dict[str, list[str]] = {}


def begin_at_index(app: Sphinx, exception: Exception | None) -> None:
    """The README is the first page of the site."""
    if exception is None and app.builder.name == "html":
        shutil.copy(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def setup(app: Sphinx) -> None:
    """Connect the above."""
    app.connect("source-read", add_navigation)
    app.connect("env-check-consistency", check_public_names)
    app.connect("autodoc-process-docstring", check_docstring)
    for priority in (400, 600):  # before and after napoleon
        app.connect("autodoc-process-docstring", keep_sentences, priority)
    app.connect("build-finished", begin_at_index)
