"""The oracle is Gymnasium-Robotics' own maze."""

import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from driftrl import LipschitzMBPO, PolicyFlow
from driftrl.envs import check_env, make_vec

pytest.importorskip("gymnasium_robotics")

OURS, THEIRS = "driftrl/PointMazeMedium-v0", "PointMaze_Medium_Diverse_GDense-v3"


@pytest.mark.parametrize(("reward", "scale"), [({}, 0.1), ({"reward": "paper"}, 0.1), ({"reward": "dense"}, 1.0)])
def test_the_reward_alone_differs_from_gymnasium_robotics(reward: dict[str, Any], scale: float) -> None:
    ours, theirs = make_vec(OURS, 2, 3, **reward), make_vec(THEIRS, 2, 3)
    obs: Any = ours.reset()
    expected_obs: Any = theirs.reset()
    for step, action in enumerate(np.random.default_rng(0).uniform(-1, 1, (610, 2, 2)), start=1):
        for key in ("observation", "achieved_goal", "desired_goal"):
            np.testing.assert_array_equal(obs[key], expected_obs[key])
        obs, rewards, dones, infos = ours.step(action)
        expected_obs, expected_rewards, expected_dones, _ = theirs.step(action)
        np.testing.assert_allclose(rewards, scale * expected_rewards, rtol=1e-6)
        assert dones.tolist() == expected_dones.tolist() == [step == 600] * 2  # continuing, with a time limit
        assert all(info["is_success"] == info["success"] for info in infos)
        if step < 600:
            distance = np.linalg.norm(obs["achieved_goal"] - obs["desired_goal"], axis=1)
            np.testing.assert_allclose(rewards, scale * np.exp(-distance), rtol=1e-6)


def test_no_file_is_left_behind_and_a_copy_keeps_its_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    env = gym.make(OURS, reward="dense").unwrapped
    copy = pickle.loads(pickle.dumps(env))
    goal = np.zeros(2)
    assert copy.compute_reward(goal, goal, {}) == 1.0
    assert gym.make(OURS).unwrapped.compute_reward(goal, goal, {}) == 0.1  # type: ignore[attr-defined]
    assert not list(tmp_path.iterdir())


def test_other_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match="reward: got 'sparse', expected paper or dense"):
        check_env(OURS, reward="sparse")


@pytest.mark.parametrize("id", [OURS, THEIRS])
def test_a_missing_extra_is_named(id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("gymnasium_robotics")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, "driftrl.envs.point_maze", raising=False)
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    with pytest.raises(ValueError, match="needs a package that is not installed") as caught:
        check_env(id)
    package = "gymnasium-robotics; run pip install 'driftrl[maze]'"
    assert str(caught.value) == f"environment {id!r} needs a package that is not installed, {package}"


def test_both_agents_learn_on_its_dict_observations() -> None:
    flow = PolicyFlow("MultiInputPolicy", make_vec(OURS, 2, 0), n_steps=32, batch_size=32, n_epochs=1, device="cpu")
    model = LipschitzMBPO(
        "MultiInputPolicy", make_vec(OURS, 1, 0), learning_starts=30, gradient_steps=1, model_hidden=(8,),
        model_epochs=1, model_rollouts=2, device="cpu", compile="off",
    )  # fmt: skip
    for agent in (flow, model):
        agent.learn(64)
        env = agent.get_env()
        assert env is not None
        actions, _ = agent.predict(env.reset())  # type: ignore[arg-type]
        assert actions.shape == (env.num_envs, 2)
        assert env.action_space.contains(actions[0])
