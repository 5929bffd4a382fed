"""The state of a run beside its agent: with it a run that goes on is the one that was never interrupted."""

from __future__ import annotations

import random
from typing import Any, cast

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv

from .saving import Checkpointed
from .values import CheckpointError


def capture(agent: Checkpointed) -> dict[str, Any]:
    """All that training goes on from and `save` leaves out; taken between an update and the next rollout.

    Replay, imagined transitions, noise with memory, random generators, environments that can tell their state (those
    of `BatchVecEnv`), and what was recorded for the log but not yet written.
    """
    log, env = agent.logger, agent.get_env()
    return {
        "training": agent.training_state(),
        "environments": env.get_state() if tells_its_state(env) else None,  # type: ignore[union-attr]
        "random": {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if agent.device.type == "cuda" else [],
            "action_space": agent.action_space.np_random.bit_generator.state,
        },
        "log": [dict(log.name_to_value), dict(log.name_to_count), dict(log.name_to_excluded)],
    }


def restore(agent: Checkpointed, state: dict[str, Any]) -> list[str]:
    """Go on from what `capture` returned; right before `learn`, with the agent's environments and logger set.

    Returns:
        What could not be restored, in words; nothing where training goes on exactly.

    Raises:
        CheckpointError: if it is none of this agent's.
    """
    try:
        return _restore(agent, state)
    except Exception as error:  # whatever data of other kinds and sizes lead to
        raise CheckpointError(f"the checkpoint holds no state of a run of this agent: {error!r}") from error


def _restore(agent: Checkpointed, state: dict[str, Any]) -> list[str]:
    missing, numbers = [], state["random"]
    agent.set_training_state(state["training"])
    env = agent.get_env()
    if state["environments"] is not None and tells_its_state(env):
        cast(Any, env).set_state(state["environments"])
    else:
        missing.append("the environments, which cannot tell their state: they start new episodes")
    if state["training"]["device"] != agent.device.type:
        missing.append(f"the random numbers, which are others on {agent.device.type}")
    random.setstate(numbers["python"])
    np.random.set_state(numbers["numpy"])
    torch.set_rng_state(numbers["torch"])
    if numbers["cuda"] and len(numbers["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(numbers["cuda"])
    agent.action_space.np_random.bit_generator.state = numbers["action_space"]
    log = agent.logger
    for values, saved in zip((log.name_to_value, log.name_to_count, log.name_to_excluded), state["log"], strict=True):
        cast("dict[str, Any]", values).update(saved)
    return missing


def tells_its_state(env: VecEnv | None) -> bool:
    """Whether environments can be put back where they were."""
    return hasattr(env, "get_state") and hasattr(env, "set_state")
