"""Small things that pipelines written for Stable-Baselines3 do."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from driftrl import LipschitzMBPO, PolicyFlow
from driftrl.envs import make_vec

from .test_weights import both, make


@both
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_vector_environments_of_gymnasium_are_refused_with_the_remedy(kind: type[Any], mode: str) -> None:
    env = gym.make_vec("Pendulum-v1", num_envs=2, vectorization_mode=mode)
    message = r"env: got Gymnasium's \w+VectorEnv, expected a VecEnv .*; use driftrl.envs.make_vec\(id, n_envs, seed\)"
    with pytest.raises(ValueError, match=message):
        kind("MlpPolicy", env, device="cpu")
    with pytest.raises(ValueError, match=message):
        make(kind).set_env(env)
    env.close()


@pytest.mark.parametrize("kind", [PPO, PolicyFlow, LipschitzMBPO])
@pytest.mark.parametrize("backend", ["sync", "tensor"])
def test_callbacks_may_train_networks_of_their_own(kind: Any, backend: Any) -> None:
    class Discriminator(BaseCallback):
        net = torch.nn.Linear(2, 1)

        def learn(self) -> None:
            self.net(torch.ones(8, 2)).sum().backward()

        def _on_step(self) -> bool:
            self.learn()
            return True

        _on_rollout_start = _on_rollout_end = learn

    fields: dict[str, Any] = {"learning_starts": 8} if kind is LipschitzMBPO else {"n_steps": 16, "batch_size": 16}
    fields |= {} if kind is PPO else {"actor_hidden": (4,), "critic_hidden": (4,), "compile": "off"}
    env = make_vec("driftrl/MultiGoal-v0", 2, 0, backend=backend)
    kind("MlpPolicy", env, device="cpu", **fields).learn(32, callback=Discriminator())
    assert Discriminator.net.weight.grad is not None and Discriminator.net.weight.grad.abs().sum() > 0


@both
def test_custom_objects_that_no_agent_has_are_ignored(kind: type[Any], tmp_path: Path) -> None:
    make(kind).save(tmp_path / "agent")
    custom = {"learning_rate": 2e-5, "dummy": 1.0, "verbose": 2}
    agent = kind.load(tmp_path / "agent", custom_objects=custom, device="cpu")
    assert (agent.learning_rate, agent.verbose) == (2e-5, 2)
    assert not hasattr(agent, "dummy")


@pytest.mark.parametrize("kind", [PolicyFlow, LipschitzMBPO])
def test_parameters_with_parts_missing_are_refused_by_torch(kind: type[Any]) -> None:
    agent = make(kind)
    parts = {name: dict(list(each.items())[:-1]) for name, each in deepcopy(agent.get_parameters()).items()}
    with pytest.raises(RuntimeError, match="Missing key"):
        agent.set_parameters(parts, exact_match=True)
    before = [each.clone() for each in agent.policy.parameters()]
    whole = agent.get_parameters()
    agent.set_parameters({"policy": {name: each + 1 for name, each in whole["policy"].items()}}, exact_match=False)
    assert not any(map(torch.equal, before, agent.policy.parameters()))
