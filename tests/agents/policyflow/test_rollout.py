"""Advantages, reward scaling and bootstrapping against other implementations and by hand."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import Tensor, nn

from driftrl.agents.common.program import tensors_in
from driftrl.agents.policyflow.advantages import generalized_advantage
from driftrl.agents.policyflow.algorithm import PolicyFlow
from driftrl.envs import make_vec
from driftrl.envs.mujoco_batch import MujocoVecEnv


class Counter(gym.Env[np.ndarray, np.ndarray]):
    """Observes its step count from 10 on; reward 1; ends after `length` steps, by time limit or by termination."""

    def __init__(self, length: int, terminates: bool) -> None:
        self.observation_space = spaces.Box(-1e6, 1e6, (1,))
        self.action_space = spaces.Box(-1, 1, (1,))
        self.length, self.terminates, self.count = length, terminates, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return np.array([10.0], np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.count += 1
        over = self.count == self.length
        return (
            np.array([10.0 + self.count], np.float32),
            1.0,
            over and self.terminates,
            over and not self.terminates,
            {},
        )


class ValueIsObservation(nn.Module):
    def forward(self, obs: Tensor) -> Tensor:
        return obs


def roll_out(terminates: bool, **fields: Any) -> PolicyFlow:
    agent = PolicyFlow(
        "MlpPolicy", DummyVecEnv([lambda: Counter(3, terminates)]), gamma=0.5, normalize_observation=False, seed=0,
        device="cpu", **{"n_steps": 6, "batch_size": 6, "normalize_reward": False} | fields,
    )  # fmt: skip
    agent.policy.critic = ValueIsObservation()  # type: ignore[assignment]
    _, callback = agent._setup_learn(agent.n_steps)
    assert agent.env is not None
    assert agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, agent.n_steps)
    return agent


def test_time_limit_bootstraps_with_the_value_of_the_state_reached() -> None:
    # lambda = 0: the return is r + gamma V(s'), s' the state reached, 13 at the limit; not 10, where the reset leads.
    returns = roll_out(terminates=False, gae_lambda=0.0).samples.returns
    assert returns.tolist() == [6.5, 7.0, 7.5, 6.5, 7.0, 7.5]


def test_termination_does_not_bootstrap() -> None:
    returns = roll_out(terminates=True, gae_lambda=0.0).samples.returns
    assert returns.tolist() == [6.5, 7.0, 1.0, 6.5, 7.0, 1.0]


def test_advantages_do_not_reach_into_the_next_episode() -> None:
    # lambda = 1: 1 + .5 (1 + .5 (1 + .5 * 13)) where a time limit ends the episode, without 13 at a termination
    for start in (0, 3):
        assert roll_out(terminates=False, gae_lambda=1.0).samples.returns[start].item() == pytest.approx(3.375)
        assert roll_out(terminates=True, gae_lambda=1.0).samples.returns[start].item() == pytest.approx(1.75)


def test_advantages_equal_those_of_stable_baselines3() -> None:
    steps, envs, gamma, lam = 40, 3, 0.97, 0.9
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, steps, envs)).astype(np.float32)
    ended = rng.random((steps, envs)) < 0.1
    last = rng.normal(size=envs).astype(np.float32)
    box = spaces.Box(-1, 1, (1,))
    oracle = RolloutBuffer(steps, box, box, gamma=gamma, gae_lambda=lam, n_envs=envs)
    start = np.zeros(envs)
    for t in range(steps):
        value = torch.as_tensor(values[t])
        oracle.add(np.zeros((envs, 1)), np.zeros((envs, 1)), rewards[t], start, value, value)
        start = ended[t]
    oracle.compute_returns_and_advantage(torch.as_tensor(last), start)

    flags = torch.as_tensor(ended).float()
    following = torch.as_tensor(np.concatenate([values[1:], last[None]]))
    ours = generalized_advantage(torch.as_tensor(rewards), torch.as_tensor(values), following, flags, flags, gamma, lam)
    np.testing.assert_allclose(ours.numpy(), oracle.advantages, rtol=1e-4, atol=1e-5)


def test_rewards_are_scaled_by_the_discounted_return_as_vecnormalize_does() -> None:
    # VecNormalize after the same 6 steps has seen the same discounted returns.
    peer = VecNormalize(DummyVecEnv([lambda: Counter(3, True)]), norm_obs=False, gamma=0.5)
    peer.reset()
    for _ in range(6):
        peer.step(np.zeros((1, 1), np.float32))
    norm = roll_out(terminates=True, normalize_reward=True).policy.return_norm
    # VecNormalize starts from a pseudo-count of 1e-4; ours from none.
    assert norm.mean.item() == pytest.approx(float(peer.ret_rms.mean), rel=1e-3)
    assert norm.var.item() == pytest.approx(float(peer.ret_rms.var), rel=1e-3)


def test_returns_do_not_run_on_over_a_reset() -> None:
    # learn() resets the environments: the episode that was begun counts no further. Rewards of 1, gamma 1/2.
    learner = roll_out(terminates=False, normalize_reward=True)
    learner._discounted_return.fill_(1.5)
    begins, ended = torch.tensor([True]), torch.zeros(1, 1, dtype=torch.bool)
    learner._scale_rewards(torch.ones(1, 1), begins, ended)
    assert learner._discounted_return.item() == 1
    learner._scale_rewards(torch.ones(1, 1), ~begins, ended)
    assert learner._discounted_return.item() == 1.5
    learner._scale_rewards(torch.ones(1, 1), ~begins, ~ended)
    assert learner._discounted_return.item() == 0  # nor over the end of an episode


def test_scaled_rewards_are_clipped_at_ten_deviations() -> None:
    learner = roll_out(terminates=False, normalize_reward=True)
    learner.policy.return_norm.update(torch.tensor([[-1.0], [1.0]]), weight=1e9)  # a deviation of 1
    rewards, ended = torch.tensor([[30.0], [-30.0], [2.0]]), torch.ones(3, 1, dtype=torch.bool)
    scaled = learner._scale_rewards(rewards, torch.tensor([True]), ended)
    torch.testing.assert_close(scaled, torch.tensor([[10.0], [-10.0], [2.0]]), rtol=1e-3, atol=0)


class Broken(Counter):
    def __init__(self, reward: float, observation: float) -> None:
        super().__init__(5, True)
        self.reward, self.observation = reward, observation

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = super().step(action)
        if self.count == 2:
            obs[0], reward = obs[0] + self.observation, reward + self.reward
        return obs, reward, terminated, truncated, info


def test_rollout_ending_within_an_episode_bootstraps_with_its_last_observation() -> None:
    agent = roll_out(terminates=True, n_steps=4, batch_size=4, gae_lambda=0.0)
    assert agent.samples.returns.tolist() == [6.5, 7.0, 1.0, 6.5]


@pytest.mark.parametrize(("reward", "observation", "message"), [(np.nan, 0.0, "reward"), (0.0, np.inf, "observation")])
def test_what_is_not_finite_is_named_with_its_environment(reward: float, observation: float, message: str) -> None:
    env = DummyVecEnv([lambda: Counter(5, True), lambda: Broken(reward, observation)])
    agent = PolicyFlow("MlpPolicy", env, n_steps=4, batch_size=8, device="cpu")
    with pytest.raises(ValueError, match=f"non-finite {message}: got .* environment 1"):
        agent.learn(8)


def test_an_unstable_simulation_is_counted_and_its_rollout_learned_from(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warning into the current folder
    env = MujocoVecEnv("HalfCheetah-v5", 2)
    agent = PolicyFlow("MlpPolicy", env, n_steps=4, batch_size=8, seed=0, device="cpu")
    _, callback = agent._setup_learn(8)
    env.simulators.datas[1].qvel[0] = np.nan
    assert agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, 4)  # type: ignore[arg-type]
    assert agent.logger.name_to_value["rollout/simulations_diverged"] == 1
    assert all(values.isfinite().all() for values in tensors_in((agent.samples,)))


def test_action_noise_is_correlated_within_an_episode_and_starts_afresh_with_the_next() -> None:
    # Environment e ends every episode after 3 + 4 e steps; rollouts of 10 end within episodes.
    lengths, rows = (3, 7), []
    env = DummyVecEnv([lambda length=length: Counter(length, True) for length in lengths])  # type: ignore[misc]
    agent = PolicyFlow("MlpPolicy", env, exploration_noise="ou", noise_time=4.0, n_steps=10, batch_size=20, seed=0,
                       device="cpu", n_epochs=2)  # fmt: skip
    _, callback = agent._setup_learn(40)
    for _ in range(2):
        agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, 10)  # type: ignore[arg-type]
        batch = agent.samples
        assert batch.past is not None
        noise = (batch.action - batch.x1) / batch.log_std.exp()
        rows.append(torch.cat([noise, batch.past.mean, batch.past.scale], 1).view(10, 2, 3))
        agent.train()  # moves the standard deviation: the memory is in units of it
    noise, mean, scale = torch.cat(rows).unbind(-1)
    decay = np.exp(-1 / 4)
    for t in range(20):
        for i, length in enumerate(lengths):
            fresh = t % length == 0
            assert mean[t, i].item() == pytest.approx(0 if fresh else decay * noise[t - 1, i].item(), abs=1e-5)
            assert scale[t, i].item() == pytest.approx(1 if fresh else np.sqrt(1 - decay**2))


@pytest.mark.parametrize(("kind", "hurst"), [("ou", 0.7), ("fractional", 0.3), ("fractional", 0.8)])
def test_recorded_noise_is_standard_and_correlated_as_stated(kind: str, hurst: float) -> None:
    envs, length = 100, 20
    env = DummyVecEnv([lambda: Counter(length, True)] * envs)
    memory: dict[str, Any] = {"noise_time": 3.0} if kind == "ou" else {"hurst": hurst}
    agent = PolicyFlow("MlpPolicy", env, exploration_noise=kind, **memory, n_steps=5 * length, batch_size=500, seed=0,
                       device="cpu")  # fmt: skip
    _, callback = agent._setup_learn(1)
    agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, agent.n_steps)  # type: ignore[arg-type]
    batch = agent.samples
    assert batch.past is not None
    noise = ((batch.action - batch.x1) / batch.log_std.exp()).view(5, length, envs)
    error = 5 * np.sqrt(2 / (5 * envs))
    assert noise.square().mean((0, 2)).numpy() == pytest.approx(1, abs=error)
    for lag in (1, 3):
        correlation = (noise[:, 10] * noise[:, 10 + lag]).mean().item()
        # increments over 1 of fractional Brownian motion that has forgotten its start (type II nears type I)
        fractional = 0.5 * ((lag + 1) ** (2 * hurst) - 2 * lag ** (2 * hurst) + (lag - 1) ** (2 * hurst))
        expected = np.exp(-lag / 3) if kind == "ou" else fractional
        assert correlation == pytest.approx(expected, abs=error + 0.05)
    rest = ((noise.flatten() - batch.past.mean[:, 0]) / batch.past.scale[:, 0]).square().mean()
    assert rest.item() == pytest.approx(1, abs=5 * np.sqrt(2 / noise.numel()))
    assert abs((noise[:-1, -1] * noise[1:, 0]).mean().item()) < error * 1.2  # not from episode to episode


def test_default_rollout_records_neither_memory_nor_path() -> None:
    samples = roll_out(terminates=True).samples
    assert samples.past is None and samples.path is None
    path = roll_out(terminates=True, langevin_eps=0.1, solver_steps=3).samples.path
    assert path is not None
    assert path.shape == (6, 3, 1)


def test_rollouts_take_one_thread_and_give_the_others_back() -> None:
    class Look(BaseCallback):
        """Notes the threads, and fails in the second rollout."""

        seen: ClassVar[list[int]] = []

        def _on_step(self) -> bool:
            self.seen.append(torch.get_num_threads())
            if len(self.seen) == 6:
                raise RuntimeError("enough")
            return True

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        agent = PolicyFlow("MlpPolicy", make_vec("InvertedPendulum-v5", 1, 0), n_steps=4, batch_size=4, device="cpu")
        with pytest.raises(RuntimeError, match="enough"):
            agent.learn(100, Look())
        assert torch.get_num_threads() == 2 and Look.seen == [1] * 6
    finally:
        torch.set_num_threads(before)
