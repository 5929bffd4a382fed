"""Train an agent: `python train.py policyflow --env Hopper-v5`, or go on with a run: `python train.py --resume RUN`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.vec_env import VecEnv
from tqdm import tqdm

from .. import __version__
from ..agents.common.config import without_inert
from ..agents.registry import AGENTS, AgentSpec, policy_alias
from ..agents.storage.files import write_json
from ..agents.storage.saving import Checkpointed, restore
from ..analysis.evaluation import EVALUATION_SEED, evaluate_modes, format_table
from ..envs import make_vec, parse_env_kwargs
from ..envs.known import full_id, task_name
from ..envs.make import Backend, has_time_limit
from ..runs.callbacks import Checkpoints, Progress, reported
from ..runs.folder import (
    Resumption,
    RunSettings,
    alone,
    check_device,
    find_checkpoint,
    has_saved,
    is_complete,
    load_newest,
    new_run,
    read_settings,
    record_resumption,
    save_agent,
)
from ..runs.log import open_logger, warn
from ..runs.signals import StopOnSignal, exit_code, sigterm_as_interrupt
from .errors import (
    Parser,
    fail,
    import_from_here,
    output_closed,
    until_output_closes,
    users_line,
    whole_number,
)
from .help import LEGEND, Option, format_help, grouped, options
from .options import named_options, read_options

_FINAL_EPISODES = 10
_HELP = {"-h", "--help", "--help-all"}


@dataclass(frozen=True)
class Arguments:
    """Options of `train.py <agent>`: those of the run, and as flags of their own those of the agent's Config."""

    env: str
    """Gymnasium id with Box actions, e.g. Hopper-v5."""
    n_envs: int
    """Parallel environments, >= 1."""
    preset: str = "standard"
    """Which of the agent's presets to begin from."""
    total_timesteps: int = 1_000_000
    """Environment steps to train for, >= 1, all environments together."""
    seed: int | None = None
    """Seed of everything random, 0 .. 2**31 - 1; None: drawn, and recorded."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where networks and rollouts live."""
    threads: int = 1
    """CPU threads of PyTorch, >= 1. Networks of some 100 units are fastest with one: more wait for each other."""
    run_dir: Path = Path("runs")
    """Folder under which the run's folder is made."""
    checkpoint_interval: int = 100_000
    """Steps between checkpoints, >= 1."""
    keep_checkpoints: int = 3
    """How many checkpoints to keep, the newest, >= 1; the best agent is kept apart."""
    env_kwargs: tuple[str, ...] = ()
    """Arguments of the environment: key=value pairs, or one JSON object."""
    backend: Backend = "auto"
    """How environments are stepped: MuJoCo tasks as a batch, one by one, or each in its own process."""
    worker_timeout: float = 60.0
    """Seconds for a step, > 0, after which such a process counts as hung and is restarted."""
    worker_restarts: int = 10
    """Restarts of processes that died or hang, >= 0, all together; the next is an error."""
    config: tyro.conf.OmitArgPrefixes[Any] = None
    """Hyperparameters of the agent."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 2 for bad input, 130, 141 or 143 where a signal ended it."""
    return until_output_closes(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    import_from_here()
    try:
        with sigterm_as_interrupt():
            if args and args[0] in AGENTS:
                return _start(args[0], args[1:])
            if any(arg.split("=")[0] == "--resume" for arg in args):
                return _resume(args)
        if _HELP & set(args):
            print(_overview())
            return 0
        if "--version" in args:
            print(f"driftrl {__version__}")
            return 0
        raise ValueError(f"got {args[0] if args else 'no agent'}, expected {' or '.join(AGENTS)}, or --resume RUN")
    except (ValueError, OSError) as error:
        if users_line(error) or output_closed():
            raise
        return fail(error)
    except KeyboardInterrupt as interrupt:
        print("interrupted", file=sys.stderr)
        return exit_code(interrupt)


def _overview() -> str:
    name = Path(sys.argv[0]).name
    agents = "\n".join(f"  {agent:12} {entry.summary}" for agent, entry in AGENTS.items())
    return (
        f"usage: {name} AGENT [OPTIONS]    train an agent\n"
        f"       {name} --resume RUN       go on with an interrupted or finished run\n\n"
        f"{name} AGENT --help            options of the run and the agent's basic ones\n"
        f"{name} AGENT --help-all        all options of the agent, in groups\n"
        f"{name} --resume RUN --help     options of a resumption\n\n"
        f"agents:\n{agents}"
    )


def _start(name: str, args: Sequence[str]) -> int:
    """Train a new agent."""
    entry = AGENTS[name]
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--env", default=entry.default_env)
    first.add_argument("--preset", default=next(iter(entry.presets)))
    known = first.parse_known_args(args)[0]  # decides the defaults of the other options
    known.env = full_id(known.env)
    preset = entry.preset(known.env, known.preset)
    run = {name: preset.pop(name) for name in ("n_envs", "total_timesteps") if name in preset}
    defaults = Arguments(env=known.env, preset=known.preset, config=entry.config(**preset), **run)
    if _HELP & set(args):
        print(_help(name, entry, defaults, in_full="--help-all" in args))
        return 0
    chosen = named_options(args)
    try:
        arguments = read_options(f"{Path(sys.argv[0]).name} {name}", args, defaults)
    except ValueError as error:
        sets = [f"{key}={preset[key]}" for key in preset.keys() - chosen if re.search(rf"\b{key}\b", str(error))]
        if not sets:
            raise
        raise ValueError(f"{error}; the preset for {known.env} sets {', '.join(sets)}") from None  # not the user
    arguments = dataclasses.replace(arguments, env=known.env, config=without_inert(arguments.config, chosen))
    check_device(arguments.device)
    settings = RunSettings(
        agent=name,
        env_id=arguments.env,
        env_kwargs=parse_env_kwargs(arguments.env_kwargs),
        n_envs=arguments.n_envs,
        seed=secrets.randbelow(2**31) if arguments.seed is None else arguments.seed,
        total_timesteps=arguments.total_timesteps,
        checkpoint_interval=arguments.checkpoint_interval,
        device=arguments.device,
        threads=arguments.threads,
        config=dataclasses.asdict(arguments.config),
        keep_checkpoints=arguments.keep_checkpoints,
        backend=arguments.backend,
        worker_timeout=arguments.worker_timeout,
        worker_restarts=arguments.worker_restarts,
    )
    with contextlib.closing(_make_env(settings, settings.seed)) as env:
        agent = entry.agent(policy_alias(env), env, config=arguments.config, seed=settings.seed, device=settings.device)
        with new_run(arguments.run_dir, settings) as folder, alone(folder):
            print(_describe(agent, settings))
            print(_describe_preset(entry, defaults, arguments))
            return _train(agent, folder, settings)


def _resume(args: Sequence[str]) -> int:
    """Go on with a run from its last checkpoint."""
    parser = Parser(prog=Path(sys.argv[0]).name, description="Go on with a run, in its folder.", allow_abbrev=False)
    parser.add_argument("--resume", type=Path, metavar="RUN", required=True, help="run folder")
    parser.add_argument("--total-timesteps", type=whole_number, help="steps to train for in all (default: as the run)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="(default: as the run)")
    arguments = parser.parse_args(args)
    folder: Path = arguments.resume
    if folder.is_file():
        raise ValueError(f"resume: got the file {folder}, expected a run folder")
    find_checkpoint(folder)  # says what is wrong if there is none
    with alone(folder):
        return _resume_in(folder, arguments)


def _resume_in(folder: Path, arguments: argparse.Namespace) -> int:
    settings = read_settings(folder)
    settings = dataclasses.replace(
        settings,
        total_timesteps=settings.total_timesteps if arguments.total_timesteps is None else arguments.total_timesteps,
        device=arguments.device or settings.device,
    )
    with contextlib.closing(_make_env(settings, None)) as env:
        found = load_newest(folder, settings.device, env)
        done = found.agent.num_timesteps
        for reason in found.skipped:
            warn(f"skipped {reason}")
        if done >= settings.total_timesteps and is_complete(folder):
            print(
                f"nothing left to do: {found.file} has {done:,} of {settings.total_timesteps:,} steps; to go on, raise "
                f"them\n  {_command('train')} --resume {shlex.quote(str(folder))} --total-timesteps {2 * done}"
            )
            return 0
        record_resumption(folder, done, settings.total_timesteps)
        print(_describe(found.agent, settings))
        print(f"resumed from {found.file} at {done:,} steps")
        return _train(found.agent, folder, settings, found)


def _make_env(settings: RunSettings, seed: int | None) -> VecEnv:
    """The environments of a run."""
    names = ("backend", "worker_timeout", "worker_restarts")
    how = {name: getattr(settings, name) for name in names}
    return make_vec(settings.env_id, settings.n_envs, seed, **how, **settings.env_kwargs)


def _help(name: str, entry: AgentSpec, defaults: Arguments, in_full: bool) -> str:
    """What `train.py AGENT --help` prints: the run's options and the agent's first group, or all groups."""
    program = f"{Path(sys.argv[0]).name} {name}"
    run, agent = options(defaults), options(defaults.config)
    del run["config"]
    run["preset"] = Option(f"--preset {'|'.join(entry.presets)}", run["preset"].text)
    rate = agent["lr_schedule"]  # the command line cannot give a function
    agent["lr_schedule"] = Option(
        rate.name.replace("|function", ""), rate.text.split(" function:")[0].rstrip(";") + "."
    )
    first, *others = grouped(entry.groups, agent).items()
    groups = {title: [agent[each] for each in names] for title, names in (first, *others)}
    sections = {"run": list(run.values()), first[0]: groups.pop(first[0])} | (groups if in_full else {})
    head = (
        f"usage: {program} [OPTIONS]\n\nTrain {name}: {entry.summary}.\n"
        f"The defaults are those of the preset {defaults.preset} for {defaults.env}. {LEGEND}"
    )
    counts = ", ".join(f"{title} ({len(names)})" for title, names in others)
    foot = f"{program} --help shows the first two groups alone." if in_full else f"More, by --help-all: {counts}."
    return format_help(head, sections, foot)


def _describe(agent: Checkpointed, settings: RunSettings) -> str:
    environments = f"{settings.n_envs} environment{'s' if settings.n_envs > 1 else ''}"
    what = f"{settings.agent} on {settings.env_id}, {settings.total_timesteps:,} steps"
    return f"{what}, {environments}, seed {settings.seed}, {agent.device}"


def _describe_preset(entry: AgentSpec, defaults: Arguments, arguments: Arguments) -> str:
    """Which preset holds, what it changes of the Config's defaults, and what the user changed of it."""
    preset, standard = entry.preset(arguments.env, arguments.preset), dataclasses.asdict(entry.config())
    run = ("n_envs", "total_timesteps") if "total_timesteps" in preset else ("n_envs",)
    chosen, before = (
        {name: getattr(each, name) for name in run} | dataclasses.asdict(each.config) for each in (arguments, defaults)
    )
    yours = {key: value for key, value in chosen.items() if value != before[key]}
    tuned = {key: chosen[key] for key in preset if key not in yours and chosen[key] != standard.get(key)}
    tuned_for = entry.presets[arguments.preset]
    title = arguments.env if task_name(arguments.env) in tuned_for else f"default (none is tuned for {arguments.env})"
    lines = [f"preset {arguments.preset}, {title}: {' '.join(f'{key}={value}' for key, value in tuned.items())}"]
    if yours:
        lines.append(f"set by you: {' '.join(f'{key}={value}' for key, value in yours.items())}")
    return "\n".join(lines)


def _train(agent: Checkpointed, folder: Path, settings: RunSettings, found: Resumption | None = None) -> int:
    """Train up to the run's total, save, evaluate and say what can be done next."""
    torch.set_num_threads(settings.threads)
    if not has_time_limit(settings.env_id, settings.env_kwargs):
        warn(f"{settings.env_id} has no time limit: an episode that never ends has no return; evaluation cuts it off")
    print(f"run folder: {folder}", flush=True)
    start, done, total = time.monotonic(), agent.num_timesteps, settings.total_timesteps
    try:
        _learn(agent, folder, settings, found)
        seconds, steps = time.monotonic() - start, agent.num_timesteps - done
        print(
            f"trained {steps:,} steps in {tqdm.format_interval(seconds)} ({steps / seconds:,.0f} steps/s)", flush=True
        )
        modes = ("deterministic", "sampled")
        report = evaluate_modes(agent, settings.env_id, settings.env_kwargs, _FINAL_EPISODES, EVALUATION_SEED, modes)
        with reported("eval.json", agent.num_timesteps):
            write_json(folder / "eval.json", {"file": "final.zip", **report})
    except Exception as error:
        kept = f"kept what was saved before, in {folder}" if has_saved(folder) else "nothing was saved"
        where = users_line(error)
        if isinstance(error, BrokenPipeError) and output_closed():
            print(f"output closed at {agent.num_timesteps:,} of {total:,} steps; {kept}", file=sys.stderr, flush=True)
            raise
        if where is None and isinstance(error, ValueError | ChildProcessError) and has_saved(folder):
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
        print(_describe_commands(agent, folder, total))
        return exit_code(interrupt)
    print(f"\n{_FINAL_EPISODES} episodes each\n{format_table(report)}\n")
    print(_describe_commands(agent, folder, total))
    return 0


def _learn(agent: Checkpointed, folder: Path, settings: RunSettings, found: Resumption | None) -> None:
    """Train and save; raises KeyboardInterrupt after that where a signal ended it early.

    It also saves where anything else ends it, an error in the user's environment say, unless the agent is broken.
    """
    done, total = agent.num_timesteps, settings.total_timesteps
    with (
        contextlib.closing(open_logger(folder, done)) as logger,
        contextlib.closing(Progress(done, total)) as progress,
        StopOnSignal() as stop,
    ):
        agent.set_logger(logger)
        best = _go_on(agent, settings, found) if found else None
        checkpoints = Checkpoints(folder, settings, stop, best)
        try:
            agent.learn(total - done, callback=CallbackList([checkpoints, progress]), reset_num_timesteps=done == 0)
        except Exception:
            if agent.num_timesteps > done and all(each.isfinite().all() for each in agent.policy.parameters()):
                stop.be_patient()
                checkpoints.save()
            raise
        stop.be_patient()
        checkpoints.save()
        with reported("final.zip", agent.num_timesteps):
            save_agent(agent, folder / "final.zip")
    if stop.signal is not None:
        raise KeyboardInterrupt(stop.signal)


def _go_on(agent: Checkpointed, settings: RunSettings, found: Resumption) -> dict[str, Any] | None:
    """Put back all that the checkpoint holds beside the agent and say what it lacks; returns the best so far."""
    agent.set_random_seed((settings.seed + agent.num_timesteps) % 2**31)  # of what cannot be put back
    missing = ["all but the agent: the file is no checkpoint"] if found.state is None else restore(agent, found.state)
    print("\n".join(f"not restored: {each}" for each in missing) or "all restored: as if it had not been interrupted")
    return found.state["progress"] if found.state is not None and not missing else None


def _describe_commands(agent: Checkpointed, folder: Path, total_timesteps: int) -> str:
    """What can be done next with a run that has a saved agent."""
    evaluate, run = _command("evaluate"), shlex.quote(str(folder))
    more = f" --total-timesteps {2 * agent.num_timesteps}" if agent.num_timesteps >= total_timesteps else ""
    return (
        f"evaluate:  {evaluate} {run} --episodes 20\n"
        f"watch:     {evaluate} {run} --episodes 1 --video {shlex.quote(str(folder / 'video.mp4'))}\n"
        f"curves:    {_command('tensorboard')} --logdir {run}\n"
        f"resume:    {_command('train')} --resume {run}{more}"
    )


def _command(name: str) -> str:
    """How the user can start train, evaluate or tensorboard from here, with the same Python."""
    bin_folder, script = Path(sys.executable).parent, Path(sys.argv[0])
    on_path = shutil.which("python")
    is_active = on_path is not None and Path(on_path).parent == bin_folder
    if name != "tensorboard" and script.suffix == ".py":
        return shlex.join(
            ["python" if is_active else _short(Path(sys.executable)), _short(script.with_name(f"{name}.py"))]
        )
    program = name if name == "tensorboard" else f"driftrl-{name}"
    return program if is_active else shlex.quote(_short(bin_folder / program))


def _short(path: Path) -> str:
    """A path as it reads best from the current folder."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    sys.exit(main())
