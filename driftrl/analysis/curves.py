"""Pictures of learning curves, PNG and SVG; needs the extra `plot`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .comparison import WORDS, Section
from .comparison_tables import printable


def draw_curves(sections: Sequence[Section], folder: Path) -> list[Path]:
    """Write <environment>.png and .svg: every run thin, unfinished ones dashed, the IQM thick in its 95 % interval.

    Args:
        sections: the environments; those without curves are left out.
        folder: where the pictures are written; made if it does not exist.

    Returns:
        The files written.

    Raises:
        ValueError: if matplotlib is missing.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plot: matplotlib is not installed; run pip install 'driftrl[plot]'") from error
    written = []
    for section in sections:
        curves = [run.record.curves.get(section.curve) for group in section.groups for run in group.runs]
        last = max((float(curve.steps[-1]) for curve in curves if curve), default=0.0)
        if not last:
            continue
        unit, word = (1e6, "million ") if last >= 1e6 else (1e3, "thousand ") if last >= 1e4 else (1.0, "")
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        for i, group in enumerate(section.groups):
            color = f"C{i}" if len(section.groups) <= 10 else colormaps["turbo"](i / (len(section.groups) - 1))
            for run in group.runs:
                if curve := run.record.curves.get(section.curve):
                    style = "-" if run.record.complete else "--"
                    width, alpha = (1.2, 1.0) if group.mean is None else (0.7, 0.5)
                    axes.plot(curve.steps / unit, curve.returns, style, color=color, linewidth=width, alpha=alpha)
                if section.curve == "training" and (points := run.record.evaluations()):
                    steps, returns = np.array(points).T
                    axes.plot(steps / unit, returns, "o", color=color, markersize=2.5, alpha=0.7)
            if group.mean is not None:
                steps, middle, low, high = group.mean.T
                axes.fill_between(steps / unit, low, high, color=color, alpha=0.15, linewidth=0)
                axes.plot(steps / unit, middle, color=color, linewidth=2)
            number = len(group.runs)
            axes.plot(
                [], [], color=color, linewidth=2, label=_plain(f"{group.name} ({number} run{'s' * (number > 1)})")
            )
        axes.set(title=_plain(section.env), xlabel=f"{word}environment steps", ylabel=WORDS[section.curve])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        folder.mkdir(parents=True, exist_ok=True)
        name = plain = re.sub(r"[^\w.=-]+", "_", section.env)
        for i in itertools.count(2):
            if folder / f"{name}.png" not in written:
                break
            name = f"{plain}-{i}"  # NS/E-v0 and NS_E-v0
        for path in (folder / f"{name}.png", folder / f"{name}.svg"):
            figure.savefig(path, dpi=110)
            written.append(path)
    return written


def _plain(text: str) -> str:
    """Text that matplotlib shows as it is: no formula between dollars, no hidden label, only what UTF-8 can say."""
    shown = printable(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
