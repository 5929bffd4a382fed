"""Simulation by mujoco_warp, on its CPU device, against Gymnasium's own environments from equal states."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy

from driftrl import PolicyFlow
from driftrl.commands import train
from driftrl.envs import make_vec
from driftrl.envs.mujoco_tasks import TASKS

from .small_agent import agent
from .waiting import waits

pytest.importorskip("mujoco_warp", reason="needs mujoco-warp: pip install 'driftrl[gpu]'")

from driftrl.envs.warp_batch import WarpVecEnv

NEWTON = ("Humanoid-v5", "HumanoidStandup-v5")
PENDULUM = "InvertedPendulum-v5"


def warp_env(id: str, n_envs: int = 3, seed: int = 0, **arguments: Any) -> WarpVecEnv:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "warp: Ant-v5's contacts", UserWarning)
        solver: dict[str, Any] = {"solver": "newton"} if id in NEWTON else {}
        env = WarpVecEnv(id, n_envs, **{"stagger": False, **solver, **arguments})
    env.seed(seed)
    env.reset()
    return env


def gymnasium_env(id: str, **arguments: Any) -> Any:
    env: Any = gym.make(id, **arguments).unwrapped
    if id in NEWTON:
        env.model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
    env.reset(seed=0)
    return env


def place(env: WarpVecEnv, references: list[Any]) -> None:
    """Begin where Gymnasium's environments are."""
    parts = [np.stack([getattr(each.data, name) for each in references]) for name in ("qpos", "qvel")]
    env.state = env.task.begin(*(torch.as_tensor(part, dtype=torch.float32, device=env.device) for part in parts))
    env.obs = env.task.observe(env.state)


def action_of(reference: Any, rng: np.random.Generator) -> np.ndarray:
    action: np.ndarray = rng.uniform(reference.action_space.low, reference.action_space.high).astype(np.float32)
    return action


@pytest.mark.parametrize(
    ("id", "steps", "tolerance"), [("Hopper-v5", 50, 1e-4), ("HalfCheetah-v5", 5, 1e-3), ("Swimmer-v5", 50, 1e-4)]
)
def test_a_course_is_gymnasiums_as_long_as_it_is_not_chaotic(id: str, steps: int, tolerance: float) -> None:
    rng, ended = np.random.default_rng(1), 0
    for scale in (1.0, 0.2):
        env, reference = warp_env(id, 1), gymnasium_env(id)
        place(env, [reference])
        for _ in range(steps):
            action = scale * action_of(reference, rng)
            step = env.step_tensor(torch.from_numpy(action)[None])
            obs, reward, terminated, _, _ = reference.step(action)
            np.testing.assert_allclose(step.reached[0].numpy(), obs, atol=tolerance)
            assert step.reward.item() == pytest.approx(reward, abs=tolerance)
            assert step.terminated.item() == terminated
            ended += terminated
            if terminated:
                break
    assert ended == (id == "Hopper-v5")


def assert_same_step(id: str, device: str) -> None:
    """One step from where random actions lead in up to fifteen; Ant only before its feet touch the ground."""
    rng, references = np.random.default_rng(0), [gymnasium_env(id) for _ in range(8)]
    for i, reference in enumerate(references):
        reference.reset(seed=i)
        for _ in range(0 if id == "Ant-v5" else 2 * i + 1):
            reference.step(action_of(reference, rng))
        # As after a reset: what follows from positions and velocities is computed, the solver begins anew.
        reference.set_state(reference.data.qpos.copy(), reference.data.qvel.copy())
        reference.data.qacc_warmstart[:] = 0
    env = warp_env(id, len(references), device=device)
    place(env, references)
    actions = np.stack([action_of(each, rng) for each in references])
    step = env.step_tensor(torch.from_numpy(actions).to(device))
    for i, reference in enumerate(references):
        obs, reward, terminated, _, info = reference.step(actions[i])
        np.testing.assert_allclose(step.reached[i].cpu().numpy(), obs, rtol=2e-3, atol=2e-3, err_msg=f"world {i}")
        assert step.reward[i].item() == pytest.approx(reward, rel=1e-3, abs=1e-3)
        assert step.terminated[i].item() == terminated
        assert info.keys() <= env.infos(step)[i].keys()


@pytest.mark.parametrize("id", TASKS)
def test_a_step_is_gymnasiums(id: str) -> None:
    assert_same_step(id, "cpu")


@pytest.mark.parametrize(
    ("id", "arguments"),
    [
        ("HalfCheetah-v5", {"ctrl_cost_weight": 0.5, "forward_reward_weight": 2, "frame_skip": 1}),
        ("HalfCheetah-v5", {"exclude_current_positions_from_observation": False}),
        ("Hopper-v5", {"healthy_z_range": [1.5, 2.0], "healthy_reward": 3.0}),
        ("InvertedDoublePendulum-v5", {"healthy_reward": 2.0}),
        ("Reacher-v5", {"reward_dist_weight": 3, "reward_control_weight": 0.2}),
    ],
)
def test_arguments_mean_what_they_mean_in_gymnasium(id: str, arguments: dict[str, Any]) -> None:
    env, reference = warp_env(id, 1, **arguments), gymnasium_env(id, **arguments)
    place(env, [reference])
    action = action_of(reference, np.random.default_rng(0))
    step = env.step_tensor(torch.from_numpy(action)[None])
    obs, reward, terminated, _, _ = reference.step(action)
    assert env.observation_space == reference.observation_space
    np.testing.assert_allclose(step.reached[0].numpy(), obs, atol=1e-4)
    assert step.reward.item() == pytest.approx(reward, abs=1e-4)
    assert step.terminated.item() == terminated


