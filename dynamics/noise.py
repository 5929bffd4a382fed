"""Noise that drives stochastic flows: Brownian motion on a grid and at any time, coloured and fractional noise.

No global random numbers: a ``torch.Generator``, a seed, or standard normal noise is an argument everywhere.

    ======== ============= ===============================================================================
    symbol   shape         meaning
    ======== ============= ===============================================================================
    w        [..., B, D]   increment of Brownian motion over a step, ``N(0, dt)``
    h        [..., B, D]   space-time Levy area of the step, ``N(0, dt / 12)``, independent of w:
                           the mean of ``W_s - W_start - (s - start) / dt w`` over the step
    ======== ============= ===============================================================================
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from .ode import intervals


@dataclass(frozen=True, eq=False)
class BrownianGrid:
    """Increments of B x D independent Brownian motions over equal steps.

    Attributes:
        dt: size of a step, in units of time.
        w: increments, [steps, B, D].
        h: space-time Levy areas, [steps, B, D], or None where no scheme asks for them.

    Raises:
        ValueError: if dt is not positive, w not [steps, B, D] with steps >= 1, or h unlike w.
    """

    dt: float
    w: Tensor
    h: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.dt > 0:
            raise ValueError(f"dt must be positive, got {self.dt}")
        if self.w.ndim != 3 or self.w.shape[0] < 1:
            raise ValueError(f"w must have shape [steps, B, D] with steps at least 1, got {list(self.w.shape)}")
        if self.h is not None and _kind(self.h) != _kind(self.w):
            raise ValueError(f"h must be like w, {_kind(self.w)}, got {_kind(self.h)}")

    @classmethod
    def sample(
        cls,
        steps: int,
        shape: tuple[int, int],
        *,
        dt: float,
        generator: torch.Generator,
        levy: bool = True,
        dtype: torch.dtype | None = None,
    ) -> BrownianGrid:
        """Draw a grid of ``shape`` (B, D) on the generator's device, in ``dtype`` (None: torch's default).

        Raises:
            ValueError: if ``steps`` is below 1 or ``dt`` not positive.
        """
        if steps < 1 or not dt > 0:
            raise ValueError(f"steps must be at least 1 and dt positive, got {steps} and {dt}")
        z = torch.randn((1 + levy, steps, *shape), generator=generator, dtype=dtype, device=generator.device)
        return cls(dt, z[0] * math.sqrt(dt), z[1] * math.sqrt(dt / 12) if levy else None)

    def path(self) -> Tensor:
        """Brownian motion at the step boundaries, [steps + 1, B, D], from 0."""
        return torch.cat([torch.zeros_like(self.w[:1]), self.w.cumsum(0)])

    def coarsen(self, factor: int) -> BrownianGrid:
        """The same path over steps ``factor`` times as large.

        Raises:
            ValueError: if ``factor`` does not divide the number of steps.
        """
        steps = self.w.shape[0]
        if factor < 1 or steps % factor:
            raise ValueError(f"factor must divide the {steps} steps, got {factor}")
        fine = self.w.unflatten(0, (-1, factor))
        w = fine.sum(1)
        if self.h is None:
            return BrownianGrid(self.dt * factor, w)
        # The mean of W over a fine step is W at its start + w / 2 + h; h of the coarse step is their mean less w / 2.
        h = (fine.cumsum(1) - 0.5 * fine + self.h.unflatten(0, (-1, factor))).mean(1) - 0.5 * w
        return BrownianGrid(self.dt * factor, w, h)

    def refine(self, generator: torch.Generator) -> BrownianGrid:
        """A path over steps half as large that this grid is the coarsening of, drawn from its conditional law."""
        z = torch.randn((2, *self.w.shape), generator=generator, dtype=self.w.dtype, device=self.w.device)
        if self.h is None:
            left = 0.5 * self.w + 0.5 * math.sqrt(self.dt) * z[0]
            return BrownianGrid(0.5 * self.dt, torch.stack([left, self.w - left], 1).flatten(0, 1))
        left, h_left, right, h_right = _halve(self.dt, self.w, self.h, z[0], z[1])
        w, h = (torch.stack(halves, 1).flatten(0, 1) for halves in ((left, right), (h_left, h_right)))
        return BrownianGrid(0.5 * self.dt, w, h)


def _halve(dt: float, w: Tensor, h: Tensor, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(w, h) of both halves of a step given (w, h) of the whole (arXiv 2405.06464, at the midpoint)."""
    arch, split = (0.25 * math.sqrt(dt)) * z1, (0.5 * math.sqrt(dt / 12)) * z2
    left = torch.add(0.5 * w + arch, h, alpha=1.5)
    common = torch.sub(0.25 * h, arch, alpha=0.5)
    return left, common + split, w - left, common - split


