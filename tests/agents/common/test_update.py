"""Compilation changes speed alone; and parameters that are views of one vector behave as parameters do."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from stable_baselines3.common.env_util import make_vec_env
from torch import Tensor, nn

from driftrl import PolicyFlow
from driftrl.agents.common import update as compiling
from driftrl.agents.common.update import PAYS_AFTER, Compiled, Objective, compiling_pays
from driftrl.agents.policyflow.policy import FlowPolicy

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def agent(**fields: Any) -> PolicyFlow:
    env = make_vec_env("InvertedPendulum-v5", 2, seed=0)
    sizes: dict[str, Any] = {
        "n_steps": 24,
        "batch_size": 16,
        "n_epochs": 2,
        "actor_hidden": (8, 8),
        "critic_hidden": (8,),
    }
    return PolicyFlow("MlpPolicy", env, seed=0, device="cpu", **sizes | fields)


NOISES: list[dict[str, Any]] = [
    {},
    {"exploration_noise": "fractional", "sampler": "sde", "solver_error_coef": 1.0},
    {"exploration_noise": "ou"},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ratio", "noise"),
    [
        *((ratio, noise) for ratio in ("interpolation", "endpoint") for noise in NOISES),
        *((ratio, {}) for ratio in ("adjoint", "marginal", "chain", "chain_steps")),
        *((ratio, {"base": "standard"}) for ratio in ("fpo", "fpo++")),
        ("interpolation", {"brownian": "score", "target_entropy": (2.0, 1.0), "guard": "rollback"}),
    ],
)
def test_compiled_training_equals_eager_training_up_to_rounding(ratio: str, noise: dict[str, Any]) -> None:
    fields = {
        "ratio": ratio,
        "base": "gaussian",
        "brownian_coef": 0.01,
        "transport_coef": 0.01,
        "jacobian_coef": 0.01,
        "ema_decay": 0.9,
    } | noise
    quick, eager = (agent(compile=choice, **fields) for choice in ("on", "off"))
    start = copy.deepcopy(eager.policy.state_dict())
    for each in (quick, eager):
        each.learn(48 * 2)
    assert isinstance(quick._gradient, Compiled) and not isinstance(eager._gradient, Compiled)
    for name, weights in eager.policy.state_dict().items():
        torch.testing.assert_close(quick.policy.state_dict()[name], weights, rtol=1e-3, atol=1e-5, msg=name)
    assert not torch.equal(eager.policy.actor.field.output.weight, start["actor.field.output.weight"])


class Quadratic(nn.Module):
    """Two parameters, one of them not learning."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([[1.0, -2.0]]))
        self.b = nn.Parameter(torch.tensor([3.0]))

    def trained(self) -> dict[str, nn.Parameter]:
        return {"b": self.b, "a": self.a}


def quadratic(policy: Quadratic, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "loss": (policy.a.square().sum() + 2 * policy.b.square().sum()) * batch["x"].mean(),
        "other": policy.a.sum(),
    }


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_gradient_of_a_quadratic_is_known_and_clipped(how: str) -> None:
    batch = {"x": torch.tensor([0.5, 1.5])}
    for max_norm in (100.0, 1.0):
        gradient = Objective(Quadratic(), quadratic, "loss", max_norm).gradient
        if how == "compiled":
            gradient = torch.compile(gradient, fullgraph=True, backend="aot_eager")
        vector, terms = gradient(batch)
        expected = torch.tensor([12.0, 2.0, -4.0])  # 4 b, 2 a
        torch.testing.assert_close(vector, expected * min(1.0, max_norm / expected.norm().item()))
        assert {name: term.item() for name, term in terms.items()} == {
            "loss": 23.0, "other": -1.0, "train/grad_norm": pytest.approx(164**0.5),
        }  # fmt: skip


def test_any_number_of_agents_can_be_compiled_in_a_process() -> None:
    with torch._dynamo.config.patch(recompile_limit=1):
        for size in (2, 3, 4):  # a study of hyperparameters, say
            layer = nn.Linear(size, 1)
            x = torch.randn(5, size)
            torch.testing.assert_close(Compiled(layer.forward, CPU)(x), layer(x))


