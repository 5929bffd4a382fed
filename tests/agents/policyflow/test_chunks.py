"""Action chunks: advantages against a semi-Markov oracle, and what environments see of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor

from driftrl import PolicyFlow
from driftrl.agents.common.demonstrations import Demonstrations
from driftrl.agents.policyflow.advantages import chunk_advantage, generalized_advantage
from driftrl.agents.policyflow.rollout import drawn_rows
from driftrl.analysis.export import export_program
from driftrl.analysis.multimodality import play
from driftrl.envs import make_vec

pytestmark = pytest.mark.filterwarnings("ignore:pretraining:UserWarning")


class Recorder(gym.Env[np.ndarray, np.ndarray]):
    """Observations are the step's number; keeps all actions, by episode; every third episode is cut off by a limit."""

    observation_space = spaces.Box(0, 100, (1,))
    action_space = spaces.Box(np.array([-1, 0], np.float32), np.array([1, 4], np.float32))

    def __init__(self, length: int, truncates: bool = False) -> None:
        self.length, self.truncates = length, truncates
        self.episodes: list[list[np.ndarray]] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.episodes.append([])
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.episodes[-1].append(np.array(action))
        count = len(self.episodes[-1])
        over = count == self.length
        return np.full(1, count, np.float32), float(count), over and not self.truncates, over and self.truncates, {}


def small(env: Any, **fields: Any) -> PolicyFlow:
    settings: dict[str, Any] = {
        "n_steps": 16, "batch_size": 8, "n_epochs": 1, "actor_hidden": (8,), "critic_hidden": (8,), "compile": "off",
        "seed": 0, "device": "cpu", "normalize_reward": False, "lr_schedule": "constant",
    }  # fmt: skip
    return PolicyFlow("MlpPolicy", env, **(settings | fields))


def semi_markov(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, ended: Tensor, decided: Tensor,
    gamma: float, lam: float,
) -> dict[int, float]:  # fmt: skip
    """Advantages of one environment's decisions, by their definition: forward sums over whole decisions."""
    steps = len(rewards)
    starts = [t for t in range(steps) if decided[t]]
    options = []  # start, reward, discount, bootstrap value, whether the episode ended
    for start in starts:
        total, discount, t = 0.0, 1.0, start
        while True:
            total += discount * float(rewards[t])
            discount *= gamma
            if ended[t] or t + 1 == steps or decided[t + 1]:
                break
            t += 1
        options.append((start, total, discount, float((1 - terminated[t]) * next_values[t]), bool(ended[t])))
    found = {}
    for i, (start, *_) in enumerate(options):
        advantage, weight = 0.0, 1.0
        for begin, total, discount, value, over in options[i:]:
            advantage += weight * (total + discount * value - float(values[begin]))
            if over:
                break
            weight *= discount * lam
        found[start] = advantage
    return found


