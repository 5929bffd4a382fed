import io
import os
import pathlib
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import save_to_pkl

from driftrl import LipschitzMBPO, PolicyFlow
from driftrl.agents.lipschitz_mbpo.user_functions import UsersRule
from driftrl.agents.policyflow.policy import FlowPolicy
from driftrl.agents.storage.saving import Checkpointed
from driftrl.agents.storage.values import CheckpointError
from driftrl.envs import make_vec

FLOW: dict[str, Any] = {
    "n_steps": 16, "batch_size": 16, "n_epochs": 1, "actor_hidden": (8,), "critic_hidden": (8,),
    "device": "cpu", "seed": 0,
}  # fmt: skip
MODEL: dict[str, Any] = {
    "learning_starts": 20, "model_rollouts": 10, "batch_size": 16, "gradient_steps": 1, "actor_hidden": (8,),
    "critic_hidden": (8,), "model_hidden": (8,), "model_epochs": 2, "device": "cpu", "seed": 0,
}  # fmt: skip


def pendulum() -> Any:
    return make_vec("InvertedPendulum-v5", 1, 0)


def flow(**fields: Any) -> PolicyFlow:
    return PolicyFlow("MlpPolicy", pendulum(), **FLOW | fields)


@pytest.fixture(scope="module", params=["flow", "flow of a Dict", "model"])
def agent(request: pytest.FixtureRequest) -> Checkpointed:
    """A trained agent with an optimizer that has moved."""
    if request.param == "model":
        return LipschitzMBPO("MlpPolicy", pendulum(), **MODEL).learn(30)
    if request.param == "flow":
        return flow(ema_decay=0.9).learn(32)
    return PolicyFlow(
        "MultiInputPolicy", gym.wrappers.TransformObservation(gym.make("Pendulum-v1"), as_dict, DICT), **FLOW
    )


DICT = spaces.Dict([("z", spaces.Box(-8, 8, (1,))), ("a", spaces.Box(-1, 1, (2,)))])


def as_dict(obs: np.ndarray) -> dict[str, np.ndarray]:
    return {"z": obs[2:], "a": obs[:2]}


def actions(agent: BaseAlgorithm) -> np.ndarray:
    """Deterministic and sampled ones at random observations."""
    space, rng = agent.observation_space, np.random.default_rng(0)
    parts = {name: rng.normal(size=(7, *(part.shape or ()))).astype(np.float32) for name, part in (
        space.spaces.items() if isinstance(space, spaces.Dict) else [("", space)]
    )}  # fmt: skip
    obs = parts if isinstance(space, spaces.Dict) else parts[""]
    torch.manual_seed(0)
    return np.stack([agent.predict(obs, deterministic=each)[0] for each in (True, False)])


def flat(tree: Any) -> list[Any]:
    """The leaves of dictionaries, lists and tuples."""
    if isinstance(tree, dict):
        return flat(list(tree.items()))
    return [leaf for each in tree for leaf in flat(each)] if isinstance(tree, list | tuple) else [tree]


def same(first: Any, second: Any) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(flat(first), flat(second), strict=True)
    )


@pytest.mark.parametrize("kind", ["path", "no suffix", "text", "file", "memory"])
def test_a_saved_agent_is_the_same(agent: Checkpointed, kind: str, tmp_path: Path) -> None:
    path: Any = {"path": tmp_path / "new" / "a.zip", "no suffix": tmp_path / "a", "text": str(tmp_path / "a.zip")}.get(
        kind
    )
    if kind == "path":
        with pytest.warns(UserWarning, match="does not exist. Will create it"):  # as in Stable-Baselines3
            agent.save(path)
    elif path:
        agent.save(path)
    else:
        path = io.BytesIO() if kind == "memory" else (tmp_path / "a").open("w+b")
        agent.save(path)
        path.seek(0)
    loaded = type(agent).load(path, device="cpu")
    assert np.array_equal(actions(agent), actions(loaded))
    assert same(agent.get_parameters(), loaded.get_parameters())
    names = vars(agent).keys() - set(agent._excluded_save_params()) - {"transition"}
    assert len(names) > 30
    for name in names:
        before, after = vars(agent)[name], vars(loaded)[name]
        assert type(before) is type(after), name
        if not isinstance(before, np.ndarray | dict | spaces.Space):
            assert before == after, name
    if kind == "file":
        path.close()


