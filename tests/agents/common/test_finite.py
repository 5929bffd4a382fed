"""Numbers that are not finite, put into each place in turn: named, left out, taken back; and training goes on."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor
from torch import Tensor, nn

from driftrl import LipschitzMBPO, PolicyFlow
from driftrl.agents.common.program import tensors_in

ON_POLICY: dict[str, Any] = {"n_steps": 8, "batch_size": 8, "n_epochs": 2, "actor_hidden": (8,), "critic_hidden": (8,)}
OFF_POLICY: dict[str, Any] = {
    "learning_starts": 4, "gradient_steps": 4, "batch_size": 8, "actor_hidden": (8,), "critic_hidden": (8,),
    "model": "none", "compile": "off", "diagnostics_interval": 0,
}  # fmt: skip
AGENTS: list[tuple[type[Any], dict[str, Any]]] = [(PolicyFlow, ON_POLICY), (LipschitzMBPO, OFF_POLICY)]
LAST: dict[type[Any], int] = {PolicyFlow: 3, LipschitzMBPO: 7}  # update before the policy acts again
both = pytest.mark.parametrize(("kind", "fields"), AGENTS)


class Counter(gym.Env[Any, np.ndarray]):
    """Observes 10 + its step count twice, reward 1, terminates at 4; `wrong` changes that, by step of its life."""

    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, wrong: dict[int, dict[str, Any]], as_dict: bool = False) -> None:
        box = spaces.Box(-1e6, 1e6, (1,))
        self.observation_space = spaces.Dict(a=box, b=box) if as_dict else spaces.Box(-1e6, 1e6, (2,))
        self.wrong, self.life, self.count = wrong, 0, 0

    def observe(self, second: float) -> Any:
        parts = np.array([10.0 + self.count, second], np.float32)
        return {"a": parts[:1], "b": parts[1:]} if isinstance(self.observation_space, spaces.Dict) else parts

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return self.observe(self.wrong.get(self.life, {}).get("first", 10.0)), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count, self.life = self.count + 1, self.life + 1
        wrong = self.wrong.get(self.life, {})
        info = {"worker_restarted": True} if "restarted" in wrong else {}
        over, truncated = self.count == 4, "truncated" in wrong
        obs = self.observe(wrong.get("obs", 10.0 + self.count))
        return obs, wrong.get("reward", 1.0), over and not truncated, over and truncated, info


def make(kind: type[Any], fields: dict[str, Any], wrong: dict[int, dict[str, Any]] | None = None, **more: Any) -> Any:
    """An agent on two environments, the second with wrong numbers."""
    as_dict = more.pop("as_dict", False)
    env = DummyVecEnv([lambda: Counter({}, as_dict), lambda: Counter(wrong or {}, as_dict)])
    options = {"device": "cpu", "seed": 0} | fields | more
    return kind("MultiInputPolicy" if as_dict else "MlpPolicy", env, **options)


def state(agent: Any) -> list[Tensor]:
    """All that an update changes; Adam begins with moments of zero and no step, whether they are there or not."""
    moments = list[Tensor]()
    for group in agent.policy.optimizer.param_groups:
        for parameter in group["params"]:
            empty, zeros = {"step": torch.tensor(0.0)}, torch.zeros_like(parameter)
            found = agent.policy.optimizer.state.get(parameter, {})
            moments += (empty | dict.fromkeys(("exp_avg", "exp_avg_sq"), zeros) | found).values()
    return copy.deepcopy([*agent.policy.parameters(), *moments])


Result = tuple[Tensor, dict[str, Tensor]]


def poisoned(agent: Any, at: int, poison: Callable[[Tensor, dict[str, Tensor]], Result]) -> None:
    """Let the gradient's call number `at` return what `poison` makes of it."""
    gradient, calls = agent._gradient, iter(range(10**9))

    def wrong(*batch: Any) -> Result:
        vector, terms = gradient(*batch)
        return poison(vector, terms) if next(calls) == at else (vector, terms)

    agent._gradient = wrong


