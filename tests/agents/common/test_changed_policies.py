"""What a user may do to a policy between two calls of `learn` and to its optimizer: it counts, or it is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor, nn
from torch.nn.utils import prune

from driftrl import LipschitzMBPO, PolicyFlow
from driftrl.agents.common.snapshot import Snapshot

from .test_weights import STEPS, both, critic_layer, learn, make, moved, values


def steps(agent: Any) -> set[float]:
    return {float(state["step"]) for state in agent.policy.optimizer.state.values()}


@both
def test_another_policy_acts_and_learns(kind: type[Any]) -> None:
    agents = [make(kind), make(kind)]
    for agent in agents:
        learn(agent)
    agents[1].policy = copy.deepcopy(agents[1].policy)
    for agent in agents:
        learn(agent)
    for one, other in zip(values(agents[0]).values(), values(agents[1]).values(), strict=True):
        assert torch.equal(one, other)


def test_parts_that_learn_in_turn_with_rollback() -> None:
    agents = [make(PolicyFlow, nonfinite=choice) for choice in ("raise", "rollback")]
    for agent in agents:
        actor, critic = agent.policy.actor, agent.policy.critic
        actor.requires_grad_(False)
        learn(agent)
        critic.requires_grad_(False)
        actor.requires_grad_(True)
        before = values(agent)
        learn(agent)
        assert {name.split(".")[0] for name in moved(agent, before)} == {"actor"}
    for one, other in zip(values(agents[0]).values(), values(agents[1]).values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("kind", "part", "fields"),
    [(PolicyFlow, "actor", {"ema_decay": 0.9}), (LipschitzMBPO, "critic", {})],
)
def test_nothing_that_an_average_follows_learns(kind: type[Any], part: str, fields: dict[str, Any]) -> None:
    agent = make(kind, **fields)
    getattr(agent.policy, part).requires_grad_(False)
    before = values(agent)
    learn(agent)
    changed = moved(agent, before)
    assert changed and not any(name.startswith(part) for name in changed)


@both
@pytest.mark.parametrize("place", [0, 3])
def test_moments_that_were_reset_begin_anew(kind: type[Any], place: int) -> None:
    agent = make(kind)
    learn(agent)
    (before,) = steps(agent)
    weight = agent.policy.weights.parameters[place]
    agent.policy.optimizer.state.pop(weight)
    learn(agent)
    more = float(agent.policy.optimizer.state[weight]["step"])
    assert 0 < more and steps(agent) == {before + more, more}


@both
def test_moments_that_were_set_are_used(kind: type[Any]) -> None:
    agents = [make(kind), make(kind)]
    for agent in agents:
        learn(agent)
    weight = agents[1].policy.weights.parameters[2]
    agents[1].policy.optimizer.state[weight]["exp_avg"] = torch.full_like(weight, 10.0)
    for agent in agents:
        learn(agent)
    difference = agents[0].policy.weights.parameters[2] - agents[1].policy.weights.parameters[2]
    assert difference.abs().min() > 1e-4


@both
def test_a_replaced_weight_that_the_user_added_is_stepped_once(kind: type[Any]) -> None:
    agent = make(kind)
    layer: Any = critic_layer(agent)
    new = nn.Parameter(torch.zeros_like(layer.weight))
    layer.weight = new
    agent.policy.optimizer.add_param_group({"params": [new], "lr": 1e-3})
    learn(agent)
    held = [id(each) for group in agent.policy.optimizer.param_groups for each in group["params"]]
    assert held.count(id(new)) == 1 and len(held) == len(set(held))


@both
def test_weights_tied_by_their_data_and_shared_ones_stay_so(kind: type[Any]) -> None:
    agent = make(kind)
    critic = agent.policy.critic
    layers = critic if kind is PolicyFlow else critic.layers
    if kind is PolicyFlow:
        layers[2].bias.data = layers[0].bias.data
    agent.policy.share_memory()
    learn(agent)
    assert all(each.is_shared() for each in agent.policy.parameters())
    if kind is PolicyFlow:
        assert torch.equal(layers[2].bias, layers[0].bias)


@both
def test_hooks_of_weights_are_called_or_refused(kind: type[Any]) -> None:
    agent = make(kind, compile="on")
    weight: Any = agent.policy.actor.field.output.weight if kind is PolicyFlow else critic_layer(agent).weight
    weight.register_hook(lambda gradient: 0 * gradient)
    before = weight.detach().clone()
    with pytest.warns(RuntimeWarning, match="carry hooks"):
        learn(agent)
    assert torch.equal(before, weight)
    weight.register_post_accumulate_grad_hook(lambda each: None)
    with pytest.raises(ValueError, match=r"weights: hooks of .* would not be called; use register_hook"):
        learn(agent)


@both
def test_optimizers_that_cannot_serve_are_refused_at_the_start(kind: type[Any]) -> None:
    agent = make(kind)
    agent.policy.optimizer = torch.optim.LBFGS(agent.policy.parameters())
    with pytest.raises(ValueError, match="optimizer_class: got LBFGS, expected one whose step takes no closure"):
        learn(agent)
    with pytest.raises(ValueError, match="optimizer_kwargs: got lr, expected it as the agent's learning_rate"):
        make(kind, policy_kwargs={"optimizer_kwargs": {"lr": 5.0}})
    make(kind, policy_kwargs={"optimizer_kwargs": None})
    if kind is LipschitzMBPO:
        with pytest.raises(ValueError, match="net_arch: got pi, expected one list, or pi and qf"):
            make(kind, policy_kwargs={"net_arch": {"pi": [8]}})


def pruned(agent: Any) -> None:
    prune.l1_unstructured(critic_layer(agent), "weight", 0.5)


def by_all_parameters(agent: Any) -> None:
    agent.policy.optimizer = torch.optim.Adam(agent.policy.parameters())


def by_the_actors(agent: Any) -> None:
    agent.policy.optimizer = torch.optim.Adam(agent.policy.actor.parameters())


def by_another_class(agent: Any) -> None:
    agent.policy.optimizer = torch.optim.RMSprop(agent.policy._own_parameters().values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pruned, r"policy: got other parameters than a new agent has \(critic.2.weight, critic.2.weight_orig\)"),
        (by_all_parameters, r"policy.optimizer: got one of another class than optimizer_class"),
        (by_the_actors, r"policy.optimizer: got one of another class than optimizer_class"),
        (by_another_class, r"policy.optimizer: got one of another class than optimizer_class"),
    ],
)
def test_what_no_new_agent_could_take_over_is_not_saved(
    change: Callable[[Any], None], message: str, tmp_path: Any
) -> None:
    agent = make(PolicyFlow, ema_decay=0.9)
    change(agent)
    learn(agent)
    with pytest.raises(ValueError, match=message):
        agent.save(tmp_path / "agent")
    assert not (tmp_path / "agent.zip").exists()
    if change is pruned:
        prune.remove(critic_layer(agent), "weight")  # makes it another parameter
        learn(agent)
        agent.save(tmp_path / "agent")
    else:
        agent.save(tmp_path / "agent", exclude=["policy.optimizer"])
    loaded = PolicyFlow.load(tmp_path / "agent", env=agent.get_env(), device="cpu")
    for name, each in values(agent).items():
        assert torch.equal(each, values(loaded)[name])
    learn(loaded)


@both
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RAdam, torch.optim.NAdam, torch.optim.ASGD])
def test_states_of_one_vector_become_those_of_its_parts(kind: type[Any], optimizer: type[Any]) -> None:
    agent = make(kind, policy_kwargs={"optimizer_class": optimizer, "optimizer_kwargs": None})
    named = dict(agent.policy.named_parameters())
    parts = [each for name, each in named.items() if not name.startswith(f"{agent.policy.follower}.")]
    order = agent.policy.weights.parameters
    vector = nn.Parameter(torch.cat([each.detach().flatten() for each in order]))
    old = optimizer([vector], lr=1e-3)
    for _ in range(3):
        vector.grad = torch.linspace(-1, 1, len(vector))
        old.step()
    agent.policy.critic.requires_grad_(False)  # it does not matter what is frozen now
    agent.policy.optimizer.load_state_dict(agent.policy.upgraded_optimizer_state(old.state_dict()))
    agent.policy.requires_grad_(True)
    start = vector.detach().clone()
    single: list[Tensor] = [
        part.view_as(each) for part, each in zip(start.split([*map(Tensor.numel, order)]), order, strict=True)
    ]
    with torch.no_grad():
        for each, value in zip(order, single, strict=True):
            each.copy_(value)
    vector.grad = torch.linspace(1, -1, len(vector))
    for each, part in zip(order, vector.grad.split([*map(Tensor.numel, order)]), strict=True):
        each.grad = part.view_as(each)
    for group in agent.policy.optimizer.param_groups:
        group["lr"] = 1e-3
    old.step()
    agent.policy.optimizer.step()
    torch.testing.assert_close(torch.cat([each.detach().flatten() for each in order]), vector.detach())
    assert len({state["step"].data_ptr() for state in agent.policy.optimizer.state.values()}) == len(parts)


def test_weights_that_share_elements_are_refused_and_transposed_ones_train_alike() -> None:
    agents = [make(PolicyFlow), make(PolicyFlow)]
    for agent in agents:
        learn(agent)
        agent.policy.optimizer.register_step_post_hook(lambda *given: None)  # the way of single parameters
    layer: Any = critic_layer(agents[1])
    layer.weight.data = layer.weight.data.t().contiguous().t()
    for agent in agents:
        learn(agent)
    for one, other in zip(values(agents[0]).values(), values(agents[1]).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    layer.bias.data = torch.zeros(1).expand(8)
    with pytest.raises(ValueError, match=r"weights: elements of critic.2.bias share their memory"):
        learn(agents[1])


@both
def test_what_a_callback_replaces_learns_at_once(kind: type[Any]) -> None:
    class Replace(BaseCallback):
        def __init__(self, what: str) -> None:
            super().__init__()
            self.what = what
            self.new: Any = None
            self.start: Any = None

        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            agent: Any = self.model
            if self.new is None and agent.num_timesteps >= STEPS[kind] // 2:
                if self.what == "policy":
                    agent.policy = copy.deepcopy(agent.policy)
                self.new = critic_layer(agent)
                if self.what == "weight":
                    self.new.weight = nn.Parameter(self.new.weight.detach().clone())
                self.start = self.new.weight.detach().clone()

    agents = {what: make(kind) for what in ("nothing", "policy", "weight")}
    for what, agent in agents.items():
        replace = Replace(what)
        learn(agent, replace)
        assert not torch.equal(replace.new.weight, replace.start)
    for what in ("policy", "weight"):
        for one, other in zip(values(agents["nothing"]).values(), values(agents[what]).values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_layers_of_another_shape_are_not_saved(tmp_path: Any) -> None:
    agent = make(PolicyFlow)
    agent.policy.critic[0], agent.policy.critic[2] = nn.Linear(4, 5), nn.Linear(5, 8)
    learn(agent)
    with pytest.raises(ValueError, match=r"policy: got critic.0.weight of shape \[5, 4\], a new agent has \[8, 4\]"):
        agent.save(tmp_path / "agent")


def test_a_snapshot_takes_the_moments_memory_once() -> None:
    agent = make(PolicyFlow)
    learn(agent)
    moments = Snapshot(agent.policy)._moments
    sizes = [each.untyped_storage().nbytes() for state in moments.values() for each in state.values()]
    assert sum(sizes) <= 4 * (2 * sum(each.numel() for each in moments) + len(moments))