def random_rollout(seed: int) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(seed)
    rewards, values, next_values = torch.randn(3, 40, 3, generator=rng, dtype=torch.float64)
    ended = (torch.rand(40, 3, generator=rng) < 0.15).double()
    # The value of the state reached is that of the next row unless the episode ended.
    next_values[:-1] = torch.where(ended[:-1] > 0, next_values[:-1], values[1:])
    decided = (torch.rand(40, 3, generator=rng) < 0.4).double()
    decided[0] = 1
    decided[1:] = torch.maximum(decided[1:], ended[:-1])
    return {
        "rewards": rewards, "values": values, "next_values": next_values, "ended": ended, "decided": decided,
        "terminated": ended * (torch.rand(40, 3, generator=rng) < 0.5),
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_advantages_of_decisions_are_those_of_the_semi_markov_process(seed: int) -> None:
    parts = random_rollout(seed)
    found = chunk_advantage(**parts, gamma=0.9, lam=0.8)
    for env in range(3):
        one = {name: each[:, env] for name, each in parts.items()}
        for start, expected in semi_markov(**one, gamma=0.9, lam=0.8).items():
            assert found[start, env].item() == pytest.approx(expected, abs=1e-9)


def test_advantages_of_single_steps_are_the_generalized_ones_and_with_lambda_1_those_of_any_chunks() -> None:
    parts = random_rollout(7)
    decided = parts.pop("decided")
    step_by_step = chunk_advantage(**parts, decided=torch.ones_like(decided), gamma=0.9, lam=0.8)
    torch.testing.assert_close(step_by_step, generalized_advantage(**parts, gamma=0.9, lam=0.8))
    # gamma^k returns are the returns: a decision that lasted k steps discounts as its steps do.
    chunked = chunk_advantage(**parts, decided=decided, gamma=0.9, lam=1.0)
    unchunked = generalized_advantage(**parts, gamma=0.9, lam=1.0)
    torch.testing.assert_close(chunked[decided > 0], unchunked[decided > 0])


@pytest.mark.parametrize(("chunk", "execute"), [(3, None), (4, 2), (2, 1)])
@pytest.mark.parametrize("truncates", [False, True])
def test_environments_do_the_beginnings_of_chunks_and_episodes_begin_with_new_ones(
    chunk: int, execute: int | None, truncates: bool
) -> None:
    envs = [Recorder(length, truncates) for length in (5, 7, 100)]
    agent = small(DummyVecEnv([lambda env=env: env for env in envs]), chunk=chunk, execute=execute)  # type: ignore[misc]
    seen: list[np.ndarray] = []

    class Keep(BaseCallback):
        def _on_step(self) -> bool:
            seen.append(self.locals["decided"][self.locals["step"]].copy())
            return True

        def _on_rollout_end(self) -> None:
            batches.extend(agent.rollout_buffer.get())

    batches: list[Any] = []
    agent.learn(3 * 16, Keep())
    assert agent.num_timesteps == 48  # steps of the environments
    drawn = agent.policy.to_units(agent.storage.drawn[2]).view(16, 3, chunk, 2).numpy()
    low, high = agent.action_space.low, agent.action_space.high  # type: ignore[attr-defined]
    steps = execute or chunk
    for i, env in enumerate(envs):
        acted = [(episode, k) for episode, actions in enumerate(env.episodes) for k in range(len(actions))]
        since = decision = 0
        for t, (episode, k) in enumerate(acted[:16]):
            due = t == 0 or k == 0 or since == steps
            assert seen[t][i] == due
            since, decision = (0, t) if due else (since, decision)
            np.testing.assert_allclose(
                env.episodes[episode][k], drawn[decision, i, since].clip(low, high), rtol=1e-5, atol=1e-6
            )
            since += 1
    assert len(agent.samples.obs) == agent.config.decisions(3) == -(-16 // steps) * 3
    decided = agent.rollout_buffer.decided
    assert np.array_equal(decided, np.stack(seen)) and decided[0].all()
    (batch,) = batches
    assert batch.actions.shape == (decided.sum(), 2 * chunk)
    numbers = agent.storage.features[:-1, :, 0][torch.from_numpy(decided.copy())]
    assert sorted(batch.observations[:, 0].tolist()) == sorted(numbers.tolist())


def test_what_is_learned_from_are_decisions_with_the_advantages_of_their_steps() -> None:
    agent = small(DummyVecEnv([lambda: Recorder(5)]), batch_size=6, chunk=3, gamma=0.5, gae_lambda=1.0, critic_gain=0.0)
    agent.learn(16)  # decisions at 0, 3 | 5, 8 | 10, 13 | 15
    rewards = torch.tensor([1.0, 2, 3, 4, 5]).repeat(4)[:16]
    found = {}
    for t in (0, 3, 5, 8, 10, 13, 15):
        until = min((t // 5 + 1) * 5, 16)
        found[t] = sum(0.5 ** (k - t) * rewards[k].item() for k in range(t, until))
    advantages = torch.from_numpy(agent.rollout_buffer.advantages.copy())[:, 0]
    assert [advantages[t].item() for t in found] == pytest.approx(list(found.values()))  # all values are 0
    assert set(agent.samples.advantages.tolist()) <= {advantages[t].item() for t in found}


def test_predict_goes_on_with_its_chunks_where_the_state_is_given_back() -> None:
    agent = small(make_vec("InvertedPendulum-v5", 2, 0), chunk=4, execute=3).learn(64)
    obs = np.array([[0.01, 0, 0, 0], [0.02, 0.1, 0, 0]], np.float32)
    first, state = agent.predict(obs, deterministic=True)
    assert first.shape == (2, 1) and state is not None
    whole = agent.policy.unscale_action(state[0])  # [2, 4, 1]
    np.testing.assert_array_equal(first, whole[:, 0])
    other = obs + 0.3
    second, state = agent.predict(other, state, np.zeros(2, bool), deterministic=True)
    np.testing.assert_array_equal(second, whole[:, 1])
    third, state = agent.predict(other, state, np.array([True, False]), deterministic=True)  # one begins an episode
    anew, _ = agent.predict(other, deterministic=True)
    np.testing.assert_allclose(third, np.stack([anew[0], whole[1, 2]]), rtol=1e-6)
    fourth, state = agent.predict(other, state, np.zeros(2, bool), deterministic=True)  # three of four are done
    np.testing.assert_allclose(fourth[1], anew[1], rtol=1e-6)
    single, state = agent.predict(obs[0], deterministic=True)
    np.testing.assert_allclose(single, first[0], rtol=1e-5)
    single, state = agent.predict(other[0], state, deterministic=True)
    np.testing.assert_allclose(single, whole[0, 1], rtol=1e-5)
    with pytest.raises(ValueError, match=r"state: got shapes .*expected \[2, 4, 1\] and \[2\]"):
        agent.predict(obs, state, deterministic=True)


def test_predict_leaves_the_state_that_it_was_given_as_it_was() -> None:
    agent, obs = small(Recorder(7), batch_size=6, chunk=3), np.zeros((2, 1), np.float32)
    _, state = agent.predict(obs, deterministic=True)
    assert state is not None
    before = [each.copy() for each in state]
    once, _ = agent.predict(obs, state, np.array([True, False]), deterministic=True)
    for kept, each in zip(before, state, strict=True):
        np.testing.assert_array_equal(each, kept)
    again, _ = agent.predict(obs, state, np.array([True, False]), deterministic=True)
    np.testing.assert_array_equal(again, once)


@pytest.mark.parametrize("how", ["evaluate_policy", "play"])
def test_evaluations_do_the_chunks_as_training_does(how: str) -> None:
    env = Recorder(7)
    agent = small(env, batch_size=6, chunk=3)
    env.episodes.clear()
    venv = DummyVecEnv([lambda: env])
    if how == "play":
        play(agent, venv, 7, deterministic=True)
    else:
        evaluate_policy(agent, venv, 2, warn=False)
    for episode in (each for each in env.episodes if each):
        acted = np.stack(episode)
        for start in (0, 3, 6):
            _, state = agent.predict(np.full(1, start, np.float32), deterministic=True)
            assert state is not None
            chunk = agent.policy.unscale_action(state[0])[0]
            np.testing.assert_allclose(acted[start : start + 3], chunk[: len(acted[start : start + 3])], rtol=1e-5)


def test_demonstrated_chunks_end_with_the_last_action_of_their_episode() -> None:
    actions = np.array([[0.0], [1], [2], [10], [11]], np.float32)
    data = Demonstrations(np.zeros((5, 2), np.float32), actions, np.zeros(5, np.float32), np.array([3, 2]))
    expected = [[0, 1, 2], [1, 2, 2], [2, 2, 2], [10, 11, 11], [11, 11, 11]]
    assert data.chunked(3).actions.tolist() == expected
    assert data.chunked(1).actions.tolist() == actions.tolist()
    inside = data.chunked(3).demonstrated
    assert inside is not None and data.chunked(1).demonstrated is None
    assert inside.sum(1).tolist() == [3, 2, 1, 2, 1] and inside[:, 0].all()
    kept = dataclasses.replace(data, rewards=np.array([0, 0, 0, 1, 1], np.float32)).chunked(3).returning(1.0)
    assert kept.demonstrated is not None and kept.demonstrated.tolist() == [[True, True, False], [True, False, False]]


def test_chunks_are_pretrained_saved_and_exported(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    obs = rng.uniform(0, 1, (400, 1)).astype(np.float32)
    actions = np.concatenate([obs - 0.5, 2 + obs], 1).astype(np.float32)
    data = Demonstrations(obs, actions, np.zeros(400, np.float32), np.full(20, 20))
    agent = small(Recorder(9), chunk=2, base_std=0.1, base="standard", actor_hidden=(64, 64))
    agent.pretrain(data, 1500)
    at = np.array([[0.25], [0.75]], np.float32)
    action, state = agent.predict(at, deterministic=True)
    np.testing.assert_allclose(action, np.concatenate([at - 0.5, 2 + at], 1), atol=0.15)  # what follows is another draw
    assert state is not None
    agent.save(tmp_path / "agent.zip")
    again = PolicyFlow.load(tmp_path / "agent.zip", device="cpu")
    assert (again.config.chunk, again.policy.execute) == (2, 2)
    np.testing.assert_array_equal(again.predict(at, deterministic=True)[0], action)
    export_program(agent, tmp_path / "policy.pt2")
    exported = torch.export.load(tmp_path / "policy.pt2").module()(obs=torch.from_numpy(at))
    assert exported.shape == (2, 2, 2)
    np.testing.assert_allclose(exported.detach().numpy(), agent.policy.unscale_action(state[0]), rtol=1e-5)
    with pytest.warns(UserWarning, match=r"n_steps x environments / steps of a decision = 16 x 1 / 4, rounded up = 4 "):
        small("Pendulum-v1", chunk=4)
    with pytest.raises(ValueError, match="chunk: got 3, but"):
        agent.chunk = 3  # type: ignore[attr-defined]


def test_rows_are_drawn_without_repetition_as_far_as_they_last() -> None:
    usable = torch.arange(10) % 2 == 0
    rng = torch.Generator().manual_seed(0)
    assert drawn_rows(usable, 5, rng).tolist() == [0, 2, 4, 6, 8]
    assert len(set(drawn_rows(usable, 3, rng).tolist())) == 3
    assert sorted(set(drawn_rows(usable, 8, rng).tolist())) == [0, 2, 4, 6, 8]
    with pytest.raises(ValueError, match="no transition of finite numbers"):
        drawn_rows(usable & False, 2, rng)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk": 2, "execute": 3}, "execute: got 3, expected at most chunk = 2"),
        ({"execute": 2}, "execute: got 2, expected at most chunk = 1"),
        ({"chunk": 0}, "chunk: got 0, expected an integer of at least 1"),
        ({"chunk": 2, "exploration_noise": "ou"}, "exploration_noise: got 'ou', expected gaussian with chunk above 1"),
    ],
)
def test_chunks_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small("Pendulum-v1", **fields)


class Steady(gym.Env[np.ndarray, np.ndarray]):
    """Rewards actions near a target that is seen, which changes every two steps."""

    observation_space, action_space = spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return self._look(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = 1 - abs(float(action[0] - self.target[0]))
        self.count += 1
        return (self._look() if self.count % 2 == 0 else self.target), reward, False, self.count == 20, {}

    def _look(self) -> np.ndarray:
        self.target = self.np_random.uniform(-0.8, 0.8, 1).astype(np.float32)
        return self.target


def test_a_policy_of_chunks_learns() -> None:
    agent = small(
        DummyVecEnv([Steady for _ in range(8)]), chunk=2, n_steps=64, batch_size=64, n_epochs=5, learning_rate=3e-3,
        actor_hidden=(32, 32), normalize_reward=True, gamma=0.5,
    )  # fmt: skip
    agent.learn(30_000)
    mean: Any = evaluate_policy(agent, DummyVecEnv([Steady]), 20, warn=False)[0]
    assert mean > 18  # of 20; without looking 12
