import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from driftrl.dynamics.fields import MLPField, Time, VelocityField
from driftrl.dynamics.ode import odeint

ACTIVATIONS = {"silu": nn.SiLU(), "mish": nn.Mish(), "tanh": nn.Tanh(), "elu": nn.ELU(), "relu": nn.ReLU()}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(dim: int = 3, cond_dim: int = 2, **options: object) -> MLPField:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        field = MLPField(dim, cond_dim, **{"hidden": (7, 5), "last_layer_scale": 1.0, **options}).double()  # type: ignore[arg-type]
        for p in field.parameters():  # the zero biases would hide a forgotten bias
            if p.ndim == 1:
                nn.init.normal_(p)
    return field


class Swirl(VelocityField):
    """Only `forward`: exercises every default of the base class. Nonlinear, not symmetric, uses t and cond."""

    def __init__(self) -> None:
        super().__init__(2, 1)
        self.gain = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        self.check_state(t, x)
        self.check_cond(cond)
        assert cond is not None
        t = t.reshape(-1) if isinstance(t, Tensor) else t
        return torch.stack([self.gain * x[:, 0] ** 2 * x[:, 1] + t, x[:, 0] * cond[:, 0]], 1)


@pytest.mark.parametrize("hidden", [(6,), (7, 5), (4, 6, 5)])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("per_row_time", [False, True])
def test_mlp_jacobian_and_divergence_equal_autodiff_per_row(
    hidden: tuple[int, ...], activation: str, per_row_time: bool
) -> None:
    field = mlp(hidden=hidden, activation=activation)
    x, cond = rand(4, 3), rand(4, 2, seed=1)
    t: Time = torch.linspace(0, 1, 4, dtype=torch.float64) if per_row_time else 0.3
    v, jacobian = field.jacobian(t, x, cond)
    v_trace, trace = field.divergence(t, x, cond)
    velocity = field(t, x, cond)
    torch.testing.assert_close(v, velocity, rtol=0, atol=1e-14)
    torch.testing.assert_close(v_trace, velocity, rtol=0, atol=1e-14)
    for b in range(4):
        tb = t[b : b + 1] if isinstance(t, Tensor) else t
        expected = torch.func.jacrev(lambda y, tb=tb, b=b: field(tb, y[None], cond[b : b + 1])[0])(x[b])
        torch.testing.assert_close(jacobian[b], expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(trace[b], expected.trace(), rtol=0, atol=1e-13)


def test_mlp_is_an_mlp_on_the_concatenated_input() -> None:
    field = mlp(activation="mish")
    x, cond, t = rand(4, 3), rand(4, 2, seed=1), 0.37
    angles = torch.full((4, 1), t, dtype=torch.float64) * field.angular_frequencies[:, :8]
    first, second, output = nn.Linear(3 + 2 + 16, 7).double(), nn.Linear(7, 5).double(), nn.Linear(5, 3).double()
    assert field.cond_weight is not None
    with torch.no_grad():
        first.weight.copy_(torch.cat([field.x_weight, field.cond_weight, field.time_weight], 1))
        first.bias.copy_(field.bias)
    second.load_state_dict(field.layers[0].state_dict())
    output.load_state_dict(field.output.state_dict())
    reference = nn.Sequential(first, nn.Mish(), second, nn.Mish(), output)
    expected = reference(torch.cat([x, cond, angles.sin(), angles.cos()], 1))
    # The phase pi/2 of the cosines was rounded to float32 before the field became float64.
    torch.testing.assert_close(field(t, x, cond), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activation_slopes_far_from_zero_are_finite_and_exact(activation: str) -> None:
    field = MLPField(1, hidden=(1,), activation=activation, last_layer_scale=1.0).double()
    nn.init.ones_(field.x_weight)
    nn.init.zeros_(field.time_weight)
    nn.init.ones_(field.output.weight)
    x = torch.tensor([[-1000.0], [-30.0], [-1.0], [0.5], [30.0], [1000.0]], dtype=torch.float64, requires_grad=True)
    reference = ACTIVATIONS[activation](x)
    (expected,) = torch.autograd.grad(reference.sum(), x)
    _, trace = field.divergence(0.0, x)
    torch.testing.assert_close(trace, expected[:, 0], rtol=1e-12, atol=1e-14)
    (curvature,) = torch.autograd.grad(trace.sum(), x, materialize_grads=True, allow_unused=True)  # none of a ReLU's
    assert curvature.isfinite().all()


def test_divergence_has_right_gradients() -> None:
    field = mlp()
    t = torch.tensor([0.2, 0.8], dtype=torch.float64, requires_grad=True)
    inputs = (t, rand(2, 3).requires_grad_(), rand(2, 2, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(field.divergence, inputs)
    assert torch.autograd.gradcheck(field.jacobian, inputs)
    for p in field.parameters():
        p.grad = None
    field.divergence(*inputs)[1].sum().backward()
    closed = {name: p.grad.clone() for name, p in field.named_parameters() if p.grad is not None}
    for p in field.parameters():
        p.grad = None
    VelocityField.divergence_embedded(field, t, inputs[1], field.embed(inputs[2]))[1].sum().backward()
    assert {"x_weight", "cond_weight", "time_weight", "bias", "layers.0.weight", "output.weight"} <= set(closed)
    for name, p in field.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(closed[name], p.grad, rtol=0, atol=1e-12, msg=name)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(0, 3), st.integers(1, 6), st.integers(0, 2**31))
def test_trace_is_the_trace_of_the_jacobian_and_rows_are_independent(
    dim: int, cond_dim: int, batch: int, seed: int
) -> None:
    field = mlp(dim, cond_dim)
    x = rand(batch, dim, seed=seed)
    cond = rand(batch, cond_dim, seed=seed + 1) if cond_dim else None
    t = torch.rand(batch, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    _, trace = field.divergence(t, x, cond)
    _, jacobian = field.jacobian(t, x, cond)
    torch.testing.assert_close(trace, torch.einsum("bii->b", jacobian), rtol=0, atol=1e-12)
    alone, _ = field.divergence(t[:1], x[:1], None if cond is None else cond[:1])
    torch.testing.assert_close(alone, field(t, x, cond)[:1], rtol=0, atol=1e-12)


def test_embedding_is_equivalent_and_broadcasts() -> None:
    field = mlp()
    x, cond = rand(4, 3), rand(1, 2, seed=1)
    embedded = field.embed(cond)
    assert embedded.still.shape == (1, 7)
    torch.testing.assert_close(field.forward_embedded(0.3, x, embedded), field(0.3, x, cond.expand(4, -1)))
    ahead = field.embed(cond, (0.3, 0.7))  # of known times, of others and of one per row
    for t in (0.3, 0.7, 0.5, torch.full((4,), 0.3, dtype=torch.float64)):
        torch.testing.assert_close(field.forward_embedded(t, x, ahead), field(t, x, cond.expand(4, -1)))
    assert mlp(cond_dim=0).embed(None).still.shape == (1, 7)


def test_float_time_equals_tensor_time() -> None:
    field = mlp()
    x, cond = rand(4, 3), rand(4, 2)
    for t in (torch.full((4,), 0.3, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)):
        torch.testing.assert_close(field(0.3, x, cond), field(t, x, cond), rtol=0, atol=1e-14)


def test_default_field_starts_at_exactly_zero() -> None:
    field = MLPField(3, 2)
    assert not field.output.weight.any() and not field.output.bias.any()
    v, trace = field.divergence(0.5, torch.randn(4, 3), torch.randn(4, 2))
    assert not v.any() and not trace.any()


def test_initialisation_is_orthogonal_on_the_joint_first_layer() -> None:
    # orthonormal columns (first layer, taller than wide) or rows (the others), times the gain
    field = MLPField(40, 60, hidden=(200, 100), time_features=10, last_layer_scale=0.5).double()
    assert field.cond_weight is not None
    first = torch.cat([field.x_weight, field.cond_weight, field.time_weight], dim=1)
    second, output = field.layers[0].weight, field.output.weight
    for gram, scale in ((first.t() @ first, 2), (second @ second.t(), 2), (output @ output.t(), 0.25 * 2)):
        torch.testing.assert_close(gram, scale * torch.eye(len(gram)).double(), rtol=0, atol=1e-5)  # drawn in float32
    assert not field.bias.any()


def test_time_frequencies_depend_on_no_hidden_state() -> None:
    first = MLPField(2)
    state = torch.get_rng_state()
    MLPField(2)
    torch.set_rng_state(state)
    torch.set_default_dtype(torch.float64)
    try:
        second = MLPField(3)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(first.angular_frequencies, second.angular_frequencies.float(), rtol=0, atol=0)
    assert "angular_frequencies" in first.state_dict()


def test_state_dict_and_deepcopy_round_trip() -> None:
    field = mlp()
    clone = MLPField(3, 2, hidden=(7, 5)).double()
    clone.load_state_dict(field.state_dict())
    x, cond = rand(4, 3), rand(4, 2)
    assert torch.equal(clone(0.3, x, cond), field(0.3, x, cond))
    assert torch.equal(copy.deepcopy(field)(0.3, x, cond), field(0.3, x, cond))


CHANGES: dict[str, Callable[[nn.Linear], object]] = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "bias pruned": lambda layer: prune.random_unstructured(layer, "bias", 0.5),
    "hooked": lambda layer: layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
    "weight norm": parametrizations.weight_norm,
    "weight norm by hook": nn.utils.weight_norm,
    "spectral norm by hook": lambda layer: nn.utils.spectral_norm(layer).eval(),
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer).eval(),  # training moves its vectors
}


def layers(field: MLPField) -> list[nn.Linear]:
    return [*field.layers, field.output]


@pytest.mark.parametrize("hidden", [(7,), (7, 5), (7, 5, 4)])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
def test_changed_layers_count_in_velocity_divergence_and_jacobian(change: str, hidden: tuple[int, ...]) -> None:
    """Against the layers called one after the other and differentiated automatically, before and after a new weight."""
    field, x, cond, t = mlp(hidden=hidden), rand(4, 3), rand(4, 2, seed=1), 0.3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in layers(field):
            CHANGES[change](layer)

    def called(y: Tensor) -> Tensor:
        h = field.embed(cond, (t,)).by_time[t] + y @ field.x_weight.t()
        for layer in layers(field):
            h = layer(nn.functional.silu(h))
        return h

    for _ in range(2):
        rows = torch.func.jacrev(lambda y: called(y).sum(0))(x).movedim(1, 0)
        velocity = called(x)
        for ours in (field(t, x, cond), field.forward_embedded(t, x, field.embed(cond, (t,)))):
            torch.testing.assert_close(ours, velocity, rtol=1e-12, atol=1e-13)
        (v, jacobian), (v_trace, trace) = field.jacobian(t, x, cond), field.divergence(t, x, cond)
        torch.testing.assert_close(torch.stack([v, v_trace]), velocity.expand(2, -1, -1), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(jacobian, rows, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(trace, torch.einsum("bii->b", rows), rtol=1e-12, atol=1e-13)
        with torch.no_grad():
            for p in field.parameters():
                p.mul_(1.1)


@pytest.mark.parametrize("change", ["pruned", "weight norm", "spectral norm"])
@pytest.mark.parametrize("compiled", [False, True])
def test_training_through_a_solver_moves_a_changed_layer(change: str, compiled: bool) -> None:
    field, x, cond = mlp(hidden=(7, 5)), rand(4, 3), rand(4, 2, seed=1)
    layer = field.layers[0]
    if change == "spectral norm":
        parametrizations.spectral_norm(layer)  # in training mode
    else:
        CHANGES[change](layer)
    zeros = layer.weight == 0
    assert int(zeros.sum()) == (18 if change == "pruned" else 0)  # half of 7 * 5, rounded to an even number
    optimizer = torch.optim.SGD(field.parameters(), 0.1)
    torch.compiler.reset()
    solve = torch.compile(odeint, fullgraph=True, backend="eager") if compiled else odeint
    seen = [layer.weight.detach().clone()]
    for _ in range(2):
        optimizer.zero_grad()
        solve(field, x, steps=2, solver="euler", cond=cond).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            odeint(field, x, steps=1, cond=cond)  # has the layer compute its weight
        seen.append(layer.weight.detach().clone())
    for before, after in pairwise(seen):
        assert torch.equal(after == 0, zeros)
        assert ((after != before) | zeros).all()


@pytest.mark.parametrize("quantity", ["jacobian", "divergence"])
@pytest.mark.parametrize("compiled", [False, True])
def test_derivatives_of_a_pruned_field_train_what_is_left(quantity: str, compiled: bool) -> None:
    """The gradient is that of a field with the same zeros, without those on the zeros."""
    field, twin, x, cond = mlp(), mlp(), rand(4, 3), rand(4, 2, seed=1)
    layer = field.layers[0]
    prune.l1_unstructured(layer, "weight", 0.5)
    with torch.no_grad():
        twin.layers[0].weight.copy_(layer.weight)
    torch.compiler.reset()
    for each in (field, twin):
        derive = getattr(each, quantity)
        if compiled:
            derive = torch.compile(derive, fullgraph=True, backend="aot_eager")
        for _ in range(2):  # a second backward pass needs a weight computed anew
            derive(0.3, x, cond)[1].square().sum().backward()
    original = layer.get_parameter("weight_orig")
    assert twin.layers[0].weight.grad is not None
    torch.testing.assert_close(original.grad, twin.layers[0].weight.grad * layer.get_buffer("weight_mask"))
    torch.testing.assert_close(field.x_weight.grad, twin.x_weight.grad)


@pytest.mark.parametrize(
    ("change", "called"),
    [("none", False), ("weight norm", False), ("pruned", False), ("hooked", True), ("own forward", True)],
)
def test_only_layers_that_need_it_are_called_compiled_or_not(change: str, called: bool) -> None:
    field, cond = mlp(), rand(4, 2)
    if change == "own forward":
        field.output.forward = torch.sin  # type: ignore[method-assign]
    elif change != "none":
        CHANGES[change](field.layers[0])

    def is_called(cond: Tensor) -> Tensor:
        return torch.zeros(1) + (field.embed(cond).rest is None)

    torch.compiler.reset()
    for each in (is_called, torch.compile(is_called, fullgraph=True, backend="eager")):
        assert each(cond).item() == called


def test_a_replaced_layer_is_called() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 3 * super().forward(input)

    field, x, cond = mlp(), rand(4, 3), rand(4, 2, seed=1)
    before, scaled = field(0.3, x, cond), Scaled(5, 3).double()
    scaled.load_state_dict(field.output.state_dict())
    field.output = scaled
    for ours in (field(0.3, x, cond), field.forward_embedded(0.3, x, field.embed(cond))):
        torch.testing.assert_close(ours, 3 * before, rtol=0, atol=1e-13)


def test_default_derivatives_of_a_field_with_forward_only() -> None:
    field, x, cond = Swirl(), rand(5, 2), rand(5, 1, seed=1)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    v, jacobian = field.jacobian(t, x, cond)
    zero = torch.zeros(5, dtype=torch.float64)
    x0, x1 = x.unbind(1)
    expected = torch.stack([torch.stack([1.4 * x0 * x1, 0.7 * x0**2], 1), torch.stack([cond[:, 0], zero], 1)], 1)
    torch.testing.assert_close(jacobian, expected)
    v_trace, trace = field.divergence(t, x, cond)
    torch.testing.assert_close(trace, 1.4 * x0 * x1)
    assert torch.equal(v, field(t, x, cond)) and torch.equal(v_trace, v)
    (gradient,) = torch.autograd.grad(trace.sum(), field.gain)
    torch.testing.assert_close(gradient, (2 * x0 * x1).sum())
    with torch.no_grad():
        torch.testing.assert_close(field.divergence(t, x, cond)[1], trace.detach())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLPField(0), "dim must be at least 1, got 0"),
        (lambda: MLPField(1, -1), "cond_dim must be at least 0"),
        (lambda: MLPField(1, hidden=()), "hidden must hold at least one width"),
        (lambda: MLPField(1, hidden=(4, 0)), "hidden must hold at least one width"),
        (lambda: MLPField(1, activation="gelu"), "activation must be one of .*got 'gelu'"),
        (lambda: MLPField(1, time_features=0), "time_features must be at least 1"),
    ],
)
def test_bad_construction_is_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]


def test_bad_inputs_are_refused() -> None:
    field, x, cond = MLPField(3, 2), torch.zeros(4, 3), torch.zeros(4, 2)
    for bad_x in (torch.zeros(3), torch.zeros(4, 2), torch.zeros(1, 4, 3)):
        with pytest.raises(ValueError, match=r"x must have shape \[B, 3\], got"):
            field(0.0, bad_x, cond)
    for bad_t in (torch.zeros(3), torch.zeros(4, 1)):
        with pytest.raises(ValueError, match=r"t must be a float or have shape \[4\], got"):
            field(bad_t, x, cond)
    with pytest.raises(ValueError, match=r"cond must have shape \[B, 2\], got None"):
        field(0.0, x)
    with pytest.raises(ValueError, match=r"cond must have shape \[B, 2\], got \[4, 3\]"):
        field(0.0, x, torch.zeros(4, 3))
    with pytest.raises(ValueError, match="cond must have 4 rows like x, or 1 row, got 3"):
        field(0.0, x, torch.zeros(3, 2))


def test_unexpected_conditioning_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cond must be None, got shape \[4, 2\]"):
        MLPField(3)(0.0, torch.zeros(4, 3), torch.zeros(4, 2))
