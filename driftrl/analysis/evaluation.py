"""Evaluation of a policy: complete episodes in both modes, as numbers and as a table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from ..envs import make_vec
from ..envs.make import has_time_limit
from .multimodality import format_multimodality, has_several_solutions, multimodality
from .statistics import bootstrap_interval, interquartile_mean

EVALUATION_SEED = 1_000_000  # far from the seeds that training runs use
_MAX_ENVS = 10
MAX_STEPS = 10_000
"""Longest episode of an environment that has no time limit of its own."""


@dataclass(frozen=True)
class Evaluation:
    """Returns and lengths of the episodes of one evaluation, and how many more were left out (`_SoundEpisodes`).

    `successes` tells of each episode whether it ended in success; it is empty where the task does not say.
    """

    returns: list[float]
    lengths: list[int]
    left_out: int
    successes: list[bool]

    @property
    def success_rate(self) -> float | None:
        """Share of the episodes that ended in success, by the last `info["is_success"]`; None if the task has none."""
        return float(np.mean(self.successes)) if self.successes else None

    def summary(self) -> dict[str, float]:
        """Statistics of the returns, with a 95 % bootstrap interval of the IQM, and of the episode lengths."""
        low, high = bootstrap_interval(self.returns, interquartile_mean, rng=np.random.default_rng(0))
        return {
            "mean": float(np.mean(self.returns)),
            "std": float(np.std(self.returns)),
            "median": float(np.median(self.returns)),
            "iqm": float(interquartile_mean(self.returns)),
            "iqm_low": low,
            "iqm_high": high,
            "length_mean": float(np.mean(self.lengths)),
            "length_min": min(self.lengths),
            "length_max": max(self.lengths),
        }


@dataclass(frozen=True)
class CheckedPolicy:
    """An agent that refuses to act on observations that are not finite."""

    agent: BaseAlgorithm
    env_id: str

    def predict(
        self,
        observation: NDArray[Any] | dict[str, NDArray[Any]],
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[Any] | None = None,
        deterministic: bool = False,
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...] | None]:
        """The agent's `predict`, with a ValueError for observations that are not finite."""
        for part in observation.values() if isinstance(observation, dict) else [observation]:
            if not np.isfinite(part).all():
                raise ValueError(
                    f"non-finite observation: got {part[~np.isfinite(part)][0]} from {self.env_id}, expected finite "
                    "numbers; check the environment"
                )
        return self.agent.predict(observation, state, episode_start, deterministic)


class _SoundEpisodes(VecEnvWrapper):
    """Environments whose episodes are not reported where an observation or a reward was not finite.

    For agents whose `nonfinite` lets them go on in training. In place of such an observation the agent sees the last
    finite one, of such a reward 0, as in training; another episode is played in place of the one left out.

    Args:
        venv: the environments, with Monitor.
        most: how many episodes may be left out before it is an error.
    """

    def __init__(self, venv: VecEnv, most: int) -> None:
        super().__init__(venv)
        self.left_out, self._most = 0, most
        self._broken = np.zeros(venv.num_envs, dtype=bool)

    def reset(self) -> Any:
        """Begin new episodes."""
        obs = self.venv.reset()
        self._broken[:] = False
        self._held = {name: np.zeros_like(part) for name, part in _parts(obs).items()}
        return self._sound(obs)

    def step_wait(self) -> Any:
        """The step, without what is not finite."""
        obs, rewards, dones, infos = self.venv.step_wait()
        self._broken |= ~np.isfinite(rewards)
        for i in np.flatnonzero(dones):
            if "episode" in infos[i] and (self._broken[i] or not np.isfinite(infos[i]["episode"]["r"])):
                del infos[i]["episode"]  # evaluate_policy counts what has one
                self.left_out += 1
        if self.left_out > self._most:
            raise ValueError(
                f"non-finite episodes: got {self.left_out} with observations or rewards that are not finite, expected "
                f"at most {self._most}; check the environment"
            )
        self._broken[dones] = False
        return self._sound(obs), np.where(np.isfinite(rewards), rewards, 0), dones, infos

    def _sound(self, obs: Any) -> Any:
        """The observations, with the last finite ones in place of those that are not."""
        parts = _parts(obs)
        finite = np.all([np.isfinite(part).reshape(len(part), -1).all(1) for part in parts.values()], axis=0)
        self._broken |= ~finite
        for name, part in parts.items():
            self._held[name][finite] = part[finite]
        held = {name: part.copy() for name, part in self._held.items()}
        return held if isinstance(obs, dict) else held[""]


