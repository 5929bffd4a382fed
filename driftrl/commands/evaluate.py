"""Evaluate, film or export a saved policy: `python evaluate.py RUN_OR_FILE --episodes 20 [--video out.mp4]`.

Several runs, a group or a folder of them are evaluated in one table: driftrl/commands/evaluate_several.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

from .. import __version__
from ..agents.storage.datasets import check_target
from ..agents.storage.files import write_json
from ..agents.storage.saving import Checkpointed
from ..analysis.evaluation import (
    EVALUATION_SEED,
    MAX_STEPS,
    CheckedPolicy,
    evaluate_modes,
    evaluation_env,
    format_table,
)
from ..analysis.export import EXPORTERS
from ..analysis.hub import check_hub_folder, write_hub_folder
from ..analysis.multimodality import has_several_solutions
from ..analysis.plots import draw_pictures
from ..analysis.video import choose_renderer, record_video
from ..envs import check_env
from ..envs.avoid import AVOID
from ..envs.multigoal import GOAL_TASKS
from ..runs.folder import RunSettings, load_saved, run_folder_of
from ..runs.group import runs_in
from ..runs.kinds import is_group
from .errors import (
    Parser,
    check_installed,
    fail,
    import_from_here,
    output_closed,
    until_output_closes,
    users_line,
    whole_number,
)
from .evaluate_several import evaluate_several
from .record import record
from .target import longest_episode, target_of


def _check_target(option: str, path: Path) -> None:
    """Refuse a file that could not be written, before episodes are spent on what it shall hold."""
    if path.is_dir():
        raise ValueError(f"{option}: got the folder {path}, expected a file; add a name")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{option}: got {path}, expected a file in an existing folder that can be written to")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 2 for bad input, or 141 where nobody reads its output."""
    return until_output_closes(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> int:
    import_from_here()
    usage = "%(prog)s RUN_OR_FILE ... [options]"
    parser = Parser(prog=Path(sys.argv[0]).name, usage=usage, description="Evaluate a saved policy.")
    parser.add_argument(
        "paths", type=Path, nargs="*", metavar="RUN_OR_FILE", help="run folder, folder of runs or groups, or saved "
        ".zip file; several runs are evaluated in one table",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"driftrl {__version__}")
    parser.add_argument(
        "--episodes", type=whole_number, default=20, help="episodes per policy, >= 1 (default: %(default)s)"
    )
    parser.add_argument(
        "--max-steps", type=whole_number, help="longest episode where the environment has no time limit of its own, "
        f">= 1 (default: {MAX_STEPS})",
    )  # fmt: skip
    parser.add_argument("--sample", action="store_true", help="only the sampled policy, also in video and export")
    parser.add_argument("--env", metavar="ID", help="Gymnasium id (default: the one of the run)")
    parser.add_argument("--env-kwargs", nargs="*", metavar="KEY=VALUE", help="its arguments (default: as in the run)")
    parser.add_argument("--seed", type=int, default=EVALUATION_SEED, help="0 .. 2**31 - 1 (default: %(default)s)")
    parser.add_argument("--video", type=Path, metavar="FILE", help="also write a video of one episode, .mp4 or .gif")
    parser.add_argument(
        "--start", type=float, nargs=2, metavar=("X", "Y"), help="goal tasks: where trajectories begin (default: 0 0)"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FOLDER", help="tasks with several solutions: also write pictures, .png"
    )
    parser.add_argument(
        "--record", type=Path, metavar="DATASET", help="also record the episodes, of all runs, as a Minari data set: a "
        "folder named NAME-vN; of the deterministic policy, or with --sample of the sampled one",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="also write all results as JSON; - for stdout, and nothing else")
    parser.add_argument(
        "--export", type=Path, metavar="FILE", help="also write the policy for other programs, .onnx or .pt2 (PyTorch)"
    )
    parser.add_argument(
        "--hub", type=Path, metavar="FOLDER", help="also write a folder for the Hugging Face Hub, with a model card"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(default: %(default)s)")
    torch.set_num_threads(1)  # batches are small: more threads wait for each other
    try:
        args = parser.parse_intermixed_args(argv)  # runs may stand before and after options
        if not args.paths and args.env_kwargs:  # they took all that follows: --env-kwargs KEY=VALUE RUN_OR_FILE
            args.paths = [Path(args.env_kwargs.pop())]
        if not args.paths:
            parser.error("got no RUN_OR_FILE, expected a run folder or saved .zip file")
        _check(args)
        runs = [run for path in args.paths for run in runs_in(path)]
        if len(runs) > 1 or is_group(args.paths[0]):
            return evaluate_several(runs, args)
        return _evaluate(args, runs[0])
    except (ValueError, OSError) as error:
        if output_closed():
            raise
        if where := users_line(error):
            print(f"error: raised in {where}", file=sys.stderr)
            raise
        return fail(error)
    except KeyboardInterrupt:
        return 130


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is loaded."""
    if args.episodes < 1:
        raise ValueError(f"episodes: got {args.episodes}, expected an integer of at least 1")
    if args.max_steps is not None and args.max_steps < 1:
        raise ValueError(f"max-steps: got {args.max_steps}, expected an integer of at least 1")
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"seed: got {args.seed}, expected an integer of 0 .. 2**31 - 1")
    if args.json not in (None, "-"):
        _check_target("json", Path(args.json))
    if args.video:
        _check_target("video", args.video)
        check_installed("video", "video", "imageio", "imageio_ffmpeg")
    if args.export:
        _check_target("export", args.export)
        if args.export.suffix not in EXPORTERS:
            raise ValueError(f"export: got {args.export}, expected a name that ends in {' or '.join(EXPORTERS)}")
        if args.export.suffix == ".onnx":
            check_installed("export", "export", "onnx", "onnxscript")
    if args.record:
        check_installed("record", "data", "h5py")
        check_target(args.record)
    if args.hub:
        check_hub_folder(args.hub)
        if args.video and args.video.suffix != ".mp4":
            raise ValueError(f"video: got {args.video}, expected a name that ends in .mp4: the Hub shows no other")
    if args.plot:
        check_installed("plot", "plot", "matplotlib")
        if args.plot.is_file():
            raise ValueError(f"plot: got the file {args.plot}, expected a folder")


def _evaluate(args: argparse.Namespace, path: Path) -> int:
    _, settings, env_id, env_kwargs = target_of(path, args)
    if args.hub and settings is None:
        raise ValueError(f"hub: got {path}, which lies in no run folder; the card tells of a run")
    if args.hub and settings is not None and (env_id, env_kwargs) != (settings.env_id, settings.env_kwargs):
        raise ValueError(
            "hub: got another task than the run's, of which the card tells; leave out --env and --env-kwargs"
        )
    if args.start is not None and env_id not in GOAL_TASKS:
        raise ValueError(f"start: {env_id} has no choice of it; only {' and '.join(GOAL_TASKS)} do")
    if args.plot and not has_several_solutions(env_id):
        raise ValueError(
            f"plot: nothing to draw for {env_id}, only for {', '.join((*GOAL_TASKS, AVOID))} and PointMaze ids"
        )
    start = args.start or (0.0, 0.0)
    if args.video:
        choose_renderer()
    check_env(env_id, **env_kwargs)
    args.max_steps = longest_episode(args.max_steps, [(env_id, env_kwargs)])
    file, agent, skipped = load_saved(path, args.device)
    for reason in skipped:
        print(f"warning: skipped {reason}", file=sys.stderr)

    out = sys.stderr if args.json == "-" else sys.stdout
    episodes = f"{args.episodes} episode{'s' if args.episodes != 1 else ''} each"
    print(f"{file}: {agent.num_timesteps:,} steps of training on {env_id}; {episodes}", file=out)
    policy = "sampled" if args.sample else "deterministic"
    if args.export:
        evaluation_env(agent, env_id, env_kwargs, 1, args.seed, args.max_steps).close()  # refuses a wrong task first
        EXPORTERS[args.export.suffix](agent, args.export, sampled=args.sample)
        print(f"exported the {policy} policy to {args.export}", file=out)
    if args.video:
        print(f"recording an episode of the {policy} policy to {args.video}", file=out, flush=True)
        record_video(agent, env_id, env_kwargs, args.video, args.seed, sample=args.sample, max_steps=args.max_steps)
    if args.plot:
        paths = draw_pictures(agent, CheckedPolicy(agent, env_id), env_id, env_kwargs, start, args.seed, args.plot)
        print(f"wrote {', '.join(map(str, paths))}", file=out, flush=True)
    if args.record:
        record([path], args, out)
    modes = ("sampled",) if args.sample else ("deterministic", "sampled")
    report = evaluate_modes(agent, env_id, env_kwargs, args.episodes, args.seed, modes, start, args.max_steps)
    print(format_table(report), file=out)
    if args.json == "-":
        print(json.dumps({"file": str(file), **report}, indent=2, allow_nan=False))
    elif args.json is not None:
        write_json(Path(args.json), {"file": str(file), **report})
    if args.hub:
        _write_hub(args, file, agent, settings, report, out)
    return 0


def _write_hub(
    args: argparse.Namespace, file: Path, agent: Checkpointed, settings: RunSettings | None, report: dict[str, Any],
    out: TextIO,
) -> None:  # fmt: skip
    run = run_folder_of(file)
    assert run is not None
    assert settings is not None
    paths = write_hub_folder(args.hub, agent, run, settings, report, args.video)
    print(f"wrote {', '.join(map(str, paths))}", file=out)
    print(f"push it:   hf upload USER/NAME {shlex.quote(str(args.hub))}", file=out)


if __name__ == "__main__":
    sys.exit(main())
