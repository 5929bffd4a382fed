"""What training goes on from beside the agent, in the checkpoints of a run: of one process, or of several ranks.

The document "run" holds that of rank 0. The document "ranks" holds the others', each as a file of its own in bytes.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from ..agents.common.ranks import present
from ..agents.storage import format as checkpoint
from ..agents.storage import saving
from ..agents.storage.saving import Checkpointed

_OF_A_RANK = ("_last_obs", "_last_episode_starts", "_held")
"""Attributes of an agent that are others on each rank."""


def hand_over(agent: Checkpointed) -> list[torch.Tensor | None]:
    """Take part in a checkpoint, as all ranks must at once: the states of the others, in bytes; None for rank 0."""
    ranks = present()
    if ranks.rank == 0:
        return ranks.gather(None)
    file = io.BytesIO()
    state = {**saving.capture(agent), "attributes": {name: getattr(agent, name) for name in _OF_A_RANK}}
    checkpoint.write(file, {"rank": checkpoint.encode(state)})
    return ranks.gather(torch.frombuffer(file.getbuffer(), dtype=torch.uint8))


def documents(agent: Checkpointed, progress: dict[str, Any], lost: str | None) -> dict[str, checkpoint.Document]:
    """The documents of a checkpoint beside the agent's, on rank 0; the others call `hand_over`."""
    _, *others = hand_over(agent)
    run = {**saving.capture(agent), "progress": progress} | ({"lost": lost} if lost else {})
    if not others:
        return {"run": checkpoint.encode(run)}
    return {
        "run": checkpoint.encode(run | {"ranks": 1 + len(others)}),
        "ranks": checkpoint.encode({"states": others}),
    }


def state_in(file: Path) -> dict[str, Any]:
    """What this rank's training goes on from; where there were more or fewer ranks, "missing" says so in words.

    Raises:
        CheckpointError: if the file is damaged.
    """
    ranks = present()
    with file.open("rb") as stream:
        state = checkpoint.read(stream, "run", str(file))
        if (saved := state.get("ranks", 1)) != ranks.size:
            was = f"{saved} process{'es' if saved > 1 else ''}"
            state["missing"] = f"environments and random numbers, which were those of {was}: they begin anew"
        elif ranks.rank:
            own = checkpoint.read(stream, "ranks", str(file))["states"][ranks.rank - 1]
            state |= checkpoint.read(io.BytesIO(own.numpy().tobytes()), "rank", str(file))
    return state
