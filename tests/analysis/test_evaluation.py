"""What an evaluation says of success: the share of episodes whose last info says so."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from driftrl import PolicyFlow
from driftrl.analysis.evaluation import evaluate_modes, format_table
from driftrl.envs.make import make_vec


class Counted(gymnasium.Env[Any, Any]):
    """Episodes of two steps; the first succeeds and does not count, every fourth of the second does."""

    observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (1,))

    def __init__(self, says: bool = True) -> None:
        self.says, self.episodes, self.steps = says, 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episodes, self.steps = self.episodes + 1, 0
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        info = {"is_success": self.steps == 1 or self.episodes % 4 == 0} if self.says else {}
        return np.zeros(2, dtype=np.float32), 1.0, self.steps == 2, False, info


gymnasium.register("tests/Counted-v0", lambda **kwargs: Counted(**kwargs), max_episode_steps=10)


@pytest.mark.parametrize(("says", "expected"), [(True, 0.25), (False, None)])
def test_success_is_that_of_the_last_step(says: bool, expected: float | None) -> None:
    env_kwargs: dict[str, Any] = {"says": says}
    env = make_vec("tests/Counted-v0", 1, 0, **env_kwargs)
    agent = PolicyFlow("MlpPolicy", env, n_steps=4, batch_size=4, actor_hidden=(8,), critic_hidden=(8,), device="cpu")
    report = evaluate_modes(agent, "tests/Counted-v0", env_kwargs, 40, 0, ["deterministic", "sampled"])
    for mode in ("deterministic", "sampled"):
        assert report[mode].get("success_rate") == expected
        assert (f"{mode}: 25.0% of 40 episodes succeeded" in format_table(report)) == says
