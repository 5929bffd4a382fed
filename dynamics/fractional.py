"""Fractional noise: correlated over many time scales at once, as a process and over the steps of an episode."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .noise import StepNoise

_SLOWEST = 0.1  # rate, per horizon
_ROUGHEST = 0.3
_SERIES = 500
"""Terms for rates up to 200: those beyond are below e^-100 of the largest."""

Drift: TypeAlias = Callable[[float, Tensor], Tensor]
Control: TypeAlias = Callable[[float, Tensor, Tensor], Tensor]


class FractionalNoise(nn.Module):
    """Fractional Brownian motion of type II, as a sum of K Ornstein-Uhlenbeck processes of one Brownian motion.

        B_t = 1 / Gamma(H + 1/2) integral_0^t (t - s)^(H - 1/2) dW_s  ~  sum_k w_k Y_k,    dY_k = -r_k Y_k dt + dW

    The weights minimise the mean squared error over [0, horizon], in closed form for given rates (Daems et al., arXiv
    2310.12975); the rates are geometric from 0.1 to 200 per horizon. H = 1/2 is Brownian motion. Below 1/2 an increment
    tends to have the opposite sign of the one before; above 1/2 the same sign, for persistent exploration.

    With six terms the covariances on a grid of ten times are off by at most 0.4 % of the largest at H = 0.3, 0.1 % from
    H = 0.4 on.

    Args:
        hurst: H, in [0.3, 1]; rougher noise is not approximated well (20 % at H = 0.1).
        horizon: time over which the approximation holds.
        terms: K, from 2 to 8; beyond, the weights' system is singular to rounding.
        learnable: make H a parameter, through its logit within [0.3, 1]; the weights are then the optimal ones of the
            H of the moment, and differentiable.

    Raises:
        ValueError: on values out of range, or if a learnable H lies at an end of it.
    """

    rates: Tensor
    _fixed: Tensor | None

    def __init__(self, hurst: float, *, horizon: float = 1.0, terms: int = 6, learnable: bool = False) -> None:
        super().__init__()
        if not _ROUGHEST <= hurst <= 1:
            raise ValueError(
                f"hurst must lie in [{_ROUGHEST}, 1], got {hurst}; the approximation fails for rougher noise"
            )
        if not 2 <= terms <= 8:
            raise ValueError(f"terms must lie in [2, 8], got {terms}")
        if not 0 < horizon < math.inf:
            raise ValueError(f"horizon must be positive and finite, got {horizon}")
        if learnable and not _ROUGHEST < hurst < 1:
            raise ValueError(f"hurst must lie within ({_ROUGHEST}, 1) to be learned, got {hurst}")
        rates = torch.logspace(math.log10(_SLOWEST), math.log10(200), terms, dtype=torch.float64, device="cpu")
        weights = _fractional_weights(torch.tensor(hurst, dtype=torch.float64), rates, horizon)
        self.horizon = horizon
        self.register_buffer("rates", (rates / horizon).to(torch.get_default_dtype()))
        self.register_buffer("_fixed", None if learnable else weights.to(self.rates))
        logit = torch.tensor((hurst - _ROUGHEST) / (1 - _ROUGHEST), dtype=self.rates.dtype).logit()
        self.logit = nn.Parameter(logit) if learnable else None

    @property
    def hurst(self) -> Tensor:
        """The H that is learned, a scalar.

        Raises:
            ValueError: if it is not.
        """
        if self.logit is None:
            raise ValueError("hurst is a tensor where it is learned only; build the noise with learnable=True")
        return _ROUGHEST + (1 - _ROUGHEST) * self.logit.sigmoid()

    @property
    def weights(self) -> Tensor:
        """The w_k, [K]."""
        if self._fixed is not None:
            return self._fixed
        rates = self.rates.double() * self.horizon
        return _fractional_weights(self.hurst.double(), rates, self.horizon).to(self.rates)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.horizon = _SLOWEST / self.rates[0].item()  # the rates say which it was

    def initial(self, batch: int, dim: int) -> Tensor:
        """The state at t = 0, zeros [B, D, K]."""
        return self.weights.new_zeros(batch, dim, self.rates.shape[0])

    def transition(self, dt: float) -> tuple[Tensor, Tensor]:
        """Decay [K] and factor [K, K] of ``y' = decay y + factor noise`` over dt; compute them once, outside the loop.

        Raises:
            ValueError: if ``dt`` is not positive.
        """
        if not dt > 0:
            raise ValueError(f"dt must be positive, got {dt}")
        rates = self.rates.double()
        pairs = rates[:, None] + rates
        # Nearly singular, as all K share dW: eigenvectors where a Cholesky factor would fail.
        eigenvalues, vectors = torch.linalg.eigh(-torch.expm1(-pairs * dt) / pairs)
        factor = vectors * eigenvalues.clamp(min=0).sqrt()
        return torch.exp(-rates * dt).to(self.weights), factor.to(self.weights)

    @staticmethod
    def step(y: Tensor, noise: Tensor, transition: tuple[Tensor, Tensor]) -> Tensor:
        """State [B, D, K] after a step of the ``transition``, exact in law; ``noise`` [B, D, K] is standard normal.

        The noise is K per element, because dW alone does not fix its K convolutions with ``e^(-r_k s)``.

        Raises:
            ValueError: if the shapes differ.
        """
        if noise.shape != y.shape:
            raise ValueError(f"noise must have the shape of y, {list(y.shape)}, got {list(noise.shape)}")
        decay, factor = transition
        return y * decay + noise @ factor.mT

    def value(self, y: Tensor) -> Tensor:
        """The noise ``sum_k w_k Y_k``, [B, D], from the state [B, D, K]."""
        return y @ self.weights


class FractionalSteps(StepNoise):
    """The increments of `FractionalNoise` over unit steps, each divided by its standard deviation.

    With the state y before a step: ``mean = sum_k w_k (e^-r_k - 1) y_k / spread`` and ``scale = |w factor| / spread``,
    where spread is the standard deviation of the increment at this age of the episode. With hurst above 1/2 increments
    tend to keep their sign over hundreds of steps.

    Args:
        hurst: H, in [0.3, 1].
        shape: (B, D).
        horizon: steps over which the approximation holds. The correlations of increments are off by at most 0.025 for
            100, by more for shorter and for longer ones.
        device: of the noise.

    Raises:
        ValueError: if hurst or horizon is out of range.
    """

    def __init__(
        self, hurst: float, shape: tuple[int, int], *, horizon: float = 100.0, device: torch.device | str = "cpu"
    ) -> None:
        self._process = FractionalNoise(hurst, horizon=horizon).requires_grad_(False).to(device)
        self._transition = self._process.transition(1.0)
        self._y = self._process.initial(*shape)
        self._age = torch.zeros(shape[0], dtype=torch.long, device=device)
        self.terms = self._y.shape[-1]
        decay, factor = self._transition
        rates = self._process.rates.double()
        self._change = torch.expm1(-rates).to(decay)  # decay - 1 would lose the digits of the slow ones
        self._innovation = torch.linalg.vector_norm(self._process.weights @ factor)
        # Variance of the increment at each age, from E[y_i y_j] = (1 - e^(-(r_i + r_j) age)) / (r_i + r_j); it has
        # settled at the last of them, to e^-20.
        read = (self._process.weights * self._change).double()
        pairs = rates[:, None] + rates
        ages = torch.arange(math.ceil(100 * horizon) + 1, device=device)[:, None, None]
        known = (read[:, None] * read * -torch.expm1(-pairs * ages) / pairs).sum((1, 2))
        self._spread = (known + self._innovation.double().square()).sqrt().to(decay).unsqueeze(1)

    def step(self, normal: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the base class."""
        before = self._y.masked_fill(start[:, None, None], 0.0)
        self._age = (self._age + 1).masked_fill(start, 0).clamp(max=len(self._spread) - 1)
        self._y = self._process.step(before, normal.movedim(0, -1), self._transition)
        spread = self._spread[self._age]
        value = self._process.value(self._y - before) / spread
        return value, self._process.value(before * self._change) / spread, self._innovation / spread


