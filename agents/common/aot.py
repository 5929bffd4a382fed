"""Compile a graph ahead of time, in a process of its own: what the compiler needs never enters the one that trains.

    python aot.py GRAPH PACKAGE

Run as a script, for it needs PyTorch only.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

SMALLEST = 32
"""Rows and columns from which on matrices are multiplied by oneDNN: below, its call costs more than it saves."""


def compile_graph(source: Path, package: Path) -> None:
    """Compile what `Program` wrote.

    Args:
        source: file of a graph, a description of each of its inputs (shape, strides, dtype), the number of threads, and
            whether to multiply matrices by oneDNN.
        package: file to write, for AOTInductor's loader.
    """
    import torch
    import torch._dynamo  # loads what unpickling a traced graph needs

    graph, inputs, threads, onednn = torch.load(source, weights_only=False)  # our parent's, in a folder of its own
    torch.set_num_threads(threads)
    examples = tuple(torch.empty_strided(shape, strides, dtype=dtype).zero_() for shape, strides, dtype in inputs)
    program: Any = torch.export.export(graph, examples)
    compute_scalars_once()
    if onednn:
        multiply_by_onednn()
    torch._inductor.aoti_compile_and_package(program, package_path=str(package))


def compute_scalars_once() -> None:
    """Let the compiler keep what roots, powers and quotients of scalars come to.

    It would compute them anew for each element that they are broadcast to: Adam's powers of beta for all the weights.
    """
    import torch
    from torch._inductor import lowering

    aten, rules = torch.ops.aten, lowering.lowerings
    for name in (aten.pow.Tensor_Tensor, aten.sqrt.default, aten.div.Tensor, aten.reciprocal.default, aten.exp.default):

        def kept(*arguments: Any, rule: Any = rules[name], **named: Any) -> Any:
            result = rule(*arguments, **named)
            if all(size == 1 for size in result.get_size()):
                result.realize()
            return result

        rules[name] = kept


def multiply_by_onednn() -> None:
    """Let the compiler call oneDNN, not MKL, where float32 matrices of at least `SMALLEST` rows and columns meet."""
    import torch
    from torch._inductor import ir, lowering
    from torch._inductor.mkldnn_ir import LinearUnary

    aten, rules = torch.ops.aten, lowering.lowerings
    mm, addmm, bmm, baddbmm = (rules[each.default] for each in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm))  # MKL's

    def product(a: Any, b: Any, bias: Any = None) -> Any:
        """The matrix a [M, K] times b [K, N], plus a bias [N]."""
        return ir.TensorBox.create(LinearUnary.create(a, rules[aten.permute.default](b, [1, 0]), bias, "none", [], ""))

    def suits(a: Any, b: Any) -> bool:
        return bool(a.get_dtype() == torch.float32 and min(*a.get_size()[-2:], b.get_size()[-1]) >= SMALLEST)

    def our_mm(a: Any, b: Any) -> Any:
        return product(a, b) if suits(a, b) else mm(a, b)

    def our_addmm(bias: Any, a: Any, b: Any, beta: float = 1, alpha: float = 1) -> Any:
        if not suits(a, b) or not beta == alpha == 1:
            return addmm(bias, a, b, beta=beta, alpha=alpha)
        return product(a, b, bias) if len(bias.get_size()) == 1 else rules[aten.add.Tensor](product(a, b), bias)

    def our_bmm(a: Any, b: Any) -> Any:
        if not suits(a, b):
            return bmm(a, b)
        one = rules[aten.select.int]
        products = [product(one(a, 0, i), one(b, 0, i)) for i in range(int(a.get_size()[0]))]
        return rules[aten.cat.default]([rules[aten.unsqueeze.default](each, 0) for each in products])

    def our_baddbmm(bias: Any, a: Any, b: Any, beta: float = 1, alpha: float = 1) -> Any:
        if suits(a, b) and beta == alpha == 1:
            return rules[aten.add.Tensor](our_bmm(a, b), bias)
        return baddbmm(bias, a, b, beta=beta, alpha=alpha)

    rules.update({
        aten.mm.default: our_mm, aten.addmm.default: our_addmm, aten.bmm.default: our_bmm,
        aten.baddbmm.default: our_baddbmm,
    })  # fmt: skip


def die_with_parent() -> None:
    """Let the system end this process when the one that waits for it is killed, where it can (Linux)."""
    import ctypes

    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (AttributeError, OSError, TypeError):
        pass


if __name__ == "__main__":
    die_with_parent()
    compile_graph(*map(Path, sys.argv[1:]))
