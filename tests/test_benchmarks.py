import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def learning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark's module, with its results elsewhere."""
    spec = importlib.util.spec_from_file_location("learning", ROOT / "benchmarks" / "learning.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "learning", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "CURVE_POINTS", 4)
    return module


def test_kept_results_make_the_table(learning: ModuleType, tmp_path: Path) -> None:
    arms = ("policyflow:solver_steps=1,activation=tanh", "sb3-preset")
    for arm in arms:
        learning.execute(learning.Run("InvertedPendulum-v5", arm, 0, 2048))
    result = json.loads(
        (tmp_path / "results/InvertedPendulum-v5-2k/policyflow_solver_steps_1_activation_tanh/s0.json").read_text()
    )
    assert (result["settings"]["solver_steps"], result["settings"]["activation"]) == (1, "tanh")
    assert len(result["evaluation"]["sampled"]["returns"]) == learning.EVALUATION_EPISODES
    assert [int(steps) // 500 for steps, _ in result["curve"]] == [1, 2, 3, 4]
    table = learning.table(("InvertedPendulum-v5",), arms, 2048).splitlines()
    assert len(table) == 4
    times = learning.time_table(("InvertedPendulum-v5",), arms, 2048, reference="sb3-preset").splitlines()
    assert len(times) == 3
    learning.plot(("InvertedPendulum-v5",), arms, 2048, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("env", ["HalfCheetah-v5", "Hopper-v5"])
def test_controls_get_the_presets_hyperparameters(learning: ModuleType, env: str) -> None:
    agent, settings = learning.sb3_preset(learning.Run(env, "sb3-preset", 0, 1))
    n_envs, config = learning.preset(env)
    assert (agent.n_envs, agent.n_steps, agent.batch_size) == (n_envs, config.n_steps, config.batch_size)
    assert (agent.gamma, agent.n_epochs, agent.clip_range(1)) == (config.gamma, config.n_epochs, config.clip_range)
    assert settings["net_arch"]["pi"] == list(config.actor_hidden)
    assert [m.out_features for m in agent.policy.mlp_extractor.policy_net[::2]] == list(config.actor_hidden)
