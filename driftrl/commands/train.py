"""Train an agent: `python train.py policyflow --env Hopper-v5`, or go on with a run: `python train.py --resume RUN`."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .. import __version__
from ..agents.common.config import without_inert
from ..agents.common.ranks import RankError, check_alone, present
from ..agents.registry import AGENTS, AgentSpec
from ..envs.known import full_id
from ..runs.callbacks import Report
from ..runs.folder import RunSettings
from ..runs.group import incomplete_group, new_group
from ..runs.signals import exit_code, sigterm_as_interrupt
from .arguments import Arguments
from .config_file import ConfigFile, read_config_file
from .describe import describe, describe_preset
from .errors import Parser, fail, import_from_here, output_closed, until_output_closes, users_line
from .help import LEGEND, Option, format_help, grouped, options
from .options import named_options, read_options
from .ranks import check_agent, in_ranks, is_said_elsewhere, run_folder, say
from .resume import resume
from .seeds import check_jobs, check_seeds, train_group
from .settings import defaults_of, settings_of
from .training import make_agent, make_env, train

_HELP = {"-h", "--help", "--help-all"}


def main(argv: Sequence[str] | None = None, report_to: Report | None = None) -> int:
    """Run the command; `report_to` hears how a resumed run goes.

    Returns:
        Exit code: 0, 1 if runs of a group failed, 2 for bad input, 130, 141 or 143 where a signal ended it.
    """
    return in_ranks(partial(until_output_closes, partial(_main, argv, report_to)))


def _main(argv: Sequence[str] | None, report_to: Report | None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    import_from_here()
    try:
        with sigterm_as_interrupt(), present().announced():
            if args and args[0] in AGENTS:
                return _start(args[0], args[1:])
            if any(arg.split("=")[0] == "--config" for arg in args):
                return _start(None, args)
            if any(arg.split("=")[0] == "--resume" for arg in args):
                return resume(args, report_to)
        if _HELP & set(args):
            print(_overview())
            return 0
        if "--version" in args:
            print(f"driftrl {__version__}")
            return 0
        raise ValueError(f"got {args[0] if args else 'no agent'}, expected {' or '.join(AGENTS)}, or --resume RUN")
    except (ValueError, OSError, RankError) as error:
        if users_line(error) or output_closed():
            raise
        return 2 if is_said_elsewhere() else fail(error)
    except KeyboardInterrupt as interrupt:
        say("interrupted")
        return exit_code(interrupt)


def _overview() -> str:
    name = Path(sys.argv[0]).name
    agents = "\n".join(f"  {agent:12} {entry.summary}" for agent, entry in AGENTS.items())
    return (
        f"usage: {name} AGENT [OPTIONS]    train an agent\n"
        f"       {name} --config FILE      train the agent of a file, YAML or JSON, or of a run folder\n"
        f"       {name} --resume RUN       go on with an interrupted or finished run, or group of runs\n\n"
        f"{name} AGENT --help            options of the run and the agent's basic ones\n"
        f"{name} AGENT --help-all        all options of the agent, in groups\n"
        f"{name} --resume RUN --help     options of a resumption\n\n"
        f"agents:\n{agents}"
    )


def _start(name: str | None, args: Sequence[str]) -> int:
    """Train a new agent; where the command names none, the one of its --config."""
    flags = named_options(args)
    file, args = _config_file(name, args, flags)
    name = name or str(file.agent)
    entry = AGENTS[name]
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--env", default=file.run.get("env", entry.default_env))
    first.add_argument("--preset", default=file.run.get("preset"))
    first.add_argument("--pretrain-steps", default=file.run.get("pretrain_steps"))
    known = first.parse_known_args(args)[0]  # decides the defaults of the other options
    known.preset = known.preset or entry.default_preset(known.pretrain_steps)
    with file.blamed(flags):
        known.env = full_id(known.env)
        preset = entry.preset(known.env, known.preset)
    standard = defaults_of(entry, known.env, known.preset, preset, ConfigFile())
    with file.blamed():
        defaults = defaults_of(entry, known.env, known.preset, preset, file)
    if _HELP & set(args):
        print(_help(name, entry, defaults, in_full="--help-all" in args))
        return 0
    chosen = flags | file.chosen
    with file.blamed(flags):
        arguments = _arguments(name, args, defaults, preset, chosen)
        arguments = dataclasses.replace(arguments, env=known.env, config=without_inert(arguments.config, chosen))
        _check_group_options(arguments, chosen)
        check_agent(name)
        settings = present().gather(settings_of(name, arguments, chosen))[0]  # rank 0 draws the seed
        if settings.pretrain_steps:
            check_alone("pretraining on demonstrations")
        if "seeds" in chosen:
            check_alone("a group of runs")
            return _start_group(entry, standard, arguments, settings, chosen)
        with contextlib.closing(make_env(settings, settings.seed)) as env:
            agent = make_agent(settings, env, arguments.config, chosen)
            with run_folder(arguments.run_dir, settings) as folder:
                print(describe(settings, agent.device))
                print(describe_preset(entry, standard, arguments))
                if getattr(agent, "learns_end", False):
                    print("the model learns how episodes end")
                return train(agent, folder, settings)


def _config_file(name: str | None, args: Sequence[str], flags: Collection[str]) -> tuple[ConfigFile, list[str]]:
    """The file that --config names, or one that sets nothing, and the arguments without it."""
    first = Parser(prog=Path(sys.argv[0]).name, add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    known, rest = first.parse_known_args(args)
    if known.config is None:
        return ConfigFile(), rest
    file = read_config_file(known.config, name)
    if {"seed", "seeds"} <= file.run.keys():
        raise ValueError(f"{file.path}: seed: got it and seeds, expected one of them")
    replaced = {"seeds", "jobs"} if "seed" in flags else {"seed"} if "seeds" in flags else set()
    return dataclasses.replace(file, run={key: file.run[key] for key in file.run.keys() - replaced}), rest


def _arguments(
    name: str, args: Sequence[str], defaults: Arguments, preset: Mapping[str, Any], chosen: Collection[str]
) -> Arguments:
    """The command line over the defaults; its errors say which settings the preset chose."""
    try:
        return read_options(f"{Path(sys.argv[0]).name} {name}", args, defaults)
    except ValueError as error:
        sets = [f"{key}={preset[key]}" for key in preset.keys() - chosen if re.search(rf"\b{key}\b", str(error))]
        if not sets:
            raise
        raise ValueError(f"{error}; the preset for {defaults.env} sets {', '.join(sets)}") from None  # not the user


def _check_group_options(arguments: Arguments, chosen: Collection[str]) -> None:
    """Refuse what --seeds and --jobs cannot mean."""
    check_jobs(arguments.jobs)
    if "seeds" not in chosen:
        if "jobs" in chosen:
            raise ValueError(f"jobs: got {arguments.jobs}, which changes nothing without seeds")
        return
    if "seed" in chosen:
        raise ValueError(f"seed: got {arguments.seed} and seeds, expected one of them")
    check_seeds(arguments.seeds)


def _start_group(
    entry: AgentSpec, defaults: Arguments, arguments: Arguments, settings: RunSettings, chosen: Collection[str]
) -> int:
    """Train one run per seed, in a new group, or in one of the same command that is not complete."""
    runs = [dataclasses.replace(settings, seed=seed) for seed in arguments.seeds]
    with contextlib.closing(make_env(settings, settings.seed)) as env:  # refuses here what each run would refuse
        make_agent(dataclasses.replace(settings, device="cpu"), env, arguments.config, chosen)
    print(describe(settings, settings.device, arguments.seeds))
    print(describe_preset(entry, defaults, arguments))
    group = incomplete_group(arguments.run_dir, runs)
    if group is None:
        group = new_group(arguments.run_dir, runs)
    else:
        print(f"{group} has these runs and is not complete: going on with it; to begin anew, move it away")
    return train_group(group, arguments.jobs)


def _help(name: str, entry: AgentSpec, defaults: Arguments, in_full: bool) -> str:
    """What `train.py AGENT --help` prints: the run's options and the agent's first group, or all groups."""
    program = f"{Path(sys.argv[0]).name} {name}"
    run, agent = options(defaults), options(defaults.config)
    run["config"] = Option("--config FILE", "YAML or JSON with options by name, or a run folder; flags come after it.")
    run["preset"] = Option(f"--preset {'|'.join(entry.presets)}", run["preset"].text)
    rate = agent["lr_schedule"]  # the command line cannot give a function
    agent["lr_schedule"] = Option(
        rate.name.replace("|function", ""), rate.text.split(" function:")[0].rstrip(";") + "."
    )
    if not hasattr(entry.agent, "pretrain"):
        run = {key: each for key, each in run.items() if not key.startswith(("demonstration", "pretrain"))}
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
