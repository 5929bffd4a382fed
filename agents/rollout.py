"""Rollouts of a flow policy: environment steps, rewards in units of their return, advantages."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from .flow_policy import FlowPolicy

Batch: TypeAlias = dict[str, Tensor]
"""Samples of a rollout, first axis B = steps x environments:

obs [B, O] (normalised); z, x1, action [B, D]; base_mean, base_log_std, log_std [B, D] of the policy that acted;
values, returns, advantages [B]; and what the ratio in use records.
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


class FlowRollouts(OnPolicyAlgorithm):
    """The half of an on-policy agent that lies between the environments and the batch to learn from.

    Subclasses build the policy and call `_setup_rollout`, then learn from `batch` in `train`.
    """

    policy: FlowPolicy  # type: ignore[assignment]  # SB3 asks for more of its policies than its loops use
    batch: Batch
    normalize_reward: bool

    def _setup_rollout(self) -> None:
        steps, dim = (self.n_steps, self.n_envs), self.policy.action_dim
        sizes = {"raw_obs": self.policy.obs_dim, "z": dim, "x1": dim, "action": dim}
        # SB3's learn() hands this attribute to collect_rollouts. Ours: plain tensors on the device.
        self.rollout_buffer: Batch = {  # type: ignore[assignment]
            name: torch.empty(*steps, size, device=self.device) for name, size in sizes.items()
        }
        self._discounted_return = torch.zeros(self.n_envs, device=self.device)
        assert isinstance(self.action_space, spaces.Box)
        self._action_shape = self.action_space.shape

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed Python, NumPy, PyTorch, the environments and the agent's own generator."""
        super().set_random_seed(seed)
        self._generator = torch.Generator(self.device)
        # Resuming at num_timesteps must not replay the noise of the start.
        self._generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed + self.num_timesteps)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "batch", "ratio", "_generator", "_discounted_return"]

    @torch.no_grad()
    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int) -> bool:
        """Act for n_rollout_steps in every environment and fill the rollout; False if a callback ended training."""
        policy, rollout = self.policy, rollout_buffer
        policy.set_training_mode(False)
        callback.on_rollout_start()
        shape = (n_rollout_steps, env.num_envs)
        noise = torch.randn(
            n_rollout_steps, 2, env.num_envs, policy.action_dim, generator=self._generator, device=self.device
        )
        host_rewards, terminated, truncated = np.zeros(shape, np.float32), np.zeros(shape, bool), np.zeros(shape, bool)
        reached: list[Tensor] = []  # raw observations of truncated steps, in the order of np.nonzero(truncated)
        raw_obs = self._checked_features(self._last_obs)
        for step in range(n_rollout_steps):
            sample = policy.actor.sample(policy.normalize(raw_obs), noise[step])
            actions = sample.action.cpu().numpy().reshape(-1, *self._action_shape)
            clipped_actions = policy.unscale_action(actions.clip(-1, 1))
            new_obs, rewards, dones, infos = env.step(clipped_actions)
            self.num_timesteps += env.num_envs
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._update_info_buffer(infos, dones)
            if not np.isfinite(rewards).all():
                i = int(np.flatnonzero(~np.isfinite(rewards))[0])
                raise ValueError(f"non-finite reward: got {rewards[i]} from environment {i}, expected a finite number")
            host_rewards[step], terminated[step] = rewards, dones
            for i in np.flatnonzero(dones).tolist():
                if infos[i].get("TimeLimit.truncated", False):
                    terminated[step, i], truncated[step, i] = False, True
                    reached.append(self._checked_features(_batch_of_one(infos[i]["terminal_observation"]), first=i))
            rollout["raw_obs"][step] = raw_obs
            rollout["z"][step], rollout["x1"][step], rollout["action"][step] = sample
            self._last_obs, self._last_episode_starts = new_obs, dones  # type: ignore[assignment]
            raw_obs = self._checked_features(new_obs)

        if policy.obs_norm.count == 0:
            # A new field is zero: no action has looked at an observation yet, so the first statistics change nothing
            # that was done, and learning need not start from raw observations.
            policy.obs_norm.update(rollout["raw_obs"].flatten(0, 1))
        to_device = partial(torch.as_tensor, device=self.device)
        obs = policy.normalize(rollout["raw_obs"].flatten(0, 1))
        values = policy.value(obs).view(shape)
        # Bootstrap with the value of the state reached: after a time limit that is not the next row's.
        next_values = torch.cat([values[1:], policy.value(policy.normalize(raw_obs)).unsqueeze(0)])
        if reached:
            next_values[to_device(truncated)] = policy.value(policy.normalize(torch.cat(reached)))
        ended = to_device(terminated | truncated).float()
        scaled = self._scale_rewards(to_device(host_rewards), ended)
        advantages = generalized_advantage(
            scaled, values, next_values, to_device(terminated).float(), ended, self.gamma, self.gae_lambda
        )
        base_mean, base_log_std = policy.actor.base(obs)
        self.batch = {
            "obs": obs,
            "z": rollout["z"].flatten(0, 1),
            "x1": rollout["x1"].flatten(0, 1),
            "action": rollout["action"].flatten(0, 1),
            "base_mean": base_mean,
            "base_log_std": base_log_std,
            "log_std": policy.actor.noise_log_std().expand_as(base_mean),
            "values": values.flatten(),
            "returns": (advantages + values).flatten(),
            "advantages": advantages.flatten(),
        }
        callback.on_rollout_end()
        return True

    def _checked_features(self, obs: Any, first: int = 0) -> Tensor:
        """Raw observation vectors [N, O] on the device; the first row is that of environment `first`.

        Raises:
            ValueError: if one is not finite.
        """
        features = self.policy.features(obs_as_tensor(obs, self.device))
        if not torch.isfinite(features).all():
            i, j = (~torch.isfinite(features)).nonzero()[0].tolist()
            raise ValueError(
                f"non-finite observation: got {features[i, j].item()} in entry {j} of environment {first + i}, "
                "expected finite numbers; check the environment, or clip the actions it receives"
            )
        return features

    def _scale_rewards(self, rewards: Tensor, ended: Tensor) -> Tensor:
        """Divide rewards [T, N] by the running standard deviation of the discounted return, clipped to +-10."""
        if not self.normalize_reward:
            return rewards
        returns = torch.empty_like(rewards)
        for t in range(len(rewards)):
            returns[t] = rewards[t] + self.gamma * self._discounted_return
            self._discounted_return = returns[t] * (1 - ended[t])
        self.policy.return_norm.update(returns.view(-1, 1))
        return (rewards / self.policy.return_norm.std).clamp(-10, 10)


def _batch_of_one(obs: Any) -> Any:
    return {k: v[None] for k, v in obs.items()} if isinstance(obs, dict) else np.asarray(obs)[None]
