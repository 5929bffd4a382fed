"""rl_zoo3's ExperimentManager with what differs for our agents: schedules, normalisation, hyperparameters."""

from __future__ import annotations

from typing import Any

from rl_zoo3.exp_manager import ExperimentManager

from .agents import ALGORITHMS

_SCHEDULED = ("learning_rate", "clip_range", "clip_range_vf")
_NORMALIZE = {"norm_obs": "normalize_observation", "norm_reward": "normalize_reward"}


class Manager(ExperimentManager):  # type: ignore[misc]  # rl_zoo3 is not there where types are checked
    """Trains rl_zoo3's agents as it does, and ours by their own hyperparameters."""

    def __init__(self, args: Any, algo: str, *positional: Any, config: str | None = None, **named: Any) -> None:
        self._is_ours = algo in ALGORITHMS
        if self._is_ours and config is None:
            config = f"driftrl.zoo.{algo}"
        super().__init__(args, algo, *positional, config=config, **named)

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The hyperparameters of the environment; `normalize` switches our own normalisers."""
        hyperparams, saved = super().read_hyperparameters()
        if self._is_ours:
            for each in (hyperparams, saved):
                each.update(own_normalization(each.pop("normalize", None), self.algo))
            if "normalize_observation" in saved:
                print(f"normalize: {self.algo} normalizes itself, no VecNormalize is made: {_shown(saved)}")
        return hyperparams, saved

    def _preprocess_schedules(self, hyperparams: dict[str, Any]) -> dict[str, Any]:
        if not self._is_ours:
            return super()._preprocess_schedules(hyperparams)  # type: ignore[no-any-return]
        return own_schedules(hyperparams, self.algo)


def own_normalization(normalize: Any, algo: str) -> dict[str, Any]:
    """The fields of our agents that rl_zoo3's `normalize` stands for.

    Args:
        normalize: None, True, False, or arguments of VecNormalize, as a dictionary or as text `dict(...)`.
        algo: the agent. LipschitzMBPO has no normaliser of rewards, and needs none.

    Raises:
        ValueError: if there is an argument that our normalisers do not have.
    """
    if normalize is None:
        return {}
    if isinstance(normalize, str):
        normalize = eval(normalize, {"dict": dict})  # as rl_zoo3: what it may hold is what a user wrote
    given = normalize if isinstance(normalize, dict) else {name: bool(normalize) for name in _NORMALIZE}
    if wrong := sorted(given.keys() - _NORMALIZE.keys() - {"gamma"}):
        raise ValueError(f"normalize: got {wrong[0]}, expected {' or '.join(_NORMALIZE)}; {algo} normalizes itself")
    fields = {own: bool(given.get(name, True)) for name, own in _NORMALIZE.items()}
    if algo == "mbpo":
        del fields["normalize_reward"]
    return fields


def own_schedules(hyperparams: dict[str, Any], algo: str) -> dict[str, Any]:
    """Hyperparameters with rl_zoo3's schedules as ours: `lin_3e-4` is a learning rate with a linear schedule.

    Raises:
        ValueError: if a value is neither a number nor a schedule that the agent has.
    """
    found = dict(hyperparams)
    for name in _SCHEDULED:
        value = found.get(name)
        if not isinstance(value, str):
            if name == "clip_range_vf" and isinstance(value, int | float) and value < 0:
                found[name] = None  # rl_zoo3's way to say that it is off
            continue
        kind, _, number = value.rpartition("_")
        try:
            found[name] = float(number)
        except ValueError:
            raise ValueError(f"{name}: got {value!r}, expected a number, or such as lin_3e-4") from None
        if kind == "lin" and name == "learning_rate":
            found["lr_schedule"] = "linear"
        elif kind:
            raise ValueError(f"{name}: got {value!r}, expected a number: {algo} has no schedule for it")
    return found


def _shown(saved: dict[str, Any]) -> str:
    return ", ".join(f"{name}={saved[name]}" for name in _NORMALIZE.values() if name in saved)
