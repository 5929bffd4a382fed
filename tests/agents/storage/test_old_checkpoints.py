"""Files of every format version ever released, kept in checkpoints/ beside this one: later versions read them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import Logger

from driftrl import LipschitzMBPO, LipschitzMBPOConfig, PolicyFlow, PolicyFlowConfig
from driftrl.agents.registry import AGENTS
from driftrl.agents.storage import format as checkpoint
from driftrl.agents.storage import saving as resume
from driftrl.agents.storage.saving import Checkpointed
from driftrl.envs import make_vec
from driftrl.runs import folder as runs

KEPT = Path(__file__).parent / "checkpoints"
FLOW = PolicyFlowConfig(n_steps=8, n_epochs=1, batch_size=8, gamma=0.9, actor_hidden=(4,), critic_hidden=(3,))
MODEL = LipschitzMBPOConfig(
    learning_starts=8, gradient_steps=1, batch_size=4, model_rollouts=3, model_epochs=1, model_interval=8,
    model_retain=8, buffer_size=50, actor_hidden=(4,), critic_hidden=(3,), model_hidden=(4,),
)  # fmt: skip
AGENT_FILES = [path for path in sorted(KEPT.glob("*.zip")) if not path.name.startswith("replay")]
OBSERVATIONS = np.linspace(-1, 1, 12).reshape(3, 4)


def keep(folder: Path) -> None:
    """Make the files of the present version, as those in `KEPT` were made: once, by hand, for each version."""
    for name, config in (("policyflow", FLOW), ("mbpo", MODEL)):
        env = make_vec("InvertedPendulum-v5", 1, 0)
        agent: Any = AGENTS[name].agent("MlpPolicy", env, config=config, seed=0, device="cpu")
        agent.learn(16)
        version = ".".join(str(number) for number in checkpoint.VERSION)
        file = runs.save_checkpoint(agent, folder, 1, {}).replace(folder / f"{name}_{version}.zip")
        (folder / "checkpoints").rmdir()
        if name == "mbpo":
            agent.save_replay_buffer(folder / f"replay_{version}.zip")
        actions = agent.predict(OBSERVATIONS, deterministic=True)[0].tolist()
        file.with_suffix(".json").write_text(json.dumps({"actions": actions}) + "\n")


def loaded(file: Path) -> Checkpointed:
    kind: type[Checkpointed] = PolicyFlow if file.name.startswith("policyflow") else LipschitzMBPO
    return kind.load(file, env=make_vec("InvertedPendulum-v5", 1, 0), device="cpu", force_reset=False)


@pytest.mark.parametrize("file", AGENT_FILES, ids=lambda path: path.name)
def test_agents_act_and_train_as_they_did(file: Path) -> None:
    agent: Any = loaded(file)
    expected = json.loads(file.with_suffix(".json").read_text())["actions"]
    assert agent.predict(OBSERVATIONS, deterministic=True)[0] == pytest.approx(np.array(expected), abs=1e-5)
    assert agent.num_timesteps == 16
    assert agent.config == (FLOW if isinstance(agent, PolicyFlow) else MODEL)
    with file.open("rb") as stream:
        state = checkpoint.read(stream, "run", str(file))
    agent.set_logger(Logger(None, []))
    assert resume.restore(agent, state) == []
    assert agent.learn(16, reset_num_timesteps=False).num_timesteps == 32


@pytest.mark.parametrize("file", sorted(KEPT.glob("replay_*.zip")), ids=lambda path: path.name)
def test_replay_buffers_are_read(file: Path) -> None:
    agent = LipschitzMBPO("MlpPolicy", make_vec("InvertedPendulum-v5", 1, 0), config=MODEL, device="cpu")
    agent.load_replay_buffer(file)
    assert agent.replay_buffer is not None
    assert (agent.replay_buffer.size(), agent.replay_buffer.buffer_size) == (16, 50)
    assert torch.equal(agent.replay_buffer.transitions.all().reward.unique(), torch.tensor([0.0, 1.0]))


def test_files_of_this_version_are_kept(tmp_path: Path) -> None:
    keep(tmp_path)
    made = {path.name for path in tmp_path.iterdir()}
    assert made <= {path.name for path in KEPT.iterdir()}
    assert sum(path.stat().st_size for path in KEPT.iterdir()) < 200_000
