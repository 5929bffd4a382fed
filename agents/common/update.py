"""Gradients as functions that compile to one graph; whether the hot functions of an agent are compiled, and how."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Batch: TypeAlias = dict[str, Tensor]

PAYS_AFTER = 25_000
"""Gradient updates after which a compiled run has caught up with an eager one (benchmarks/train_speed.py)."""


def compiling_pays(wanted: str, updates: int, device: torch.device) -> bool:
    """Decide on compilation.

    Args:
        wanted: "on"; "off"; or "auto", for runs of at least `PAYS_AFTER` updates where a compiler is found.
        updates: gradient updates of the run.
        device: where it runs; the CPU needs a C++ compiler.

    Raises:
        ValueError: if it is "on" and there is no compiler.
    """
    if wanted == "off":
        return False
    candidates = (os.environ.get("CXX", "g++"), "g++", "clang++")
    found = device.type != "cpu" or any(shutil.which(candidate) for candidate in candidates)
    if wanted == "on" and not found:
        raise ValueError("compile: got on, and no C++ compiler is found; install g++ or clang++, or choose off")
    return found and (wanted == "on" or updates >= PAYS_AFTER)


class Compiled:
    """A function of tensors, or of dicts of them, as one graph for each of their shapes; on CUDA a CUDA graph.

    A replay of a CUDA graph overwrites what the one before returned: callers copy what they keep.

    Args:
        function: what to compile.
        device: where it runs.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        def call(*arguments: Any) -> Any:
            return function(*arguments)

        # A code object of its own: PyTorch limits compilations per code object, which all agents of a process share.
        own = FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
        if device.type == "cuda":
            self._function = torch.compile(own, fullgraph=True, dynamic=False, mode="reduce-overhead")
        else:
            self._function = torch.compile(own, fullgraph=True, dynamic=False, options={"cpp_wrapper": True})
        self._seen: set[tuple[torch.Size, ...]] = set()

    def __call__(self, *arguments: Any) -> Any:
        """Call it. For shapes seen before only these are checked, not everything that the graph was made of."""
        leaves = [leaf for each in arguments for leaf in (each.values() if isinstance(each, dict) else (each,))]
        shapes = tuple(leaf.shape for leaf in leaves)
        torch.compiler.cudagraph_mark_step_begin()
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=shapes in self._seen):
            result = self._function(*arguments)
        self._seen.add(shapes)
        return result

    def check_again(self) -> None:
        """Look at everything once more at the next call: somebody may have changed the networks."""
        self._seen.clear()


def prepared(function: Callable[..., Any], wanted: str, updates: int, device: torch.device) -> Callable[..., Any]:
    """A hot function at the beginning of training: compiled where `compiling_pays`; a compiled one looks again."""
    if isinstance(function, Compiled):
        function.check_again()
        return function
    return Compiled(function, device) if compiling_pays(wanted, updates, device) else function


class Objective(nn.Module):
    """An objective of a policy, and its gradient as one function.

    Args:
        policy: module whose `trained` names the parameters that learn.
        terms: (policy, batch) -> scalars by name.
        name: the scalar to differentiate.
        max_norm: bound of the gradient's norm; None for no bound.
    """

    def __init__(self, policy: Any, terms: Callable[[Any, Batch], Batch], name: str, max_norm: float | None) -> None:
        super().__init__()
        self.policy, self.terms, self.name, self.max_norm = policy, terms, name, max_norm

    def forward(self, batch: Batch) -> Batch:
        """The scalars for a batch."""
        return self.terms(self.policy, batch)

    def gradient(self, batch: Batch) -> tuple[Tensor, Batch]:
        """The (clipped) gradient as one vector, parameter after parameter, and all scalars, its norm among them."""
        parameters: dict[str, nn.Parameter] = self.policy.trained()
        if torch.compiler.is_compiling():  # it cannot look into autograd, and eager mode is slow with torch.func

            def scalar(detached: Batch) -> tuple[Tensor, Batch]:
                terms = torch.func.functional_call(self, detached, (batch,))
                return terms[self.name], terms

            detached = {f"policy.{name}": parameter.detach() for name, parameter in parameters.items()}
            by_name, terms = torch.func.grad(scalar, has_aux=True)(detached)
            gradients = tuple(by_name.values())
        else:
            terms = self(batch)
            gradients = torch.autograd.grad(terms[self.name], list(parameters.values()), materialize_grads=True)
        vector = torch.cat([each.flatten() for each in gradients])
        norm = vector.norm()
        if self.max_norm is not None:
            vector = (self.max_norm / (norm + 1e-6)).clamp(max=1.0) * vector
        return vector, {name: term.detach() for name, term in terms.items()} | {"train/grad_norm": norm}
