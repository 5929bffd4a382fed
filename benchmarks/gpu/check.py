"""Run the parts of the GPU check one after the other, each in a process of its own, and print a table last.

    benchmarks/gpu/check.sh --wheels FOLDER        # sets the paths and starts this

Whatever a part does, the others run: one that fails, crashes, is killed or hangs costs its own share of the time. The
time that a part does not use is shared among those that follow. Results: one JSON file for each part, check.json with
all of them and the machine, log.txt with all that they printed.

Written without a GPU at hand: on the CPU it is tested (benchmarks/test_gpu_check.py), on CUDA it has never run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpu.part import NO_CUDA, PARTS, ROOT

SHARES = {
    "tests": 60, "checkpoints": 50, "warp": 140, "resident": 40, "synchronizations": 30, "train": 50,
    "sac-update": 50, "policyflow-update": 60,
}  # fmt: skip
"""Seconds of each part in a check of eight minutes."""


class Row(NamedTuple):
    """What became of a part."""

    part: str
    state: str  # "ok", "skipped", "FAILED" or "timed out"
    seconds: float
    note: str  # headline figure, reason, or exit code and last line

    @property
    def good(self) -> bool:
        return self.state in ("ok", "skipped")


def supervise(part: str, command: Sequence[str], json_file: Path, log: Path, limit: float) -> Row:
    """Run the command of a part and say what became of it.

    Args:
        part: its name.
        command: starts the part; it writes its JSON file and has a process group of its own.
        json_file: with "state" and "headline", perhaps of a part that got half way.
        log: file to which all output is appended.
        limit: seconds after which it is ended, with all processes that it started.
    """
    json_file.unlink(missing_ok=True)
    start, code = time.monotonic(), None
    with log.open("ab") as output:
        output.write(f"\n===== {part} (at most {limit:.0f} s)\n".encode())
        output.flush()
        begin = output.tell()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end_group(process)
    seconds = time.monotonic() - start
    found = read(json_file)
    headline = found.get("headline", "")
    if code is None:
        note = f"after {limit:.0f} s; had {headline}" if headline else f"after {limit:.0f} s"
        return Row(part, "timed out", seconds, note)
    if code != 0:
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Row(part, "FAILED", seconds, f"{how}: {last_line(log, begin)}")
    if found.get("state") not in ("ok", "skipped"):
        return Row(part, "FAILED", seconds, "exit code 0, but it left no result")
    return Row(part, found["state"], seconds, headline)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, which may outlive it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def read(json_file: Path) -> dict[str, Any]:
    """A part's JSON; empty if there is none."""
    try:
        data = json.loads(json_file.read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def last_line(log: Path, begin: int = 0) -> str:
    """The last line of a log that is not empty, from a position on."""
    with log.open("rb") as file:
        file.seek(begin)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def limits(names: Sequence[str], left: float) -> float:
    """Seconds for the first of the parts that are still to run, in proportion to its share of what is left."""
    return max(left * SHARES[names[0]] / sum(SHARES[name] for name in names), 1.0)


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, one row for each part."""
    lines = ["| part | state | seconds | result |", "|---|---|---|---|"]
    for row in rows:
        note = row.note.replace("|", "/").replace("\n", " ")
        lines.append(f"| {row.part} | {row.state} | {row.seconds:.0f} | {note[:200]} |")
    return "\n".join(lines)


def name_of(machine: dict[str, Any], cpu: bool) -> str:
    """The machine's name as a folder's."""
    text = machine.get("processor", "") if cpu else machine.get("device", "")
    return "-".join([*(["cpu"] if cpu else []), re.sub(r"[^a-z0-9]+", "-", str(text).lower()).strip("-") or "unknown"])


def main() -> int:
    """Run the parts; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scratch", type=Path, required=True, help="folder for files that nobody keeps")
    parser.add_argument("--budget", type=float, default=480, help="seconds for everything")
    parser.add_argument("--out", type=Path, help="folder of the results (default: results/gpu/<device>)")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help="comma-separated")
    parser.add_argument("--small", action="store_true", help="sizes that only prove that it runs")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU, with small sizes")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.parts) - set(PARTS)):
        parser.error(f"parts: got {', '.join(unknown)}, expected some of {', '.join(PARTS)}")
    scratch, end = arguments.scratch.resolve(), time.monotonic() + arguments.budget
    log = scratch / "log.txt"

    def run(part: str, limit: float) -> tuple[Row, Path]:
        json_file = scratch / f"{part}.json"
        command = [sys.executable, "-m", "gpu.part", part, "--json", str(json_file), "--limit", str(limit)]
        command += ["--device", "cpu" if arguments.cpu else "cuda", "--scratch", str(scratch)]
        command += ["--small"] if arguments.small or arguments.cpu else []
        return supervise(part, command, json_file, log, limit), json_file

    first, machine_file = run("machine", min(90, arguments.budget))
    machine = read(machine_file).get("figures", {})
    out = (arguments.out or ROOT / "benchmarks/results/gpu" / name_of(machine, arguments.cpu)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("*.json"), *out.glob("log.txt")]:
        old.unlink()
    rows = [] if first.state == "ok" else [first]
    if first.state == "skipped":
        print(f"{NO_CUDA}: torch sees none; --cpu tests the check itself", file=sys.stderr)
    else:
        print(json.dumps(machine), flush=True)
        waiting = [name for name in PARTS if name in arguments.parts]
        while waiting:
            row, json_file = run(waiting[0], limits(waiting, end - time.monotonic()))
            print(f"{row.part}: {row.state}, {row.seconds:.0f} s, {row.note}", flush=True)
            rows.append(row)
            waiting.pop(0)
            if json_file.exists():
                shutil.copy(json_file, out)
            keep(out, log, machine, rows)
    keep(out, log, machine, rows)
    shown = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    print(f"\n{table(rows)}\n\nresults: {shown}")
    if first.state == "skipped":
        return 2
    return int(not all(row.good for row in rows))


def keep(out: Path, log: Path, machine: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write what there is so far: the check may be ended from outside."""
    parts = {row.part: row._asdict() | {"figures": read(out / f"{row.part}.json").get("figures", {})} for row in rows}
    data = {"machine": machine, "ok": all(row.good for row in rows), "parts": parts}
    (out / "check.json").write_text(json.dumps(data, indent=1) + "\n")
    shutil.copy(log, out / "log.txt")


if __name__ == "__main__":
    sys.exit(main())
