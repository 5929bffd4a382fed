"""Compiled functions: when compilation pays, and one object that calls a function as a program or a CUDA graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ...envs.native.build import find_compiler
from .compiler import CompilerError
from .program import Program, tensors_in

_log = logging.getLogger(__name__)

PAYS_AFTER = 5_000
"""Gradient updates from which on a run is compiled.

The first run of a kind, which waits for the compiler, catches up with an eager one after some 15,000. The next one
takes two thirds of the time (benchmarks/short_run.py), and a run is seldom the only one of its kind. The state of the
cache does not count: the same command gives the same numbers.
"""
PAYS_AFTER_LAUNCHES = 10_000_000
"""On CUDA: launches of kernels from which on a run is compiled.

Eager functions wait for launches, of some 5 microseconds each; a graph needs none. So many take as long as a
compilation, 50 s. Both times are estimates: not measured on a GPU.
"""
_PER_UPDATE, _PER_DECISION = 290, 25
"""Launches of an update and of the policy's choice of actions for all environments (benchmarks/gpu/launches.py)."""


def compiling_pays(wanted: str, updates: int, device: torch.device, decisions: int = 0) -> bool:
    """Decide on compilation.

    Args:
        wanted: "on"; "off"; or "auto": on the CPU for runs of at least `PAYS_AFTER` updates where a compiler works, on
            CUDA for those that launch `PAYS_AFTER_LAUNCHES` kernels, however large the minibatches are.
        updates: gradient updates of the run.
        device: where it runs; the CPU needs a C++ compiler.
        decisions: how often the policy chooses actions, for all environments at once.

    Raises:
        ValueError: if it is "on" and there is no compiler.
    """
    if wanted == "off":
        return False
    is_missing = device.type == "cpu" and find_compiler() is None
    if wanted == "on" and is_missing:
        raise ValueError("compile: got on, and no C++ compiler is found; install g++ or clang++, or choose off")
    if device.type == "cuda":
        pays = updates * _PER_UPDATE + decisions * _PER_DECISION >= PAYS_AFTER_LAUNCHES
    else:
        pays = updates >= PAYS_AFTER
    if is_missing:
        _log.warning(
            "compile auto: no C++ compiler is found; training is eager. Install g++ or clang++ to make it faster"
        )
    elif wanted == "auto":
        how = "is compiled" if pays else f"is eager: {updates:,} updates are too few to compile"
        _log.info("compile auto: training %s", how)
    return not is_missing and (wanted == "on" or pays)


def compiles(policy: nn.Module, wanted: str, updates: int, device: torch.device, decisions: int = 0) -> str:
    """What is wanted where `compiling_pays`, else nothing: "".

    Networks that carry hooks or parametrizations are trained eagerly, with a warning.
    """
    if not compiling_pays(wanted, updates, device, decisions):
        return ""
    altered = is_altered(policy)
    if altered:
        text = f"compile: got {wanted}, but the networks carry hooks or parametrizations; training is eager"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    return "" if altered else wanted


def is_altered(network: nn.Module) -> bool:
    """Whether a network carries hooks or parametrizations, which programs would pass over."""
    return any(
        any(hooks for name, hooks in vars(module).items() if name.endswith("hooks") and "state_dict" not in name)
        or parametrize.is_parametrized(module)
        for module in network.modules()
    ) or any(parameter._backward_hooks for parameter in network.parameters())


class Compiled:
    """A function of tensors, or of tuples of them, as one `Program` for each of their shapes; on CUDA a CUDA graph.

    A replay of a CUDA graph overwrites what the one before returned: callers copy what they keep.

    Args:
        function: what to compile; it stays reachable under this name, as the eager form.
        device: where it runs.
        required: whether a compiler that fails is an error; else it warns, once, and functions are called eagerly.

    Attributes:
        failed: whether it is called eagerly because the compiler failed.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device, required: bool = False) -> None:
        self.function, self.required, self.failed = function, required, False
        self._compiled: Program | _CudaGraph = (_CudaGraph if device.type == "cuda" else Program)(function)

    def __call__(self, *arguments: Any) -> Any:
        """Call it; compiled where the shapes are new.

        Raises:
            CompilerError: if the compiler fails and is required.
        """
        if not self.failed:
            try:
                return self._compiled(*arguments)
            except CompilerError as error:
                if self.required:
                    raise
                self.failed = True
                _warn_of_failure(f"{str(error).splitlines()[0]} to train without this; training is eager")
        return self.function(*arguments)

    def check_again(self) -> None:
        """Look at everything once more at the next call: somebody may have changed networks or hyperparameters."""
        self._compiled.check_again()


@cache
def _warn_of_failure(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)


class _CudaGraph:
    """A function as a CUDA graph for each set of shapes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        def call(*arguments: Any) -> Any:
            return function(*arguments)

        # A code object of its own: PyTorch limits compilations per code object, which all agents of a process share.
        own = FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
        self._graph = torch.compile(own, fullgraph=True, dynamic=False, mode="reduce-overhead")
        self._seen: set[tuple[torch.Size, ...]] = set()

    def __call__(self, *arguments: Any) -> Any:
        """Call it. For shapes seen before only these are checked, not everything that the graph was made of."""
        shapes = tuple(tensor.shape for tensor in tensors_in(arguments))
        torch.compiler.cudagraph_mark_step_begin()
        try:
            with torch.compiler.set_stance("default", skip_guard_eval_unsafe=shapes in self._seen):
                result = self._graph(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:  # Triton needs a C compiler
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CompilerError(f"compile: PyTorch's compiler failed, {why[:300]}; use compile='off'") from error
        self._seen.add(shapes)
        return result

    def check_again(self) -> None:
        """See `Compiled`."""
        self._seen.clear()


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself, where it is compiled."""
    return function.function if isinstance(function, Compiled) else function


def owner(function: Callable[..., Any]) -> Any:
    """The object whose method a function is, compiled or not; None if it is no method."""
    return getattr(eager(function), "__self__", None)


def prepared(function: Callable[..., Any], wanted: str, device: torch.device) -> Callable[..., Any]:
    """A hot function at the beginning of training: compiled or eager; a compiled one looks at everything again.

    Args:
        function: eager, or compiled by an earlier call.
        wanted: "on", "auto", where a compiler that fails only warns, or "": eager.
        device: where it runs.
    """
    if isinstance(function, Compiled):
        function.check_again()
        return function if wanted else function.function
    return Compiled(function, device, wanted == "on") if wanted else function
