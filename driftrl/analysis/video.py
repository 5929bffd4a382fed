"""Videos of a policy."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm

from .evaluation import MAX_STEPS, CheckedPolicy, limited


def record_video(
    agent: BaseAlgorithm, env_id: str, env_kwargs: dict[str, Any], path: Path, seed: int, *, sample: bool,
    max_steps: int = MAX_STEPS,
) -> None:  # fmt: skip
    """Write a video of one episode, all or nothing; it is cut off as in `evaluate_agent`.

    Raises:
        ValueError: if imageio is missing, the environment cannot be rendered at all or here, the format is not known,
            or an observation is not finite.
    """
    try:
        import imageio.v2 as imageio

        importlib.import_module("imageio_ffmpeg")  # encodes for imageio
    except ImportError as error:
        raise ValueError(f"video: {error.name} is not installed; run pip install 'driftrl[video]'") from error
    if path.suffix not in (".mp4", ".gif"):
        raise ValueError(f"video: got {path}, expected a name that ends in .mp4 or .gif")
    env_kwargs = limited(env_id, env_kwargs, max_steps)
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
    model = CheckedPolicy(agent, env_id)
    try:
        obs, _ = env.reset(seed=seed)
        agent.set_random_seed(seed)
        frame = _render(env)
        fps = env.metadata.get("render_fps", 30)
        speed = {"duration": 1000 / fps} if path.suffix == ".gif" else {"fps": fps}
        writer: Any = imageio.get_writer(partial, **speed)
        with writer:
            ended, state = False, None
            while not ended:
                writer.append_data(frame)
                action, state = model.predict(obs, state, deterministic=not sample)
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


def choose_renderer() -> None:
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
