"""A learned Langevin transition of a latent state, and a model of partially observed tasks made of it.

LangevinFlow (arXiv 2507.11531) is a sequential variational autoencoder whose latent state moves by underdamped Langevin
dynamics in a learned potential of locally coupled oscillators.

Differences from the paper, as far as its abstract tells:

- Actions push the oscillators. The paper models recordings of neurons, without actions.
- The decoder is a network of one hidden layer, not a Transformer; it shows rewards, too.

Made here, whatever the paper does:

- What is inferred are the starting state and the noise of every step, given what was seen so far and where the state
  is. The divergence from the prior is then, exactly, a sum of divergences between Gaussians, although the noise of a
  step reaches only half of the state's directions.
- The steps are BAOAB, of order 2.
- After ``observed`` observations steps follow the prior, as they do when the model predicts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fields import Time, VelocityField
from .langevin import kinetic


class OscillatorField(VelocityField):
    """Force of coupled oscillators on a ring, after the potential of LangevinFlow (arXiv 2507.11531).

        U = 1/2 sum_i [k_i x_i^2 + c_i (x_i - x_(i+1))^2] - x . (W cond),    F = -dU/dx

    Stiffnesses k and couplings c are learned and positive, so U is convex and the dynamics stay bounded. The paper's
    potential is more general; a ``PotentialField`` of any network can take this field's place.

    Args:
        dim: D, number of oscillators.
        cond_dim: C, size of the external drive, 0 for none; W is zero at first.
    """

    def __init__(self, dim: int, cond_dim: int = 0) -> None:
        super().__init__(dim, cond_dim)
        self.log_stiffness = nn.Parameter(torch.zeros(dim))
        self.log_coupling = nn.Parameter(torch.zeros(dim))
        self.drive = nn.Parameter(torch.zeros(dim, cond_dim)) if cond_dim else None

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Force [B, D] at x [B, D]; the same at all times t."""
        self.check_state(t, x)
        self.check_cond(cond)
        spring = self.log_coupling.exp() * (x.roll(-1, -1) - x)
        force = spring - spring.roll(1, -1) - self.log_stiffness.exp() * x
        return force if self.drive is None or cond is None else force + cond @ self.drive.mT


