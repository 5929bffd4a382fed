"""An update as one function is that of PyTorch's optimizers; programs are kept on disk and found again."""

from __future__ import annotations

import copy
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from driftrl.agents.common import program
from driftrl.agents.common.compiler import SCRIPT, compile_program
from driftrl.agents.common.program import Program
from driftrl.agents.common.update import Gradient, Loss, Losses
from driftrl.agents.common.weights import Weights


class Policy(nn.Module):
    """A layer that learns, with its average, as `Weights` expects them."""

    followed, follower = "actor", "average"

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.actor = nn.Linear(3, 2)
        self.average = copy.deepcopy(self.actor).requires_grad_(False)
        self.averaging, self.latest_weights = 0.1, None
        self.optimizer = kind(self.actor.parameters(), **options)


def loss(policy: Policy, x: Tensor) -> Losses:
    return Losses({"loss": Loss(policy.actor(x).square().mean())}, {})


@pytest.mark.parametrize(
    "kind", [torch.optim.Adam, torch.optim.AdamW, partial(torch.optim.Adam, decoupled_weight_decay=True)]
)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_are_those_of_pytorch(kind: Any, decay: float) -> None:
    torch.manual_seed(0)
    policy: Any = Policy(kind, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay, fused=True)
    oracle = copy.deepcopy(policy.actor)
    peer = kind(oracle.parameters(), lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay, foreach=False)
    mean = [each.detach().clone() for each in oracle.parameters()]
    gradient = Gradient(policy, loss, 0.5)
    for i in range(8):
        x = torch.randn(5, 3)
        weights = Weights.of(policy)
        joined = weights.joined()
        assert joined is not None
        table = gradient.step(joined, x)
        weights.finish()
        peer.zero_grad()
        oracle(x).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(oracle.parameters(), 0.5)
        peer.step()
        assert gradient.names == ("loss", "train/loss", "train/grad_norm")
        torch.testing.assert_close(table[2], norm)
        for average, own, theirs in zip(mean, policy.actor.parameters(), oracle.parameters(), strict=True):
            average.lerp_(theirs.detach(), 0.1)
            torch.testing.assert_close(own, theirs, rtol=2e-6, atol=1e-7)
        for average, own in zip(mean, policy.average.parameters(), strict=True):
            torch.testing.assert_close(own, average, rtol=2e-6, atol=1e-7)
        if i == 3:  # as an annealed rate
            policy.optimizer.param_groups[0]["lr"] = peer.param_groups[0]["lr"] = 0.003
    state, theirs = policy.optimizer.state_dict()["state"], peer.state_dict()["state"]
    for index, moments in state.items():
        for name, value in moments.items():
            torch.testing.assert_close(value, theirs[index][name], rtol=2e-6, atol=1e-8)


def test_a_step_with_a_scalar_that_is_not_finite_changes_nothing_where_it_is_to_be_skipped() -> None:
    policy: Any = Policy(torch.optim.AdamW, lr=0.01, fused=True)
    gradient, weights = Gradient(policy, loss, None, skips=True), Weights.of(policy)
    joined = weights.joined()
    assert joined is not None
    gradient.step(joined, torch.ones(5, 3))
    before = [each.clone() for each in joined]
    assert not gradient.step(joined, torch.full((5, 3), torch.inf)).isfinite().all()
    assert all(torch.equal(one, other) for one, other in zip(before, joined, strict=True))


