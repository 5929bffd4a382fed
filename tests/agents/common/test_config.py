from typing import Any

import numpy as np
import pytest

from driftrl import PolicyFlow, PolicyFlowConfig


def test_numpy_scalars_are_welcome() -> None:
    fields: dict[str, Any] = {"n_steps": np.int64(16), "batch_size": np.int32(16), "gae_lambda": np.float32(0.9)}
    agent = PolicyFlow("MlpPolicy", "Pendulum-v1", actor_hidden=(np.int64(8),), device="cpu", **fields)
    assert agent.learn(16).num_timesteps == 16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"actor_hidden": 32}, "actor_hidden: got 32, expected positive integers"),
        ({"critic_hidden": "64"}, "critic_hidden: got '64', expected positive integers"),
        ({"n_steps": True}, "n_steps: got True, expected an integer"),
        ({"n_steps": np.float64(64)}, "n_steps: got .*64.0.*, expected an integer"),
        ({"gamma": np.float32("nan")}, "gamma: got .*nan.*, expected a number in"),
        ({"gamma": 1j}, "gamma: got 1j, expected a number in"),
    ],
)
def test_what_is_no_such_number_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyFlowConfig(**fields)
