"""Policies as files that run without this library: ONNX, and programs of `torch.export`.

A file holds all that `predict` does between an observation and an action within its bounds: normaliser, solver,
clipping, and the averaged weights where the policy has them. It is one function, of any batch size B, all in float32::

    deterministic    obs [B, O]                       -> action [B, *shape of the action]
    sampled          obs [B, O], noise [B, draws, D]  -> action [B, *shape of the action]

With action chunks (`chunk` above 1) the action is [B, chunk, *shape]: the actions of so many steps, of which `execute`
are meant to be done before the function is called again.

obs is the raw observation, flattened; the entries of a Dict lie one after the other, in the order of their space. noise
is standard normal and new in each call, D the number of action dimensions, draws that of the policy: 1 for
LipschitzMBPO, 2 for PolicyFlow, and more where its steps have noise. The file says so (`describe`).
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .. import __version__
from ..agents.common.policy import BoxPolicy
from ..agents.storage.files import all_or_nothing

_OUTPUT = "action"


def export_onnx(agent: BaseAlgorithm | BoxPolicy, path: Path, *, sampled: bool = False) -> None:
    """Write a policy as ONNX, of standard operators only; `describe` under "driftrl" in the model's metadata.

    Args:
        agent: an agent of this library, or its policy.
        path: the file, which is replaced.
        sampled: the form that takes noise; otherwise the deterministic one.

    Raises:
        ValueError: if onnx or onnxscript is not installed, the agent is of another library, or a network of the user's
            cannot be traced for every batch size.
    """
    try:
        onnx: Any = importlib.import_module("onnx")
        importlib.import_module("onnxscript")
    except ImportError as error:
        raise ValueError(f"export: {error.name} is not installed; run pip install 'driftrl[export]'") from error
    policy = _policy_of(agent)
    program = _trace(policy, sampled)
    inputs = ["obs", "noise"] if sampled else ["obs"]
    with _quiet():
        converted = torch.onnx.export(
            program, (), input_names=inputs, output_names=[_OUTPUT], dynamo=True, verbose=False
        )
    assert converted is not None
    model: Any = converted.model_proto
    # What it was traced from are lines and paths of this machine.
    for part in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info):
        part.ClearField("metadata_props")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.helper.set_model_props(model, {"driftrl": json.dumps(describe(policy, sampled))})
    onnx.checker.check_model(model, full_check=True)
    content = model.SerializeToString()
    with all_or_nothing(path) as partial:
        partial.write_bytes(content)


def export_program(agent: BaseAlgorithm | BoxPolicy, path: Path, *, sampled: bool = False) -> None:
    """Write a policy as a program of `torch.export`; `describe` as its extra file "driftrl.json".

    ``torch.export.load(path).module()`` is a function of CPU tensors. It needs PyTorch alone.

    Args:
        agent: an agent of this library, or its policy.
        path: the file, named .pt2, which is replaced.
        sampled: the form that takes noise; otherwise the deterministic one.

    Raises:
        ValueError: if the agent is of another library, or a network of the user's cannot be traced for every batch
            size.
    """
    policy, content = _policy_of(agent), io.BytesIO()
    description = {"driftrl.json": json.dumps(describe(policy, sampled))}
    torch.export.save(_trace(policy, sampled), content, extra_files=description)
    with all_or_nothing(path) as partial:
        partial.write_bytes(content.getvalue())


EXPORTERS = {".onnx": export_onnx, ".pt2": export_program}
"""How a policy is written, by the ending of the file's name."""


def describe(policy: BoxPolicy, sampled: bool) -> dict[str, Any]:
    """What a user of the file must know: inputs, the parts of obs in their order, and the bounds of the actions."""
    space = policy.observation_space
    parts = space.spaces if isinstance(space, spaces.Dict) else {"obs": space}
    box: Any = policy.action_space
    return {
        "version": __version__,
        "policy": "sampled" if sampled else "deterministic",
        "obs": [{"name": name, "shape": list(part.shape or ())} for name, part in parts.items()],
        "noise": [policy.draws, policy.action_dim] if sampled else None,
        "action": {"low": box.low.tolist(), "high": box.high.tolist()},
        "chunk": policy.chunk,
        "execute": getattr(policy, "execute", 1),
    }


class _Predict(nn.Module):
    """`predict` as one function of tensors."""

    def __init__(self, policy: BoxPolicy) -> None:
        super().__init__()
        self.policy = policy
        box: Any = policy.action_space
        self.shape = box.shape if policy.chunk == 1 else (policy.chunk, *box.shape)
        self.low, self.high = (
            nn.Buffer(torch.tensor(_rounded(bound.ravel(), inward)).repeat(policy.chunk))
            for bound, inward in ((box.low, np.inf), (box.high, -np.inf))
        )

    def forward(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        action = self.policy.decide(obs, None if noise is None else noise.transpose(0, 1))
        action = self.low + 0.5 * (action + 1) * (self.high - self.low)
        action = torch.minimum(torch.maximum(action, self.low), self.high)  # the map alone may round beyond a bound
        return torch.reshape(action, (-1, *self.shape))


def _rounded(bound: np.ndarray, inward: float) -> np.ndarray:
    """Bounds as float32 that lie within those of the space, which may be of float64."""
    rounded = bound.astype(np.float32)
    is_outside = rounded < bound if inward > 0 else rounded > bound
    return np.where(is_outside, np.nextafter(rounded, np.float32(inward)), rounded)


def _policy_of(agent: BaseAlgorithm | BoxPolicy) -> BoxPolicy:
    policy = agent if isinstance(agent, BoxPolicy) else agent.policy
    if not isinstance(policy, BoxPolicy):
        raise ValueError(f"export: got {type(agent).__name__}, expected an agent of this library, or its policy")
    return policy


def _trace(policy: BoxPolicy, sampled: bool) -> ExportedProgram:
    """The program of a copy on the CPU, so that neither the policy nor its device matter to the file."""
    module = _Predict(copy.deepcopy(policy).cpu()).requires_grad_(False).eval()
    inputs = {"obs": torch.zeros(2, policy.obs_dim)}  # of size 1 torch.export would not take the batch for dynamic
    if sampled:
        inputs["noise"] = torch.zeros(2, policy.draws, policy.action_dim)
    try:
        return torch.export.export(module, (), inputs, dynamic_shapes={name: {0: Dim("batch")} for name in inputs})
    except Exception as error:  # of many kinds; torch explains at length
        raise ValueError(
            f"export: {type(policy).__name__} cannot be traced for every batch size, expected sizes as x.shape[0], not "
            f"len(x), and no branches on values ({type(error).__name__}: {str(error).strip().splitlines()[0]})"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.onnx says of its own code and of torchvision, which is not needed."""
    registry = logging.getLogger("torch.onnx._internal.exporter._registration")
    before, registry.disabled = registry.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
            yield
    finally:
        registry.disabled = before
