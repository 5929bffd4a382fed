"""What determines a run, of its options: preset, file, flags."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Collection, Mapping
from typing import Any

from ..agents.common.config import without_inert
from ..agents.registry import AGENTS, AgentSpec
from ..agents.storage.datasets import lasting_name
from ..envs import parse_env_kwargs
from ..envs.known import full_id
from ..runs.folder import RunSettings, check_device
from ..runs.trackers import check_tracker
from .arguments import Arguments
from .config_file import ConfigFile

CHECKPOINTS, LONGEST_INTERVAL = 10, 100_000
"""By default so many in a run, and never farther apart: a killed run of an agent that takes few steps keeps most."""


def defaults_of(entry: AgentSpec, env: str, preset_name: str, preset: Mapping[str, Any], file: ConfigFile) -> Arguments:
    """The options as they are where no flag is given: the file's in place of the preset's.

    Args:
        entry: the agent's.
        env: Gymnasium id.
        preset_name: of the preset.
        preset: what it sets for the environment.
        file: options that come after it.

    Raises:
        ValueError: if a value is outside its range.
    """
    run = {name: preset[name] for name in ("n_envs", "total_timesteps") if name in preset}
    fields = {name: value for name, value in preset.items() if name not in run}
    run |= {**file.run, "env": env, "preset": preset_name}
    return Arguments(config=entry.config(**fields | dict(file.fields)), **run)


def default_interval(total_timesteps: int) -> int:
    """Environment steps between two checkpoints where nobody says how many."""
    return max(1, min(total_timesteps // CHECKPOINTS, LONGEST_INTERVAL))


def settings_of(name: str, arguments: Arguments, chosen: Collection[str]) -> RunSettings:
    """What determines the run, or one of the group's runs.

    Args:
        name: the agent.
        arguments: all options.
        chosen: the names of those that somebody wrote down, so that they have to mean something.

    Raises:
        ValueError: if an option is outside its range or changes nothing, or there is no such device.
    """
    if "eval_episodes" in chosen and arguments.eval_interval is None:
        raise ValueError(f"eval_episodes: got {arguments.eval_episodes}, which changes nothing without eval_interval")
    check_device(arguments.device)
    check_tracker(arguments.track)
    _check_pretraining(name, arguments, chosen)
    interval = arguments.checkpoint_interval
    if interval is None:
        interval = default_interval(arguments.total_timesteps)
    return RunSettings(
        agent=name,
        env_id=arguments.env,
        env_kwargs=parse_env_kwargs(arguments.env_kwargs),
        n_envs=arguments.n_envs,
        seed=secrets.randbelow(2**31) if arguments.seed is None else arguments.seed,
        total_timesteps=arguments.total_timesteps,
        checkpoint_interval=interval,
        device=arguments.device,
        threads=arguments.threads,
        config=dataclasses.asdict(arguments.config),
        keep_checkpoints=arguments.keep_checkpoints,
        backend=arguments.backend,
        warp_solver=arguments.warp_solver,
        warp_contacts=arguments.warp_contacts,
        warp_constraints=arguments.warp_constraints,
        worker_timeout=arguments.worker_timeout,
        worker_restarts=arguments.worker_restarts,
        eval_interval=arguments.eval_interval,
        eval_episodes=arguments.eval_episodes,
        track=arguments.track,
        demonstrations=None if arguments.demonstrations is None else lasting_name(arguments.demonstrations),
        demonstration_keys=list(arguments.demonstration_keys),
        demonstration_return=arguments.demonstration_return,
        pretrain_steps=arguments.pretrain_steps,
        pretrain_batch_size=arguments.pretrain_batch_size,
        pretrain_learning_rate=arguments.pretrain_learning_rate,
    )


def settings_of_file(file: ConfigFile) -> RunSettings:
    """What determines the run of a file's options alone, with those of its preset.

    Raises:
        ValueError: if an option is outside its range or changes nothing.
    """
    name = str(file.agent)
    entry = AGENTS[name]
    env = full_id(file.run.get("env", entry.default_env))
    preset_name = file.run.get("preset") or entry.default_preset(file.run.get("pretrain_steps"))
    preset = entry.preset(env, preset_name)
    arguments = defaults_of(entry, env, preset_name, preset, file)
    config = without_inert(arguments.config, file.chosen)
    return settings_of(name, dataclasses.replace(arguments, config=config), file.chosen)


def _check_pretraining(name: str, arguments: Arguments, chosen: Collection[str]) -> None:
    """Refuse demonstrations that nothing learns from, and options of pretraining without it."""
    if arguments.demonstrations is None:
        for option in ("pretrain_steps", "demonstration_keys", "pretrain_batch_size", "pretrain_learning_rate"):
            if option in chosen and (got := getattr(arguments, option)):
                raise ValueError(f"{option}: got {got}, which changes nothing without demonstrations")
        if (least := arguments.demonstration_return) is not None:
            raise ValueError(f"demonstration_return: got {least}, which changes nothing without demonstrations")
        if got := getattr(arguments.config, "bc_coef", 0):
            raise ValueError(f"bc_coef: got {got} without demonstrations; name them, --demonstrations DATA")
        return
    if not hasattr(AGENTS[name].agent, "pretrain"):
        raise ValueError(f"demonstrations: got them for {name}, which cannot learn from them; use policyflow")
    if (least := arguments.demonstration_return) is not None and not arguments.config.bc_coef:
        raise ValueError(f"demonstration_return: got {least}, which changes nothing without bc_coef above 0")
    if not arguments.pretrain_steps and not arguments.config.bc_coef:
        raise ValueError("demonstrations: got them, which change nothing without pretrain_steps or bc_coef above 0")
    for option in ("pretrain_batch_size", "pretrain_learning_rate"):
        if option in chosen and not arguments.pretrain_steps:
            got = getattr(arguments, option)
            raise ValueError(f"{option}: got {got}, which changes nothing without pretrain_steps above 0")
