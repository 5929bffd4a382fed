"""Tasks of one's own as programs of tensors: what they may do, and what is said where they do something else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from driftrl.envs.tensor import TensorTask, TensorVecEnv, indexed

from .small_agent import agent


class Wrong(TensorTask):
    """Goes wrong in a way."""

    observation_space, action_space, limit = spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (1,)), 20.0

    def __init__(self, how: str = "") -> None:
        self.how = how

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        shape = {"observations": (4,), "states": (3, 3), "vector": ()}.get(self.how, (1,))
        return torch.zeros(count, *shape)

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        reward, ended = state[:, 0], torch.zeros(len(state), dtype=torch.bool)
        if self.how == "nan":
            return state * float("nan"), reward, ended, {}
        reward = reward[:, None] if self.how == "rewards" else reward
        if self.how == "parts":
            return state, reward, ended  # type: ignore[return-value]
        info = {"is_success": torch.zeros(len(state), 1, dtype=torch.bool)} if self.how == "is_success" else {}
        return state, reward, ended.float() if self.how == "terminated" else ended, info


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("observations", r"Wrong.start and observe: got observations \[8, 4\], torch.float32, expected \[8, 1\]"),
        ("rewards", r"Wrong.step: got rewards \[8, 1\], torch.float32, expected \[8\]"),
        ("terminated", r"Wrong.step: got terminated \[8\], torch.float32, expected \[8\], torch.bool"),
        ("nan", r"non-finite observation: expected finite numbers"),
        ("states", r"Wrong.start: got states \[8, 3, 3\], torch.float32, expected \[8, 1\]"),
        ("vector", r"Wrong.start: got states \[8\], torch.float32, expected \[8, 1\]"),
        ("parts", r"Wrong.step: expected states, rewards, terminated and a mapping of info"),
        ("is_success", r"Wrong.step: got info\['is_success'\] \[8, 1\], torch.bool, expected \[8\]"),
    ],
)
def test_what_a_task_does_wrong_is_said(how: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        agent(TensorVecEnv(Wrong(how), 8)).learn(1000)


class Endless(Wrong):
    """Episodes of twenty steps, each with reward 1."""

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        never = torch.zeros(len(state), dtype=torch.bool)
        return state, torch.ones(len(state)), never, {"simulation_diverged": state[:, 0] > 0}


def test_first_episodes_that_are_staggered_end_at_random_and_are_not_reported() -> None:
    env = TensorVecEnv(Endless(), 4000, stagger=True)
    env.seed(0)
    env.reset_tensor()
    ends, episodes = [], []
    for _ in range(60):
        step = env.step_tensor(torch.zeros(4000, 1))
        ends.append(step.truncated)
        episodes.append(env.episodes())
    first = torch.stack(ends).int().argmax(0) + 1
    shares = torch.bincount(first, minlength=21)[1:] / 4000
    torch.testing.assert_close(shares, torch.full((20,), 0.05), atol=0.015, rtol=0)
    times = torch.stack(ends)[20:].int().argmax(0) + 21 - first  # afterwards every twentieth step
    assert set(times.tolist()) == {20}
    assert {each["episode"]["l"] for those in episodes for each in those} == {20}
    assert not any(episodes[:19])
    assert len(episodes[19]) == int((first == 20).sum())  # whose limit was the task's own
    with pytest.raises(ValueError, match="stagger: got True, but episodes of the task have no limit"):
        task = Endless()
        task.limit = math.inf
        TensorVecEnv(task, 2, stagger=True)


def test_staggered_episodes_go_on_from_a_saved_state_and_infos_leave_them_out() -> None:
    env, other = (TensorVecEnv(Endless(), 50, stagger=True) for _ in range(2))
    env.reset()
    other.reset()
    action = np.zeros((50, 1), np.float32)
    for _ in range(5):
        env.step(action)
    other.set_state(env.get_state())
    reported = 0
    for t in range(40):
        _, _, dones, infos = env.step(action)
        assert np.array_equal(other.step(action)[2], dones)
        assert all("terminal_observation" in infos[i] for i in np.flatnonzero(dones))
        reported += sum("episode" in info for info in infos)
        assert t > 13 or reported == 0
    assert reported >= 50


def test_what_is_no_task_is_refused() -> None:
    with pytest.raises(ValueError, match=r"task: got <class .*Wrong'>, expected a TensorTask"):
        TensorVecEnv(Wrong, 8)  # type: ignore[arg-type]
    for space in (spaces.Box(-1, 1, (2, 2)), spaces.Dict({"a": spaces.Box(-1, 1, (1,))})):
        task = Wrong()
        task.observation_space = space  # type: ignore[assignment]
        with pytest.raises(ValueError, match=r"task: got a Wrong whose observation_space is .*, expected a Box of vec"):
            TensorVecEnv(task, 8)
    for number in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"n_envs: got {number}, expected an integer of at least 1"):
            TensorVecEnv(Wrong(), number)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="call reset before"):
        TensorVecEnv(Wrong(), 8).step_tensor(torch.zeros(8, 1))
    endless = Wrong()
    endless.limit = math.nan
    with pytest.raises(ValueError, match="limit: got a task whose episodes have nan steps"):
        TensorVecEnv(endless, 2)


def test_the_present_gpu_is_the_one_without_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    found = [str(indexed(each)) for each in ("cpu", "cuda", torch.device("cuda"), "cuda:1")]
    assert found == ["cpu", "cuda:3", "cuda:3", "cuda:1"]
    with pytest.raises(ValueError, match="device: got cuda:4, but torch finds 4 CUDA devices"):
        indexed("cuda:4")
    with pytest.raises(ValueError, match="device: got 'gpu', expected cpu, cuda or cuda:N"):
        TensorVecEnv(Wrong(), 2, device="gpu")
