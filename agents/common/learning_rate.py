"""The learning rate of an agent, as a number, a course or a function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule


class LearningRate(BaseAlgorithm):
    """The learning rate of an agent: a number of its Config, by the course that lr_schedule names, or a function.

    A function of what remains of training (1 to 0) makes the Config's lr_schedule "function". Either is read and set as
    `learning_rate` or `lr_schedule`.
    """

    config: Any
    _rate: float
    """The present rate, where lr_schedule adapts it."""
    _assign: Callable[[str, Any, Any], None]  # of `Configured`

    @property
    def learning_rate(self) -> float | Schedule:
        """The Config's number, or the function in use."""
        function: Schedule | None = vars(self).get("learning_rate")
        rate: float = self.config.learning_rate
        return rate if function is None else function

    @learning_rate.setter
    def learning_rate(self, value: float | Schedule) -> None:
        fields = rate_fields(value, self.config)
        if fields.get("lr_schedule") == "function":
            vars(self)["learning_rate"] = value  # below the property: with it, it is saved
        elif vars(self).pop("learning_rate", None) is None and self.config.lr_schedule == "function":
            raise no_function()
        if any(getattr(self.config, name) != each for name, each in fields.items()):
            self.config = dataclasses.replace(self.config, **fields)
        self._rate = self.config.learning_rate

    @property
    def lr_schedule(self) -> Schedule:
        """What remains of training (1 to 0) -> learning rate."""
        return self._rate_at

    @lr_schedule.setter
    def lr_schedule(self, value: Schedule | str) -> None:
        if isinstance(value, str):
            self._assign("lr_schedule", self, value)
        else:
            self.learning_rate = value

    def _rate_at(self, remaining: float) -> float:
        rate, schedule = self.learning_rate, self.config.lr_schedule
        if callable(rate):
            return float(rate(remaining))
        if schedule == "linear":
            return LinearSchedule(rate, 0.0, 1.0)(remaining)
        return self._rate if schedule == "adaptive" else rate

    @property
    def _rate_share(self) -> float:
        """The present learning rate over the highest of all training, at most 1."""
        looks = 100 if self.config.lr_schedule == "function" else 1  # of the others the first one is
        highest = max(self._rate_at(1 - k / looks) for k in range(looks))
        return min(self._rate_at(self._current_progress_remaining) / highest, 1.0) if highest else 1.0

    def _setup_lr_schedule(self) -> None:
        """Nothing to do: `lr_schedule` follows `learning_rate`."""

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)  # the last rollout goes beyond it


def no_function() -> ValueError:
    """The error of a lr_schedule "function" without one."""
    return ValueError("lr_schedule: got 'function', expected learning_rate to be one of what remains (1 to 0)")


def rate_fields(value: Any, config: Any) -> dict[str, Any]:
    """The Config's fields for a learning rate: a number, or a function of what remains of training; None: none.

    Raises:
        ValueError: if the Config's lr_schedule is "function" and there is none.
    """
    if value is None and config.lr_schedule == "function":
        raise no_function()
    if value is None:
        return {}
    if isinstance(value, FloatSchedule):
        value = value.value_schedule
    if isinstance(value, ConstantSchedule):
        return {"learning_rate": value.val, "lr_schedule": "constant"}
    if isinstance(value, LinearSchedule) and (value.end, value.end_fraction) == (0, 1):
        return {"learning_rate": value.start, "lr_schedule": "linear"}
    if callable(value):
        return {"learning_rate": float(value(1.0)), "lr_schedule": "function"}
    return {"learning_rate": value} | ({"lr_schedule": "constant"} if config.lr_schedule == "function" else {})
