"""Fine-tuning of a pretrained policy: steering's ratio, two learning rates, warm-up, the noise's floor, imitation."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import KVWriter, Logger
from torch import Tensor

from driftrl import PolicyFlow
from driftrl.agents.common.demonstrations import Demonstrations
from driftrl.agents.policyflow.fine_tuning import SteeringRatio, two_rates
from driftrl.agents.policyflow.other_ratios import RATIOS
from driftrl.agents.policyflow.policy import FlowNoise
from driftrl.agents.policyflow.ratios import Samples, draw_epoch, record_references
from driftrl.envs import make_vec

pytestmark = pytest.mark.filterwarnings("ignore:pretraining:UserWarning")

SMALL: dict[str, Any] = {
    "n_steps": 16, "batch_size": 16, "n_epochs": 2, "actor_hidden": (8,), "critic_hidden": (8,), "compile": "off",
    "base": "gaussian", "base_std": 0.5,
}  # fmt: skip


def agent(seed: int = 0, **fields: Any) -> PolicyFlow:
    env = make_vec("InvertedPendulum-v5", 2, 0)
    return PolicyFlow("MlpPolicy", env, seed=seed, device="cpu", **SMALL | fields)


def bent(trained: PolicyFlow) -> PolicyFlow:
    """With a field that is not zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in trained.policy.actor.parameters():
            if each.isfinite().all():
                each.add_(0.3 * torch.randn(each.shape, generator=generator))
    return trained


def weights(trained: PolicyFlow) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in trained.policy.named_parameters()}


def demonstrations(episodes: int = 20) -> Demonstrations:
    rng = np.random.default_rng(0)
    obs = rng.normal(0, 0.1, (10 * episodes, 4)).astype(np.float32)
    actions = (2 * np.sign(obs[:, :1]) + 0.1 * rng.normal(size=(len(obs), 1))).clip(-3, 3).astype(np.float32)
    return Demonstrations(obs, actions, obs[:, 0], np.full(episodes, 10))


