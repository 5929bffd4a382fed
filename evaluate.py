"""Evaluate, film or export a saved policy: `python evaluate.py RUN_OR_FILE --episodes 20 [--video out.mp4]`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.evaluation import evaluate_policy

from driftrl.agents.durable import write_json
from driftrl.agents.export import EXPORTERS
from driftrl.agents.multimodality import format_multimodality, has_several_solutions, multimodality
from driftrl.agents.pictures import draw_pictures
from driftrl.agents.runs import find_checkpoint, load_agent, read_settings, run_folder_of
from driftrl.envs import check_env, make_vec, parse_env_kwargs
from driftrl.envs.multigoal import GOAL_TASKS

EVALUATION_SEED = 1_000_000  # far from the seeds that training runs use
_MAX_ENVS = 10


@dataclass(frozen=True)
class Evaluation:
    """Returns and lengths of the episodes of one evaluation."""

    returns: list[float]
    lengths: list[int]

    def summary(self) -> dict[str, float]:
        """Statistics of the returns, with a 95 % bootstrap interval of the IQM, and of the episode lengths."""
        low, high = bootstrap_interval(self.returns, interquartile_mean, rng=np.random.default_rng(0))
        return {
            "mean": float(np.mean(self.returns)),
            "std": float(np.std(self.returns)),
            "median": float(np.median(self.returns)),
            "iqm": float(interquartile_mean(self.returns)),
            "iqm_low": low,
            "iqm_high": high,
            "length_mean": float(np.mean(self.lengths)),
            "length_min": min(self.lengths),
            "length_max": max(self.lengths),
        }


def interquartile_mean(x: ArrayLike) -> NDArray[np.float64]:
    """Mean of the middle half of the values along the last axis, [..., n] -> [...].

    Twice the integral of the empirical quantile function from 1/4 to 3/4: the i-th smallest of n values covers the
    quantiles i/n to (i + 1)/n and counts by its share of the middle half. Agrees with the 25 % trimmed mean where n
    is a multiple of 4, and interpolates otherwise.

    Raises:
        ValueError: if there are no values.
    """
    ordered = np.sort(np.asarray(x, dtype=np.float64), axis=-1)
    if ordered.size == 0:
        raise ValueError("interquartile_mean: got no values, expected at least 1")
    edges = np.clip(np.linspace(0, 1, ordered.shape[-1] + 1), 0.25, 0.75)
    return np.asarray(ordered @ (2 * np.diff(edges)))


def bootstrap_interval(
    x: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    level: float = 0.95,
    resamples: int = 10_000,
    *,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of independent values (Efron 1979).

    Args:
        x: values, [n].
        statistic: reduces the last axis, [resamples, n] -> [resamples].
        level: share of the resamples inside the interval, in (0, 1).
        resamples: number of resamples, n values each, drawn with replacement.
        rng: source of the resamples.

    Raises:
        ValueError: if there are no values, or level is outside (0, 1).
    """
    values = np.asarray(x, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"bootstrap_interval: got values of shape {values.shape}, expected [n] with n of at least 1")
    if not 0 < level < 1:
        raise ValueError(f"level: got {level}, expected a number in (0, 1)")
    resampled = statistic(values[rng.integers(values.size, size=(resamples, values.size))])
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class _Checked:
    """An agent that refuses to act on observations that are not finite."""

    agent: BaseAlgorithm
    env_id: str

    def predict(
        self,
        observation: NDArray[Any] | dict[str, NDArray[Any]],
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[Any] | None = None,
        deterministic: bool = False,
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...] | None]:
        """The agent's `predict`, with a ValueError for observations that are not finite."""
        for part in observation.values() if isinstance(observation, dict) else [observation]:
            if not np.isfinite(part).all():
                raise ValueError(
                    f"non-finite observation: got {part[~np.isfinite(part)][0]} from {self.env_id}, expected finite "
                    "numbers; check the environment"
                )
        return self.agent.predict(observation, state, episode_start, deterministic)


