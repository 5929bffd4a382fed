"""How often the host waits for the device in an iteration of PolicyFlow: rollout and update.

On CUDA PyTorch warns of every operation that waits (torch.cuda.set_sync_debug_mode). On any device the operations whose
result the host must read are counted as they are dispatched, in eager mode: a lower bound, for copies between devices
do not show on the CPU. Written without a GPU at hand: the warnings have never been counted.
"""

from __future__ import annotations

import collections
import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu.contenders import NoiseVecEnv
from gpu.part import NO_CUDA, Report
from gpu.policyflow_update import Size, settings
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_consecutive", "_unique2")
"""Operations of aten whose result, or its shape, the host needs."""
PHASES = ("collect_rollouts", "train")


class HostReads(TorchDispatchMode):
    """Counts the operations in `READS`."""

    def __init__(self, counts: collections.Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        if name in READS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def dispatched(counts: collections.Counter[str]) -> Iterator[None]:
    """Count host reads as they are dispatched."""
    with HostReads(counts):
        yield


@contextlib.contextmanager
def warned(counts: collections.Counter[str]) -> Iterator[None]:
    """Count what CUDA warns of, by the line of Python that it is called from."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for each in caught:
        if "called a synchronizing CUDA operation" in str(each.message):
            counts[f"{Path(each.filename).name}:{each.lineno}"] += 1


Counting = Callable[[collections.Counter[str]], contextlib.AbstractContextManager[None]]


def counted(report: Report, size: Size, compile: str, count: Counting) -> dict[str, Any]:
    """Counts of one iteration, the third, by phase and by place."""
    from driftrl import PolicyFlow

    n_envs, config = settings(size, report.options.small)
    agent: Any = PolicyFlow(
        "MlpPolicy", NoiseVecEnv(n_envs), config=config, compile=compile, seed=0, device=report.options.device
    )
    iteration = n_envs * config.n_steps
    agent.learn(2 * iteration)
    counts: dict[str, collections.Counter[str]] = {phase: collections.Counter() for phase in PHASES}

    def watched(phase: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        with count(counts[phase]):
            return function(*arguments, **keywords)

    for phase in PHASES:
        setattr(agent, phase, partial(watched, phase, getattr(agent, phase)))
    agent.learn(iteration, reset_num_timesteps=False)
    return {
        "environment_steps": config.n_steps, "minibatches": size.updates,
        **{phase: {"total": each.total(), "places": dict(each.most_common(12))} for phase, each in counts.items()},
    }  # fmt: skip


def synchronizations(report: Report) -> None:
    """Count them; nothing is asked of the numbers yet."""
    size = Size(32, 2, 2) if report.options.small else Size(256, 8, 10)
    reads = counted(report, size, "off", dispatched)
    report.keep(_headline("host reads, eager", reads), host_reads_eager=reads)
    if not report.cuda:
        report.keep(f"{report.headline}; waits: {NO_CUDA}", waits=NO_CUDA)
        return
    eager = counted(report, size, "off", warned)
    report.keep(_headline("waits, eager", eager), waits_eager=eager)
    graphs = counted(report, size, "on", warned)
    report.keep(f"{report.headline}; {_headline('graphs', graphs)}", waits_graphs=graphs)


def _headline(what: str, found: dict[str, Any]) -> str:
    rollout, update = (found[phase]["total"] for phase in PHASES)
    return f"{what}: {rollout} in {found['environment_steps']} steps, {update} in {found['minibatches']} minibatches"
