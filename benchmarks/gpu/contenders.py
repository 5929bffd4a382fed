"""What the measurements share: environments without a simulator, turns within a time, rows of figures."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gpu.part import NO_CUDA, Report, synchronize
from gymnasium import spaces
from paired import ratio, spread, take_turns
from stable_baselines3.common.vec_env import VecEnv

ENV_ID = "HalfCheetah-v5"
OBS_DIM, ACTION_DIM = 17, 6
COMPILE_SECONDS = 45.0
"""What is kept free for a compilation: on a GPU it takes as long, or nobody knows."""


class NoiseVecEnv(VecEnv):
    """Random observations and rewards in HalfCheetah-v5's spaces: an update's work does not depend on their values."""

    def __init__(self, n_envs: int) -> None:
        observation_space = spaces.Box(-np.inf, np.inf, (OBS_DIM,), np.float64)
        action_space = spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)
        self.metadata = {"render_modes": []}
        self.render_mode = None
        super().__init__(n_envs, observation_space, action_space)
        self._random = np.random.default_rng(0)

    def reset(self) -> np.ndarray:
        return self._random.normal(size=(self.num_envs, OBS_DIM))

    def step_async(self, actions: np.ndarray) -> None:
        self._cost = np.square(actions).sum(1)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        reward = (self._random.normal(size=self.num_envs) - self._cost).astype(np.float32)
        return self.reset(), reward, np.zeros(self.num_envs, bool), [{} for _ in range(self.num_envs)]

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name, None)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *arguments: Any, indices: Any = None, **keywords: Any) -> list[Any]:
        raise NotImplementedError(method_name)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


@dataclass(frozen=True)
class Contender:
    """Something that is timed.

    Args:
        device: where it runs.
        build: makes it ready, compiled and warm, and returns its turn.
        compiled: its building takes `COMPILE_SECONDS` or so.
        threads: CPU threads of PyTorch in its turn.
    """

    device: str
    build: Callable[[], Callable[[], object]]
    compiled: bool = False
    threads: int = 1


def measure(
    report: Report, contenders: Mapping[str, Contender], *, updates: int, seconds: float, rounds: int, reference: str
) -> dict[str, Any]:
    """Build the contenders and let them take turns; those that fail or find no time are rows that say so.

    Args:
        report: decides on device and time.
        contenders: by name.
        updates: gradient updates in a turn.
        seconds: for all turns together, about.
        rounds: turns of each contender at most; at least three.
        reference: contender in whose time the others' ratios are; it is no row of its own if it failed.
    """
    rows: dict[str, Any] = {}
    turns: dict[str, Callable[[], object]] = {}
    for name, contender in contenders.items():
        if contender.device == "cuda" and not report.cuda:
            rows[name] = {"left_out": NO_CUDA}
        elif report.left() < seconds + (COMPILE_SECONDS if contender.compiled else 5.0):
            rows[name] = {"left_out": "out of time"}
        else:
            start = time.perf_counter()
            try:
                turns[name] = _on_device(contender, contender.build())
            except Exception as error:  # the others are still to be measured
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
                rows[name] = {"failed": f"{type(error).__name__}: {error}"}
            else:
                rows[name] = {"threads": contender.threads, "ready_after_s": time.perf_counter() - start}
                print(f"{name}: ready after {rows[name]['ready_after_s']:.1f} s", flush=True)
    if not turns:
        return rows
    start = time.perf_counter()
    for turn in turns.values():
        turn()
    possible = int(min(seconds, max(report.left() - 5.0, 0.0)) / (time.perf_counter() - start))
    times = take_turns(turns, max(3, min(rounds, possible)), warmup=0)
    for name, each in times.items():
        rows[name] |= {"ms_per_update": _numbers([1e3 * second / updates for second in each]), "turns": len(each)}
        if reference in times:
            rows[name][f"speed_over_{reference}"] = _numbers(None, ratio(times[reference], each))
    gc.collect()
    if report.cuda:
        torch.cuda.empty_cache()
    return rows


def _on_device(contender: Contender, turn: Callable[[], object]) -> Callable[[], None]:
    """A turn with its threads that ends when the device is done."""

    def timed() -> None:
        torch.set_num_threads(contender.threads)
        turn()
        synchronize(contender.device)

    return timed


def _numbers(values: Sequence[float] | None, quartiles: Any = None) -> list[float]:
    """Lower quartile, median, upper quartile, rounded to four digits."""
    return [float(f"{each:.4g}") for each in (spread(values) if values is not None else quartiles)]


def failures(rows: Mapping[str, Any]) -> list[str]:
    """Sentences about the contenders that failed."""
    return [f"{name}: {row['failed']}" for name, row in rows.items() if "failed" in row]


def speedup(rows: Mapping[str, Any], fast: str, slow: str) -> str:
    """How many times faster one contender is than another, in words, from their medians."""
    medians = [rows.get(name, {}).get("ms_per_update") for name in (fast, slow)]
    if any(each is None for each in medians):
        return f"{fast} over {slow}: not measured"
    return f"{fast} {medians[1][1] / medians[0][1]:.2f} x {slow}"
