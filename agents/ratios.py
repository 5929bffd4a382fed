"""Importance ratios of flow policies: how much more likely a policy makes the (z, action) that was drawn.

All of them condition on z. p(z) is part of the sampled object, so ``E[ratio * advantage]`` over (z, action) is
unbiased, and a base that is learned contributes its own exact factor ``p(z | s) / p_old(z | s)``.

A ratio is asked twice. `record` runs once per rollout, while the policy still is the one that acted, and adds to the
batch what only that policy knows. `terms` runs in every minibatch, with gradient.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..dynamics.ode import SOLVERS
from .flow_policy import FlowActor
from .networks import gaussian_kl, gaussian_log_prob
from .rollout import Batch


class RatioTerms(NamedTuple):
    """What the losses need of a ratio."""

    log_ratio: Tensor  # [B], in nats
    kl: Tensor  # [B], in nats: KL(old || new) of the virtual policy whose ratio this is
    velocity: Tensor | None = None  # [B, D]: v(t, x_t) where the ratio evaluates it, for the regularizers to share


class Ratio(Protocol):
    """Strategy that compares the policy with the one that acted."""

    def record(self, actor: FlowActor, batch: Batch) -> Batch:
        """Add what `terms` needs; called with the weights that acted."""
        ...

    def terms(self, actor: FlowActor, batch: Batch) -> RatioTerms:
        """Log-ratio and KL of `actor` against the policy that acted; both 0 while they are the same."""
        ...


def _terms(actor: FlowActor, batch: Batch, shift: Tensor) -> RatioTerms:
    """Ratio and KL of a policy whose flow ends `shift` [B, D] away from x1: Gaussians in z and in the action."""
    noise, log_std = batch["action"] - batch["x1"], actor.noise_log_std()
    mean, base_log_std = actor.base(batch["obs"])
    log_ratio = gaussian_log_prob(noise, shift, log_std) - gaussian_log_prob(noise, 0.0, batch["log_std"])
    log_ratio = log_ratio + gaussian_log_prob(batch["z"], mean, base_log_std)
    log_ratio = log_ratio - gaussian_log_prob(batch["z"], batch["base_mean"], batch["base_log_std"])
    kl = gaussian_kl(torch.zeros_like(shift), batch["log_std"], shift, log_std)
    kl = kl + gaussian_kl(batch["base_mean"], batch["base_log_std"], mean, base_log_std)
    return RatioTerms(log_ratio, kl)


def interpolate(batch: Batch) -> Tensor:
    """The point x_t = (1 - t) z + t x1 of the chord, [B, D] (section 3 of the paper)."""
    return torch.lerp(batch["z"], batch["x1"], batch["t"].unsqueeze(-1))


def quadrature(actor: FlowActor) -> tuple[list[float], list[float]]:
    """Times ``(k + c_i) / steps`` of the solver's quadrature and weights ``b_i / steps``, without those of weight 0."""
    tableau, steps = SOLVERS[actor.solver], actor.solver_steps
    nodes = [(k + c) / steps for k in range(steps) for b, c in zip(tableau.b, tableau.c, strict=True) if b > 0]
    return nodes, [b / steps for _ in range(steps) for b in tableau.b if b > 0]


@torch.no_grad()
def record_velocities(actor: FlowActor, batch: Batch) -> Batch:
    """Add the acting policy's velocities at all M times of the quadrature: v_nodes [B, M, D] on the chord."""
    times = [batch["z"].new_full((len(batch["z"]),), t) for t in quadrature(actor)[0]]
    return batch | {
        "v_nodes": torch.stack([actor.field(t, interpolate(batch | {"t": t}), batch["obs"]) for t in times], 1)
    }


def draw_interpolation(actor: FlowActor, batch: Batch, generator: torch.Generator) -> Batch:
    """Replace the velocities at all times by those at one per sample: flow time t [B] and velocity v_old [B, D].

    t is drawn with the weights of the solver's quadrature, so that ``E_t[dv]`` is the endpoint's shift to zeroth order
    in the Jacobian, for any solver.
    """
    times, weights = (batch["z"].new_tensor(values) for values in quadrature(actor))
    index = torch.multinomial(weights, len(batch["z"]), replacement=True, generator=generator)
    v_old = batch["v_nodes"][torch.arange(len(index), device=index.device), index]
    return {name: value for name, value in batch.items() if name != "v_nodes"} | {"t": times[index], "v_old": v_old}


class InterpolationRatio:
    """PolicyFlow's ratio: the endpoint's shift is taken to be dv = v - v_old at one point of the chord.

    ``rho = N(noise; dv, std^2) / N(noise; 0, std_old^2)`` times the base's factor (arXiv 2602.01156, section 3).
    Exact when the field depends on the observation alone; otherwise biased, the more so the larger |dv/dx| is
    (`docs/policyflow.md`). One field evaluation per minibatch, whatever the solver.
    """

    def record(self, actor: FlowActor, batch: Batch) -> Batch:
        """Add the velocities, of which `draw_interpolation` chooses one per sample and epoch."""
        return record_velocities(actor, batch)

    def terms(self, actor: FlowActor, batch: Batch) -> RatioTerms:
        """Log-ratio and KL at the recorded point."""
        velocity = actor.field(batch["t"], interpolate(batch), batch["obs"])
        return _terms(actor, batch, velocity - batch["v_old"])._replace(velocity=velocity)


class EndpointRatio:
    """The exact ratio given z: the flow is integrated again, with gradient through every step of the solver.

    ``rho = N(action; phi_1(z), std^2) / N(action; x1, std_old^2)`` times the base's factor. Costs as many field
    evaluations as a rollout step.
    """

    def record(self, actor: FlowActor, batch: Batch) -> Batch:
        """Nothing to add: z, x1 and the action suffice."""
        del actor
        return batch

    def terms(self, actor: FlowActor, batch: Batch) -> RatioTerms:
        """Log-ratio and KL through the solver."""
        return _terms(actor, batch, actor.flow(batch["z"], batch["obs"]) - batch["x1"])


RATIOS: dict[str, type[Ratio]] = {"interpolation": InterpolationRatio, "endpoint": EndpointRatio}
