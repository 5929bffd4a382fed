"""Train an agent in its run folder: learn, save, evaluate, report; whatever ends it, what was learned is kept."""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecEnv
from tqdm import tqdm

from ..agents.common.ranks import RankError, check_alone, present
from ..agents.registry import AGENTS, policy_alias
from ..agents.storage.files import write_json
from ..agents.storage.saving import Checkpointed, restore
from ..analysis.evaluation import EVALUATION_SEED, evaluate_modes, format_table
from ..envs import make_vec
from ..envs.batch import BatchVecEnv
from ..envs.make import has_time_limit
from ..runs.callbacks import Checkpoints, Follows, Progress, Report, Reports, reported
from ..runs.folder import Resumption, RunSettings, find_checkpoint, has_saved, save_agent
from ..runs.log import messages_shown, open_logger
from ..runs.pretraining import evaluate_pretrained, pretrain, use_demonstrations
from ..runs.signals import StopOnSignal, exit_code
from ..runs.warnings import warn
from .describe import describe_commands
from .errors import output_closed, users_line

_FINAL_EPISODES = 10


def make_env(settings: RunSettings, seed: int | None) -> VecEnv:
    """The environments of a run."""
    names = ("backend", "worker_timeout", "worker_restarts", "warp_solver", "warp_contacts", "warp_constraints")
    how = {name: getattr(settings, name) for name in names}
    if settings.backend in ("tensor", "warp"):
        how["device"] = str(get_device(settings.device))
    env = make_vec(settings.env_id, settings.n_envs, seed, **how, **settings.env_kwargs)
    if isinstance(env, BatchVecEnv):
        env.all_infos = False  # a run's agent and callbacks read those of ended episodes only
    return env


def make_agent(settings: RunSettings, env: VecEnv, config: Any, chosen: Collection[str] = ()) -> Checkpointed:
    """The untrained agent of a run.

    Args:
        settings: of the run.
        env: its environments.
        config: the agent's Config.
        chosen: names of options that somebody wrote down. A batch size that nobody did needs no warning.
    """
    agent = AGENTS[settings.agent].agent
    with warnings.catch_warnings():
        if "batch_size" not in chosen:
            warnings.filterwarnings("ignore", "batch_size: got .* more than the rollout's", UserWarning)
        return agent(policy_alias(env), env, config=config, seed=settings.seed, device=settings.device)


def train(
    agent: Checkpointed, folder: Path | None, settings: RunSettings, found: Resumption | None = None,
    report_to: Report | None = None,
) -> int:  # fmt: skip
    """Train up to the run's total, save, evaluate and say what can be done next; `report_to` hears how it goes.

    Without a folder, as a rank other than 0, only train along.
    """
    torch.set_num_threads(settings.threads)
    if settings.pretrain_steps and not getattr(agent, "is_pretrained", True):
        check_alone("pretraining on demonstrations")
    if folder is None:
        return _follow(agent, settings, found)
    if not has_time_limit(settings.env_id, settings.env_kwargs):
        warn(f"{settings.env_id} has no time limit: an episode that never ends has no return; evaluation cuts it off")
    print(f"run folder: {folder}", flush=True)
    start, done, total = time.monotonic(), agent.num_timesteps, settings.total_timesteps
    logger = open_logger(folder, done, settings)
    try:
        with contextlib.closing(logger), messages_shown():
            if settings.pretrain_steps and not getattr(agent, "is_pretrained", True):
                pretrain(agent, folder, settings)
            elif settings.demonstrations is not None:
                evaluate_pretrained(folder, settings)
                use_demonstrations(agent, folder, settings)
            start = time.monotonic()
            if settings.total_timesteps > 0:
                _learn(agent, folder, settings, logger, found, report_to)
            else:
                with reported("final.zip", 0):
                    save_agent(agent, folder / "final.zip")
        seconds, steps = time.monotonic() - start, agent.num_timesteps - done
        if total:
            rate = f"{steps / seconds:,.0f} steps/s"
            print(f"trained {steps:,} steps in {tqdm.format_interval(seconds)} ({rate})", flush=True)
        if report_to:
            report_to({"evaluates": True})
        modes = ("deterministic", "sampled")
        report = evaluate_modes(agent, settings.env_id, settings.env_kwargs, _FINAL_EPISODES, EVALUATION_SEED, modes)
        with reported("eval.json", agent.num_timesteps):
            write_json(folder / "eval.json", {"file": "final.zip", **report})
    except (Exception, SystemExit) as error:
        kept = f"kept {find_checkpoint(folder)}" if has_saved(folder) else "nothing was saved"
        where = users_line(error)
        if isinstance(error, BrokenPipeError) and output_closed():
            print(f"output closed at {agent.num_timesteps:,} of {total:,} steps; {kept}", file=sys.stderr, flush=True)
            raise
        if where is None and isinstance(error, ValueError | ChildProcessError | RankError) and has_saved(folder):
            raise ValueError(f"{error}; {kept}") from error
        print(
            f"error: {settings.env_id} ended training at {agent.num_timesteps:,} of {total:,} steps"
            f"{f', in {where}' if where else ''} ({type(error).__name__}); {kept}", file=sys.stderr, flush=True,
        )  # fmt: skip
        raise
    except KeyboardInterrupt as interrupt:
        if not has_saved(folder):
            raise
        print(f"stopped at {agent.num_timesteps:,} of {total:,} steps; last saved in {find_checkpoint(folder)}")
        print(describe_commands(agent, folder, total))
        return exit_code(interrupt)
    print(f"\n{_FINAL_EPISODES} episodes each\n{format_table(report)}\n")
    print(describe_commands(agent, folder, total))
    return 0