def _kind(x: Tensor) -> tuple[list[int], torch.dtype, torch.device]:
    return list(x.shape), x.dtype, x.device


class BrownianTree:
    """Brownian motion from a single seed, at any time, in any order of queries, without stored values.

    A Virtual Brownian Tree with space-time Levy area (Jelincic, Foster, Kidger, arXiv 2405.06464): a query descends by
    halving the interval, and each node's normals are a hash of (seed, node, element). Differences from the paper: the
    descent ends at the query itself, not at a tolerance, so any set of queries has the joint law of Brownian motion;
    times are rounded to ``2^-53`` of the interval. A query costs as many levels as its time has binary digits: 3 at
    1/8, up to 53 at 0.1; it holds about 200 float64 numbers per element while it runs, and nothing afterwards.

    Computed in float64: the same values to rounding on every device and in every batch size (a row's path depends on
    its index and D only).

    Args:
        seed: any integer; taken modulo 2^64.
        shape: (B, D).
        t0: start time, where W = 0.
        t1: end time.
        dtype: of the results; None for torch's default.
        device: of the results.

    Raises:
        ValueError: if t1 is not above t0, or a size of shape is below 1.
    """

    def __init__(
        self,
        seed: int,
        shape: tuple[int, int],
        *,
        t0: float = 0.0,
        t1: float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not t1 > t0:
            raise ValueError(f"t1 must be above t0, got t0={t0} and t1={t1}")
        if min(shape) < 1:
            raise ValueError(f"shape must be (B, D), each at least 1, got {tuple(shape)}")
        self.t0, self.t1 = t0, t1
        self._shape = tuple(shape)
        self._dtype = dtype or torch.get_default_dtype()
        count = torch.arange(2 * math.prod(shape), device=device).view(*shape, 2).movedim(-1, 0)
        self._counter = count * _GOLDEN
        self._seed = _hash(torch.tensor(_signed(seed), device=device))

    def __call__(self, t: float) -> Tensor:
        """``W_t``, [B, D].

        Raises:
            ValueError: if t lies outside [t0, t1].
        """
        return self._state(t)[0].to(self._dtype)

    def increment(self, start: float, end: float) -> tuple[Tensor, Tensor]:
        """Increment and space-time Levy area (w, h) from start to end, each [B, D].

        Raises:
            ValueError: unless ``t0 <= start < end <= t1``.
        """
        w, h = self._between([start, end])
        return w[0], h[0]

    def grid(self, steps: int, t0: float | None = None, t1: float | None = None) -> BrownianGrid:
        """The increments over equal steps from t0 to t1 (default: the whole interval), for ``sdeint``.

        Raises:
            ValueError: if ``steps`` is below 1, or the times lie outside the tree's or are not in order.
        """
        t0, t1 = self.t0 if t0 is None else t0, self.t1 if t1 is None else t1
        w, h = self._between([*(t for t, _ in intervals(steps, t0, t1)), t1])
        return BrownianGrid((t1 - t0) / steps, w, h)

    def _between(self, times: list[float]) -> tuple[Tensor, Tensor]:
        """(w, h) of the steps between consecutive times, each [steps, B, D]."""
        if any(not a < b for a, b in pairwise(times)):
            raise ValueError(f"times must increase, got {times[0]} before {times[-1]}")
        value, integral = (torch.stack(part) for part in zip(*map(self._state, times), strict=True))
        sizes = torch.tensor([b - a for a, b in pairwise(times)], dtype=value.dtype, device=value.device)
        w = value.diff(dim=0)
        h = integral.diff(dim=0) / sizes.view(-1, 1, 1) - value[:-1] - 0.5 * w
        return w.to(self._dtype), h.to(self._dtype)

    def _state(self, t: float) -> tuple[Tensor, Tensor]:
        """``W_t`` and ``integral of W from t0 to t``, [B, D] each, float64."""
        if not self.t0 <= t <= self.t1:
            raise ValueError(f"t must lie in [{self.t0}, {self.t1}], got {t}")
        length = self.t1 - self.t0
        index = round((t - self.t0) / length * 2**_DEPTH)
        levels = _DEPTH - ((index & -index).bit_length() - 1) if index else 0
        # Node 0 draws the whole interval; 2^l + i halves the i-th interval of level l.
        z = self._normals([0] + [(1 << level) + (index >> (_DEPTH - level)) for level in range(levels)])
        w, h = math.sqrt(length) * z[0, 0], math.sqrt(length / 12) * z[0, 1]
        if index == 2**_DEPTH:
            return w, length * (0.5 * w + h)
        value, integral = torch.zeros_like(w), torch.zeros_like(w)
        for level in range(levels):
            w_left, h_left, w_right, h_right = _halve(length, w, h, z[level + 1, 0], z[level + 1, 1])
            length *= 0.5
            if index >> (_DEPTH - 1 - level) & 1:
                integral = integral + length * (value + 0.5 * w_left + h_left)
                value = value + w_left
                w, h = w_right, h_right
            else:
                w, h = w_left, h_left
        return value, integral

    def _normals(self, nodes: list[int]) -> Tensor:
        """Two standard normals per node and element, [nodes, 2, B, D], by Box and Muller's transform."""
        keys = _hash(self._seed + torch.tensor(nodes, device=self._counter.device) * _GOLDEN)
        bits = _hash(keys.view(-1, 1, 1, 1) + self._counter)
        uniform = ((bits >> 11 & (2**53 - 1)).double() + 0.5) * 2.0**-53
        radius, angle = torch.sqrt(-2 * torch.log(uniform[:, 0])), (2 * math.pi) * uniform[:, 1]
        return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], 1)


