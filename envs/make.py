"""Vectorised environments by their Gymnasium id, with errors that say what to do."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import json
import math
import re
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from .avoid import AVOID, AvoidVecEnv
from .batch import BatchVecEnv
from .known import FETCH_TASKS, bare_task_of_id
from .memory import check_fits
from .mujoco_batch import MujocoVecEnv
from .mujoco_tasks import TASKS
from .multigoal import GOAL_TASKS, GoalVecEnv
from .tensor import TensorVecEnv
from .tensor_tasks import TENSOR_TASKS
from .workers import SupervisedVecEnv

Backend = Literal["auto", "batched", "sync", "subproc", "tensor", "warp"]


def _fetch_env(id: str, n_envs: int, **env_kwargs: Any) -> BatchVecEnv:
    from .fetch_batch import FetchVecEnv  # needs the extra maze, as the task itself

    return FetchVecEnv(id, n_envs, **env_kwargs)


_BATCHED: dict[str, Callable[..., BatchVecEnv]] = {
    **dict.fromkeys(TASKS, MujocoVecEnv),
    **dict.fromkeys(FETCH_TASKS, _fetch_env),
    **dict.fromkeys(GOAL_TASKS, GoalVecEnv),
    AVOID: AvoidVecEnv,
}
_REGISTERED_BY = {"PointMaze_": "gymnasium_robotics", "Fetch": "gymnasium_robotics", "driftrl/": "driftrl"}
"""Beginnings of ids -> the module whose import registers them, also in the processes of "subproc"."""
_ENVIRONMENT, _PROCESS = 4000, 30_000_000
"""Bytes that an environment takes at least: a point mass in a batch, a process with nothing but its imports."""


def make_vec(
    id: str, n_envs: int, seed: int | None, backend: Backend = "auto", *, worker_timeout: float = 60.0,
    worker_restarts: int = 10, device: str = "cpu", warp_solver: Literal["model", "newton"] = "model",
    warp_contacts: int | None = None, warp_constraints: int | None = None, **env_kwargs: Any,
) -> VecEnv:  # fmt: skip
    """Make ``n_envs`` copies of a registered environment, each with Stable-Baselines3's Monitor.

    Args:
        id: Gymnasium id, e.g. "HalfCheetah-v5" or "package.module:Name-v0".
        n_envs: number of environments, at least 1.
        seed: environment i is seeded with seed + i at its first reset; None for random seeds.
        backend: "batched" steps MuJoCo's v5 tasks and Fetch on all cores (`MujocoVecEnv`, `FetchVecEnv`), the
            multi-goal tasks and Avoid in NumPy (`GoalVecEnv`, `AvoidVecEnv`), with the same results; "sync" steps one
            after the other in this process, "subproc" each in a process of its own (`SupervisedVecEnv`); "tensor" steps
            the multi-goal tasks and Avoid on a device (`TensorVecEnv`): the same tasks in float32, with other random
            starts; "warp" simulates MuJoCo's v5 tasks on a device (`WarpVecEnv`, extra `gpu`), in float32, not bit for
            bit; "auto" is "batched" where that is possible, else "sync".
        worker_timeout: subproc: seconds for a step, > 0, after which a process counts as hung and is restarted.
        worker_restarts: subproc: restarts of processes that died or hang, >= 0, all together; the next is an error.
        device: tensor, warp: where the environments are.
        warp_solver: warp: "newton" where the model asks for a solver that mujoco_warp lacks (Humanoid).
        warp_contacts: warp: room for contacts per world, >= 1; None: as mujoco_warp guesses.
        warp_constraints: warp: room for constraints in each world, >= 1; None: as mujoco_warp guesses.
        **env_kwargs: arguments of the environment.

    Raises:
        ValueError: if n_envs, the backend, an option that changes nothing with it, the id, the arguments or the spaces
            are not usable, or a package is missing; see `check_env`.
    """
    if n_envs < 1:
        raise ValueError(f"n_envs: got {n_envs}, expected an integer of at least 1")
    if backend not in get_args(Backend):
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(get_args(Backend))}")
    size = _PROCESS if backend == "subproc" else _ENVIRONMENT
    check_fits(f"n_envs: got {n_envs}, which take", n_envs * size)
    check_env(id, **env_kwargs)
    task = bare_task_of_id(id)  # what the id stands for may be another class than its name lets expect
    if backend == "auto":
        backend = "batched" if task in _BATCHED and env_kwargs.get("render_mode") != "human" else "sync"
    options = (
        ("worker_timeout", worker_timeout, 60.0, ("subproc",)), ("worker_restarts", worker_restarts, 10, ("subproc",)),
        ("device", device, "cpu", ("tensor", "warp")), ("warp_solver", warp_solver, "model", ("warp",)),
        ("warp_contacts", warp_contacts, None, ("warp",)), ("warp_constraints", warp_constraints, None, ("warp",)),
    )  # fmt: skip
    for name, value, default, of in options:
        if value != default and backend not in of:
            which = " or ".join(of)
            raise ValueError(f"{name}: got {value}, which changes nothing without backend {which}, got {backend}")
    if backend == "tensor":
        return _tensor_env(id, task, n_envs, seed, device, env_kwargs)
    if backend == "warp":
        room = {"contacts": warp_contacts, "constraints": warp_constraints}
        return _warp_env(id, n_envs, seed, device=device, solver=warp_solver, **room, **env_kwargs)
    if backend == "batched":
        if task not in _BATCHED:
            what = "an environment that is wrapped or of another class" if id in _BATCHED else "another environment"
            raise ValueError(f"batched: got {id!r}, {what}, expected one of {', '.join(_BATCHED)}; use another backend")
        env = _BATCHED[task](id, n_envs, **env_kwargs)
        env.seed(seed)
        return env
    kind: Any = DummyVecEnv  # make_vec_env's own types leave no room for functions
    if backend == "subproc":
        kind = functools.partial(SupervisedVecEnv, timeout=worker_timeout, max_restarts=worker_restarts)
    # Given the id itself, make_vec_env would ask for a render mode.
    maker = functools.partial(gym.make, with_module(id))
    return make_vec_env(maker, n_envs=n_envs, seed=seed, vec_env_cls=kind, env_kwargs=env_kwargs)


def _tensor_env(
    id: str, task: str | None, n_envs: int, seed: int | None, device: str, env_kwargs: dict[str, Any]
) -> VecEnv:
    if task not in TENSOR_TASKS:
        expected = f"expected one of {', '.join(TENSOR_TASKS)}"
        raise ValueError(f"tensor: got {id!r}, another environment, {expected}; use another backend")
    if render_mode := env_kwargs.get("render_mode"):
        raise ValueError(f"tensor: got render_mode={render_mode!r}, expected None; use another backend to see it")
    spec = gym.registry[id.rpartition(":")[2]]
    steps = env_kwargs.get("max_episode_steps")
    steps = spec.max_episode_steps if steps is None else steps
    limit = math.inf if steps is None or steps < 0 else steps
    arguments = {name: value for name, value in env_kwargs.items() if name not in ("max_episode_steps", "render_mode")}
    made = TENSOR_TASKS[task](limit, **spec.kwargs | arguments)
    made.spec = dataclasses.replace(spec, kwargs=spec.kwargs | arguments)  # by which agents know its rules
    env = TensorVecEnv(made, n_envs, device)
    env.seed(seed)
    return env


def _warp_env(id: str, n_envs: int, seed: int | None, **arguments: Any) -> VecEnv:
    try:
        from .warp_batch import WarpVecEnv
    except ImportError as error:
        message = f"warp: needs a package that is not installed, {error.name}; run pip install 'driftrl[gpu]'"
        raise ValueError(message) from error
    env = WarpVecEnv(id, n_envs, **arguments)
    env.seed(seed)
    return env


def with_module(id: str) -> str:
    """The id with the module that registers it, if we know one: "module:id"."""
    modules = (module for beginning, module in _REGISTERED_BY.items() if id.startswith(beginning))
    return ":".join([*modules, id])


def check_env(id: str, **env_kwargs: Any) -> None:
    """Make the environment once and check that agents of this library can act in it.

    With arguments it is also reset and stepped once: a constructor takes many that the first step cannot use.

    Raises:
        ValueError: if the id is unknown, its package is missing, making it fails, the spaces are other than Box
            actions with finite bounds and Box observations (or a Dict of Boxes) that are no images, or it cannot be
            stepped with its arguments.
    """
    try:
        env: gym.Env[Any, Any] = gym.make(with_module(id), **env_kwargs)
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        what = f": {error}"
        if "gymnasium_robotics" in str(error):
            what = ", gymnasium-robotics; run pip install 'driftrl[maze]'"
        raise ValueError(f"environment {id!r} needs a package that is not installed{what}") from error
    except Exception as error:  # whatever the environment raises
        if id.rpartition(":")[2] in gym.registry or not isinstance(error, gym.error.Error):
            message = f"environment {id!r} cannot be made with the arguments {env_kwargs}"
            raise ValueError(f"{message}: {type(error).__name__}: {error}") from error
        near = _near_ids(id)
        remedy = f"did you mean {', '.join(near)}?" if near else "gymnasium.pprint_registry() lists them"
        raise ValueError(f"unknown environment: got {id!r}, expected a registered Gymnasium id; {remedy}") from error
    try:
        check_spaces(env.observation_space, env.action_space)
    except ValueError as error:
        env.close()
        raise ValueError(f"{id}: {error}") from error
    try:
        if env_kwargs and env.render_mode != "human":
            _try(id, env, env_kwargs)
    finally:
        env.close()


def _near_ids(id: str) -> list[str]:
    """Registered ids like one that is unknown, with its module, the nearest first.

    Names count, not versions, of which two ids share so many letters that Ant-v5 would be near Pong-v5.
    """
    module, colon, name = id.rpartition(":")
    newest: dict[str, str] = {}
    for spec in sorted(gym.registry.values(), key=lambda spec: spec.version or 0):
        newest[_without_version(spec.id).lower()] = spec.id
    near = difflib.get_close_matches(_without_version(name).lower(), newest, n=3, cutoff=0.75)
    return [f"{module}{colon}{newest[each]}" for each in near]


def _without_version(id: str) -> str:
    return re.sub(r"-v\d+$", "", id)


def _try(id: str, env: gym.Env[Any, Any], env_kwargs: Mapping[str, Any]) -> None:
    """Reset and step an environment once, with a random action; see `check_env`."""
    env.action_space.seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the environments that are used will give the same
            env.reset(seed=0)
            reward = float(env.step(env.action_space.sample())[1])
    except Exception as error:  # whatever the environment raises
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.filename}:{place.lineno}"
        raise ValueError(
            f"env-kwargs: {id} with {dict(env_kwargs)} cannot be stepped: {type(error).__name__}: {error} "
            f"(in {where}); check their names and types"
        ) from error
    # Only where an argument explains it: environments may give such numbers, and agents can leave them out.
    if not math.isfinite(reward) and any(True for _ in _not_finite(env_kwargs.values())):
        raise ValueError(
            f"env-kwargs: {id} with {dict(env_kwargs)} begins with a reward of {reward}; check their values"
        )


def _not_finite(values: Iterable[Any]) -> Iterator[float]:
    """The numbers among values, and in lists among them, that are not finite."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _not_finite(value)
        elif isinstance(value, float) and not math.isfinite(value):
            yield value