def _follow(agent: Checkpointed, settings: RunSettings, found: Resumption | None) -> int:
    """What the other ranks do of `train`."""
    if settings.demonstrations is not None:
        use_demonstrations(agent, None, settings)
    try:
        _learn(agent, None, settings, Logger(None, []), found, None)
    except KeyboardInterrupt as interrupt:
        return exit_code(interrupt)
    return 0


def _learn(
    agent: Checkpointed, folder: Path | None, settings: RunSettings, logger: Logger, found: Resumption | None,
    report_to: Report | None,
) -> None:  # fmt: skip
    """Train and save; raises KeyboardInterrupt after that where a signal ended it early.

    It also saves where anything else ends it, an error in the user's environment say, unless the agent is broken.
    """
    done, total = agent.num_timesteps, settings.total_timesteps
    with contextlib.ExitStack() as stack, StopOnSignal(says_so=folder is not None) as stop:
        agent.set_logger(logger)
        best = _go_on(agent, settings, found) if found else None
        checkpoints = Checkpoints(folder, settings, stop, best) if folder else Follows(stop)
        callbacks: list[BaseCallback] = [checkpoints, *([Reports(done, report_to)] if report_to else [])]
        if folder:
            callbacks.insert(1, stack.enter_context(contextlib.closing(Progress(done, total))))
        try:
            agent.learn(total - done, callback=CallbackList(callbacks), reset_num_timesteps=done == 0)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and (stop.signal, stop.agreed) != (None, None):
                if not stop.ran_out or present().size > 1:
                    raise  # it has saved, or it is the second signal; other ranks need not be where this one is
            if _is_worth_saving(agent, done):
                stop.be_patient()
                checkpoints.save()
            raise
        stop.be_patient()
        checkpoints.save()
        if folder:
            with reported("final.zip", agent.num_timesteps):
                save_agent(agent, folder / "final.zip")
    if stop.signal is not None:
        raise KeyboardInterrupt(stop.signal)


def _is_worth_saving(agent: Checkpointed, done: int) -> bool:
    """Whether an agent that an error ended has learned and is not broken; ranks can save only where all are there."""
    ranks = present()
    worth = agent.num_timesteps > done and all(bool(each.isfinite().all()) for each in agent.policy.parameters())
    return ranks.aligned and all(ranks.gather(worth))


def _go_on(agent: Checkpointed, settings: RunSettings, found: Resumption) -> dict[str, Any] | None:
    """Put back all that the checkpoint holds beside the agent and say what it lacks; returns the best so far."""
    agent.set_random_seed((settings.seed + agent.num_timesteps) % 2**31)  # of what cannot be put back
    if found.state is None:  # before the first step there is nothing but the agent
        missing = ["all but the agent: the file is no checkpoint"] if agent.num_timesteps else []
    else:
        missing = [found.state["missing"]] if "missing" in found.state else restore(agent, found.state)
        missing += [found.state["lost"]] if "lost" in found.state else []
    how = "as if it had not been interrupted"
    if settings.backend == "warp":
        how = "simulation by Warp goes on to rounding, not to the last bit"
    print("\n".join(f"not restored: {each}" for each in missing) or f"all restored: {how}")
    return found.state["progress"] if found.state is not None else None
