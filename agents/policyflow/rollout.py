"""Rollouts of a flow policy: environment steps, rewards in units of their return, advantages, minibatches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from ...dynamics.noise import StepNoise, step_noise
from ..common.networks import lazy_zeros
from ..common.observations import batch_of_one, observation_vectors, to_box
from .chunks import ChunkQueue, chunk_advantage, drawn_rows
from .policy import FlowActor, FlowNoise, FlowSample
from .ranked import Ranked
from .rollout_view import Collected, RolloutView

if TYPE_CHECKING:
    from .pretraining import Expert


class Chord(NamedTuple):
    """A point x_t = (1 - t) z + t x1 of each sample's chord, and the velocity of the policy that acted there."""

    t: Tensor  # flow time, [B]
    velocity: Tensor  # v_old(t, x_t, s), [B, D]


class PastNoise(NamedTuple):
    """Moments of correlated action noise given its past, in units of its standard deviation."""

    mean: Tensor  # [B, D]
    scale: Tensor  # [B, 1]


class Samples(NamedTuple):
    """Samples of a rollout, of an epoch or of a minibatch; first axis B, in a rollout steps x environments.

    Optional parts are decided by the Config: a run has them in all its minibatches or in none.
    """

    obs: Tensor  # normalised, [B, O]
    z: Tensor  # [B, D], as are the next two: normalised action units
    x1: Tensor
    action: Tensor  # not clipped
    base_mean: Tensor  # of the policy that acted, [B, D], as are the next two
    base_log_std: Tensor
    log_std: Tensor  # of the action noise
    values: Tensor  # V(s) of the policy that acted, in units of normalised returns, [B], as are the next two
    returns: Tensor
    advantages: Tensor
    past: PastNoise | None = None  # where the action noise is correlated
    path: Tensor | None = None  # noise of the flow, [B, K, D], where it is no ODE
    recorded: Any = None  # what the ratio in use recorded of the policy that acted: a NamedTuple of its own
    chord: Chord | None = None  # where ratio or regularizers look at the chord
    spread_rate: Tensor | None = None  # of the linear field that reaches spread_std, [B, D], where it is aimed at
    posterior_noise: Tensor | None = (
        None  # E[n | a, s] of the action noise, [B, D], where the entropy's gradient is used
    )
    expert: Expert | None = None  # demonstrations to learn from beside the rollout, where bc_coef is above 0
    error_time: Tensor | None = None  # [B], where the solver's error is penalised

    @classmethod
    def drawn(cls, actor: FlowActor, obs: Tensor, sample: FlowSample, **others: Any) -> Samples:
        """What an actor drew given obs [B, O], each part [B, D], and what is to be known of it.

        Args:
            actor: the policy that acted.
            obs: normalised observations.
            sample: the draw.
            **others: further fields; values, returns and advantages are 0 unless given.
        """
        base_mean, base_log_std = actor.base(obs)
        log_std = actor.noise_log_std().expand_as(base_mean)
        others = dict.fromkeys(("values", "returns", "advantages"), obs.new_zeros(len(obs))) | others
        return cls(obs, *sample, base_mean, base_log_std, log_std, **others)

    def rows(self, index: Tensor | slice) -> Samples:
        """The samples that an index of the first axis chooses."""
        chosen: Samples = _rows(self, index)
        return chosen

    def minibatches(self, size: int, order: Tensor) -> Iterator[Samples]:
        """Minibatches of `size` samples in an order [B]; the last may be smaller."""
        return iter(_split(self.rows(order), int(size)))  # split takes no NumPy integers


def _rows(data: Any, index: Tensor | slice) -> Any:
    if isinstance(data, tuple):
        return type(data)(*[_rows(part, index) for part in data])  # a NamedTuple
    return None if data is None else data[index]


def _split(data: Any, size: int) -> Iterable[Any]:
    """The parts of `size` rows, in their order; cheaper than one after the other."""
    if isinstance(data, Tensor):
        parts: tuple[Tensor, ...] = data.split(size)
        return parts
    if not data:  # None, or nothing recorded
        return repeat(data)
    return map(type(data)._make, zip(*[_split(part, size) for part in data], strict=False))


