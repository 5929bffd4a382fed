from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "oracles"))

from several_ranks import on_ranks

from driftrl import LipschitzMBPO, PolicyFlow
from driftrl.agents.common.ranks import RankError, present
from driftrl.envs import make_vec

TASK = "InvertedPendulum-v5"
SMALL: dict[str, Any] = {
    "n_steps": 16, "batch_size": 16, "n_epochs": 2, "actor_hidden": (8, 8), "critic_hidden": (8, 8), "seed": 3,
    "compile": "off", "device": "cpu",
}  # fmt: skip


def make(n_envs: int = 2, **fields: Any) -> PolicyFlow:
    return PolicyFlow("MlpPolicy", make_vec(TASK, n_envs, 0), **SMALL | fields)


class State(NamedTuple):
    """What must be the same on all ranks, and what must not."""

    weights: str  # and normalisers, average, optimizer
    numbers: list[Any]
    own: list[Any]


def state_of(agent: PolicyFlow) -> State:
    hashed = hashlib.sha256()
    moments = [each for state in agent.policy.optimizer.state.values() for each in state.values()]
    for each in [*agent.policy.state_dict().values(), *moments]:
        hashed.update(each.contiguous().numpy().tobytes())
    assert agent.ep_info_buffer is not None
    returns = [float(each["r"]) for each in agent.ep_info_buffer]
    numbers = [agent._rate, agent.num_timesteps, agent._spread_coef, agent._n_updates, returns]
    noise = agent._generator.get_state().tolist()
    return State(hashed.hexdigest(), numbers, [np.asarray(agent._last_obs).tolist(), noise])


def learned(steps: int, fields: dict[str, Any]) -> State:
    return state_of(make(**fields).learn(steps))


@pytest.mark.parametrize(
    "fields",
    [
        {"lr_schedule": "adaptive", "ema_decay": 0.9, "normalize_reward": True, "on_collapse": "rollback"},
        {"spread": "score", "spread_coef": 0.1, "target_entropy": (1.0, 0.0), "target_kl": 0.01},
        {"normalize_advantage": False, "critic_learning_rate": 1e-3, "nonfinite": "skip", "max_grad_norm": 9.0},
    ],
)
def test_ranks_are_the_same_to_the_last_bit(fields: dict[str, Any]) -> None:
    first, second = on_ranks(2, learned, 512, fields)
    assert first[:2] == second[:2]
    assert all(mine != other for mine, other in zip(first.own, second.own, strict=True))
    assert first.numbers[1] == 512 and len(first.numbers[-1]) > 10
    alone = learned(512, fields)
    assert alone.weights != first.weights


def test_one_rank_begins_as_a_single_process_would() -> None:
    (one,) = on_ranks(1, learned, 128, {})
    assert one == learned(128, {})


class Replaying(PolicyFlow):
    """Learns from rollouts that were recorded: from the environments that are its rank's."""

    rollouts: list[tuple[Any, Tensor]]

    def collect_rollouts(self, env: Any, callback: Any, rollout_buffer: Any, n_rollout_steps: int) -> bool:
        (samples, features), envs = self.rollouts[self._iteration], features_of(self)
        chosen = torch.arange(len(samples.obs)).view(n_rollout_steps, -1)[:, envs].flatten()
        self.samples = samples.rows(chosen)
        self.storage.features.copy_(features[:, envs])
        self.num_timesteps += n_rollout_steps * env.num_envs * present().size
        return True


def features_of(agent: PolicyFlow) -> slice:
    return slice(present().rank * agent.n_envs, (present().rank + 1) * agent.n_envs)


def recorded(n_envs: int) -> list[tuple[Any, Tensor]]:
    class Recording(PolicyFlow):
        seen: list[tuple[Any, Tensor]]

        def train(self) -> None:
            self.seen.append((self.samples, self.storage.features.clone()))
            super().train()

    agent = Recording("MlpPolicy", make_vec(TASK, n_envs, 0), **SMALL)
    agent.seen = []
    agent.learn(4 * 16 * n_envs)
    return agent.seen


def replayed(rollouts: list[tuple[Any, Tensor]], n_envs: int, fields: dict[str, Any]) -> tuple[list[Tensor], float]:
    """Weights, normalisers and what is logged last after learning from rollouts; the rate."""
    how = SMALL | {"batch_size": 16 * n_envs, "ratio": "endpoint", "lr_schedule": "adaptive"} | fields
    agent = Replaying("MlpPolicy", make_vec(TASK, n_envs, 0), **how)
    agent.rollouts = rollouts
    agent.learn(len(rollouts) * len(rollouts[0][0].obs))
    logged = [agent.logger.name_to_value[f"train/{name}"] for name in ("loss", "approx_kl", "grad_norm")]
    return [*(each.detach() for each in agent.policy.state_dict().values()), torch.tensor(logged)], agent._rate


@pytest.mark.parametrize(
    "fields",
    [
        {"max_grad_norm": 0.05},
        {"ema_decay": 0.9, "normalize_advantage": False},
        {
            "policy_kwargs": {"optimizer_class": torch.optim.SGD},
            "max_grad_norm": 1e6,
            "lr_schedule": "constant",
            "learning_rate": 0.1,
        },
    ],
)
@pytest.mark.filterwarnings("ignore:this agent cannot be saved as it is:UserWarning")  # with recorded rollouts
def test_updates_of_two_ranks_are_those_of_one_process_with_all_samples(fields: dict[str, Any]) -> None:
    rollouts = recorded(4)
    whole, rate = replayed(rollouts, 4, fields)
    for state, its_rate in on_ranks(2, replayed, rollouts, 2, fields):
        assert its_rate == rate
        for mine, expected in zip(state, whole, strict=True):
            torch.testing.assert_close(mine, expected, rtol=2e-4, atol=2e-5)


