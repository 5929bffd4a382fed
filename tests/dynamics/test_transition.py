"""Linear systems with known noise, and cases that are built so that one mechanism decides the result."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from driftrl.dynamics.ensemble import Normalizer
from driftrl.dynamics.fields import Time, VelocityField
from driftrl.dynamics.flow_transition import FlowTransition
from driftrl.dynamics.langevin_transition import LangevinTransition
from driftrl.dynamics.transition import TRANSITIONS, GaussianTransition
from driftrl.dynamics.transition_base import TransitionModel, TransitionSettings

MATRIX = torch.tensor([[0.9, 0.1], [-0.2, 0.8]])
NOISE = torch.tensor([0.3, 0.1])
REWARD_NOISE = 0.2


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear_system(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """obs, action, reward and next_obs of ``s' = A s + a (1, 1) + noise``, ``r = s_0 - a + noise``."""
    rng = generator(seed)
    obs = torch.randn(n, 2, generator=rng)
    action = 2 * torch.rand(n, 1, generator=rng) - 1
    next_obs = obs @ MATRIX.T + action + NOISE * torch.randn(n, 2, generator=rng)
    reward = obs[:, 0] - action[:, 0] + REWARD_NOISE * torch.randn(n, generator=rng)
    return obs, action, reward, next_obs


def gaussian(
    members: int = 1, elites: int = 1, probabilistic: bool = True, seed: int = 0, **settings: float
) -> GaussianTransition:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GaussianTransition(
            2,
            1,
            TransitionSettings(**settings),  # type: ignore[arg-type]
            hidden=(32, 32),
            members=members,
            elites=elites,
            probabilistic=probabilistic,
        )


def build(kind: str, seed: int = 0, obs_dim: int = 2, **settings: float) -> TransitionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TRANSITIONS[kind](obs_dim, 1, TransitionSettings(**settings), hidden=(32, 32))  # type: ignore[arg-type]


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

    def _sample(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return self._predict(x[None])[0]

    def _log_density(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError


def still_data(n: int = 20) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Targets are zero: the error is the prediction."""
    obs = torch.randn(n, 2, generator=generator())
    return obs, torch.zeros(n, 1), torch.zeros(n), obs


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


def test_normalizer_standardises_and_leaves_constant_columns_in_their_unit() -> None:
    normalizer = Normalizer(3)
    data = torch.stack([torch.tensor([1.0, 3.0]), torch.tensor([7.0, 7.0]), torch.tensor([1e-4, 3e-4])], 1)
    assert torch.equal(normalizer(data), data)
    normalizer.fit(data)
    torch.testing.assert_close(normalizer(data), torch.tensor([[-1.0, 0.0, -1.0], [1.0, 0.0, 1.0]]))
    torch.testing.assert_close(normalizer.inverse(normalizer(data)), data)


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


@pytest.mark.parametrize("kind", ["ensemble", *TRANSITIONS])
def test_state_dict_holds_all_that_sampling_and_the_next_fit_need(kind: str) -> None:
    make: Callable[[int], TransitionModel] = (
        partial(gaussian, 3, 2, True) if kind == "ensemble" else partial(build, kind)
    )
    model, data = make(0), linear_system(600)
    model.fit(*(part[:400] for part in data), generator=generator(), max_epochs=3)
    twin = make(5)
    twin.load_state_dict(model.state_dict())
    twin.optimizer.load_state_dict(copy.deepcopy(model.optimizer.state_dict()))
    for ours, theirs in zip(
        model.sample(data[0], data[1], generator(3)), twin.sample(data[0], data[1], generator(3)), strict=True
    ):
        assert torch.equal(ours, theirs)
    metrics = [m.fit(*data, generator=generator(4), max_epochs=3) for m in (model, twin)]
    assert metrics[0] == metrics[1] and same(model, twin)


@pytest.mark.parametrize("kind", TRANSITIONS)
def test_results_depend_on_the_generator_alone(kind: str) -> None:
    models = [build(kind) for _ in range(3)]
    state = torch.get_rng_state()
    metrics = []
    for model, seed in zip(models, (0, 0, 1), strict=True):
        rng = generator(seed)
        metrics.append(model.fit(*linear_system(300), generator=rng, max_epochs=2))
        metrics[-1]["sample"] = model.sample(torch.zeros(4, 2), torch.zeros(4, 1), rng)[1].sum().item()
    assert torch.equal(torch.get_rng_state(), state)
    assert metrics[0] == metrics[1] != metrics[2]
    assert same(models[0], models[1]) and not same(models[0], models[2])


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


def test_deterministic_model_has_neither_noise_nor_density() -> None:
    model, (obs, action, reward, next_obs) = gaussian(probabilistic=False), linear_system(300)
    model.fit(obs, action, reward, next_obs, generator=generator(), max_epochs=2)
    for sampled, predicted in zip(model.sample(obs, action, generator()), model.predict(obs, action), strict=True):
        torch.testing.assert_close(sampled, predicted)
    with pytest.raises(ValueError, match="no density; build it with probabilistic=True"):
        model.log_prob(obs, action, reward, next_obs)


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


def two_outcomes(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One observation that jumps by -1 (30 %) or by 1 (70 %), with noise 0.1 in jump and reward."""
    rng = generator(seed)
    obs, action = torch.randn(n, 1, generator=rng), 2 * torch.rand(n, 1, generator=rng) - 1
    jump = torch.where(torch.rand(n, 1, generator=rng) < 0.3, -1.0, 1.0)
    next_obs = obs + jump + 0.1 * torch.randn(n, 1, generator=rng)
    return obs, action, action[:, 0] + 0.1 * torch.randn(n, generator=rng), next_obs


@pytest.mark.parametrize("kind", TRANSITIONS)
def test_flow_and_sde_find_both_outcomes_where_a_gaussian_lies_between(kind: str) -> None:
    model = build(kind, obs_dim=1, min_gain=1e-3, learning_rate=3e-3, patience=20)
    model.fit(*two_outcomes(4000), generator=generator(1), max_epochs=100)
    obs, action, reward, next_obs = two_outcomes(1000, seed=9)
    sampled = model.sample(obs.repeat(5, 1), action.repeat(5, 1), generator(2))[0] - obs.repeat(5, 1)
    down, between = sampled[sampled < 0], (sampled.abs() < 0.5).float().mean().item()
    assert sampled.mean().item() == pytest.approx(0.4, abs=0.1)
    entropy = 2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.1)) - 0.3 * math.log(0.3) - 0.7 * math.log(0.7)
    log_prob = model.log_prob(obs, action, reward, next_obs).mean().item()
    if kind == "gaussian":
        assert between > 0.3 and log_prob < -entropy - 1
    else:
        assert between < 0.1 and log_prob > -entropy - 0.4
        assert len(down) / len(sampled) == pytest.approx(0.3, abs=0.06)
        assert down.median().item() == pytest.approx(-1, abs=0.1)
        assert sampled[sampled > 0].median().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("kind", TRANSITIONS)
