"""Noise over the steps of an episode: standard normal, correlated from one action to the next.

No global random numbers: standard normal noise is an argument everywhere. The noise of SDE solvers is in ``brownian``.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor


class StepNoise(abc.ABC):
    """Noise for one action after another: N(0, 1) at every step of an episode, correlated with the steps before.

    Given the steps before, the value at a step is ``N(mean, scale^2)``. Mean and scale are known before the value is
    drawn, as a likelihood needs them. The noise serves B environments with D dimensions each, whose episodes may begin
    at different steps.

    Attributes:
        terms: K, the standard normals that a step takes per element.
    """

    terms: int

    @property
    def further_draws(self) -> int:
        """Standard normals of a step beside the newest, the one that noise without a memory would take."""
        return self.terms - 1

    @abc.abstractmethod
    def step(self, normal: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Advance by one step.

        Args:
            normal: standard normal noise, [K, B, D].
            start: whether an episode starts at this step, which forgets the steps before, bool [B]. At the first call
                all are True.

        Returns:
            The value [B, D]; its mean [B, D] and its scale [B, 1] given the steps before.
        """


def step_noise(
    name: str, time: float, hurst: float, shape: tuple[int, int], device: torch.device | str = "cpu"
) -> StepNoise | None:
    """The `StepNoise` of a name: "ou" or "fractional"; None for "gaussian", which has no memory.

    Args:
        name: "gaussian", "ou" or "fractional".
        time: correlation time of "ou", in steps.
        hurst: H of "fractional".
        shape: (B, D).
        device: of the noise.

    Raises:
        ValueError: if there is none of this name, or its parameter is out of range.
    """
    if name == "ou":
        return OrnsteinUhlenbeckSteps(time, shape, device)
    if name == "fractional":
        from .fractional import FractionalSteps  # on demand: few runs use it

        return FractionalSteps(hurst, shape, device=device)
    if name != "gaussian":
        raise ValueError(f"name must be gaussian, ou or fractional, got {name!r}")
    return None


class OrnsteinUhlenbeckSteps(StepNoise):
    """The stationary Ornstein-Uhlenbeck process at unit steps: the correlation over k steps is ``e^(-k / time)``.

    Mean and scale are 0 and 1 at a start. Later the mean is ``e^(-1 / time)`` times the value of the step before, and
    ``scale^2 = 1 - e^(-2 / time)``.

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
