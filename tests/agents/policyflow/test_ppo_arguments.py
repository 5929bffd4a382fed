"""What a pipeline gives to PPO is understood by PolicyFlow, or refused by the name of what it has instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.torch_layers import FlattenExtractor, NatureCNN

from driftrl import PolicyFlow
from driftrl.envs import make_vec


def make(**arguments: Any) -> PolicyFlow:
    given: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "n_epochs": 2, "seed": 0, "device": "cpu"}
    return PolicyFlow("MlpPolicy", make_vec("InvertedPendulum-v5", 2, 0), **given | arguments)


def test_what_ppo_does_by_default_is_accepted() -> None:
    policy_kwargs = {
        "ortho_init": True, "use_sde": False, "squash_output": False, "use_expln": False, "full_std": True,
        "normalize_images": True, "features_extractor_class": FlattenExtractor, "features_extractor_kwargs": None,
        "share_features_extractor": True,
    }  # fmt: skip
    agent = make(use_sde=False, sde_sample_freq=-1, rollout_buffer_class=None, policy_kwargs=policy_kwargs)
    weight = agent.policy.state_dict()["critic.2.weight"]
    assert torch.allclose(weight @ weight.T, 2 * torch.eye(len(weight)), atol=1e-5)  # orthogonal, gain sqrt(2)
    agent.learn(32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy_kwargs": {"ortho_init": False}}, "ortho_init: got False, expected True; .*critic_gain"),
        ({"policy_kwargs": {"squash_output": True}}, "squash_output: got True, expected False; .*clipped"),
        ({"rollout_buffer_class": RolloutBuffer}, "rollout_buffer_class: got .*expected None; .*ratio"),
        ({"sde_sample_freq": 4}, "sde_sample_freq: got 4, expected -1; .*base_std"),
        ({"policy_kwargs": {"net_arch": {"pi": [8], "qf": [8]}}}, "net_arch: got pi, qf, expected .* pi and vf"),
        ({"policy_kwargs": {"features_extractor_class": NatureCNN}}, "features_extractor_class: got .*not available"),
        ({"policy_kwargs": {"full_std": False}}, "full_std: got False, expected True"),
        (
            {"policy_kwargs": {"log_std_init": -20}},
            r"action_std: got 2\.06\d*e-09, expected a number in .0.00674",
        ),
        ({"action_std": 10.0}, "action_std: got 10.0, expected a number in"),
        ({"base_std": 1e-6}, "base_std: got 1e-06, expected a number in"),
    ],
)
def test_what_is_not_available_is_refused_by_our_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_a_batch_larger_than_the_rollout_is_the_rollout() -> None:
    with pytest.warns(UserWarning, match="batch_size: got 100, more than the rollout's .* 16 x 2 = 32 samples"):
        large = make(batch_size=100)
    whole = make(batch_size=32)
    for agent in (large, whole):
        agent.learn(64)
    assert all(map(torch.equal, large.policy.parameters(), whole.policy.parameters()))


def test_the_old_form_of_net_arch_is_taken_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="net_arch: got .* a list of one dictionary"):
        agent = make(policy_kwargs={"net_arch": [{"vf": [8], "pi": [4]}]})
    assert (agent.config.actor_hidden, agent.config.critic_hidden) == ((4,), (8,))
    assert agent.policy.net_arch == {"vf": [8], "pi": [4]}


@pytest.mark.parametrize("base", ["learned", "gaussian"])
def test_networks_without_hidden_layers_are_linear_and_learn(base: str, tmp_path: Any) -> None:
    agent = make(policy_kwargs={"net_arch": []}, base=base, jacobian_coef=0.1, solver_error_coef=0.1)
    agent.learn(64)
    actor = agent.policy.actor
    obs = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.3, -0.1, 0.2, 1.0], [0.6, -0.2, 0.4, 2.0]])
    with torch.no_grad():
        modes = actor.mode(obs)
    assert not torch.equal(modes[0], modes[1])
    assert torch.allclose(modes[2] - modes[1], modes[1] - modes[0], atol=1e-6)
    agent.save(tmp_path / "agent")
    assert PolicyFlow.load(tmp_path / "agent", device="cpu").policy.net_arch == {"pi": [], "vf": []}