_DEPTH = 53


def _signed(number: int) -> int:
    """The int64 with the same lowest 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


_GOLDEN = _signed(0x9E3779B97F4A7C15)


def _hash(x: Tensor) -> Tensor:
    """SplitMix64's output function (Steele et al. 2014) on int64, whose products wrap; elementwise."""
    x = (x ^ (x >> 30 & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & (2**33 - 1))


@dataclass(frozen=True, eq=False)
class OrnsteinUhlenbeck:
    """Mean-reverting noise ``dX = -rate (X - mean) dt + sigma dW`` with exact transitions, for steps of any size.

    Holds no state: the caller keeps x, one row per environment, and replaces the rows that start anew.

    Attributes:
        rate: speed of reversion, in 1/time, positive; the correlation time is ``1 / rate``.
        sigma: in units of x / sqrt(time), at least 0; the stationary deviation is ``sigma / sqrt(2 rate)``.
        mean: the level reverted to. All three are numbers or tensors that broadcast with x (tensors go unchecked).

    Raises:
        ValueError: if rate is not positive or sigma negative.
    """

    rate: float | Tensor
    sigma: float | Tensor
    mean: float | Tensor = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.rate, Tensor) and not self.rate > 0:
            raise ValueError(f"rate must be positive, got {self.rate}; without reversion use BrownianGrid")
        if not isinstance(self.sigma, Tensor) and not self.sigma >= 0:
            raise ValueError(f"sigma must be at least 0, got {self.sigma}")

    def transition(self, dt: float) -> tuple[float | Tensor, float | Tensor]:
        """Decay and noise deviation of a step: ``e^(-rate dt)`` and ``sigma sqrt((1 - e^(-2 rate dt)) / (2 rate))``."""
        if isinstance(self.rate, Tensor):
            decay, lost = torch.exp(-self.rate * dt), -torch.expm1(-2 * self.rate * dt)
            return decay, self.sigma * torch.sqrt(lost / (2 * self.rate))
        lost_fraction = -math.expm1(-2 * self.rate * dt)
        return math.exp(-self.rate * dt), self.sigma * math.sqrt(lost_fraction / (2 * self.rate))

    def stationary(self, noise: Tensor) -> Tensor:
        """A draw from the stationary law; ``noise`` is standard normal, in the shape of x."""
        return self.mean + self.sigma / (2 * self.rate) ** 0.5 * noise

    def step(self, x: Tensor, noise: Tensor, dt: float) -> Tensor:
        """The state after ``dt``; ``noise`` is standard normal, [B, D] like x.

        Raises:
            ValueError: if dt is negative or the shapes differ.
        """
        if not dt >= 0:
            raise ValueError(f"dt must be at least 0, got {dt}")
        if noise.shape != x.shape:
            raise ValueError(f"noise must have the shape of x, {list(x.shape)}, got {list(noise.shape)}")
        decay, deviation = self.transition(dt)
        return self.mean + decay * (x - self.mean) + deviation * noise


