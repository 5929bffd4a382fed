"""The latent model against dense Gaussian algebra, and its steps against the exact solution of a linear SDE."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.linalg import expm, solve_continuous_lyapunov
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from driftrl.dynamics.fields import MLPField
from driftrl.dynamics.langevin_flow import KineticTransition, LangevinFlow, OscillatorField

F64 = torch.float64
LENGTH, OBS, ACTION, LATENT = 5, 2, 1, 2


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def model(seed: int = 0, **options: Any) -> LangevinFlow:
    """A small model in float64 whose weights are all at work."""
    torch.manual_seed(seed)
    made = LangevinFlow(OBS, ACTION, LATENT, hidden=6, **options).double()
    for i, parameter in enumerate(made.parameters()):
        parameter.data += 0.1 * rand(*parameter.shape, seed=i)
    return made


def sequence(rows: int = 3, length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Observations, actions, rewards and noise."""
    return (
        rand(length, rows, OBS),
        rand(length - 1, rows, ACTION, seed=1),
        rand(length - 1, rows, seed=2),
        rand(length + 1, rows, LATENT, seed=3),
    )


def linear_model() -> LangevinFlow:
    """One whose observations are linear in its noise, and whose inference does not depend on where the state is."""
    made = model()
    made.decoder = nn.Sequential(nn.Linear(2 * LATENT, OBS)).double()
    made.reward_head = nn.Sequential(nn.Linear(2 * LATENT + ACTION, 1)).double()
    last = made.correction[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    return made


def test_bound_is_the_exact_likelihood_less_the_divergence_from_the_exact_posterior() -> None:
    """log p(y) - KL(q, p(z | y)), with the joint Gaussian of noise z and data y written out as matrices."""
    made = linear_model()
    obs, action, reward, _ = sequence(rows=1)
    size = (LENGTH + 1) * LATENT

    def data_of(z: Tensor) -> Tensor:
        """What the prior shows for its noise, [LENGTH * OBS + LENGTH - 1]; observing nothing else, q is the prior."""
        x, p, *draws = z.view(LENGTH + 1, 1, LATENT).unbind()
        states = [torch.cat([x, p], 1)]
        for t, draw in enumerate(draws):
            x, p = made.transition(x, p, draw[None], action[t])
            states.append(torch.cat([x, p], 1))
        state = torch.cat(states)
        paid = made.reward_head(torch.cat([state[1:], action[:, 0]], 1))
        return torch.cat([made.decoder(state).flatten(), paid.flatten()])

    with torch.no_grad():
        offset = data_of(torch.zeros(size, dtype=F64))
        slope = torch.stack([data_of(unit) - offset for unit in torch.eye(size, dtype=F64)], 1)
        variance = torch.cat([made.log_std[:-1].repeat(LENGTH), made.log_std[-1:].repeat(LENGTH - 1)]).mul(2).exp()
        data = torch.cat([obs.flatten(), reward.flatten()])
        log_evidence = MultivariateNormal(offset, slope @ slope.mT + variance.diag()).log_prob(data)
        covariance = torch.linalg.inv(torch.eye(size, dtype=F64) + slope.mT @ (slope / variance[:, None]))
        posterior = MultivariateNormal(covariance @ slope.mT @ ((data - offset) / variance), covariance)

        # q, read off the model: its first Gaussian and the constant ones.
        memory = made.encoder(torch.cat([obs[0], torch.zeros(1, ACTION, dtype=F64)], 1))
        first, rest = made.start(memory)[0], list(made.correction.parameters())[-1]
        means = torch.cat([first[: 2 * LATENT], rest[:LATENT].repeat(LENGTH - 1)])
        spreads = torch.cat([first[2 * LATENT :], rest[LATENT:].repeat(LENGTH - 1)])
        stds = nn.functional.softplus(spreads) + 1e-3
        inferred = MultivariateNormal(means, stds.square().diag())
        expected = log_evidence - kl_divergence(inferred, posterior)

        # The bound is quadratic in its noise: the mean over +-sqrt(size) times every axis is its expectation.
        corners = math.sqrt(size) * torch.cat([torch.eye(size, dtype=F64), -torch.eye(size, dtype=F64)])
        rows = len(corners)
        noise = corners.T.reshape(LENGTH + 1, LATENT, rows).transpose(1, 2)
        repeated = obs.expand(-1, rows, -1), action.expand(-1, rows, -1), reward.expand(-1, rows)
        found = made.elbo(*repeated, noise)
    assert found.kl.std() < 1e-12
    assert -found.loss().item() == pytest.approx(expected.item(), abs=1e-9)
    assert found.loss(0.1).item() == pytest.approx(-expected.item() - 0.9 * found.kl[0].item(), abs=1e-9)
    standard = MultivariateNormal(torch.zeros(size, dtype=F64), torch.eye(size, dtype=F64))
    assert found.kl[0].item() == pytest.approx(kl_divergence(inferred, standard).item(), abs=1e-9)


def test_divergence_is_the_mean_log_ratio_along_paths_where_inference_looks_at_the_state() -> None:
    made, rows = model(), 20_000
    obs, action, _, _ = (each[:, :1].expand(-1, rows, *each.shape[2:]) for each in sequence())
    noise = rand(LENGTH + 1, rows, LATENT, seed=9)
    drawn: list[Tensor] = []
    handle = made.transition.register_forward_hook(lambda module, inputs, output: drawn.append(inputs[2][0]))
    with torch.no_grad():
        path = made.path(obs, action, noise)
    handle.remove()
    with torch.no_grad():
        memory = made.encoder(torch.cat([obs[0], torch.zeros_like(action[0])], 1))
        log_ratio = log_ratio_of(made.start(memory), torch.cat([path.position[0], path.velocity[0]], 1))
        for t, z in enumerate(drawn):
            memory = made.encoder(torch.cat([obs[t + 1], action[t]], 1), memory)
            state = torch.cat([memory, path.position[t], path.velocity[t]], 1)
            log_ratio = log_ratio + log_ratio_of(made.correction(state), z)
    assert path.kl.std() > 0.01
    assert abs(log_ratio.mean() - path.kl.mean()) < 4 * (log_ratio - path.kl).std() / math.sqrt(rows)


def log_ratio_of(raw: Tensor, z: Tensor) -> Tensor:
    """Log density of z, summed, in the Gaussian that a network's output means, less that in the standard one."""
    mean, spread = raw.chunk(2, 1)
    inferred = Normal(mean, nn.functional.softplus(spread) + 1e-3)
    log_ratio: Tensor = (inferred.log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum(1)
    return log_ratio


def test_steps_tend_to_the_exact_law_of_a_linear_sde_with_order_two() -> None:
    """Mean exp(A t) z and covariance C - exp(A t) C exp(A t)^T with A C + C A^T = -B B^T."""
    dim, time = 2, 1.2
    force = OscillatorField(dim).double()
    for seed, parameter in enumerate(force.parameters()):
        parameter.data = 0.3 * rand(*parameter.shape, seed=seed)
    hessian = -force.jacobian(0.0, torch.zeros(1, dim, dtype=F64))[1][0].detach()
    friction = torch.tensor([0.6, 0.6], dtype=F64)
    zero, unit = torch.zeros(dim, dim, dtype=F64), torch.eye(dim, dtype=F64)
    drift = torch.cat([torch.cat([zero, unit], 1), torch.cat([-hessian, -friction.diag()], 1)])
    spread = torch.cat([zero, (2 * friction).sqrt().diag()])
    flow = torch.as_tensor(expm((drift * time).numpy()))
    stationary = torch.as_tensor(solve_continuous_lyapunov(drift.numpy(), -(spread @ spread.mT).numpy()))
    covariance = stationary - flow @ stationary @ flow.mT
    wrong = []
    for steps in (20, 40):
        transition = KineticTransition(force, step=time / steps, friction=0.6).double()
        with torch.no_grad():
            state, none = torch.eye(2 * dim, dtype=F64), torch.zeros(steps, 2 * dim, dim, dtype=F64)
            mean = torch.cat(transition(state[:, :dim], state[:, dim:], none), 1).mT
            rows = steps * dim
            draws = torch.eye(rows, dtype=F64).view(rows, steps, dim).transpose(0, 1)
            at = torch.zeros(rows, dim, dtype=F64)
            reached = torch.cat(transition(at, at, draws), 1)
        wrong.append([(mean - flow).abs().max().item(), (reached.mT @ reached - covariance).abs().max().item()])
    for coarse, fine in zip(*wrong, strict=True):
        assert coarse / fine == pytest.approx(4, rel=0.1)
        assert fine < 1e-2


def test_what_is_not_observed_follows_the_prior_and_does_not_diverge() -> None:
    made, (obs, action, reward, noise) = model(), sequence()
    path = made.path(obs, action, noise, observed=2)
    x, p = path.position[1], path.velocity[1]
    for t in range(1, LENGTH - 1):
        x, p = made.transition(x, p, noise[t + 2][None], action[t])
    torch.testing.assert_close((x, p), (path.position[-1], path.velocity[-1]))
    torch.testing.assert_close(made.path(obs[:2], action[:1], noise[:3]).kl, path.kl)
    other = obs.clone()
    other[2:] += 1  # what comes after is not looked at
    torch.testing.assert_close(made.path(other, action, noise, observed=2), path)
    assert not torch.allclose(made.path(other, action, noise).position, path.position)
    assert (made.elbo(obs, action, reward, noise).kl > path.kl).all()


def test_predictions_are_those_of_the_path_after_the_history() -> None:
    made, (obs, action, _, noise) = model(), sequence()
    seen, paid = made.predict(obs[:3], action, noise)
    assert (seen.shape, paid.shape) == ((2, 3, OBS), (2, 3))
    expected = made.decode(made.path(obs, action, noise, observed=3), action)
    torch.testing.assert_close((seen, paid), (expected[0][3:], expected[1][2:]))
    mean = made.predict(obs[:3], action)
    torch.testing.assert_close(mean, made.predict(obs[:3], action, torch.zeros_like(noise)))
    # The action decides what follows: the prior is driven by it.
    pushed = action.clone()
    pushed[2] += 1
    assert not torch.allclose(made.predict(obs[:3], pushed)[0][0], mean[0][0])


def test_hidden_velocity_is_inferred_and_carried_on() -> None:
    """Swings of unknown phase, of which the position is shown 6 times: predicted 10 steps ahead."""
    torch.manual_seed(0)
    rows, length, history = 128, 16, 6
    phase, frequency = torch.rand(1, rows) * 2 * math.pi, 0.4
    obs = 1.4 * torch.cos(phase + frequency * torch.arange(length)[:, None])[:, :, None]
    action, reward = torch.zeros(length - 1, rows, 1), torch.zeros(length - 1, rows)
    made = LangevinFlow(1, 1, 4, hidden=16)
    optimizer = torch.optim.Adam(made.parameters(), 1e-2)
    for _ in range(250):
        loss = made.elbo(obs, action, reward, torch.randn(length + 1, rows, 4), history).loss(0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        seen, _ = made.predict(obs[:history], action)
    error = (seen - obs[history:]).square().mean(1).sqrt()[-1]
    assert error < 0.35  # the standard deviation of what is predicted is 1


def test_another_force_takes_the_place_of_the_oscillators() -> None:
    made = model(force=MLPField(LATENT, ACTION, hidden=(8,)))
    obs, action, reward, noise = sequence()
    loss = made.elbo(obs, action, reward, noise).loss()
    loss.backward()
    assert all(parameter.grad is not None for parameter in made.transition.force.parameters())


def test_gradients_against_finite_differences() -> None:
    made, (obs, action, reward, noise) = model(), sequence(rows=1, length=3)
    leaves = [each.requires_grad_() for each in (obs, action, reward, noise)]

    def loss(*values: Tensor) -> Tensor:
        return made.elbo(values[0], values[1], values[2], values[3], observed=2).loss(0.3)

    assert torch.autograd.gradcheck(loss, (*leaves, *made.parameters()))


def test_row_alone_equals_row_in_a_batch() -> None:
    made, (obs, action, reward, noise) = model(), sequence()
    alone = made.elbo(obs[:, 1:2], action[:, 1:2], reward[:, 1:2], noise[:, 1:2])
    for one, among in zip(alone, made.elbo(obs, action, reward, noise), strict=True):
        torch.testing.assert_close(one, among[1:2], rtol=0, atol=1e-12)


def test_float32_follows_float64_without_global_randomness() -> None:
    made, (obs, action, reward, noise) = model(), sequence()
    double, state = made.elbo(obs, action, reward, noise), torch.get_rng_state()
    single = made.float().elbo(obs.float(), action.float(), reward.float(), noise.float())
    assert single.kl.dtype == torch.float32
    for one, other in zip(single, double, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # raised inside torch when inductor is imported
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(backend: str) -> None:
    made, values = model(), sequence()
    torch.compiler.reset()
    compiled = torch.compile(made.elbo, fullgraph=True, backend=backend)
    for one, other in zip(compiled(*values, observed=3), made.elbo(*values, observed=3), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.gpu
def test_results_on_a_gpu_are_those_on_the_cpu() -> None:
    made, (obs, action, reward, noise) = model(), sequence()
    here = made.elbo(obs, action, reward, noise)
    there = made.cuda().elbo(obs.cuda(), action.cuda(), reward.cuda(), noise.cuda())
    for one, other in zip(there, here, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=1e-10)


def test_bad_arguments_are_refused() -> None:
    made, (obs, action, _, noise) = model(), sequence()
    for name in ("obs_dim", "action_dim", "latent_dim", "hidden"):
        sizes: dict[str, Any] = {"obs_dim": 2, "action_dim": 1, name: 0}
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            LangevinFlow(**sizes)
    with pytest.raises(ValueError, match="force must have dim 16 and cond_dim 1, got 4 and 1; build it"):
        LangevinFlow(2, 1, force=OscillatorField(4, 1))
    with pytest.raises(ValueError, match=r"friction must be positive, got -1\.0"):
        LangevinFlow(2, 1, friction=-1.0)
    with pytest.raises(ValueError, match=r"step must be positive, got 0\.0"):
        LangevinFlow(2, 1, step=0.0)
    with pytest.raises(ValueError, match=r"reward must have shape \[4, 3\], as action's, got \[5, 3\]"):
        made.elbo(obs, action, rand(5, 3), noise)
    with pytest.raises(ValueError, match=r"action must have shape \[L - 1, B, 1\], L >= 2, got \[4, 3, 2\]"):
        made.path(obs, rand(4, 3, 2), noise)
    for bad in (obs[0], obs[:, :2], rand(6, 3, OBS), rand(5, 3, 3)):
        with pytest.raises(ValueError, match=r"obs must have shape \[5, 3, 2\], got "):
            made.path(bad, action, noise)
    with pytest.raises(ValueError, match=r"noise must have shape \[6, 3, 2\], got \[5, 3, 2\]: two for the start"):
        made.path(obs, action, noise[1:])
    for observed in (0, 6):
        with pytest.raises(ValueError, match=f"observed must be 1 to 5, .* got {observed}"):
            made.path(obs, action, noise, observed)
    with pytest.raises(ValueError, match=r"H = 5 and K at least 1, got \[4, 3, 1\]; give the actions that follow"):
        made.predict(obs, action)
