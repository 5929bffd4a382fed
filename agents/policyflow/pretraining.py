"""Pretraining of a flow policy on demonstrations: conditional flow matching, and the controls by the same loop.

The field learns to carry the policy's own base to the demonstrated actions (Lipman et al., arXiv 2210.02747)::

    loss = E |v(t, (1 - t) z + t a, s) - (a - z)|^2,   z ~ p(z | s), t ~ U(0, 1)

A Gaussian policy (base_std 0) and a mixture of Gaussians maximise the likelihood of the actions, and so learn their
noise, too. Observations are standardised by the statistics of the demonstrations, which from then on stay as they are.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...dynamics.fitting import warmed_up
from ...dynamics.ode import odeint
from ...dynamics.paths import LINEAR, flow_matching_loss
from ..common.config import validate
from ..common.demonstrations import Demonstrations
from .gaussians import mixture_log_prob
from .policy import FlowActor, FlowPolicy


class Expert(NamedTuple):
    """Demonstrated actions with the noise of their loss; first axis B."""

    obs: Tensor  # normalised, [B, O]
    action: Tensor  # normalised action units, [B, D]
    base: Tensor  # standard normals, [B, D]
    time: Tensor  # uniform in [0, 1), [B]
    demonstrated: Tensor | None = None  # which of the actions were, bool [B, D]; None: all


class Steps(NamedTuple):
    """What is demonstrated, as tensors; first axis M."""

    obs: Tensor  # [M, O]
    action: Tensor  # normalised action units, [M, D]
    demonstrated: Tensor | None  # as of `Expert`

    @classmethod
    def of(cls, policy: FlowPolicy, data: Demonstrations) -> Steps:
        """Steps of demonstrations with their raw observations, on the policy's device."""
        parts = (data.observations, data.actions, data.demonstrated)
        obs, actions, demonstrated = (
            None if each is None else torch.as_tensor(each, device=policy.device) for each in parts
        )
        assert obs is not None and actions is not None
        return cls(obs, policy.to_normalised(actions), demonstrated)

    @torch.no_grad()
    def normalised(self, policy: FlowPolicy) -> Steps:
        """The same with normalised observations."""
        return self._replace(obs=policy.obs_norm(self.obs))

    def rows(self, rows: Tensor) -> Steps:
        """The chosen ones."""
        return Steps(*(None if each is None else each[rows] for each in self))  # type: ignore[arg-type]

    def with_noise(self, generator: torch.Generator) -> Expert:
        """The same with noise drawn for their loss."""
        base = torch.randn(self.action.shape, generator=generator, device=self.action.device)
        time = torch.rand(len(base), generator=generator, device=base.device)
        return Expert(self.obs, self.action, base, time, self.demonstrated)


def imitation_loss(actor: FlowActor, expert: Expert) -> Tensor:
    """What a policy minimises to act as demonstrated, a scalar.

    Of a flow the flow-matching loss (the base is held fixed in it), of a Gaussian policy and of a mixture the negative
    log-density, each the mean over demonstrated action dimensions.
    """
    obs, action, known = expert.obs, expert.action, expert.demonstrated
    if actor.has_latent:
        mean, log_std = (each.detach() for each in actor.base(obs))
        z = mean + log_std.exp() * expert.base
        loss = flow_matching_loss(actor.field, LINEAR, z, action, expert.time, obs, mask=known)
    else:
        loss = -mixture_log_prob(action, actor.mixture(obs), actor.noise_log_std(), known)
    return loss.mean() / action.shape[1] if known is None else loss.sum() / known.sum()


@dataclass(frozen=True)
class PretrainSettings:
    """How a policy is pretrained.

    Args:
        steps: gradient updates at most, >= 1.
        batch_size: demonstrated steps per update, >= 1.
        learning_rate: AdamW's at the beginning, > 0; it falls to 0 by half a cosine over all the steps.
        ema_decay: of the weight average that is kept, in [0, 1).
        validation_share: share of the episodes held out, in (0, 1); at least one.
        interval: updates between two looks at the validation loss, >= 1.
        patience: end after so many looks without a better loss, >= 1.

    Raises:
        ValueError: if one is outside its range.
    """

    steps: int
    batch_size: int = 512
    learning_rate: float = 1e-2
    ema_decay: float = 0.995
    validation_share: float = 0.1
    interval: int = 250
    patience: int = 20

    def __post_init__(self) -> None:
        ranges = {
            "an integer of at least 1": "steps batch_size interval patience",
            "a number above 0": "learning_rate",
            "a number in [0, 1)": "ema_decay",
            "a number in (0, 1)": "validation_share",
        }
        validate(self, ranges)

    def rate(self, step: int) -> float:
        """Learning rate of an update."""
        return 0.5 * self.learning_rate * (1 + math.cos(math.pi * step / self.steps))


