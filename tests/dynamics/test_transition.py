from __future__ import annotations

import math

import pytest
import torch

from driftrl.dynamics.transition import GaussianTransition

from .linear_system import MATRIX, NOISE, REWARD_NOISE, gaussian, generator, linear_system


def test_gaussian_recovers_mean_and_variance_of_a_linear_system() -> None:
    model, rng = gaussian(), generator(1)
    for _ in range(6):  # the mean, which decides when a fit ends, is found before the variance
        model.fit(*linear_system(8000), generator=rng)
    obs, action = torch.tensor([[0.5, -0.3]]), torch.tensor([[0.4]])
    draws = 20000
    next_obs, reward = model.sample(obs.expand(draws, -1), action.expand(draws, -1), generator(2))
    torch.testing.assert_close(next_obs.mean(0), (obs @ MATRIX.T + action)[0], rtol=0, atol=0.04)
    torch.testing.assert_close(next_obs.std(0), NOISE, rtol=0.15, atol=0)
    assert reward.mean().item() == pytest.approx(0.5 - 0.4, abs=0.04)
    assert reward.std().item() == pytest.approx(REWARD_NOISE, rel=0.15)

    test = linear_system(4000, seed=9)
    scales = torch.cat([torch.tensor([REWARD_NOISE]), NOISE])
    entropy = (0.5 * math.log(2 * math.pi * math.e) + scales.log()).sum()
    assert -model.log_prob(*test).mean().item() == pytest.approx(entropy.item(), abs=0.1)


def member(ensemble: GaussianTransition, index: int) -> GaussianTransition:
    """The single model with the weights of one member."""
    single = gaussian()
    with torch.no_grad():
        for ours, theirs in zip(single.parameters(), ensemble.parameters(), strict=True):
            ours.copy_(theirs[index : index + 1])
    for name in ("inputs", "targets"):
        getattr(single, name).load_state_dict(getattr(ensemble, name).state_dict())
    return single


def test_batched_ensemble_equals_separate_networks_before_and_after_a_gradient_step() -> None:
    ensemble = gaussian(members=3, elites=3)
    x, y = torch.randn(3, 64, 3, generator=generator()), torch.randn(3, 64, 3, generator=generator(1))
    singles = [member(ensemble, m) for m in range(3)]
    for _ in range(2):
        losses = ensemble._loss(x, y, ())
        for m, single in enumerate(singles):
            torch.testing.assert_close(ensemble._predict(x)[m], single._predict(x[m : m + 1])[0])
            torch.testing.assert_close(losses[m], single._loss(x[m : m + 1], y[m : m + 1], ())[0])
            single._loss(x[m : m + 1], y[m : m + 1], ()).sum().backward()
            single.optimizer.step()
        losses.sum().backward()
        ensemble.optimizer.step()
    for m, single in enumerate(singles):
        for ours, theirs in zip(ensemble.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(ours[m : m + 1], theirs, rtol=1e-4, atol=1e-6)


def test_log_prob_is_that_of_the_elites_mixture_in_the_units_of_the_data() -> None:
    model = gaussian(members=3, elites=2)
    data = linear_system(500)
    model.fit(*data, generator=generator(), max_epochs=2)
    obs, action, reward, next_obs = (part[:50] for part in data)
    with torch.no_grad():
        mean, log_var = model._moments(model._x(obs, action).expand(3, -1, -1))
        assert log_var is not None
    target = torch.cat([reward[:, None], next_obs - obs], 1)
    normal = torch.distributions.Normal(model.targets.inverse(mean), (0.5 * log_var).exp() * model.targets.scale)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(50, 2)),
        torch.distributions.Independent(
            torch.distributions.Normal(
                normal.mean[model.elite_members].transpose(0, 1), normal.stddev[model.elite_members].transpose(0, 1)
            ),
            1,
        ),
    )
    torch.testing.assert_close(model.log_prob(obs, action, reward, next_obs), mixture.log_prob(target))


def test_loss_is_the_likelihood_with_a_price_on_the_distance_of_the_bounds() -> None:
    model = gaussian(members=2, elites=2)
    x, y = torch.randn(2, 30, 3, generator=generator()), torch.randn(2, 30, 3, generator=generator(1))
    mean, log_var = model._moments(x)
    assert log_var is not None
    nll = -torch.distributions.Normal(mean, (0.5 * log_var).exp()).log_prob(y).mean((1, 2))
    expected = 2 * nll - math.log(2 * math.pi) + 0.01 * (0.5 + 10) * 3
    torch.testing.assert_close(model._loss(x, y, ()), expected)


@pytest.mark.parametrize(("raw", "bound"), [(-100.0, -10.0), (100.0, 0.5)])
def test_log_variance_stays_between_its_bounds(raw: float, bound: float) -> None:
    model = gaussian()
    with torch.no_grad():
        model.net.biases[-1][..., 3:] = raw
        log_var = model._moments(torch.zeros(1, 1, 3))[1]
    assert log_var is not None
    torch.testing.assert_close(log_var, torch.full((1, 1, 3), bound), rtol=0, atol=1e-3)


def test_each_row_is_predicted_by_a_uniformly_drawn_elite() -> None:
    model = gaussian(members=5, elites=3, probabilistic=False)
    model.elite_members.copy_(torch.tensor([4, 0, 2]))
    obs, action = torch.randn(10, 2, generator=generator()), torch.zeros(10, 1)
    by_member = model._predict(model._x(obs, action).expand(5, -1, -1)).detach()
    rng, counts = generator(1), torch.zeros(10, 5)
    for _ in range(600):
        sample = torch.cat([*reversed([part.view(10, -1) for part in model.sample(obs, action, rng)])], 1)
        y = torch.cat([sample[:, :1], sample[:, 1:] - obs], 1)
        counts[torch.arange(10), (by_member - y).square().sum(-1).argmin(0)] += 1
    assert counts[:, [1, 3]].sum() == 0
    torch.testing.assert_close(counts[:, [0, 2, 4]] / 600, torch.full((10, 3), 1 / 3), rtol=0, atol=0.08)


def test_deterministic_model_has_neither_noise_nor_density() -> None:
    model, (obs, action, reward, next_obs) = gaussian(probabilistic=False), linear_system(300)
    model.fit(obs, action, reward, next_obs, generator=generator(), max_epochs=2)
    for sampled, predicted in zip(model.sample(obs, action, generator()), model.predict(obs, action), strict=True):
        torch.testing.assert_close(sampled, predicted)
    with pytest.raises(ValueError, match="no density; build it with probabilistic=True"):
        model.log_prob(obs, action, reward, next_obs)
