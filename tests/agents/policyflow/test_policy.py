"""The policy: its distribution, its predictions, what it accepts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn
from torch.distributions import Independent, Normal

from driftrl.agents.policyflow.gaussians import gaussian_kl, gaussian_log_prob
from driftrl.agents.policyflow.policy import (
    FlowActor,
    FlowNoise,
    FlowPolicy,
    FlowSample,
)
from driftrl.dynamics.ode import odeint

BOX = spaces.Box(-np.inf, np.inf, (3,))
ACTIONS = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))


def make_policy(observation_space: spaces.Space[Any] = BOX, **arguments: Any) -> FlowPolicy:
    torch.manual_seed(0)
    return FlowPolicy(observation_space, ACTIONS, lambda _: 1e-3, **arguments)


def test_gaussian_density_and_divergence_equal_torchs() -> None:
    mean, other, x = torch.randn(3, 5, 2, dtype=torch.float64)
    log_std, other_log_std = 0.3 * torch.randn(2, 2, dtype=torch.float64)
    p = Independent(Normal(mean, log_std.exp()), 1)
    q = Independent(Normal(other, other_log_std.exp()), 1)
    torch.testing.assert_close(gaussian_log_prob(x, mean, log_std), p.log_prob(x))
    torch.testing.assert_close(
        gaussian_kl(mean, log_std, other, other_log_std), torch.distributions.kl_divergence(p, q)
    )


@pytest.mark.parametrize("base", ["standard", "learned", "gaussian"])
def test_a_new_flow_is_the_identity_and_the_action_a_sum_of_two_gaussians(base: str) -> None:
    actor = FlowActor(
        3, 2, hidden=(8, 8), activation="silu", base=base, base_std=0.3, log_std_init=math.log(0.4), solver="rk4",
        solver_steps=2,
    )  # fmt: skip
    obs = torch.zeros(100_000, 3)
    noise = torch.randn(2, 100_000, 2, generator=torch.Generator().manual_seed(0))
    sample = actor.sample(obs, FlowNoise.of(noise))
    assert torch.equal(sample.z, sample.x1)
    assert sample.z.std(0).tolist() == pytest.approx([0.3, 0.3], rel=0.02)
    assert sample.action.std(0).tolist() == pytest.approx([0.5, 0.5], rel=0.02)  # 3-4-5
    assert actor.base_log_std.requires_grad == (base != "standard")


def test_samples_pass_through_the_solver_and_have_the_stated_density() -> None:
    actor = make_policy(base="gaussian", solver="midpoint", solver_steps=3).actor
    with torch.no_grad():
        actor.field.output.weight.normal_()
    obs, noise = torch.randn(6, 3), torch.randn(2, 6, 2)
    sample = actor.sample(obs, FlowNoise.of(noise))
    torch.testing.assert_close(sample.x1, odeint(actor.field, sample.z, steps=3, solver="midpoint", cond=obs))
    mean, log_std = actor.base(obs)
    p_z = Independent(Normal(mean, log_std.exp()), 1)
    p_action = Independent(Normal(sample.x1, actor.log_std.exp()), 1)
    torch.testing.assert_close(actor.log_prob(obs, sample), p_z.log_prob(sample.z) + p_action.log_prob(sample.action))
    quiet = actor.sample(obs, FlowNoise.of(torch.zeros_like(noise)))
    torch.testing.assert_close(actor.mode(obs), quiet.action)
    assert isinstance(sample, FlowSample)


def test_predict_keeps_shape_and_dtype_and_maps_to_the_bounds() -> None:
    policy = make_policy(log_std_init=2.0)
    single, _ = policy.predict(np.zeros(3, np.float32))
    batch, _ = policy.predict(np.zeros((500, 3), np.float32))
    assert single.shape == (2,)
    assert batch.shape == (500, 2)
    assert single.dtype == batch.dtype == np.float32
    # noise this wide is clipped to the corners of the action space
    np.testing.assert_allclose(batch.min(0), ACTIONS.low)
    np.testing.assert_allclose(batch.max(0), ACTIONS.high)
    # a new policy's deterministic action is the middle of the range
    middle, _ = policy.predict(np.zeros(3, np.float32), deterministic=True)
    np.testing.assert_allclose(middle, [0.0, 0.5], atol=1e-6)


def test_deterministic_prediction_repeats_and_sampling_does_not() -> None:
    policy, obs = make_policy(), np.ones(3, np.float32)
    assert np.array_equal(policy.predict(obs, deterministic=True)[0], policy.predict(obs, deterministic=True)[0])
    assert not np.array_equal(policy.predict(obs)[0], policy.predict(obs)[0])


def test_dict_observations_are_joined_in_the_order_of_their_space() -> None:
    space = spaces.Dict({"b": spaces.Box(-1, 1, (2, 2)), "a": spaces.Box(-1, 1, (3,))})
    policy = make_policy(space)
    order = list(space.spaces)
    parts = {"a": torch.tensor([0.0, 0.0, 1.0]), "b": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    obs = {"b": torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), "a": torch.tensor([[0.0, 0.0, 1.0]])}
    assert torch.equal(policy.features(obs)[0], torch.cat([parts[key] for key in order]))


def test_statistics_travel_with_the_policys_state() -> None:
    policy, copy = make_policy(), make_policy()
    policy.obs_norm.update(torch.randn(50, 3) * 4 + 2)
    copy.load_state_dict(policy.state_dict())
    obs = np.ones(3, np.float32)
    assert np.array_equal(policy.predict(obs, deterministic=True)[0], copy.predict(obs, deterministic=True)[0])
    assert copy.obs_norm.count == 50


def test_policy_saves_and_loads_by_itself(tmp_path: Any) -> None:
    policy = make_policy(net_arch={"pi": [5], "vf": [7, 7]}, activation_fn=nn.Tanh)
    policy.save(str(tmp_path / "policy.pt"))
    copy = FlowPolicy.load(str(tmp_path / "policy.pt"), device="cpu")
    obs = np.ones(3, np.float32)
    assert np.array_equal(policy.predict(obs, deterministic=True)[0], copy.predict(obs, deterministic=True)[0])


@pytest.mark.parametrize(
    ("observation_space", "action_space", "message"),
    [
        (BOX, spaces.Discrete(2), "unsupported action space"),
        (BOX, spaces.Box(-np.inf, np.inf, (1,)), "finite bounds"),
        (spaces.Box(0, 255, (64, 64, 3), np.uint8), ACTIONS, "unsupported observation space"),
        (spaces.Discrete(3), ACTIONS, "unsupported observation space"),
        (spaces.Tuple([BOX]), ACTIONS, "unsupported observation space"),
    ],
)
def test_other_spaces_are_refused(
    observation_space: spaces.Space[Any], action_space: spaces.Space[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        FlowPolicy(observation_space, action_space, lambda _: 1e-3)


def test_critic_without_gain_values_all_states_at_0_until_it_is_trained() -> None:
    obs = torch.randn(50, 3)
    assert make_policy().value(obs).abs().min() > 0
    policy = make_policy(critic_gain=0.0)
    assert torch.equal(policy.value(obs), torch.zeros(50))
    last = list(policy.critic.parameters())[-2]
    policy.value(obs).sum().backward()
    assert last.grad is not None
    assert last.grad.abs().min() > 0  # the hidden layers follow one update later


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown activation: got 'relu6', expected one of"):
        make_policy(activation_fn="relu6")