@pytest.mark.parametrize("general", ["endpoint", "interpolation"])
def test_the_steering_ratio_is_the_general_one_where_the_flow_is_frozen(general: str) -> None:
    acting = bent(agent(freeze_flow=True)).policy.actor
    torch.manual_seed(0)
    obs = torch.randn(200, 4)
    drawn = acting.sample(obs, FlowNoise.of(torch.randn(2, 200, 1)))
    samples = Samples.drawn(acting, obs, drawn)
    generator, ratio = torch.Generator().manual_seed(0), RATIOS[general]()
    epoch = draw_epoch(acting, ratio, record_references(acting, ratio, samples, generator), generator)
    new = copy.deepcopy(acting)
    with torch.no_grad():
        assert new.base_mean is not None
        for each in (*new.base_mean.parameters(), new.base_log_std, new.log_std):
            each.add_(0.2 * torch.randn(each.shape))
    steering, other = SteeringRatio().terms(new, epoch), ratio.terms(new, epoch)
    torch.testing.assert_close(steering.log_ratio, other.log_ratio, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(steering.kl, other.kl, rtol=1e-4, atol=1e-5)
    # p(z | s) p(a | z, s) / p_old(z | s) p_old(a | z, s), in closed form
    difference = new.log_prob(obs, drawn) - acting.log_prob(obs, drawn)
    torch.testing.assert_close(steering.log_ratio, difference, rtol=1e-4, atol=1e-4)
    assert SteeringRatio().terms(acting, epoch).log_ratio.abs().max() == 0


def test_a_noisy_flow_is_steered_by_the_ratio_of_the_config() -> None:
    # Its path depends on the base, so x1 moves although the field stays: no ratio of z alone is exact.
    trained = bent(agent(freeze_flow=True, langevin_eps=0.3, ratio="endpoint"))
    assert type(trained._ratio) is RATIOS["endpoint"]
    obs, noise = torch.zeros(8, 4), FlowNoise.of(torch.randn(trained.policy.draws, 8, 1))
    before = trained.policy.actor.sample(obs, noise)
    with torch.no_grad():
        trained.policy.actor.base_log_std.add_(0.3)
    assert not torch.allclose(trained.policy.actor.flow(before.z, obs, noise.path), before.x1)
    agent(freeze_flow=True, langevin_eps=0.3).learn(32)  # with the default ratio


def test_steering_moves_base_and_noise_alone() -> None:
    trained = bent(agent(freeze_flow=True, weight_decay=0.1))  # which would move what has no gradient
    assert isinstance(trained._ratio, SteeringRatio)
    before = weights(trained)
    trained.learn(64)
    for name, after in weights(trained).items():
        moved = not torch.equal(after, before[name])
        assert moved == (not name.startswith("actor.field")), name


def test_steering_needs_a_flow_that_is_there_and_stays() -> None:
    with pytest.raises(ValueError, match="freeze_flow: got a velocity field that is 0, expected a trained one"):
        agent(freeze_flow=True, base="learned").learn(32)
    trained = agent(freeze_flow=True)
    trained.policy.requires_grad_(True)
    with pytest.raises(ValueError, match="freeze_flow: got a velocity field that learns; freeze it"):
        trained.learn(32)
    pretrained = agent(freeze_flow=True, base="learned")
    before = weights(pretrained)
    pretrained.pretrain(demonstrations(), 20)  # of what is frozen for steering
    assert any(not torch.equal(each, before[name]) for name, each in weights(pretrained).items() if ".field." in name)
    pretrained.learn(32)


def test_pretraining_leaves_what_the_user_froze_as_it_is() -> None:
    trained = agent()
    first = trained.policy.actor.field
    frozen = {name for name, each in first.named_parameters() if each.dim() == 1}
    for name, parameter in first.named_parameters():
        parameter.requires_grad_(name not in frozen)
    before = weights(trained)
    trained.pretrain(demonstrations(), 20)
    for name, each in weights(trained).items():
        if name.startswith("actor.field."):
            assert torch.equal(each, before[name]) == (name.removeprefix("actor.field.") in frozen)
    first.requires_grad_(False)
    with pytest.raises(ValueError, match="pretraining: got weights that are all frozen"):
        trained.pretrain(demonstrations(), 20)


def test_a_frozen_actor_does_not_drive_the_learning_rate() -> None:
    trained = agent(n_epochs=3)
    trained.policy.actor.requires_grad_(False)
    trained.learn(32 * 5)
    assert trained._rate == trained.config.learning_rate
    single = agent(n_epochs=1, batch_size=32).learn(32 * 5)  # one update per iteration: its KL is 0
    assert single._rate == single.config.learning_rate


def test_demonstrations_that_nothing_learns_from_are_noticed() -> None:
    trained = agent()
    trained.use_demonstrations(demonstrations())
    with pytest.warns(UserWarning, match="demonstrations: they change nothing with bc_coef 0"):
        trained.learn(32)


def test_steering_learns_from_reward_through_the_base() -> None:
    # Reward is the (normalised) action; with a frozen identity flow only the base's mean can raise it.
    import gymnasium as gym
    from gymnasium import spaces

    class Pay(gym.Env[np.ndarray, np.ndarray]):
        observation_space, action_space = spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (1,))

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
            super().reset(seed=seed)
            return np.zeros(1, np.float32), {}

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            return np.zeros(1, np.float32), float(action[0]), True, False, {}

    fields = SMALL | {"n_steps": 256, "batch_size": 64, "freeze_flow": True, "learning_rate": 3e-3, "action_std": 0.1}
    trained = PolicyFlow("MlpPolicy", Pay(), seed=0, device="cpu", **fields)
    trained.learn(2560)
    assert trained.predict(np.zeros(1, np.float32), deterministic=True)[0].item() > 0.5


