"""What a run trains in."""

from __future__ import annotations

import numpy as np
import pytest

from driftrl.commands.training import make_env
from driftrl.runs.folder import RunSettings


@pytest.mark.parametrize("env_id", ["Hopper-v5", "driftrl/MultiGoal-v0"])
def test_infos_of_a_run_are_those_of_ended_episodes(env_id: str) -> None:
    settings = RunSettings(
        agent="policyflow", env_id=env_id, env_kwargs={}, n_envs=3, seed=0, total_timesteps=1, checkpoint_interval=1,
        device="cpu", threads=1, config={},
    )  # fmt: skip
    env = make_env(settings, 0)
    env.reset()
    ends, shape = 0, env.action_space.shape
    assert shape is not None
    for _ in range(120):
        _, _, dones, infos = env.step(np.ones((3, *shape), np.float32))
        for done, info in zip(dones, infos, strict=True):
            assert ("episode" in info and "terminal_observation" in info and "TimeLimit.truncated" in info) == done
            assert bool(info) == done
        ends += int(dones.sum())
    assert ends > 3
    env.close()
