"""`rollout_buffer` is read as PPO's, and cannot be written to."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from driftrl import PolicyFlow

from .test_density import make
from .test_rollout import Counter

ARRAYS = ("observations", "actions", "rewards", "returns", "advantages", "values", "log_probs", "episode_starts")


class Reader(BaseCallback):
    """Reads a buffer as callbacks of PPO do."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[int, bool]] = []
        self.arrays: dict[str, Any] = {}
        self.minibatches: list[Any] = []
        self.log_ratios: list[torch.Tensor] = []

    def _on_step(self) -> bool:
        self.steps.append((self.locals["rollout_buffer"].pos, self.locals["rollout_buffer"].full))
        return True

    def _on_rollout_end(self) -> None:
        buffer: Any = self.model.rollout_buffer  # type: ignore[attr-defined]
        self.steps.append((buffer.size(), buffer.full))
        self.arrays = {name: getattr(buffer, name) for name in ARRAYS}
        self.minibatches = list(buffer.get(4))
        policy: Any = self.model.policy
        for each in self.minibatches:
            with torch.no_grad():
                log_prob = policy.evaluate_actions(each.observations, each.actions)[1]
            self.log_ratios.append(log_prob - each.old_log_prob)


def read(kind: type[Any], terminates: bool = True) -> tuple[Any, Reader]:
    env = DummyVecEnv([lambda: Counter(3, terminates), lambda: Counter(4, terminates)])
    own: dict[str, Any] = {} if kind is PPO else {"normalize_reward": False, "normalize_observation": False}
    agent = kind("MlpPolicy", env, n_steps=6, batch_size=12, gamma=0.5, seed=0, device="cpu", **own)
    reader = Reader()
    agent.learn(24, callback=reader)
    return agent, reader


def test_the_names_and_shapes_are_those_of_ppo() -> None:
    (agent, ours), (ppo, theirs) = read(PolicyFlow), read(PPO)
    assert ours.steps == theirs.steps
    for name in ARRAYS:
        mine, other = ours.arrays[name], theirs.arrays[name]
        assert (mine.shape, mine.dtype) == ((6, 2, *other.shape[2:]), np.float32), name
    for name in ("observations", "rewards", "episode_starts"):  # the task does not look at the actions
        np.testing.assert_array_equal(ours.arrays[name], theirs.arrays[name], err_msg=name)
    for mine, other in zip(ours.minibatches, theirs.minibatches, strict=True):
        assert [each.shape for each in mine] == [each.shape for each in other]
        assert type(mine) is type(other)
    for name in ("buffer_size", "n_envs", "gamma", "gae_lambda", "observation_space", "action_space", "device"):
        assert getattr(agent.rollout_buffer, name) == getattr(ppo.rollout_buffer, name)


def test_returns_follow_from_rewards_values_and_starts() -> None:
    agent, reader = read(PolicyFlow)
    arrays, box = reader.arrays, spaces.Box(-1, 1, (1,))
    oracle = RolloutBuffer(6, box, box, gamma=0.5, gae_lambda=agent.gae_lambda, n_envs=2)
    for t in range(6):
        value = torch.tensor(arrays["values"][t])
        oracle.add(np.zeros((2, 1)), np.zeros((2, 1)), arrays["rewards"][t], arrays["episode_starts"][t], value, value)
    last = (arrays["returns"][-1] - arrays["rewards"][-1]) / 0.5  # V of what follows, where the episode goes on
    ended = np.array([True, True])  # after 12 steps episodes of 3 and of 4 steps are over
    oracle.compute_returns_and_advantage(torch.tensor(last), ended)
    np.testing.assert_allclose(arrays["advantages"], oracle.advantages, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(arrays["returns"], oracle.returns, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keys", [False, True])
def test_minibatches_hold_each_sample_once_with_the_density_of_the_policy(keys: bool) -> None:
    agent, reader = make(keys, n_steps=8), Reader()
    agent.learn(16, callback=reader)
    drawn = np.concatenate([each.actions for each in reader.minibatches])
    assert sorted(drawn[:, 0].tolist()) == sorted(reader.arrays["actions"][..., 0].ravel().tolist())
    assert len(reader.log_ratios) == 4
    assert torch.cat(reader.log_ratios).abs().max() < 1e-4  # of the policy with itself, whatever rows come together
    observed = reader.arrays["observations"]
    if keys:
        assert {key: part.shape for key, part in observed.items()} == {"a": (8, 1, 2), "b": (8, 1, 1)}
    box: Any = agent.action_space
    middle = (box.high + box.low) / 2
    assert np.abs(reader.arrays["actions"] - middle).mean(axis=(0, 1)) == pytest.approx([0.8, 0.2], abs=0.6)


def test_writing_is_refused() -> None:
    agent, reader = read(PolicyFlow)
    for name in (*ARRAYS, "pos", "full", "buffer_size"):
        with pytest.raises(AttributeError, match=f"rollout_buffer.{name}: cannot be set, this is a view"):
            setattr(agent.rollout_buffer, name, 0)
    for name in ARRAYS:
        with pytest.raises(ValueError, match="read-only"):
            reader.arrays[name][0] = 0


def test_what_is_not_there_is_said() -> None:
    agent = make()
    assert (agent.rollout_buffer.full, agent.rollout_buffer.pos) == (False, 0)
    with pytest.raises(RuntimeError, match=r"rollout_buffer: the rollout is not complete yet; .*on_rollout_end"):
        _ = agent.rollout_buffer.returns
    agent.learn(8)
    with torch.no_grad():
        agent.policy.actor.base_log_std.add_(0.1)
    with pytest.raises(RuntimeError, match="log_probs: the policy that acted has changed since"):
        _ = agent.rollout_buffer.log_probs
    assert agent.rollout_buffer.returns.shape == (8, 1)


def test_log_probs_are_those_of_the_weights_that_acted() -> None:
    seen = list[str]()

    class Writes(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            agent = cast(PolicyFlow, self.model)
            before = agent.rollout_buffer.full
            with torch.no_grad():
                next(agent.policy.actor.parameters()).add_(0.1)
            try:
                _ = agent.rollout_buffer.log_probs
            except RuntimeError as error:
                seen.append(f"{before} {error}")

    make().learn(8, Writes())
    assert seen == ["True log_probs: the policy that acted has changed since; read them in on_rollout_end"]


def test_a_saved_agent_lacks_the_rollout_and_a_loaded_one_has_a_new_one(tmp_path: Any) -> None:
    agent, _ = read(PolicyFlow)
    agent.save(tmp_path / "agent")
    loaded = PolicyFlow.load(tmp_path / "agent", device="cpu")
    assert (loaded.rollout_buffer.full, loaded.rollout_buffer.pos) == (False, 0)


def test_what_was_read_stays_when_the_next_rollout_comes() -> None:
    agent = make()
    agent.learn(8)
    observations, actions = agent.rollout_buffer.observations, agent.rollout_buffer.actions
    assert isinstance(observations, np.ndarray)
    before = np.array(observations), np.array(actions)
    agent.learn(8, reset_num_timesteps=False)
    assert np.array_equal(observations, before[0]) and np.array_equal(actions, before[1])