def bad_loss(vector: Tensor, terms: dict[str, Tensor]) -> Result:
    name = "train/value_loss" if "train/value_loss" in terms else "train/critic_loss"
    return vector * torch.nan, terms | dict.fromkeys((name, "train/loss", "train/grad_norm"), torch.tensor(torch.nan))


def bad_gradient(vector: Tensor, terms: dict[str, Tensor]) -> Result:
    return vector * torch.inf, terms | {"train/grad_norm": torch.tensor(torch.inf)}


@both
@pytest.mark.filterwarnings("ignore:non-finite reward.*the transition is left out:RuntimeWarning")
@pytest.mark.parametrize("wrong", [np.inf, np.nan])
def test_an_episode_without_a_return_does_not_hide_the_others(
    kind: type[Any], fields: dict[str, Any], wrong: float
) -> None:
    env = VecMonitor(DummyVecEnv([lambda: Counter({}), lambda: Counter({3: {"reward": wrong}})]))
    agent = kind("MlpPolicy", env, device="cpu", seed=0, nonfinite="skip", **fields).learn(16)
    assert [episode["r"] for episode in agent.ep_info_buffer] == [4, 4, 4]


@both
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({3: {"obs": np.nan}}, "non-finite observation: got nan in entry 1 of environment 1"),
        ({4: {"obs": np.inf}}, "non-finite observation: got inf in entry 1 of environment 1"),  # the terminal one
        ({3: {"reward": -np.inf}}, "non-finite reward: got -inf of environment 1"),
        ({0: {"first": np.nan}}, "non-finite observation: got nan in entry 1 of environment 1"),
    ],
)
@pytest.mark.parametrize("as_dict", [False, True])
def test_wrong_numbers_of_an_environment_are_named(
    kind: type[Any], fields: dict[str, Any], wrong: dict[int, dict[str, Any]], message: str, as_dict: bool
) -> None:
    with pytest.raises(ValueError, match=message):
        make(kind, fields, wrong, as_dict=as_dict).learn(16)
    if 0 in wrong:  # no other observation to act on
        with pytest.raises(ValueError, match=message):
            make(kind, fields, wrong, as_dict=as_dict, nonfinite="skip").learn(16)


class ValueIsTheMean(nn.Module):
    def forward(self, obs: Tensor) -> Tensor:
        return obs.mean(1, keepdim=True)


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize(
    ("wrong", "left_out", "returns"),
    [
        # lambda = 1, gamma = 1/2: 1 + (1 + (1 + 1 / 2) / 2) / 2, ...; where a transition is left out the sum ends with
        # half the value of the state before it, 11 or 12.
        ({2: {"reward": np.nan}}, [1], [1 + 11 / 2, None, 1.5, 1]),
        ({2: {"obs": np.nan}}, [1, 2], [1 + 11 / 2, None, None, 1]),  # the third begins in an unknown state
        ({4: {"obs": np.nan}}, [3], [1 + (1 + (1 + 13 / 2) / 2) / 2, 1 + (1 + 13 / 2) / 2, 1 + 13 / 2, None]),
        (
            {4: {"obs": np.nan, "truncated": True}},
            [3],
            [1 + (1 + (1 + 13 / 2) / 2) / 2, 1 + (1 + 13 / 2) / 2, 7.5, None],
        ),
        (
            {4: {"first": np.nan}},
            [],
            [1 + (1 + (1 + 1 / 2) / 2) / 2, 1 + (1 + 1 / 2) / 2, 1.5, 1],
        ),  # the next episode's
        (
            {4: {"restarted": True, "truncated": True}},
            [3],
            [1 + (1 + (1 + 13 / 2) / 2) / 2, 1 + (1 + 13 / 2) / 2, 1 + 13 / 2, None],
        ),
    ],
)
def test_a_transition_left_out_changes_no_other(
    wrong: dict[int, dict[str, Any]], left_out: list[int], returns: list[float | None], as_dict: bool
) -> None:
    plain = {"gamma": 0.5, "gae_lambda": 1.0, "normalize_observation": False, "normalize_reward": False}
    agent = make(PolicyFlow, ON_POLICY | {"n_steps": 4}, wrong, nonfinite="skip", as_dict=as_dict, **plain)
    agent.policy.critic = ValueIsTheMean()
    _, callback = agent._setup_learn(16)
    with pytest.warns(RuntimeWarning) if "restarted" not in str(wrong) else contextlib.nullcontext():
        agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, 4)
    got = agent.samples.returns.view(4, 2)
    sound = [1 + (1 + (1 + 1 / 2) / 2) / 2, 1 + (1 + 1 / 2) / 2, 1.5, 1]
    assert got[:, 0].tolist() == pytest.approx(sound)
    kept = [t for t in range(4) if t not in left_out]
    assert got[kept, 1].tolist() == pytest.approx([returns[t] for t in kept])
    rows = torch.cat([agent.samples.obs, agent.samples.action, agent.samples.returns[:, None]], 1)
    others = [i for i in range(8) if i not in [2 * t + 1 for t in left_out]]
    for t in left_out:  # in its place stands another one, whole
        assert (rows[2 * t + 1] == rows[others]).all(1).any()
    assert agent.logger.name_to_value.get("rollout/transitions_left_out", 0) == len(left_out)
    assert all(values.isfinite().all() for values in tensors_in(agent.samples))


