"""eval.json of a run: the evaluation after training. Read without loading torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .kinds import RESULTS

_MODES = ("deterministic", "sampled")


def read_results(folder: Path) -> dict[str, Any] | None:
    """The evaluation of a run after training; None where there is none.

    Returns:
        Names and values as `evaluate_modes` has them; "timesteps" and "deterministic" are there, and of each mode
        "returns" and "mean".

    Raises:
        ValueError: if the file is damaged.
    """
    path = folder / RESULTS
    if not path.is_file():
        return None
    try:
        results = json.loads(path.read_text())
        if not isinstance(results, dict) or "deterministic" not in results:
            raise ValueError("no evaluation of the deterministic policy")
        steps = results["timesteps"]
        numbers = [steps]
        for mode in (results[name] for name in _MODES if name in results):
            numbers += [mode["mean"], mode["returns"][0], *mode["returns"]]
        if not all(isinstance(each, int | float) for each in numbers) or not isinstance(steps, int):
            raise ValueError("no numbers")
        list(map(float, numbers))  # an OverflowError of an integer of hundreds of digits
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path} is damaged; --resume {folder} evaluates again") from error
    return results
