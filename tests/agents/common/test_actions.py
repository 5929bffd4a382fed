"""What leaves an agent lies in its Box to the last bit, is finite, and does not depend on who evaluates meanwhile."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.callbacks import BaseCallback

from driftrl import LipschitzMBPO, PolicyFlow
from driftrl.analysis.export import export_program
from driftrl.envs import make_vec

FLOW: dict[str, Any] = {"n_steps": 32, "batch_size": 32, "n_epochs": 1, "actor_hidden": (4,), "critic_hidden": (4,)}
MODEL: dict[str, Any] = {
    "learning_starts": 8, "gradient_steps": 1, "batch_size": 8, "actor_hidden": (4,), "critic_hidden": (4,),
    "model": "none", "compile": "off", "diagnostics_interval": 0,
}  # fmt: skip
both = pytest.mark.parametrize(("kind", "fields"), [(PolicyFlow, FLOW), (LipschitzMBPO, MODEL)])


class Boxed(gym.Env[np.ndarray, np.ndarray]):
    """Checks every action; observes the number of the step."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,))

    def __init__(self, low: list[float], high: list[float]) -> None:
        self.action_space = spaces.Box(np.array(low, np.float32), np.array(high, np.float32))
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.full(3, self.steps, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.steps += 1
        return np.full(3, self.steps, np.float32), 0.0, False, self.steps % 20 == 0, {}


@both
@settings(max_examples=15)
@given(bounds=st.lists(st.tuples(st.floats(-100, 100, width=32), st.floats(0, 50, width=32)), min_size=1, max_size=3))
def test_actions_lie_in_the_box(kind: type[Any], fields: dict[str, Any], bounds: list[tuple[float, float]]) -> None:
    env = Boxed([low for low, _ in bounds], [low + width for low, width in bounds])
    wide = {"action_std": 3.0} if kind is PolicyFlow else {}
    agent = kind("MlpPolicy", env, seed=0, device="cpu", **fields | wide)
    agent.learn(64)
    for deterministic in (True, False):
        actions = agent.predict(np.random.default_rng(0).normal(size=(50, 3)), deterministic=deterministic)[0]
        assert all(env.action_space.contains(action) for action in actions)
        one = agent.predict(np.zeros(3), deterministic=deterministic)[0]
        assert env.action_space.contains(one)


def test_the_box_of_the_report_and_its_exported_program(tmp_path: Any) -> None:
    env = Boxed([-4.590265], [0.10476191])
    agent = PolicyFlow("MlpPolicy", env, seed=0, device="cpu", **FLOW | {"action_std": 3.0})
    actions = agent.predict(np.zeros((200, 3), np.float32))[0]
    assert all(env.action_space.contains(action) for action in actions)
    export_program(agent, tmp_path / "policy.pt2", sampled=True)
    program = torch.export.load(tmp_path / "policy.pt2").module()
    exported = program(obs=torch.zeros(200, 3), noise=3 * torch.randn(200, 2, 1)).numpy()
    assert all(env.action_space.contains(action) for action in exported)


@both
def test_a_dimension_of_zero_width_is_constant(kind: type[Any], fields: dict[str, Any]) -> None:
    env = Boxed([-1, 0.5], [1, 0.5])
    agent = kind("MlpPolicy", env, seed=0, device="cpu", **fields).learn(64)
    assert (agent.predict(np.zeros((5, 3)))[0][:, 1] == 0.5).all()
    assert all(weight.isfinite().all() for weight in agent.policy.parameters())


def test_random_actions_are_checked_before_they_are_taken() -> None:
    env = Boxed([-1], [1])
    agent: Any = LipschitzMBPO("MlpPolicy", env, seed=0, device="cpu", **MODEL)
    agent.action_space.sample = lambda: np.array([np.nan], np.float32)
    with pytest.raises(ValueError, match="non-finite action: got nan of environment 0"):
        agent.learn(8)
    assert env.steps == 0


class Evaluates(BaseCallback):
    """Samples actions now and then."""

    def _on_step(self) -> bool:
        self.model.predict(np.zeros((7, 4)), deterministic=False)
        return True


@both
def test_sampling_evaluation_does_not_move_training(kind: type[Any], fields: dict[str, Any]) -> None:
    agents = [
        kind("MlpPolicy", make_vec("InvertedPendulum-v5", 1, 0), seed=0, device="cpu", **fields) for _ in range(2)
    ]
    for agent, callback in zip(agents, (None, Evaluates()), strict=True):
        agent.learn(64, callback=callback)
    for name, value in agents[0].policy.state_dict().items():
        assert torch.equal(value, agents[1].policy.state_dict()[name]), name


class StopsAt(BaseCallback):
    """Ends training at a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def _on_step(self) -> bool:
        return self.num_timesteps < self.step


@both
def test_an_agent_that_a_callback_stopped_goes_on_where_the_environment_is(
    kind: type[Any], fields: dict[str, Any]
) -> None:
    env = Boxed([-1], [1])
    agent = kind("MlpPolicy", env, seed=0, device="cpu", **fields)
    agent.learn(64, callback=StopsAt(37))
    assert env.steps == 37
    assert agent._last_obs.tolist() == [[37.0] * 3]
    if kind is LipschitzMBPO:
        rows = agent.replay_buffer.transitions.all()
        assert (len(rows.obs), rows.next_obs[-1, 0].item()) == (37, 37.0)
    agent.learn(27, reset_num_timesteps=False)
    assert env.steps == (64 if kind is LipschitzMBPO else 37 + 32)  # whole rollouts
    if kind is LipschitzMBPO:
        rows = agent.replay_buffer.transitions.all()
        assert torch.equal(rows.next_obs[:, 0] - rows.obs[:, 0], torch.ones(64))