@pytest.mark.gpu
def test_agents_move_between_cpu_and_gpu(tmp_path: Path) -> None:
    flow().learn(32).save(tmp_path / "cpu")
    there = PolicyFlow.load(tmp_path / "cpu", env=pendulum(), device="cuda")
    there.save(tmp_path / "gpu")
    first, back = (PolicyFlow.load(tmp_path / name, device="cpu") for name in ("cpu", "gpu"))
    assert there.device.type == "cuda"
    assert same(first.get_parameters(), back.get_parameters())
    obs = np.random.default_rng(0).normal(size=(7, 4))
    expected = first.predict(obs, deterministic=True)[0]
    assert there.predict(obs, deterministic=True)[0] == pytest.approx(expected, abs=1e-5)
    there.learn(32, reset_num_timesteps=False).save(tmp_path / "gpu")
    assert PolicyFlow.load(tmp_path / "gpu", device="cpu").num_timesteps == 64


def test_parameters_are_set_from_a_file(tmp_path: Path) -> None:
    first, second = flow().learn(32), flow(seed=1)
    first.save(tmp_path / "a")
    second.set_parameters(tmp_path / "a")
    assert same(first.get_parameters(), second.get_parameters())
    second.set_parameters({"policy": first.get_parameters()["policy"]}, exact_match=False)
    with pytest.raises(ValueError, match="Names of parameters do not match"):
        second.set_parameters({"policy": first.get_parameters()["policy"]})


def test_what_was_left_out_is_put_back_as_the_error_says(tmp_path: Path) -> None:
    agent: Any = flow()
    agent.rule = lambda obs: -obs
    with pytest.raises(CheckpointError, match=r"exclude=\['rule'\]\) leaves it out, load\(.*'rule': ...\}\) puts it"):
        agent.save(tmp_path / "a")
    agent.save(tmp_path / "a", exclude=["rule"])
    loaded: Any = PolicyFlow.load(tmp_path / "a", custom_objects={"rule": abs, "other": abs}, device="cpu")
    assert loaded.rule is abs and not hasattr(loaded, "other")
    assert not hasattr(PolicyFlow.load(tmp_path / "a", device="cpu"), "rule")


def test_exclude_include_and_custom_objects(tmp_path: Path) -> None:
    learner = flow()
    learner.save(tmp_path / "a", exclude=["gamma", "ep_info_buffer"], include=["_discounted_return"])
    loaded = PolicyFlow.load(tmp_path / "a", custom_objects={"n_epochs": 1, "verbose": 1}, device="cpu")
    assert loaded.verbose == 1
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        text = archive.read("agent.json").decode()
    assert '"ep_info_buffer":' not in text and '"_discounted_return"' in text


def halved(progress: float) -> float:
    return 1e-3 * (0.5 + 0.5 * progress)


class OtherPolicy(FlowPolicy):
    pass


def test_what_is_no_data_is_left_out_and_given_again(tmp_path: Path) -> None:
    learner = PolicyFlow(OtherPolicy, pendulum(), halved, **FLOW)
    learner.save(tmp_path / "a", exclude=["learning_rate", "policy_class"])
    before = (tmp_path / "a.zip").read_bytes()
    with pytest.raises(CheckpointError, match=r"^policy_class: got .*\['policy_class'\].*{'policy_class': ...}"):
        learner.save(tmp_path / "a")
    assert (tmp_path / "a.zip").read_bytes() == before  # what cannot be saved leaves the file as it is
    with pytest.raises(CheckpointError, match=r"saved without policy_class; give load custom_objects={'policy_class'"):
        PolicyFlow.load(tmp_path / "a")
    given = {"learning_rate": halved, "policy_class": OtherPolicy}
    loaded = PolicyFlow.load(tmp_path / "a", env=pendulum(), custom_objects=given, device="cpu")
    assert isinstance(loaded.policy, OtherPolicy) and loaded.learning_rate is halved
    assert np.array_equal(actions(learner), actions(loaded))
    with pytest.warns(UserWarning, match="this agent cannot be saved as it is: policy_class: got <class"):
        loaded.learn(32)
    assert loaded.policy.optimizer.param_groups[0]["lr"] == halved(0.0)


