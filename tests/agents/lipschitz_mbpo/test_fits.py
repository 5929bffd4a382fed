"""Compiled fits of the transition models: the same as eager ones, whatever the model learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from driftrl.agents.common.compiling import Compiled
from driftrl.agents.lipschitz_mbpo.model import fit_gradient
from driftrl.dynamics.transition import TRANSITIONS, GaussianTransition
from driftrl.dynamics.transition_base import TransitionModel
from driftrl.dynamics.transition_settings import TransitionSettings
from driftrl.envs.native.build import find_compiler

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
KINDS: dict[str, dict[str, Any]] = {
    "homoscedastic": {"homoscedastic": True, "layer_norm": True, "dropout": 0.1},
    "members": {"members": 3, "elites": 2},
    "prior": {"settings": {"jacobian_coef": 0.1}},
    "terminal": {"settings": {"terminal_head": True}},
    "flow": {},
    "langevin": {},
}


def make(kind: str) -> TransitionModel:
    options = dict(KINDS[kind])
    settings = TransitionSettings(batch_size=32, **options.pop("settings", {}))
    torch.manual_seed(0)
    return TRANSITIONS.get(kind, GaussianTransition)(3, 1, settings, hidden=(32, 32), **options)


def fit(model: TransitionModel, gradient: Any, rows: int = 200) -> dict[str, float]:
    draws = torch.Generator().manual_seed(0)
    obs, action = torch.randn(rows, 3, generator=draws), torch.rand(rows, 1, generator=draws)
    next_obs = obs + torch.sin(obs.roll(1, 1)) * action
    terminated = next_obs[:, 0] > 1 if model.settings.terminal_head else None
    return model.fit(
        obs, action, obs[:, 0] * action[:, 0], next_obs, terminated, generator=torch.Generator().manual_seed(1),
        max_epochs=3, gradient=gradient,
    )  # fmt: skip


@needs_compiler
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "homoscedastic" else [pytest.mark.slow]) for kind in KINDS]
)
def test_a_compiled_fit_is_the_eager_one(kind: str) -> None:
    eager, compiled = make(kind), make(kind)
    gradient = fit_gradient(None, compiled, "on")
    assert isinstance(gradient, Compiled)
    before = {name: each.clone() for name, each in compiled.state_dict().items()}
    for _ in range(2):  # the second goes on with the same program
        expected, found = fit(eager, None), fit(compiled, gradient)
        gradient = fit_gradient(gradient, compiled, "on")
        assert found == pytest.approx(expected, rel=1e-3)
    for name, each in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], each, rtol=2e-3, atol=2e-4)
    assert any(not torch.equal(each, before[name]) for name, each in compiled.state_dict().items())


@needs_compiler
def test_what_changes_between_fits_counts_in_the_next() -> None:
    model, alone = make("homoscedastic"), make("homoscedastic")
    assert isinstance(model, GaussianTransition) and isinstance(alone, GaussianTransition)
    gradient = fit_gradient(None, model, "on")
    fit(model, gradient)
    fit(alone, None)
    for each in (model, alone):  # frozen, replaced
        each.net.weights[0].requires_grad_(False)
        each.net.biases[1] = torch.nn.Parameter(torch.ones_like(each.net.biases[1]))
    first = model.net.weights[0].clone()
    gradient = fit_gradient(gradient, model, "on")
    assert fit(model, gradient) == pytest.approx(fit(alone, None), rel=1e-3)
    assert torch.equal(model.net.weights[0], first)
    torch.testing.assert_close(model.net.biases[1], alone.net.biases[1], rtol=2e-3, atol=2e-4)


def test_another_model_or_one_with_hooks_has_its_own_gradient() -> None:
    first, second = make("homoscedastic"), make("homoscedastic")
    assert isinstance(second, GaussianTransition)
    gradient = fit_gradient(None, first, "on")
    assert fit_gradient(gradient, first, "on") is gradient
    other = fit_gradient(gradient, second, "on")
    assert other is not gradient
    second.net.register_forward_hook(lambda module, given, found: 2 * found)
    assert fit_gradient(other, second, "on") == second.gradient
    assert fit_gradient(gradient, first, "") == first.gradient
