"""What a machine's memory holds: what cannot fit is refused before minutes are spent on trying."""

from __future__ import annotations

import os

GIB = 2**30


def check_fits(what: str, needed: float, holder: str = "machine", memory: float | None = None) -> None:
    """Refuse what needs more memory than there is.

    Args:
        what: the option, what it got and what of it needs memory.
        needed: bytes, at least.
        holder: what has the memory.
        memory: its bytes; None: those of this machine.

    Raises:
        ValueError: if it is more.
    """
    memory = machine_memory() if memory is None else memory
    if needed > memory:
        raise ValueError(f"{what} at least {needed / GIB:,.0f} GiB of memory, the {holder} has {memory / GIB:,.0f}")


def machine_memory() -> float:
    """Bytes of memory of this machine; inf where the system does not say (Windows)."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return float("inf")