def test_an_agent_that_cannot_be_saved_says_so_before_it_learns() -> None:
    agent = flow()
    agent.notes = lambda: None  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="this agent cannot be saved as it is: notes: got <function"):
        agent.learn(agent.n_steps)


def test_a_rule_of_termination_is_left_out_and_given_again(tmp_path: Path) -> None:
    def rule(next_obs: torch.Tensor) -> torch.Tensor:
        return next_obs[:, 0] > 5

    learner = LipschitzMBPO("MlpPolicy", pendulum(), terminated=rule, **MODEL)
    learner.save(tmp_path / "a")
    loaded = LipschitzMBPO.load(tmp_path / "a", custom_objects={"terminated": rule}, device="cpu")
    assert isinstance(loaded._terminated, UsersRule) and loaded._terminated.rule is rule


def test_load_with_an_environment(tmp_path: Path) -> None:
    flow().learn(32).save(tmp_path / "a")
    loaded = PolicyFlow.load(tmp_path / "a", env=make_vec("InvertedPendulum-v5", 2, 0), device="cpu", gamma=0.5)
    assert (loaded.n_envs, loaded._last_obs, loaded.gamma, loaded.config.gamma) == (2, None, 0.5, 0.5)
    assert PolicyFlow.load(tmp_path / "a", env=pendulum(), device="cpu", force_reset=False)._last_obs is not None
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        PolicyFlow.load(tmp_path / "a", env=make_vec("Hopper-v5", 1, 0))
    with pytest.raises(ValueError, match=r"policy_kwargs: got {'base': 'standard'}, expected the saved ones, {}"):
        PolicyFlow.load(tmp_path / "a", policy_kwargs={"base": "standard"})
    with pytest.raises(CheckpointError, match="learning_rate: got -1, expected a number of at least 0"):
        PolicyFlow.load(tmp_path / "a", learning_rate=-1)


def test_system_info_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow().save(tmp_path / "a")
    PolicyFlow.load(tmp_path / "a", print_system_info=True, device="cpu")
    assert "PyTorch" in capsys.readouterr().out


def test_another_agent_is_refused(tmp_path: Path) -> None:
    flow().save(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"no LipschitzMBPO can be made of it: .* a PolicyFlowConfig"):
        LipschitzMBPO.load(tmp_path / "a")


def test_policy_kwargs_of_torch_are_saved(tmp_path: Path) -> None:
    kwargs = {"activation_fn": torch.nn.Tanh, "optimizer_class": torch.optim.SGD, "optimizer_kwargs": {"momentum": 0.5}}
    learner = flow(policy_kwargs=kwargs).learn(32)
    learner.save(tmp_path / "a")
    loaded = PolicyFlow.load(tmp_path / "a", device="cpu")
    assert loaded.policy_kwargs == kwargs
    assert np.array_equal(actions(learner), actions(loaded))


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pathlib.Path.touch, (pathlib.Path("code_was_run"),))


def test_a_hostile_file_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    learner = flow()
    learner.tensorboard_log = Hostile()  # type: ignore[assignment]
    BaseAlgorithm.save(learner, tmp_path / "evil")  # in Stable-Baselines3's format
    save_to_pkl(tmp_path / "evil.pkl", Hostile())
    for attempt in (
        lambda: PolicyFlow.load(tmp_path / "evil"),
        lambda: learner.set_parameters(tmp_path / "evil"),
        lambda: LipschitzMBPO("MlpPolicy", pendulum(), **MODEL).load_replay_buffer(tmp_path / "evil.pkl"),
    ):
        with pytest.raises(CheckpointError, match=r"executes code that is in it. If you trust .* allow_pickle=True"):
            attempt()
    assert sorted(os.listdir(tmp_path)) == ["evil.pkl", "evil.zip"]
    PolicyFlow.load(tmp_path / "evil", allow_pickle=True, device="cpu")
    assert (tmp_path / "code_was_run").exists()  # the attack is a real one


