"""Environments of tensors: the same tasks as in NumPy, a VecEnv for others, and rollouts that wait for nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.evaluation import evaluate_policy

from driftrl import PolicyFlow
from driftrl.agents.storage.saving import capture, restore
from driftrl.commands import train
from driftrl.envs import make_vec
from driftrl.envs.avoid import AVOID, Avoid
from driftrl.envs.known import known_task_of
from driftrl.envs.multigoal import GOAL_TASKS
from driftrl.envs.tensor import TensorVecEnv
from driftrl.envs.tensor_tasks import TENSOR_TASKS

from .small_agent import agent
from .waiting import waits

TASKS: dict[str, Any] = {**GOAL_TASKS, AVOID: Avoid()}


def tensor_env(task: str, n_envs: int = 8, seed: int | None = 0, **env_kwargs: Any) -> TensorVecEnv:
    env = make_vec(task, n_envs, seed, backend="tensor", **env_kwargs)
    assert isinstance(env, TensorVecEnv)
    return env


@pytest.mark.parametrize("task", TENSOR_TASKS)
def test_a_step_is_that_of_the_task_in_numpy(task: str) -> None:
    rng = np.random.default_rng(0)
    reference, twin = TASKS[task], TENSOR_TASKS[task](50)
    size = reference.observation_space.shape[0]
    # From everywhere, with ways through obstacles and over the bounds.
    state = rng.uniform(-1.1, 1.1, (5000, size)) * (1 if task == AVOID else 8)
    action = rng.uniform(-1, 1, (5000, 2)) * reference.action_space.high
    after, reward, terminated = reference.step(state, action)
    got = twin.step(torch.from_numpy(state), torch.from_numpy(action))
    for ours, theirs in zip(got[:3], (after, reward, terminated), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-12)  # float64: sums in another order
    success = reward > 0 if task == AVOID else reference.squared_distances(after[:, :2]).min(1) < 1
    assert np.array_equal(got[3]["is_success"].numpy(), success)


@pytest.mark.parametrize("task", TENSOR_TASKS)
def test_episodes_begin_where_the_task_lets_them(task: str) -> None:
    starts = TENSOR_TASKS[task](50).start(20_000, torch.Generator().manual_seed(0)).double().numpy()
    rng = np.random.default_rng(0)
    drawn = np.stack([TASKS[task].draw_start(rng) for _ in range(20_000)])
    width = drawn.shape[1]
    scale = np.maximum(drawn.std(0), 1e-9)
    np.testing.assert_allclose(starts[:, :width].mean(0) / scale, drawn.mean(0) / scale, atol=0.05)
    np.testing.assert_allclose(starts.std(0)[:width] / scale, drawn.std(0) / scale, atol=0.03)
    assert not starts[:, width:].any()


def test_steps_ends_and_infos_are_those_of_the_batch_in_numpy() -> None:
    # The same start for all, no random numbers: both go through the same episodes, ends and limits included.
    start: dict[str, Any] = {"start": [0.0, 0.0]}
    ours, theirs = tensor_env("driftrl/MultiGoal-v0", 6, **start), make_vec("driftrl/MultiGoal-v0", 6, 0, **start)
    np.testing.assert_array_equal(ours.reset(), theirs.reset())
    rng, ended = np.random.default_rng(0), 0
    for _ in range(120):
        action = rng.uniform(-6, 6, (6, 2)).astype(np.float32)
        action[:3, 0] += 4
        action = action.clip(-5, 5)
        obs, reward, dones, infos = ours.step(action)
        expected, value, ends, told = theirs.step(action)
        assert isinstance(obs, np.ndarray) and isinstance(expected, np.ndarray)
        np.testing.assert_allclose(obs, expected, atol=2e-5)
        np.testing.assert_allclose(reward, value, atol=2e-5)
        assert np.array_equal(dones, ends)
        for i, (mine, other) in enumerate(zip(infos, told, strict=True)):
            assert mine["TimeLimit.truncated"] == other["TimeLimit.truncated"]
            assert mine.keys() == other.keys()
            if dones[i]:
                ended += 1
                np.testing.assert_allclose(mine["terminal_observation"], other["terminal_observation"], atol=2e-5)
                assert mine["episode"]["l"] == other["episode"]["l"]
                assert mine["episode"]["r"] == pytest.approx(other["episode"]["r"], abs=1e-4)
    assert ended > 12


@pytest.mark.parametrize("task", TENSOR_TASKS)
def test_agents_know_the_task_and_its_arguments(task: str) -> None:
    options: dict[str, Any] = {"start": [0.5, 0.0]} if task == "driftrl/MultiGoal-v0" else {}
    found = known_task_of(make_vec(task, 2, 0, backend="tensor", **options))
    assert found == known_task_of(make_vec(task, 2, 0, backend="sync", **options)) and found is not None


def test_a_seed_makes_episodes_and_is_used_once() -> None:
    envs = [tensor_env("driftrl/MultiGoal-v0", seed=seed) for seed in (3, 3, 4)]
    first = [env.reset() for env in envs]
    assert np.array_equal(first[0], first[1]) and not np.array_equal(first[0], first[2])
    assert not np.array_equal(envs[0].reset(), first[0])


def test_agents_and_callbacks_of_stable_baselines3_work() -> None:
    env = tensor_env("driftrl/SoftMultiGoal-v0")
    PPO("MlpPolicy", env, n_steps=32, batch_size=64, n_epochs=1, device="cpu").learn(512)
    learner = agent(env)
    learner.learn(8 * 200, StopTrainingOnMaxEpisodes(max_episodes=3))
    assert learner.num_timesteps < 8 * 200
    mean, _ = evaluate_policy(learner, tensor_env("driftrl/SoftMultiGoal-v0", 4), 6)
    assert np.isfinite(mean)


class Look(BaseCallback):
    """Counts episodes by the infos of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.episodes: list[float] = []

    def _on_step(self) -> bool:
        self.episodes += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        assert np.sum(self.locals["dones"]).item() == sum("episode" in info for info in self.locals["infos"])
        return True


