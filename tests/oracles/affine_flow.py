"""The affine flow, whose gradient, mean and bias of every importance ratio have an answer in closed form.

The field is ``v = A x + b`` and the advantage of an action quadratic: the moments of the actions are known, and so the
expected advantage and its gradient. Beside the exact figures are the estimates by the ratios under test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from driftrl.agents.policyflow.other_ratios import RATIOS
from driftrl.agents.policyflow.policy import FlowActor, FlowNoise
from driftrl.agents.policyflow.ratios import Ratio, Samples, draw_epoch, record_references
from driftrl.dynamics import VelocityField

STEPS, BASE_STD, ACTION_STD, CHAIN_STD = 4, 0.5, 0.3, 0.2
MATRIX = [[-1.0, 2.0], [-2.0, -1.0]]  # contracts and rotates
OFFSET = [0.5, -0.3]
POINTS, LOGITS = [[0.6, -0.4], [-0.5, 0.2], [0.1, 0.7]], [0.3, -0.5, 0.0]  # of the mixture
OF_POINTS = ("points.places", "points.logits.2.bias")
SLOPE, CURVATURE = (1.0, -0.5), (1.0, 0.5)  # of the advantage


class AffineField(VelocityField):
    """``v = A x + b`` with parameters; the observation is ignored."""

    def __init__(self) -> None:
        super().__init__(2, 1)
        self.matrix = nn.Parameter(torch.tensor(MATRIX, dtype=torch.float64))
        self.offset = nn.Parameter(torch.tensor(OFFSET, dtype=torch.float64))

    def forward(self, t: float | Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return x @ self.matrix.T + self.offset


def make_actor(name: str, base: str = "standard", scale: float = 1.0) -> FlowActor:
    """The policy that acts; with the chain's ratios it has noise at every step. `scale` multiplies A."""
    base = "mixture" if name == "mixture" else base
    actor = FlowActor(
        1, 2, hidden=(4,), activation="silu", base=base, base_std=BASE_STD, log_std_init=math.log(ACTION_STD),
        solver="euler", solver_steps=STEPS, chained=name.startswith("chain"), components=len(POINTS),
    ).double()  # fmt: skip
    if actor.points is not None:
        actor.points.places.data.copy_(torch.tensor(POINTS))
        actor.get_parameter("points.logits.2.bias").data.copy_(torch.tensor(LOGITS))
    if actor.chain_log_std is not None:
        actor.chain_log_std.data.fill_(math.log(CHAIN_STD))
    field = AffineField()
    with torch.no_grad():
        field.matrix.mul_(scale)
    actor.field = field  # type: ignore[assignment]
    return actor


def parameters(actor: FlowActor) -> dict[str, nn.Parameter]:
    """What the gradient is taken of: field, action noise, and base, points and chain where they are learned."""
    named = dict(actor.named_parameters())
    names = ("field.matrix", "field.offset", "log_std", "base_log_std", "chain_log_std", *OF_POINTS)
    return {name: named[name] for name in names if name in named and named[name].requires_grad}


def moments(actor: FlowActor) -> tuple[Tensor, Tensor]:
    """Mean [2] and covariance [2, 2] of the actions, differentiable."""
    field = actor.field
    assert isinstance(field, AffineField)
    step = torch.eye(2, dtype=torch.float64) + field.matrix / STEPS
    mean, covariance = torch.zeros(2, dtype=torch.float64), torch.diag(torch.exp(2 * actor.base_log_std))
    if actor.points is not None:
        weight = actor.get_parameter("points.logits.2.bias").softmax(0)  # observations are 0
        mean = weight @ actor.points.places
        covariance = (weight * (actor.points.places - mean).T) @ (actor.points.places - mean)
    for k in range(STEPS):
        mean, covariance = step @ mean + field.offset / STEPS, step @ covariance @ step.T
        if actor.chain_log_std is not None and k < STEPS - 1:
            covariance = covariance + torch.diag(torch.exp(2 * actor.chain_log_std[k]))
    return mean, covariance + torch.diag(torch.exp(2 * actor.log_std))


def entropy(actor: FlowActor) -> Tensor:
    """Differential entropy of the actions, in nats, differentiable."""
    covariance = moments(actor)[1]
    return math.log(2 * math.pi * math.e) + 0.5 * torch.logdet(covariance)


def advantage(action: Tensor) -> Tensor:
    """``slope . a - a^T diag(curvature) a / 2``, [B]."""
    slope, curvature = action.new_tensor(SLOPE), action.new_tensor(CURVATURE)
    return (slope * action - 0.5 * curvature * action.square()).sum(-1)


def expected_advantage(actor: FlowActor) -> Tensor:
    """Its mean over the policy's actions, in closed form."""
    mean, covariance = moments(actor)
    return advantage(mean) - 0.5 * (mean.new_tensor(CURVATURE) * covariance.diagonal()).sum()


