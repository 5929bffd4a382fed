"""Data sets from the command line: scripted demonstrations, and episodes of trained policies."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from driftrl import PolicyFlow
from driftrl.agents.storage.datasets import read_episodes
from driftrl.commands import demonstrate, evaluate, train
from driftrl.runs.demonstrations import record_episodes

pytest.importorskip("h5py")

SMALL = ["--n-envs", "2", "--n-steps", "16", "--batch-size", "16", "--actor-hidden", "8", "--critic-hidden", "8"]
SMALL += ["--critic-warmup", "0"]


def trained(folder: Path, seed: int, env: str = "driftrl/Avoid-v0") -> Path:
    options = ["--env", env, "--seed", str(seed), "--total-timesteps", "32", "--run-dir", str(folder)]
    assert train.main(["policyflow", *options, *SMALL]) == 0
    return next(path.parent for path in folder.rglob("final.zip"))


def test_several_runs_are_recorded_into_one_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(trained(tmp_path / str(seed), seed)) for seed in (0, 1)]
    target = tmp_path / "both-v0"
    assert evaluate.main([*runs, "--episodes", "13", "--sample", "--record", str(target)]) == 0
    assert f"recorded 26 episodes of the sampled policy in {target}" in capsys.readouterr().out
    episodes: list[Any] = [episode for _, episode in read_episodes(target)]
    assert len(episodes) == 26
    env: Any = gym.make("driftrl/Avoid-v0").unwrapped
    for episode in episodes:  # what is recorded is what the environment does
        env.reset(seed=0)
        env.state[0] = episode.observations[0]
        for k, action in enumerate(episode.actions):
            assert env.action_space.contains(action)
            obs, reward, terminated, _, _ = env.step(action)
            np.testing.assert_allclose(obs, episode.observations[k + 1], atol=1e-5)
            assert (reward, terminated) == (episode.rewards[k], episode.terminated[k])
        assert episode.truncated[-1] == (len(episode.actions) == 50) != episode.terminated[-1]
    starts = np.array([episode.observations[0] for episode in episodes])
    assert len(np.unique(starts, axis=0)) == 26


def test_the_deterministic_policy_is_recorded_without_noise(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", 0)
    for name in ("a-v0", "b-v0"):
        assert evaluate.main([str(run), "--episodes", "2", "--record", str(tmp_path / name)]) == 0
    both = [[episode.actions for _, episode in read_episodes(tmp_path / name)] for name in ("a-v0", "b-v0")]
    for one, other in zip(*both, strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.abs(np.diff(one, axis=0)).max() < 0.5  # sampled ones would differ by their noise of 0.5


def test_what_cannot_be_recorded_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = trained(tmp_path / "run", 0), trained(tmp_path / "other", 0, "Pendulum-v1")
    (tmp_path / "old-v0").mkdir()
    assert evaluate.main([str(run), "--record", str(tmp_path / "old-v0")]) == 2
    assert "which exists, expected a new folder" in capsys.readouterr().err
    assert evaluate.main([str(run), "--record", str(tmp_path / "old")]) == 2
    assert "expected a folder named NAME-vN" in capsys.readouterr().err
    assert evaluate.main([str(run), str(other), "--record", str(tmp_path / "new-v0")]) == 2
    err = capsys.readouterr().err
    assert "record: got runs on driftrl/Avoid-v0 and Pendulum-v1, expected one environment" in err
    assert not (tmp_path / "new-v0").exists()


class Unrewarded(gym.Env[Any, Any]):
    """The third reward is no number."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 - as Gymnasium has it
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = 5
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        return np.zeros(2, np.float32), math.nan if self.left == 2 else 1.0, self.left == 0, False, {}


def test_rewards_that_are_no_numbers_are_not_recorded() -> None:
    name = "DriftRLTest/Unrewarded-v0"
    gym.register(name, lambda **_: Unrewarded(), max_episode_steps=10)
    agent = PolicyFlow("MlpPolicy", name, n_steps=16, batch_size=16, device="cpu")
    with pytest.raises(ValueError, match="non-finite reward: got nan of DriftRLTest/Unrewarded-v0, expected finite"):
        list(record_episodes(agent, name, {}, 1, 0, sample=False))


def test_scripted_demonstrations_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "avoid-v0"
    arguments = [str(target), "--episodes", "60", "--success", "0.5", "--seed", "3"]
    assert demonstrate.main(arguments) == 0
    assert "wrote 60 episodes" in (out := capsys.readouterr().out) and "mean return 0.50" in out
    assert sum(episode.rewards.sum() for _, episode in read_episodes(target)) == 30
    assert demonstrate.main(arguments) == 2
    assert "which exists" in capsys.readouterr().err
    assert demonstrate.main([str(tmp_path / "b-v0"), "--success", "2"]) == 2
    assert "success: got 2.0, expected a number in [0, 1]" in capsys.readouterr().err
    assert demonstrate.main([str(tmp_path / "b-v0"), "--seed", "-1"]) == 2
    assert "seed: got -1" in capsys.readouterr().err