def evaluate_agent(
    agent: BaseAlgorithm, env_id: str, env_kwargs: dict[str, Any], episodes: int, seed: int, *, sample: bool
) -> Evaluation:
    """Play complete episodes with a policy.

    The episodes are divided among parallel environments beforehand, so that short ones are not over-represented.

    Args:
        agent: what chooses the actions.
        env_id: Gymnasium id.
        env_kwargs: arguments of the environment.
        episodes: how many, at least 1.
        seed: seed of the environments' first episodes and of the sampled actions.
        sample: sample the actions; otherwise the deterministic ones.

    Raises:
        ValueError: if episodes is below 1, the agent was trained for other spaces, or an observation or a return is
            not finite.
    """
    if episodes < 1:
        raise ValueError(f"episodes: got {episodes}, expected an integer of at least 1")

    def check_return(progress: dict[str, Any], _: dict[str, Any]) -> None:
        """Called by evaluate_policy with its local variables, after each step of each environment."""
        value = progress["info"]["episode"]["r"] if progress["done"] else 0.0
        if not np.isfinite(value):
            number = len(progress["episode_rewards"]) + 1
            raise ValueError(
                f"non-finite return: got {value} from episode {number} of {env_id}, expected a finite number; check "
                "the environment's rewards"
            )

    env = make_vec(env_id, min(episodes, _MAX_ENVS), seed, **env_kwargs)
    try:
        for kind in ("observation_space", "action_space"):
            expected, got = getattr(agent, kind), getattr(env, kind)
            if expected != got:
                raise ValueError(f"{kind} of {env_id}: got {got}, expected {expected} as in training; change --env")
        agent.set_random_seed(seed)
        model = _Checked(agent, env_id)
        results = evaluate_policy(
            model, env, episodes, deterministic=not sample, callback=check_return, return_episode_rewards=True
        )
    finally:
        env.close()
    returns, lengths = cast(tuple[list[float], list[int]], results)
    return Evaluation([float(value) for value in returns], [int(length) for length in lengths])


def evaluate_modes(
    agent: BaseAlgorithm, env_id: str, env_kwargs: dict[str, Any], episodes: int, seed: int, modes: Sequence[str],
    start: Sequence[float] = (0.0, 0.0),
) -> dict[str, Any]:  # fmt: skip
    """Evaluate in the modes "deterministic" and "sampled": what eval.json holds.

    On tasks with several solutions this includes their `multimodality`, from `start` where the task lets one choose it.
    """
    report: dict[str, Any] = {"env_id": env_id, "env_kwargs": env_kwargs, "timesteps": agent.num_timesteps}
    report |= {"episodes": episodes, "seed": seed}
    for mode in modes:
        result = evaluate_agent(agent, env_id, env_kwargs, episodes, seed, sample=mode == "sampled")
        report[mode] = {**result.summary(), "returns": result.returns, "lengths": result.lengths}
        if has_several_solutions(env_id):
            agent.set_random_seed(seed)
            report[mode]["multimodality"] = multimodality(
                _Checked(agent, env_id), env_id, env_kwargs, start, seed, deterministic=mode == "deterministic"
            )
    return report


def format_table(report: dict[str, Any]) -> str:
    """The report of `evaluate_modes` as one table or, on tasks with several solutions, two."""
    lines = [f"{'return':14}{'mean':>10}{'std':>10}{'median':>10}{'IQM':>10}{'95 % interval':>22}  episode length"]
    modes = [mode for mode in ("deterministic", "sampled") if mode in report]
    for mode in modes:
        row = report[mode]
        interval = f"[{row['iqm_low']:.1f}, {row['iqm_high']:.1f}]"
        numbers = "".join(f"{row[key]:10.1f}" for key in ("mean", "std", "median", "iqm"))
        length = f"{row['length_mean']:.0f} ({row['length_min']} to {row['length_max']})"
        lines.append(f"{mode:14}{numbers}{interval:>22}  {length}")
    if "multimodality" in report[modes[0]]:
        lines += ["", format_multimodality({mode: report[mode]["multimodality"] for mode in modes})]
    return "\n".join(lines)