class FractionalNoise(nn.Module):
    """Fractional Brownian motion of type II, as a sum of K Ornstein-Uhlenbeck processes of one Brownian motion.

        B_t = 1 / Gamma(H + 1/2) integral_0^t (t - s)^(H - 1/2) dW_s  ~  sum_k w_k Y_k,    dY_k = -r_k Y_k dt + dW

    The weights minimise the mean squared error over [0, horizon], in closed form for given rates (Daems et al., arXiv
    2310.12975); the rates are geometric from 0.1 to 200 per horizon. H < 1/2: increments of opposite
    sign follow each other; 1/2: Brownian motion; H > 1/2: of equal sign, for persistent exploration. With six terms
    the covariances on a grid of ten times are off by at most 0.4 % of the largest at H = 0.3, 0.1 % from H = 0.4 on.

    Args:
        hurst: H, in [0.3, 1]; rougher noise is not approximated well (20 % at H = 0.1).
        horizon: time over which the approximation holds.
        terms: K, from 2 to 8; beyond, the weights' system is singular to rounding.
        learnable: make the weights a parameter.

    Raises:
        ValueError: on values out of range.
    """

    rates: Tensor
    weights: Tensor

    def __init__(self, hurst: float, *, horizon: float = 1.0, terms: int = 6, learnable: bool = False) -> None:
        super().__init__()
        if not 0.3 <= hurst <= 1:
            raise ValueError(f"hurst must lie in [0.3, 1], got {hurst}; the approximation fails for rougher noise")
        if not 2 <= terms <= 8:
            raise ValueError(f"terms must lie in [2, 8], got {terms}")
        if not horizon > 0:
            raise ValueError(f"horizon must be positive, got {horizon}")
        rates = torch.logspace(math.log10(0.1), math.log10(200), terms, dtype=torch.float64, device="cpu")
        weights = horizon ** (hurst - 0.5) * _fractional_weights(hurst, rates)
        self.register_buffer("rates", (rates / horizon).to(torch.get_default_dtype()))
        self.weights = nn.Parameter(weights.to(self.rates), requires_grad=learnable)

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