@pytest.mark.parametrize("as_program", [False, True])
def test_two_rates_are_two_optimizers_and_the_average_follows(as_program: bool) -> None:
    trained, reference = agent(ema_decay=0.9), agent(ema_decay=0.9)
    rng = torch.Generator().manual_seed(0)
    ours, theirs = trained.policy, reference.policy
    theirs.adopt_weights()
    named = dict(theirs.named_parameters())
    names = list(ours.weights.names)
    critic = [named[name] for name in names if name.startswith("critic.")]
    rest = [named[name] for name in names if not name.startswith("critic.")]
    options: dict[str, Any] = {"weight_decay": 0.0, "eps": 1e-5}
    adams = [torch.optim.AdamW(rest, lr=1e-4, **options), torch.optim.AdamW(critic, lr=1e-2, **options)]
    together = ours.weights
    two_rates(together, 1e-4, 1e-2)
    for _ in range(5):
        gradient = torch.randn(sum(each.numel() for each in together.parameters), generator=rng)
        if as_program:
            joined = together.joined()
            assert joined is not None
            for old, new in zip(joined, joined.after(gradient), strict=True):
                old.copy_(new)
        else:
            together.update(gradient)
        parts = gradient.split([named[name].numel() for name in names])
        for name, part in zip(names, parts, strict=True):
            named[name].grad = part.view_as(named[name])
        for adam in adams:
            adam.step()
        assert theirs.averaged_actor is not None
        for mean, each in zip(theirs.averaged_actor.parameters(), theirs.actor.parameters(), strict=True):
            mean.data.lerp_(each.detach(), theirs.averaging)
    for name, each in ours.named_parameters():
        torch.testing.assert_close(each, named[name], rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:critic_warmup:UserWarning")
def test_in_the_warm_up_only_the_critic_learns() -> None:
    trained = bent(agent(critic_warmup=2, ema_decay=0.9))
    before = weights(trained)
    trained.learn(64)  # two iterations
    after = weights(trained)
    for name in before:
        if not name.startswith("averaged"):
            assert torch.equal(after[name], before[name]) == (not name.startswith("critic.")), name
    assert trained._rate == trained.learning_rate  # a KL of 0 does not raise it
    trained.learn(32, reset_num_timesteps=False)
    assert not torch.equal(weights(trained)["actor.field.output.weight"], after["actor.field.output.weight"])


class Kept(KVWriter):
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.rows.append(dict(key_values))

    def close(self) -> None: ...


def logged(trained: PolicyFlow, steps: int) -> list[dict[str, Any]]:
    kept = Kept()
    trained.set_logger(Logger(None, [kept]))
    trained.learn(steps)
    trained.logger.dump(0)
    return [row for row in kept.rows if "train/loss" in row]


def test_the_rates_are_those_asked_for() -> None:
    rows = logged(agent(learning_rate=1e-4, critic_learning_rate=1e-2, lr_schedule="constant"), 64)
    assert [row["train/learning_rate"] for row in rows] == [1e-4] * len(rows)
    default, same = agent(lr_schedule="constant"), agent(lr_schedule="constant", critic_learning_rate=3e-4)
    for each in (default, same):
        each.learn(64)
    for (name, one), other in zip(weights(default).items(), weights(same).values(), strict=True):
        assert torch.equal(one, other), name  # the same rate named is the same update


def test_the_noise_has_a_floor() -> None:
    actor = agent(action_std=0.1, action_std_min=0.1).policy.actor
    with torch.no_grad():
        actor.log_std.fill_(-4.0)
    assert actor.noise_log_std().exp().item() == pytest.approx(0.1)
    with torch.no_grad():
        actor.log_std.fill_(-1.0)
    assert actor.noise_log_std().item() == -1.0
    with pytest.raises(ValueError, match=r"action_std: got 0.05, expected a number of at least action_std_min = 0.1"):
        agent(action_std=0.05, action_std_min=0.1)


def test_imitation_beside_rewards_holds_the_policy_to_the_demonstrations() -> None:
    # Demonstrated is +-2 of +-3 by the sign of the first observation, and noise.
    errors = {}
    for coef in (1e-6, 10.0):
        fields: dict[str, Any] = {
            "learning_rate": 3e-3,
            "lr_schedule": "constant",
            "n_epochs": 20,
            "max_grad_norm": 100.0,
        }
        trained, data = agent(bc_coef=coef, actor_hidden=(32,), **fields), demonstrations()
        trained.use_demonstrations(data)
        trained.learn(640)
        clear = np.abs(data.observations[:, 0]) > 0.03
        obs = trained.policy.obs_norm(torch.as_tensor(data.observations[clear]))
        target = trained.policy.to_normalised(torch.as_tensor(data.actions[clear]))
        errors[coef] = (trained.policy.actor.mode(obs) - target).square().mean().item()
    assert errors[10.0] < 0.1 < 0.3 < errors[1e-6], errors


@pytest.mark.parametrize("schedule", ["constant", "linear", "adaptive"])
def test_the_weight_of_imitation_takes_its_course(schedule: str) -> None:
    trained = agent(bc_coef=0.5, bc_schedule=schedule)
    trained.use_demonstrations(demonstrations())
    rows = logged(trained, 128)
    used = [row["flow/bc_coef"] for row in rows]
    if schedule == "constant":
        assert used == [0.5] * 4
    elif schedule == "linear":
        np.testing.assert_allclose(used, [0.375, 0.25, 0.125, 0.0], atol=1e-9)
    else:
        assert used[:2] == [0.5, pytest.approx(0.5 / 1.2)]  # the first loss is the reference, which it has not left
        assert all(abs(math.log(new / old)) == pytest.approx(math.log(1.2)) for old, new in itertools.pairwise(used))
    assert all(math.isfinite(row["flow/bc_loss"]) for row in rows)


def test_the_adaptive_weight_rises_where_the_loss_is_a_tenth_above_the_first_within_a_hundredfold() -> None:
    trained = agent(bc_coef=0.5, bc_schedule="adaptive")

    def next_weight(loss: float) -> float:
        trained._adapt_weight({"flow/bc_loss": loss})
        return trained._present_weight()

    # Losses of a Gaussian can be negative: a tenth above -1 is -0.9.
    assert [next_weight(loss) for loss in (-1.0, -0.95, -0.85)] == pytest.approx([0.5 / 1.2, 0.5 / 1.44, 0.5 / 1.2])
    assert [next_weight(loss) for loss in (-2.0,) * 40][-1] == pytest.approx(0.005)
    assert [next_weight(loss) for loss in (1.0,) * 80][-1] == pytest.approx(50.0)


def test_a_linear_schedule_holds_for_the_rate_of_the_critic_too() -> None:
    trained = agent(learning_rate=1e-4, critic_learning_rate=1e-2, lr_schedule="linear")
    with mock.patch("driftrl.agents.policyflow.imitation.two_rates", wraps=two_rates) as rates:
        logged(trained, 128)
    given = [call.args[1:] for call in rates.call_args_list]
    np.testing.assert_allclose(given, [(s * 1e-4, s * 1e-2) for s in (0.75, 0.5, 0.25, 0.0)], atol=1e-12)


def test_the_weight_of_imitation_stays_while_only_the_critic_learns() -> None:
    trained = agent(bc_coef=0.5, bc_schedule="adaptive", critic_warmup=3)
    trained.use_demonstrations(demonstrations())
    assert [row["flow/bc_coef"] for row in logged(trained, 160)] == [0.5, 0.5, 0.5, 0.5, pytest.approx(0.5 / 1.2)]


def test_a_new_weight_of_imitation_counts_at_once() -> None:
    trained = agent(bc_coef=0.5, bc_schedule="adaptive")
    trained.use_demonstrations(demonstrations())
    logged(trained, 64)
    before = logged(trained, 32)[0]["flow/bc_coef"]
    trained.bc_coef = 5.0  # type: ignore[attr-defined]
    after = logged(trained, 32)[0]["flow/bc_coef"]
    assert any(after == pytest.approx(10 * before * factor) for factor in (1.2, 1 / 1.2))


def test_demonstrations_that_change_nothing_are_said_to_after_pretraining_too() -> None:
    trained = agent()
    trained.pretrain(demonstrations(), 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained.learn(32)
    trained.use_demonstrations(demonstrations())
    with pytest.warns(UserWarning, match="demonstrations: they change nothing with bc_coef 0"):
        trained.learn(32)


def test_what_means_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bc_coef: got 0\.5 without demonstrations; call agent\.use_demonstrations"):
        agent(bc_coef=0.5).learn(32)
    with pytest.raises(ValueError, match="base: got 'standard', expected learned or gaussian with freeze_flow"):
        agent(base="standard", freeze_flow=True)
    with pytest.raises(ValueError, match=r"bc_coef: got 0\.5, expected 0 with freeze_flow"):
        agent(bc_coef=0.5, freeze_flow=True)
    with pytest.raises(ValueError, match="ratio: got 'endpoint', which changes nothing without freeze_flow off"):
        agent(ratio="endpoint", freeze_flow=True)
    with pytest.raises(ValueError, match="bc_schedule: got 'linear', which changes nothing without bc_coef above 0"):
        agent(bc_schedule="linear")
    with pytest.raises(ValueError, match=r"critic_learning_rate: got 0\.001, expected None with lr_schedule function"):
        agent(learning_rate=lambda remaining: 1e-3 * remaining, critic_learning_rate=1e-3)