def record_video(
    agent: BaseAlgorithm, env_id: str, env_kwargs: dict[str, Any], path: Path, seed: int, *, sample: bool
) -> None:
    """Write a video of one episode, all or nothing.

    Raises:
        ValueError: if imageio is missing, the environment cannot be rendered at all or here, the format is not known,
            or an observation is not finite.
    """
    try:
        import imageio.v2 as imageio

        importlib.import_module("imageio_ffmpeg")  # encodes for imageio
    except ImportError as error:
        raise ValueError(f"video: {error.name} is not installed; run pip install 'imageio[ffmpeg]'") from error
    if path.suffix not in (".mp4", ".gif"):
        raise ValueError(f"video: got {path}, expected a name that ends in .mp4 or .gif")
    env: gym.Env[Any, Any] = gym.make(env_id, **env_kwargs)
    modes = env.metadata.get("render_modes") or ()
    env.close()
    if "rgb_array" not in modes:
        raise ValueError(
            f"video: {env_id} has the render modes {', '.join(modes) or 'none'}, expected rgb_array among them; leave "
            "out --video, or add that mode to the environment"
        )
    env = gym.make(env_id, **(env_kwargs | {"render_mode": "rgb_array"}))
    partial = path.with_name(f".part-{path.name}")
    follow_with_camera(env)
    model = _Checked(agent, env_id)
    try:
        obs, _ = env.reset(seed=seed)
        agent.set_random_seed(seed)
        frame = _render(env)
        fps = env.metadata.get("render_fps", 30)
        speed = {"duration": 1000 / fps} if path.suffix == ".gif" else {"fps": fps}
        writer: Any = imageio.get_writer(partial, **speed)
        with writer:
            ended = False
            while not ended:
                writer.append_data(frame)
                action, _ = model.predict(obs, deterministic=not sample)
                obs, _, terminated, truncated, _ = env.step(action)
                ended = terminated or truncated
                frame = _render(env)
            writer.append_data(frame)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
        env.close()


