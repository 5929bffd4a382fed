from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "oracles"))

from several_ranks import on_ranks

from driftrl.agents.common.observations import RunningNorm
from driftrl.agents.common.ranks import ALONE, RankError, check_alone, present

BATCHES = [100 + 3 * torch.randn(size, 5, generator=torch.Generator().manual_seed(size)) for size in (40, 7, 64)]


def test_one_process_is_alone_and_says_nothing() -> None:
    assert present() is ALONE
    assert ALONE.gather("this") == ["this"]
    assert ALONE.average(1 / 3) == 1 / 3
    check_alone("anything")
    with pytest.raises(KeyError), ALONE.announced():
        raise KeyError


def merged(scale: float) -> tuple[int, Tensor, dict[str, Tensor]]:
    ranks = present()
    mine = BATCHES[ranks.rank].double()
    n, mean, var = ranks.merged(len(mine), mine.mean(0), mine.var(0, unbiased=False))
    norm = RunningNorm(5)
    for factor in (1.0, scale):
        norm.update(factor * BATCHES[ranks.rank], ranks)
    return n, torch.stack([mean, var]), dict(norm.named_buffers())


def test_moments_of_all_ranks_are_those_of_the_whole_batch_and_the_same_everywhere() -> None:
    results = on_ranks(3, merged, 0.5)
    whole = torch.cat(BATCHES)
    norm = RunningNorm(5)
    for factor in (1.0, 0.5):
        norm.update(factor * whole)
    for n, moments, buffers in results:
        assert n == len(whole)
        expected = torch.stack([whole.double().mean(0), whole.double().var(0, unbiased=False)])
        torch.testing.assert_close(moments, expected, rtol=1e-13, atol=0)
        for name, each in norm.named_buffers():
            torch.testing.assert_close(buffers[name], each, rtol=1e-6 if each.dtype is torch.float32 else 1e-13, atol=0)
            assert torch.equal(buffers[name], results[0][2][name])


def mean_and_std() -> Tensor:
    return torch.stack(present().mean_and_std(BATCHES[present().rank][:, 0]))


def test_mean_and_standard_deviation_of_all_ranks_values() -> None:
    values = torch.cat(BATCHES)[:, 0]
    for each in on_ranks(3, mean_and_std):
        torch.testing.assert_close(each, torch.stack([values.mean(), values.std()]), rtol=1e-6, atol=0)


def shared() -> tuple[Tensor, float]:
    rank = present().rank
    tensor, average = torch.full((3,), float(rank)), present().average(float(rank))
    present().share([tensor])
    return tensor, average


def test_rank_0_gives_its_tensors() -> None:
    for tensor, average in on_ranks(3, shared):
        assert tensor.tolist() == [0, 0, 0] and average == 1


def ending(error: BaseException) -> Any:
    ranks = present()
    with ranks.announced():
        ranks.gather("a")
        if ranks.rank == 1:
            raise error
        ranks.gather("b")
    return "not heard"


@pytest.mark.parametrize("error", [KeyError("gone"), KeyboardInterrupt(15)])
def test_what_ends_one_rank_ends_all(error: BaseException) -> None:
    results = on_ranks(3, ending, error)
    assert results[1].args == error.args
    for each in (results[0], results[2]):
        if isinstance(error, KeyboardInterrupt):
            assert isinstance(each, KeyboardInterrupt) and each.args == (15,)
        else:
            assert isinstance(each, RankError) and str(each) == "rank 1 ended: KeyError: 'gone'"


def dying(in_updates: bool) -> float:
    ranks = present()
    ranks.gather("a")
    if ranks.rank == 1:
        os._exit(1)
    begin = time.monotonic()
    with pytest.raises(RankError, match=r"^another rank was lost, or does not answer \(.*\)$"):
        ranks.mean_(torch.zeros(9)) if in_updates else ranks.gather("b")
    assert in_updates or not ranks.aligned  # nobody may be told
    ranks.announce(KeyError())
    return time.monotonic() - begin


@pytest.mark.parametrize("in_updates", [False, True])
def test_a_rank_that_dies_is_noticed_at_once(in_updates: bool) -> None:
    seconds = on_ranks(2, dying, in_updates)[0]
    assert isinstance(seconds, float) and seconds < 5


def outlives() -> bool:
    """Whether the process group lives on after its end; if so, the process may crash at its own."""
    assert present().size == 2
    present().gather(None)
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    gc.collect()
    return group() is not None


def test_the_process_group_is_not_kept_alive() -> None:
    assert on_ranks(2, outlives) == [False, False]


AGENT = """
import gc, weakref
import torch, torch.distributed as dist
from driftrl import PolicyFlow

dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
group = weakref.ref(dist.group.WORLD)
PolicyFlow("MlpPolicy", "Pendulum-v1", n_steps=16, batch_size=16, compile="off", device="cpu").learn(16)
dist.destroy_process_group()
gc.collect()
assert group() is None
"""


def test_an_agent_does_not_keep_the_process_group_alive() -> None:
    subprocess.run([sys.executable, "-c", AGENT], check=True)


def refused() -> None:
    check_alone("this")


def test_what_trains_in_one_process_refuses_ranks() -> None:
    for error in on_ranks(2, refused):
        assert str(error) == "ranks: got 2 for this, which trains in one process; start it without torchrun"