def test_density_integrates_to_one_in_the_units_of_the_data(kind: str) -> None:
    model = build(kind, obs_dim=1)
    obs, action, reward, next_obs = two_outcomes(500)
    model.fit(10 * obs, action, 0.1 * reward, 10 * next_obs, generator=generator(1), max_epochs=5)
    reward, move = torch.meshgrid(torch.linspace(-1, 1, 101), torch.linspace(-80, 80, 101), indexing="ij")
    at = torch.tensor([[3.0]]).expand(reward.numel(), 1)
    with torch.no_grad():
        log_prob = model.log_prob(at, 0 * at, reward.flatten(), at + move.reshape(-1, 1))
    assert log_prob.exp().sum().item() * (2 / 100) * (160 / 100) == pytest.approx(1, rel=0.03)


def test_flow_predicts_without_noise_and_follows_a_linear_system() -> None:
    model = build("flow", min_gain=1e-3, learning_rate=3e-3, patience=10)
    model.fit(*linear_system(4000), generator=generator(1), max_epochs=100)
    obs, action, _, _ = linear_system(1000, seed=3)
    mean = obs @ MATRIX.T + action
    assert (model.predict(obs, action)[0] - mean).square().mean().sqrt() < 0.1
    next_obs, _ = model.sample(obs, action, generator(2))
    torch.testing.assert_close((next_obs - mean).std(0), NOISE, rtol=0.25, atol=0)


def test_jacobian_penalty_flattens_the_field_and_weighs_more_where_it_is_flat() -> None:
    rng = generator()
    obs = torch.randn(2000, 1, generator=rng)
    noise = torch.where(obs < 0, 1.0, 0.1) * torch.randn(2000, 2, generator=rng)  # unit noise: the flow rests
    norms = []
    for weight in (0.0, 0.3):
        torch.manual_seed(0)
        model = FlowTransition(1, 1, hidden=(32, 32), jacobian_weight=weight)
        model.fit(obs, 0 * obs, noise[:, 0], obs + noise[:, 1:], generator=generator(1), max_epochs=40)
        x = model._x(obs, 0 * obs)
        norms.append(model.field.jacobian(0.9, torch.zeros(2000, 2), x)[1].square().mean().item())
    assert norms[1] < 0.7 * norms[0]
    assert model.log_precision is not None
    precision = model.log_precision(x[None])[0, :, 0]
    assert precision[obs[:, 0] < -0.5].mean() > precision[obs[:, 0] > 0.5].mean() + 0.2


