"""Programs: functions of tensors, compiled ahead of time for the CPU and kept on disk, so that the next run has them.

A function is traced once for each set of shapes: what it does with tensors becomes a graph, in which Python's numbers
are constants. All tensors that it reads beside its arguments, weights above all, become inputs: their present values
count at each call. The graph's text and the versions name the program on disk, so a program that is found is right.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ...envs.native.build import find_compiler
from .compiler import SCRIPT, compile_program, folder

_loaded: dict[str, Any] = {}
"""The programs of this process by their keys."""


class Program:
    """A function of tensors, or of tuples of them, as a program for each of their shapes.

    The function may write to its arguments. It must not write to other tensors, nor draw random numbers. Arguments of
    equal shapes must have equal strides, and what is no tensor must be the same at each call.

    Args:
        function: returns a tensor, or a tuple of tensors and dictionaries of tensors.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._traced: dict[tuple[tuple[torch.Size, torch.dtype], ...], _Traced] = {}
        self._seen: Any = None
        self._is_checked = True

    def __call__(self, *arguments: Any) -> Any:
        """Call it; traced, and compiled if need be, where the shapes are new or a parameter has been replaced."""
        if not self._is_checked:
            self._is_checked = True
            if self._seen != _fingerprint(self.function):
                self._traced.clear()
        given = list(tensors_in(arguments))
        shapes = tuple([(each.shape, each.dtype) for each in given])
        traced = self._traced.get(shapes)
        if traced is not None and not traced.is_current():
            self._traced.clear()
            traced = None
        if traced is None:
            traced = self._traced[shapes] = self._trace(arguments, given)
        return traced.rebuild(traced.program.run(given + traced.captured))

    def check_again(self) -> None:
        """Trace anew at the next call if networks that the function uses have been changed, other than their values."""
        self._is_checked = False

    def _trace(self, arguments: tuple[Any, ...], given: list[Tensor]) -> _Traced:
        from torch.fx.experimental.proxy_tensor import make_fx

        self._seen = _fingerprint(self.function)
        structure: list[Any] = []

        def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
            parts, structure[:] = _flattened(self.function(*_refilled(arguments, iter(tensors))))
            return tuple(parts)

        # Real values, for a function may look at those of its other tensors; copies, for it may write to its arguments.
        graph: fx.GraphModule = make_fx(flat, tracing_mode="real")(*[each.detach().clone() for each in given])
        captured = _lift(graph)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        places = {
            id(tensor): (owner, name)
            for network in _modules(self.function)
            for module in network.modules()
            for owner in (module._parameters, module._buffers)
            for name, tensor in owner.items()
        }
        held = [(*places[id(tensor)], tensor) for tensor in captured if id(tensor) in places]
        rebuild = partial(_unflattened, tuple(structure))
        return _Traced(_program(graph, given + captured), captured, held, rebuild)


class _Traced(NamedTuple):
    """A program, and how it is called."""

    program: Any
    captured: list[Tensor]  # inputs beside the arguments
    held: list[tuple[dict[str, Any], str, Tensor]]  # where networks hold those that are theirs
    rebuild: Callable[[list[Tensor]], Any]  # makes the result of what the program returns

    def is_current(self) -> bool:
        """Whether the networks still hold what was captured."""
        return all([owner.get(name) is tensor for owner, name, tensor in self.held])


def tensors_in(arguments: tuple[Any, ...]) -> Iterator[Tensor]:
    """The tensors of arguments and of the tuples among them, in their order."""
    for each in arguments:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, tuple):
            yield from tensors_in(each)


def _refilled(arguments: Any, tensors: Iterator[Tensor]) -> Any:
    """The arguments with other tensors, in the order of `tensors_in`."""
    if isinstance(arguments, Tensor):
        return next(tensors)
    if not isinstance(arguments, tuple):
        return arguments
    parts = [_refilled(each, tensors) for each in arguments]
    return type(arguments)(*parts) if hasattr(arguments, "_fields") else tuple(parts)


def _flattened(result: Any) -> tuple[list[Tensor], list[Any]]:
    """The tensors of a result, and for each of its parts the names of a dictionary, or None for a tensor."""
    parts = result if isinstance(result, tuple) else (result,)
    tensors, structure = list[Tensor](), list[Any]()
    for part in parts:
        structure.append(list(part) if isinstance(part, dict) else None)
        tensors += part.values() if isinstance(part, dict) else [part]
    return tensors, [isinstance(result, tuple), *structure]