@torch.no_grad()
def roll_out(actor: FlowActor, size: int, generator: torch.Generator) -> Samples:
    """Samples as `FlowRollouts` makes them."""
    obs = torch.zeros(size, 1, dtype=torch.float64)
    noise = FlowNoise.of(torch.randn(actor.draws, size, 2, generator=generator, dtype=torch.float64))
    path = noise.path.transpose(0, 1) if actor.path_length else None
    return Samples.drawn(actor, obs, actor.sample(obs, noise), path=path)


def recorded(ratio: Ratio, actor: FlowActor, size: int, generator: torch.Generator) -> Samples:
    """A minibatch of the ratio."""
    references = record_references(actor, ratio, roll_out(actor, size, generator), generator)
    return draw_epoch(actor, ratio, references, generator)


@dataclass(frozen=True)
class Gradient:
    """Exact and estimated policy gradient, by parameter: means [P] over blocks, and their standard errors."""

    exact: dict[str, Tensor]
    estimate: dict[str, Tensor]
    error: dict[str, Tensor]

    def of_field(self, which: dict[str, Tensor]) -> Tensor:
        """The part of one of the above that belongs to A and b, as a vector."""
        return torch.cat([which[name].flatten() for name in ("field.matrix", "field.offset")])

    def cosine(self) -> float:
        """Between exact and estimated gradient of the field."""
        return float(torch.cosine_similarity(self.of_field(self.exact), self.of_field(self.estimate), dim=0))

    def length(self) -> float:
        """Norm of the estimated gradient of the field over that of the exact one."""
        return float(self.of_field(self.estimate).norm() / self.of_field(self.exact).norm())

    def noise(self, size: int) -> float:
        """Standard deviation of one sample's gradient of the field, over the norm of the exact one."""
        return float(self.of_field(self.error).norm() * math.sqrt(size) / self.of_field(self.exact).norm())


def gradient(
    name: str, size: int, *, draws: int = 8, base: str = "standard", scale: float = 1.0, blocks: int = 40
) -> Gradient:
    """Estimate the policy gradient, at the policy that acted, from `size` samples: that of the surrogate."""
    actor, ratio, generator = make_actor(name, base, scale), RATIOS[name](draws), torch.Generator().manual_seed(0)
    learned = parameters(actor)
    value = expected_advantage(actor)
    exact = torch.autograd.grad(value, list(learned.values()))
    parts = []
    for _ in range(blocks):
        batch = recorded(ratio, actor, size // blocks, generator)
        gain = advantage(batch.action) - value.detach()
        objective = -ratio.surrogate(ratio.terms(actor, batch).log_ratio, gain, 0.2)
        parts.append(torch.autograd.grad(objective, list(learned.values()), materialize_grads=True))
    stacked = [torch.stack(each) for each in zip(*parts, strict=True)]
    means = [each.mean(0) for each in stacked]
    errors = [each.std(0) / math.sqrt(blocks) for each in stacked]
    return Gradient(*(dict(zip(learned, each, strict=True)) for each in (exact, means, errors)))


@torch.no_grad()
def move(actor: FlowActor) -> None:
    """A step away from the policy that acted: the KL of the actions is 0.014."""
    field = actor.field
    assert isinstance(field, AffineField)
    field.matrix.add_(torch.tensor([[0.1, -0.1], [0.05, 0.1]], dtype=torch.float64))
    field.offset.add_(torch.tensor([0.05, 0.05], dtype=torch.float64))


@torch.no_grad()
def mean_ratio(name: str, size: int, *, draws: int = 8, blocks: int = 20) -> tuple[float, float]:
    """E[rho] after `move`, and its standard error."""
    ratio, generator, ratios = RATIOS[name](draws), torch.Generator().manual_seed(0), []
    for _ in range(blocks):
        actor = make_actor(name)
        batch = recorded(ratio, actor, size // blocks, generator)
        move(actor)
        ratios.append(ratio.terms(actor, batch).log_ratio.exp().mean())
    stacked = torch.stack(ratios)
    return stacked.mean().item(), stacked.std().item() / math.sqrt(blocks)


def log_density(actor: FlowActor, action: Tensor) -> Tensor:
    """Log-density of actions [B, 2] with z averaged out, in closed form."""
    log_prob: Tensor = torch.distributions.MultivariateNormal(*moments(actor)).log_prob(action)
    return log_prob


@torch.no_grad()
def marginal_bias(draws: int, size: int) -> tuple[float, float]:
    """The log-ratio over `draws` latents against the exact one, after `move`.

    Returns:
        Root mean square error over the root mean square of log(exact); mean error, in nats.
    """
    actor, ratio, generator = make_actor("marginal"), RATIOS["marginal"](draws), torch.Generator().manual_seed(0)
    batch = recorded(ratio, actor, size, generator)
    before = log_density(actor, batch.action)
    move(actor)
    exact = log_density(actor, batch.action) - before
    error = ratio.terms(actor, batch).log_ratio - exact
    return (error.square().mean() / exact.square().mean()).sqrt().item(), error.mean().item()
