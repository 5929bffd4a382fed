"""Environment steps per second of two ranks against one process, on this machine.

    OMP_NUM_THREADS=1 python benchmarks/ranks.py --output benchmarks/results/ranks.json

One PyTorch thread per process, the preset of the task. "Halves": each of two ranks has half of the environments and
half of the minibatch, which is the training of the one process. "Wholes": each rank has as many as the one process, so
that rollouts and minibatches of both together are twice as large. The contenders take turns; compilation is finished
before the first turn. The ratio is that of steps per second to those of one process: median and quartiles over the
turns. Processor time is that of all processes together, per 100,000 steps: what other programs on the machine take does
not count in it.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tyro
from paired import machine, ratio, spread, take_turns, write


def serve(
    connection: Connection, rank: int, size: int, store: str, share: int, env_id: str, compiled: str, iterations: int
) -> None:
    """Train some iterations whenever told to."""
    import torch
    import torch.distributed as dist
    from learning_arms import preset

    from driftrl import PolicyFlow
    from driftrl.envs import make_vec

    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    n_envs, config = preset(env_id)
    env = make_vec(env_id, n_envs // share, 0)
    agent = PolicyFlow(
        "MlpPolicy", env, config=config, batch_size=config.batch_size // share, compile=compiled, seed=0, device="cpu"
    )
    rollout = config.n_steps * n_envs * size // share
    agent.learn(rollout)
    connection.send(rollout * iterations)
    while connection.recv():
        before = time.process_time()
        agent.learn(rollout * iterations, reset_num_timesteps=False)
        connection.send(time.process_time() - before)


def main(
    env_ids: tuple[str, ...] = ("Hopper-v5", "Ant-v5"),
    compiled: tuple[str, ...] = ("off", "on"),
    rounds: int = 9,
    iterations: int = 4,
    output: Path | None = None,
) -> None:
    """Print the table, and write it with all times.

    Args:
        env_ids: Gymnasium ids.
        compiled: values of `compile`.
        rounds: turns of each contender.
        iterations: of training in a turn.
        output: JSON file to write.
    """
    contenders = {"one process": (1, 1), "halves": (2, 2), "wholes": (2, 1)}
    results = []
    print("| task | compile | one process, steps/s | halves | wholes | processor time of 100,000 steps, s |")
    print("|---|---|---|---|---|---|")
    for env_id in env_ids:
        for choice in compiled:
            with tempfile.TemporaryDirectory() as folder:
                calls, steps, stop = {}, dict[str, int](), list[Any]()
                used: dict[str, list[float]] = {name: [] for name in contenders}
                for name, (size, share) in contenders.items():
                    started = start(size, f"{folder}/{name}", share, env_id, choice, iterations)
                    steps[name], *_ = [ready(each) for _, each in started]
                    calls[name] = partial(turn, [each for _, each in started], used[name])
                    stop += started
                seconds = take_turns(calls, rounds)
                for process, connection in stop:
                    connection.send(False)
                    process.join()
            rates = {name: [steps[name] / each for each in times] for name, times in seconds.items()}
            base = rates["one process"]
            ratios = {name: ratio(each, base) for name, each in rates.items() if each is not base}
            costs = [1e5 * spread(times[-rounds:]).median / steps[name] for name, times in used.items()]
            processor = ", ".join(f"{cost:.1f}" for cost in costs)
            cells = [f"{spread(base).median:,.0f}", *map(str, ratios.values()), processor]
            print(f"| {env_id} | {choice} | {' | '.join(cells)} |", flush=True)
            results.append({"env": env_id, "compile": choice, "steps": steps, "seconds": seconds, "processor": used})
    if output is not None:
        write(output, {"machine": machine("torch", "mujoco"), "results": results})


def start(size: int, store: str, share: int, env_id: str, compiled: str, iterations: int) -> list[tuple[Any, Any]]:
    """The processes of a contender, with a connection to each."""
    context = multiprocessing.get_context("spawn")
    started = []
    for rank in range(size):
        ours, theirs = context.Pipe()
        arguments = (theirs, rank, size, store, share, env_id, compiled, iterations)
        process = context.Process(target=serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
    return started


def ready(connection: Connection) -> int:
    """Wait until a process may be told to train; returns the steps of a turn."""
    return int(connection.recv())


def turn(connections: list[Connection], used: list[float]) -> None:
    """Let a contender train; notes the processor time of its processes."""
    for each in connections:
        each.send(True)
    used.append(sum(float(each.recv()) for each in connections))


if __name__ == "__main__":
    tyro.cli(main)