def test_a_program_is_found_on_disk_and_a_damaged_one_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a folder"))
    captured, compiled = torch.tensor([1.0, 2.0]), list[str]()
    compile_now = compile_program

    def counted(*arguments: Any) -> None:
        compiled.append("once")
        compile_now(*arguments)

    def function(x: Tensor, parts: tuple[Tensor, None]) -> tuple[Tensor, dict[str, Tensor]]:
        x.add_(1)
        return x * captured, {"sum": parts[0].sum()}

    monkeypatch.setattr(program, "compile_program", counted)
    for damage in ("", "", "cut", "changed"):
        program._loaded.clear()
        files = list((tmp_path / "a folder" / "driftrl" / "programs").glob("*"))
        if damage:
            content = bytearray(files[0].read_bytes())
            content[len(content) // 2] ^= 255  # its code would run, and crash
            files[0].write_bytes(content[:1000] if damage == "cut" else content)
        run = Program(function)
        for start in (0.0, 5.0):
            x = torch.full((2,), start)
            captured.copy_(torch.tensor([1.0, start]))  # its present value counts
            product, named = run(x, (torch.tensor([2.0, 3.0]), None))
            assert x.tolist() == [start + 1, start + 1]
            assert product.tolist() == [start + 1, start * (start + 1)]
            assert named["sum"] == 5
    assert len(compiled) == 3
    assert [each.suffix for each in (tmp_path / "a folder" / "driftrl" / "programs").iterdir()] == [".pt2"]


def test_another_compiler_of_ours_makes_other_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = torch.fx.symbolic_trace(nn.Identity())
    before = program._key(graph, [])
    changed = tmp_path / "aot.py"
    changed.write_bytes(SCRIPT.read_bytes() + b"# mended")
    monkeypatch.setattr(program, "SCRIPT", changed)
    assert program._key(graph, []) != before


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_matrices_that_onednn_multiplies_are_those_of_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(program, "onednn_is_faster", lambda: True)
    a, b, bias, flat = torch.randn(40, 50), torch.randn(50, 60), torch.randn(60), torch.randn(40 * 50)
    many, others = torch.randn(3, 40, 50), torch.randn(3, 60, 50)

    def function(a: Tensor, b: Tensor, bias: Tensor, flat: Tensor, many: Tensor, others: Tensor) -> dict[str, Tensor]:
        part = flat.view(50, 40)
        ahead = a @ b
        return {
            "mm": ahead, "first transposed": part.t() @ b, "second transposed": ahead @ b.t(),
            "both transposed": ahead.t() @ part.t(), "bias": torch.addmm(bias, a, b), "sum": a @ b + ahead.sin(),
            "scaled": torch.addmm(bias, a, b, beta=2.0, alpha=0.5), "few columns": a @ b[:, :3],
            "bmm": torch.bmm(many, others.transpose(1, 2)),
            "baddbmm": torch.baddbmm(bias.expand(3, 1, 60), many, others.transpose(1, 2)),
            "bmm of one": torch.bmm(many[:1], others[1:2].transpose(1, 2)).sin(),
            "one bias for each": torch.baddbmm(bias[:3].view(3, 1, 1), many, others.transpose(1, 2)),
            "float64": a.double() @ b.double(),
        }  # fmt: skip

    given = (a, b, bias, flat, many, others)
    expected = function(*given)
    found = Program(function)(*given)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=3e-5), name
    (package,) = (tmp_path / "driftrl" / "programs").iterdir()
    with zipfile.ZipFile(package) as archive:
        code = b"".join(archive.read(each) for each in archive.namelist() if each.endswith(".cpp"))
    assert code.count(b"linear_pointwise(") > 15


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_onednn_multiplies_where_mkl_is_slow(
    vendor: str, capability: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("mkldnn", "mkl"):
        monkeypatch.setattr(getattr(torch.backends, library), "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(program, "_processor", lambda: f"vendor_id\t: {vendor}")
    program.onednn_is_faster.cache_clear()
    try:
        assert program.onednn_is_faster() == expected
    finally:
        program.onednn_is_faster.cache_clear()


def test_a_network_that_was_changed_is_traced_anew_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Sequential(nn.Linear(2, 2), nn.Identity())
    traces, x = list[int](), torch.ones(3, 2)

    def traced(graph: Any, inputs: list[Tensor]) -> Uncompiled:
        traces.append(1)
        return Uncompiled(graph)

    monkeypatch.setattr(program, "_program", traced)
    function = Program(layer.forward)
    torch.testing.assert_close(function(x), layer(x))
    with torch.no_grad():
        next(layer.parameters()).add_(1)
    function.check_again()
    torch.testing.assert_close(function(x), layer(x))
    assert len(traces) == 1
    layer[1].train(not layer[1].training)
    function.check_again()
    function(x)
    assert len(traces) == 2
    layer[1].train(not layer[1].training)
    function.check_again()
    layer[1].train(not layer[1].training)  # what counts is how the network is when it is called
    function(x)
    assert len(traces) == 2
    layer[0].bias = nn.Parameter(torch.tensor([5.0, 6.0]))  # nobody asks
    torch.testing.assert_close(function(x), layer(x))
    assert len(traces) == 3


class Uncompiled:
    """A graph in the place of its program."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        return list(self.graph(*inputs))
