"""The gradient of the losses is known and clipped; compilation changes speed alone."""

from __future__ import annotations

import copy
import math
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from torch import Tensor, nn

from driftrl import PolicyFlow
from driftrl.agents.common import compiling
from driftrl.agents.common.compiling import PAYS_AFTER, PAYS_AFTER_LAUNCHES, Compiled, compiling_pays
from driftrl.agents.common.snapshot import Snapshot
from driftrl.agents.common.update import Gradient, Loss, Losses

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def agent(**fields: Any) -> PolicyFlow:
    env = make_vec_env("InvertedPendulum-v5", 2, seed=0)
    sizes: dict[str, Any] = {
        "n_steps": 24,
        "batch_size": 16,
        "n_epochs": 2,
    }
    if "net_arch" not in fields.get("policy_kwargs", {}):
        sizes |= {"actor_hidden": (8, 8), "critic_hidden": (8,)}
    return PolicyFlow("MlpPolicy", env, seed=0, device="cpu", **sizes | fields)


NOISES: list[dict[str, Any]] = [
    {},
    {"exploration_noise": "fractional", "solver_error_coef": 1.0},
    {"exploration_noise": "ou"},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ratio", "noise"),
    [
        *((ratio, noise) for ratio in ("interpolation", "endpoint") for noise in NOISES),
        *((ratio, {}) for ratio in ("adjoint", "marginal", "chain", "chain_steps")),
        *((ratio, {"base": "standard"}) for ratio in ("fpo", "fpo++")),
        ("mixture", {"base": "mixture", "spread_coef": 0.0, "transport_coef": 0.0}),
        ("interpolation", {"spread": "score", "target_entropy": (2.0, 1.0), "on_collapse": "rollback"}),
    ],
)
def test_compiled_training_equals_eager_training_up_to_rounding(ratio: str, noise: dict[str, Any]) -> None:
    fields = {
        "ratio": ratio,
        "base": "gaussian",
        "spread_coef": 0.01,
        "transport_coef": 0.01,
        "jacobian_coef": 0.01,
        "ema_decay": 0.9,
    } | noise
    quick, eager = (agent(compile=choice, **fields) for choice in ("on", "off"))
    start = copy.deepcopy(eager.policy.state_dict())
    for each in (quick, eager):
        each.learn(48 * 2)
    assert quick._step is not None and eager._step is None
    for name, weights in eager.policy.state_dict().items():
        torch.testing.assert_close(quick.policy.state_dict()[name], weights, rtol=1e-3, atol=1e-5, msg=name)
    assert not torch.equal(eager.policy.actor.field.output.weight, start["actor.field.output.weight"])


