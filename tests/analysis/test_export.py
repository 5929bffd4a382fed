"""Exported policies, run by onnxruntime and by PyTorch alone, against `predict`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO

from driftrl import PolicyFlow
from driftrl.agents.common.policy import BoxPolicy
from driftrl.agents.lipschitz_mbpo.sac import SACPolicy
from driftrl.agents.policyflow.policy import FlowPolicy
from driftrl.analysis.export import EXPORTERS, export_onnx, export_program

VECTOR = spaces.Box(-np.inf, np.inf, (5,))
ACTIONS = spaces.Box(np.array([-2.0, 0.0, -0.1], np.float32), np.array([2.0, 1.0, 0.7], np.float32))

CASES: list[tuple[str, type[Any], dict[str, Any], bool]] = [  # file, policy, its options, sampled
    (".onnx", FlowPolicy, {"base": "gaussian", "solver": "rk4", "activation_fn": "mish"}, True),
    (".onnx", FlowPolicy, {"solver_steps": 3, "langevin_eps": 0.5, "ema_decay": 0.9}, True),
    (".onnx", FlowPolicy, {"base": "mixture", "base_std": 1.0}, True),
    (".pt2", FlowPolicy, {"base": "mixture", "base_std": 1.0}, False),
    (".onnx", SACPolicy, {}, True),
    (".onnx", SACPolicy, {"normalize_observation": True, "activation_fn": "elu"}, False),
    (".pt2", FlowPolicy, {"solver": "midpoint", "ema_decay": 0.9, "normalize_observation": False}, False),
    (".pt2", SACPolicy, {"normalize_observation": True}, True),
]


def make(
    kind: type[Any], options: dict[str, Any], observation_space: spaces.Space[Any] = VECTOR,
    action_space: spaces.Space[Any] = ACTIONS,
) -> BoxPolicy:  # fmt: skip
    """A policy whose every weight and statistic matters, and whose actions also meet their bounds."""
    torch.manual_seed(0)
    policy: BoxPolicy = kind(observation_space, action_space, lambda _: 1e-3, net_arch=[16, 16], **options)
    policy.obs_norm.update(3 * torch.randn(50, policy.obs_dim) + 2)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return policy


def run(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The file's actions, by what a user would run it with."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return np.asarray(session.run(["action"], inputs)[0])
    program: Any = torch.export.load(path).module()
    return np.asarray(program(**{name: torch.from_numpy(array) for name, array in inputs.items()}))


def description(path: Path) -> Any:
    """What the file says of itself."""
    if path.suffix == ".onnx":
        return json.loads({each.key: each.value for each in onnx.load(path).metadata_props}["driftrl"])
    extra = {"driftrl.json": ""}
    torch.export.load(path, extra_files=extra)
    return json.loads(extra["driftrl.json"])


def expected(policy: BoxPolicy, obs: np.ndarray, sampled: bool) -> tuple[np.ndarray, np.ndarray]:
    """Actions of `predict` and the noise [B, draws, D] behind them: PyTorch's own generator, drawn from alike."""
    torch.manual_seed(3)
    actions, _ = policy.predict(obs, deterministic=not sampled)
    torch.manual_seed(3)
    return actions, torch.randn(policy.draws, len(obs), policy.action_dim).transpose(0, 1).numpy()


@pytest.mark.parametrize(("suffix", "kind", "options", "sampled"), CASES)
def test_files_act_as_predict_does(
    suffix: str, kind: type[Any], options: dict[str, Any], sampled: bool, tmp_path: Path
) -> None:
    policy, path = make(kind, options), tmp_path / f"policy{suffix}"
    EXPORTERS[suffix](policy, path, sampled=sampled)
    for batch in (1, 200):  # the batch it was traced with has 2
        obs = 4 * np.random.default_rng(batch).normal(size=(batch, 5)).astype(np.float32)
        actions, noise = expected(policy, obs, sampled)
        got = run(path, {"obs": obs} | ({"noise": noise} if sampled else {}))
        np.testing.assert_allclose(got, actions, atol=1e-5)
    assert len(np.unique(got, axis=0)) > 20
    assert kind is SACPolicy or (got == ACTIONS.low).any()  # clipped


@pytest.mark.parametrize("suffix", EXPORTERS)
def test_dict_observations_and_shapes_of_actions(suffix: str, tmp_path: Path) -> None:
    space = spaces.Dict({"goal": spaces.Box(-1, 1, (2,)), "angles": spaces.Box(-1, 1, (2, 3), np.float64)})
    actions = spaces.Box(np.float32([[-1, -2], [0, 1]]), np.float32([[1, 2], [3, 1.5]]))  # type: ignore[arg-type]
    policy, path = make(SACPolicy, {}, space, actions), tmp_path / f"policy{suffix}"
    EXPORTERS[suffix](policy, path)
    space.seed(0)
    batch: Any = {key: np.stack([sample[key] for sample in (space.sample() for _ in range(7))]) for key in space.spaces}
    described = description(path)
    assert {part["name"]: tuple(part["shape"]) for part in described["obs"]} == {"goal": (2,), "angles": (2, 3)}
    assert described["action"] == {"low": actions.low.tolist(), "high": actions.high.tolist()}
    flat = np.concatenate([batch[part["name"]].reshape(7, -1) for part in described["obs"]], 1).astype(np.float32)
    np.testing.assert_allclose(run(path, {"obs": flat}), policy.predict(batch, deterministic=True)[0], atol=1e-5)