class StepNoise(abc.ABC):
    """Noise for one action after another: N(0, 1) at every step of an episode, correlated with the steps before.

    Given its memory, the value at a step is ``N(mean, scale^2)`` with mean and scale known beforehand: that is what a
    likelihood of it needs. B environments with D dimensions each, which begin episodes at times of their own.

    Attributes:
        terms: K, the standard normals that a step takes per element.
    """

    terms: int

    @abc.abstractmethod
    def step(self, normal: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Go on by one step.

        Args:
            normal: standard normal noise, [K, B, D].
            start: where an episode starts, which forgets what was before, [B] of bool; at the first call everywhere.

        Returns:
            The value [B, D]; its mean [B, D] and its scale [B, 1] given the memory.
        """


class OrnsteinUhlenbeckSteps(StepNoise):
    """The stationary Ornstein-Uhlenbeck process at unit steps: the correlation over k of them is ``e^(-k / time)``.

    ``mean = e^(-1 / time) value`` of the step before and ``scale^2 = 1 - e^(-2 / time)``; 0 and 1 at a start.

    Args:
        time: correlation time in steps, positive.
        shape: (B, D).
        device: of the noise.

    Raises:
        ValueError: if time is not positive.
    """

    terms = 1

    def __init__(self, time: float, shape: tuple[int, int], device: torch.device | str = "cpu") -> None:
        if not time > 0:
            raise ValueError(f"time must be positive, got {time}")
        self._process = OrnsteinUhlenbeck(1 / time, math.sqrt(2 / time))
        self._last = torch.zeros(shape, device=device)

    def step(self, normal: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the base class."""
        fresh, (decay, deviation) = start.unsqueeze(1), self._process.transition(1.0)
        mean = (decay * self._last).masked_fill(fresh, 0.0)
        scale = torch.where(fresh, self._process.stationary(torch.ones_like(mean[:, :1])), deviation)
        self._last = torch.addcmul(mean, scale, normal[0])
        return self._last, mean, scale


class FractionalSteps(StepNoise):
    """The increments of `FractionalNoise` over unit steps, each over its standard deviation.

    With the state y before a step: ``mean = sum_k w_k (e^-r_k - 1) y_k / spread`` and ``scale = |w factor| / spread``;
    spread is the deviation of the increment at this age of the episode. hurst above 1/2: increments of equal sign
    follow each other, over hundreds of steps.

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
        self._change, self._innovation = decay - 1, torch.linalg.vector_norm(self._process.weights @ factor)
        # Variance of the increment at each age, from E[y_i y_j] = (1 - e^(-(r_i + r_j) age)) / (r_i + r_j); it has
        # settled at the last of them, to e^-20.
        rates, read = self._process.rates.double(), (self._process.weights * self._change).double()
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


def step_noise(
    name: str, time: float, hurst: float, shape: tuple[int, int], device: torch.device | str = "cpu"
) -> StepNoise | None:
    """The `StepNoise` called "ou" (of time) or "fractional" (of hurst); None for "gaussian", which has no memory.

    Raises:
        ValueError: if there is none of this name, or its parameter is out of range.
    """
    if name == "ou":
        return OrnsteinUhlenbeckSteps(time, shape, device)
    if name == "fractional":
        return FractionalSteps(hurst, shape, device=device)
    if name != "gaussian":
        raise ValueError(f"name must be gaussian, ou or fractional, got {name!r}")
    return None


def _fractional_weights(hurst: float, rates: Tensor) -> Tensor:
    """The w that minimise ``integral_0^1 E (B_t - sum_k w_k Y_k(t))^2 dt``: ``A w = b``, [K].

    ``A_ij = integral E[Y_i Y_j]`` and ``b_k = integral E[B Y_k]``, the latter with incomplete gamma functions P:
    ``b_k = r^-a P(a, r) - a r^-(a + 1) P(a + 1, r)`` for ``a = H + 1/2``.
    """
    a = torch.full_like(rates, hurst + 0.5)
    pairs = rates[:, None] + rates
    gram = 1 / pairs + torch.expm1(-pairs) / pairs.square()
    gamma = torch.special.gammainc
    moments = rates**-a * (gamma(a, rates) - a / rates * gamma(a + 1, rates))
    solution: Tensor = torch.linalg.solve(gram, moments)
    return solution
