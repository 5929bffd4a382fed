"""Functions of the user: how the task ends, what is known of its step. They get copies, and are checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...dynamics.transition_base import TransitionModel
from .config import LipschitzMBPOConfig
from .replay import TransitionRing

Rule: TypeAlias = Callable[[Tensor], Tensor]
"""Next observations [B, O] -> whether the episode terminates there, bool [B]."""

KnownStep: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""obs [B, O], action [B, A] in the environment's units -> what is known of next_obs, [B, O]; differentiable."""


@dataclass(frozen=True)
class UsersRule:
    """A rule of the user, which gets copies: what it is given lies in the replay buffer."""

    rule: Rule

    def __call__(self, next_obs: Tensor) -> Tensor:
        """See `Rule`; raises ValueError if what comes back is none."""
        ended = self.rule(next_obs.clone())
        if ended.dtype is not torch.bool or ended.shape != next_obs.shape[:1]:
            got = f"{ended.dtype} {list(ended.shape)}"
            raise ValueError(f"terminated: got {got} from the rule, expected torch.bool [{len(next_obs)}]")
        return ended


@dataclass(frozen=True)
class UsersStep:
    """A step that the user knows, which gets copies and, in place of actions in [-1, 1], the environment's."""

    step: KnownStep
    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, step: KnownStep | None, space: Any) -> UsersStep | None:
        """For a Box of actions; None without a step."""
        return None if step is None else cls(step, *(tuple(each.ravel().tolist()) for each in (space.low, space.high)))

    def __call__(self, obs: Tensor, action: Tensor) -> Tensor:
        """See `KnownStep`."""
        low, high = action.new_tensor(self.low), action.new_tensor(self.high)
        return self.step(obs.clone(), low + (action + 1) / 2 * (high - low))


MAY_DISAGREE = 0.02
"""Share of ends on which a termination rule and the environment may disagree: what rounding at its edge explains."""


def check_functions(config: LipschitzMBPOConfig, terminated: Rule | None, known_step: KnownStep | None) -> None:
    """Raise ValueError if a function of the user would change nothing."""
    without_model = "model='none'" if config.model == "none" else ""
    no_rule = f"termination={config.termination!r}" if config.termination in ("learned", "never") else without_model
    for name, given, off in (("terminated", terminated, no_rule), ("known_step", known_step, without_model)):
        if given is not None and off:
            raise ValueError(f"{name}: got a function, which changes nothing with {off}")


def check_ends(choice: str, given: Rule | None, rule: Rule | None, learns_end: bool) -> None:
    """Raise ValueError unless model rollouts can end as the Config and the user say, by what the model has learned."""
    if choice == "learned" and not learns_end:
        raise ValueError("termination: got learned, but the agent's model has not learned it; make another agent")
    if learns_end and rule is not None and (given is not None or choice != "auto"):
        raise ValueError("termination: got a rule, but the agent's model has learned how episodes end; leave it out")


def check_step(model: TransitionModel, step: UsersStep | None, knew: bool) -> None:
    """Raise ValueError unless a model has the step that the agent has, and had (`knew`) when it was made."""
    if step is not None and not knew:
        raise ValueError("known_step: got a function, but the agent was made without one; make another agent")
    made_with("known_step", model.settings.known_step == step and knew == (step is not None))


def made_with(name: str, there: bool) -> None:
    """Raise ValueError if the function that the model was made with is not there; files hold no functions."""
    if not there:
        raise ValueError(
            f"{name}: got no such function as the agent was made with; load(..., custom_objects={{{name!r}: function}})"
        )


def check_rule(rule: Rule, real: TransitionRing, choice: str) -> None:
    """Compare the rule that ends model rollouts with how the environment's own transitions ended.

    Args:
        rule: the rule.
        real: transitions of the environment.
        choice: the Config's termination.

    Raises:
        ValueError: if they disagree more often than numbers at the edge of the rule explain.
    """
    seen = real.all()
    found, expected = seen.terminated > 0, rule(seen.next_obs)
    wrong, ends = int((found != expected).sum()), int((found | expected).sum())
    if wrong > MAY_DISAGREE * ends + 2:
        raise ValueError(
            f"termination: got {choice}, whose rule disagrees with the environment on {wrong} of {len(found)} "
            f"transitions ({int(found.sum())} ended, the rule ends {int(expected.sum())}); make an agent with learned"
        )
