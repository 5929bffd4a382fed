"""Weights are weights: frozen, replaced, pruned, shared, of another optimizer; they train as any parameter would."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from driftrl import LipschitzMBPO, PolicyFlow
from driftrl.envs import make_vec

FLOW: dict[str, Any] = {
    "n_steps": 32, "batch_size": 16, "n_epochs": 2, "actor_hidden": (8, 8), "critic_hidden": (8, 8), "compile": "off",
}  # fmt: skip
MODEL: dict[str, Any] = {
    "learning_starts": 20, "gradient_steps": 2, "batch_size": 16, "actor_hidden": (8, 8), "critic_hidden": (8, 8),
    "model": "none", "compile": "off", "diagnostics_interval": 0,
}  # fmt: skip
STEPS: dict[type[Any], int] = {PolicyFlow: 64, LipschitzMBPO: 40}
both = pytest.mark.parametrize("kind", [PolicyFlow, LipschitzMBPO])


def make(kind: type[Any], **fields: Any) -> Any:
    env = make_vec("InvertedPendulum-v5", 1, 0)
    return kind("MlpPolicy", env, seed=0, device="cpu", **((FLOW if kind is PolicyFlow else MODEL) | fields))


def learn(agent: Any, callback: BaseCallback | None = None) -> None:
    """One or two iterations more, with the same random actions for every agent."""
    torch.manual_seed(agent.num_timesteps)
    agent.learn(STEPS[type(agent)], callback=callback, reset_num_timesteps=agent.num_timesteps == 0)


def values(agent: Any) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in agent.policy.named_parameters()}


def moved(agent: Any, before: dict[str, Tensor]) -> set[str]:
    return {name for name, each in agent.policy.named_parameters() if not torch.equal(each, before[name])}


def critic_layer(agent: Any) -> nn.Module:
    """The second layer of the critic."""
    layer: nn.Module = agent.policy.critic[2] if isinstance(agent, PolicyFlow) else agent.policy.critic.layers[2]
    return layer


def names(agent: Any) -> set[str]:
    """What learns: all but the average."""
    return {name for name, each in agent.policy.named_parameters() if each.requires_grad}


@both
def test_everything_moves_and_the_optimizer_holds_the_parameters_themselves(kind: type[Any]) -> None:
    agent = make(kind)
    before = values(agent)
    learn(agent)
    assert moved(agent, before) >= names(agent)
    held = {id(each) for group in agent.policy.optimizer.param_groups for each in group["params"]}
    assert all(id(each) in held for each in agent.policy.parameters() if each.requires_grad)
    state = agent.policy.optimizer.state
    assert all(state[each]["exp_avg"].shape == each.shape for each in agent.policy.parameters() if each.requires_grad)


@both
@pytest.mark.parametrize("trained_before", [False, True])
def test_frozen_weights_stay_bit_identical(kind: type[Any], trained_before: bool) -> None:
    decay = {"weight_decay": 0.1} if kind is PolicyFlow else {}
    agent = make(kind, **decay, **({"ema_decay": 0.9} if kind is PolicyFlow else {}))
    if trained_before:
        learn(agent)
    critic_layer(agent).requires_grad_(False)
    frozen = {name for name, each in agent.policy.critic.named_parameters(prefix="critic") if not each.requires_grad}
    before = values(agent)
    learn(agent)
    assert len(frozen) == 2
    assert not moved(agent, before) & frozen
    assert moved(agent, before) >= names(agent)
    critic_layer(agent).requires_grad_(True)  # and thawed again
    learn(agent)
    assert moved(agent, before) >= frozen


@pytest.mark.parametrize(
    ("kind", "how"),
    [(PolicyFlow, "off"), (LipschitzMBPO, "off"), pytest.param(PolicyFlow, "on", marks=pytest.mark.slow)],
)
def test_weights_frozen_by_a_callback_in_the_middle_stay_as_they_are(kind: type[Any], how: str) -> None:
    class Freeze(BaseCallback):
        before: dict[str, Tensor] | None = None

        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            if self.before is None and self.num_timesteps >= STEPS[kind] // 2:
                critic_layer(self.model).requires_grad_(False)
                self.before = values(self.model)

    agent, freeze = make(kind, compile=how), Freeze()
    learn(agent, freeze)
    assert freeze.before is not None
    changed = moved(agent, freeze.before)
    assert changed >= names(agent)
    assert not any(name for name in changed if name.startswith(("critic.2.", "critic.layers.2.")))


def by_data(layer: Any) -> None:
    layer.weight.data = torch.full_like(layer.weight, 0.1)


def by_parameter(layer: Any) -> None:
    layer.weight = nn.Parameter(torch.full_like(layer.weight, 0.1))


def by_assignment(layer: Any) -> None:
    state = {name: torch.full_like(each, 0.1) for name, each in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


@both
@pytest.mark.parametrize("replace", [by_data, by_parameter, by_assignment])
@pytest.mark.parametrize("trained_before", [False, True])
def test_replaced_weights_train(kind: type[Any], replace: Callable[[Any], None], trained_before: bool) -> None:
    agent = make(kind)
    if trained_before:
        learn(agent)
    replace(critic_layer(agent))
    before = values(agent)
    learn(agent)
    assert moved(agent, before) >= names(agent)


@both
def test_weights_set_as_one_vector_train_on(kind: type[Any]) -> None:
    agent = make(kind)
    learn(agent)
    parameters = [each for each in agent.policy.parameters() if each.requires_grad]
    vector = nn.utils.parameters_to_vector(parameters).detach()
    nn.utils.vector_to_parameters(vector + 0.01, parameters)
    assert torch.equal(nn.utils.parameters_to_vector(parameters), vector + 0.01)
    before = values(agent)
    learn(agent)
    assert moved(agent, before) >= names(agent)


def test_pruned_weights_stay_zero_and_the_others_train() -> None:
    agent = make(PolicyFlow)
    layers = [agent.policy.critic[2], agent.policy.actor.field.layers[0]]
    for layer in layers:
        prune.l1_unstructured(layer, "weight", 0.5)
    before = values(agent)
    learn(agent)
    assert moved(agent, before) >= names(agent)
    for layer in layers:
        weight = layer.weight_orig * layer.weight_mask
        assert (weight == 0).sum() == weight.numel() // 2


@both
def test_parametrized_weights_train(kind: type[Any]) -> None:
    if kind is LipschitzMBPO:
        agent = make(kind)
        layer: Any = agent.policy.actor.body[2]
    else:
        agent = make(kind)
        layer = agent.policy.actor.field.layers[0]
    parametrizations.spectral_norm(layer)
    before = values(agent)
    learn(agent)
    assert moved(agent, before) >= names(agent)
    assert parametrize.is_parametrized(layer)
    assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, abs=0.15)


def test_compilation_is_left_out_where_the_networks_carry_hooks() -> None:
    agent = make(PolicyFlow, compile="on")
    prune.l1_unstructured(agent.policy.critic[2], "weight", 0.5)
    with pytest.warns(RuntimeWarning, match="compile: got on, but the networks carry hooks or parametrizations"):
        learn(agent)


def test_shared_weights_learn_from_both() -> None:
    agent = make(PolicyFlow, base="gaussian")
    agent.policy.critic[0].weight = agent.policy.actor.base_mean[0].weight
    before = values(agent)
    learn(agent)
    assert agent.policy.critic[0].weight is agent.policy.actor.base_mean[0].weight
    assert moved(agent, before) >= names(agent)


@both
def test_a_gradient_that_somebody_left_at_a_frozen_weight_is_not_followed(kind: type[Any]) -> None:
    agent = make(kind)
    agent.policy.optimizer = torch.optim.SGD(agent.policy.parameters(), 0.1)
    frozen = next(iter(agent.policy.actor.parameters()))
    frozen.grad = torch.ones_like(frozen)
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    learn(agent)
    assert torch.equal(frozen, before)


@both
def test_another_optimizer_is_used(kind: type[Any]) -> None:
    agent = make(kind)
    learn(agent)
    agent.policy.optimizer = torch.optim.SGD(agent.policy.parameters(), lr=1e-3, momentum=0.9)
    before = values(agent)
    learn(agent)
    assert moved(agent, before) >= names(agent)
    assert any("momentum_buffer" in state for state in agent.policy.optimizer.state.values())


@both
def test_an_optimizer_of_a_part_trains_that_part(kind: type[Any]) -> None:
    agent = make(kind)
    agent.policy.optimizer = torch.optim.AdamW(agent.policy.critic.parameters(), lr=1e-3, weight_decay=0.1)
    before = values(agent)
    learn(agent)
    changed = moved(agent, before)
    assert {name for name in changed if not name.startswith("target_")} == {
        name for name in names(agent) if name.startswith("critic.")
    }


class OwnAdam(torch.optim.Adam):
    """Takes the way of single parameters."""


class OwnAdamW(torch.optim.AdamW):
    """Takes the way of single parameters."""


def pair(kind: type[Any], **fields: Any) -> tuple[Any, Any]:
    """The same agent twice: its weights as one vector, and one by one."""
    options = {"eps": 1e-5, "weight_decay": 0.01} if kind is PolicyFlow else {}
    classes = (torch.optim.AdamW, OwnAdamW) if kind is PolicyFlow else (torch.optim.Adam, OwnAdam)
    agents = [
        make(kind, policy_kwargs={"optimizer_class": each, "optimizer_kwargs": options}, **fields) for each in classes
    ]
    return agents[0], agents[1]


def assert_equal(one: Any, other: Any) -> None:
    for name, each in one.policy.state_dict().items():
        torch.testing.assert_close(each, other.policy.state_dict()[name], rtol=1e-4, atol=1e-6, msg=name)


@both
@pytest.mark.filterwarnings("ignore:this agent cannot be saved as it is:UserWarning")  # with an own optimizer
def test_one_vector_and_single_parameters_are_the_same_up_to_rounding(kind: type[Any]) -> None:
    joined, single = pair(kind, **({"ema_decay": 0.9} if kind is PolicyFlow else {}))
    for each in (joined, single):
        learn(each)
    assert joined.policy.weights.vector is not None and single.policy.weights.vector is None
    assert_equal(joined, single)
    for each in (joined, single):  # moments of a part, too: they are views
        optimizer, inputs = each.policy.optimizer, (torch.ones(2, 4), torch.ones(2, 1))
        optimizer.zero_grad()
        each.policy.critic(*inputs[: 1 if kind is PolicyFlow else 2]).sum().backward()
        optimizer.step()  # a step of the user's own
        learn(each)
    assert_equal(joined, single)


@both
def test_a_copy_and_a_loaded_agent_train_as_the_first(kind: type[Any], tmp_path: Any) -> None:
    agent = make(kind)
    learn(agent)
    agent.save(tmp_path / "agent")
    loaded = kind.load(tmp_path / "agent", env=agent.get_env(), device="cpu")
    copied = copy.deepcopy(agent.policy)
    steps = [each["step"].item() for each in agent.policy.optimizer.state.values()]
    assert [each["step"].item() for each in loaded.policy.optimizer.state.values()] == steps
    assert [each["step"].item() for each in copied.optimizer.state.values()] == steps
    weights = copied.weights
    before = {name: each.detach().clone() for name, each in copied.named_parameters()}
    weights.step(torch.ones(sum(each.numel() for each in weights.parameters)))
    assert all(
        not torch.equal(before[name], each) for name, each in zip(weights.names, weights.parameters, strict=True)
    )
    assert all(torch.equal(before[name], each) for name, each in agent.policy.named_parameters())


@both
def test_what_would_not_learn_is_refused(kind: type[Any]) -> None:
    agent = make(kind)
    agent.policy.extra = nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"weights: extra.weight, extra.bias would not learn, policy.optimizer does not"
    ):
        learn(agent)
    agent.policy.optimizer.add_param_group({"params": agent.policy.extra.parameters()})
    learn(agent)
    agent.policy.requires_grad_(False)
    with pytest.raises(ValueError, match="weights: got none that learns"):
        learn(agent)


def test_an_average_that_cannot_follow_is_refused() -> None:
    agent = make(PolicyFlow, ema_decay=0.9)
    prune.l1_unstructured(agent.policy.actor.field.layers[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"averaged_actor has other parameters than actor.*field.layers.0.weight"):
        learn(agent)


def test_another_average_that_cannot_follow_is_refused() -> None:
    agent = make(LipschitzMBPO, ema_decay=0.9)
    layer = next(each for each in agent.policy.actor.modules() if isinstance(each, nn.Linear))
    prune.l1_unstructured(layer, "weight", 0.5)
    with pytest.raises(ValueError, match="averaged_actor has other parameters than actor, which it follows"):
        learn(agent)


def test_freezing_is_what_it_is_in_stable_baselines3() -> None:
    env = make_vec("InvertedPendulum-v5", 1, 0)
    peers: list[tuple[Any, Any]] = [
        (PPO("MlpPolicy", env, n_steps=32, batch_size=16, n_epochs=2, seed=0, device="cpu"), "mlp_extractor"),
        (SAC("MlpPolicy", env, learning_starts=20, seed=0, device="cpu"), "actor"),
    ]
    for peer, part in peers:
        getattr(peer.policy, part).requires_grad_(False)
        before = values(peer)
        peer.learn(64)
        changed = moved(peer, before)
        assert changed and not any(name.startswith(part) for name in changed)
