"""Fitting: linear systems with known noise, and cases that are built so that one mechanism decides the result."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from driftrl.dynamics.transition import GaussianTransition
from driftrl.dynamics.transition_base import TransitionModel
from driftrl.dynamics.transition_settings import TransitionSettings

from .linear_system import MATRIX, gaussian, generator, linear_system


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class Scripted(TransitionModel):
    """One weight that grows by one in each epoch; each member's prediction is wrong by ``errors[epoch]``."""

    def __init__(self, errors: Sequence[Sequence[float]], **settings: float) -> None:
        members = len(errors[0])
        options = {"learning_rate": 1.0, "weight_decay": 0.0, "batch_size": 10**6, "normalize_targets": False}
        super().__init__(2, 1, TransitionSettings(**(options | settings)), members, elites=1)  # type: ignore[arg-type]
        self.errors = torch.tensor(errors)
        self.epoch = nn.Parameter(torch.zeros(members, 1, 1))

    def _loss(self, x: Tensor, y: Tensor, noise: Sequence[Tensor]) -> Tensor:
        return -self.epoch.sum((1, 2))  # a constant gradient: Adam moves by its learning rate, 1

    def _predict(self, x: Tensor) -> Tensor:
        now = self.epoch[:, 0, 0].round().long()
        return self.errors.gather(0, now[None])[0].view(-1, 1, 1).expand(-1, x.shape[1], 3)

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return ()

    def _push(self, x: Tensor, noise: tuple[Tensor, ...]) -> Tensor:
        return self._predict(x[None])[0]

    def _log_density(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError


def still_data(n: int = 20) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Targets are zero: the error is the prediction."""
    obs = torch.randn(n, 2, generator=generator())
    return obs, torch.zeros(n, 1), torch.zeros(n), obs


@pytest.mark.parametrize("normalize_targets", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_targets_of_any_scale_and_kind_are_predicted_in_the_units_of_the_data(
    residual: bool, normalize_targets: bool
) -> None:
    model = gaussian(residual=residual, normalize_targets=normalize_targets)
    obs, action, reward, next_obs = linear_system(3000)
    shift, unit = torch.tensor([5.0, 0.0]), torch.tensor([1.0, 1e-2 if normalize_targets else 1.0])
    model.fit(obs * unit + shift, action, reward, next_obs * unit + shift, generator=generator(1))
    predicted, _ = model.predict(obs * unit + shift, action)
    error = (predicted - shift) / unit - (obs @ MATRIX.T + action)
    assert error.square().mean().sqrt() < 0.1


def test_early_stopping_restores_each_members_best_weights_and_chooses_the_elite() -> None:
    #              member 0 is best after epoch 2, member 1 after epoch 3
    errors = [[9.0, 9.0], [5.0, 4.0], [2.0, 3.0], [6.0, 1.0], [7.0, 2.0], [8.0, 2.0], [8.0, 2.0], [8.0, 2.0]]
    model = Scripted(errors, patience=3)
    metrics = model.fit(*still_data(), generator=generator())
    assert model.epoch.flatten().tolist() == pytest.approx([2, 3])
    assert model.elite_members.tolist() == [1]
    assert metrics["model/holdout_mse"] == pytest.approx(1.0)
    assert metrics["model/epochs"] == 6  # the last gain, and three more


def test_small_gains_do_not_prolong_a_fit_but_the_best_weights_count() -> None:
    errors = [[1.0]] + [[1.0 - 1e-4 * k] for k in range(1, 10)]
    model = Scripted(errors, patience=4)
    assert model.fit(*still_data(), generator=generator())["model/epochs"] == 5  # the first, and four without a gain
    assert model.epoch.item() == pytest.approx(5)


def test_a_fit_judges_and_keeps_the_average_of_its_weights() -> None:
    # after k epochs of one update the weight is k, and its average, which begins short, 0.9 k
    model = Scripted([[9.0], [5.0], [1.0], *[[7.0]] * 5], patience=3, ema_decay=0.5)
    metrics = model.fit(*still_data(), generator=generator())
    assert model.epoch.item() == pytest.approx(0.9 * 2)
    assert metrics["model/holdout_mse"] == pytest.approx(1.0)
    assert metrics["model/epochs"] == 5
    assert next(iter(model.optimizer.state.values()))["step"].item() == 5


def test_a_later_fit_goes_on_from_the_average_with_the_decay_itself() -> None:
    # The weight goes from 0 to 20 and its average to 18, then on from there: 19 and 18.5, 20 and 19.25, ...
    model = Scripted([[float(30 - k)] for k in range(30)], ema_decay=0.5)
    model.fit(*still_data(), generator=generator(), max_epochs=20)
    first = model.epoch.item()
    model.fit(*still_data(), generator=generator(), max_epochs=3)
    assert model.epoch.item() == pytest.approx(first + 3 - 1 + 2**-3)


def test_an_average_does_not_keep_the_random_weights_of_the_beginning() -> None:
    data = linear_system(500)
    found = {decay: gaussian(ema_decay=decay).fit(*data, generator=generator()) for decay in (0.0, 0.999)}
    assert found[0.999]["model/holdout_mse"] < 1.5 * found[0.0]["model/holdout_mse"]


def test_the_average_of_members_and_terminal_heads_that_are_frozen_in_part() -> None:
    model = gaussian(members=2, elites=1, terminal_head=True, ema_decay=0.9)
    assert model.terminal_net is not None
    model.terminal_net.requires_grad_(False)
    before = [each.clone() for each in model.terminal_net.parameters()]
    data = linear_system(500)
    found = model.fit(*data, torch.zeros(500, dtype=torch.bool), generator=generator(), max_epochs=200)
    assert found["model/holdout_mse"] < 0.1
    assert all(torch.equal(*pair) for pair in zip(before, model.terminal_net.parameters(), strict=True))


def test_budgets_end_a_fit() -> None:
    errors = [[float(2**-k)] for k in range(20)]
    assert Scripted(errors).fit(*still_data(), generator=generator(), max_epochs=3)["model/epochs"] == 3
    assert Scripted(errors).fit(*still_data(), generator=generator(), max_seconds=0.0)["model/epochs"] == 1


def test_second_fit_goes_on_from_weights_and_optimizer_state() -> None:
    model, data = gaussian(), linear_system(1000)
    first = model.fit(*data, generator=generator())
    steps = next(iter(model.optimizer.state.values()))["step"].item()
    assert steps == first["model/epochs"] * math.ceil(800 / 256)
    second = model.fit(*data, generator=generator(1), max_epochs=1)
    assert second["model/holdout_mse"] < 1.02 * first["model/holdout_mse"]
    assert next(iter(model.optimizer.state.values()))["step"].item() == steps + math.ceil(800 / 256)


def test_a_fit_divides_the_rows_and_goes_on_from_the_division() -> None:
    model, data, rng = gaussian(members=4, elites=2), linear_system(200), generator(1)
    for n in (100, 200):
        before = model.member_rows
        model.fit(*(part[:n] for part in data), generator=rng, max_epochs=1)
        assert model.member_rows.shape == (4, n * 4 // 5) and model.holdout_rows.shape == (n // 5,)
        assert torch.equal(model.member_rows[:, : before.shape[1]], before)


def test_normalisers_do_not_look_at_the_holdout() -> None:
    model, (obs, action, reward, next_obs) = gaussian(), linear_system(100)
    model.fit(obs, action, reward, next_obs, generator=generator(), max_epochs=1)
    rows = model.member_rows[0]
    torch.testing.assert_close(model.inputs.mean, torch.cat([obs, action], 1)[rows].mean(0))
    move = torch.cat([reward[:, None], next_obs - obs], 1)[rows]
    torch.testing.assert_close(model.targets.scale, move.std(0, correction=0))


def test_only_weight_matrices_decay() -> None:
    model = gaussian(weight_decay=0.3)
    decayed, rest = model.optimizer.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(p) for p in model.net.weights}
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_predictions_are_clipped_to_the_range_of_the_data() -> None:
    model = gaussian()
    obs, action, reward, next_obs = linear_system(200)
    model.fit(obs, action, reward, next_obs, generator=generator(), max_epochs=1)
    far, reward_far = model.sample(100 * obs, 100 * action, generator())
    assert torch.equal(far.amin(0), next_obs.amin(0)) and torch.equal(far.amax(0), next_obs.amax(0))
    assert (reward_far.min(), reward_far.max()) == (reward.min(), reward.max())


@pytest.mark.parametrize(("column", "name"), [*enumerate(["obs", "action", "reward", "next_obs"])])
def test_data_that_are_not_finite_are_refused_and_leave_the_model_as_it_was(column: int, name: str) -> None:
    model = gaussian()
    data = list(linear_system(100))
    model.fit(*data, generator=generator(), max_epochs=2)
    before, optimizer = copy.deepcopy(model), copy.deepcopy(model.optimizer.state_dict())
    data[column] = data[column].clone()
    data[column][3] = math.nan
    with pytest.raises(ValueError, match=f"{name}: got 1 of 100 rows with nan or infinity"):
        model.fit(*data, generator=generator())
    assert same(model, before)
    torch.testing.assert_close(model.optimizer.state_dict(), optimizer, rtol=0, atol=0)


def test_divergence_is_an_error_and_leaves_model_and_optimizer_as_they_were() -> None:
    model, data = gaussian(normalize_targets=False), linear_system(300)
    model.fit(*data, generator=generator(), max_epochs=2)
    before, optimizer = copy.deepcopy(model), copy.deepcopy(model.optimizer.state_dict())
    huge = (*data[:2], data[2] * 1e30, data[3])
    with pytest.raises(ValueError, match="diverged in epoch 1: got training loss inf"):
        model.fit(*huge, generator=generator())
    assert same(model, before)
    torch.testing.assert_close(model.optimizer.state_dict(), optimizer, rtol=0, atol=0)
    model.fit(*data, generator=generator(), max_epochs=2)  # and goes on


def test_bad_arguments_are_refused() -> None:
    obs, action, reward, next_obs = linear_system(10)
    model = gaussian()
    with pytest.raises(
        ValueError, match=r"obs and action: got \[10, 2\] and \[10, 2\], expected \(\[10, 2\], \[10, 1\]\)"
    ):
        model.sample(obs, obs, generator())
    with pytest.raises(ValueError, match=r"reward and next_obs: got \[10, 1\] and \[10, 2\]"):
        model.fit(obs, action, reward[:, None], next_obs, generator=generator())
    with pytest.raises(ValueError, match="at least 2 rows"):
        model.fit(obs[:1], action[:1], reward[:1], next_obs[:1], generator=generator())
    with pytest.raises(ValueError, match="max_epochs must be at least 1, got 0"):
        model.fit(obs, action, reward, next_obs, generator=generator(), max_epochs=0)
    with pytest.raises(ValueError, match=r"terminated: got \[10\], expected None"):
        model.fit(obs, action, reward, next_obs, reward > 0, generator=generator())
    with pytest.raises(ValueError, match="elites must be between 1 and members, got 3 of 2"):
        GaussianTransition(2, 1, members=2, elites=3)
    with pytest.raises(ValueError, match="obs_dim and action_dim must be at least 1, got 0 and 1"):
        GaussianTransition(0, 1)
    with pytest.raises(ValueError, match="widths must be at least 1"):
        GaussianTransition(2, 1, hidden=(0,))
    with pytest.raises(ValueError, match=r"min_gain: got 1.0, expected in \[0, 1\)"):
        TransitionSettings(min_gain=1.0)


def test_terminal_head_learns_the_rule_and_keeps_its_best_weights() -> None:
    model = gaussian(terminal_head=True, patience=8)
    obs, action, reward, next_obs = linear_system(4000)
    metrics = model.fit(obs, action, reward, next_obs, next_obs[:, 0] > 1, generator=generator(1))
    obs, action, _, next_obs = linear_system(4000, seed=3)
    ended = next_obs[:, 0] > 1
    right = model.terminal(obs, action, next_obs) == ended
    assert model.terminal(obs, action, next_obs).dtype == torch.bool
    assert right.float().mean() > 0.97 and right[ended].float().mean() > 0.93
    assert metrics["model/terminal_loss"] < 0.1

    with pytest.raises(ValueError, match=r"terminated: got None, expected bool \[N\]"):
        model.fit(*linear_system(100), generator=generator())
    with pytest.raises(ValueError, match=r"no terminal head; build it with TransitionSettings\(terminal_head=True\)"):
        gaussian().terminal(obs, action, next_obs)
    with pytest.raises(ValueError, match="obs and action: got"):
        model.terminal(obs, obs, next_obs)
    with pytest.raises(ValueError, match=r"next_obs: got \[4000, 1\], expected \[4000, 2\]"):
        model.terminal(obs, action, action)


def test_terminal_head_is_restored_by_its_own_error() -> None:
    model = Scripted([[9.0], [1.0], *[[2.0]] * 9], terminal_head=True, learning_rate=1.0, patience=8)
    obs, action, reward, next_obs = still_data(200)
    ended = next_obs[:, 0] > 1
    metrics = model.fit(obs, action, reward, next_obs, ended, generator=generator())
    assert model.epoch.item() == pytest.approx(1) and metrics["model/epochs"] == 9
    held = model.holdout_rows
    with torch.no_grad():
        logit = model._terminal_logit(model._x(obs, action), model._after(next_obs, 200))[held]
    loss = -torch.distributions.Bernoulli(logits=logit).log_prob(ended[held].float()).mean()
    assert loss.item() == pytest.approx(metrics["model/terminal_loss"], rel=1e-3)
