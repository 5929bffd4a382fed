"""In what two training runs differ: what the tests of resumption and benchmarks/kill_test.py compare by."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch

from driftrl.agents.storage import format as checkpoint
from driftrl.runs.folder import checkpoints


def differences(first: Path, second: Path) -> list[str]:
    """In what the results of two runs differ, in words; times aside."""
    found = []
    for name, document, part in (
        ("final.zip", "agent", "parameters"),
        ("best.zip", "agent", "parameters"),
        (f"checkpoints/{checkpoints(first)[0].name}", "run", None),  # random generators, simulators, ...
    ):
        paths = [run / name for run in (first, second)]
        if not all(path.exists() for path in paths):
            found += [name] if any(path.exists() for path in paths) else []
            continue
        contents = []
        for path in paths:
            with path.open("rb") as file:
                content = checkpoint.read(file, document, str(path))
            contents.append(checkpoint.encode(content[part] if part else content))
        found += [f"{name}: {document}.json"] if contents[0].text != contents[1].text else []
        for key, tensor in contents[0].tensors.items():
            if key not in contents[1].tensors or not torch.equal(tensor, contents[1].tensors[key]):
                found.append(f"{name}: {key}")
    times = ("time/fps", "time/time_elapsed")
    rows = [[{k: v for k, v in row.items() if k not in times} for row in progress_rows(run)] for run in (first, second)]
    if rows[0] != rows[1]:
        found.append("progress.csv")
    for name in ("eval.json", "best.json"):
        texts = [json.loads(path.read_text()) if (path := run / name).exists() else None for run in (first, second)]
        if texts[0] != texts[1]:
            found.append(name)
    return found


def progress_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "progress.csv").open() as file:
        return list(csv.DictReader(file))
