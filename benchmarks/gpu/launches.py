"""What a GPU has to do in a training by `--backend warp`, counted on Warp's CPU device: launches, FLOP, bytes.

    PYTHONPATH=.:benchmarks python benchmarks/gpu/launches.py [--output benchmarks/results/gpu/launches.json]

Counted are, of a step of all environments, Warp's launches, which a CUDA graph replays, and PyTorch's operations that
are no views, each a launch at least; and of an update of PolicyFlow, by the HalfCheetah-v5 preset in eager mode, its
operations in a minibatch and its floating-point operations and values read and written per sample. None of these depend
on the device, but for the solver's iterations: they run as long as some world needs them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import warp as wp
from gpu.contenders import ENV_ID
from gpu.policyflow_update import Size, flow_turn
from stable_baselines3.common.callbacks import BaseCallback
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

TASKS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5", "InvertedPendulum-v5")
WORLDS = 64


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations that are no views, and the bytes of the tensors that they take and make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.count += 1
            tensors = [
                each for each in torch.utils._pytree.tree_leaves((args, result)) if isinstance(each, torch.Tensor)
            ]
            self.bytes += sum(each.numel() * each.element_size() for each in tensors)
        return result


class Quiet(BaseCallback):
    def _on_step(self) -> bool:
        return True


def rollout(id: str) -> dict[str, float]:
    """Launches of a step of all environments, in the mean of a rollout's steps."""
    from driftrl import PolicyFlow
    from driftrl.envs.warp_batch import WarpVecEnv

    launched = 0
    originals = {name: getattr(wp, name) for name in ("launch", "launch_tiled", "copy")}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal launched
            launched += 1
            return originals[name](*args, **kwargs)

        return call

    env, found = WarpVecEnv(id, WORLDS), []
    for steps in (8, 40):
        agent = PolicyFlow("MlpPolicy", env, n_steps=steps, batch_size=WORLDS * 8, compile="off", device="cpu", seed=0)
        agent._setup_learn(10**6)
        callback = Quiet()
        callback.init_callback(agent)
        for name in originals:
            setattr(wp, name, counting(name))
        launched = 0
        try:
            with Operations() as operations:
                agent.collect_rollouts(env, callback, agent.rollout_buffer, steps)
        finally:
            for name, original in originals.items():
                setattr(wp, name, original)
        found.append((launched, operations.count))
    noise, _ = agent._draw_noise(1, WORLDS)
    with Operations() as acting, torch.no_grad():
        agent._act(agent.storage.features[0], noise[0])
    warp, torch_ = ((after - before) / 32 for before, after in zip(*found, strict=True))
    return {"warp_launches": warp, "torch_operations": torch_, "of_which_policy": acting.count}


def update() -> dict[str, float]:
    """Work of a minibatch of 512 samples in eager mode."""
    counts = []
    for epochs in (1, 3):
        turn = flow_turn(Size(512, 4, epochs), False, "cpu", "off")
        with Operations() as operations, FlopCounterMode(display=False) as flops:
            turn()
        counts.append((operations.count, flops.get_total_flops(), operations.bytes))
    operations_, flop, bytes_ = ((b - a) / 8 for a, b in zip(*counts, strict=True))
    return {"torch_operations": operations_, "flop_per_sample": flop / 512, "bytes_per_sample": bytes_ / 512}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"worlds": WORLDS, "rollout": {id: rollout(id) for id in TASKS}, "update": update()}
    print("| task | Warp's launches | PyTorch's operations | of which the policy's |\n|---|---|---|---|")
    for id, row in found["rollout"].items():
        print(f"| {id} | {row['warp_launches']:,.0f} | {row['torch_operations']:,.0f} | {row['of_which_policy']} |")
    row = found["update"]
    print(
        f"\n{ENV_ID}, a minibatch: {row['torch_operations']:,.0f} operations; a sample: {row['flop_per_sample']:,.0f} "
        f"FLOP, {row['bytes_per_sample']:,.0f} bytes"
    )
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
