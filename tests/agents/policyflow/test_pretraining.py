"""Pretraining on demonstrations: its loss against closed forms, what it learns, and that it can be broken off."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import Tensor
from torch.distributions import Normal

from driftrl import PolicyFlow
from driftrl.agents.common.demonstrations import Demonstrations
from driftrl.agents.common.observations import RunningNorm
from driftrl.agents.policyflow.pretraining import Expert, Pretraining, PretrainSettings, imitation_loss, solver_error
from driftrl.dynamics.fields import VelocityField


class Line(gym.Env[np.ndarray, np.ndarray]):
    """Episodes of ten steps; observations in [-1, 1], actions of two dimensions in [-2, 2]."""

    observation_space, action_space = spaces.Box(-1, 1, (1,)), spaces.Box(-2, 2, (2,))
    steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.uniform(-1, 1, 1).astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self.np_random.uniform(-1, 1, 1).astype(np.float32), float(action[0]), self.steps == 10, False, {}


def agent(**fields: Any) -> PolicyFlow:
    defaults: dict[str, Any] = {
        "n_steps": 16, "batch_size": 16, "actor_hidden": (64, 64), "critic_hidden": (8,), "base": "gaussian",
        "base_std": 0.5, "action_std": 0.05, "solver_steps": 8, "activation": "relu",
    }  # fmt: skip
    return PolicyFlow("MlpPolicy", Line(), seed=0, device="cpu", **defaults | fields)


GAUSSIAN: dict[str, Any] = {"base": "standard", "base_std": 0.0, "ratio": "endpoint", "action_std": 1.0}
# Its noise must not begin as wide as the modes are apart: all components would learn the mean.
MIXTURE: dict[str, Any] = {"base": "mixture", "ratio": "mixture", "action_std": 0.3, "solver_steps": 2}


def demonstrations(law: str, episodes: int = 200, seed: int = 0) -> Demonstrations:
    """Ten steps an episode. two: at +-(1, 0.5 s) with noise 0.06, in turn; one: at (1.2 s - 0.2, -s), noise 0.1."""
    rng = np.random.default_rng(seed)
    s = rng.uniform(-1, 1, (10 * episodes, 1))
    sign = rng.choice([-1.0, 1.0], (len(s), 1)) if law == "two" else np.ones((len(s), 1))
    mean = (
        sign * np.concatenate([np.ones_like(s), 0.5 * s], 1) if law == "two" else np.concatenate([1.2 * s - 0.2, -s], 1)
    )
    action = mean + (0.06 if law == "two" else 0.1) * rng.standard_normal((len(s), 2))
    lengths = np.full(episodes, 10)
    s, action = s.astype(np.float32), action.astype(np.float32)
    return Demonstrations(s, action, s[:, 0], lengths)


class Known(VelocityField):
    """The velocity of the flow from N(0, base_std^2) to N(mean, std^2) along straight lines, plus an offset."""

    def __init__(self, mean: float, std: float, base_std: float) -> None:
        super().__init__(2, 1)
        self.mean, self.std, self.base_std = mean, std, base_std
        self.offset = torch.nn.Parameter(torch.zeros(2))

    def forward(self, t: Any, x: Tensor, cond: Tensor | None = None) -> Tensor:
        t = t.unsqueeze(-1) if isinstance(t, Tensor) and t.ndim else t
        variance = ((1 - t) * self.base_std) ** 2 + (t * self.std) ** 2
        gain = (t * self.std**2 - (1 - t) * self.base_std**2) / variance
        velocity: Tensor = self.mean + gain * (x - t * self.mean) + self.offset
        return velocity


def expert(number: int, mean: float, std: float) -> Expert:
    torch.manual_seed(0)
    action = mean + std * torch.randn(number, 2)
    return Expert(torch.zeros(number, 1), action, torch.randn(number, 2), 0.999 * torch.rand(number))


def test_the_loss_of_the_exact_field_of_a_point_is_zero_and_its_gradient_that_of_a_square() -> None:
    actor = agent().policy.actor
    field = actor.field = Known(0.3, 0.0, 0.5)  # type: ignore[assignment]
    data = expert(1000, 0.3, 0.0)
    assert imitation_loss(actor, data).item() == pytest.approx(0, abs=1e-9)
    field.offset.data.copy_(torch.tensor([0.5, -0.2]))
    loss = imitation_loss(actor, data)
    loss.backward()
    assert loss.item() == pytest.approx((0.25 + 0.04) / 2, rel=1e-4)  # |offset|^2 / D
    torch.testing.assert_close(field.offset.grad, field.offset.detach(), rtol=1e-4, atol=1e-5)  # 2 offset / D


def test_the_loss_of_the_exact_field_of_a_gaussian_is_the_variance_that_remains() -> None:
    # var(a - z | x_t) = s^2 b^2 / ((1 - t)^2 b^2 + t^2 s^2), which integrates to s b pi / 2 over t.
    actor = agent().policy.actor
    field = actor.field = Known(-0.2, 0.4, 0.5)  # type: ignore[assignment]
    loss = imitation_loss(actor, expert(400_000, -0.2, 0.4))
    loss.backward()
    assert loss.item() == pytest.approx(0.4 * 0.5 * math.pi / 2, rel=0.01)
    assert field.offset.grad is not None and field.offset.grad.abs().max() < 0.005  # a stationary point


def test_the_loss_does_not_move_the_base() -> None:
    actor = agent().policy.actor
    imitation_loss(actor, expert(8, 0.3, 0.1)).backward()
    assert actor.base_log_std.grad is None and actor.base_mean is not None
    assert all(each.grad is None for each in actor.base_mean.parameters())


def test_the_loss_of_a_gaussian_policy_is_the_negative_log_density() -> None:
    actor = agent(**GAUSSIAN).policy.actor
    data = expert(50, 0.3, 0.5)
    expected = -Normal(actor.mode(data.obs), actor.log_std.exp()).log_prob(data.action).mean()
    assert imitation_loss(actor, data).item() == pytest.approx(expected.item(), rel=1e-5)


def test_actions_that_were_not_demonstrated_count_in_no_loss() -> None:
    known = torch.tensor([[True, False], [True, True], [True, False], [True, True]]).repeat(10, 1)
    data = expert(40, 0.3, 0.5)._replace(demonstrated=known)
    gaussian = agent(**GAUSSIAN).policy.actor
    density = Normal(gaussian.mode(data.obs), gaussian.log_std.exp()).log_prob(data.action)
    assert imitation_loss(gaussian, data).item() == pytest.approx(-density[known].mean().item(), rel=1e-5)
    mixture = agent(**MIXTURE).policy.actor
    short = data._replace(action=data.action[:, :1], demonstrated=None)  # where the second never was
    first = imitation_loss(mixture, data._replace(demonstrated=known & torch.tensor([True, False])))
    parts = mixture.mixture(short.obs)
    each = (
        Normal(parts.mean[..., :1], mixture.noise_log_std()[..., :1].exp()).log_prob(short.action.unsqueeze(1)).sum(-1)
    )
    expected = -torch.logsumexp(parts.log_weight + each, 1).mean()
    assert first.item() == pytest.approx(expected.item(), rel=1e-5)
    flow = agent().policy.actor
    field = flow.field = Known(0.3, 0.0, 0.5)  # type: ignore[assignment]
    field.offset.data.copy_(torch.tensor([0.0, 7.0]))
    first = known & torch.tensor([True, False])
    assert imitation_loss(flow, expert(40, 0.3, 0.0)._replace(demonstrated=first)).item() == pytest.approx(0, abs=1e-9)


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """``2 E|X - Y| - E|X - X'| - E|Y - Y'|`` (Szekely and Rizzo 2013), 0 for equal laws."""

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a[:, None] - b[None], axis=-1).mean())

    return 2 * mean(x, y) - mean(x, x) - mean(y, y)


def test_two_modes_are_recovered_by_flow_and_mixture_and_not_by_the_gaussian() -> None:
    distances: dict[str, list[float]] = {}
    kinds: dict[str, dict[str, Any]] = {"flow": {}, "gaussian": GAUSSIAN, "mixture": MIXTURE}
    for name, fields in kinds.items():
        trained = agent(**fields)
        size = {"mixture": 64}.get(name, 512)  # it is soon done, and each row is one of every component
        trained.pretrain(demonstrations("two"), settings=PretrainSettings(1500, size, learning_rate=1e-2))
        distances[name] = []
        for s in (-0.8, 0.0, 0.7):
            obs = np.full((500, 1), s, np.float32)
            trained.set_random_seed(1)
            drawn, _ = trained.predict(obs, deterministic=False)
            rng = np.random.default_rng(2)
            sign = rng.choice([-1.0, 1.0], (500, 1))
            truth = sign * np.array([[1, 0.5 * s]]) + 0.06 * rng.standard_normal((500, 2))
            distances[name].append(energy_distance(drawn, truth))
    assert max(distances["flow"]) < 0.03 < 0.15 < min(distances["gaussian"]), distances
    assert max(distances["mixture"]) < 0.03, distances


def test_what_a_chunk_does_beyond_its_episode_is_learned_from_others() -> None:
    # Actions change their sign at every step of four; the episode's end would repeat the last.
    signs = np.tile(np.array([1, -1, 1, -1], np.float32), 100)[:, None]
    data = Demonstrations(signs, np.repeat(signs, 2, 1), signs[:, 0], np.full(100, 4))
    learner = agent(**GAUSSIAN, chunk=3, batch_size=6)
    learner.pretrain(data, 300)
    chunk = learner.policy.actor.mode(learner.policy.obs_norm(torch.ones(1, 1))).view(3, 2)
    torch.testing.assert_close(chunk, 0.5 * torch.tensor([[1.0], [-1.0], [1.0]]).expand(3, 2), atol=0.05, rtol=0)


def test_a_gaussian_policy_learns_mean_and_noise() -> None:
    trained = agent(**GAUSSIAN)
    trained.pretrain(demonstrations("one"), settings=PretrainSettings(1500, learning_rate=1e-2))
    obs = np.linspace(-0.9, 0.9, 7, dtype=np.float32)[:, None]
    got, _ = trained.predict(obs, deterministic=True)
    np.testing.assert_allclose(got, np.concatenate([1.2 * obs - 0.2, -obs], 1), atol=0.05)
    # 0.1 in the environment's units are 0.05 half ranges.
    np.testing.assert_allclose(trained.policy.actor.noise_log_std().exp().tolist(), [0.05, 0.05], rtol=0.08)


def weights(trained: PolicyFlow) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in trained.policy.state_dict().items()}


class BrokenOff(Exception):
    pass


def test_a_pretraining_that_is_broken_off_goes_on_as_if_it_had_not_been() -> None:
    data, settings = demonstrations("two", 40), PretrainSettings(300, batch_size=64, interval=50)
    whole, first, second = agent(ema_decay=0.9), agent(ema_decay=0.9), agent(ema_decay=0.9)
    expected = whole.pretrain(data, settings=settings)
    saved: dict[str, Any] = {}

    def stop(pretraining: Pretraining, metrics: dict[str, float]) -> None:
        if pretraining.step == 150:
            saved.update(pretraining.state())
            raise BrokenOff

    with pytest.raises(BrokenOff):
        first.pretrain(data, settings=settings, follow=stop)
    assert not first.is_pretrained
    assert second.pretrain(data, settings=settings, state=saved) == expected
    for (name, one), other in zip(weights(whole).items(), weights(second).values(), strict=True):
        assert torch.equal(one, other), name
    averaged, actor = whole.policy.averaged_actor, whole.policy.actor
    assert averaged is not None
    for one, other in zip(averaged.parameters(), actor.parameters(), strict=True):
        assert torch.equal(one, other)  # predict() uses the average: it was pretrained, too
    # On another kind of device random numbers cannot go on: they are others, and the rest goes on.
    elsewhere = saved | {"device": "cuda", "generator": torch.zeros(16, dtype=torch.uint8)}
    assert agent(ema_decay=0.9).pretrain(data, settings=settings, state=elsewhere) != expected


def test_the_best_weights_are_kept_and_patience_ends_it() -> None:
    seen: list[float] = []
    # Two episodes to learn from: soon the one held out tells that they are learned by heart.
    trained, data = agent(), demonstrations("one", 3)
    settings = PretrainSettings(20_000, learning_rate=1e-2, interval=50, patience=5, ema_decay=0.5)
    result = trained.pretrain(data, settings=settings, follow=lambda _, m: seen.append(m["pretrain/validation_loss"]))
    assert result.steps == 50 * len(seen) < 20_000
    assert result.validation_loss == min(seen) == min(seen[:-5]) < min(seen[-5:])
    again = Pretraining(trained.policy, data, settings, 0)  # begins from the weights that were kept
    assert again.validation_loss == pytest.approx(result.validation_loss, rel=1e-5)


def test_no_episode_that_is_held_out_is_learned_from() -> None:
    learner, data = agent(), demonstrations("two", 40)
    begun = Pretraining(learner.policy, data, PretrainSettings(1, validation_share=0.25), 0)
    learned, held_out = (set(each[:, 0].tolist()) for each in (begun._steps.obs, begun._held_out.obs))
    assert (len(learned), len(held_out)) == (300, 100) and not learned & held_out


def test_the_rate_falls_by_half_a_cosine_and_the_average_warms_up() -> None:
    learner, data = agent(base="learned"), demonstrations("two", 40)
    begun = Pretraining(learner.policy, data, PretrainSettings(4, learning_rate=0.01, interval=1, ema_decay=0.9), 0)
    expected = [each.clone() for each in begun._averages]
    # Shares of the old average at update n: n / (n + 9), at most the decay. Rates: (1 + cos(pi n / 4)) / 2.
    for kept, rate in zip((1 / 10, 2 / 11, 3 / 12, 4 / 13), (0.01, 0.00853553, 0.005, 0.00146447), strict=True):
        begun.advance()
        assert begun.optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-5)
        for mean, average, weight in zip(expected, begun._averages, begun._weights, strict=True):
            mean.mul_(kept).add_(weight.detach(), alpha=1 - kept)
            torch.testing.assert_close(average, mean)
    assert begun.is_over


def test_statistics_are_those_of_the_demonstrations_and_stay_so() -> None:
    trained, data = agent(), demonstrations("two", 40)
    trained.learn(16)  # has statistics of its own first
    trained.pretrain(data, 20)
    norm = RunningNorm(1)
    norm.update(torch.as_tensor(data.observations))
    trained.learn(48)
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(trained.policy.obs_norm.state_dict()[name], value)
    other = agent()
    other.learn(48)
    assert other.policy.obs_norm.count == 48  # without pretraining they move


def test_an_observation_that_never_varies_stays_in_its_own_unit() -> None:
    learner, data = agent(), demonstrations("one")
    same = Demonstrations(np.full_like(data.observations, 0.7), data.actions, data.rewards, data.lengths)
    learner.pretrain(same, 1)
    probe = torch.tensor([[0.7], [0.71]])
    torch.testing.assert_close(learner.policy.obs_norm(probe), torch.tensor([[0.0], [0.01]]), atol=1e-5, rtol=0)


def test_a_pretrained_agent_is_saved_to_the_last_bit_and_learns_on(tmp_path: Path) -> None:
    trained = agent()
    trained.pretrain(demonstrations("two", 40), 50)
    trained.save(tmp_path / "agent")
    loaded = PolicyFlow.load(tmp_path / "agent", env=Line(), device="cpu")
    assert loaded.is_pretrained
    for (name, one), other in zip(weights(trained).items(), weights(loaded).values(), strict=True):
        assert torch.equal(one, other), name
    obs = np.linspace(-1, 1, 5, dtype=np.float32)[:, None]
    for deterministic in (True, False):
        actions = []
        for each in (trained, loaded):
            each.set_random_seed(3)
            actions.append(each.predict(obs, deterministic=deterministic)[0])
        np.testing.assert_array_equal(actions[0], actions[1])
    loaded.learn(32)


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_the_error_of_the_solver_is_that_of_a_known_flow(steps: int) -> None:
    """By K Euler steps a flow from N(0, 0.5^2) to N(0, 0.2^2) ends with a deviation of 0.5 prod_k (1 + h gain(k h))."""
    spread = 0.5
    for k in range(steps):
        t = k / steps
        variance = (0.5 * (1 - t)) ** 2 + (0.2 * t) ** 2
        spread *= 1 + (0.2**2 * t - 0.5**2 * (1 - t)) / variance / steps
    flow: Any = agent(solver_steps=steps).policy.actor
    flow.field = Known(0.3, 0.2, 0.5)
    torch.manual_seed(0)
    error = solver_error(flow, torch.zeros(4096, 1), torch.randn(4096, 2))
    assert error == pytest.approx((0.2 - spread) / 0.2, abs=0.02)
    assert (error > 0.6) == (steps < 5)


def test_a_flow_that_its_solver_or_noise_spoils_is_warned_of() -> None:
    data = demonstrations("two")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine = agent().pretrain(data, 500)
        gaussian = agent(**GAUSSIAN, solver_steps=1).pretrain(data, 20)
    assert 0 < fine.solver_error < 0.25
    assert gaussian.solver_error == 0
    with pytest.warns(UserWarning, match=r"2 steps of euler miss what the flow has learned by \d+% of the spread"):
        assert agent(base="learned", base_std=0.1, solver_steps=2).pretrain(data, 500).solver_error > 0.5
    with pytest.warns(UserWarning, match="a flow learns no noise, and action_std adds some of 0.5 to its actions"):
        agent(action_std=0.5).pretrain(data, 20)


def test_a_refusal_leaves_the_agent_as_it_was() -> None:
    ours = agent()
    ours.learn(16)
    obs = np.ones((3, 1), np.float32)
    before = ours.predict(obs, deterministic=True)[0]
    with pytest.raises(ValueError, match="got one episode, expected two at least"):
        ours.pretrain(demonstrations("two", 1), 10)
    np.testing.assert_array_equal(ours.predict(obs, deterministic=True)[0], before)


def test_the_update_imitates_what_was_chosen_for_it() -> None:
    every, some, others = demonstrations("two", 20), demonstrations("one", 4), demonstrations("one", 7)
    ours = agent(bc_coef=0.5)
    ours.pretrain(every, 2)
    assert ours._expert_data is not None and len(ours._expert_data.obs) == 200
    ours.pretrain(others, 2)
    assert len(ours._expert_data.obs) == 70
    ours.use_demonstrations(some)
    ours.pretrain(every, 2)
    assert len(ours._expert_data.obs) == 40


def test_raw_demonstrations_do_not_serve_behind_vec_normalize() -> None:
    env = VecNormalize(DummyVecEnv([Line]))
    ours = PolicyFlow("MlpPolicy", env, n_steps=16, batch_size=16, bc_coef=0.5, device="cpu")
    for learn in (lambda data: ours.pretrain(data, 2), ours.use_demonstrations):
        with pytest.raises(ValueError, match="got raw observations for an agent behind VecNormalize"):
            learn(demonstrations("two", 5))
    env = VecNormalize(DummyVecEnv([Line]), norm_obs=False)
    ours = PolicyFlow("MlpPolicy", env, n_steps=16, batch_size=16, action_std=0.05, device="cpu")
    ours.pretrain(demonstrations("two", 5), 2)


def test_iterations_in_which_the_policy_cannot_learn_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="critic_warmup: got 3, and no more than 2 iterations to come"):
        agent(critic_warmup=3).learn(32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent(critic_warmup=1).learn(32)
    with pytest.raises(ValueError, match="n_steps: got 4, expected at least the 8 steps of a decision"):
        agent(n_steps=4, batch_size=2, chunk=8)


def test_a_chunk_is_no_longer_than_what_is_demonstrated() -> None:
    data = demonstrations("two", 5)  # of ten steps
    agent(chunk=10, batch_size=2, action_std=0.008).pretrain(data, 1)
    with pytest.raises(ValueError, match="chunk: got 11, but the longest episode that is demonstrated has 10 steps"):
        agent(chunk=11, batch_size=2).pretrain(data, 1)


def test_what_does_not_fit_is_refused() -> None:
    data = demonstrations("two", 5)
    wrong = Demonstrations(data.observations, data.actions[:, :1], data.rewards, data.lengths)
    with pytest.raises(ValueError, match=r"demonstrations: got \(1, 1\) observations and actions per step, expected"):
        agent().pretrain(wrong, 10)
    with pytest.raises(ValueError, match="steps: got None with settings None, expected one of the two"):
        agent().pretrain(data)
    with pytest.raises(ValueError, match="steps: got 0, expected an integer of at least 1"):
        agent().pretrain(data, 0)
    with pytest.raises(ValueError, match=r"validation_share: got 1.0, expected a number in \(0, 1\)"):
        PretrainSettings(10, validation_share=1.0)
    with pytest.raises(ValueError, match="lower the learning rate"):
        agent().pretrain(data, settings=PretrainSettings(500, learning_rate=1e30))