def _parts(obs: Any) -> dict[str, NDArray[Any]]:
    return obs if isinstance(obs, dict) else {"": obs}


def evaluate_agent(
    agent: BaseAlgorithm, env_id: str, env_kwargs: dict[str, Any], episodes: int, seed: int, *, sample: bool,
    max_steps: int = MAX_STEPS,
) -> Evaluation:  # fmt: skip
    """Play complete episodes with a policy.

    The episodes are divided among parallel environments beforehand, so that short ones are not over-represented.

    Args:
        agent: what chooses the actions.
        env_id: Gymnasium id.
        env_kwargs: arguments of the environment.
        episodes: how many, at least 1.
        seed: seed of the environments' first episodes and of the sampled actions.
        sample: sample the actions; otherwise the deterministic ones.
        max_steps: where an environment without a time limit is cut off, as if it had one.

    Raises:
        ValueError: if episodes is below 1, the agent was trained for other spaces, or an observation or a return is
            not finite; of an agent that leaves such transitions out, if that holds for ten times as many episodes.
    """
    if episodes < 1:
        raise ValueError(f"episodes: got {episodes}, expected an integer of at least 1")
    with contextlib.closing(evaluation_env(agent, env_id, env_kwargs, episodes, seed, max_steps)) as env:
        agent.set_random_seed(seed)
        return play(agent, env, env_id, episodes, sample=sample)


def limited(env_id: str, env_kwargs: dict[str, Any], max_steps: int) -> dict[str, Any]:
    """Arguments of an environment with a time limit of max_steps where it has none."""
    return env_kwargs if has_time_limit(env_id, env_kwargs) else env_kwargs | {"max_episode_steps": max_steps}


def evaluation_env(
    agent: BaseAlgorithm, env_id: str, env_kwargs: dict[str, Any], episodes: int, seed: int, max_steps: int = MAX_STEPS
) -> VecEnv:
    """The environments in which `evaluate_agent` plays; its arguments and errors."""
    env = make_vec(env_id, min(episodes, _MAX_ENVS), seed, **limited(env_id, env_kwargs, max_steps))
    for kind in ("observation_space", "action_space"):
        expected, got = getattr(agent, kind), getattr(env, kind)
        if expected != got:
            env.close()
            raise ValueError(f"{kind} of {env_id}: got {got}, expected {expected} as in training; change --env")
    return env


def play(
    agent: BaseAlgorithm, env: VecEnv, env_id: str, episodes: int, *, sample: bool,
    each_step: Callable[[], None] = lambda: None,
) -> Evaluation:  # fmt: skip
    """Play complete episodes in environments that are there; no random generator is seeded. See `evaluate_agent`.

    Args:
        agent: what chooses the actions.
        env: the environments, with Monitor.
        env_id: what messages call them.
        episodes: how many, at least 1.
        sample: sample the actions; otherwise the deterministic ones.
        each_step: called after each step of each environment; may raise.
    """
    successes = list[bool]()

    def check_return(progress: dict[str, Any], _: dict[str, Any]) -> None:
        """Called by evaluate_policy with its local variables, after each step of each environment."""
        each_step()
        info = progress["info"]
        value = info["episode"]["r"] if "episode" in info else 0.0
        if "episode" in info and "is_success" in info:
            successes.append(bool(info["is_success"]))
        if not np.isfinite(value):
            number = len(progress["episode_rewards"]) + 1
            raise ValueError(
                f"non-finite return: got {value} from episode {number} of {env_id}, expected a finite number; check "
                "the environment's rewards"
            )

    model = CheckedPolicy(agent, env_id)
    sound = _SoundEpisodes(env, 10 * episodes) if leaves_out(agent) else None
    results = evaluate_policy(
        model, sound or env, episodes, deterministic=not sample, callback=check_return, return_episode_rewards=True
    )
    returns, lengths = cast(tuple[list[float], list[int]], results)
    left_out = sound.left_out if sound else 0
    return Evaluation([float(value) for value in returns], [int(length) for length in lengths], left_out, successes)


