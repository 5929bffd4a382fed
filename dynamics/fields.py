"""Velocity fields ``v(t, x, cond)``: the right-hand side of every flow in DriftRL.

Symbols used throughout ``dynamics``:

    ======== ============== ==========================================================
    symbol   shape          meaning
    ======== ============== ==========================================================
    t        float or [B]   flow time, no unit; flows run from t=0 (base) to t=1 (data)
    x        [B, D]         state, rows independent of each other
    cond     [B, C] or None conditioning, constant along the flow; [1, C] broadcasts
    v        [B, D]         dx/dt, in units of x
    ======== ============== ==========================================================

A new field needs ``forward`` only. Overriding ``embed`` and the ``*_embedded`` methods makes it faster: a solver calls
``embed(cond)`` once and one of the others at each stage.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .activations import ACTIVATIONS

Time: TypeAlias = float | Tensor
"""Flow time: a number for the whole batch, or a tensor [B] (a 0-d tensor counts as a number)."""


class VelocityField(nn.Module, abc.ABC):
    """Right-hand side of ``dx/dt = v(t, x, cond)``.

    Attributes:
        dim: D, the size of the state.
        cond_dim: C, the size of the conditioning; 0 for none.
    """

    __call__: Callable[..., Tensor]

    def __init__(self, dim: int, cond_dim: int = 0) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if cond_dim < 0:
            raise ValueError(f"cond_dim must be at least 0 (0: no conditioning), got {cond_dim}")
        self.dim = dim
        self.cond_dim = cond_dim

    @abc.abstractmethod
    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Velocity [B, D] at time t and state x [B, D]."""

    def embed(self, cond: Tensor | None, times: Sequence[float] = ()) -> Any:
        """All that does not depend on the state, computed once per integration.

        Callers hand the result to the ``*_embedded`` methods and do not look into it. The default is ``cond`` itself.

        Args:
            cond: conditioning, [B, C], or None.
            times: flow times at which the field will be evaluated; others are allowed, too.

        Raises:
            ValueError: if ``cond`` does not fit ``cond_dim``.
        """
        self.check_cond(cond)
        return cond

    def forward_embedded(self, t: Time, x: Tensor, embedded: Any) -> Tensor:
        """``forward`` with ``embedded = embed(cond)`` in place of cond."""
        return self.forward(t, x, embedded)

    def jacobian_embedded(self, t: Time, x: Tensor, embedded: Any) -> tuple[Tensor, Tensor]:
        """``jacobian`` with ``embedded = embed(cond)`` in place of cond."""
        v, pull_back = linear_pullback(self, t, x, embedded)
        basis = torch.eye(self.dim, dtype=x.dtype, device=x.device).unsqueeze(1).expand(-1, x.shape[0], -1)
        rows: Tensor = torch.func.vmap(pull_back)(basis)
        return v, rows.transpose(0, 1)

    def divergence_embedded(self, t: Time, x: Tensor, embedded: Any) -> tuple[Tensor, Tensor]:
        """``divergence`` with ``embedded = embed(cond)`` in place of cond."""
        v, jacobian = self.jacobian_embedded(t, x, embedded)
        return v, jacobian.diagonal(dim1=-2, dim2=-1).sum(-1)

    def jacobian(self, t: Time, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Velocity and its exact Jacobian, differentiable.

        Returns:
            v [B, D] and J [B, D, D] with ``J[b, i, j] = dv_i / dx_j`` at row b. By default D backward passes in one
            batched call.
        """
        return self.jacobian_embedded(t, x, self.embed(cond))

    def divergence(self, t: Time, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Velocity and its exact divergence, differentiable.

        Returns:
            v [B, D] and ``tr dv/dx`` [B]. By default the trace of the Jacobian.
        """
        return self.divergence_embedded(t, x, self.embed(cond))

    def check_state(self, t: Time, x: Tensor) -> None:
        """Raise ValueError unless x is [B, dim] and t a number or [B]. Looks at shapes only, so it costs no sync."""
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(
                f"x must have shape [B, {self.dim}], got {list(x.shape)}; flatten or add the batch dimension"
            )
        if isinstance(t, Tensor) and t.ndim > 0 and t.shape != x.shape[:1]:
            raise ValueError(
                f"t must be a float or have shape [{x.shape[0]}], got {list(t.shape)}; one time per row of x"
            )

    def check_cond(self, cond: Tensor | None) -> None:
        """Raise ValueError unless cond is [B, cond_dim], or None where cond_dim is 0."""
        if cond is None:
            if self.cond_dim > 0:
                raise ValueError(f"cond must have shape [B, {self.cond_dim}], got None; pass the conditioning")
        elif self.cond_dim == 0:
            raise ValueError(
                f"cond must be None, got shape {list(cond.shape)}; build the field with cond_dim to use it"
            )
        elif cond.ndim != 2 or cond.shape[1] != self.cond_dim:
            raise ValueError(f"cond must have shape [B, {self.cond_dim}], got {list(cond.shape)}; one row per row of x")


def linear_pullback(
    field: VelocityField, t: Time, x: Tensor, embedded: Any
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Velocity [B, D] and the map ``u -> u^T dv/dx`` on [B, D], differentiable."""
    # torch.func rather than torch.autograd: it also works under no_grad, nests (PotentialField), and compiles.
    v, pull_back, *_ = torch.func.vjp(lambda y: field.forward_embedded(t, y, embedded), x)

    def first(u: Tensor) -> Tensor:
        gradient: Tensor = pull_back(u)[0]
        return gradient

    return v, first


_Layer: TypeAlias = tuple[Tensor, Tensor | None]  # weight and bias

WEIGHT_HOOKS = (BasePruningMethod, WeightNorm, SpectralNorm)
"""Hooks of torch that set a layer's weight or bias before each call and do not look at the call's input."""


class _Embedding(NamedTuple):
    """An MLPField for one conditioning: what a solver's stage needs, looked up once."""

    still: Tensor  # first layer without the blocks of time and state
    by_time: dict[float, Tensor]  # the same with the time's block, for known times
    x_weight: Tensor
    rest: list[_Layer] | None  # the other layers; None if they must be called


class MLPField(VelocityField):
    """Multilayer perceptron with an additive first layer and a closed-form Jacobian.

        a_1 = Wx x + (Wc cond + Wt features(t) + b_1),  h_l = s(a_l),  a_l = W_l h_{l-1} + b_l,  v = W_out h_L + b_out

    The first layer is that of an MLP on ``[x, cond, features(t)]``, kept in three blocks because a solver moves x and t
    but not cond: ``embed`` computes ``Wc cond + b_1``, and the block of the solver's times, once per integration.

    ``features(t) = sin(w t + p)`` are random Fourier features (Rahimi and Recht 2007) in sine-cosine pairs, with fixed
    frequencies drawn from N(0, 1) cycles per unit of flow time by a generator of a fixed seed: two fields of equal
    ``time_features`` always share them.

    Initialisation: orthogonal weights of gain sqrt(2) (the first layer's as one matrix on the concatenated input), zero
    biases, the last layer times ``last_layer_scale``. At the default of 0 the field is zero and the flow the identity.
    PolicyFlow's reference implementation (arXiv 2602.01156) has Xavier weights; on Hopper-v5 they learn at half the
    speed.

    The linear layers after the first may be pruned (``torch.nn.utils.prune``), parametrized (``weight_norm``,
    ``spectral_norm``), given hooks or replaced. A layer with hooks of another kind or with another forward is called as
    a module; Jacobian and divergence then come from automatic differentiation, D passes.

    The first layer's ``x_weight``, ``cond_weight``, ``time_weight`` and ``bias`` belong to the field itself. They may
    be parametrized but not pruned: solvers do not call the field as a module, so hooks on the field do not run.

    Args:
        dim: D, size of the state.
        cond_dim: C, size of the conditioning, 0 for none.
        hidden: widths of the hidden layers, at least one. With one or two the divergence costs about 1.6 field calls,
            with more about ``D + 1``.
        activation: "silu", "mish", "tanh", "elu" or "relu".
        time_features: number of frequencies, at least 1; twice as many features.
        last_layer_scale: factor on the initial weights of the last layer.

    Raises:
        ValueError: on sizes below 1 or an unknown activation.
    """

    angular_frequencies: Tensor
    phases: Tensor
    output: nn.Linear

    def __init__(
        self,
        dim: int,
        cond_dim: int = 0,
        hidden: Sequence[int] = (64, 64),
        activation: str = "silu",
        time_features: int = 8,
        last_layer_scale: float = 0.0,
    ) -> None:
        super().__init__(dim, cond_dim)
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden must hold at least one width, each at least 1, got {tuple(hidden)}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
        if time_features < 1:
            raise ValueError(f"time_features must be at least 1, got {time_features}")
        self._activation, self._activation_with_derivative = ACTIVATIONS[activation]
        self._known_features: tuple[Any, tuple[Tensor, Tensor], Tensor] | None = None

        width = hidden[0]
        inputs = dim + cond_dim + 2 * time_features
        first = torch.empty(width, inputs)
        nn.init.orthogonal_(first, math.sqrt(2))
        self.x_weight = nn.Parameter(first[:, :dim].clone())
        self.cond_weight = nn.Parameter(first[:, dim : dim + cond_dim].clone()) if cond_dim else None
        self.time_weight = nn.Parameter(first[:, dim + cond_dim :].clone())
        self.bias = nn.Parameter(torch.zeros(width))

        self.layers = cast("Sequence[nn.Linear]", nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(hidden)))
        self.output = nn.Linear(hidden[-1], dim)
        for layer in (*self.layers, self.output):
            nn.init.orthogonal_(layer.weight, math.sqrt(2))
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.output.weight.mul_(last_layer_scale)

        # In float64 on the CPU, so that the draw depends on neither the default dtype nor the default device.
        generator = torch.Generator("cpu").manual_seed(0)
        cycles = torch.randn(1, time_features, generator=generator, dtype=torch.float64, device="cpu")
        shift = torch.zeros_like(cycles)
        self.register_buffer("angular_frequencies", (2 * math.pi * torch.cat([cycles, cycles], 1)).to(self.bias))
        self.register_buffer("phases", torch.cat([shift, shift + math.pi / 2], 1).to(self.bias))

    def embed(self, cond: Tensor | None, times: Sequence[float] = ()) -> _Embedding:
        """``Wc cond + b_1``, [B, H_1] (without conditioning b_1 as [1, H_1]), also with ``Wt features(t)`` added."""
        self.check_cond(cond)
        if cond is None or self.cond_weight is None:
            still = self.bias.unsqueeze(0)
        else:
            still = F.linear(cond, self.cond_weight, self.bias)
        by_time: dict[float, Tensor] = {}
        if times:
            rows = F.linear(self._features(tuple(times)), self.time_weight)
            by_time = dict(zip(times, (rows.unsqueeze(1) + still).unbind(), strict=True))
        return _Embedding(still, by_time, self.x_weight, self._rest())

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Velocity [B, D] at time t (float or [B]), state x [B, D] and conditioning cond [B, C]."""
        self.check_state(t, x)
        self.check_cond(cond)
        # One evaluation: the first layer as one matrix product. Three small ones take longer, forwards and backwards.
        features = torch.sin(self._angles(t))
        inputs: list[Tensor] = [x, features.expand(x.shape[0], -1)]
        weights: list[Tensor] = [self.x_weight, self.time_weight]
        if cond is not None and self.cond_weight is not None:
            inputs.append(_rows(cond, x.shape[0]))
            weights.append(self.cond_weight)
        return self._apply_rest(F.linear(torch.cat(inputs, 1), torch.cat(weights, 1), self.bias), self._rest())

    def forward_embedded(self, t: Time, x: Tensor, embedded: _Embedding) -> Tensor:
        """Velocity [B, D]; ``embedded`` comes from ``embed``."""
        return self._apply_rest(self._first(t, x, embedded), embedded.rest)

    def _rest(self) -> list[_Layer] | None:
        """Weights and biases of the layers after the first, or None if one of them must be called as a module.

        That is a layer with hooks or with a forward of its own. The others are not called, which saves 5 to 7 % of an
        integration. Whatever computes their weights (parametrizations, pruning) does so here, once.
        """
        rest: list[_Layer] = []
        for layer in (*self.layers, self.output):
            # The class and the instance are asked one by one: torch.compile misreads ``layer.forward.__func__``.
            if type(layer).forward is not nn.Linear.forward or "forward" in vars(layer):
                return None
            if layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks:
                return None
            for hook in layer._forward_pre_hooks.values():
                if not isinstance(hook, WEIGHT_HOOKS):
                    return None
                hook(layer, ())
            rest.append((layer.weight, layer.bias))
        return rest

    def _apply_rest(self, a: Tensor, rest: list[_Layer] | None) -> Tensor:
        """Velocity [B, D] from the pre-activations a_1 [B, H_1]."""
        if rest is None:
            for layer in (*self.layers, self.output):
                a = layer(self._activation(a))
            return a
        for weight, bias in rest:
            a = F.linear(self._activation(a), weight, bias)
        return a

    def divergence_embedded(self, t: Time, x: Tensor, embedded: _Embedding) -> tuple[Tensor, Tensor]:
        """Velocity [B, D] and divergence [B], in closed form for one and two hidden layers.

        One layer: ``tr J = diag(Wx W_out)^T s'(a_1)``. Two: ``tr J = s'(a_2)^T [W_2 o (Wx W_out)^T] s'(a_1)``, since
        the trace of ``W_out S_2 W_2 S_1 Wx`` with diagonal S is a bilinear form in the diagonals.
        """
        if embedded.rest is None or len(self.layers) > 1:
            return super().divergence_embedded(t, x, embedded)
        h, slope = self._activation_with_derivative(self._first(t, x, embedded))
        *hidden, (out_weight, out_bias) = embedded.rest
        if not hidden:
            trace = slope @ (embedded.x_weight * out_weight.t()).sum(1)
        else:
            ((weight, bias),) = hidden
            h, slope_2 = self._activation_with_derivative(F.linear(h, weight, bias))
            coupling = weight * (embedded.x_weight @ out_weight).t()
            trace = (F.linear(slope, coupling) * slope_2).sum(-1)
        return F.linear(h, out_weight, out_bias), trace

    def jacobian_embedded(self, t: Time, x: Tensor, embedded: _Embedding) -> tuple[Tensor, Tensor]:
        """Velocity [B, D] and Jacobian [B, D, D] by the chain rule over the layers, about ``D + 1`` field calls.

        Layers that must be called may do anything: there automatic differentiation takes the Jacobian.
        """
        if embedded.rest is None:
            return super().jacobian_embedded(t, x, embedded)
        h, slope = self._activation_with_derivative(self._first(t, x, embedded))
        # Row j of `tangents` [B, D, H] is dh/dx_j: with H last, each layer is one matrix product on B * D rows. The
        # copy of the small matrix keeps the large product in that layout; without it the whole is 1.6x slower.
        tangents = slope.unsqueeze(1) * embedded.x_weight.t().contiguous()
        *hidden, (out_weight, out_bias) = embedded.rest
        for weight, bias in hidden:
            h, slope = self._activation_with_derivative(F.linear(h, weight, bias))
            tangents = F.linear(tangents, weight) * slope.unsqueeze(1)
        v = F.linear(h, out_weight, out_bias)
        return v, F.linear(tangents, out_weight).transpose(1, 2)

    def _first(self, t: Time, x: Tensor, embedded: _Embedding) -> Tensor:
        """Pre-activations a_1 [B, H_1] of the first layer."""
        self.check_state(t, x)
        _rows(embedded.still, x.shape[0])
        rest = None if isinstance(t, Tensor) else embedded.by_time.get(t)
        if rest is None:
            rest = embedded.still + F.linear(torch.sin(self._angles(t)), self.time_weight)
        return torch.addmm(rest, x, embedded.x_weight.t())

    def _features(self, times: tuple[float, ...]) -> Tensor:
        """Time features [S, 2F] of a solver's times. They do not learn: outside a compiled graph they are kept."""
        numbers = self.angular_frequencies, self.phases
        if torch.compiler.is_compiling():
            return torch.sin(self._angles(self.phases.new_tensor(times)))
        # Loading a state gives the frequencies a new version, `functional_call` brings other tensors.
        key = (times, *(None if each.is_inference() else each._version for each in numbers))
        if self._known_features is not None:
            known, (frequencies, phases), features = self._known_features
            if known == key and frequencies is numbers[0] and phases is numbers[1]:
                return features
        with torch.inference_mode(False):  # they may be differentiated through later
            features = torch.sin(self._angles(self.phases.new_tensor(times)))
        # A tensor of torch.func's transforms is dead after them.
        if not (features.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(features)):
            self._known_features = key, numbers, features
        return features

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_known_features": None}

    def _angles(self, t: Time) -> Tensor:
        """Arguments of the time features, [B, 2F]; for one time [1, 2F], whatever the batch."""
        if isinstance(t, Tensor):
            return torch.addcmul(self.phases, t.unsqueeze(-1) if t.ndim else t, self.angular_frequencies)
        return torch.add(self.phases, self.angular_frequencies, alpha=t)


def _rows(cond: Tensor, rows: int) -> Tensor:
    """Conditioning of as many rows as x has, from as many or one.

    Raises:
        ValueError: if it has another number of rows.
    """
    if cond.shape[0] not in (1, rows):
        raise ValueError(f"cond must have {rows} rows like x, or 1 row, got {cond.shape[0]}")
    return cond.expand(rows, -1)
