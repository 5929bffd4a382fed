"""Training steps per second: PolicyFlow against Stable-Baselines3's PPO at the same work.

    OMP_NUM_THREADS=1 python benchmarks/train_speed.py --output benchmarks/results/train_speed.json

Same environments, rollout size, epochs, minibatch size and widths (those of our preset); VecNormalize in place of our
normalisers. Every contender lives in a process of its own, because threads and peak memory belong to a process. They
take turns, one iteration (rollout and update) at a time, and only one of them runs. Compilation is finished before the
first turn; its time is printed. The ratio is the peer's time over ours: median and quartiles over the turns. The child
in the figure of memory is the C++ compiler; Stable-Baselines3's workers live on and are not in it.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
import warnings
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tyro
from paired import machine, ratio, spread, take_turns, write

CONTENDERS = ("driftrl compiled", "driftrl eager", "sb3 dummy", "sb3 subproc")


def make_agent(contender: str, env_id: str, n_envs: int, threads: int) -> Any:
    """The agent of a contender, at the work of our preset."""
    import torch
    from learning_arms import preset
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
    from torch import nn

    from driftrl import PolicyFlow
    from driftrl.envs import make_vec

    torch.set_num_threads(threads)
    preset_envs, config = preset(env_id)
    steps = config.n_steps * preset_envs // n_envs
    library, kind = contender.split()
    if library == "driftrl":
        env = make_vec(env_id, n_envs, 0)
        choice = "on" if kind == "compiled" else "off"
        return PolicyFlow("MlpPolicy", env, config=config, n_steps=steps, compile=choice, seed=0, device="cpu")
    classes: dict[str, Any] = {"dummy": DummyVecEnv, "subproc": SubprocVecEnv}
    env = VecNormalize(make_vec_env(env_id, n_envs, 0, vec_env_cls=classes[kind]), gamma=config.gamma)
    network = {
        "activation_fn": {"silu": nn.SiLU, "mish": nn.Mish, "tanh": nn.Tanh, "elu": nn.ELU}[config.activation],
        "net_arch": {"pi": list(config.actor_hidden), "vf": list(config.critic_hidden)},
    }
    return PPO(
        "MlpPolicy", env, n_steps=steps, batch_size=config.batch_size, n_epochs=config.n_epochs, gamma=config.gamma,
        gae_lambda=config.gae_lambda, policy_kwargs=network, seed=0, device="cpu",
    )  # fmt: skip


def serve(connection: Connection, contender: str, env_id: str, n_envs: int, threads: int, warmup: int) -> None:
    """One iteration for each request; answers: seconds of rollout and of update, peak MB of itself and of a child."""
    agent = make_agent(contender, env_id, n_envs, threads)
    iteration, times = agent.n_steps * n_envs, dict.fromkeys(("collect_rollouts", "train"), 0.0)

    def timed(name: str, function: Any, *arguments: Any, **keywords: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments, **keywords)
        times[name] += time.perf_counter() - start
        return result

    warnings.filterwarnings("ignore", "this agent cannot be saved")  # for the functions in place of its methods
    for name in times:
        setattr(agent, name, partial(timed, name, getattr(agent, name)))
    start = time.perf_counter()
    agent.learn(warmup * iteration)
    connection.send((time.perf_counter() - start, iteration))
    while connection.recv():
        times.update(dict.fromkeys(times, 0.0))
        agent.learn(iteration, reset_num_timesteps=False)
        memory = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        connection.send((*times.values(), *memory))
    agent.get_env().close()


def main(
    env_id: str = "HalfCheetah-v5",
    n_envs: tuple[int, ...] = (16, 64),
    threads: int = 1,
    rounds: int = 15,
    warmup: int = 6,
    output: Path | None = None,
) -> None:
    """Print the table.

    Args:
        env_id: Gymnasium id.
        n_envs: numbers of environments to compare at; the rollout keeps its size.
        threads: PyTorch threads of each contender.
        rounds: turns of each contender.
        warmup: iterations before the first turn; compilation falls into the first.
        output: also write the figures there, as JSON.
    """
    packages = ("torch", "mujoco", "gymnasium", "stable-baselines3", "numpy")
    report: dict[str, Any] = {"machine": machine(*packages), "env_id": env_id, "threads": threads, "n_envs": {}}
    print(report["machine"])
    head = "| task | envs | contender | steps/s | time / driftrl compiled | rollout ms | update ms | MB | child MB |"
    print(f"{head} warm-up s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for n in n_envs:
        rows = compare(env_id, n, threads, rounds, warmup)
        report["n_envs"][n] = rows
        for name, row in rows.items():
            cells = [f"{row[key]:.0f}" for key in ("rollout_ms", "update_ms", "peak_mb", "peak_child_mb", "warmup_s")]
            print(
                f"| {env_id} | {n} | {name} | {row['steps_per_second']:,.0f} | {row['ratio']} | {' | '.join(cells)} |",
                flush=True,
            )
    write(output, report)


def compare(env_id: str, n_envs: int, threads: int, rounds: int, warmup: int) -> dict[str, Any]:
    """All contenders at one number of environments."""
    context = multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    connections, processes, warmups = {}, [], {}
    answers: dict[str, list[Any]] = {name: [] for name in CONTENDERS}
    iteration = 0
    for name in CONTENDERS:
        connections[name], theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, name, env_id, n_envs, threads, warmup))
        process.start()
        processes.append(process)
        warmups[name], iteration = connections[name].recv()

    def turn(name: str) -> None:
        connections[name].send(True)
        answers[name].append(connections[name].recv())

    seconds = take_turns({name: partial(turn, name) for name in CONTENDERS}, rounds)
    for name in CONTENDERS:
        connections[name].send(False)
    for process in processes:
        process.join()
    rows = {}
    for name in CONTENDERS:
        rollout, update, memory, child = zip(*answers[name][-rounds:], strict=True)
        rows[name] = {
            "steps_per_second": spread([iteration / s for s in seconds[name]]).median,
            "ratio": ratio(seconds[name], seconds["driftrl compiled"]),
            "rollout_ms": 1e3 * spread(rollout).median,
            "update_ms": 1e3 * spread(update).median,
            "peak_mb": max(memory),
            "peak_child_mb": max(child),
            "warmup_s": warmups[name],
        }
    return rows


if __name__ == "__main__":
    tyro.cli(main)