class At(BaseCallback):
    """Does something on rank 1 after so many steps of its own."""

    def __init__(self, step: int, action: Callable[[Any], Any], where: str = "_on_step") -> None:
        super().__init__()
        self.step, self.action, self.where, self.seen = step, action, where, 0

    def _happen(self, where: str) -> Any:
        if where == self.where:
            self.seen += 1
            if present().rank == 1 and self.seen == self.step:
                return self.action(self.model)
        return None

    def _on_step(self) -> bool:
        return self._happen("_on_step") is not False

    def _on_rollout_end(self) -> None:
        self._happen("_on_rollout_end")

    def _on_training_end(self) -> None:
        self._happen("_on_training_end")


def stopped() -> tuple[State, State]:
    agent = make()
    agent.learn(10_000, callback=At(40, lambda model: False))
    before = state_of(agent)
    agent.learn(128, reset_num_timesteps=False)
    return before, state_of(agent)


def test_a_callback_of_one_rank_stops_all_and_they_can_go_on() -> None:
    (first, later), (second, later_second) = on_ranks(2, stopped)
    assert first[:2] == second[:2] and later[:2] == later_second[:2]
    assert first.numbers[1] == 2 * 48 + 2 * 40  # two environments on each rank
    assert later.numbers[1] == first.numbers[1] + 128


def failing(action: Callable[[Any], Any], where: str, step: int, fields: dict[str, Any]) -> tuple[int, int]:
    agent = make(**fields)
    agent.learn(320, callback=At(step, action, where))
    return agent._updates_left_out, agent._n_updates


def fail(model: Any) -> None:
    raise KeyError("the user's")


def interrupt(model: Any) -> None:
    raise KeyboardInterrupt(15)


def spoil(model: Any) -> None:
    next(model.policy.parameters()).data.fill_(torch.nan)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("where", "step"), [("_on_step", 40), ("_on_rollout_end", 3), ("_on_training_end", 1)])
def test_an_error_on_one_rank_ends_all(where: str, step: int, normalize: bool) -> None:
    begin = time.monotonic()
    heard, own = on_ranks(2, failing, fail, where, step, {"normalize_advantage": normalize})
    assert isinstance(own, KeyError)
    assert isinstance(heard, RankError) and str(heard) == 'rank 1 ended: KeyError: "the user\'s"'
    assert time.monotonic() - begin < 30  # on a busy machine: without a word it would be 180


def test_an_interrupt_on_one_rank_ends_all() -> None:
    for each in on_ranks(2, failing, interrupt, "_on_step", 40, {}):
        assert isinstance(each, KeyboardInterrupt) and each.args == (15,)


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "rollback"])
def test_weights_that_are_not_finite_on_one_rank_end_all(nonfinite: str) -> None:
    heard, own = on_ranks(2, failing, spoil, "_on_step", 40, {"nonfinite": nonfinite})
    assert isinstance(own, ValueError) and str(own).startswith("non-finite action: got nan")
    assert isinstance(heard, RankError) and str(heard).startswith("rank 1 ended: ValueError: non-finite action")


def spoil_loss(model: Any) -> None:
    model.samples.returns[0] = torch.inf


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.filterwarnings("ignore:non-finite term of the loss.*the update is left out")
def test_a_loss_that_is_not_finite_on_one_rank_is_not_on_any(nonfinite: str) -> None:
    results = on_ranks(2, failing, spoil_loss, "_on_rollout_end", 3, {"nonfinite": nonfinite, "batch_size": 32})
    if nonfinite == "skip":  # both leave the updates of that rollout out, and go on
        (left_out, made), other = results
        assert left_out > 0 and made > 0 and other == (left_out, made)
        return
    for each in results:
        assert isinstance(each, ValueError) and "non-finite" in str(each)


def odd() -> None:
    make(gamma=0.9 if present().rank else 0.99).learn(64)


def late() -> None:
    group = present()
    dist.destroy_process_group()
    agent = make()
    how: dict[str, Any] = {"store": torch._C._distributed_c10d.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **how)
    agent.learn(32)  # one process: nothing to refuse
    agent._ranks = group
    agent.learn(32)


def model_based() -> None:
    LipschitzMBPO("MlpPolicy", make_vec(TASK, 1, 0), device="cpu", learning_starts=5).learn(10)


def other_rate() -> None:
    """The Config of both is the same: it knows a function's value at the beginning."""
    power = 1 + 3 * present().rank
    make(learning_rate=lambda remaining: 3e-4 * remaining**power).learn(1024)


def other_count() -> None:
    make(lr_schedule="linear").learn(64).learn(64, reset_num_timesteps=bool(present().rank))


def test_what_cannot_train_together_is_refused() -> None:
    for error in on_ranks(2, other_rate):
        assert str(error) == "ranks: got another rate on one than on another; it must be the same on all"
    for error in on_ranks(2, other_count):
        assert str(error).startswith("ranks: got other reset_num_timesteps on one than on another")
    for error in on_ranks(2, odd):
        assert str(error) == "ranks: got other config on one than on another, expected the same on all"
    for error in on_ranks(2, late):
        assert "call torch.distributed.init_process_group before the agent is made or loaded" in str(error)
    for error in on_ranks(2, model_based):
        assert str(error).startswith("ranks: got 2 for LipschitzMBPO, which trains in one process")