@pytest.mark.parametrize(
    ("wrong", "left_out"),
    [
        ({7: {"reward": np.inf}}, 1),
        ({6: {"obs": np.nan}, 7: {"obs": np.nan}}, 3),  # two into nowhere, the third from nowhere
        ({8: {"obs": np.nan}}, 1),  # the end of an episode
        ({8: {"first": np.nan}}, 1),  # the beginning of one: what ended before it is whole
        ({8: {"restarted": True}}, 1),
    ],
)
@pytest.mark.filterwarnings("ignore:non-finite:RuntimeWarning")
def test_the_replay_buffer_holds_only_what_may_be_learned_from(wrong: dict[int, dict[str, Any]], left_out: int) -> None:
    agent = make(LipschitzMBPO, OFF_POLICY, wrong, nonfinite="rollback").learn(32)
    seen = agent.replay_buffer.transitions.all()
    assert len(seen.obs) == 32 - left_out
    assert all(values.isfinite().all() for values in seen)
    # each of them moves from n to n + 1, as the environment does
    torch.testing.assert_close(seen.next_obs[:, 0], seen.obs[:, 0] + 1)
    restarts = int("restarted" in str(wrong))
    assert agent.logger.name_to_value.get("rollout/worker_restarts") == (restarts or None)


@both
def test_what_never_happened_has_no_row(kind: type[Any], fields: dict[str, Any]) -> None:
    agent = make(kind, fields)
    agent.learn(16, log_interval=10**6)
    counts = {name for name in agent.logger.name_to_value if re.search("left_out|restarts|diverged|rollbacks", name)}
    assert counts == set()


def test_a_rollout_without_sound_transitions_is_an_error() -> None:
    agent = PolicyFlow(
        "MlpPolicy", DummyVecEnv([lambda: Counter({i: {"reward": np.nan} for i in range(99)})]), device="cpu",
        nonfinite="skip", **ON_POLICY,
    )  # fmt: skip
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="got no transition of finite numbers"):
        agent.learn(8)


@both
def test_wrong_terms_are_named(kind: type[Any], fields: dict[str, Any]) -> None:
    for poison, name in ((bad_loss, "train/(value|critic)_loss"), (bad_gradient, "train/grad_norm")):
        agent = make(kind, fields)
        poisoned(agent, 1, poison)
        with pytest.raises(ValueError, match=f"non-finite term of the loss: got .* for {name} in update 1 at step"):
            agent.learn(16)