def has_time_limit(id: str, env_kwargs: Mapping[str, Any]) -> bool:
    """Whether episodes of an environment end after a number of steps at the latest, as far as its spec says."""
    module, _, name = with_module(id).rpartition(":")
    if module and name not in gym.registry:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)  # registers it
    spec, limit = gym.registry.get(name), env_kwargs.get("max_episode_steps")
    if limit is None:  # which gym.make takes as the spec's
        limit = spec.max_episode_steps if spec else None
    return limit is not None and limit > 0


def parse_env_kwargs(items: Sequence[str]) -> dict[str, Any]:
    """Arguments of an environment from the command line: ``key=value`` (JSON value or plain text), or JSON objects.

    Raises:
        ValueError: if an item is neither.
    """
    env_kwargs: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        try:
            parsed = json.loads(text if key.isidentifier() else item)
        except json.JSONDecodeError:
            parsed = text
        if key.isidentifier() and equals:
            env_kwargs[key] = parsed
        elif isinstance(parsed, dict):
            env_kwargs |= parsed
        else:
            raise ValueError(f"env-kwargs: got {item!r}, expected key=value or a JSON object")
    return env_kwargs


def check_spaces(observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    """Refuse spaces that agents of this library cannot act in.

    Raises:
        ValueError: unless actions are a Box of floats with finite bounds and observations a Box, or a Dict of Boxes, of
            vectors.
    """
    if not (isinstance(action_space, spaces.Box) and action_space.is_bounded()):
        raise ValueError(
            f"unsupported action space: got {action_space}, expected a Box with finite bounds; choose an environment "
            "with continuous actions or wrap it"
        )
    if action_space.dtype not in (np.float32, np.float64):
        raise ValueError(
            f"unsupported action space: got numbers of type {action_space.dtype}, expected float32 or float64; wrap it "
            "with gymnasium.wrappers.TransformAction"
        )
    with np.errstate(over="ignore"):
        if not np.isfinite(action_space.high - action_space.low).all():
            raise ValueError(
                f"unsupported action space: got bounds farther apart than {action_space.dtype} can express, "
                f"{action_space}; wrap it with gymnasium.wrappers.RescaleAction"
            )
    parts = observation_space.spaces.values() if isinstance(observation_space, spaces.Dict) else [observation_space]
    if any(is_image_space(part) for part in parts):
        raise ValueError(
            f"unsupported observation space: got images, {observation_space}, expected vectors; encode the images to "
            "vectors with a wrapper"
        )
    if not all(isinstance(part, spaces.Box) for part in parts):
        raise ValueError(
            f"unsupported observation space: got {observation_space}, expected a Box, or a Dict of them; flatten it "
            "with a wrapper such as gymnasium.wrappers.FlattenObservation"
        )
