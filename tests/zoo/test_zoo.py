"""rl_zoo3's commands with our agents, each in a process of its own as a user calls it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from driftrl.agents.registry import AGENTS
from driftrl.runs.folder import load_agent
from driftrl.zoo.presets import zoo_hyperparameters

ROOT = Path(__file__).parents[2]
needs_the_zoo = pytest.mark.skipif(importlib.util.find_spec("rl_zoo3") is None, reason="needs rl_zoo3")
SMALL = {
    "policyflow": ["n_envs:2", "n_steps:16", "batch_size:16", "n_epochs:2", "actor_hidden:[8,8]", "clip_range:0.1"],
    "mbpo": [
        "n_envs:1", "learning_starts:20", "model_epochs:1", "model_hidden:[8]", "model_rollouts:2", "gradient_steps:1",
    ],
}  # fmt: skip
STEPS = {"policyflow": 128, "mbpo": 40}


def zoo(*args: str, folder: Path, code: int = 0) -> str:
    """What a command prints."""
    paths = os.pathsep.join([str(ROOT), str(folder), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "MUJOCO_GL": "egl", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "driftrl.zoo", *args], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == code, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout + result.stderr


@needs_the_zoo
@pytest.mark.slow
@pytest.mark.parametrize("algo", ["policyflow", "mbpo"])
def test_the_commands_of_the_zoo(algo: str, tmp_path: Path) -> None:
    env, steps = ["--algo", algo, "--env", "InvertedPendulum-v5"], STEPS[algo]
    interval = str(steps // 2)
    small = ["-params", *SMALL[algo]]
    out = zoo(
        "train", *env, "-n", str(steps), "--eval-freq", interval, "--eval-episodes", "1", "--save-freq", interval,
        "--seed", "1", "--device", "cpu", *small, "normalize:True", "learning_rate:'lin_1e-3'", folder=tmp_path,
    )  # fmt: skip
    assert out.count(f"normalize: {algo} normalizes itself, no VecNormalize is made") == 1
    run = tmp_path / "logs" / algo / "InvertedPendulum-v5_1"
    assert not list(run.rglob("vecnormalize.pkl"))
    saved = {name: load_agent(run / name, "cpu") for name in ("InvertedPendulum-v5.zip", "best_model.zip")}
    agent: Any = saved["InvertedPendulum-v5.zip"]
    assert agent.num_timesteps == steps
    config = agent.config
    assert (config.learning_rate, config.lr_schedule, config.normalize_observation) == (1e-3, "linear", True)
    if algo == "policyflow":
        assert (config.clip_range, config.normalize_reward, config.actor_hidden) == (0.1, True, (8, 8))

    short = [*env, "-f", "logs", "-n", "30"]
    for choice in ([], ["--load-best"], ["--load-last-checkpoint"], ["--load-checkpoint", interval]):
        name = {"--load-best": "best_model.zip", "--load-checkpoint": f"rl_model_{interval}_steps.zip"}
        out = zoo("enjoy", *short, "--no-render", *choice, folder=tmp_path)
        assert f"Loading logs/{algo}/InvertedPendulum-v5_1/" in out
        assert name.get(choice[0] if choice else "", "") in out
        assert "Mean reward: " in out

    file = f"logs/{algo}/InvertedPendulum-v5_1/InvertedPendulum-v5.zip"
    zoo("train", *env, "-n", str(steps), "-i", file, "--eval-freq", "-1", "--device", "cpu", *small, folder=tmp_path)
    more: Any = load_agent(tmp_path / "logs" / algo / "InvertedPendulum-v5_2" / "InvertedPendulum-v5.zip", "cpu")
    assert more.num_timesteps == steps
    assert more._n_updates > agent._n_updates

    out = zoo(
        "optimize", *env, "-n", str(steps), "--n-trials", "3", "--n-evaluations", "1", "--n-startup-trials", "1",
        "--no-optim-plots", "--eval-episodes", "1", "--storage", "study/study.log", "--study-name", "s", "--device",
        "cpu", *small, folder=tmp_path,
    )  # fmt: skip
    assert "Number of finished trials:  3" in out
    assert "learning_rate" in out
    assert list((tmp_path / "logs" / algo).glob("report_*.csv"))

    zoo("record_video", *env, "-f", "logs", "-n", "10", "--load-best", "--exp-id", "1", folder=tmp_path)
    assert [path.stat().st_size > 1000 for path in run.glob("videos/*.mp4")] == [True]


@needs_the_zoo
@pytest.mark.slow
def test_what_is_refused_is_one_line_and_the_zoos_own_agents_stay(tmp_path: Path) -> None:
    env = ["--env", "InvertedPendulum-v5", "-n", "64", "--eval-freq", "-1", "--device", "cpu"]
    small = ["n_envs:1", "n_steps:16", "batch_size:16"]
    for wrong, says in (
        ("clip_range:'lin_0.2'", "clip_range: got 'lin_0.2', expected a number: policyflow has no schedule for it"),
        ("learning_rate:'lin_x'", "learning_rate: got 'lin_x', expected a number, or such as lin_3e-4"),
        ("normalize:dict(clip_obs=5)", "normalize: got clip_obs, expected norm_obs or norm_reward"),
        ("gamma:2.0", "gamma: got 2.0, expected a number in [0, 1]"),
    ):
        out = zoo("train", "--algo", "policyflow", *env, "-params", *small, wrong, folder=tmp_path, code=2)
        assert out.strip().splitlines()[-1].startswith(f"error: {says}")
    (tmp_path / "c.yml").write_text(
        yaml.safe_dump({"default": {"n_timesteps": 1, "policy": "MlpPolicy", "clip_rnge": 1}})
    )
    out = zoo("train", "--algo", "policyflow", *env, "-conf", "c.yml", folder=tmp_path, code=2)
    assert out.strip().splitlines()[-1].endswith("expected fields of PolicyFlowConfig; did you mean clip_range?")
    out = zoo(
        "enjoy", "--algo", "policyflow", *env[:2], "-f", "logs", "--load-last-checkpoint", folder=tmp_path, code=2
    )
    assert out.strip().splitlines()[-1].startswith("error: No checkpoint found for policyflow on InvertedPendulum-v5")
    zoo("train", "--algo", "ppo", *env, "-params", *small, "learning_rate:'lin_1e-3'", folder=tmp_path)
    assert (tmp_path / "logs" / "ppo" / "InvertedPendulum-v5_1" / "InvertedPendulum-v5.zip").exists()
    out = zoo("dance", folder=tmp_path, code=2)
    assert "got dance; usage: python -m driftrl.zoo train|enjoy|optimize|record_video" in out


@needs_the_zoo
@pytest.mark.slow
@pytest.mark.parametrize("algo", ["policyflow", "mbpo"])
def test_dict_observations_get_their_policy(algo: str, tmp_path: Path) -> None:
    (tmp_path / "zoo_tasks.py").write_text(
        "import gymnasium as gym\n"
        "from gymnasium.wrappers import TransformObservation\n"
        "def made(**kwargs):\n"
        "    env = gym.make('InvertedPendulum-v5', **kwargs)\n"
        "    space = gym.spaces.Dict({'all': env.observation_space})\n"
        "    return TransformObservation(env, lambda obs: {'all': obs}, space)\n"
        "gym.register('Named-v0', made, max_episode_steps=50)\n"
    )
    small = ["-n", str(STEPS[algo]), "--eval-freq", "-1", "--device", "cpu", "-params", *SMALL[algo]]
    zoo("train", "--algo", algo, "--env", "Named-v0", "--gym-packages", "zoo_tasks", *small, folder=tmp_path)
    agent: Any = load_agent(tmp_path / "logs" / algo / "Named-v0_1" / "Named-v0.zip", "cpu")
    assert list(agent.observation_space) == ["all"]


@pytest.mark.parametrize("agent", list(AGENTS))
def test_tuned_hyperparameters_are_the_presets(agent: str) -> None:
    found = zoo_hyperparameters(agent)
    name = next(iter(AGENTS[agent].presets))
    for env, fields in found.items():
        steps, policy = fields.pop("n_timesteps"), fields.pop("policy")
        own, config = AGENTS[agent].settings("none" if env == "default" else env, name)
        assert steps == own.get("total_timesteps", 1_000_000)
        assert policy == ("MultiInputPolicy" if "PointMaze" in env else "MlpPolicy")
        assert fields.pop("n_envs") == own["n_envs"]
        for key, value in fields.items():
            assert getattr(config, key) == (tuple(value) if isinstance(value, list) else value)
    assert yaml.safe_load(yaml.safe_dump(found)) == found


def test_without_the_zoo_one_line_says_how_to_install_it(tmp_path: Path) -> None:
    (tmp_path / "rl_zoo3").mkdir()
    (tmp_path / "rl_zoo3" / "__init__.py").write_text("raise ModuleNotFoundError(name='rl_zoo3')")
    out = zoo("train", folder=tmp_path, code=2)
    assert out == "error: zoo: rl_zoo3 is not installed; run pip install 'driftrl[zoo]'\n"