_VALIDATED = 4096
"""Rows, at most, of which the validation loss is the mean."""
_SAMPLED, _EXACT_STEPS = 512, 40
"""Rows of which the solver's error is measured, and the steps of RK4 that it is measured by."""
_LARGE_ERROR, _LOUD = 0.25, 0.5
"""Error of the solver, and share of the noise in the spread of the demonstrated actions, that are worth a warning."""


class Pretraining:
    """A pretraining on its way: `advance` until it is over, then `finish`.

    The policy itself stays as it is until then, but for its observation statistics.

    Args:
        policy: what to train.
        data: demonstrations.
        settings: how.
        seed: of the split, the batches and the noise.
        frozen: names of the actor's parameters that stay as they are.

    Raises:
        ValueError: if nothing learns.
    """

    def __init__(
        self, policy: FlowPolicy, data: Demonstrations, settings: PretrainSettings, seed: int,
        frozen: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.policy, self.settings, device = policy, settings, policy.device
        rest, held_out = data.split(settings.validation_share, np.random.default_rng(seed))
        self.learner = copy.deepcopy(policy.actor).requires_grad_(False)
        # A base that is learned starts from where it was set: fine-tuning moves it.
        learning = ("field.",) if self.learner.has_latent else ("field.", "points.", "log_std")
        names = [name for name, _ in self.learner.named_parameters() if name not in frozen]
        self._names = [name for prefix in learning for name in names if name.startswith(prefix)]
        if not self._names:
            raise ValueError("pretraining: got weights that are all frozen, expected one at least that learns")
        policy.obs_norm.reset()  # from here on nothing is refused: a refusal leaves the policy as it was
        obs = torch.as_tensor(data.observations, device=device)
        policy.obs_norm.update(obs)
        # What is the same in all demonstrations does not say how much it may vary: it stays in its own unit.
        policy.obs_norm.scale[(obs == obs[0]).all(0)] = 1.0
        self._steps = Steps.of(policy, rest).normalised(policy)
        self._weights = [self.learner.get_parameter(name).requires_grad_(True) for name in self._names]
        self._average = copy.deepcopy(self.learner).requires_grad_(False)
        self._averages = [self._average.get_parameter(name) for name in self._names]
        self.optimizer = torch.optim.AdamW(
            self._weights, lr=settings.learning_rate, weight_decay=0.0, eps=1e-5, fused=True
        )
        self._generator = torch.Generator(device)
        self._generator.manual_seed(seed)
        self.step = self._since = 0
        self._held_out = self._held_out_rows(Steps.of(policy, held_out).normalised(policy), seed)
        self.validation_loss = self.best_loss = self._validate()
        self._best = [each.clone() for each in self._averages]

    def _held_out_rows(self, steps: Steps, seed: int) -> Expert:
        """Rows of the episodes held out, spread over them, always with the same noise."""
        number, device = len(steps.obs), steps.obs.device
        generator = torch.Generator(device).manual_seed(seed + 1)
        repeats = max(1, _VALIDATED // number)  # few rows get several draws of the noise each
        rows = torch.arange(0, number, -(-number // _VALIDATED), device=device).repeat(repeats)
        return steps.rows(rows).with_noise(generator)

    @property
    def is_over(self) -> bool:
        """Whether all updates are made, or patience is at its end."""
        return self.step >= self.settings.steps or self._since >= self.settings.patience

    def advance(self) -> dict[str, float]:
        """Update until the next look at the validation loss; returns what is to be logged."""
        settings, losses, generator = self.settings, list[Tensor](), self._generator
        number, device = len(self._steps.obs), self._steps.obs.device
        for _ in range(min(settings.interval, settings.steps - self.step)):
            rows = torch.randint(number, (settings.batch_size,), generator=generator, device=device)
            loss = imitation_loss(self.learner, self._steps.rows(rows).with_noise(generator))
            self.optimizer.param_groups[0]["lr"] = settings.rate(self.step)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1
            decay = warmed_up(settings.ema_decay, self.step)
            with torch.no_grad():
                for average, each in zip(self._averages, self._weights, strict=True):
                    average.lerp_(each, 1 - decay)
            losses.append(loss.detach())
        mean = torch.stack(losses).mean().item()
        self.validation_loss = self._validate()
        if not (math.isfinite(mean) and math.isfinite(self.validation_loss)):
            raise ValueError(f"pretraining: got a loss of {mean} at update {self.step}; lower the learning rate")
        self._since += 1
        if self.validation_loss < self.best_loss:
            self.best_loss, self._since = self.validation_loss, 0
            self._best = [each.clone() for each in self._averages]
        return {"pretrain/loss": mean, "pretrain/validation_loss": self.validation_loss}

    @torch.no_grad()
    def _validate(self) -> float:
        return imitation_loss(self._average, self._held_out).item()

    @torch.no_grad()
    def finish(self) -> None:
        """Give the policy, and its own weight average, the best weights."""
        for actor in filter(None, (self.policy.actor, self.policy.averaged_actor)):
            for name, best in zip(self._names, self._best, strict=True):
                actor.get_parameter(name).copy_(best)

    def check_solver(self) -> float:
        """`solver_error` of the weights kept; warns where samples are not what was learned.

        The validation loss sees neither the solver nor the noise.
        """
        actor, held_out = self.policy.actor, self._held_out
        if not actor.has_latent:  # they learned with their own steps, and their noise
            return 0.0
        error = solver_error(actor, held_out.obs[:_SAMPLED], held_out.base[:_SAMPLED])
        if error > _LARGE_ERROR:
            steps = f"{actor.solver_steps} step{'s' if actor.solver_steps > 1 else ''} of {actor.solver}"
            advice = "raise solver_steps, or take a wider base (base standard, base_std 1)"
            text = f"pretraining: {steps} miss what the flow has learned by {error:.0%} of the spread of its actions"
            warnings.warn(f"{text}; {advice}", UserWarning, stacklevel=3)
        noise, spread = actor.noise_log_std().exp(), self._steps.action.std(0)
        if ((noise > _LOUD * spread) & (spread > 0)).any():
            largest = noise.max().item()
            text = f"pretraining: a flow learns no noise, and action_std adds some of {largest:.2g} to its actions"
            warnings.warn(
                f"{text}, which are demonstrated with a spread of {spread.min():.2g}", UserWarning, stacklevel=3
            )
        return error

    def state(self) -> dict[str, Any]:
        """All that `set_state` needs to go on."""
        return {
            "step": self.step, "since": self._since, "best_loss": self.best_loss,
            "validation_loss": self.validation_loss, "weights": [each.detach().clone() for each in self._weights],
            "averages": list(self._averages), "best": self._best, "optimizer": self.optimizer.state_dict(),
            "generator": self._generator.get_state(), "device": self._steps.obs.device.type,
        }  # fmt: skip

    @torch.no_grad()
    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was called, with the same policy, data and settings.

        On another kind of device with other random numbers.
        """
        self.step, self._since = state["step"], state["since"]
        self.best_loss, self.validation_loss = state["best_loss"], state["validation_loss"]
        for mine, saved in ((self._weights, state["weights"]), (self._averages, state["averages"])):
            for each, value in zip(mine, saved, strict=True):
                each.copy_(value)
        device = self._steps.obs.device
        self._best = [each.to(device) for each in state["best"]]
        self.optimizer.load_state_dict(state["optimizer"])
        if state.get("device", device.type) == device.type:
            self._generator.set_state(state["generator"])


class PretrainResult(NamedTuple):
    """What a pretraining came to."""

    steps: int  # updates made
    validation_loss: float  # of the weights that were kept: the best
    solver_error: float = 0.0  # see `solver_error`


@torch.no_grad()
def solver_error(actor: FlowActor, obs: Tensor, noise: Tensor) -> float:
    """How far a flow's samples are from those of exact integration, over the spread of the latter.

    Root mean squares: 0 is exact, and above some 0.25 the actions are visibly others than those that were learned.

    Args:
        actor: with a base that has a density.
        obs: normalised observations, [B, O].
        noise: standard normals of the base, [B, D].
    """
    mean, log_std = actor.base(obs)
    z = mean + log_std.exp() * noise
    exact = odeint(actor.field, z, steps=_EXACT_STEPS, solver="rk4", cond=obs)
    spread = exact.var(0).mean().sqrt().clamp_min(1e-3)
    return ((actor.flow(z, obs) - exact).square().mean().sqrt() / spread).item()


Follow = Callable[[Pretraining, dict[str, float]], None]
"""Called with a pretraining after each look at its validation loss, and with what is to be logged; may raise."""