def fractional_sdeint(
    noise: FractionalNoise,
    drift: Drift,
    x: Tensor,
    normal: Tensor,
    *,
    dt: float,
    scale: float | Tensor = 1.0,
    control: Control | None = None,
) -> tuple[Tensor, Tensor]:
    """``dx = drift dt + scale dB`` for fractional B, by Euler steps of the drift; B itself is exact in law.

    With a control u the Brownian motion beneath is ``dW + u dt``: the processes that B is made of go
    ``dY_k = -r_k Y_k dt + u dt + dW``. The divergence to the equation without control is then ``E 1/2 integral |u|^2
    dt``, whatever H (Girsanov). ``log p(observations | path) - divergence`` is in the mean a lower bound of the
    evidence (Daems et al., arXiv 2310.12975), differentiable in H, the drift, the scale and the control.

    Args:
        noise: the fractional noise.
        drift: ``(t, x [B, D]) -> [B, D]``.
        x: state at t = 0, [B, D].
        normal: standard normal noise, [steps, B, D, K].
        dt: size of a step.
        scale: noise level in units of x / time^H, that broadcasts with [B, D].
        control: ``(t, x [B, D], y [B, D, K]) -> u [B, D]``, held over a step; None for none.

    Returns:
        States at the step boundaries, [steps + 1, B, D], the first of them x, and the divergence of each row, [B].

    Raises:
        ValueError: if the shapes differ, dt is not positive, or the steps go beyond the noise's horizon.
    """
    y, weights = noise.initial(*x.shape), noise.weights
    if normal.ndim != 4 or normal.shape[1:] != y.shape:
        raise ValueError(f"normal must have shape [steps, *{list(y.shape)}], got {list(normal.shape)}")
    if len(normal) * dt > noise.horizon * (1 + 1e-6):
        raise ValueError(f"dt must be at most horizon / steps = {noise.horizon / len(normal):.4g}, got {dt}")
    decay, factor = noise.transition(dt)
    rates = noise.rates.double()
    reach = (-torch.expm1(-rates * dt) / rates).to(decay)  # of a control, held over the step, in each Y_k
    states, divergence = [x], x.new_zeros(len(x))
    for k, z in enumerate(normal.unbind()):
        after = noise.step(y, z, (decay, factor))
        if control is not None:
            u = control(k * dt, x, y)
            if u.shape != x.shape:
                raise ValueError(f"control must return the shape of x, {list(x.shape)}, got {list(u.shape)}")
            after = torch.addcmul(after, u.unsqueeze(-1), reach)
            divergence = torch.add(divergence, u.square().sum(-1), alpha=0.5 * dt)
        f = drift(k * dt, x)
        if f.shape != x.shape:
            raise ValueError(f"drift must return the shape of x, {list(x.shape)}, got {list(f.shape)}")
        x = torch.add(x, f, alpha=dt) + scale * ((after - y) @ weights)
        y = after
        states.append(x)
    return torch.stack(states), divergence


def _fractional_weights(hurst: Tensor, rates: Tensor, horizon: float) -> Tensor:
    """The w that minimise ``integral_0^1 E (B_t - sum_k w_k Y_k(t))^2 dt``: ``A w = b``, [K], for rates per horizon.

    ``A_ij = integral E[Y_i Y_j]`` and ``b_k = integral E[B Y_k] = 1 / Gamma(a) integral_0^1 (1 - u) u^(a - 1) e^(-r u)
    du`` with ``a = H + 1/2``, as the series ``e^-r sum_n (n + 1) r^n / Gamma(a + 2 + n)``: its terms are positive, and
    it has a derivative in H, which the incomplete gamma function lacks here.
    """
    pairs = rates[:, None] + rates
    gram = 1 / pairs + torch.expm1(-pairs) / pairs.square()
    n = torch.arange(_SERIES, dtype=rates.dtype, device=rates.device)
    terms = torch.log1p(n) - torch.lgamma(hurst + 2.5 + n) + n * rates[:, None].log() - rates[:, None]
    moments = terms.exp().sum(1)
    solution: Tensor = horizon ** (hurst - 0.5) * torch.linalg.solve(gram, moments)
    return solution
