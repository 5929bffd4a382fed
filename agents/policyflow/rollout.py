"""Rollouts of a flow policy: environment steps, rewards in units of their return, advantages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from ...dynamics.noise import StepNoise, step_noise
from ...envs.tensor import OnDemand, TensorVecEnv, indexed
from ..common.networks import lazy_zeros
from ..common.observations import batch_of_one, blame, observation_vectors, to_box
from .advantages import chunk_advantage, discounted_returns, generalized_advantage
from .chunks import ChunkQueue
from .policy import FlowNoise, FlowSample
from .ranked import Ranked
from .ratios import PastNoise, Samples
from .rollout_view import Collected, RolloutView


class RolloutStorage(NamedTuple):
    """What the environment steps of a rollout fill, on the device: T steps of N environments."""

    features: Tensor  # raw observation vectors, [T + 1, N, O]; the last is what follows
    drawn: Tensor  # `FlowSample`s in one tensor, [3, T, N, D]


class Steps(NamedTuple):
    """What the environments returned in a rollout, [T, N] each."""

    rewards: Tensor
    terminated: Tensor  # bool
    truncated: Tensor  # bool
    reached: Tensor | None  # raw observations that truncated steps reached, [K, O]; None: no step was
    decided: np.ndarray  # where the policy chose an action
    left_out: Tensor | None  # transitions not to learn from; None: none
    moments: list[PastNoise]  # of each step, where the action noise is correlated


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch use one thread meanwhile: in rollouts its others would wait in the simulator's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class FlowRollouts(Ranked):
    """The half of an on-policy agent that lies between the environments and the samples to learn from.

    Subclasses build the policy and call `_setup_rollout`, then learn from `samples` in `train`.
    """

    samples: Samples
    rollout_buffer: RolloutView  # type: ignore[assignment]  # to read: SB3's learn() hands it to collect_rollouts
    storage: RolloutStorage
    collected: Collected | None = None  # the last rollout, None while one is collected
    _act: Callable[[Tensor, Tensor], Tensor]  # FlowPolicy.act, perhaps compiled
    _decision_steps: int  # from one decision to the next
    _exploration: StepNoise | None  # action noise with memory, which lasts from rollout to rollout
    _remade = ("_expert_data", "_decision_steps", "samples", "_ratio", "_monitor", "_discounted_return", "_act",
               "_objective", "_gradient", "_step", "_exploration", "storage", "collected", "steps_collected", "_ranks",
               "_before", "_ended")  # fmt: skip

    def _setup_rollout(self) -> None:
        config, envs, size = self.config, self.n_envs, (self.n_envs, self.policy.action_dim)
        self._exploration, self._decision_steps = None, config.decision_steps
        if (kind := config.exploration_noise) != "gaussian":
            self._exploration = step_noise(kind, config.noise_time, config.hurst, size, self.device)
        self.rollout_buffer = RolloutView(self)
        self.storage = RolloutStorage(
            lazy_zeros(self.n_steps + 1, envs, self.policy.obs_dim, device=self.device, option="n_steps"),
            lazy_zeros(3, self.n_steps, *size, device=self.device, option="n_steps"),
        )
        self._discounted_return = torch.zeros(envs, device=self.device)
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
        self._discounted_return = torch.as_tensor(state["discounted_return"], device=self.device)
        for name, value in state["exploration"].items():
            setattr(self._exploration, name, value.to(self.device))

    def dump_logs(self, iteration: int = 0) -> None:
        """As Stable-Baselines3, but a run that goes on goes on counting its iterations."""
        super().dump_logs(self._iteration + 1)

    @one_thread()
    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int) -> bool:
        """Act for n_rollout_steps in every environment and fill the rollout; False if a callback ended training."""
        config, policy, (features, drawn) = self.config, self.policy, self.storage
        self.collected, self.steps_collected, begins = None, 0, np.asarray(self._last_episode_starts)
        policy.train(False)
        callback.on_rollout_start()
        noise, further = self._draw_noise(n_rollout_steps, env.num_envs)
        if self._stays_on_device(env):
            assert isinstance(env, TensorVecEnv)
            steps = self._act_on_device(env, callback, noise, further)
            if steps is None:
                return False
            self._record_counts({"rollout/simulations_diverged": self._diverged})
            self._fill(steps, begins, noise)
            callback.on_rollout_end()
            return True
        if several := self._ranks.size > 1:
            self._begin_rollout()
        shape, moments = (n_rollout_steps, env.num_envs), list[PastNoise]()
        host_rewards = np.zeros(shape, np.float32)
        terminated, truncated, left_out = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape, bool)
        reached: list[Tensor] = []  # raw features of truncated steps, in the order of np.nonzero(truncated)
        features[0] = self._features(self._last_obs)
        decided, due = np.ones(shape, bool), np.ones(env.num_envs, bool)
        chunk_shape = env.num_envs, config.chunk, *self._action_shape
        queue = ChunkQueue(chunk_shape, self._decision_steps) if config.chunk > 1 else None
        for step in range(n_rollout_steps):
            if self._exploration is not None:
                start = torch.as_tensor(self._last_episode_starts, dtype=torch.bool, device=self.device)
                moments.append(self._remember(noise[step], further[step], start))
            if queue is not None:
                decided[step] = due = queue.due(self._last_episode_starts)
            if due.any():
                with torch.no_grad():
                    drawn[:, step] = self._act(features[step], noise[step])
                chunks = _to_host(FlowSample(*drawn[:, step]).action).reshape(chunk_shape)
                self._check_actions(chunks)
            actions = chunks[:, 0] if queue is None else queue.next(chunks, due)
            clipped_actions = to_box(actions.clip(-1, 1), self.action_space)
            new_obs, rewards, dones, infos = env.step(clipped_actions)
            self.num_timesteps += env.num_envs * self._ranks.size
            callback.update_locals(locals())
            goes_on = callback.on_step()
            self._update_info_buffer(infos, dones)
            if several:
                self._note(infos, dones)
            new_obs, left_out[step] = self._screen(new_obs, rewards, dones, infos)
            if not goes_on:  # an agent that learns again begins where the environments are
                self._last_obs, self._last_episode_starts = new_obs, dones
                if several:
                    self._agree(stops=True)
                return False
            host_rewards[step], terminated[step] = np.where(left_out[step], 0, rewards), dones
            for i in np.flatnonzero(dones).tolist():
                self._diverged += int(infos[i].get("simulation_diverged", False))
                if infos[i].get("TimeLimit.truncated", False):
                    terminated[step, i], truncated[step, i] = False, True
                    reached.append(self._features(batch_of_one(infos[i]["terminal_observation"])))
            features[step + 1] = self._features(new_obs)
            self._last_obs, self._last_episode_starts = new_obs, dones
            self.steps_collected = step + 1
        if several and self._agree(stops=False):  # a callback of another rank ended training
            return False
        self._record_counts({"rollout/simulations_diverged": self._diverged})
        self._record_faults()
        parts = [torch.as_tensor(each, device=self.device) for each in (host_rewards, terminated, truncated)]
        ends = torch.cat(reached).to(self.device).float() if reached else None
        excluded = torch.as_tensor(left_out, device=self.device) if left_out.any() else None
        self._fill(Steps(parts[0], parts[1], parts[2], ends, decided, excluded, moments), begins, noise)
        callback.on_rollout_end()
        return True

    def _draw_noise(self, steps: int, envs: int) -> tuple[Tensor, Tensor]:
        """All noise of a rollout: of each step the `FlowNoise`, and what correlated action noise takes beyond it."""
        further = self._exploration.further_draws if self._exploration else 0
        size = (steps, self.policy.draws + further, envs, self.policy.action_dim)
        drawn = torch.randn(size, generator=self._generator, device=self.device)
        noise, rest = drawn.split((self.policy.draws, further), dim=1)
        return noise, rest

    def _remember(self, noise: Tensor, further: Tensor, start: Tensor) -> PastNoise:
        """Correlate a step's action noise, in place, with that of the steps before it; start: [N]."""
        assert self._exploration is not None
        normal = FlowNoise.of(noise).action
        value, *given = self._exploration.step(torch.cat([normal[None], further]), start)
        normal.copy_(value)
        return PastNoise(*given)

    def _stays_on_device(self, env: VecEnv) -> bool:
        """Whether a rollout needs the host only at its end."""
        plain = self.config.chunk == 1 and self.config.nonfinite == "raise" and self._ranks.size == 1
        if not (plain and isinstance(env, TensorVecEnv) and env.device == indexed(self.device)):
            return False
        kind = type(env)  # what a subclass does with rewards or actions must be done
        return (kind.step_wait, kind.step_async) == (TensorVecEnv.step_wait, TensorVecEnv.step_async)

    @torch.no_grad()
    def _act_on_device(self, env: TensorVecEnv, callback: BaseCallback, noise: Tensor, further: Tensor) -> Steps | None:
        """The steps of a rollout whose environments are tensors; None if a callback ended training.

        Nothing waits for the device before the last step is done, unless a callback looks at infos or dones.

        Raises:
            ValueError: if an observation, an action or a reward is not finite.
            RuntimeError: if the environments were not reset yet.
        """
        if not hasattr(env, "obs"):
            raise RuntimeError("learn: the environments have no first observation yet, call reset before")
        policy, (features, drawn), envs = self.policy, self.storage, env.num_envs
        rewards, moments = features.new_empty(len(noise), envs), list[PastNoise]()
        terminated, truncated = torch.empty(2, *rewards.shape, dtype=torch.bool, device=self.device)
        reached = torch.empty_like(features[1:])
        start = torch.as_tensor(self._last_episode_starts, dtype=torch.bool, device=self.device)
        features[0] = env.obs
        goes_on = True
        for step in range(len(noise)):
            if self._exploration is not None:
                moments.append(self._remember(noise[step], further[step], start))
            drawn[:, step] = self._act(features[step], noise[step])
            action = FlowSample(*drawn[:, step]).action.clone()  # the storage is written to anew in the next rollout
            clipped = policy.to_units(action.clamp(-1, 1))
            result = env.step_tensor(clipped)
            features[step + 1], rewards[step], terminated[step], truncated[step], reached[step] = result[:5]
            start = result.terminated | result.truncated
            self.num_timesteps += envs
            arrays = {"new_obs": result.obs, "rewards": result.reward, "dones": start, "actions": action,
                      "clipped_actions": clipped}  # fmt: skip
            shown = {name: OnDemand(envs, partial(_to_host, each)) for name, each in arrays.items()}
            callback.update_locals({**locals(), **shown, "infos": OnDemand(envs, partial(env.infos, result))})
            with torch.enable_grad():
                goes_on = callback.on_step()
            self.steps_collected = step + 1
            if not goes_on:
                break
        self._last_obs, self._last_episode_starts = env.obs.cpu().numpy(), start.cpu().numpy()
        before, episodes = env.diverged, env.episodes()
        self._diverged += env.diverged - before
        self._update_info_buffer(episodes, np.ones(len(episodes), bool))
        if not goes_on:
            return None
        named = [(features[1:], "observation"), (rewards, "reward"), (drawn[2], "action")]
        if not all(each.isfinite().all() for each in policy.actor.parameters()):
            named.reverse()  # what the environments return then follows from the actions
        for values, what in named:
            if not values.isfinite().all():
                raise ValueError(f"non-finite {what}: expected finite numbers; {blame(policy)}")
        ends = reached[truncated]
        decided = np.ones(rewards.shape, bool)
        return Steps(rewards, terminated, truncated, ends if len(ends) else None, decided, None, moments)

    @torch.no_grad()
    def _fill(self, steps: Steps, begins: np.ndarray, noise: Tensor) -> None:
        """Make samples of a rollout's steps: normalised, with values and advantages.

        Args:
            steps: what the environments returned.
            begins: whether an episode began with the first step, [N].
            noise: what the policy drew from, [T, draws, N, D].
        """
        config, policy, (features, drawn) = self.config, self.policy, self.storage
        if policy.obs_norm.count == 0:
            # A new field is zero: no action has looked at an observation yet, so the first statistics change nothing
            # that was done, and learning need not start from raw observations.
            policy.obs_norm.update(features[:-1].flatten(0, 1), self._ranks)
        all_obs = policy.obs_norm(features.flatten(0, 1))
        all_values = policy.value(all_obs).view(len(features), -1)
        values, next_values = all_values[:-1], all_values[1:].clone()
        # Bootstrap with the value of the state reached: after a time limit that is not the next row's.
        if steps.reached is not None:
            next_values[steps.truncated] = policy.value(policy.obs_norm(steps.reached))
        terminated, left_out = steps.terminated, steps.left_out
        starts = torch.cat([torch.as_tensor(begins, device=self.device)[None], (terminated | steps.truncated)[:-1]])
        if left_out is not None:
            terminated = terminated | left_out
        ended = terminated | steps.truncated
        scaled = self._scale_rewards(steps.rewards, starts[0], ended)
        if left_out is not None:  # advantage 0 there: those before see V(s_t) and nothing of what follows
            scaled = torch.where(left_out, values, scaled)
        ends = terminated.float(), ended.float()
        if self._decision_steps > 1:
            decided = torch.as_tensor(steps.decided, device=self.device)
            over = *ends, decided.float()
            advantages = chunk_advantage(scaled, values, next_values, *over, self.gamma, self.gae_lambda)
        else:
            advantages = generalized_advantage(scaled, values, next_values, *ends, self.gamma, self.gae_lambda)
        obs, moments, path_length = all_obs[: values.numel()], steps.moments, policy.actor.path_length
        self.samples = Samples.drawn(
            policy.actor,
            obs,
            FlowSample(*drawn.flatten(1, 2)),
            values=values.flatten(),
            returns=(advantages + values).flatten(),
            advantages=advantages.flatten(),
            past=PastNoise(*(torch.cat(each) for each in zip(*moments, strict=True))) if moments else None,
            path=FlowNoise.of(noise.transpose(0, 1)).path.movedim(0, 2).flatten(0, 1) if path_length else None,
        )
        host_starts = starts.float().cpu().numpy()
        self.collected = Collected(self.samples, scaled, host_starts, steps.decided, policy.actor.norms())
        if self._decision_steps > 1:
            usable = (decided if left_out is None else decided & ~left_out).flatten()
            rows = drawn_rows(usable, config.decisions(self.n_envs), self._generator)
            self.samples = self.samples.rows(rows)
        elif left_out is not None:
            self.samples = self.samples.rows(_replacements(left_out.flatten(), self._generator))

    def _features(self, obs: Any) -> Tensor:
        """Raw observation vectors [N, O]."""
        return torch.from_numpy(observation_vectors(obs, self.observation_space))

    def _scale_rewards(self, rewards: Tensor, begins: Tensor, ended: Tensor) -> Tensor:
        """Divide rewards [T, N] by the running standard deviation of the discounted return, clipped to +-10.

        Args:
            rewards: of the steps.
            begins: bool [N], whether an episode began with the first of them, also by a reset.
            ended: bool [T, N], whether one ended with a step.
        """
        if not self.config.normalize_reward:
            return rewards
        returns = discounted_returns(rewards, ended, self._discounted_return * ~begins, self.gamma)
        self._discounted_return = returns[-1] * ~ended[-1]
        self.policy.return_norm.update(returns.view(-1, 1), self._ranks)
        return (rewards * self.policy.return_norm.scale).clip(-10, 10)


