"""Train an agent: `python train.py policyflow --env Hopper-v5`, or go on with a run: `python train.py --resume RUN`."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import secrets
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .. import __version__
from ..agents.common.config import without_inert
from ..agents.registry import AGENTS, AgentSpec, policy_alias
from ..envs import parse_env_kwargs
from ..envs.known import full_id
from ..runs.folder import RunSettings, alone, check_device, new_run
from ..runs.signals import exit_code, sigterm_as_interrupt
from .arguments import Arguments
from .describe import describe, describe_preset
from .errors import Parser, fail, import_from_here, output_closed, until_output_closes, users_line
from .help import LEGEND, Option, format_help, grouped, options
from .options import named_options, read_options
from .resume import resume
from .training import make_env, train

_HELP = {"-h", "--help", "--help-all"}


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
                return resume(args)
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
    if "eval_episodes" in chosen and arguments.eval_interval is None:
        raise ValueError(f"eval_episodes: got {arguments.eval_episodes}, which changes nothing without eval_interval")
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
        eval_interval=arguments.eval_interval,
        eval_episodes=arguments.eval_episodes,
    )
    with contextlib.closing(make_env(settings, settings.seed)) as env:
        agent = entry.agent(policy_alias(env), env, config=arguments.config, seed=settings.seed, device=settings.device)
        with new_run(arguments.run_dir, settings) as folder, alone(folder):
            print(describe(agent, settings))
            print(describe_preset(entry, defaults, arguments))
            return train(agent, folder, settings)


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


if __name__ == "__main__":
    sys.exit(main())
