"""Snapshots of weights against the posterior of a linear regression, and as the members of a model."""

from __future__ import annotations

import pytest
import torch

from driftrl.dynamics.snapshots import weight_snapshots
from driftrl.dynamics.transition import GaussianTransition

from .linear_system import generator, linear_system


def test_snapshots_have_mean_and_covariance_of_the_posterior() -> None:
    # Linear regression with known noise: the posterior is N(m, A^-1), A = X'X / s^2, whatever the preconditioner.
    x = (
        torch.randn(200, 2, generator=generator(), dtype=torch.float64)
        @ torch.tensor([[1.0, 0.0], [0.8, 0.5]]).double()
    )
    y = x @ torch.tensor([1.0, -2.0]).double() + 0.5 * torch.randn(200, generator=generator(1), dtype=torch.float64)
    precision = x.T @ x / 0.25
    mean = torch.linalg.solve(precision, x.T @ y / 0.25)
    found = weight_snapshots(
        lambda w: precision @ (w - mean), torch.zeros(2, dtype=torch.float64), count=800, every=40, step=0.3,
        preconditioner=1 / precision.diagonal(), generator=generator(2),
    )[50:]  # fmt: skip
    covariance = torch.linalg.inv(precision)
    torch.testing.assert_close(found.mean(0), mean, atol=0.2 * covariance.diagonal().sqrt().max().item(), rtol=0.0)
    torch.testing.assert_close(found.T.cov(), covariance, rtol=0.25, atol=1e-5)


def test_a_model_samples_from_its_snapshots_which_disagree_where_nothing_was_seen() -> None:
    torch.manual_seed(0)
    model = GaussianTransition(2, 1, hidden=(32, 32), homoscedastic=True, snapshots=5)
    obs, action, reward, next_obs = linear_system(600)
    model.fit(obs, action, reward, next_obs, generator=generator(), max_epochs=40)
    assert model.posterior is not None and model.posterior.weights[0].shape[0] == 5
    near, far = (model.disagreement(scale * obs[:200], action[:200]).square().mean().sqrt() for scale in (1.0, 6.0))
    assert 0 < 3 * near < far
    error = model.predict(obs, action)[0] - next_obs
    assert error.square().mean() < 0.15  # the noise alone has 0.05
    before = model.sample(obs, action, generator(3))[0]
    for each in model.posterior.parameters():
        each.zero_()
    assert not torch.equal(model.sample(obs, action, generator(3))[0], before)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="snapshots must be at least 0, and 0 without noise or with members, got 3"):
        GaussianTransition(2, 1, members=2, snapshots=3)
    with pytest.raises(ValueError, match="count, every and step must be"):
        weight_snapshots(
            torch.zeros_like, torch.zeros(2), count=0, every=1, step=0.1, preconditioner=torch.ones(2),
            generator=generator(),
        )  # fmt: skip