@pytest.mark.parametrize(
    "fields", [{}, {"exploration_noise": "ou"}, {"langevin_eps": 0.2}, {"normalize_reward": False}]
)
def test_a_rollout_on_the_device_is_that_of_the_host(fields: dict[str, Any]) -> None:
    # With nonfinite="skip" the host steps; the noise and the environments are the same.
    learners, looks = [], []
    for nonfinite in ("raise", "skip"):
        learner = agent(tensor_env(AVOID), nonfinite=nonfinite, **fields)
        looks.append(Look())
        learner.learn(8 * 20 * 4, looks[-1])
        learners.append(learner)
    assert [learner.env is not None and learner._stays_on_device(learner.env) for learner in learners] == [True, False]
    device, host = learners
    for ours, theirs in zip(device.policy.state_dict().values(), host.policy.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for name in ("rewards", "advantages", "episode_starts"):
        np.testing.assert_allclose(
            getattr(device.rollout_buffer, name), getattr(host.rollout_buffer, name), rtol=1e-3, atol=1e-4
        )
    assert device.ep_info_buffer is not None and host.ep_info_buffer is not None
    assert [each["r"] for each in device.ep_info_buffer] == [each["r"] for each in host.ep_info_buffer]
    assert looks[0].episodes == looks[1].episodes != []


class Arrays(BaseCallback):
    """Uses what Stable-Baselines3's callbacks find in their locals, and keeps the infos of a step for the next."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Any = None
        self.late = 0

    def _on_step(self) -> bool:
        dones, rewards = self.locals["dones"], self.locals["rewards"]
        assert int(dones.sum()) == int((~dones).size - np.sum(~dones))
        assert np.isclose(np.mean(rewards), np.asarray(rewards).mean()) and (rewards * 2).shape == (8,)
        assert self.locals["actions"].shape == self.locals["clipped_actions"].shape == (8, 2)
        assert np.abs(self.locals["clipped_actions"]).max() <= 1
        if self.kept is not None:  # looked at only now
            before, infos = self.kept
            assert [bool(each) for each in before] == ["episode" in info for info in infos]
            self.late += sum(before)
        self.kept = dones[:], self.locals["infos"]
        return True

    def _on_rollout_end(self) -> None:
        assert len([info["TimeLimit.truncated"] for info in self.locals["infos"]]) == 8


def test_callbacks_find_arrays_and_the_infos_of_their_step() -> None:
    callback = Arrays()
    agent(tensor_env(AVOID)).learn(8 * 20 * 4, callback)
    assert callback.late > 5


def test_a_reward_that_is_not_finite_does_not_outlive_its_episode() -> None:
    env = tensor_env(AVOID, 2)
    env.reset()
    env._returns[0] = math.nan
    reported = []
    for _ in range(3 * 50):
        *_, infos = env.step(np.zeros((2, 2), np.float32))
        reported += [info["episode"]["r"] for info in infos[:1] if "episode" in info]
    assert len(reported) >= 2 and math.isnan(reported[0]) and np.isfinite(reported[1:]).all()


class Meddling(BaseCallback):
    """Changes copies, keeps what it found, and tries to change what it found."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []
        self.copies: list[np.ndarray] = []

    def _on_step(self) -> bool:
        for name in ("actions", "new_obs", "rewards"):
            array = np.array(self.locals[name])
            array *= 0
        self.kept.append(self.locals["actions"])
        self.copies.append(np.array(self.locals["actions"]))
        if isinstance(self.training_env, TensorVecEnv):
            for change in (
                lambda: self.locals["rewards"].__iadd__(5),
                lambda: np.asarray(self.locals["dones"]).fill(1),
            ):
                with pytest.raises(ValueError, match="read-only"):
                    change()
            with pytest.raises(ValueError, match="ambiguous"):
                bool(self.locals["dones"])
        return True


@pytest.mark.parametrize("backend", ["tensor", "batched"])
def test_callbacks_cannot_change_what_is_learned_from_and_may_keep_what_they_found(backend: Any) -> None:
    learners = []
    for callback in (Quiet(), Meddling()):
        learners.append(agent(make_vec(AVOID, 8, 0, backend=backend)).learn(8 * 20 * 2, callback))
    for ours, theirs in zip(*(each.policy.state_dict().values() for each in learners), strict=True):
        assert torch.equal(ours, theirs)
    assert isinstance(callback, Meddling)
    for kept, copy in zip(callback.kept, callback.copies, strict=True):
        assert np.array_equal(kept, copy)


class Shaped(TensorVecEnv):
    """Pays what it likes."""

    def step_wait(self) -> Any:
        obs, reward, dones, infos = super().step_wait()
        return obs, 0 * reward + 7, dones, infos


def test_what_a_subclass_does_in_a_step_is_done() -> None:
    learner = agent(Shaped(TENSOR_TASKS[AVOID](50), 8), normalize_reward=False)
    learner.learn(8 * 20)
    assert (learner.rollout_buffer.rewards == 7).all()


def test_starts_do_not_follow_from_the_noise_of_an_agent_with_the_same_seed() -> None:
    env = tensor_env("driftrl/MultiGoal-v0", 2048, 0)
    start = torch.from_numpy(env.reset()[:, :2]).flatten()
    same = TENSOR_TASKS["driftrl/MultiGoal-v0"](50).start(2048, torch.Generator().manual_seed(0))[:, :2].flatten()
    assert abs(torch.corrcoef(torch.stack([start, same]))[0, 1]) < 5 / 64  # 5 standard errors


def test_learning_without_a_first_observation_is_refused() -> None:
    learner = agent(tensor_env(AVOID))
    learner.learn(8 * 20)
    learner.set_env(tensor_env(AVOID), force_reset=False)
    with pytest.raises(RuntimeError, match="the environments have no first observation yet, call reset before"):
        learner.learn(8 * 20, reset_num_timesteps=False)


class Quiet(BaseCallback):
    """Looks at nothing."""

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("task", TENSOR_TASKS)
def test_no_step_of_a_rollout_waits_for_the_device(task: str) -> None:
    counts = []
    for steps in (10, 40):
        learner = agent(tensor_env(task), n_steps=steps, exploration_noise="ou")
        learner._setup_learn(10_000)
        callback = Quiet()
        callback.init_callback(learner)
        with waits() as seen:
            learner.collect_rollouts(learner.env, callback, learner.rollout_buffer, steps)  # type: ignore[arg-type]
        counts.append(len(seen))
    assert abs(counts[0] - counts[1]) <= 2 and max(counts) < 40  # of a rollout, however many steps it has


def test_updates_wait_for_the_device_a_few_times_per_epoch_and_never_per_minibatch() -> None:
    counts = {}
    for batch_size, epochs in ((160, 2), (20, 2), (20, 4)):
        learner = agent(tensor_env(AVOID), batch_size=batch_size, n_epochs=epochs, diagnostics_interval=0)
        learner.learn(8 * 20)
        with waits() as seen:
            learner.train()
        counts[batch_size, epochs] = len(seen)
    assert counts[160, 2] == counts[20, 2] < 15
    assert counts[20, 4] - counts[20, 2] <= 2 * 3


def test_what_is_not_finite_is_an_error() -> None:
    learner = agent(tensor_env(AVOID))
    with torch.no_grad():
        learner.policy.actor.log_std.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"non-finite action.*log_std"):
        learner.learn(1000)


