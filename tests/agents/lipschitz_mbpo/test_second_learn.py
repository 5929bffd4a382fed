"""A second call of `learn`, small buffers, and arguments that would mean nothing."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import VecNormalize

from driftrl import LipschitzMBPO
from driftrl.agents.storage.values import CheckpointError
from driftrl.dynamics.transition import GaussianTransition
from driftrl.envs import make_vec

SMALL: dict[str, Any] = {
    "learning_starts": 60, "model_epochs": 2, "model_hidden": (16,), "model_interval": 40, "model_retain": 60,
    "model_rollouts": 4, "gradient_steps": 1, "seed": 0, "device": "cpu", "actor_hidden": (16,), "critic_hidden": (16,),
    "batch_size": 16, "compile": "off", "rollout_max": 2, "rollout_min": 2,
}  # fmt: skip


def agent(**fields: Any) -> LipschitzMBPO:
    if fields.get("model") == "none":
        learner = {name: SMALL[name] for name in ("gradient_steps", "seed", "device", "batch_size", "compile")}
        return LipschitzMBPO("MlpPolicy", make_vec("InvertedPendulum-v5", 1, 0), **(learner | fields))
    return LipschitzMBPO("MlpPolicy", make_vec("InvertedPendulum-v5", 1, 0), **(SMALL | fields))


@pytest.mark.filterwarnings("ignore:this agent cannot be saved:UserWarning")  # with these methods
@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("fields", [{}, {"value_gradient": 2, "rollout_interval": 20}])
def test_a_second_call_of_learn_fits_and_imagines_as_often_as_the_first(
    fields: dict[str, Any], reset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, calls = agent(**fields), {"_fit_model": 0, "_imagine": 0}
    for name in calls:
        original = getattr(learner, name)

        def counted(*arguments: Any, _name: str = name, _original: Any = original) -> Any:
            calls[_name] += 1
            return _original(*arguments)

        monkeypatch.setattr(learner, name, counted)
    learner.learn(300)
    first = dict(calls)
    learner.learn(240, reset_num_timesteps=reset)
    fits = 5 if reset else 6  # a clock that starts anew passes learning_starts once more, as in SAC
    assert first["_fit_model"] == 6 and calls["_fit_model"] - first["_fit_model"] == fits
    imagined = calls["_imagine"] - first["_imagine"]
    assert imagined == fits if not fields else fits < imagined <= 2 * fits + 1


def test_observation_statistics_see_every_row_once_over_calls_of_learn() -> None:
    learner = agent(model="none", regularizer="none", normalize_observation=True, learning_starts=30)
    learner.learn(100)
    learner.learn(200)
    learner._learn_scales()
    assert learner.policy.obs_norm.count == 300


def test_a_buffer_smaller_than_learning_starts_learns_once_it_is_full() -> None:
    learner = agent(model="none", regularizer="none", buffer_size=20, learning_starts=30).learn(60)
    assert learner._n_updates > 0


def test_a_second_call_of_learn_fits_the_model_before_it_learns_from_it() -> None:
    learner = agent(learning_starts=100, model_interval=500, model_retain=500)
    assert learner.transition is not None
    learner.learn(50)
    fitted = [learner.transition.is_fitted]
    learner.learn(120)
    assert [*fitted, learner.transition.is_fitted] == [False, True]
    assert learner._n_updates > 0 and learner.policy.obs_norm.count > 0


def test_a_loaded_buffer_counts_for_statistics_and_size(tmp_path: Path) -> None:
    filled = agent(buffer_size=50).learn(200)
    filled.save_replay_buffer(tmp_path / "replay.pkl")
    learner = agent(normalize_observation=True, learning_starts=60, buffer_size=1000)
    learner.load_replay_buffer(tmp_path / "replay.pkl")  # of 50 rows, into a buffer that holds more
    learner.learn(70)
    assert learner._n_updates == 10 and learner.policy.obs_norm.count == 50 + 61
    assert len(learner._real) == 120 and learner.replay_buffer.buffer_size == learner.buffer_size == 1000  # type: ignore[union-attr]
    small = agent(buffer_size=20)
    small.load_replay_buffer(tmp_path / "replay.pkl")
    assert torch.equal(small._real.rows, filled._real.newest(20)) and small.buffer_size == small._real.capacity == 20


@pytest.mark.parametrize("termination", ["learned", "never"])
def test_a_rule_that_would_not_be_used_is_refused(termination: str) -> None:
    with pytest.raises(ValueError, match="terminated: got a function, which changes nothing with termination="):
        agent(terminated=lambda obs: torch.ones(len(obs), dtype=torch.bool), termination=termination)
    for name in ("terminated", "known_step"):
        with pytest.raises(ValueError, match=f"{name}: got a function, which changes nothing with model='none'"):
            agent(**{name: lambda obs, *_: obs}, model="none", regularizer="none")


def test_a_loaded_agent_takes_the_rule_of_the_environment_that_is_set(tmp_path: Path) -> None:
    file = tmp_path / "agent.zip"
    agent().learn(100).save(file)
    learner = LipschitzMBPO.load(file)
    learner.set_env(make_vec("InvertedPendulum-v5", 1, 1))
    learner.learn(100)
    assert learner._terminated is not None and learner._terminated(torch.tensor([[0.0, 0.3, 0, 0]])).item()


def test_environments_that_do_not_fit_the_agent_are_refused_when_it_learns(tmp_path: Path) -> None:
    learner = agent().learn(100)
    normalised: Any = VecNormalize(make_vec("InvertedPendulum-v5", 1, 1))
    learner.set_env(normalised)
    with pytest.raises(ValueError, match="env: got a VecNormalize, expected raw observations"):
        learner.learn(100)
    learner.save(tmp_path / "agent.zip")
    env = make_vec("InvertedPendulum-v5", 1, 1)
    with pytest.raises(ValueError, match="termination: got learned, but the agent's model has not learned it"):
        LipschitzMBPO.load(tmp_path / "agent.zip", env=env, termination="learned")


def test_a_model_that_was_replaced_is_the_one_that_is_differentiated() -> None:
    learner = agent(value_gradient=2, rollout_interval=20).learn(100)
    learner.transition = copy.deepcopy(learner.transition)
    learner.learn(20, reset_num_timesteps=False)
    assert learner._objective.losses.keywords["model"] is learner.transition  # type: ignore[attr-defined]
    learner.transition = None
    with pytest.raises(ValueError, match="transition: got None with model='probabilistic'"):
        learner.learn(20)


def test_updates_follow_the_rule_of_the_environment_that_is_set() -> None:
    options = SMALL | {"value_gradient": 2, "rollout_interval": 20}
    learner = LipschitzMBPO("MlpPolicy", make_vec("Hopper-v5", 1, 0), **options).learn(100)
    before = learner._objective
    learner.set_env(make_vec("Hopper-v5", 1, 1))
    learner.learn(20, reset_num_timesteps=False)
    assert learner._objective is before  # the same rule: what is compiled stays
    learner.set_env(make_vec("Hopper-v5", 1, 1, healthy_angle_range=(-0.01, 0.01)))
    learner.learn(20, reset_num_timesteps=False)
    assert learner._objective is not before  # a compiled update holds the rule that it was made with


@pytest.mark.parametrize("interval", [15, 20, 50, 60])
def test_so_many_rollouts_begin_per_step_whatever_the_intervals(interval: int, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, begun = agent(rollout_interval=interval, model_interval=20, rollout_max=1, rollout_min=1), list[int]()
    original = learner._imagine

    def counted(*arguments: Any) -> None:
        begun.append(learner.num_timesteps)
        original(*arguments)

    monkeypatch.setattr(type(learner), "_imagine", lambda self, *arguments: counted(*arguments))
    learner.learn(300)
    assert {after - before for before, after in itertools.pairwise(begun)} == {interval}


def test_load_takes_the_arguments_of_sac(tmp_path: Path) -> None:
    agent(model="none", regularizer="none").save(tmp_path / "agent.zip")
    again = LipschitzMBPO.load(tmp_path / "agent.zip", ent_coef="auto", target_update_interval=1)
    assert again.ent_coef == "auto"
    with pytest.raises(ValueError, match=r"temperature: got 0\.2, but the saved weights were made with 1\.0"):
        LipschitzMBPO.load(tmp_path / "agent.zip", ent_coef=0.2)


def test_who_learns_how_episodes_end_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    wrapped = gym.wrappers.NormalizeObservation(gym.make("InvertedPendulum-v5"))
    learner = LipschitzMBPO("MlpPolicy", wrapped, verbose=1, **SMALL).learn(10)
    assert learner.learns_end and "the model learns how episodes end" in capsys.readouterr().out
    assert not agent().learns_end and not agent(model="none", regularizer="none").learns_end


def upright(next_obs: torch.Tensor) -> torch.Tensor:
    return next_obs[:, 1].abs() > 0.2


def drift(obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    return obs + 0.04 * torch.cat([obs[:, 2:], 0 * obs[:, 2:]], 1)


@pytest.mark.parametrize(("name", "function"), [("terminated", upright), ("known_step", drift)])
def test_functions_that_a_file_does_not_hold_are_asked_for(name: str, function: Any, tmp_path: Path) -> None:
    file, env = tmp_path / "agent.zip", gym.wrappers.TransformReward(gym.make("InvertedPendulum-v5"), lambda r: r)
    learner = LipschitzMBPO("MlpPolicy", env, **SMALL, **{name: function}).learn(100)
    assert getattr(learner, name) is function
    learner.save(file)
    again = LipschitzMBPO.load(file, env=env)
    with pytest.raises(ValueError, match=rf"{name}: got no such function.*custom_objects=.'{name}': function"):
        again.learn(100)
    again = LipschitzMBPO.load(file, env=env, custom_objects={name: function}).learn(100)
    assert again.transition is not None
    assert getattr(again, name) is function
    known = again.transition.settings.known_step
    assert (known is None) if name == "terminated" else (known.step is drift)  # type: ignore[union-attr]


def test_functions_of_the_user_get_copies_and_the_environments_units() -> None:
    env = gym.wrappers.RescaleAction(gym.make("InvertedPendulum-v5"), np.float32(-1), np.float32(3))
    seen = list[torch.Tensor]()

    def careless(obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        seen.append(action.detach())
        obs[:, 0] = 7.0
        return obs

    def rule(next_obs: torch.Tensor) -> torch.Tensor:
        next_obs[:, 2] = 9.0
        return next_obs[:, 1].abs() > 0.2

    learner = LipschitzMBPO("MlpPolicy", env, **SMALL, known_step=careless, terminated=rule).learn(150)
    stored = learner._real.all()
    assert not (stored.obs[:, 0] == 7).any() and not (stored.next_obs[:, 2] == 9).any()
    actions = torch.cat(seen)
    assert actions.min() < -0.5 and actions.max() > 2.5
    expected = -1 + 2 * (stored.action + 1)  # of [-1, 1] in [-1, 3]
    assert learner.transition is not None and learner.transition.settings.known_step is not None
    learner.transition.settings.known_step(stored.obs, stored.action)
    torch.testing.assert_close(seen[-1], expected)


@pytest.mark.parametrize("rule", [lambda obs: (obs[:, 1].abs() > 0.2).long(), lambda obs: obs[:, 1:2].abs() > 0.2])
def test_a_rule_that_returns_no_booleans_of_rows_is_refused(rule: Any) -> None:
    with pytest.raises(ValueError, match=r"terminated: got torch.\w+ \[\d+.* from the rule, expected torch.bool \["):
        agent(terminated=rule).learn(100)


def test_a_loaded_model_goes_on_with_the_ends_and_the_step_that_it_has_learned(tmp_path: Path) -> None:
    env = gym.wrappers.TransformReward(gym.make("InvertedPendulum-v5"), lambda r: r)
    learns, plain = (LipschitzMBPO("MlpPolicy", env, **SMALL, termination=how) for how in ("learned", "never"))
    learns.learn(70).save(tmp_path / "learns")
    plain.learn(70).save(tmp_path / "plain")
    for given in ({"termination": "never"}, {"termination": "auto", "custom_objects": {"terminated": upright}}):
        with pytest.raises(ValueError, match="termination: got a rule, but the agent's model has learned how episodes"):
            LipschitzMBPO.load(tmp_path / "learns", env, **given).learn(10, reset_num_timesteps=False)
    with pytest.raises(ValueError, match="known_step: got a function, but the agent was made without one"):
        LipschitzMBPO.load(tmp_path / "plain", env, custom_objects={"known_step": drift}).learn(10)
    with pytest.raises(ValueError, match=r"model_weight_decay: got 0.5, but the saved weights were made with None"):
        LipschitzMBPO.load(tmp_path / "plain", env, model_weight_decay=0.5)


def test_the_range_of_values_goes_along_with_the_weights() -> None:
    fields: dict[str, Any] = {"value_gradient": 2, "rollout_interval": 20}
    first, second = agent(**fields).learn(300), agent(**fields)
    second.set_parameters(first.get_parameters())
    center = second.policy.critic.center.clone()
    assert center != 0
    second.learn(62)
    assert second._n_updates <= 3
    torch.testing.assert_close(second.policy.critic.center, center, rtol=1e-2, atol=1e-2)


def test_numbers_beyond_float32_are_not_finite() -> None:
    class Huge(gym.ObservationWrapper[Any, Any, Any]):
        def __init__(self, env: gym.Env[Any, Any]) -> None:
            super().__init__(env)
            self.observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float64)

        def observation(self, observation: Any) -> Any:
            return observation + (1e39 if self.env.unwrapped.data.time > 0.1 else 0.0)  # type: ignore[attr-defined]

    with pytest.raises(ValueError, match="non-finite observation: got inf in entry 0 of environment 0"):
        LipschitzMBPO("MlpPolicy", Huge(gym.make("InvertedPendulum-v5")), **SMALL).learn(100)


def test_a_replay_buffer_with_nan_is_refused(tmp_path: Path) -> None:
    learner = agent().learn(30)
    learner._real.rows[3, 0] = torch.nan
    learner.save_replay_buffer(tmp_path / "replay")
    with pytest.raises(CheckpointError, match="got 1 rows with nan or infinity, expected finite numbers"):
        agent().load_replay_buffer(tmp_path / "replay")


def test_a_rate_that_warms_up_counts_by_its_highest() -> None:
    learner = agent(learning_rate=lambda left: 1e-3 * min(1.0, 10 * (1 - left)) * left)
    for left, share in ((1.0, 0.0), (0.9, 1.0), (0.45, 0.5), (0.0, 0.0)):
        learner._current_progress_remaining = left
        assert learner._rate_share == pytest.approx(share, abs=1e-6)


def test_the_learning_rate_is_logged() -> None:
    learner = agent(lr_schedule="linear", learning_rate=1e-3, train_freq=50)
    learner.learn(100, log_interval=10**6)
    assert learner.logger.name_to_value["train/learning_rate"] == 0  # at the last step
    learner = agent(learning_rate=1e-3)
    learner.learn(100, log_interval=10**6)
    assert learner.logger.name_to_value["train/learning_rate"] == 1e-3


def test_a_fits_interval_without_a_model_or_statistics_means_nothing() -> None:
    with pytest.raises(ValueError, match="model_interval: got 3, which changes nothing without a model, or normalize_"):
        agent(model="none", regularizer="none", model_interval=3)
    agent(model="none", regularizer="none", model_interval=3, normalize_observation=True)


@pytest.mark.parametrize("seed", range(3))
def test_snapshots_of_a_heteroscedastic_model_stay_finite(seed: int) -> None:
    torch.manual_seed(seed)
    model, generator = GaussianTransition(4, 1, hidden=(64, 64), snapshots=3), torch.Generator().manual_seed(seed)
    obs, action = torch.randn(500, 4, generator=generator), torch.rand(500, 1, generator=generator)
    next_obs = obs + 0.02 * obs.roll(1, 1)  # a step without noise: the precision is large
    model.fit(obs, action, torch.ones(500), next_obs, generator=generator, max_epochs=20)
    assert model.posterior is not None
    largest = max(each.abs().max().item() for each in model.posterior.parameters())
    assert largest < 1.5 * max(each.abs().max().item() for each in model.net.parameters())
