"""Write scripted demonstrations of a task as a Minari data set.

python -m driftrl.commands.demonstrate data/avoid-v0 --episodes 600 --success 0.5
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import gymnasium

from ..agents.storage.datasets import check_target, write_minari
from ..envs.avoid import AVOID
from ..envs.avoid_demonstrations import avoid_demonstrations
from ..envs.episodes import Episode
from ..envs.fetch_demonstrations import FETCH, fetch_demonstrations
from ..envs.make import check_env, with_module
from ..envs.maze_demonstrations import MAZE, maze_demonstrations
from .errors import Parser, fail, output_closed, until_output_closes, whole_number

SCRIPTS: dict[str, Callable[..., list[Episode]]] = {
    AVOID: avoid_demonstrations,
    MAZE: maze_demonstrations,
    **{env_id: partial(fetch_demonstrations, env_id) for env_id in FETCH},
}
"""Tasks with a script -> (episodes, seed, success=, noise=) -> episodes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 2 for bad input, or 141 where nobody reads its output."""
    return until_output_closes(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="driftrl.commands.demonstrate", description="Write scripted demonstrations of a task.")
    parser.add_argument("dataset", type=Path, help="folder to write, named NAME-vN as Minari has it")
    parser.add_argument("--env", default=AVOID, choices=tuple(SCRIPTS), help="(default: %(default)s)")
    parser.add_argument("--episodes", type=whole_number, default=600, help=">= 1 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help=">= 0 (default: %(default)s)")
    parser.add_argument(
        "--success",
        type=float,
        default=1.0,
        help="share of episodes that succeed, in [0, 1] (default: %(default)s)",
    )
    parser.add_argument(
        "--noise", type=float, default=0.1, help="standard deviation of the actions' noise, >= 0 (default: %(default)s)"
    )
    try:
        args = parser.parse_args(argv)
        return _write(args)
    except (ValueError, OSError) as error:
        if output_closed():
            raise
        return fail(error)
    except KeyboardInterrupt:
        return 130


def _write(args: argparse.Namespace) -> int:
    if args.seed < 0:
        raise ValueError(f"seed: got {args.seed}, expected an integer of at least 0")
    check_target(args.dataset)
    check_env(args.env)
    episodes = SCRIPTS[args.env](args.episodes, args.seed, success=args.success, noise=args.noise)
    env = gymnasium.make(with_module(args.env))
    spaces = env.observation_space, env.action_space
    write_minari(args.dataset, episodes, *spaces, env_spec=env.spec, algorithm="script")
    steps, mean = sum(len(each.actions) for each in episodes), sum(each.rewards.sum() for each in episodes)
    print(f"wrote {len(episodes)} episodes, {steps:,} steps, mean return {mean / len(episodes):.2f}, to {args.dataset}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
