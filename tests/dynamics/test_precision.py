"""Products of hidden layers in bfloat16: what is rounded, and what is not."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from driftrl.dynamics.ensemble import Members
from driftrl.dynamics.precision import bfloat16_product, bfloat16_products, reduced
from driftrl.dynamics.transition import GaussianTransition
from driftrl.dynamics.transition_settings import TransitionSettings

EXACT = 1 + 2**-7
"""bfloat16 has 7 bits after the first one."""
ROUNDED = 1 + 2**-9
"""To 1."""


def chain(*weights: float) -> Members:
    """One unit in each layer."""
    net = Members(1, [1] * (len(weights) + 1))
    with torch.no_grad():
        for each, value in zip(net.weights, weights, strict=True):
            each.fill_(value)
    return net


def test_product_rounds_what_bfloat16_cannot_hold() -> None:
    one = torch.ones(1, 1)
    assert bfloat16_product(one * EXACT, one).item() == EXACT
    assert bfloat16_product(one * ROUNDED, one).item() == 1
    assert bfloat16_product(one, one * ROUNDED).item() == 1
    assert bfloat16_product(one.double(), one.double()).dtype is torch.float64


def test_only_products_between_hidden_layers_are_rounded() -> None:
    """The input is large enough that SiLU is the identity, the numbers so that each rounding shows."""
    x = torch.full((1, 1, 1), 64.0)
    for weights, expected in (
        ((ROUNDED, 1.0, 1.0), 64.0),  # what the first layer gives is rounded where the second takes it
        ((1.0, ROUNDED, 1.0), 64.0),
        ((1.0, 1.0, ROUNDED), 64.0 * ROUNDED),
        ((1.0, ROUNDED), 64.0 * ROUNDED),  # from the input to the only hidden layer, from it to the output
    ):
        net = chain(*weights)
        assert net(x).item() == 64 * ROUNDED
        with bfloat16_products():
            assert net(x).item() == expected, weights


def test_context_ends_and_nests_and_is_the_threads_own() -> None:
    seen = []
    with bfloat16_products():
        other = threading.Thread(target=lambda: seen.append(reduced()))
        other.start()
        other.join()
        with bfloat16_products(False):
            assert not reduced()
        assert reduced()
        try:
            with bfloat16_products(False):
                raise KeyError
        except KeyError:
            assert reduced()
    assert not reduced() and seen == [False]


def linear_data(rows: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    obs, action = torch.randn(rows, 3, generator=generator), torch.randn(rows, 1, generator=generator)
    next_obs = obs + 0.1 * torch.cat([obs[:, 1:], action], 1)
    return obs, action, obs[:, 0], next_obs


def test_model_fitted_in_bfloat16_is_about_as_good_and_predicts_in_float32() -> None:
    errors = {}
    for bfloat16 in (False, True):
        torch.manual_seed(0)
        model = GaussianTransition(
            3, 1, TransitionSettings(bfloat16=bfloat16), hidden=(64, 64), homoscedastic=True, layer_norm=True
        )
        fitted = model.fit(*linear_data(2000), generator=torch.Generator().manual_seed(0), max_epochs=40)
        errors[bfloat16] = fitted["model/holdout_mse"]
        assert {each.dtype for each in model.parameters()} == {torch.float32}
        obs, action, _, next_obs = linear_data(100)
        before = model.predict(obs, action)[0]
        assert (before - next_obs).abs().mean() < 0.02 and not reduced()
    assert errors[True] != errors[False]
    assert errors[True] < 2 * errors[False] + 1e-4


def test_gradient_of_a_model_in_bfloat16_is_that_in_float32_but_for_rounding() -> None:
    torch.manual_seed(0)
    net, x = Members(2, (6, 64, 64, 64, 4), layer_norm=True), torch.randn(2, 128, 6)
    target = torch.randn(2, 128, 4)

    def gradient() -> list[Tensor]:
        return list(torch.autograd.grad((net(x) - target).square().mean(), [*net.parameters()]))

    exact = gradient()
    with bfloat16_products():
        rounded = gradient()
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype is torch.float32
        assert 0 < (a - b).norm() / a.norm() < 0.02


def test_gradient_compiles_in_a_thread_that_has_not_used_it() -> None:
    settings = TransitionSettings(batch_size=16, bfloat16=True)
    model, data = GaussianTransition(3, 1, settings, hidden=(8, 8, 8)), linear_data(64)
    errors = list[float]()

    def fit() -> None:
        gradient = torch.compile(model.gradient, backend="eager")
        errors.append(
            model.fit(*data, generator=torch.Generator(), max_epochs=1, gradient=gradient)["model/holdout_mse"]
        )

    fresh = threading.Thread(target=fit)
    fresh.start()
    fresh.join()
    assert len(errors) == 1 and math.isfinite(errors[0])
