"""The objective as a whole: each term counts with the weight that it was given, and in the right direction."""

from __future__ import annotations

from typing import Any
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from driftrl import PolicyFlow
from driftrl.agents.common.update import Losses
from driftrl.agents.policyflow.algorithm import losses
from driftrl.agents.policyflow.policy import FlowNoise
from driftrl.agents.policyflow.pretraining import Expert, imitation_loss
from driftrl.agents.policyflow.ratios import Ratio, RatioTerms, Samples, draw_epoch, record_references
from driftrl.agents.policyflow.regularizers import spread_loss


def agent(**fields: Any) -> PolicyFlow:
    defaults: dict[str, Any] = {"n_steps": 32, "batch_size": 32, "base_std": 0.4, "compile": "off"}
    return PolicyFlow("MlpPolicy", gym.make("Pendulum-v1"), seed=0, device="cpu", **defaults | fields)


class Given(Ratio):
    """Log-ratios that are given, whatever the policy; they take no part in the loss."""

    def __init__(self, log_ratio: list[float]) -> None:
        super().__init__(1)
        self.log_ratio = torch.tensor(log_ratio)

    def terms(self, actor: Any, samples: Samples) -> RatioTerms:
        return RatioTerms(self.log_ratio, torch.zeros_like(self.log_ratio))


def minibatch(learner: PolicyFlow, **parts: Any) -> Samples:
    """Four samples whose advantages are 0: no policy gradient hides the other terms."""
    torch.manual_seed(1)
    actor, obs = learner.policy.actor, torch.randn(4, 3)
    with torch.no_grad():
        return Samples.drawn(actor, obs, actor.sample(obs, FlowNoise.of(torch.randn(2, 4, 1))), **parts)


def objective(learner: PolicyFlow, samples: Samples, spread_coef: float = 0.0, bc_coef: float = 0.0) -> Losses:
    weights = torch.tensor(spread_coef), torch.tensor(bc_coef)
    return losses(learner.policy, samples, *weights, ratio=Given([0.0] * 4), config=learner.config)


def always(learner: PolicyFlow, value: float) -> None:
    """Let the critic say the same everywhere."""
    last = learner.policy.critic[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, value)


def test_entropy_is_a_bonus_on_both_gaussians() -> None:
    learner = agent(ent_coef=0.03)
    objective(learner, minibatch(learner, returns=torch.zeros(4), values=torch.zeros(4))).total().backward()
    # The entropy of a Gaussian grows by 1 with its log standard deviation; the loss falls by ent_coef.
    for log_std in (learner.policy.actor.log_std, learner.policy.actor.base_log_std):
        assert log_std.grad is not None
        torch.testing.assert_close(log_std.grad, torch.full_like(log_std, -0.03))


def test_the_critic_counts_with_vf_coef_and_its_own_clip() -> None:
    learner = agent(vf_coef=0.7, clip_range=0.2, clip_range_vf=0.5)
    always(learner, 1.0)  # from 0, so the band ends at 0.5: (0.5 - 1)^2 is larger than the plain error, 0
    total = objective(learner, minibatch(learner, values=torch.zeros(4), returns=torch.ones(4))).total()
    assert total.item() == pytest.approx(0.7 * 0.25)
    always(learner, 3.0)  # (3 - 1)^2 is larger than (0.5 - 1)^2
    objective(learner, minibatch(learner, values=torch.zeros(4), returns=torch.ones(4))).total().backward()
    last = learner.policy.critic[-1]
    assert isinstance(last, nn.Linear) and last.bias.grad is not None
    assert last.bias.grad.item() == pytest.approx(0.7 * 2 * (3 - 1))


def test_imitation_counts_with_the_weight_of_the_iteration() -> None:
    learner = agent(bc_coef=0.9, vf_coef=0.0)
    expert = Expert(torch.randn(4, 3), torch.rand(4, 1), torch.randn(4, 1), torch.rand(4))
    total = objective(learner, minibatch(learner, expert=expert), bc_coef=0.4).total()
    assert total.item() == pytest.approx(0.4 * imitation_loss(learner.policy.actor, expert).item(), rel=1e-5)


def test_the_spread_counts_with_the_weight_of_the_iteration() -> None:
    learner = agent(spread_coef=0.1, spread="paper", vf_coef=0.0)
    actor, given = learner.policy.actor, minibatch(learner)
    generator = torch.Generator().manual_seed(0)
    ratio = learner._ratio
    with torch.no_grad():
        for each in actor.field.parameters():
            each.add_(0.1 * torch.randn(each.shape, generator=generator))
    references = record_references(actor, ratio, given, generator, chord=True)
    samples = draw_epoch(actor, ratio, references, generator)
    total = losses(learner.policy, samples, torch.tensor(0.6), torch.tensor(0.0), ratio=ratio, config=learner.config)
    spread = spread_loss(actor, samples, ratio.terms(actor, samples).velocity, "paper")
    assert spread.item() != 0
    assert total.table["flow/spread_loss"].value.item() == pytest.approx(spread.item())
    others = total.table["train/policy_gradient_loss"].value
    assert total.total().item() == pytest.approx(others.item() + 0.6 * spread.item(), rel=1e-5)


def test_the_clip_fraction_counts_ratios_on_both_sides() -> None:
    learner = agent()
    ratios = np.log([0.5, 1.5, 1.1, 0.9]).tolist()
    zero = torch.tensor(0.0)
    found = losses(learner.policy, minibatch(learner), zero, zero, ratio=Given(ratios), config=learner.config)
    assert found.metrics["train/clip_fraction"].item() == 0.5


def updates(learner: PolicyFlow) -> list[Samples]:
    """The minibatches that a call of `learn` updates by."""
    kept: list[Samples] = []
    update = PolicyFlow._update

    def watched(self: PolicyFlow, weights: Any, samples: Samples, *coefs: Tensor) -> Any:
        kept.append(samples)
        return update(self, weights, samples, *coefs)

    with mock.patch.object(PolicyFlow, "_update", watched):
        learner.learn(learner.config.n_steps)
    return kept


def test_advantages_are_standardised_over_the_rollout_and_minibatches_are_shuffled() -> None:
    kept = updates(agent(n_steps=64, batch_size=16, n_epochs=2))
    for epoch in (kept[:4], kept[4:]):
        advantages = torch.cat([each.advantages for each in epoch])
        assert len(advantages) == 64
        torch.testing.assert_close(advantages.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
        torch.testing.assert_close(advantages.std(), torch.tensor(1.0), atol=1e-4, rtol=0)
    first, second = (torch.cat([each.obs for each in epoch]) for epoch in (kept[:4], kept[4:]))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)


@pytest.mark.parametrize(("share", "epochs"), [(0.9, 2), (0.5, 1)])
def test_epochs_end_beyond_one_and_a_half_times_target_kl(share: float, epochs: int) -> None:
    fields: dict[str, Any] = {"n_epochs": 2, "lr_schedule": "constant", "learning_rate": 3e-3, "batch_size": 8}
    free = agent(**fields | {"n_epochs": 1})
    free.learn(32)
    kl = free.logger.name_to_value["train/approx_kl"]
    bounded = agent(**fields, target_kl=kl * share)  # 1.35 and 0.75 times the first epoch's after the factor 1.5
    assert len(updates(bounded)) == 4 * epochs