def test_files_of_the_other_format_are_read_if_allowed(agent: Checkpointed, tmp_path: Path) -> None:
    BaseAlgorithm.save(agent, tmp_path / "a")
    loaded = type(agent).load(tmp_path / "a", allow_pickle=True, device="cpu")
    assert np.array_equal(actions(agent), actions(loaded))
    loaded.set_parameters(tmp_path / "a", allow_pickle=True)
    loaded.save(tmp_path / "b")
    assert np.array_equal(actions(agent), actions(type(agent).load(tmp_path / "b", allow_pickle=True, device="cpu")))


def test_replay_buffers_are_saved(tmp_path: Path) -> None:
    learner = LipschitzMBPO("MlpPolicy", pendulum(), **MODEL).learn(30)
    learner.save_replay_buffer(tmp_path / "replay")
    learner._real.rows = learner._real.rows[:30]  # as DriftRL used to pickle them
    save_to_pkl(tmp_path / "replay.pkl", learner.replay_buffer)
    other = LipschitzMBPO("MlpPolicy", pendulum(), **MODEL)
    for path in (tmp_path / "replay", tmp_path / "replay.pkl"):
        other.replay_buffer.reset()  # type: ignore[union-attr]
        other.load_replay_buffer(path, allow_pickle=path.suffix == ".pkl")
        assert same(learner._real.all(), other._real.all())
        assert (other._real.position, other.replay_buffer.pos) == (30, 30)  # type: ignore[union-attr]
        assert len(other._real.rows) == other._real.capacity == 1_000_000
    hopper = LipschitzMBPO("MlpPolicy", make_vec("Hopper-v5", 1, 0), **MODEL)
    with pytest.raises(CheckpointError, match=r"no replay buffer of this agent: .*\[30, 11\], expected .*\[.., 27\]"):
        hopper.load_replay_buffer(tmp_path / "replay")
    with pytest.raises(CheckpointError, match=r"expected replay.json in it"):
        learner.save(tmp_path / "a")
        other.load_replay_buffer(tmp_path / "a")


def test_networks_larger_than_the_file_are_refused(tmp_path: Path) -> None:
    flow().save(tmp_path / "a")
    file = io.BytesIO()
    with zipfile.ZipFile(tmp_path / "a.zip") as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            wide = b'"actor_hidden": {"$tuple": [30000, 30000]}'
            new.writestr(name, old.read(name).replace(b'"actor_hidden": {"$tuple": [8]}', wide))
    with pytest.raises(CheckpointError, match=r"got networks of more than the file's \d+ bytes"):
        PolicyFlow.load(file)


@pytest.mark.parametrize("name", ["policy_class", "policy_kwargs", "observation_space"])
def test_attributes_of_another_type_are_refused(name: str, tmp_path: Path) -> None:
    learner = flow()
    vars(learner)[name] = torch.zeros(3)
    learner.save(tmp_path / "a")
    with pytest.raises(CheckpointError, match=f"got a Tensor as {name}"):
        PolicyFlow.load(tmp_path / "a", env=pendulum())


def test_attributes_that_are_methods_are_refused(tmp_path: Path) -> None:
    learner = flow()
    vars(learner)["predict"] = 1
    learner.save(tmp_path / "a")
    with pytest.raises(CheckpointError, match="got an attribute predict, which is a method"):
        PolicyFlow.load(tmp_path / "a")


def test_agents_of_stable_baselines3_are_no_agents_of_ours(tmp_path: Path) -> None:
    PPO("MlpPolicy", "Pendulum-v1", n_steps=16, batch_size=16, device="cpu").save(tmp_path / "ppo")
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        PolicyFlow.load(tmp_path / "ppo")
