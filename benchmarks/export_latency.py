"""Time of one action on a CPU: a policy exported to ONNX and run by onnxruntime, against `predict`.

    OMP_NUM_THREADS=1 python benchmarks/export_latency.py --output benchmarks/results/export_latency.json

The two take turns in one process, a block of calls at a time; one thread each. The ratio is onnxruntime's time over
that of `predict`, block by block: median and quartiles.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import tyro
from latency import block
from paired import machine, ratio, take_turns, write

from driftrl import LipschitzMBPO, PolicyFlow
from driftrl.analysis.export import export_onnx


def main(
    env_id: str = "HalfCheetah-v5", width: int = 256, calls: int = 200, rounds: int = 31, output: Path | None = None
) -> None:
    """Print the table.

    Args:
        env_id: Gymnasium id.
        width: of both hidden layers.
        calls: calls in a block.
        rounds: blocks of each contender.
        output: also write the figures there, as JSON.
    """
    torch.set_num_threads(1)
    packages = ("torch", "onnxruntime", "numpy")
    report: dict[str, Any] = {"machine": machine(*packages), "env_id": env_id, "width": width, "rows": []}
    print(report["machine"])
    print("| agent | mode | predict, median us | onnxruntime, median us | 99 % us | time / predict's |")
    print("|---|---|---|---|---|---|")
    hidden: dict[str, Any] = {"actor_hidden": (width, width), "device": "cpu"}
    agents: dict[str, Any] = {
        "PolicyFlow, 2 Euler steps": PolicyFlow("MlpPolicy", env_id, **hidden),
        "LipschitzMBPO": LipschitzMBPO("MlpPolicy", env_id, model="none", buffer_size=1, **hidden),
    }
    for name, agent in agents.items():
        for sampled in (False, True):
            obs = agent.observation_space.sample()
            single: dict[str, list[float]] = {"predict": [], "onnxruntime": []}
            contenders = {
                "predict": partial(agent.predict, obs, deterministic=not sampled),
                "onnxruntime": partial(act, session_of(agent, sampled), agent.policy, obs, sampled),
            }
            seconds = take_turns(
                {key: partial(block, call, calls, single[key]) for key, call in contenders.items()}, rounds
            )
            row: dict[str, Any] = {"agent": name, "mode": "sampled" if sampled else "deterministic"}
            row["predict_us"], row["onnxruntime_us"] = (1e6 * float(np.median(single[key])) for key in contenders)
            row["onnxruntime_p99_us"] = 1e6 * float(np.quantile(single["onnxruntime"], 0.99))
            row["over_predict"] = ratio(seconds["onnxruntime"], seconds["predict"])
            report["rows"].append(row)
            times = " | ".join(f"{row[key]:.0f}" for key in ("predict_us", "onnxruntime_us", "onnxruntime_p99_us"))
            print(f"| {name} | {row['mode']} | {times} | {row['over_predict']} |", flush=True)
    write(output, report)


def session_of(agent: Any, sampled: bool) -> Any:
    """The exported policy, ready to run in one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.onnx"
        export_onnx(agent, path, sampled=sampled)
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def act(session: Any, policy: Any, obs: np.ndarray, sampled: bool) -> np.ndarray:
    """One action of one observation, with the noise drawn by numpy."""
    inputs = {"obs": obs.astype(np.float32)[None]}
    if sampled:
        inputs["noise"] = np.random.standard_normal((1, policy.draws, policy.action_dim)).astype(np.float32)
    return np.asarray(session.run(None, inputs)[0][0])


if __name__ == "__main__":
    tyro.cli(main)
