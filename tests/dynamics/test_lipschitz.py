import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from driftrl.dynamics.fields import MLPField
from driftrl.dynamics.lipschitz import adversarial_states, spectral_norms
from driftrl.dynamics.special_fields import AffineField

F64 = torch.float64


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def mlp(hidden: tuple[int, ...] = (8, 8)) -> MLPField:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLPField(3, 2, hidden, last_layer_scale=1.0).double()


class BatchedLinear(nn.Module):
    """Three critics at once: a weight [3, out, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([rand(5, 9), 0.01 * rand(5, 9, seed=1), torch.zeros(5, 9, dtype=F64)]))
        self.norm = nn.LayerNorm(5)


def test_spectral_norms_are_those_of_a_singular_value_decomposition() -> None:
    network = nn.Sequential(nn.Linear(4, 9), nn.LayerNorm(9), nn.ReLU(), nn.Linear(9, 2), BatchedLinear()).double()
    norms = spectral_norms(network)
    assert set(norms) == {"0.weight", "3.weight", "4.weight"}
    for name, norm in norms.items():
        torch.testing.assert_close(norm, torch.linalg.matrix_norm(network.get_parameter(name), 2), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("activation", "slope"), [("tanh", 1.0), ("mish", 1.09), ("silu", 1.1)])
def test_product_of_the_norms_bounds_the_jacobian(activation: str, slope: float) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        field = MLPField(3, 2, (16, 16), activation, last_layer_scale=1.0).double()
    x, cond = 3 * rand(500, 3), rand(500, 2)
    largest = torch.linalg.matrix_norm(field.jacobian(0.3, x, cond)[1], 2).max().item()
    bound = math.prod(norm.item() for norm in spectral_norms(field).values()) * slope**2
    assert 0.1 * bound < largest <= bound


LAYERS: dict[str, Callable[[nn.Linear], object]] = {
    "pruned": lambda layer: prune.custom_from_mask(layer, "weight", torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 0, 1]])),
    "weight norm": parametrizations.weight_norm,
    "weight norm by hook": nn.utils.weight_norm,
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer).eval(),
    "spectral norm by hook": lambda layer: nn.utils.spectral_norm(layer).eval(),
}


@pytest.mark.parametrize("change", LAYERS)
@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
def test_norm_of_a_changed_layer_is_that_of_what_it_does(change: str) -> None:
    layer = nn.Linear(3, 3, bias=False).double()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        layer.weight.copy_(rand(3, 3))
        LAYERS[change](layer)
        for parameter in layer.parameters():
            parameter.mul_(2)
    norms = spectral_norms(nn.Sequential(nn.ReLU(), layer))
    assert set(norms) == {"1.weight"}
    applied = layer(torch.eye(3, dtype=F64))
    torch.testing.assert_close(norms["1.weight"], torch.linalg.matrix_norm(applied, 2), rtol=1e-12, atol=0)
    norms["1.weight"].backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


def test_conditioning_of_an_affine_field_does_not_count() -> None:
    field = AffineField(2, 1)
    with torch.no_grad():
        field.output.weight.copy_(torch.tensor([[0.5, 0.0, 10.0], [0.0, 0.25, 10.0]]))
    norms = spectral_norms(nn.Sequential(field))
    assert {name: norm.item() for name, norm in norms.items()} == {"0.output.weight": pytest.approx(0.5)}


def test_norms_can_be_penalised() -> None:
    layer = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([1.0, -3.0, 2.0])))
    spectral_norms(layer)["weight"].backward()
    torch.testing.assert_close(layer.weight.grad, torch.diag(torch.tensor([0.0, -1.0, 0.0], dtype=F64)))


SCALES = torch.tensor([0.1, 1.0, 3.0], dtype=F64)


WAYS: dict[str, dict[str, object]] = {
    "fgsm": {},
    "fgsm from a random start": {"random_start": True},
    "pgd": {"steps": 8, "step_size": 0.25},
    "langevin": {"steps": 200, "step_size": 0.005, "temperature": 1.0},
    "langevin from a random start": {"steps": 20, "step_size": 3.0, "temperature": 5.0, "random_start": True},
}


def attack(loss: object, x: Tensor, way: str, radius: float | Tensor, seed: int = 0) -> Tensor:
    options, generator = dict(WAYS[way]), torch.Generator().manual_seed(seed)
    if options.pop("random_start", False):
        options["start"] = torch.empty_like(x).uniform_(-1, 1, generator=generator)
    if "temperature" in options:
        options["noise"] = torch.randn(options["steps"], *x.shape, dtype=x.dtype, generator=generator)  # type: ignore[call-overload]
    return adversarial_states(loss, x, radius=radius, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("way", WAYS)
def test_adversary_stays_in_its_ball_and_raises_the_loss(way: str, dtype: torch.dtype) -> None:
    field, cond = mlp().to(dtype), rand(64, 2).to(dtype)
    x, radius = rand(64, 3).to(dtype), 0.2 * SCALES.to(dtype)

    def loss(states: Tensor) -> Tensor:
        return 30 * field(0.3, states, cond).square().sum(-1)

    there = attack(loss, x, way, radius)
    assert there.dtype == dtype and not there.requires_grad
    assert ((there - x).abs() <= radius + 8 * torch.finfo(dtype).eps).all()  # rounding of x + radius u
    assert ((there - x).abs() > 0.5 * radius).any(0).all()
    if way != "langevin from a random start":  # that one is mostly noise
        assert loss(there).mean() > 1.2 * loss(x).mean()
    assert all(p.grad is None for p in field.parameters())


@pytest.mark.parametrize("way", ["fgsm", "pgd"])
def test_sign_steps_reach_the_maximum_of_a_linear_loss(way: str) -> None:
    slope, x = torch.tensor([1.0, -2.0, 0.1], dtype=F64), rand(4, 3)
    torch.testing.assert_close(attack(lambda s: s @ slope, x, way, 0.2 * SCALES), x + 0.2 * SCALES * slope.sign())


def test_pgd_finds_a_maximum_inside_that_fgsm_leaps_over() -> None:
    x = torch.zeros(1, 2, dtype=F64)
    top = torch.tensor([0.25, -0.5], dtype=F64)

    def loss(states: Tensor) -> Tensor:
        return -(states - top).square().sum(-1)

    far = adversarial_states(loss, x, radius=1.0)
    near = adversarial_states(loss, x, radius=1.0, steps=40, step_size=0.05)
    assert (near - top).abs().max() <= 0.05 + 1e-12 < (far - top).abs().max()


def test_random_start_leaves_a_saddle() -> None:
    x = rand(64, 3)
    still = attack(lambda s: (s - x).square().sum(-1), x, "fgsm", 1.0)
    assert torch.equal(still, x)
    moved = attack(lambda s: (s - x).square().sum(-1), x, "fgsm from a random start", 1.0)
    torch.testing.assert_close((moved - x).abs(), torch.ones_like(x))


def test_langevin_ascent_samples_the_density_it_claims() -> None:
    # L = a u on [-1, 1] at temperature T: density ~ exp(a u / T), of mean coth(a/T) - T/a (Langevin's function) and
    # second moment 1 - 2 T/a mean. Reflection is of weak order 1/2 to 1 in the step: bias about 0.01 at h = 0.002.
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(4000, 1, dtype=F64)
    noise = torch.randn(800, 4000, 1, dtype=F64, generator=generator)
    u = adversarial_states(
        lambda s: 3 * s[:, 0], x, radius=1.0, steps=800, step_size=0.002, temperature=1.5, noise=noise.unbind()
    )
    ratio = 3 / 1.5
    mean = 1 / math.tanh(ratio) - 1 / ratio
    assert u.mean().item() == pytest.approx(mean, abs=0.01 + 4 * 0.5 / 4000**0.5)
    assert u.square().mean().item() == pytest.approx(1 - 2 * mean / ratio, abs=0.01 + 4 * 0.3 / 4000**0.5)


def test_adversary_is_repeatable_and_radius_may_differ_by_row() -> None:
    x, radius = rand(5, 3), torch.arange(5, dtype=F64)[:, None].expand(-1, 3)
    first, again, other = (attack(lambda s: s.sum(-1), x, "langevin", radius, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first[0], x[0])
    with torch.no_grad():
        assert torch.equal(attack(lambda s: s.sum(-1), x, "langevin", radius, 1), first)


@pytest.mark.parametrize("way", ["pgd", "langevin"])
def test_states_are_detached_whatever_needs_a_gradient(way: str) -> None:
    options, x = {"steps": 2, "step_size": 0.25}, rand(5, 3).requires_grad_()
    start, radius = torch.zeros_like(x).requires_grad_(), torch.ones(3, dtype=F64, requires_grad=True)
    if way == "langevin":
        options |= {"temperature": 1.0, "noise": [rand(5, 3, seed=k).requires_grad_() for k in range(2)]}  # type: ignore[dict-item]
    there = adversarial_states(lambda s: s.sum(-1), x, radius=radius, start=start, **options)  # type: ignore[arg-type]
    assert not there.requires_grad


def test_bad_arguments_of_the_adversary_are_refused() -> None:
    x = torch.zeros(4, 2)
    for options in ({"steps": 0}, {"step_size": 0.0}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match="steps must be at least 1, step_size positive, temperature positive or N"):
            adversarial_states(lambda s: s.sum(-1), x, radius=1.0, **options)
    with pytest.raises(ValueError, match=r"radius must be at least 0, got -0\.1"):
        adversarial_states(lambda s: s.sum(-1), x, radius=-0.1)
    for more, wanted in (({"noise": [x]}, 0), ({"temperature": 1.0, "steps": 2}, 2)):
        with pytest.raises(ValueError, match=f"noise must hold {wanted} tensors"):
            adversarial_states(lambda s: s.sum(-1), x, radius=1.0, **more)
    with pytest.raises(ValueError, match=r"start must have the shape of x, \[4, 2\], got \[2\]"):
        adversarial_states(lambda s: s.sum(-1), x, radius=1.0, start=x[0])
    with pytest.raises(ValueError, match=r"loss must return shape \[4\], got \[\]"):
        adversarial_states(lambda s: s.sum(), x, radius=1.0)
    with pytest.raises(ValueError, match=r"x must have shape \[B, D\], got \[2\]"):
        adversarial_states(lambda s: s, x[0], radius=1.0)


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    field, x, cond = mlp(), rand(9, 3), rand(9, 2)

    def results(field: MLPField, x: Tensor, cond: Tensor) -> list[Tensor]:
        def loss(states: Tensor) -> Tensor:
            return field(0.3, states, cond).square().sum(-1)

        return [
            adversarial_states(loss, x, radius=0.1, steps=4, step_size=0.5),
            *spectral_norms(field).values(),
        ]

    ours = results(field, x, cond)
    theirs = [result.cpu() for result in results(field.cuda(), x.cuda(), cond.cuda())]
    torch.testing.assert_close(theirs, ours, rtol=1e-8, atol=1e-10)
