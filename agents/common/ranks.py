"""Ranks: the processes that train one agent together, what they say to each other, and how they end together.

Whoever starts the processes makes the process group of `torch.distributed`: `train.py` under torchrun, or the user's
own program. Without one there is a single rank, and everything here does nothing.

There are two kinds of messages. In the updates of an iteration ranks exchange numbers: `mean_` of the gradients and
scalars. Everywhere else they exchange objects, by `gather`. A rank that an error, a signal or a callback ends says so
in place of its next object, and the others hear it at their next `gather`, wherever they are. A rank that is killed, or
fails in the middle of the updates, closes its connections: the others then get a `RankError`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    # PyTorch would import it when an optimizer is made. Its functions then have the process group of that time as
    # their default, for ever: see `_found`.
    import torch.distributed.nn.functional

T = TypeVar("T")


class RankError(RuntimeError):
    """Another rank failed, is lost, or does not answer."""


class Ending(NamedTuple):
    """What a rank says that ends."""

    rank: int
    text: str
    interrupt: tuple[int, ...] | None = None  # the arguments of a KeyboardInterrupt


class Ranks:
    """The ranks of a training, seen from one of them.

    Args:
        rank: of this process.
        size: number of ranks.

    Attributes:
        aligned: whether all ranks are known to be at the same point, so that one may say that it ends: False in the
            updates and where a message got lost.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.aligned = True
        self._has_ended = False  # all know

    def begin(self) -> None:
        """Train, perhaps again."""
        self._has_ended = False

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order.

        Raises:
            RankError: if another rank said that it failed, or is lost.
            KeyboardInterrupt: if another rank was interrupted.
        """
        if self.size == 1:
            return [value]
        said = self._exchange(value)
        for each in said:
            if isinstance(each, Ending):
                self._has_ended = True
                if each.interrupt is not None:
                    raise KeyboardInterrupt(*each.interrupt)
                raise RankError(f"rank {each.rank} ended: {each.text}")
        return said

    def announce(self, error: BaseException) -> None:
        """Tell the others, where they do not know yet and can hear it, that an error ends this rank."""
        if self.size == 1 or not self.aligned or self._has_ended:
            return
        self._has_ended = True
        interrupt = error.args if isinstance(error, KeyboardInterrupt) else None
        with contextlib.suppress(RankError):
            self._exchange(Ending(self.rank, f"{type(error).__name__}: {error}", interrupt))

    @contextlib.contextmanager
    def announced(self) -> Iterator[None]:
        """Whatever ends the block is told to the others."""
        try:
            yield
        except BaseException as error:
            self.announce(error)
            raise

    def begin_updates(self) -> None:
        """All ranks have come this far: up to `end_updates` they exchange nothing but numbers."""
        self.gather(None)
        self.aligned = False

    def end_updates(self) -> None:
        """See `begin_updates`."""
        self.aligned = True

    def mean_(self, numbers: Tensor) -> Tensor:
        """The mean over the ranks, in place; the same on all of them to the last bit."""
        with _noticed():
            dist.all_reduce(numbers)
        mean: Tensor = numbers.div_(self.size)
        return mean

    def average(self, number: float) -> float:
        """The mean of a number over the ranks."""
        return number if self.size == 1 else sum(self.gather(number)) / self.size

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give all ranks the tensors of rank 0, in place."""
        with _noticed():
            for each in tensors:
                dist.broadcast(each.detach(), 0)

    def merged(self, n: int, mean: Tensor, var: Tensor) -> tuple[int, Tensor, Tensor]:
        """Number, means and biased variances [dim] of all ranks' rows, of those of this rank's; merged in their order.

        By the formula of Chan et al. 1979, in the type of the tensors.
        """
        (n, means, variances), *others = self.gather((n, mean.cpu().numpy(), var.cpu().numpy()))
        for m, other_means, other_variances in others:
            delta = other_means - means
            variances = (variances * n + other_variances * m + delta**2 * (n * m / (n + m))) / (n + m)
            means, n = means + delta * (m / (n + m)), n + m
        return n, torch.as_tensor(means, device=mean.device), torch.as_tensor(variances, device=mean.device)

    def mean_and_std(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and (unbiased) standard deviation of all ranks' values [B], scalars of their type."""
        rows = values.double().unsqueeze(1)
        n, mean, var = self.merged(len(rows), rows.mean(0), rows.var(0, unbiased=False))
        return mean[0].to(values.dtype), (var[0] * n / (n - 1)).sqrt().to(values.dtype)

    def _exchange(self, value: T | Ending) -> list[T]:
        said: list[T] = [None] * self.size  # type: ignore[list-item]
        self.aligned = False
        with _noticed():
            dist.all_gather_object(said, value)
        self.aligned = True
        return said


@contextlib.contextmanager
def _noticed() -> Iterator[None]:
    """What goes wrong in an exchange says that another rank is lost."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0].partition("] ")[2].partition(". ")[0] or repr(error)
        raise RankError(f"another rank was lost, or does not answer ({reason})") from error


ALONE = Ranks()
# The process group, not kept alive, and its ranks: a group that outlives `destroy_process_group` ends the process by a
# crash, because its threads still run.
_found: tuple[Callable[[], object], Ranks] = (lambda: None, ALONE)


def present() -> Ranks:
    """The ranks of this process: always the same object for the same process group."""
    global _found
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    if (group := dist.group.WORLD) is not _found[0]():
        _found = (weakref.ref(group), Ranks(dist.get_rank(), dist.get_world_size()))
    return _found[1]


def check_alone(who: str) -> None:
    """Refuse several ranks, for what trains in one process."""
    if (size := present().size) > 1:
        raise ValueError(f"ranks: got {size} for {who}, which trains in one process; start it without torchrun")