def test_compiled_functions_tell_shapes_apart_and_notice_new_networks_when_asked() -> None:
    layer = nn.Linear(3, 1)
    function = Compiled(lambda batch: layer(batch["x"]), CPU)
    long, short = ({"x": torch.randn(n, 3)} for n in (8, 5))
    for batch in (long, short, long, short, long):
        torch.testing.assert_close(function(batch), layer(batch["x"]))
    with torch.no_grad():
        layer.weight.add_(1)  # as an optimizer does
    torch.testing.assert_close(function(short), layer(short["x"]))
    layer.weight = nn.Parameter(2 * layer.weight.detach())
    function.check_again()
    torch.testing.assert_close(function(long), layer(long["x"]))


def test_short_runs_and_machines_without_a_compiler_stay_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert compiling_pays("auto", PAYS_AFTER, CPU)
    assert not compiling_pays("auto", PAYS_AFTER - 1, CPU)
    assert compiling_pays("on", 1, CPU)
    assert not compiling_pays("off", 10**9, CPU)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not compiling_pays("auto", 10**9, CPU)
    assert compiling_pays("auto", PAYS_AFTER, CUDA)
    with pytest.raises(ValueError, match=r"install g\+\+ or clang\+\+"):
        compiling_pays("on", 1, CPU)


def test_learning_decides_by_the_length_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "PAYS_AFTER", 12)  # 96 steps in minibatches of 16, twice
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for total_timesteps, expected in ((95, False), (96, True)):
        learner = agent()
        learner.learn(total_timesteps)
        assert isinstance(learner._act, Compiled) == isinstance(learner._gradient, Compiled) == expected


def parameters_follow_the_vector(policy: FlowPolicy) -> bool:
    vector, start = policy.joined(), policy.actor.field.output.bias.clone()
    with torch.no_grad():
        vector.add_(1)
    followed = torch.equal(policy.actor.field.output.bias, start + 1)
    with torch.no_grad():
        vector.sub_(1)
    return followed


def test_parameters_stay_views_of_the_optimizers_vector() -> None:
    learner = agent(ema_decay=0.9).learn(48)
    policy = learner.policy
    assert parameters_follow_the_vector(policy)
    assert parameters_follow_the_vector(copy.deepcopy(policy))  # a copy has a vector of its own
    assert policy.joined().data_ptr() != copy.deepcopy(policy).joined().data_ptr()
    policy.to(torch.float64)
    assert policy.joined().dtype == torch.float64
    assert parameters_follow_the_vector(policy)
    policy.to(torch.float32)
    other = agent(ema_decay=0.9)
    other.set_parameters(learner.get_parameters())
    assert parameters_follow_the_vector(other.policy)
    assert torch.equal(other.policy.joined(), policy.joined())


def test_hyperparameters_given_to_load_are_used(tmp_path: Any) -> None:
    first = agent(learning_rate=1e-3)
    first.learn(48)
    first.save(tmp_path / "agent")
    loaded = PolicyFlow.load(
        tmp_path / "agent",
        env=first.get_env(),
        n_epochs=1,
        clip_range=0.05,
        ent_coef=0.01,
        gamma=0.5,
        learning_rate=1e-5,
    )
    assert (loaded.config.n_epochs, loaded.config.clip_range, loaded.config.ent_coef) == (1, 0.05, 0.01)
    assert loaded.config.gamma == loaded.gamma == 0.5
    before = loaded._n_updates
    loaded.learn(48, reset_num_timesteps=False)
    assert loaded._n_updates == before + 1
    assert loaded.policy.optimizer.param_groups[0]["lr"] < 2e-5
    with pytest.raises(ValueError, match="n_epochs: got 0"):
        PolicyFlow.load(tmp_path / "agent", env=first.get_env(), n_epochs=0)


@pytest.mark.parametrize("rate", ["lin_1e-2", [1e-3], -1.0])
def test_a_learning_rate_that_is_none_is_refused(rate: Any) -> None:
    with pytest.raises(ValueError, match="learning_rate: got"):
        agent(learning_rate=rate)


@pytest.mark.parametrize(
    ("policy_kwargs", "message"),
    [({"net_arch": []}, "at least one width"), ({"base": "wide"}, "base: got"), ({"base_std": -1.0}, "base_std: got")],
)
def test_bad_policy_arguments_are_refused(policy_kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        agent(policy_kwargs=policy_kwargs)


def test_policy_arguments_are_those_of_ppo() -> None:
    policy_kwargs = {"activation_fn": nn.ReLU, "net_arch": {"pi": [32]}, "optimizer_class": torch.optim.RMSprop}
    policy = agent(policy_kwargs=policy_kwargs).learn(48).policy
    assert isinstance(policy.optimizer, torch.optim.RMSprop)
    assert isinstance(policy.critic[0], nn.Linear) and len(policy.critic) == 1