def test_onnx_holds_standard_operators_in_one_file_and_nothing_of_this_machine(tmp_path: Path) -> None:
    export_onnx(make(SACPolicy, {}), tmp_path / "policy.onnx", sampled=True)
    assert [file.name for file in tmp_path.iterdir()] == ["policy.onnx"]
    model = onnx.load(tmp_path / "policy.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {"obs": ["batch", 5], "noise": ["batch", 1, 3], "action": ["batch", 3]}
    assert description(tmp_path / "policy.onnx")["noise"] == [1, 3]
    assert b".py" not in model.SerializeToString()
    assert not any("critic" in weights.name for weights in model.graph.initializer)


@pytest.mark.slow
def test_a_program_needs_pytorch_alone(tmp_path: Path) -> None:
    export_program(make(FlowPolicy, {}), tmp_path / "policy.pt2", sampled=True)
    code = (
        "import sys, torch; program = torch.export.load('policy.pt2').module(); "
        "print(program(obs=torch.zeros(4, 5), noise=torch.zeros(4, 2, 3)).shape[0], 'driftrl' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert out == "4 False\n"


def test_an_agent_goes_on_after_its_export(tmp_path: Path) -> None:
    agent = PolicyFlow("MlpPolicy", "InvertedPendulum-v5", n_steps=16, batch_size=16, n_epochs=1, device="cpu", seed=0)
    agent.learn(16)
    export_program(agent, tmp_path / "policy.pt2")
    agent.learn(16)
    obs = np.ones((3, 4), np.float32)
    assert not np.allclose(run(tmp_path / "policy.pt2", {"obs": obs}), agent.predict(obs, deterministic=True)[0])
    export_program(agent, tmp_path / "policy.pt2")
    got = run(tmp_path / "policy.pt2", {"obs": obs})
    np.testing.assert_allclose(got, agent.predict(obs, deterministic=True)[0], atol=1e-5)


@pytest.mark.parametrize("suffix", EXPORTERS)
def test_actions_are_float32_within_bounds_of_float64(suffix: str, tmp_path: Path) -> None:
    box = spaces.Box(np.array([-0.1, 0.3]), np.array([0.1, 0.7]), dtype=np.float64)  # no float32 equals one of them
    policy: Any = make(FlowPolicy, {}, action_space=box)
    policy.decide, path = lambda obs, _: obs[:, :2].clamp(-1, 1), tmp_path / f"policy{suffix}"
    EXPORTERS[suffix](policy, path)
    actions = run(path, {"obs": 9 * np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32)})
    assert actions.dtype == np.float32
    assert (actions.astype(float) >= box.low).all() and (actions.astype(float) <= box.high).all()
    np.testing.assert_allclose(actions.min(0), box.low, atol=1e-7)  # they do meet them
    np.testing.assert_allclose(actions.max(0), box.high, atol=1e-7)


@pytest.mark.parametrize("suffix", EXPORTERS)
def test_a_disk_that_is_full_leaves_the_former_file(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("No space left on device")

    policy, path = make(SACPolicy, {}), tmp_path / f"policy{suffix}"
    EXPORTERS[suffix](policy, path)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        EXPORTERS[suffix](policy, path, sampled=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        EXPORTERS[suffix](policy, tmp_path / "missing" / path.name)


class FixedBatch(torch.nn.Module):
    def forward(self, t: float, x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(t, dtype=x.dtype).expand(len(x)).unsqueeze(1) * x


@pytest.mark.parametrize("suffix", EXPORTERS)
def test_a_field_of_the_users_that_fixes_the_batch_is_refused_in_one_line(suffix: str, tmp_path: Path) -> None:
    policy: Any = make(FlowPolicy, {})
    policy.actor.field = FixedBatch()
    with pytest.raises(ValueError, match=r"^export: FlowPolicy cannot be traced.* x.shape\[0\]") as caught:
        EXPORTERS[suffix](policy, tmp_path / f"policy{suffix}")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ppo = PPO("MlpPolicy", "InvertedPendulum-v5", n_steps=16, batch_size=16, device="cpu")
    with pytest.raises(ValueError, match="got PPO, expected an agent of this library, or its policy"):
        export_program(ppo, tmp_path / "policy.pt2")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"export: onnxscript is not installed; run pip install 'driftrl\[export\]'"):
        export_onnx(make(FlowPolicy, {}), tmp_path / "policy.onnx")
    assert not list(tmp_path.iterdir())
