"""What is measured of the critics while training: bounds that hold, and warnings that mean something."""

from __future__ import annotations

import math

import pytest
import torch

from driftrl.agents.lipschitz_mbpo.diagnostics import runs_away, spectral_product
from driftrl.agents.lipschitz_mbpo.sac import StackedLinear

from .test_algorithm import agent


def test_the_spectral_product_bounds_the_slope_in_units_of_the_value() -> None:
    learner = agent(model="homoscedastic", value_gradient=1, activation="relu", normalize_observation=True).learn(60)
    critics = learner.policy.critic
    with torch.no_grad():
        critics.half_width.fill_(50.0)
        last = critics.layers[-1]
        assert isinstance(last, StackedLinear)
        last.weight.normal_(generator=torch.Generator().manual_seed(0))
    obs, action = torch.randn(200, 4, requires_grad=True), torch.zeros(200, 1)
    for c, bound in enumerate(spectral_product(critics).tolist()):
        (slope,) = torch.autograd.grad(critics(obs, action)[c].sum(), obs)
        assert 0.01 * bound < slope.norm(dim=1).max().item() <= bound


def test_values_of_entropy_alone_do_not_run_away(recwarn: pytest.WarningsRecorder) -> None:
    learner = agent(model="none", model_interval=250, temperature=0.1, learn_temperature=False).learn(60)
    policy, real = learner.policy, learner._real
    real.rows[:, -2] = 0.0  # no reward was ever seen
    assert real.all().reward.abs().max() == 0
    most = 0.1 * math.log(2) / (1 - 0.99)  # of one action, for ever
    recwarn.clear()
    assert not runs_away(1.9 * most, policy, real, 0.99) and not recwarn
    with pytest.warns(UserWarning, match="the critics run away: a value of 14.6 where rewards and entropy allow 13.9"):
        assert runs_away(2.1 * most, policy, real, 0.99)