@both
@pytest.mark.parametrize("poison", [bad_loss, bad_gradient])
def test_skip_leaves_the_update_out(kind: type[Any], fields: dict[str, Any], poison: Any) -> None:
    agent, sound = make(kind, fields, nonfinite="skip"), make(kind, fields).learn(16)
    poisoned(agent, 2, poison)
    with pytest.warns(RuntimeWarning, match=r"for train/(value_loss|critic_loss|grad_norm); the update is left out"):
        agent.learn(16)
    states = [each.policy.optimizer.state.values() for each in (agent, sound)]
    taken, of_sound = ([moments["step"].item() for moments in state] for state in states)
    assert of_sound and taken == [steps - 1 for steps in of_sound]
    logged = None if kind is PolicyFlow else 1  # PolicyFlow logs before the update
    assert agent.logger.name_to_value.get("train/updates_left_out") == logged
    assert agent._updates_left_out == 1
    assert all(weight.isfinite().all() for weight in agent.policy.parameters())


@both
def test_skip_does_not_go_on_without_any_update(kind: type[Any], fields: dict[str, Any]) -> None:
    agent = make(kind, fields, nonfinite="skip")
    agent._gradient = lambda *batch, gradient=agent._gradient: bad_loss(*gradient(*batch))
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="got no update whose terms are finite"):
        agent.learn(200)


@both
def test_skip_goes_on_where_the_only_update_was_left_out(kind: type[Any], fields: dict[str, Any]) -> None:
    one = {"batch_size": 16, "n_epochs": 2} if kind is PolicyFlow else {"gradient_steps": 1, "batch_size": 8}
    agent, sound = make(kind, fields | one, nonfinite="skip"), make(kind, fields | one).learn(48)
    poisoned(agent, 1, bad_loss)
    with pytest.warns(RuntimeWarning, match="the update is left out"):
        agent.learn(48)
    states = [each.policy.optimizer.state.values() for each in (agent, sound)]
    taken, of_sound = ([moments["step"].item() for moments in state] for state in states)
    assert of_sound and taken == [steps - 1 for steps in of_sound]
    assert agent._n_updates == sound._n_updates - 1


def spoil_weights(agent: Any) -> Callable[[Tensor, dict[str, Tensor]], Result]:
    def poison(vector: Tensor, terms: dict[str, Tensor]) -> Result:
        next(agent.policy.actor.parameters()).data[0] = torch.nan
        return vector, terms

    return poison


@both
@pytest.mark.parametrize("what", ["loss", "weights"])
@pytest.mark.parametrize("trained_before", [False, True])
def test_rollback_takes_the_updates_back(
    kind: type[Any], fields: dict[str, Any], what: str, trained_before: bool
) -> None:
    more = {"ema_decay": 0.9} if kind is PolicyFlow else {"learning_starts": 7}
    agent = make(kind, fields | more, nonfinite="rollback")
    if trained_before:
        agent.learn(16)
    before, gradient = state(agent), agent._gradient
    steps = 16 if kind is PolicyFlow else (2 if trained_before else 8)
    poisoned(agent, LAST[kind], bad_loss if what == "loss" else spoil_weights(agent))
    with pytest.warns(RuntimeWarning, match="go back to those before the updates"):
        agent.learn(steps, reset_num_timesteps=not trained_before)
    after = state(agent)
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert agent._rollbacks == 1
    agent._gradient = gradient
    agent.learn(16, reset_num_timesteps=False)
    assert not torch.equal(state(agent)[0], after[0])
    assert all(weight.isfinite().all() for weight in agent.policy.parameters())


@both
def test_wrong_weights_are_named(kind: type[Any], fields: dict[str, Any]) -> None:
    for mode in ("raise", "skip", "rollback"):
        agent = make(kind, fields | {"learning_starts": 2} if kind is LipschitzMBPO else fields, nonfinite=mode)
        name, weight = next(iter(agent.policy.actor.named_parameters()))
        weight.data[0] = torch.nan
        with pytest.raises(ValueError, match=rf"non-finite action: got nan of environment 0.* in actor\.{name}"):
            agent.learn(16)
    agent = make(kind, fields)
    poisoned(agent, LAST[kind], spoil_weights(agent))
    with pytest.raises(ValueError, match=r"non-finite weights: got such numbers in actor\."):
        agent.learn(16)