def leaves_out(agent: BaseAlgorithm) -> bool:
    """Whether an agent goes on where numbers of the environment are not finite."""
    return getattr(getattr(agent, "config", None), "nonfinite", "raise") != "raise"


def evaluate_modes(
    agent: BaseAlgorithm, env_id: str, env_kwargs: dict[str, Any], episodes: int, seed: int, modes: Sequence[str],
    start: Sequence[float] = (0.0, 0.0), max_steps: int = MAX_STEPS,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate in the modes "deterministic" and "sampled": what eval.json holds.

    On tasks with several solutions this includes their `multimodality`, from `start` where the task lets one choose it.
    """
    report: dict[str, Any] = {"env_id": env_id, "env_kwargs": env_kwargs, "timesteps": agent.num_timesteps}
    report |= {"episodes": episodes, "seed": seed}
    for mode in modes:
        result = evaluate_agent(
            agent, env_id, env_kwargs, episodes, seed, sample=mode == "sampled", max_steps=max_steps
        )
        report[mode] = {**result.summary(), "returns": result.returns, "lengths": result.lengths}
        if not has_time_limit(env_id, env_kwargs):
            report[mode]["cut_off"] = sum(length >= max_steps for length in result.lengths)
        if result.success_rate is not None:
            report[mode]["success_rate"] = result.success_rate
        if leaves_out(agent):
            report[mode]["left_out"] = result.left_out
        if has_several_solutions(env_id):
            agent.set_random_seed(seed)
            report[mode]["multimodality"] = multimodality(
                CheckedPolicy(agent, env_id), env_id, env_kwargs, start, seed, deterministic=mode == "deterministic"
            )
    return report


def format_table(report: dict[str, Any]) -> str:
    """The report of `evaluate_modes` as one table or, on tasks with several solutions, two."""
    lines = [f"{'return':14}{'mean':>10}{'std':>10}{'median':>10}{'IQM':>10}{'95 % interval':>22}  episode length"]
    modes = [mode for mode in ("deterministic", "sampled") if mode in report]
    for mode in modes:
        row = report[mode]
        interval = f"[{row['iqm_low']:.1f}, {row['iqm_high']:.1f}]"
        numbers = "".join(f"{row[key]:10.1f}" for key in ("mean", "std", "median", "iqm"))
        length = f"{row['length_mean']:.0f} ({row['length_min']} to {row['length_max']})"
        lines.append(f"{mode:14}{numbers}{interval:>22}  {length}")
    for mode in modes:
        if "success_rate" in report[mode]:
            lines.append(f"{mode}: {report[mode]['success_rate']:.1%} of {report['episodes']} episodes succeeded")
    for mode in modes:
        if cut_off := report[mode].get("cut_off"):
            lines.append(f"{mode}: {cut_off} of {report['episodes']} episodes had no end and were cut off")
    for mode in modes:
        if left_out := report[mode].get("left_out"):
            lines.append(f"{mode}: {left_out} more episodes had numbers that are not finite and do not count")
    if "multimodality" in report[modes[0]]:
        lines += ["", format_multimodality({mode: report[mode]["multimodality"] for mode in modes})]
    return "\n".join(lines)
