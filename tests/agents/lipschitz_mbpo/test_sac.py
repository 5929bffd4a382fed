"""SAC's networks against PyTorch's own; its losses: against SB3's gradients, and each reaches only its own networks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.logger import configure
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import Tensor, distributions, nn

from driftrl import LipschitzMBPO
from driftrl.agents.lipschitz_mbpo.replay import Minibatch
from driftrl.agents.lipschitz_mbpo.sac import Critics, SACPolicy, SquashedActor, StackedLinear, sac_losses


def make_policy(obs_dim: int = 3, action_dim: int = 2, **options: object) -> SACPolicy:
    torch.manual_seed(0)
    spaces = gym.spaces.Box(-np.inf, np.inf, (obs_dim,)), gym.spaces.Box(-2, 2, (action_dim,))
    return SACPolicy(*spaces, lambda _: 1e-3, net_arch=[16, 16], **options)  # type: ignore[arg-type]


def make_batch(rows: int = 64) -> Minibatch:
    generator = torch.Generator().manual_seed(1)
    shapes = (rows, 3), (rows, 3), (rows,), (rows, 2), (rows, 2), (rows, 2)
    obs, next_obs, reward, action, noise, next_noise = (torch.randn(shape, generator=generator) for shape in shapes)
    return Minibatch(obs, action.tanh(), next_obs, reward, (reward > 1).float(), noise, next_noise)


def test_log_prob_is_that_of_the_tanh_of_a_gaussian() -> None:
    torch.manual_seed(0)
    actor, obs, noise = SquashedActor(3, 2, (8,), "relu").double(), torch.randn(50, 3).double(), torch.randn(50, 2)
    sample = actor.sample(obs, noise.double())
    mean, log_std = actor.body(obs).chunk(2, -1)
    oracle = distributions.TransformedDistribution(
        distributions.Normal(mean, log_std.exp()), distributions.TanhTransform(cache_size=1)
    )
    torch.testing.assert_close(sample.log_prob, oracle.log_prob(sample.action).sum(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(actor(obs), mean.tanh())


def test_log_prob_stays_finite_where_tanh_saturates() -> None:
    actor = SquashedActor(1, 1, (4,), "relu")
    with torch.no_grad():
        actor.body[-1].weight.zero_()  # type: ignore[operator]
        actor.body[-1].bias.copy_(torch.tensor([40.0, 0.0]))  # type: ignore[operator]
    sample = actor.sample(torch.zeros(1, 1), torch.zeros(1, 1))
    # -log N(0; 0, 1) = log(2 pi)/2 and log(1 - tanh(40)^2) = log 4 - 80 to float precision
    assert sample.log_prob.item() == pytest.approx(80 - np.log(4) - 0.5 * np.log(2 * np.pi), rel=1e-5)


def test_twin_critics_are_two_networks() -> None:
    torch.manual_seed(0)
    critic, obs, action = Critics(5, (8, 8), "relu"), torch.randn(20, 3), torch.randn(20, 2)
    values = critic(obs, action)
    for i in range(2):
        single = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
        layers: Any = zip(critic.layers[::2], single[::2], strict=True)  # type: ignore[call-overload]
        for ours, theirs in layers:
            theirs.weight.data, theirs.bias.data = ours.weight[i].T, ours.bias[i, 0]
        torch.testing.assert_close(values[i], single(torch.cat([obs, action], 1)).squeeze(-1))
    assert not torch.allclose(values[0], values[1])


def test_each_loss_reaches_its_own_networks_alone() -> None:
    policy = make_policy()
    table = sac_losses(policy, make_batch(), 0.99, -2.0)[0].table
    owners = {"train/critic_loss": "critic", "train/actor_loss": "actor", "train/ent_coef_loss": "log_alpha"}
    assert table.keys() == owners.keys()
    names, parameters = policy.weights.names, policy.weights.parameters
    for name, owner in owners.items():
        gradients = torch.autograd.grad(table[name].value, parameters, retain_graph=True, allow_unused=True)
        pairs: list[tuple[str, Tensor | None]] = list(zip(names, gradients, strict=True))
        reached = {key.split(".")[0] for key, gradient in pairs if gradient is not None}
        assert reached == {owner}, name


def test_terminated_states_have_no_future_and_the_target_is_soft() -> None:
    policy, gamma = make_policy(temperature=0.5), 0.9
    batch = make_batch()
    with torch.no_grad():
        table = sac_losses(policy, batch, gamma, -2.0)[0].table
        mean, log_std = policy.actor.body(batch.next_obs).chunk(2, -1)
        dist = distributions.TransformedDistribution(
            distributions.Normal(mean, log_std.exp()), distributions.TanhTransform(cache_size=1)
        )
        action = (mean + log_std.exp() * batch.next_noise).tanh()
        soft = torch.minimum(*policy.target_critic(batch.next_obs, action)) - 0.5 * dist.log_prob(action).sum(-1)
        target = torch.where(batch.terminated > 0, batch.reward, batch.reward + gamma * soft)
        one, two = policy.critic(batch.obs, batch.action)
        expected = 0.5 * (nn.functional.mse_loss(one, target) + nn.functional.mse_loss(two, target))
    assert table["train/critic_loss"].value.item() == pytest.approx(expected.item(), rel=1e-4)


def test_gradients_are_those_of_stable_baselines3(monkeypatch: pytest.MonkeyPatch) -> None:
    net = {"net_arch": [16, 16]}
    peer: Any = SAC("MlpPolicy", gym.make("Pendulum-v1"), policy_kwargs=net, gamma=0.9, seed=0, device="cpu")
    peer.set_logger(configure(None, []))
    for parameter in peer.critic_target.parameters():  # at first a copy of the critics, which would hide a mix-up
        parameter.data.mul_(1.5)
    ours: Any = SACPolicy(peer.observation_space, peer.action_space, lambda _: 1e-3, net_arch=[16, 16])
    # SB3 has a head each for mean and log standard deviation.
    body, heads = peer.actor.latent_pi.parameters(), (peer.actor.mu.parameters(), peer.actor.log_std.parameters())
    actor = [(p,) for p in body] + list(zip(*heads, strict=True))
    for mine, theirs in zip(ours.actor.parameters(), actor, strict=True):
        mine.data.copy_(torch.cat(theirs))

    def copy_critics() -> None:
        for critic, twins in ((ours.critic, peer.critic), (ours.target_critic, peer.critic_target)):
            for i, twin in enumerate(twins.q_networks):
                for mine, theirs in zip(critic.layers[::2], twin[::2], strict=True):
                    mine.weight.data[i], mine.bias.data[i, 0] = theirs.weight.T, theirs.bias

    copy_critics()
    batch = make_batch()
    one_action = {name: getattr(batch, name)[:, :1] for name in ("action", "noise", "next_noise")}  # as Pendulum has
    batch = batch._replace(**one_action)
    ends = batch.terminated.unsqueeze(1), batch.reward.unsqueeze(1)
    samples = ReplayBufferSamples(batch.obs, batch.action, batch.next_obs, *ends)
    monkeypatch.setattr(peer.replay_buffer, "sample", lambda *_, **__: samples)
    noises = iter((batch.noise, batch.next_noise))
    monkeypatch.setattr(distributions.normal, "_standard_normal", lambda *_, **__: next(noises))
    of_critics: list[Tensor] = []  # as its optimizer sees them: the actor's loss adds to them later
    weights = list(peer.critic.parameters())
    peer.critic.optimizer.register_step_post_hook(lambda *_: of_critics.extend(p.grad.clone() for p in weights))
    peer.train(1, 64)

    def gradients(loss: str, parameters: Iterable[Tensor]) -> tuple[Tensor, ...]:
        table = sac_losses(ours, batch, 0.9, -1.0)[0].table
        return torch.autograd.grad(table[loss].value, list(parameters))

    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    twins = zip(of_critics[:6], of_critics[6:], strict=True)
    for gradient, both in zip(gradients("train/critic_loss", ours.critic.parameters()), twins, strict=True):
        close(gradient, torch.stack([theirs.t().reshape(gradient.shape[1:]) for theirs in both]))
    close(gradients("train/ent_coef_loss", [ours.log_alpha])[0], peer.log_ent_coef.grad)
    copy_critics()  # SB3's actor learns from critics that have taken their step
    for gradient, theirs in zip(gradients("train/actor_loss", ours.actor.parameters()), actor, strict=True):
        close(gradient, torch.cat([p.grad for p in theirs]))


def test_temperature_rises_where_entropy_is_short() -> None:
    policy = make_policy()
    batch = make_batch()
    for target, sign in ((-20.0, 1), (20.0, -1)):
        loss = sac_losses(policy, batch, 0.99, target)[0].table["train/ent_coef_loss"]
        (slope,) = torch.autograd.grad(loss.value, policy.log_alpha)
        assert slope.sign().item() == sign  # descent lowers log alpha where the entropy exceeds the target


def test_the_slow_critics_follow_and_predictions_keep_their_shape() -> None:
    policy = make_policy(tau=0.25)
    weight = policy.target_critic.get_parameter("layers.0.weight")
    weights, before = policy.weights, weight.clone()
    assert weights.vector is not None
    weights.vector.add_(1)
    weights.average()
    torch.testing.assert_close(weight, before + 0.25)
    for obs in (np.zeros(3), np.zeros((5, 3))):
        for deterministic in (True, False):
            action, _ = policy.predict(obs.astype(np.float32), deterministic=deterministic)
            assert action.shape == (*obs.shape[:-1], 2) and (np.abs(action) <= 2).all()
    with pytest.raises(ValueError, match="unknown activation: got 'step', expected one of silu"):
        make_policy(activation_fn="step")


def test_langevin_noise_heats_the_weights_of_the_actor_that_learn() -> None:
    box = spaces.Box(-1.0, 1.0, (2,)), spaces.Box(-1.0, 1.0, (1,))
    policy = SACPolicy(*box, lambda _: 5e-3, net_arch=[200], ema_decay=0.9)
    bias = next(each for name, each in policy.actor.named_parameters() if name.endswith("bias")).requires_grad_(False)
    before = {name: each.detach().clone() for name, each in policy.named_parameters()}
    for _ in range(9):
        policy.heat_actor(0.04, torch.Generator().manual_seed(_))
    moved = {name: each - before[name] for name, each in policy.named_parameters()}
    actor = torch.cat([move.flatten() for name, move in moved.items() if name.startswith("actor.") and move.any()])
    assert len(actor) == sum(each.numel() for each in policy.actor.parameters() if each is not bias)
    # Nine independent draws of variance 2 x 0.005 x 0.04.
    assert actor.std().item() == pytest.approx(0.06, rel=4 / math.sqrt(2 * len(actor)))
    assert abs(actor.mean().item()) < 4 * 0.06 / math.sqrt(len(actor))
    assert not any(move.any() for name, move in moved.items() if not name.startswith("actor."))


def test_the_early_average_forgets_where_the_actor_began() -> None:
    box = spaces.Box(-1.0, 1.0, (2,)), spaces.Box(-1.0, 1.0, (1,))
    policy = SACPolicy(*box, lambda _: 1e-3, net_arch=[4], ema_decay=0.999)
    assert policy.averaged_actor is not None
    for updates in range(1, 501):
        for each in policy.actor.parameters():
            each.data.fill_(updates)
        policy.average_actor(updates)
    for mean in policy.averaged_actor.parameters():  # a_n = a_{n-1} + 9 / (n + 9) (n - a_{n-1}) has the solution 0.9 n
        torch.testing.assert_close(mean, torch.full_like(mean, 450.0))


def test_the_averaged_actor_acts_deterministically_and_follows_geometrically_after_its_warm_up() -> None:
    box = spaces.Box(-1.0, 1.0, (2,)), spaces.Box(-1.0, 1.0, (1,))
    policy = SACPolicy(*box, lambda _: 1e-3, net_arch=[4], ema_decay=0.75)
    assert policy.averaged_actor is not None
    first = {name: each.detach().clone() for name, each in policy.actor.named_parameters()}
    with torch.no_grad():
        for each in policy.actor.parameters():
            each.add_(1.0)
    for updates in (27, 28, 29):  # 27 / (27 + 9) = 0.75
        policy.average_actor(updates)
    for name, mean in policy.averaged_actor.named_parameters():
        torch.testing.assert_close(mean, first[name] + 1 - 0.75**3)
    obs = torch.randn(5, 2)
    assert torch.equal(policy.decide(obs, None), policy.averaged_actor(obs))
    noise = torch.randn(1, 5, 1)
    assert torch.equal(policy.decide(obs, noise), policy.actor.sample(obs, noise[0]).action)
    assert not [name for name in policy._own_parameters() if name.startswith("averaged_actor")]


def test_spectral_bounds_hold_for_weights_that_were_changed_after_the_next_update() -> None:
    env = gym.make("Pendulum-v1")
    learner = LipschitzMBPO(
        "MlpPolicy", env, model="none", regularizer="spectral", spectral_bound=0.5, critic_hidden=(16, 16),
        learning_rate=0.0, learning_starts=10, compile="off", seed=0, device="cpu",
    ).learn(11)  # fmt: skip
    hidden = [
        layer for critics in (learner.policy.critic, learner.policy.target_critic)
        for layer in critics.layers if isinstance(layer, StackedLinear) and layer.spectral_bound
    ]  # fmt: skip
    assert len(hidden) == 4
    for layer in hidden:
        left, right = (torch.ones(2, width) / width**0.5 for width in layer.weight.shape[1:])
        with torch.no_grad():  # rank 1 and norm 3: one power iteration is exact
            layer.weight.copy_(3 * left[:, :, None] * right[:, None])
    learner.learn(1, reset_num_timesteps=False)
    for layer in hidden:
        applied = layer(torch.eye(layer.weight.shape[1]).expand(2, -1, -1)) - layer.bias
        torch.testing.assert_close(torch.linalg.matrix_norm(applied, 2), torch.full((2,), 0.5))


def test_unknown_choice_of_bounded_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="spectral_layers must be 'all' or 'last', got 'lst'"):
        Critics(5, (8, 8), "relu", spectral_bound=1.0, spectral_layers="lst")
