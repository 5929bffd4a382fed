"""train.py under torchrun itself: ranks that are killed at random moments, and compiled updates."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))

from run_differences import differences

from driftrl.runs.folder import checkpoints, is_complete

ROOT = Path(__file__).parents[2]
TRAINING = [
    "policyflow", "--env", "InvertedPendulum-v5", "--n-envs", "2", "--n-steps", "16", "--batch-size", "16",
    "--n-epochs", "1", "--actor-hidden", "8", "--critic-hidden", "8", "--compile", "off", "--device", "cpu",
    "--seed", "3", "--checkpoint-interval", "64", "--total-timesteps", "40000",
]  # fmt: skip


def torchrun(*command: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command]
    return subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def training(*arguments: str) -> subprocess.Popen[str]:
    return torchrun(str(ROOT / "train.py"), *arguments)


def ranks(process: subprocess.Popen[str]) -> list[int]:
    """The processes that it started."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(each) for each in found.read_text().split()]


def run_in(root: Path) -> Path | None:
    return next((path.parent for path in root.rglob("config.json")), None)


def newest(root: Path) -> str:
    run = run_in(root)
    files: Sequence[Path] = checkpoints(run) if run else []
    return files[0].stem if files else ""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_of_twenty_kills_none_loses_or_changes_anything(tmp_path: Path) -> None:
    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    process = training(*TRAINING, "--run-dir", str(whole))
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    waits = []
    for _ in range(20):
        before, run = newest(killed), run_in(killed)
        process = training(*(["--resume", str(run)] if run else [*TRAINING, "--run-dir", str(killed)]))
        while newest(killed) == before:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        alive = ranks(process)
        os.kill(rng.choice(alive), signal.SIGKILL)
        begin = time.monotonic()
        out, _ = process.communicate(timeout=60)
        waits.append(time.monotonic() - begin)
        assert process.returncode != 0 and "SIGKILL" in out
        for each in alive:
            with contextlib.suppress(FileNotFoundError):  # it is gone, or somebody else's by now
                assert b"train.py" not in Path(f"/proc/{each}/cmdline").read_bytes()
    print("seconds from a kill to the end of torchrun:", sorted(waits))
    assert statistics.median(waits) < 10 and max(waits) < 40, waits  # a busy machine takes longer
    run = run_in(killed)
    assert run is not None and not is_complete(run)
    process = training("--resume", str(run))
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "all restored: as if it had not been interrupted" in out
    reference = run_in(whole)
    assert reference is not None and differences(reference, run) == []


SCRIPT = """
import hashlib, torch.distributed as dist
from driftrl import PolicyFlow
from driftrl.envs import make_vec

dist.init_process_group("gloo")
agent = PolicyFlow(
    "MlpPolicy", make_vec("InvertedPendulum-v5", 2, 0), n_steps=16, batch_size=16, n_epochs=2, actor_hidden=(8, 8),
    critic_hidden=(8, 8), seed=3, ema_decay=0.9, compile="on", device="cpu",
).learn(512)
state = b"".join(each.contiguous().numpy().tobytes() for each in agent.policy.state_dict().values())
print("rank", dist.get_rank(), hashlib.sha256(state).hexdigest(), agent._rate, agent.num_timesteps)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_compiled_ranks_are_the_same_to_the_last_bit(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    out, _ = torchrun(str(tmp_path / "script.py")).communicate(timeout=600)
    first, second = sorted(line.split() for line in out.splitlines() if line.startswith("rank"))
    assert (first[1], second[1]) == ("0", "1") and first[2:] == second[2:] and first[-1] == "512"