def _to_host(tensor: Tensor) -> np.ndarray:
    """A copy, also on a CPU: who keeps or changes it has nothing of what the agent learns from."""
    array: np.ndarray = tensor.to("cpu", copy=True).numpy()
    return array


def _rows(usable: Tensor) -> Tensor:
    """The rows that are usable, bool [B].

    Raises:
        ValueError: if none is.
    """
    rows = usable.nonzero().squeeze(1)
    if not len(rows):
        raise ValueError("non-finite rollout: got no transition of finite numbers; check the environment")
    return rows


def _replacements(left_out: Tensor, generator: torch.Generator) -> Tensor:
    """Rows to take, [B], where those left out, [B], are replaced by others drawn at random: the number is the same."""
    kept = _rows(~left_out)
    drawn = kept[torch.randint(len(kept), (len(left_out),), generator=generator, device=kept.device)]
    return torch.where(left_out, drawn, torch.arange(len(left_out), device=kept.device))


def drawn_rows(usable: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """So many of the usable rows, bool [B], at random and without repetition as far as they last, in their order."""
    rows = _rows(usable)
    order = torch.randperm(len(rows), generator=generator, device=rows.device)[:count]
    more = torch.randint(len(rows), (count - len(order),), generator=generator, device=rows.device)
    return rows[torch.cat([order, more])].sort().values
