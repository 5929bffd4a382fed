"""What every part of the check has: options, a report that is kept as it grows, and a process of its own.

    python -m gpu.part NAME --json FILE ...      # as check.py starts it

A part is a function of a `Report`. It writes each figure to its JSON file as soon as it has it, so that a crash, a hang
or the end of its time loses only what came after. It raises `Skipped` where it cannot run.

Written without a GPU at hand: the CUDA branches have never run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NO_CUDA = "no CUDA device"

PARTS = {
    "tests": "gpu.suite:tests",
    "checkpoints": "gpu.moves:checkpoints",
    "warp": "gpu.resident:warp",
    "resident": "gpu.resident:resident",
    "synchronizations": "gpu.waits:synchronizations",
    "train": "gpu.training:train",
    "sac-update": "gpu.sac_update:sac_update",
    "policyflow-update": "gpu.policyflow_update:policyflow_update",
}
"""Where each part is, module and function, in the order in which they run: what can use more time comes last."""


class Skipped(Exception):
    """The part cannot run here; the text says why."""


@dataclass(frozen=True)
class Options:
    """How a part is to run."""

    device: str  # "cuda" or "cpu"
    small: bool  # sizes that only prove that it runs
    limit: float  # seconds from its start
    scratch: Path  # folder for files that nobody keeps


class Report:
    """The figures of a part, kept in a JSON file from the first on.

    Args:
        file: the JSON file.
        options: how the part runs.
    """

    def __init__(self, file: Path, options: Options) -> None:
        self.options, self._file, self._start = options, file, time.monotonic()
        self.headline = ""
        self.figures: dict[str, Any] = {}
        self.state = "running"
        self.write()

    @property
    def cuda(self) -> bool:
        """Whether a GPU is under test."""
        return self.options.device == "cuda"

    def left(self) -> float:
        """Seconds until the part is ended from outside."""
        return self.options.limit - (time.monotonic() - self._start)

    def keep(self, headline: str | None = None, **figures: Any) -> None:
        """Write figures down; the headline is what the table shows."""
        self.headline = self.headline if headline is None else headline
        self.figures |= figures
        self.write()

    def write(self) -> None:
        """Write the file anew."""
        options = {name: value for name, value in asdict(self.options).items() if name != "scratch"}
        data = {"state": self.state, "headline": self.headline, "options": options, "figures": self.figures}
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps(data, indent=1) + "\n")
        temporary.replace(self._file)


def synchronize(device: str) -> None:
    """Wait until the device has done all that it was given."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def revision() -> str:
    """The checkout's git revision, with a + where it has changes; "unknown" where there is no git."""
    try:
        commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        head, changes = (
            subprocess.run(["git", "-C", str(ROOT), *each], capture_output=True, text=True, check=True).stdout.strip()
            for each in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changes else "")


def machine(report: Report) -> None:
    """Versions, device and threads: what every figure depends on. First of all parts, and not in the table."""
    import torch
    from paired import machine as described

    packages = ("torch", "numpy", "stable-baselines3", "gymnasium", "mujoco", "triton")
    versions: Mapping[str, str] = {name: _version(name) for name in packages}
    device: dict[str, Any] = {"device": "cpu"}
    if report.cuda:
        if not torch.cuda.is_available():
            raise Skipped(NO_CUDA)
        properties = torch.cuda.get_device_properties(0)
        device = {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_GiB": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "devices": torch.cuda.device_count(),
        }
        matrix = torch.randn(64, 64, device="cuda")
        torch.testing.assert_close((matrix @ matrix.inverse()).cpu(), torch.eye(64), atol=1e-2, rtol=0)
    threads = {"threads": torch.get_num_threads(), "cuda": torch.version.cuda, "git": revision()}
    report.keep(device["device"], **described(), **versions, **device, **threads)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def main() -> int:
    """Run one part; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=("machine", *PARTS))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    arguments = parser.parse_args()
    os.chdir(ROOT)
    options = Options(arguments.device, arguments.small, arguments.limit, arguments.scratch)
    report = Report(arguments.json, options)
    module, function = PARTS.get(arguments.name, "gpu.part:machine").split(":")
    part: Callable[[Report], None] = getattr(importlib.import_module(module), function)
    try:
        part(report)
    except Skipped as error:
        report.state, report.headline = "skipped", str(error)
        report.write()
        print(f"skipped: {error}")
        return 0
    report.state = "ok"
    report.write()
    print(report.headline)
    return 0


if __name__ == "__main__":
    from gpu import part as this  # one module object, whoever imports it

    sys.exit(this.main())
