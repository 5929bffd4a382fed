"""What training says before and after: what is trained, which preset holds, what can be done next."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ..agents.common.ranks import present
from ..agents.registry import AgentSpec
from ..agents.storage.saving import Checkpointed
from ..envs.known import task_name
from ..runs.folder import RunSettings
from .arguments import Arguments


def describe(settings: RunSettings, device: object, seeds: Sequence[int] = ()) -> str:
    """One line that says what is trained."""
    environments = f"{settings.n_envs} environment{'s' if settings.n_envs > 1 else ''}"
    if (size := present().size) > 1:
        environments = f"{environments} on each of {size} ranks"
    which = f"seeds {' '.join(map(str, seeds))}" if seeds else f"seed {settings.seed}"
    what = f"{settings.agent} on {settings.env_id}, {settings.total_timesteps:,} steps"
    return f"{what}, {environments}, {which}, {device}"


def describe_preset(entry: AgentSpec, defaults: Arguments, arguments: Arguments) -> str:
    """Which preset holds, what it changes of the Config's defaults, and what the user changed of it."""
    preset, standard = entry.preset(arguments.env, arguments.preset), dataclasses.asdict(entry.config())
    run = ("n_envs", "total_timesteps") if "total_timesteps" in preset else ("n_envs",)
    chosen, before = (
        {name: getattr(each, name) for name in run} | dataclasses.asdict(each.config) for each in (arguments, defaults)
    )
    off = arguments.config.switched_off()  # by another choice; the preset's value is back at the default
    yours = {key: value for key, value in chosen.items() if value != before[key] and key not in off}
    tuned = {key: chosen[key] for key in preset if key not in yours and chosen[key] != standard.get(key)}
    tuned_for = entry.presets[arguments.preset]
    title = arguments.env if task_name(arguments.env) in tuned_for else f"default (none is tuned for {arguments.env})"
    lines = [f"preset {arguments.preset}, {title}: {' '.join(f'{key}={value}' for key, value in tuned.items())}"]
    if yours:
        lines.append(f"set by you: {' '.join(f'{key}={value}' for key, value in yours.items())}")
    return "\n".join(lines)


def further_steps(done: int) -> int:
    """Steps up to which a run can go on that came to its end after so many: 0 after pretraining alone."""
    return 2 * done or 200_000


def describe_commands(agent: Checkpointed, folder: Path, total_timesteps: int) -> str:
    """What can be done next with a run that has a saved agent."""
    evaluate, run = command("evaluate"), shlex.quote(str(folder))
    more = f" --total-timesteps {further_steps(agent.num_timesteps)}" if agent.num_timesteps >= total_timesteps else ""
    return (
        f"evaluate:  {evaluate} {run} --episodes 20\n"
        f"watch:     {evaluate} {run} --episodes 1 --video {shlex.quote(str(folder / 'video.mp4'))}\n"
        f"curves:    {command('tensorboard')} --logdir {run}\n"
        f"resume:    {command('train')} --resume {run}{more}"
    )


def command(name: str) -> str:
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