def test_a_run_goes_on_exactly() -> None:
    learner = agent(tensor_env(AVOID))
    learner.learn(8 * 20 * 2)
    state, saved = capture(learner), {name: each.clone() for name, each in learner.policy.state_dict().items()}
    optimizer = learner.policy.optimizer.state_dict()
    learner.learn(8 * 20 * 2, reset_num_timesteps=False)
    again = agent(tensor_env(AVOID, seed=9))
    again.learn(8 * 20)
    again.policy.load_state_dict(saved)
    again.policy.optimizer.load_state_dict(optimizer)
    vars(again).update({name: vars(learner)[name] for name in ("_iteration", "_rate")})
    assert again.env is not None
    before = agent(tensor_env(AVOID)).learn(8 * 20 * 2)
    again._iteration, again._rate, again.num_timesteps = before._iteration, before._rate, before.num_timesteps
    assert restore(again, state) == []
    again.learn(8 * 20 * 2, reset_num_timesteps=False)
    for ours, theirs in zip(again.policy.parameters(), learner.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("id", "options", "message"),
    [
        ("Pendulum-v1", {}, "tensor: got 'Pendulum-v1', another environment, expected one of driftrl/MultiGoal-v0"),
        (AVOID, {"render_mode": "rgb_array"}, "tensor: got render_mode='rgb_array', expected None"),
        (AVOID, {"worker_restarts": 3}, "worker_restarts: got 3, which changes nothing without backend subproc"),
    ],
)
def test_what_it_cannot_do_is_refused(id: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_vec(id, 2, 0, backend="tensor", **options)
    with pytest.raises(ValueError, match="device: got cuda, which changes nothing without backend tensor or warp, got"):
        make_vec(AVOID, 2, 0, device="cuda")


def test_train_takes_the_backend_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["policyflow", "--env", AVOID, "--backend", "tensor", "--device", "cpu", "--total-timesteps", "3200"]
    assert train.main([*command, "--critic-warmup", "0", "--compile", "off"]) == 0
    [run] = tmp_path.glob("runs/*/policyflow/*")
    assert train.main(["--resume", str(run), "--total-timesteps", "6400"]) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("task", TENSOR_TASKS)
def test_a_rollout_stays_on_the_gpu(task: str) -> None:
    env = make_vec(task, 64, 0, backend="tensor", device="cuda")
    learner = agent(env, device="cuda", batch_size=320)
    assert learner._stays_on_device(env)
    learner.learn(64 * 20 * 3)
    assert learner.samples.obs.is_cuda
    assert all(bool(each.isfinite().all()) for each in learner.policy.parameters())


@pytest.mark.slow
def test_multi_goal_is_learned_as_on_its_batch_in_numpy() -> None:
    returns = {}
    for backend in ("tensor", "batched"):
        learner = PolicyFlow(
            "MlpPolicy", make_vec("driftrl/MultiGoal-v0", 256, 0, backend=backend),
            n_steps=32, batch_size=1024, n_epochs=5, base_std=1.0, base="standard", ratio="endpoint", gamma=0.95,
            learning_rate=1e-3, seed=0, device="cpu", compile="off",
        )  # fmt: skip
        learner.learn(600_000)
        returns[backend] = evaluate_policy(learner, make_vec("driftrl/MultiGoal-v0", 50, 1), 200, warn=False)[0]
    assert returns["tensor"] == pytest.approx(returns["batched"], rel=0.15)
