"""Evaluation while training: the deterministic policy on environments of its own; training does not notice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np

from ..agents.storage.saving import Checkpointed, random_state, set_random_state
from ..analysis.evaluation import Evaluation, evaluation_env, play
from .folder import RunSettings
from .log import write_row
from .signals import StopOnSignal

SEED = 2_000_000  # neither of training nor of the evaluation of a finished run: best.zip is chosen by these episodes


class _Stopped(Exception):
    """A signal asked for the end."""


class Evaluations:
    """Evaluates a run's policy every `eval_interval` steps and at the end, always from the same starts.

    Environments are made anew each time: an evaluation depends on the weights alone, so that a resumed run repeats it.

    Args:
        settings: of the run.
        stop: ends an evaluation early.
    """

    def __init__(self, settings: RunSettings, stop: StopOnSignal) -> None:
        self._settings, self._stop = settings, stop

    def are_due(self, steps: int, evaluated_at: int) -> bool:
        """Whether a multiple of the interval lies behind the last evaluation."""
        interval = self._settings.eval_interval
        return interval is not None and steps // interval > evaluated_at // interval

    def evaluate(self, agent: Checkpointed) -> float | None:
        """Log mean and standard deviation of the returns, mean length and, where known, share of successes: eval/.

        Returns:
            The mean return; None where a signal came before all episodes were over.
        """
        try:
            result = self._play(agent)
        except _Stopped:
            return None
        returns, lengths = np.array(result.returns), np.array(result.lengths)
        mean = float(returns.mean())
        row = {
            "eval/mean_return": mean,
            "eval/std_return": float(returns.std()),
            "eval/mean_length": float(lengths.mean()),
        }
        if result.success_rate is not None:
            row["eval/success_rate"] = result.success_rate
        write_row(agent.logger, row, agent.num_timesteps)
        return mean

    def _play(self, agent: Checkpointed) -> Evaluation:
        env_id, episodes = self._settings.env_id, self._settings.eval_episodes
        with (
            _undisturbed(agent),
            contextlib.closing(evaluation_env(agent, env_id, self._settings.env_kwargs, episodes, SEED)) as env,
        ):
            return play(agent, env, env_id, episodes, sample=False, each_step=self._check)

    def _check(self) -> None:
        if self._stop.signal is not None:
            raise _Stopped


@contextlib.contextmanager
def _undisturbed(agent: Checkpointed) -> Iterator[None]:
    """Put back what acting and making environments may move: random generators, the mode of the networks."""
    state, training = random_state(agent), agent.policy.training
    try:
        yield
    finally:
        set_random_state(agent, state)
        agent.policy.set_training_mode(training)
