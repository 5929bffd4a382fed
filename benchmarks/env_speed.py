"""Environment steps per second: our batches against Gymnasium's vector environments, EnvPool and the bare simulator.

    python benchmarks/env_speed.py --output benchmarks/results/env_speed.json
    pip install 'driftrl[envpool]'          # for EnvPool; without it its column stays empty
    python benchmarks/env_speed.py --tasks FetchPush-v4 FetchPickAndPlace-v4     # pip install 'driftrl[maze]'

All take turns in one process, with the same number of environments and random actions that are drawn beforehand. "bare"
is `mj_step` alone on all cores, from the states that our environments are in; it reads MuJoCo's clock, which our
batches do not. The table has our steps per second over the peer's: median and quartiles over the rounds. Resets are
included, but for the bare simulator.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import mujoco
import numpy as np
import tyro
from paired import machine, ratio, spread, take_turns, write

from driftrl.envs.known import FETCH_TASKS
from driftrl.envs.make import make_vec, with_module
from driftrl.envs.mujoco_batch import MujocoVecEnv, available_cores

TASKS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Swimmer-v5", "InvertedPendulum-v5", "Ant-v5", "Humanoid-v5")


def main(
    tasks: tuple[str, ...] = TASKS,
    n_envs: int = 64,
    steps: int = 30,
    rounds: int = 21,
    output: Path | None = None,
) -> None:
    """Print the table.

    Args:
        tasks: Gymnasium ids.
        n_envs: environments in each batch.
        steps: steps of the batch per turn.
        rounds: turns of each contender.
        output: also write the figures there, as JSON.
    """
    has_envpool = importlib.util.find_spec("envpool") is not None
    packages = ["mujoco", "gymnasium", "stable-baselines3", "numpy", *(["envpool"] if has_envpool else [])]
    report: dict[str, Any] = {"machine": machine(*packages), "n_envs": n_envs, "steps": steps, "tasks": {}}
    print(report["machine"])
    print("| task | our steps/s | bare mj_step, all cores | SyncVectorEnv | AsyncVectorEnv | EnvPool |")
    print("|---|---|---|---|---|---|")
    for id in tasks:
        contenders, close = prepare(id, n_envs, steps, has_envpool)
        seconds = take_turns(contenders, rounds, warmup=3)
        close()
        per_turn = steps * n_envs
        rates = {name: spread([per_turn / s for s in values]).median for name, values in seconds.items()}
        ratios = {name: ratio(values, seconds["driftrl"]) for name, values in seconds.items() if name != "driftrl"}
        report["tasks"][id] = {"steps_per_second": rates, "driftrl_over": ratios}
        cells = [str(ratios.get(name, "-")) for name in ("bare", "sync", "async", "envpool")]
        print(f"| {id} | {rates['driftrl']:,.0f} | {' | '.join(cells)} |", flush=True)
    write(output, report)


def prepare(
    id: str, n_envs: int, steps: int, has_envpool: bool
) -> tuple[dict[str, Callable[[], None]], Callable[[], None]]:
    """The contenders' turns, and what closes them."""
    ours = cast(MujocoVecEnv, make_vec(id, n_envs, 0, "batched"))
    ours.reset()
    space = cast(gym.spaces.Box, ours.action_space)
    rng = np.random.default_rng(0)
    actions: np.ndarray = rng.uniform(space.low, space.high, (steps, n_envs, *space.shape)).astype(np.float32)

    def vector_turn(env: Any) -> Callable[[], None]:
        def turn() -> None:
            for a in actions:
                env.step(a)

        return turn

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sync, asynchronous = (gym.make_vec(with_module(id), n_envs, kind) for kind in ("sync", "async"))
    for env in (sync, asynchronous):
        env.reset(seed=0)
    bare, close_bare = bare_turn(ours, steps)
    contenders = {
        "driftrl": vector_turn(ours),
        "bare": bare,
        "sync": vector_turn(sync),
        "async": vector_turn(asynchronous),
    }
    if has_envpool and id not in FETCH_TASKS:
        import envpool

        # As many threads as cores: its own default would be one per environment.
        pool = envpool.make_gymnasium(id, num_envs=n_envs, num_threads=available_cores(), seed=0)
        pool.reset()
        contenders["envpool"] = vector_turn(pool)

    def close() -> None:
        for env in (ours, sync, asynchronous):
            env.close()
        close_bare()

    return contenders, close


def bare_turn(ours: MujocoVecEnv, steps: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """`mj_step` alone on all cores, from the states in which our environments are now."""
    model, cores = ours.simulators.model, available_cores()
    frames = ours.simulators.frames
    datas = [mujoco.MjData(model) for _ in ours.simulators.datas]
    chunks = [datas[i::cores] for i in range(cores)]
    pool = ThreadPoolExecutor(cores)

    def advance(chunk: list[Any]) -> None:
        for _ in range(steps):
            for data in chunk:
                mujoco.mj_step(model, data, frames)

    def turn() -> None:
        for data, source in zip(datas, ours.simulators.datas, strict=True):
            mujoco.mj_copyData(data, model, source)
        list(pool.map(advance, chunks))

    return turn, pool.shutdown


if __name__ == "__main__":
    tyro.cli(main)