class RolloutStorage(NamedTuple):
    """What the environment steps of a rollout fill, on the device: T steps of N environments."""

    features: Tensor  # raw observation vectors, [T + 1, N, O]; the last is what follows
    drawn: Tensor  # `FlowSample`s in one tensor, [3, T, N, D]


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
    _exploration: StepNoise | None  # action noise with memory, which lasts from rollout to rollout
    _remade = ("_expert_data", "samples", "_ratio", "_monitor", "_discounted_return", "_act", "_objective", "_gradient",
               "_step", "_exploration", "storage", "collected", "steps_collected", "_ranks", "_before",
               "_ended")  # fmt: skip

    def _setup_rollout(self) -> None:
        config, envs, size = self.config, self.n_envs, (self.n_envs, self.policy.action_dim)
        self._exploration = None
        if (kind := config.exploration_noise) != "gaussian":
            self._exploration = step_noise(kind, config.noise_time, config.hurst, size, self.device)
        self.rollout_buffer = RolloutView(self)
        self.storage = RolloutStorage(
            lazy_zeros(self.n_steps + 1, envs, self.policy.obs_dim, device=self.device, option="n_steps"),
            lazy_zeros(3, self.n_steps, *size, device=self.device, option="n_steps"),
        )
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

    @one_thread()
    @torch.no_grad()
    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int) -> bool:
        """Act for n_rollout_steps in every environment and fill the rollout; False if a callback ended training."""
        config, policy, (features, drawn) = self.config, self.policy, self.storage
        self.collected, self.steps_collected, begins = None, 0, self._last_episode_starts
        policy.train(False)
        callback.on_rollout_start()
        if several := self._ranks.size > 1:
            self._begin_rollout()
        shape, memory, path_length = (n_rollout_steps, env.num_envs), self._exploration, policy.actor.path_length
        # Per step the `FlowNoise`, and further normals of an action noise whose memory takes several.
        further_terms = memory.terms - 1 if memory else 0  # the newest is the action's own
        parts = (policy.draws, further_terms)
        size = (n_rollout_steps, sum(parts), env.num_envs, policy.action_dim)
        noise, further = torch.randn(size, generator=self._generator, device=self.device).split(parts, dim=1)
        moments: list[PastNoise] = []
        host_rewards = np.zeros(shape, np.float32)
        terminated, truncated, left_out = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape, bool)
        reached: list[Tensor] = []  # raw features of truncated steps, in the order of np.nonzero(truncated)
        features[0] = self._features(self._last_obs)
        decided, queue = np.empty(shape, bool), ChunkQueue(env.num_envs, config.decision_steps)
        chunk_shape = env.num_envs, config.chunk, *self._action_shape
        for step in range(n_rollout_steps):
            if memory is not None:
                start = torch.as_tensor(self._last_episode_starts, dtype=torch.bool, device=self.device)
                normal = FlowNoise.of(noise[step]).action
                value, *given = memory.step(torch.cat([normal[None], further[step]]), start)
                normal.copy_(value)
                moments.append(PastNoise(*given))
            decided[step] = queue.due(np.asarray(self._last_episode_starts))
            if decided[step].any():
                drawn[:, step] = self._act(features[step], noise[step])
                chunks = FlowSample(*drawn[:, step]).action.cpu().numpy().reshape(chunk_shape)
                self._check_actions(chunks)
            actions = queue.next(chunks, decided[step])
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

        if policy.obs_norm.count == 0:
            # A new field is zero: no action has looked at an observation yet, so the first statistics change nothing
            # that was done, and learning need not start from raw observations.
            policy.obs_norm.update(features[:-1].flatten(0, 1), self._ranks)
        to_device = partial(torch.as_tensor, device=self.device)
        all_obs = policy.obs_norm(features.flatten(0, 1))
        all_values = policy.value(all_obs).view(-1, env.num_envs)
        values, next_values = all_values[:-1], all_values[1:].clone()
        # Bootstrap with the value of the state reached: after a time limit that is not the next row's.
        if reached:
            next_values[to_device(truncated)] = policy.value(policy.obs_norm(to_device(torch.cat(reached)).float()))
        starts = np.concatenate([np.asarray(begins)[None], (terminated | truncated)[:-1]]).astype(np.float32)
        terminated |= left_out
        ended = terminated | truncated
        scaled = to_device(self._scale_rewards(host_rewards, ended))
        if left_out.any():  # advantage 0 there: those before see V(s_t) and nothing of what follows
            scaled = torch.where(to_device(left_out), values, scaled)
        ends = to_device(terminated).float(), to_device(ended).float()
        if config.decision_steps > 1:
            over = *ends, to_device(decided).float()
            advantages = chunk_advantage(scaled, values, next_values, *over, self.gamma, self.gae_lambda)
        else:
            advantages = generalized_advantage(scaled, values, next_values, *ends, self.gamma, self.gae_lambda)
        obs = all_obs[: values.numel()]
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
        self.collected = Collected(self.samples, scaled, starts, decided, policy.actor.norms())
        if config.decision_steps > 1:
            usable = to_device(decided & ~left_out).flatten()
            rows = drawn_rows(usable, config.decisions(env.num_envs), self._generator)
            self.samples = self.samples.rows(rows)
        elif left_out.any():
            self.samples = self.samples.rows(_replacements(to_device(left_out).flatten(), self._generator))
        callback.on_rollout_end()
        return True

    def _features(self, obs: Any) -> Tensor:
        """Raw observation vectors [N, O]."""
        return torch.from_numpy(observation_vectors(obs, self.observation_space))

    def _scale_rewards(self, rewards: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """Divide rewards [T, N] by the running standard deviation of the discounted return, clipped to +-10."""
        if not self.config.normalize_reward:
            return rewards
        returns = np.empty_like(rewards)
        for t in range(len(rewards)):
            returns[t] = rewards[t] + self.gamma * self._discounted_return
            self._discounted_return = returns[t] * ~ended[t]
        self.policy.return_norm.update(torch.as_tensor(returns, device=self.device).view(-1, 1), self._ranks)
        return (rewards * self.policy.return_norm.scale.item()).clip(-10, 10)


def _replacements(left_out: Tensor, generator: torch.Generator) -> Tensor:
    """Rows to take, [B], where those left out, [B], are replaced by others drawn at random: the number is the same.

    Raises:
        ValueError: if every row is left out.
    """
    kept = (~left_out).nonzero().squeeze(1)
    if not len(kept):
        raise ValueError("non-finite rollout: got no transition of finite numbers; check the environment")
    drawn = kept[torch.randint(len(kept), (len(left_out),), generator=generator, device=kept.device)]
    return torch.where(left_out, drawn, torch.arange(len(left_out), device=kept.device))