class Decay(VelocityField):
    """``v = rate (target(cond) - x)``: with it the SDE's chain is Gaussian."""

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        assert cond is not None
        return 0.8 * (0.5 * cond[:, :1] - x)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_langevin_chain_of_a_linear_drift_has_its_closed_form(steps: int, residual: bool) -> None:
    model = LangevinTransition(2, 1, TransitionSettings(residual=residual), hidden=(8,), steps=steps, bridges=4000)
    data = linear_system(200)
    model.fit(*data, generator=generator(), max_epochs=1)
    model.field = Decay(3, 3)  # type: ignore[assignment]
    with torch.no_grad():
        model.log_scale.copy_(torch.linspace(-1, 0.2, 3 * steps).view(1, steps, 3))
    obs, action, reward, next_obs = (part[:20] for part in data)
    h, scale = 1 / steps, model.log_scale[0].detach().exp()
    y = model.targets(torch.cat([torch.zeros(20, 1), torch.zeros(20, 2) if residual else obs], 1))
    var = torch.zeros(3)
    for k in range(steps):  # the moments of y' = y + 0.8 h (m - y) + s sqrt(h) noise
        y, var = y + 0.8 * h * (0.5 * model._x(obs, action)[:, :1] - y), (1 - 0.8 * h) ** 2 * var + scale[k] ** 2 * h
    normal = torch.distributions.Normal(
        model.targets.inverse(y) + (torch.cat([torch.zeros(20, 1), obs], 1) if residual else 0),
        var.sqrt() * model.targets.scale,
    )
    log_prob = model.log_prob(obs, action, reward, next_obs)
    expected = normal.log_prob(torch.cat([reward[:, None], next_obs], 1)).sum(1)
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-4 if steps == 1 else 0.3)
    torch.testing.assert_close(log_prob.mean(), expected.mean(), rtol=0, atol=1e-4 if steps == 1 else 0.03)

    model.low.fill_(-math.inf)
    model.high.fill_(math.inf)
    sampled, rewards = model.sample(obs[:1].expand(20000, -1), action[:1].expand(20000, -1), generator(1))
    outcome = torch.cat([rewards[:, None], sampled], 1)
    torch.testing.assert_close(outcome.std(0), normal.stddev[0], rtol=0.03, atol=0)
    torch.testing.assert_close(outcome.mean(0), normal.mean[0], rtol=0, atol=0.04 * normal.stddev.max().item())


def test_langevin_recovers_mean_and_variance_of_a_linear_system() -> None:
    model = build("langevin", learning_rate=3e-3)
    model.fit(*linear_system(4000), generator=generator(1), max_epochs=80)
    obs, action, _, _ = linear_system(2000, seed=3)
    mean = obs @ MATRIX.T + action
    assert (model.predict(obs, action)[0] - mean).square().mean().sqrt() < 0.1
    next_obs, reward = model.sample(obs, action, generator(2))
    torch.testing.assert_close((next_obs - mean).std(0), NOISE, rtol=0.15, atol=0)
    assert (reward - obs[:, 0] + action[:, 0]).std().item() == pytest.approx(REWARD_NOISE, rel=0.15)


@pytest.mark.parametrize("kind", TRANSITIONS)
def test_density_of_a_row_does_not_depend_on_its_batch(kind: str) -> None:
    model, data = build(kind), linear_system(50)
    model.fit(*data, generator=generator(), max_epochs=1)
    alone = model.log_prob(*(part[7:8] for part in data))
    torch.testing.assert_close(model.log_prob(*data)[7:8], alone, rtol=1e-4, atol=1e-4)


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


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="jacobian_weight must be at least 0, got -1"):
        FlowTransition(2, 1, jacobian_weight=-1)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        FlowTransition(2, 1, steps=0)
    with pytest.raises(ValueError, match="steps must be at least 1, got -1"):
        FlowTransition(2, 1, likelihood_steps=-1)
    with pytest.raises(ValueError, match="solver must be one of"):
        FlowTransition(2, 1, solver="magic")
    with pytest.raises(ValueError, match="steps and bridges must be at least 1, got 0 and 32"):
        LangevinTransition(2, 1, steps=0)


@pytest.mark.parametrize("kind", TRANSITIONS)
def test_loss_is_traced_as_one_graph(kind: str) -> None:
    model = build(kind)
    x, y = torch.randn(1, 16, 3, generator=generator()), torch.randn(1, 16, 3, generator=generator(1))
    noise = model._noise(x, generator())
    compiled = torch.compile(model._loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, y, noise), model._loss(x, y, noise))