class Quadratic(nn.Module):
    """Two parameters that learn and, as a policy does, what an update knows of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([[1.0, -2.0]]))
        self.b = nn.Parameter(torch.tensor([3.0]))
        self.latest_weights = SimpleNamespace(names=["b", "a"], parameters=[self.b, self.a])


def quadratic(policy: Quadratic, x: Tensor, weight: Tensor) -> Losses:
    table = {
        "a": Loss(policy.a.square().sum() * x.mean()),
        "b": Loss(policy.b.square().sum() * x.mean(), 2.0),
        "off": Loss(policy.a.sum(), weight),
    }
    return Losses(table, {"other": policy.a.sum()})


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_gradient_of_a_weighted_sum_of_quadratics_is_known_and_clipped(how: str) -> None:
    x = torch.tensor([0.5, 1.5])
    for max_norm in (100.0, 1.0, None):
        policy: Any = Quadratic()
        gradient = Gradient(policy, quadratic, max_norm).clipped
        if how == "compiled":
            gradient = torch.compile(gradient, fullgraph=True, backend="aot_eager")
        vector, scalars = gradient(x, torch.tensor(0.5))
        expected = torch.tensor([12.0, 2.5, -3.5])  # 4 b, 2 a + 0.5
        norm = expected.norm().item()
        torch.testing.assert_close(vector, expected * min(1.0, (max_norm or math.inf) / norm))
        assert {name: scalar.item() for name, scalar in scalars.items()} == {
            "a": 5.0, "b": 9.0, "off": -1.0, "other": -1.0, "train/loss": 22.5, "train/grad_norm": pytest.approx(norm),
        }  # fmt: skip


def test_any_number_of_agents_can_be_compiled_in_a_process() -> None:
    with torch._dynamo.config.patch(recompile_limit=1):
        for size in (2, 3, 4):  # a study of hyperparameters, say
            layer = nn.Linear(size, 1)
            x = torch.randn(5, size)
            torch.testing.assert_close(Compiled(layer.forward, CPU)(x), layer(x))


def test_compiled_functions_tell_shapes_apart_and_notice_new_networks_when_asked() -> None:
    layer = nn.Linear(3, 1)
    function = Compiled(lambda batch: layer(batch[0]), CPU)
    long, short = ((torch.randn(n, 3),) for n in (8, 5))
    for batch in (long, short, long, short, long):
        torch.testing.assert_close(function(batch), layer(batch[0]))
    with torch.no_grad():
        layer.weight.add_(1)  # as an optimizer does
    torch.testing.assert_close(function(short), layer(short[0]))
    layer.weight = nn.Parameter(2 * layer.weight.detach())
    function.check_again()
    torch.testing.assert_close(function(long), layer(long[0]))
    layer.weight = nn.Parameter(2 * layer.weight.detach())  # in a callback, say: nobody asks
    torch.testing.assert_close(function(short), layer(short[0]))
    torch.testing.assert_close(function(long), layer(long[0]))
    layer.weight.data = torch.randn(3, 1).t()  # of other strides
    function.check_again()
    torch.testing.assert_close(function(long), layer(long[0]))


def test_on_cuda_launches_count_and_not_updates() -> None:
    assert not compiling_pays("auto", PAYS_AFTER, CUDA)  # they are launched in a few seconds
    assert compiling_pays("auto", PAYS_AFTER_LAUNCHES // 100, CUDA)
    # The same run with minibatches of 256 in 64 environments, and with large ones in thousands.
    steps, epochs = 10_000_000, 10
    assert compiling_pays("auto", steps * epochs // 256, CUDA, steps // 64)
    assert not compiling_pays("auto", steps * epochs // 32_768, CUDA, steps // 4096)
    assert compiling_pays("auto", 0, CUDA, PAYS_AFTER_LAUNCHES)
    assert not compiling_pays("auto", 0, CPU, PAYS_AFTER_LAUNCHES)


def test_short_runs_and_machines_without_a_compiler_stay_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert compiling_pays("auto", PAYS_AFTER, CPU)
    assert not compiling_pays("auto", PAYS_AFTER - 1, CPU)
    assert compiling_pays("on", 1, CPU)
    assert not compiling_pays("off", 10**9, CPU)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not compiling_pays("auto", 10**9, CPU)
    assert compiling_pays("on", 1, CUDA)
    with pytest.raises(ValueError, match=r"install g\+\+ or clang\+\+"):
        compiling_pays("on", 1, CPU)


def test_learning_decides_by_the_length_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "PAYS_AFTER", 12)  # 96 steps in minibatches of 16, twice
    monkeypatch.setattr(compiling, "Program", lambda function: function)
    for total_timesteps, expected in ((95, False), (96, True)):
        learner = agent()
        learner.learn(total_timesteps)
        assert isinstance(learner._act, Compiled) == isinstance(learner._step, Compiled) == expected


def parameters_follow_the_vector(policy: Any) -> bool:
    vector, start = policy.weights.vector, policy.actor.field.output.bias.clone()
    vector.add_(1)
    followed = torch.equal(policy.actor.field.output.bias, start + 1)
    vector.sub_(1)
    return followed


def test_parameters_are_views_of_one_vector_as_long_as_nobody_changes_them() -> None:
    learner = agent(ema_decay=0.9).learn(48)
    policy = learner.policy
    assert parameters_follow_the_vector(policy)
    assert parameters_follow_the_vector(copy.deepcopy(policy))  # a copy has a vector of its own
    policy.to(torch.float64)
    assert next(policy.actor.parameters()).dtype == torch.float64
    assert parameters_follow_the_vector(policy)
    policy.to(torch.float32)
    other = agent(ema_decay=0.9)
    other.set_parameters(learner.get_parameters())
    assert parameters_follow_the_vector(other.policy)
    for one, another in zip(other.policy.parameters(), policy.parameters(), strict=True):
        assert torch.equal(one, another)


OPTIMIZERS: list[Any] = [
    torch.optim.AdamW, torch.optim.Adam, torch.optim.NAdam, torch.optim.Rprop, torch.optim.RMSprop, torch.optim.SGD,
    RMSpropTFLike,
]  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("trained_before", [False, True])
def test_a_snapshot_brings_back_weights_average_and_moments(
    optimizer: type[torch.optim.Optimizer], trained_before: bool
) -> None:
    learners = [agent(ema_decay=0.9, policy_kwargs={"optimizer_class": optimizer}) for _ in range(2)]
    gradients = [torch.randn(len(torch.cat([p.flatten() for p in learners[0].policy.weights.parameters])))] * 3
    for i, learner in enumerate(learners):
        policy = learner.policy
        if trained_before:
            policy.weights.step(gradients[0])
        if i:
            snapshot = Snapshot(policy)
            policy.weights.step(2 * gradients[1])
            policy.weights.average()
            snapshot.restore()
        for gradient in gradients:
            policy.weights.step(gradient)
            policy.weights.average()
    for name, expected in learners[0].policy.state_dict().items():
        assert torch.equal(learners[1].policy.state_dict()[name], expected), name


@pytest.mark.parametrize("watch", ["hook", "scheduler"])
def test_hooks_and_schedulers_of_the_optimizer_see_every_step(watch: str) -> None:
    learner, calls = agent().learn(48), list[int]()
    optimizer: Any = learner.policy.optimizer
    if watch == "hook":
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
    else:
        step = optimizer.step

        def counted(*arguments: Any, **keywords: Any) -> Any:  # as torch.optim.lr_scheduler wraps it
            calls.append(1)
            return step(*arguments, **keywords)

        optimizer.step = counted
    learner.learn(48, reset_num_timesteps=False)
    assert len(calls) == 6


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
    [
        ({"net_arch": [0]}, "actor_hidden: got .*positive integers"),
        ({"base": "wide"}, "base: got"),
        ({"base_std": -1.0}, "base_std: got"),
    ],
)
def test_bad_policy_arguments_are_refused(policy_kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        agent(policy_kwargs=policy_kwargs)


def test_policy_arguments_are_those_of_ppo() -> None:
    policy_kwargs = {"activation_fn": nn.ReLU, "net_arch": {"pi": [32]}, "optimizer_class": torch.optim.RMSprop}
    learner = agent(policy_kwargs=policy_kwargs).learn(48)
    policy = learner.policy
    assert isinstance(policy.optimizer, torch.optim.RMSprop)
    assert isinstance(policy.critic[0], nn.Linear) and len(policy.critic) == 1
    config = learner.config
    assert (config.actor_hidden, config.critic_hidden, config.activation) == ((32,), (), "relu")
