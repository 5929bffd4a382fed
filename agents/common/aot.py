"""Compile a graph ahead of time, in a process of its own: what the compiler needs never enters the one that trains.

    python aot.py GRAPH PACKAGE

Run as a script, for it needs PyTorch only.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def compile_graph(source: Path, package: Path) -> None:
    """Compile what `Program` wrote.

    Args:
        source: file of a graph, a description of each of its inputs (shape, strides, dtype) and the number of threads.
        package: file to write, for AOTInductor's loader.
    """
    import torch
    import torch._dynamo  # loads what unpickling a traced graph needs

    graph, inputs, threads = torch.load(source, weights_only=False)  # our parent's, in a folder of its own
    torch.set_num_threads(threads)
    examples = tuple(torch.empty_strided(shape, strides, dtype=dtype).zero_() for shape, strides, dtype in inputs)
    program: Any = torch.export.export(graph, examples)
    torch._inductor.aoti_compile_and_package(program, package_path=str(package))


if __name__ == "__main__":
    compile_graph(*map(Path, sys.argv[1:]))
