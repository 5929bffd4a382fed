"""Rollouts of a flow policy: environment steps, rewards in units of their return, advantages."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from ...dynamics.noise import StepNoise, step_noise
from ..common.networks import lazy_zeros
from ..common.nonfinite import Guarded, replaced
from ..common.observations import batch_of_one, observation_vectors
from ..storage.saving import Checkpointed
from .policy import FlowPolicy

Batch: TypeAlias = dict[str, Tensor]
"""Samples of a rollout, first axis B = steps x environments:

obs [B, O] (normalised); z, x1, action [B, D]; base_mean, base_log_std, log_std [B, D] of the policy that acted;
values, returns, advantages [B]; what the ratio in use records; noise_mean [B, D] and noise_scale [B, 1], the moments of
the action noise given its past, in units of its standard deviation, where it is correlated; path [B, steps, D], the
noise of the flow, where that is an SDE.
"""


def generalized_advantage(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, ended: Tensor, gamma: float, lam: float
) -> Tensor:
    """Generalized advantage estimation (Schulman et al. 2016), each tensor [T, N].

    ``A_t = delta_t + gamma lam (1 - ended_t) A_{t+1}`` with
    ``delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t)``.

    Args:
        rewards: r_t.
        values: V(s_t).
        next_values: V of the state *reached* at step t, before any reset.
        terminated: 1 where the episode terminated at step t: nothing is to come.
        ended: 1 where it terminated or was truncated: the next row belongs to another episode.
        gamma: discount factor.
        lam: decay lambda.
    """
    delta = rewards + gamma * (1 - terminated) * next_values - values
    decay = gamma * lam * (1 - ended)
    advantages = torch.empty_like(delta)
    running = torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        running = torch.addcmul(delta[t], decay[t], running)
        advantages[t] = running
    return advantages


class FlowRollouts(Checkpointed, Guarded, OnPolicyAlgorithm):
    """The half of an on-policy agent that lies between the environments and the batch to learn from.

    Subclasses build the policy and call `_setup_rollout`, then learn from `batch` in `train`.
    """

    policy: FlowPolicy  # type: ignore[assignment]  # SB3 asks for more of its policies than its loops use
    batch: Batch
    normalize_reward: bool
    _act: Callable[[Tensor, Tensor], Tensor]  # FlowPolicy.act, perhaps compiled
    _exploration: StepNoise | None  # action noise with memory, which lasts from rollout to rollout
    _diverged = 0  # unstable simulations so far
    _iteration: int  # so many times `train` was called
    _remade = ("batch", "_ratio", "_guard", "_discounted_return", "_act", "_gradient", "_exploration")

    def _setup_rollout(self, exploration_noise: str, noise_time: float, hurst: float) -> None:
        steps, envs, size = self.n_steps, self.n_envs, (self.n_envs, self.policy.action_dim)
        self._exploration = step_noise(exploration_noise, noise_time, hurst, size, self.device)
        # SB3's learn() hands this attribute to collect_rollouts. Ours: plain tensors on the device.
        self.rollout_buffer: Batch = {  # type: ignore[assignment]
            "features": lazy_zeros(steps + 1, envs, self.policy.obs_dim, device=self.device),  # the last: what follows
            "sample": lazy_zeros(steps, 3, envs, self.policy.action_dim, device=self.device),  # z, x1, action
        }
        self._discounted_return = np.zeros(envs, np.float32)
        assert isinstance(self.action_space, spaces.Box)
        self._action_shape = self.action_space.shape

    def training_state(self) -> dict[str, Any]:
        """See `Checkpointed`; the rollout begins afresh, but returns and action noise run on."""
        noise = vars(self._exploration) if self._exploration else {}
        memory = {name: value for name, value in noise.items() if isinstance(value, Tensor)}
        return super().training_state() | {"discounted_return": self._discounted_return, "exploration": memory}

    def set_training_state(self, state: dict[str, Any]) -> None:
        """See `Checkpointed`."""
        super().set_training_state(state)
        self._discounted_return = state["discounted_return"]
        for name, value in state["exploration"].items():
            setattr(self._exploration, name, value.to(self.device))

    def dump_logs(self, iteration: int = 0) -> None:
        """As Stable-Baselines3, but a run that goes on goes on counting its iterations."""
        super().dump_logs(self._iteration + 1)

    @torch.no_grad()
    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int) -> bool:
        """Act for n_rollout_steps in every environment and fill the rollout; False if a callback ended training."""
        policy, features, sample = self.policy, rollout_buffer["features"], rollout_buffer["sample"]
        policy.set_training_mode(False)
        callback.on_rollout_start()
        shape, draws, memory = (n_rollout_steps, env.num_envs), policy.actor.draws, self._exploration
        size = (n_rollout_steps, draws + (memory.terms - 1 if memory else 0), env.num_envs, policy.action_dim)
        noise = torch.randn(size, generator=self._generator, device=self.device)
        moments: list[tuple[Tensor, Tensor]] = []  # of the action noise given its past
        host_rewards = np.zeros(shape, np.float32)
        terminated, truncated, left_out = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape, bool)
        reached: list[Tensor] = []  # raw features of truncated steps, in the order of np.nonzero(truncated)
        features[0] = self._features(self._last_obs)
        for step in range(n_rollout_steps):
            if memory is not None:  # its first normal lies where that of the action does, the others last
                normal = torch.cat([noise[step, 1:2], noise[step, draws:]])
                start = torch.as_tensor(self._last_episode_starts, dtype=torch.bool, device=self.device)
                noise[step, 1], *given = memory.step(normal, start)
                moments.append((given[0], given[1]))
            sample[step] = self._act(features[step], noise[step, :draws])
            actions = sample[step, 2].cpu().numpy().reshape(-1, *self._action_shape)
            self._check_actions(actions)
            clipped_actions = policy.unscale_action(actions.clip(-1, 1))
            new_obs, rewards, dones, infos = env.step(clipped_actions)
            self.num_timesteps += env.num_envs
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._update_info_buffer(infos, dones)
            new_obs, left_out[step] = self._screen(new_obs, rewards, dones, infos)
            host_rewards[step], terminated[step] = np.where(left_out[step], 0, rewards), dones
            for i in np.flatnonzero(dones).tolist():
                self._diverged += int(infos[i].get("simulation_diverged", False))
                if infos[i].get("TimeLimit.truncated", False):
                    terminated[step, i], truncated[step, i] = False, True
                    reached.append(self._features(batch_of_one(infos[i]["terminal_observation"])))
            features[step + 1] = self._features(new_obs)
            self._last_obs, self._last_episode_starts = new_obs, dones
        self.logger.record("rollout/simulations_diverged", self._diverged)
        self._record_faults()

        if policy.obs_norm.count == 0:
            # A new field is zero: no action has looked at an observation yet, so the first statistics change nothing
            # that was done, and learning need not start from raw observations.
            policy.obs_norm.update(features[:-1].flatten(0, 1))
        to_device = partial(torch.as_tensor, device=self.device)
        all_obs = policy.normalize(features.flatten(0, 1))
        all_values = policy.value(all_obs).view(-1, env.num_envs)
        values, next_values = all_values[:-1], all_values[1:].clone()
        # Bootstrap with the value of the state reached: after a time limit that is not the next row's.
        if reached:
            next_values[to_device(truncated)] = policy.value(policy.normalize(to_device(torch.cat(reached)).float()))
        terminated |= left_out
        ended = terminated | truncated
        scaled = to_device(self._scale_rewards(host_rewards, ended))
        if left_out.any():  # advantage 0 there: those before see V(s_t) and nothing of what follows
            scaled = torch.where(to_device(left_out), values, scaled)
        advantages = generalized_advantage(
            scaled, values, next_values, to_device(terminated).float(), to_device(ended).float(), self.gamma,
            self.gae_lambda,
        )  # fmt: skip
        obs = all_obs[: values.numel()]
        z, x1, action = sample.transpose(0, 1).flatten(1, 2)
        base_mean, base_log_std = policy.actor.base(obs)
        self.batch = {
            "obs": obs,
            "z": z,
            "x1": x1,
            "action": action,
            "base_mean": base_mean,
            "base_log_std": base_log_std,
            "log_std": policy.actor.noise_log_std().expand_as(base_mean),
            "values": values.flatten(),
            "returns": (advantages + values).flatten(),
            "advantages": advantages.flatten(),
        }
        if moments:
            mean, scale = zip(*moments, strict=True)
            self.batch |= {"noise_mean": torch.cat(mean), "noise_scale": torch.cat(scale)}
        if draws > 2:
            self.batch["path"] = noise[:, 2:draws].transpose(1, 2).flatten(0, 1)
        if left_out.any():
            self.batch = replaced(self.batch, to_device(left_out).flatten(), self._generator)
        callback.on_rollout_end()
        return True

    def _features(self, obs: Any) -> Tensor:
        """Raw observation vectors [N, O]."""
        return torch.from_numpy(observation_vectors(obs, self.observation_space))

    def _scale_rewards(self, rewards: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """Divide rewards [T, N] by the running standard deviation of the discounted return, clipped to +-10."""
        if not self.normalize_reward:
            return rewards
        returns = np.empty_like(rewards)
        for t in range(len(rewards)):
            returns[t] = rewards[t] + self.gamma * self._discounted_return
            self._discounted_return = returns[t] * ~ended[t]
        self.policy.return_norm.update(torch.as_tensor(returns, device=self.device).view(-1, 1))
        return (rewards * self.policy.return_norm.scale.item()).clip(-10, 10)