@pytest.mark.parametrize("id", ["Hopper-v5", "HalfCheetah-v5", "Reacher-v5", "Pusher-v5"])
def test_episodes_begin_where_gymnasium_lets_them(id: str) -> None:
    env, reference = warp_env(id, 2000), gymnasium_env(id)
    drawn = []
    for seed in range(400):
        reference.reset(seed=seed)
        drawn.append(np.concatenate([reference.data.qpos, reference.data.qvel]))
    theirs, ours = np.stack(drawn), env.state[:, : len(drawn[0])].numpy()
    spread = theirs.std(0)
    fixed = spread < 1e-9
    np.testing.assert_allclose(ours[:, fixed], np.broadcast_to(theirs[0, fixed], ours[:, fixed].shape), atol=1e-6)
    scale = np.where(fixed, 1, spread)
    np.testing.assert_allclose(ours.mean(0) / scale, theirs.mean(0) / scale, atol=0.25)
    np.testing.assert_allclose(ours.std(0) / scale, theirs.std(0) / scale, atol=0.12)
    if id == "Reacher-v5":
        assert np.linalg.norm(ours[:, 2:4], axis=1).max() < 0.2
    if id == "Pusher-v5":
        assert np.linalg.norm(ours[:, 7:9], axis=1).min() > 0.17


@pytest.mark.parametrize("id", ["Hopper-v5", "Reacher-v5"])
def test_a_reset_touches_no_other_world(id: str) -> None:
    env, undisturbed = warp_env(id, 4), warp_env(id, 4)
    env._limits[1] = 2  # steps of each of its episodes
    actions = torch.from_numpy(
        np.random.default_rng(0).uniform(-0.3, 0.3, (6, 4, env.task.action_space.shape[0]))
    ).float()
    for t, action in enumerate(actions):
        step, expected = env.step_tensor(action), undisturbed.step_tensor(action)
        assert step.truncated.tolist() == [False, t % 2 == 1, False, False]
        for i in (0, 2, 3):
            assert torch.equal(step.obs[i], expected.obs[i])
            assert step.reward[i] == expected.reward[i]
        assert torch.equal(step.reached[1], expected.reached[1]) == (t < 2)


def test_an_unstable_world_ends_alone_and_is_counted() -> None:
    env, undisturbed = warp_env("HalfCheetah-v5", 3), warp_env("HalfCheetah-v5", 3)
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 3, 6)).astype(np.float32)
    for action in actions[:2]:
        last = np.asarray(env.step(action)[0])
        undisturbed.step(action)
    env.state[1, 9] = torch.nan
    obs, rewards, dones, infos = env.step(actions[2])
    expected, values, _, _ = undisturbed.step(actions[2])
    assert dones.tolist() == [False, True, False] and env.diverged == 1
    assert [each["simulation_diverged"] for each in infos] == [False, True, False]
    assert rewards[1] == 0 and not infos[1]["TimeLimit.truncated"] and infos[1]["episode"]["l"] == 3
    np.testing.assert_array_equal(infos[1]["terminal_observation"], last[1])
    for i in (0, 2):
        np.testing.assert_array_equal(np.asarray(obs)[i], np.asarray(expected)[i])
        assert rewards[i] == values[i]
    for action in actions[3:]:  # the new episode is sound
        obs, _, dones, _ = env.step(action)
        assert np.isfinite(np.asarray(obs)).all() and not dones.any()
    assert env.diverged == 1


def test_overflow_of_constraints_is_said_once() -> None:
    env = warp_env("Walker2d-v5", 2, constraints=4)
    with pytest.warns(RuntimeWarning, match=r"warp_constraints: got room for 4 per world, but \d+ were needed") as seen:
        for _ in range(60):
            env.step(np.zeros((2, 6), np.float32))
    assert len(seen) == 1


def test_overflow_of_contacts_is_said() -> None:
    env = warp_env("Walker2d-v5", 2, contacts=1)
    with pytest.warns(RuntimeWarning, match="warp_contacts: got room for 1 per world, but"):
        for _ in range(60):
            env.step(np.zeros((2, 6), np.float32))