def follow_with_camera(env: gym.Env[Any, Any]) -> None:
    """Render through the MuJoCo model's own tracking camera, if it has one.

    Gymnasium's default camera stands still in some tasks: a cheetah has left the picture after two seconds.
    """
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is not None:
        mujoco = importlib.import_module("mujoco")
        track = mujoco.mj_name2id(renderer.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
        if track >= 0:
            renderer.camera_id = track


def _choose_renderer() -> None:
    """Render with EGL where Linux has no display: Gymnasium asks MUJOCO_GL when it makes a renderer."""
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("MUJOCO_GL", "egl")


def _render(env: gym.Env[Any, Any]) -> NDArray[np.uint8]:
    try:
        return cast(NDArray[np.uint8], env.render())
    except Exception as error:  # every OpenGL library fails in its own way
        raise _no_rendering(error) from error


def _no_rendering(error: Exception) -> ValueError:
    return ValueError(
        f"video: rendering failed with MUJOCO_GL={os.environ.get('MUJOCO_GL', 'unset')} ({error}); without a display, "
        "install EGL (apt-get install libegl1) and set MUJOCO_GL=egl, or OSMesa (apt-get install libosmesa6) and set "
        "MUJOCO_GL=osmesa"
    )


def _check_target(option: str, path: Path) -> None:
    """Refuse a file that could not be written, before episodes are spent on what it shall hold."""
    if path.is_dir():
        raise ValueError(f"{option}: got the folder {path}, expected a file; add a name")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{option}: got {path}, expected a file in an existing folder that can be written to")


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ValueError, for a one-line error in place of its usage."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise ValueError(f"{message}; see {self.prog} --help")


def fail(error: Exception) -> int:
    """Print an error in one line to stderr and return the exit code of bad input."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, or 2 for bad input."""
    usage = "%(prog)s RUN_OR_FILE [options]"
    parser = Parser(prog=Path(sys.argv[0]).name, usage=usage, description="Evaluate a saved policy.")
    parser.add_argument("path", type=Path, nargs="?", metavar="RUN_OR_FILE", help="run folder or saved .zip file")
    parser.add_argument("--episodes", type=int, default=20, help="episodes per policy, >= 1 (default: %(default)s)")
    parser.add_argument("--sample", action="store_true", help="only the sampled policy, also in video and export")
    parser.add_argument("--env", metavar="ID", help="Gymnasium id (default: the one of the run)")
    parser.add_argument("--env-kwargs", nargs="*", metavar="KEY=VALUE", help="its arguments (default: as in the run)")
    parser.add_argument("--seed", type=int, default=EVALUATION_SEED, help="0 .. 2**31 - 1 (default: %(default)s)")
    parser.add_argument("--video", type=Path, metavar="FILE", help="also write a video of one episode, .mp4 or .gif")
    parser.add_argument(
        "--start", type=float, nargs=2, metavar=("X", "Y"), help="goal tasks: where trajectories begin (default: 0 0)"
    )
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="goal tasks and mazes: also write pictures, .png")
    parser.add_argument("--json", metavar="FILE", help="also write all results as JSON; - for stdout, and nothing else")
    parser.add_argument(
        "--export", type=Path, metavar="FILE", help="also write the policy for other programs, .onnx or .pt2 (PyTorch)"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(default: %(default)s)")
    torch.set_num_threads(1)  # batches are small: more threads wait for each other
    try:
        args = parser.parse_args(argv)
        if args.path is None and args.env_kwargs:  # they took all that follows: --env-kwargs KEY=VALUE RUN_OR_FILE
            args.path = Path(args.env_kwargs.pop())
        if args.path is None:
            parser.error("got no RUN_OR_FILE, expected a run folder or saved .zip file")
        return _evaluate(args)
    except (ValueError, OSError) as error:
        return fail(error)
    except KeyboardInterrupt:
        return 130


def _evaluate(args: argparse.Namespace) -> int:
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"seed: got {args.seed}, expected an integer of 0 .. 2**31 - 1")
    if args.json not in (None, "-"):
        _check_target("json", Path(args.json))
    if args.video:
        _check_target("video", args.video)
    if args.export:
        _check_target("export", args.export)
        if args.export.suffix not in EXPORTERS:
            raise ValueError(f"export: got {args.export}, expected a name that ends in {' or '.join(EXPORTERS)}")
    if args.plot and args.plot.is_file():
        raise ValueError(f"plot: got the file {args.plot}, expected a folder")
    file = find_checkpoint(args.path)
    folder = run_folder_of(file)
    if folder is None and args.env is None:
        raise ValueError(f"env: got none, and {file} lies in no run folder that would tell it; add --env ID")
    settings = read_settings(folder) if folder else None
    same_env = settings is not None and args.env in (None, settings.env_id)
    env_id = settings.env_id if settings and args.env is None else args.env
    env_kwargs = settings.env_kwargs if settings and same_env else {}
    if args.env_kwargs is not None:
        env_kwargs = parse_env_kwargs(args.env_kwargs)
    if args.start is not None and env_id not in GOAL_TASKS:
        raise ValueError(f"start: {env_id} has no choice of it; only {' and '.join(GOAL_TASKS)} do")
    if args.plot and not has_several_solutions(env_id):
        raise ValueError(f"plot: nothing to draw for {env_id}, only for {', '.join(GOAL_TASKS)} and PointMaze ids")
    start = args.start or (0.0, 0.0)
    if args.video:
        _choose_renderer()
    check_env(env_id, **env_kwargs)
    agent = load_agent(file, args.device)

    out = sys.stderr if args.json == "-" else sys.stdout
    episodes = f"{args.episodes} episode{'s' if args.episodes != 1 else ''} each"
    print(f"{file}: {agent.num_timesteps:,} steps of training on {env_id}; {episodes}", file=out)
    policy = "sampled" if args.sample else "deterministic"
    if args.export:
        EXPORTERS[args.export.suffix](agent, args.export, sampled=args.sample)
        print(f"exported the {policy} policy to {args.export}", file=out)
    if args.video:
        print(f"recording an episode of the {policy} policy to {args.video}", file=out, flush=True)
        record_video(agent, env_id, env_kwargs, args.video, args.seed, sample=args.sample)
    if args.plot:
        paths = draw_pictures(agent, _Checked(agent, env_id), env_id, env_kwargs, start, args.seed, args.plot)
        print(f"wrote {', '.join(map(str, paths))}", file=out, flush=True)
    modes = ("sampled",) if args.sample else ("deterministic", "sampled")
    report = evaluate_modes(agent, env_id, env_kwargs, args.episodes, args.seed, modes, start)
    print(format_table(report), file=out)
    if args.json == "-":
        print(json.dumps({"file": str(file), **report}, indent=2, allow_nan=False))
    elif args.json is not None:
        write_json(Path(args.json), {"file": str(file), **report})
    return 0


if __name__ == "__main__":
    sys.exit(main())
