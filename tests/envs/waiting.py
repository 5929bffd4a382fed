"""What makes the host wait for a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _Operations(TorchDispatchMode):
    """Notes operations that make a number, or a shape, of the data of tensors."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __init__(self, seen: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put_") and any(
            isinstance(each, Tensor) and each.dtype == torch.bool for each in args[1]
        )
        if name in self.NAMES or masked:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def waits() -> Iterator[list[str]]:
    """Names of what would wait for a device as it is called: operations, transfers to the host and from it."""
    seen: list[str] = []

    def telling(name: str) -> Any:
        original = getattr(Tensor, name)

        def told(self: Tensor, *args: Any, **keywords: Any) -> Any:
            seen.append(name)
            return original(self, *args, **keywords)

        return told

    def making(name: str) -> Any:
        original = getattr(torch, name)

        def made(*args: Any, **keywords: Any) -> Any:
            seen.append(name)
            return original(*args, **keywords)

        return made

    with pytest.MonkeyPatch.context() as patch, _Operations(seen):
        for name in ("cpu", "numpy", "tolist", "new_tensor"):
            patch.setattr(Tensor, name, telling(name))
        for name in ("as_tensor", "tensor", "from_numpy"):  # a copy of what the host has follows, which waits
            patch.setattr(torch, name, making(name))
        yield seen
