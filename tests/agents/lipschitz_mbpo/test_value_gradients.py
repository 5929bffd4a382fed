"""The losses of value gradients against rollouts written out by hand, their gradients, and what they learn."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from gymnasium import Env, spaces
from torch import Tensor

from driftrl import LipschitzMBPO
from driftrl.agents.common.update import Gradient
from driftrl.agents.lipschitz_mbpo.config import LipschitzMBPOConfig
from driftrl.agents.lipschitz_mbpo.diagnostics import growth, koopman_radius, spectral_radius
from driftrl.agents.lipschitz_mbpo.replay import Search, Transitions
from driftrl.agents.lipschitz_mbpo.sac import SACPolicy
from driftrl.agents.lipschitz_mbpo.value_gradients import Start, draw_blur, value_gradient_losses, value_range
from driftrl.envs import make_vec
from driftrl.envs.native.build import find_compiler

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")

GAMMA, ALPHA, HORIZON, ROWS = 0.9, 0.3, 4, 16


class KnownModel:
    """``s' = s + 0.5 a + noise``, ``r = -s_0^2 + a``; ends where the first coordinate exceeds 1."""

    def step(self, obs: Tensor, action: Tensor, noise: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return obs + 0.5 * action + noise[0], action[:, 0] - obs[:, 0].square()

    @staticmethod
    def ended(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        return next_obs[:, 0] > 1


def setting(critics: int = 3, blurred: bool = False) -> tuple[SACPolicy, Start, LipschitzMBPOConfig]:
    torch.manual_seed(0)
    box = spaces.Box(-np.inf, np.inf, (2,)), spaces.Box(-1.0, 1.0, (1,))
    policy = SACPolicy(
        *box, lambda _: 1e-3, net_arch=[8], activation_fn="silu", n_critics=critics, temperature=ALPHA,
        bounded_values=True, critic_layer_norm=True,
    ).double()  # fmt: skip
    low, high = torch.tensor([-3.0, 5.0], dtype=torch.float64)
    policy.move_value_range(low, high, 1.0)
    for network in (policy.critic, policy.target_critic):  # whose values are not the same
        for parameter in network.layers[-1].parameters():
            torch.nn.init.normal_(parameter)
    draw: dict[str, Any] = {"dtype": torch.float64}
    start = Start(
        torch.randn(ROWS, 2, **draw), torch.randn(HORIZON + 1, ROWS, 1, **draw),
        tuple((0.3 * torch.randn(ROWS, 2, **draw),) for _ in range(HORIZON)), torch.tensor([2, 0]), None,
        0.5 * torch.randn(HORIZON + 1, ROWS, 2, **draw) if blurred else None,
    )  # fmt: skip
    config = LipschitzMBPOConfig(value_gradient=HORIZON, gamma=GAMMA, regularizer="none", n_critics=critics)
    return policy, start, config


def losses(policy: SACPolicy, start: Start, config: LipschitzMBPOConfig) -> dict[str, Tensor]:
    found = value_gradient_losses(policy, start, KnownModel(), KnownModel.ended, config, -1.0)  # type: ignore[arg-type]
    return {name.split("/")[1]: loss.value for name, loss in found.table.items()} | found.metrics


def by_hand(policy: SACPolicy, start: Start) -> tuple[list[float], list[float]]:
    """Target of each row's first state, and what the actor maximises, one row and one step after the other."""
    targets, objectives, alpha = [], [], policy.log_alpha.exp().item()
    blur = torch.zeros(HORIZON + 1, ROWS, 2) if start.blur is None else start.blur
    for row in range(ROWS):
        state, collected, first_bonus, step = start.obs[row], 0.0, 0.0, 0
        while step < HORIZON and not (step and state[0] > 1):
            action, log_prob = policy.actor.sample((state + blur[step, row])[None], start.noise[step, row][None])
            if step == 0:
                first_bonus = alpha * log_prob.item()
            reward = action.item() - state[0].item() ** 2
            collected += GAMMA**step * (reward - alpha * log_prob.item())
            state = state + 0.5 * action[0] + start.model_noise[step][0][row]
            step += 1
        target, objective = collected + first_bonus, collected
        if not state[0] > 1:
            action, log_prob = policy.actor.sample((state + blur[-1, row])[None], start.noise[HORIZON, row][None])
            slow, each = (critics(state[None], action)[:, 0] for critics in (policy.target_critic, policy.critic))
            target += GAMMA**HORIZON * (slow[[2, 0]].min().clamp(-3, 5) - alpha * log_prob).item()
            objective += GAMMA**HORIZON * (each.mean() - alpha * log_prob).item()
        targets.append(target)
        objectives.append(objective)
    return targets, objectives


@pytest.mark.parametrize("blurred", [False, True])
def test_losses_are_those_of_rollouts_written_out_row_by_row(blurred: bool) -> None:
    policy, start, config = setting(blurred=blurred)
    targets, objectives = by_hand(policy, start)
    found = losses(policy, start, config)
    action = policy.actor.sample(start.seen(start.obs, 0), start.noise[0]).action
    values = policy.critic(start.obs, action)
    error = 0.5 * (values - torch.tensor(targets, dtype=torch.float64)).square().mean(1).sum()
    assert found["critic_loss"].item() == pytest.approx(error.item(), rel=1e-12)
    assert found["actor_loss"].item() == pytest.approx(-np.mean(objectives), rel=1e-12)
    ends = 1 - found["value_gradient/alive_share"].item()
    assert 0.1 < ends < 0.9  # both kinds of rows are looked at


def test_the_actors_gradient_is_that_of_finite_differences_through_the_model() -> None:
    policy, start, config = setting()
    weight = dict(policy.actor.named_parameters())["body.0.weight"]
    (gradient,) = torch.autograd.grad(losses(policy, start, config)["actor_loss"], weight)
    for index in ((0, 0), (3, 1), (7, 0)):
        difference = 0.0
        for sign in (1, -1):
            with torch.no_grad():
                weight[index] += sign * 1e-6
            difference += sign * -float(np.mean(by_hand(policy, start)[1])) / 2e-6
            with torch.no_grad():
                weight[index] -= sign * 1e-6
        assert gradient[index].item() == pytest.approx(difference, rel=1e-5, abs=1e-7)


def test_each_loss_reaches_only_its_own_network() -> None:
    policy, start, config = setting()
    found = losses(policy, start, config)
    for loss, network in (("critic_loss", "critic"), ("actor_loss", "actor"), ("ent_coef_loss", "log_alpha")):
        learning = {name: each for name, each in policy.named_parameters() if each.requires_grad}
        gradients = torch.autograd.grad(found[loss], [*learning.values()], allow_unused=True, retain_graph=True)
        pairs: list[tuple[str, Tensor | None]] = list(zip(learning, gradients, strict=True))
        reached = {name.split(".")[0] for name, gradient in pairs if gradient is not None}
        assert reached == {network}, loss


def test_noise_on_what_the_actor_sees_has_the_deviation_asked_for() -> None:
    deviation = torch.tensor([1.0, 0.1, 5.0])
    blur = draw_blur(0.2, deviation, (6, 2000, 3), torch.Generator().manual_seed(0))
    assert blur is not None
    torch.testing.assert_close(blur.flatten(0, 1).std(0), 0.2 * deviation, rtol=0.02, atol=0)
    assert draw_blur(0.0, deviation, (6, 2000, 3), torch.Generator()) is None


@pytest.mark.parametrize("normalize", [True, False])
def test_noise_on_what_the_actor_sees_is_in_deviations_of_each_observation(normalize: bool) -> None:
    learner = LipschitzMBPO(
        "MlpPolicy", make_vec("InvertedPendulum-v5", 1, 0), value_gradient=1, observation_noise=0.05, seed=0,
        normalize_observation=normalize, learning_starts=60, model_epochs=2, model_hidden=(16,), compile="off",
        device="cpu",
    ).learn(80)  # fmt: skip
    start = next(learner._starts(1, 4000, torch.Generator().manual_seed(0)))
    assert start.blur is not None
    units = torch.ones(4) if normalize else learner._real.all().obs.std(0)
    torch.testing.assert_close(start.blur.flatten(0, 1).std(0), 0.05 * units, rtol=0.2, atol=0)


def test_values_go_on_for_ever_between_the_rarest_rewards() -> None:
    low, high = value_range(torch.linspace(-1, 3, 401), 0.9)
    assert (low.item(), high.item()) == pytest.approx((-9.6, 29.6), rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.99, 0.999])
def test_a_reward_that_never_changes_is_worth_its_discounted_sum(gamma: float) -> None:
    for reward in (-2.0, 0.5):
        low, high = value_range(torch.full((200,), reward), gamma)
        received = sum(reward * gamma**step for step in range(30_000))
        assert (low.item(), high.item()) == pytest.approx((min(received, reward), max(received, reward)), rel=1e-4)


def test_the_range_of_values_reaches_what_is_received_once_in_a_thousand_steps() -> None:
    rewards = torch.zeros(2, 1000)
    rewards[0, 7], rewards[1, 400] = -50, 70
    assert torch.stack(value_range(rewards, 0.9)).tolist() == [-50, 70]


class LinearCritics(torch.nn.Module):
    """Q_1 = w . s and Q_2 = 2 w . s."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.3, 2.0], dtype=torch.float64))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return torch.stack([obs @ self.weight, 2 * obs @ self.weight])


def test_the_robust_term_counts_with_its_weight_among_the_value_gradients() -> None:
    policy, start, _ = setting(2)
    policy.critic = LinearCritics()  # type: ignore[assignment]
    radius = torch.tensor([0.5, 0.1], dtype=torch.float64)
    start = start._replace(pair=None, search=Search(radius, 2 * torch.rand(ROWS, 2, dtype=torch.float64) - 1))
    fields: dict[str, Any] = {"value_gradient": HORIZON, "gamma": GAMMA, "robust_actions": "same_action"}
    total, without = (
        value_gradient_losses(policy, start, KnownModel(), KnownModel.ended, config, -1.0).total()  # type: ignore[arg-type]
        for config in (
            LipschitzMBPOConfig(**fields, regularizer="robust", robust_coef=0.7),
            LipschitzMBPOConfig(**fields, regularizer="none"),
        )
    )
    # At a corner of the box w . s has changed by 0.5 * 0.3 + 0.1 * 2 = 0.35, in the other critic by 0.7.
    assert (total - without).item() == pytest.approx(0.7 * (0.35**2 + 0.7**2), rel=1e-10)


FIELDS: dict[str, Any] = {
    "value_gradient": 3, "model_hidden": (32, 32), "model_rollouts": 13, "rollout_interval": 20,
    "model_retain": 200, "rollout_min": 10, "rollout_max": 10, "actor_hidden": (32, 32), "critic_hidden": (32, 32),
    "activation": "silu", "learning_starts": 100, "gradient_steps": 1, "batch_size": 64, "temperature": 0.1,
    "normalize_observation": True, "seed": 0, "device": "cpu",
}  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "homoscedastic", "model_layer_norm": True, "model_dropout": 0.01, "n_critics": 3, "ema_decay": 0.9},
        {"model": "homoscedastic", "snapshots": 4},
        {"model": "flow"}, {"model": "langevin"}, {"members": 3, "elites": 2}, {"regularizer": "spectral"},
        {"termination": "learned", "regularizer": "none", "critic_layer_norm": True},
    ],
)  # fmt: skip
def test_every_model_and_regularizer_trains_and_is_saved_with_all_it_has(fields: dict[str, Any], tmp_path: Any) -> None:
    learner = LipschitzMBPO("MlpPolicy", make_vec("InvertedPendulum-v5", 1, 0), **(FIELDS | fields))
    first = torch.nn.utils.parameters_to_vector(learner.policy.actor.parameters()).detach()
    learner.learn(115)
    learner.save(tmp_path / "agent")
    again = LipschitzMBPO.load(tmp_path / "agent", make_vec("InvertedPendulum-v5", 1, 0), device="cpu")
    assert again.config == learner.config and again.transition is not None and learner.transition is not None
    for ours, theirs in ((learner.policy, again.policy), (learner.transition, again.transition)):
        for one, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert torch.equal(one, other)
    again.learn(120, reset_num_timesteps=False)  # without the replay buffer it sees something first
    moved = torch.nn.utils.parameters_to_vector(again.policy.actor.parameters())
    assert moved.isfinite().all() and not torch.equal(moved, first)


class Point(Env[np.ndarray, np.ndarray]):
    """A point to be brought to 0 by its velocity: the best return of 20 steps from +-1 is about -1.9."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Box(-0.5, 0.5, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.at, self.step_count = float(self.np_random.choice([-1.0, 1.0])), 0
        return np.array([self.at], np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.at += float(np.clip(action, -0.5, 0.5)[0])
        self.step_count += 1
        return np.array([self.at], np.float32), -abs(self.at), False, self.step_count == 20, {}


class CostlyPoint(Point):
    """Each step costs 2: with a discount of 0.9 every value is -20."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, _, terminated, truncated, info = super().step(action)
        return obs, -2.0, terminated, truncated, info


def test_the_range_of_values_is_first_that_of_the_rewards_seen_and_then_follows_slowly() -> None:
    fields: dict[str, Any] = {
        "gamma": 0.9, "gradient_steps": 10, "temperature": 1e-12, "learn_temperature": False, "termination": "never",
        "model_epochs": 1, "rollout_max": 1, "rollout_min": 1, "model_hidden": (8,), "value_gradient": 1,
    }  # fmt: skip
    learner = LipschitzMBPO("MlpPolicy", CostlyPoint(), **(FIELDS | fields), compile="off").learn(110)
    assert learner._n_updates == 100
    left = (1 - 3e-4) ** 100  # of the way from [-20, 1], which is at least [-1, 1], to [-20, -2]
    for critics in (learner.policy.critic, learner.policy.target_critic):
        low, high = critics.center - critics.half_width, critics.center + critics.half_width
        assert (low.item(), high.item()) == pytest.approx((-20, -2 + 3 * left), abs=2e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_point_is_brought_to_its_place_within_a_few_hundred_steps(precision: Literal["float32", "bfloat16"]) -> None:
    fields = FIELDS | {"gamma": 0.9, "learning_rate": 3e-3, "target_entropy": -3.0, "model_interval": 100}
    learner = LipschitzMBPO(
        "MlpPolicy", Point(), **fields, model="homoscedastic", model_patience=100, precision=precision
    )
    learner.learn(500)
    env, returns = Point(), []
    for seed in range(4):
        obs, total = env.reset(seed=seed)[0], 0.0
        for _ in range(20):
            obs, reward, *_ = env.step(learner.predict(obs, deterministic=True)[0])
            total += reward
        returns.append(total)
    assert np.mean(returns) > -2.0, returns


def ends_if_rounded(next_obs: Tensor) -> Tensor:
    """What a user's rule multiplies is not rounded: 1 + 2^-9 would be 1 in bfloat16."""
    return (next_obs.new_full((len(next_obs), 1), 1 + 2**-9) @ next_obs.new_ones(1, 1))[:, 0] <= 1


@pytest.mark.parametrize("regularizer", ["none", "robust", "spectral"])
def test_gradient_in_bfloat16_is_that_in_float32_but_for_rounding(regularizer: Any) -> None:
    fields = FIELDS | {"model": "homoscedastic", "regularizer": regularizer}
    learner = LipschitzMBPO("MlpPolicy", Point(), **fields, terminated=ends_if_rounded).learn(105)
    for start in learner._starts(3, 256):
        exact, rounded = (
            Gradient(learner.policy, learner._objective.losses, None, bfloat16=each).clipped(start)[0]
            for each in (False, True)
        )
        assert 0 < (exact - rounded).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("compile", ["off", pytest.param("on", marks=[needs_compiler, pytest.mark.slow])])
def test_agent_in_bfloat16_keeps_its_weights_and_acts_in_float32(compile: Any) -> None:
    fields = FIELDS | {"model": "homoscedastic", "terminated": ends_if_rounded}
    options: list[dict[str, Any]] = [{"compile": "off"}, {"compile": compile, "precision": "bfloat16"}]
    exact, rounded = (
        LipschitzMBPO("MlpPolicy", Point(), **fields, **each).learn(110, log_interval=10**6) for each in options
    )
    assert rounded.logger.name_to_value["value_gradient/alive_share"] == 1
    weights = [torch.nn.utils.parameters_to_vector(each.policy.parameters()) for each in (exact, rounded)]
    assert weights[1].dtype is torch.float32
    assert 0 < (weights[0] - weights[1]).abs().max() < 0.02  # ten steps of 3e-4, and rounding
    exact.policy.load_state_dict(rounded.policy.state_dict())
    obs = np.linspace(-1, 1, 5, dtype=np.float32)[:, None]
    assert np.array_equal(exact.predict(obs, deterministic=True)[0], rounded.predict(obs, deterministic=True)[0])


def test_a_device_that_imitates_bfloat16_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    learner = LipschitzMBPO("MlpPolicy", Point(), **FIELDS, precision="bfloat16")
    with pytest.warns(RuntimeWarning, match="precision: got bfloat16, which this device only imitates"):
        learner.learn(1)


def test_value_gradients_need_a_model_and_no_real_ratio() -> None:
    with pytest.raises(ValueError, match="value_gradient: got 3, expected 0 without a model"):
        LipschitzMBPOConfig(value_gradient=3, model="none")
    assert "real_ratio" in LipschitzMBPOConfig(value_gradient=3).switched_off()


def test_diagnostics_change_nothing_and_tell_the_model_from_the_truth() -> None:
    vectors, logs = [], []
    for interval in (40, 0):
        fields = FIELDS | {"model": "homoscedastic", "model_interval": 50, "diagnostics_interval": interval}
        learner = LipschitzMBPO("MlpPolicy", Point(), **fields).learn(180, log_interval=10**6)
        vectors.append(torch.nn.utils.parameters_to_vector(learner.policy.actor.parameters()))
        logs.append(dict(learner.logger.name_to_value))
    assert torch.equal(*vectors)
    logged = logs[0]
    assert logged["value_gradient/actor_noise"] > 0 and logged["value_gradient/critic_slope"] > 0
    assert logged["model/rollout_error_1"] < logged["model/rollout_error_20"]
    assert np.isfinite(logged["model/exploitation"])


class LinearModel:
    """Rotates and shrinks, |eigenvalue|^2 = 0.81 + 0.16, in units of which the second is a tenth of the first."""

    matrix = torch.tensor([[0.9, 4.0], [-0.04, 0.9]])

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.randn(rows, 2, generator=generator),)

    def step(self, obs: Tensor, action: Tensor, noise: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return obs @ self.matrix.T + action + noise[0], action[:, 0]


def test_stability_of_a_linear_system() -> None:
    model: Any = LinearModel()
    obs, action = torch.randn(50, 2), torch.randn(50, 1)
    next_obs = model.step(obs, action, (torch.zeros(()),))[0]
    rows = Transitions(obs, action, next_obs, torch.zeros(50), torch.zeros(50))
    assert spectral_radius(model, rows).item() == pytest.approx(0.97**0.5, rel=1e-5)
    assert koopman_radius(rows, next_obs).item() == pytest.approx(0.97**0.5, rel=1e-5)
    stretch = torch.randn(20, 7, 2), torch.randn(20, 7, 1)
    grown = growth(model, *stretch, torch.tensor([0.1, 1.0])).item()  # in these units a rotation, not a shear
    assert grown == pytest.approx(0.97**0.5, rel=1e-5)
    assert growth(model, *stretch, torch.ones(2)).item() > 1.02 * grown  # the shear counts in the first steps


def test_snapshots_disagree_in_the_log() -> None:
    fields = FIELDS | {"model": "homoscedastic", "snapshots": 3, "model_interval": 50, "diagnostics_interval": 40}
    learner = LipschitzMBPO("MlpPolicy", Point(), **fields).learn(180, log_interval=10**6)
    assert learner.logger.name_to_value["model/disagreement"] > 0
