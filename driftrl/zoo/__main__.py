"""`python -m driftrl.zoo train|enjoy|optimize|record_video ...`: rl_zoo3's commands, which know our agents, too."""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import Callable, Sequence

_USAGE = "usage: python -m driftrl.zoo train|enjoy|optimize|record_video [OPTIONS OF RL_ZOO3]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of rl_zoo3's commands with our agents registered; returns its exit code, 2 for bad input."""
    from gymnasium.error import DependencyNotInstalled

    from ..agents.common.config import UnknownArgument
    from ..commands.errors import fail, is_ours

    args = list(sys.argv[1:] if argv is None else argv)
    try:
        from .registration import register
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("driftrl"):
            raise
        return fail(ValueError(f"zoo: {error.name} is not installed; run pip install 'driftrl[zoo]'"))
    register()
    commands: dict[str, Callable[[], None]] = {
        "train": _train, "optimize": _train, "enjoy": _enjoy, "record_video": _record_video
    }  # fmt: skip
    if not args or args[0] not in commands:
        if args and args[0] in ("-h", "--help"):
            print(f"{_USAGE}\nThe options of a command: python -m driftrl.zoo train --help")
            return 0
        return fail(ValueError(f"got {args[0] if args else 'no command'}; {_USAGE}"))
    name, *rest = args
    sys.argv = [f"python -m driftrl.zoo {name}", *(["-optimize"] if name == "optimize" else []), *rest]
    try:
        commands[name]()
    except (UnknownArgument, DependencyNotInstalled) as error:
        return fail(error)
    except ValueError as error:
        if not (is_ours(error) or _is_the_zoos(error)):
            raise
        return fail(error)
    return 0


def _is_the_zoos(error: ValueError) -> bool:
    """Whether rl_zoo3 itself raised it: there is no such run or checkpoint, say."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return str(frames[-1][0].f_globals.get("__name__")).startswith("rl_zoo3.")


def _train() -> None:
    from rl_zoo3.train import train

    train()


def _enjoy() -> None:
    from rl_zoo3.enjoy import enjoy

    enjoy()


def _record_video() -> None:
    runpy.run_module("rl_zoo3.record_video", run_name="__main__")  # rl_zoo3 has no function for it


if __name__ == "__main__":
    sys.exit(main())