class KineticTransition(nn.Module):
    """Transition of a latent (position, velocity) by BAOAB steps in a learned potential (LangevinFlow).

    Args:
        force: field of the force, such as an ``OscillatorField`` or a ``PotentialField``.
        step: step size.
        friction: initial value; learned, one per dimension.
        temperature: strength of the noise, positive.

    Raises:
        ValueError: if step, friction or temperature is not positive.
    """

    def __init__(self, force: VelocityField, *, step: float, friction: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        for name, value in (("step", step), ("friction", friction), ("temperature", temperature)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.force, self.step, self.temperature = force, step, temperature
        self.log_friction = nn.Parameter(torch.full((force.dim,), math.log(friction)))

    def forward(
        self, position: Tensor, velocity: Tensor, noise: Tensor, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Position and velocity, [B, D] each, after the steps for which ``noise`` [steps, B, D] is standard normal."""
        friction, temperature = self.log_friction.exp(), self.temperature
        return kinetic(
            self.force, position, velocity, noise, step=self.step, friction=friction, temperature=temperature, cond=cond
        )


class Elbo(NamedTuple):
    """The two parts of a lower bound of the log-likelihood of sequences, in nats: ``log_likelihood - kl``."""

    log_likelihood: Tensor  # of observations and rewards given the latent path, [B]
    kl: Tensor  # of the inferred path from the prior, [B]

    def loss(self, kl_weight: float = 1.0) -> Tensor:
        """Mean of ``kl_weight * kl - log_likelihood``; the negative bound where the weight is 1.

        The weight is beta of the beta-VAE, and what PV-RNN calls the meta-prior: a small one lets inference correct
        every step, a large one makes the prior explain the sequence by itself.
        """
        return (kl_weight * self.kl - self.log_likelihood).mean()


class LatentPath(NamedTuple):
    """Latent states from the first observation on."""

    position: Tensor  # [L, B, D]
    velocity: Tensor  # [L, B, D]
    kl: Tensor  # of starting state and noise from the prior, [B]


class LangevinFlow(nn.Module):
    """Model of a partially observed task: oscillators that actions push, seen through a decoder.

        x_0, p_0 ~ N(0, 1),    (x, p)_(t+1) = BAOAB step with noise e_t ~ N(0, 1) and the force F(x, a_t),
        o_t ~ N(decoder(x_t, p_t), s^2),    r_t ~ N(reward_head(x_(t+1), p_(t+1), a_t), s_r^2)

    A recurrent encoder reads observations and actions so far. From it follow Gaussians of (x_0, p_0), given o_0, and of
    every e_t, given (x_t, p_t) and what was seen up to o_(t+1). Time is the first axis of all sequences: observations
    [L, B, O], actions [L - 1, B, A] between them, rewards [L - 1, B] that followed. Standardise them: the scales s and
    s_r, which are learned, begin at 1.

    Args:
        obs_dim: O.
        action_dim: A.
        latent_dim: D, number of oscillators; the state has 2 D numbers.
        hidden: units of the encoder and of the hidden layers.
        step: time between two observations. One step is stable up to ``step = 2 / w`` with w the highest frequency of
            the potential; at first w^2 is at most 5.
        friction: at first; a free velocity keeps ``exp(-friction * step)`` of itself from one observation to the next.
        force: field of size D with conditioning A, such as a ``PotentialField``; None for an ``OscillatorField``.

    Raises:
        ValueError: if a size, step or friction is not positive, or the force's sizes are not D and A.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        latent_dim: int = 16,
        *,
        hidden: int = 64,
        step: float = 0.5,
        friction: float = 0.1,
        force: VelocityField | None = None,
    ) -> None:
        super().__init__()
        sizes = {"obs_dim": obs_dim, "action_dim": action_dim, "latent_dim": latent_dim, "hidden": hidden}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        force = OscillatorField(latent_dim, action_dim) if force is None else force
        if (force.dim, force.cond_dim) != (latent_dim, action_dim):
            raise ValueError(
                f"force must have dim {latent_dim} and cond_dim {action_dim}, got {force.dim} and {force.cond_dim}; "
                "build it with the sizes of the latent position and of the action"
            )
        self.obs_dim, self.action_dim, self.latent_dim, self.hidden = obs_dim, action_dim, latent_dim, hidden
        self.transition = KineticTransition(force, step=step, friction=friction)
        self.encoder = nn.GRUCell(obs_dim + action_dim, hidden)
        self.start = nn.Linear(hidden, 4 * latent_dim)
        self.correction = _network(hidden + 2 * latent_dim, hidden, 2 * latent_dim)
        self.decoder = _network(2 * latent_dim, hidden, obs_dim)
        self.reward_head = _network(2 * latent_dim + action_dim, hidden, 1)
        self.log_std = nn.Parameter(torch.zeros(obs_dim + 1))

    def elbo(self, obs: Tensor, action: Tensor, reward: Tensor, noise: Tensor, observed: int | None = None) -> Elbo:
        """Estimate of the evidence lower bound by one latent path per row, differentiable.

        Costs ``observed`` steps of the encoder and L - 1 of the transition, one after the other.

        Args:
            obs: [L, B, O].
            action: [L - 1, B, A].
            reward: [L - 1, B].
            noise: standard normal, [L + 1, B, D]: of x_0, of p_0 and of every step.
            observed: observations that inference reads, 1 to L; None for all. Later steps are drawn from the prior and
                do not diverge from it: a bound still, which trains predictions of several steps.

        Raises:
            ValueError: on other shapes, or ``observed`` out of range.
        """
        if reward.shape != action.shape[:2]:
            raise ValueError(f"reward must have shape {list(action.shape[:2])}, as action's, got {list(reward.shape)}")
        if len(obs) != len(action) + 1:
            raise ValueError(f"obs must have {len(action) + 1} steps, one more than action, got {len(obs)}")
        path = self.path(obs, action, noise, observed)
        seen, paid = self.decode(path, action)
        std = self.log_std.exp()
        log_obs = _log_normal(obs, seen, std[:-1]).sum((0, 2))
        return Elbo(log_obs + _log_normal(reward, paid, std[-1]).sum(0), path.kl)

    def path(self, obs: Tensor, action: Tensor, noise: Tensor, observed: int | None = None) -> LatentPath:
        """Latent states at the actions, inferred from the first ``observed`` observations; arguments as ``elbo``'s.

        ``obs`` may end earlier than the path, but not before ``observed``.
        """
        observed = len(obs) if observed is None else observed
        self._check(obs, action, noise, observed)
        x_noise, p_noise, *draws = noise.unbind()
        memory = self.encoder(torch.cat([obs[0], torch.zeros_like(action[0])], 1))
        mean, std = _gaussian(self.start(memory))
        kl = _kl_from_standard(mean, std)
        x, p = (mean + std * torch.cat([x_noise, p_noise], 1)).chunk(2, 1)
        positions, velocities = [x], [p]
        for t, draw in enumerate(draws):
            if t + 1 < observed:
                memory = self.encoder(torch.cat([obs[t + 1], action[t]], 1), memory)
                mean, std = _gaussian(self.correction(torch.cat([memory, x, p], 1)))
                kl = kl + _kl_from_standard(mean, std)
                draw = mean + std * draw
            x, p = self.transition(x, p, draw.unsqueeze(0), action[t])
            positions.append(x)
            velocities.append(p)
        return LatentPath(torch.stack(positions), torch.stack(velocities), kl)

    def decode(self, path: LatentPath, action: Tensor) -> tuple[Tensor, Tensor]:
        """Means of observations [L, B, O] and of rewards [L - 1, B] along a path, given its actions [L - 1, B, A]."""
        state = torch.cat([path.position, path.velocity], 2)
        return self.decoder(state), self.reward_head(torch.cat([state[1:], action], 2)).squeeze(2)

    def predict(self, obs: Tensor, action: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What follows a history: K observations [K, B, O] and rewards [K, B].

        Args:
            obs: the history, [H, B, O].
            action: the H - 1 actions of the history and the K that follow, [H - 1 + K, B, A].
            noise: standard normal, [H + K + 1, B, D], for a sample of the model; None for the path without noise, which
                for a linear force is the mean path.

        Raises:
            ValueError: on other shapes, or without an action that follows the history.
        """
        if action.ndim != 3 or len(action) < len(obs):
            raise ValueError(
                f"action must have shape [H - 1 + K, B, {self.action_dim}] with H = {len(obs)} and K at least 1, got "
                f"{list(action.shape)}; give the actions that follow the history, too"
            )
        if noise is None:
            noise = obs.new_zeros(len(action) + 2, action.shape[1], self.latent_dim)
        seen, paid = self.decode(self.path(obs, action, noise), action)
        return seen[len(obs) :], paid[len(obs) - 1 :]

    def _check(self, obs: Tensor, action: Tensor, noise: Tensor, observed: int) -> None:
        if action.ndim != 3 or action.shape[0] < 1 or action.shape[2] != self.action_dim:
            raise ValueError(f"action must have shape [L - 1, B, {self.action_dim}], L >= 2, got {list(action.shape)}")
        length, rows = action.shape[0] + 1, action.shape[1]
        if obs.ndim != 3 or obs.shape[1:] != (rows, self.obs_dim) or not 1 <= len(obs) <= length:
            raise ValueError(f"obs must have shape [{length}, {rows}, {self.obs_dim}], got {list(obs.shape)}")
        if noise.shape != (length + 1, rows, self.latent_dim):
            raise ValueError(
                f"noise must have shape [{length + 1}, {rows}, {self.latent_dim}], got {list(noise.shape)}: two for "
                "the start and one for every action"
            )
        if not 1 <= observed <= len(obs):
            raise ValueError(f"observed must be 1 to {len(obs)}, the observations that there are, got {observed}")


def _network(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


def _gaussian(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation; the latter is above 0.001."""
    mean, spread = raw.chunk(2, -1)
    return mean, F.softplus(spread) + 1e-3


def _kl_from_standard(mean: Tensor, std: Tensor) -> Tensor:
    """KL of N(mean, std^2) from N(0, 1), summed over the last axis."""
    return (0.5 * (mean.square() + std.square() - 1) - std.log()).sum(-1)


def _log_normal(value: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log density of N(mean, std^2), elementwise."""
    return -0.5 * ((value - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