def _unflattened(structure: tuple[Any, ...], tensors: list[Tensor]) -> Any:
    several, *parts = structure
    rest = iter(tensors)
    found = tuple([next(rest) if names is None else {name: next(rest) for name in names} for names in parts])
    return found if several else found[0]


def _lift(graph: fx.GraphModule) -> list[Tensor]:
    """Make inputs of the tensors that a graph has captured; they are returned."""
    captured: dict[int, tuple[Tensor, fx.Node]] = {}
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for node in [node for node in graph.graph.nodes if node.op == "get_attr"]:
        tensor = getattr(graph, node.target)
        if id(tensor) not in captured:
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(f"captured_{len(captured)}")
            captured[id(tensor)] = tensor, last
        node.replace_all_uses_with(captured[id(tensor)][1])
        graph.graph.erase_node(node)
    graph.recompile()
    for name in [*vars(graph)["_parameters"], *vars(graph)["_buffers"], *vars(graph)]:
        if isinstance(getattr(graph, name, None), Tensor):
            delattr(graph, name)
    return [tensor for tensor, _ in captured.values()]


def _program(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
    """The loaded program of a graph: from this process, from disk, or compiled now."""
    described = [(tuple(each.shape), each.stride(), each.dtype) for each in inputs]
    key = _key(graph, described)
    if key not in _loaded:
        package = folder() / f"{key}.pt2"
        if package.is_file():
            try:
                _loaded[key] = _load(package)
            except (RuntimeError, zipfile.BadZipFile):  # a damaged file
                package.unlink(missing_ok=True)
        if key not in _loaded:
            compile_program(graph, described, onednn_is_faster(), package)
            _loaded[key] = _load(package)
        with contextlib.suppress(FileNotFoundError):  # another process cleared the folder
            os.utime(package)
    return _loaded[key]


def _load(package: Path) -> Any:
    """The program of a file, for one thread at a time, on the CPU.

    Raises:
        RuntimeError, zipfile.BadZipFile: if the file is damaged. Its code must not run then: it would crash.
    """
    with zipfile.ZipFile(package) as archive:
        if archive.testzip() is not None:
            raise zipfile.BadZipFile(package)
    return torch._C._aoti.AOTIModelPackageLoader(str(package), "model", True, 1, -1)


def _key(graph: fx.GraphModule, described: list[Any]) -> str:
    about = (
        graph.code, described, torch.__version__, torch.__config__.show(), torch.get_num_threads(),
        torch.backends.cpu.get_cpu_capability(), _processor(), onednn_is_faster(), find_compiler(),
        sys.version_info[:2], Path(torch.__file__).parent, SCRIPT.read_bytes(),
    )  # fmt: skip
    return hashlib.sha256(repr(about).encode()).hexdigest()[:40]


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies matrices faster than MKL, which PyTorch calls.

    On AMD's processors with AVX-512 it takes half of MKL's time (docs/performance.md).
    """
    has_both = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    return has_both and torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in _processor()


@cache
def _processor() -> str:
    """Who made the processor, which it is and what it can do; code is compiled for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("vendor_id", "model", "flags")))


def _fingerprint(function: Any) -> Any:
    """What a trace of a function depends on beside the values of tensors: the make of the networks that it uses."""
    found = list[Any]()
    for module in _modules(function):
        for each in module.modules():
            own = {name: value for name, value in vars(each).items() if isinstance(value, _PLAIN)}
            tensors = [*each._parameters.values(), *each._buffers.values()]
            held = [
                None if one is None else (id(one), one.requires_grad, one.dtype, one.shape, one.stride())
                for one in tensors
            ]
            found.append((id(each), type(each), own, held))
    return found


_PLAIN = (bool, int, float, str, tuple, type(None))


def _modules(function: Any) -> Iterator[nn.Module]:
    """The networks that a function, a method or a partial function holds."""
    if isinstance(function, partial):
        for each in (function.func, *function.args, *function.keywords.values()):
            yield from _modules(each)
    elif isinstance(function, nn.Module):
        yield function
        yield from _modules(vars(function).get("losses"))
    elif isinstance(function, FunctionType):
        for cell in function.__closure__ or ():
            if cell.cell_contents is not function:
                yield from _modules(cell.cell_contents)
    elif (owner := getattr(function, "__self__", None)) is not None:
        yield from _modules(owner)