def test_pairs_that_are_dropped_before_they_are_contacts_are_said() -> None:
    env = warp_env("HalfCheetah-v5", 4, contacts=1, stagger=False)  # two robots of four fell through the floor
    with pytest.warns(RuntimeWarning, match="warp_contacts: got room for 1 per world, but"):
        for _ in range(20):
            env.step(np.zeros((4, 6), np.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "cg"}, "warp_solver: got 'cg', expected model or newton"),
        ({"contacts": 0}, "warp_contacts: got 0, expected an integer of at least 1"),
        ({"constraints": 2.5}, r"warp_constraints: got 2\.5, expected an integer of at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        warp_env("HalfCheetah-v5", 2, **options)


class Quiet(BaseCallback):
    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("id", ["HalfCheetah-v5", "Reacher-v5", "Ant-v5"])
def test_no_step_of_a_rollout_waits_for_the_device(id: str) -> None:
    counts = []
    for steps in (5, 20):
        learner = agent(warp_env(id, 8, stagger=True), n_steps=steps, batch_size=40)
        assert learner.env is not None and learner._stays_on_device(learner.env)
        learner._setup_learn(10_000)
        callback = Quiet()
        callback.init_callback(learner)
        with waits() as seen:
            learner.collect_rollouts(learner.env, callback, learner.rollout_buffer, steps)
        counts.append(len(seen))
    assert abs(counts[0] - counts[1]) <= 4 and max(counts) < 40  # of a rollout, however many steps it has


def test_unstable_worlds_are_logged() -> None:
    env = warp_env(PENDULUM, 8)
    learner = agent(env)
    learner._setup_learn(10_000)
    env.state[2, 0] = torch.inf
    callback = Quiet()
    callback.init_callback(learner)
    learner.collect_rollouts(env, callback, learner.rollout_buffer, 20)
    assert learner.logger.name_to_value["rollout/simulations_diverged"] == 1


def test_a_state_goes_on_in_other_environments() -> None:
    env, other = warp_env("Hopper-v5", 4, stagger=True), warp_env("Hopper-v5", 4, seed=9, stagger=True)
    actions = np.random.default_rng(0).uniform(-1, 1, (20, 4, 3)).astype(np.float32)
    for action in actions[:5]:
        env.step(action)
    other.set_state(env.get_state())
    for action in actions[5:]:
        (obs, *rest, _), (again, *others, _) = env.step(action), other.step(action)
        np.testing.assert_allclose(np.asarray(again), np.asarray(obs), atol=1e-5)
        for mine, theirs in zip(rest, others, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("id", "options", "message"),
    [
        ("Pendulum-v1", {}, "warp: got 'Pendulum-v1', expected one of HalfCheetah-v5"),
        ("Hopper-v5", {"render_mode": "rgb_array"}, "warp: got render_mode='rgb_array', expected None"),
        ("Humanoid-v5", {}, "asks for the PGS solver; warp_solver=newton takes Newton's, which is another task"),
        ("Hopper-v5", {"warp_solver": "newton"}, "warp_solver: got newton, which the model has; leave it out"),
        ("Hopper-v5", {"worker_restarts": 3}, "worker_restarts: got 3, which changes nothing without backend subproc"),
    ],
)
def test_what_it_cannot_do_is_refused(id: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_vec(id, 2, 0, backend="warp", **options)


def test_ants_contacts_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="warp: Ant-v5's contacts differ from MuJoCo's"):
        make_vec("Ant-v5", 2, 0, backend="warp")


def test_train_takes_the_backend_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["policyflow", "--env", PENDULUM, "--backend", "warp", "--device", "cpu", "--n-envs", "16"]
    command += ["--n-steps", "16", "--batch-size", "64", "--compile", "off", "--warp-constraints", "20", "--seed", "0"]
    assert train.main([*command, "--total-timesteps", "512"]) == 0
    [run] = tmp_path.glob("runs/*/policyflow/*")
    assert train.main(["--resume", str(run), "--total-timesteps", "1024"]) == 0
    assert "all restored: simulation by Warp goes on to rounding" in capsys.readouterr().out


def test_it_is_loaded_where_it_is_asked_for() -> None:
    code = "import sys, driftrl, driftrl.envs, driftrl.commands.train\nprint({'warp', 'mujoco_warp'} & {*sys.modules})"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.slow
def test_the_pendulum_is_learned() -> None:
    learner = PolicyFlow(
        "MlpPolicy", make_vec(PENDULUM, 64, 0, backend="warp"), n_steps=32, batch_size=512, n_epochs=5,
        learning_rate=1e-3, seed=0, device="cpu", compile="off",
    )  # fmt: skip
    learner.learn(100_000)
    mean, _ = evaluate_policy(learner, make_vec(PENDULUM, 10, 1), 10)  # by MuJoCo itself
    assert mean == 1000


@pytest.mark.gpu
@pytest.mark.parametrize("id", ["HalfCheetah-v5", "Reacher-v5"])
def test_a_step_on_the_gpu_is_gymnasiums(id: str) -> None:
    assert_same_step(id, "cuda")


@pytest.mark.gpu
def test_a_rollout_stays_on_the_gpu() -> None:
    env = make_vec("HalfCheetah-v5", 256, 0, backend="warp", device="cuda")
    learner = agent(env, device="cuda", batch_size=1280)
    assert learner._stays_on_device(env)
    learner.learn(256 * 20 * 3)
    assert all(bool(each.isfinite().all()) for each in learner.policy.parameters())
