"""Callbacks of a run: checkpoints, the best agent so far, progress on the terminal."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from tqdm import tqdm

from ..agents.common.ranks import present
from ..agents.storage.files import write_json
from ..agents.storage.saving import Checkpointed
from .evaluations import Evaluations
from .folder import COMPLETE, RunSettings, save_agent, save_checkpoint
from .rank_states import hand_over
from .signals import StopOnSignal
from .warnings import warn


class Checkpoints(BaseCallback):
    """Saves a checkpoint at intervals and when a signal came, and best.zip when the mean return is the best so far.

    That return is the one of the run's evaluations (`Evaluations`). Of a run without them it is the one of training: it
    is looked at every 1 % of the run, once 10 episodes are known, for saving costs next to nothing then. What cannot be
    written is reported, and training goes on.

    Args:
        folder: of the run.
        settings: of the run.
        stop: asks for an early end.
        progress: of the run that goes on, from its checkpoint; None where there is none.
    """

    model: Checkpointed

    def __init__(
        self, folder: Path, settings: RunSettings, stop: StopOnSignal, progress: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self._folder, self._settings, self._stop, self._progress = folder, settings, stop, progress
        self._evaluations = Evaluations(settings, stop)

    def _on_training_start(self) -> None:
        self._last = self._learned = self.model.num_timesteps
        self._was_final = (self._folder / "final.zip").exists()
        if self._progress is None:
            self._progress = {
                "best": _best_so_far(self._folder / "best.json"),
                "looked_at": self._last,
                "evaluated_at": self._last,
            }
        self._progress.setdefault("evaluated_at", self._last)  # written before there were evaluations

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:  # the policy was just updated
        assert self._progress is not None
        steps, interval = self.model.num_timesteps, self._settings.checkpoint_interval
        self._learned = steps
        is_due = steps // interval > self._last // interval or self._was_final
        _, evaluates = _agree(self._stop, is_due, self._evaluations.are_due(steps, self._progress["evaluated_at"]))
        if evaluates:  # before a checkpoint, which knows of it
            self._evaluate(steps)
            _agree(self._stop, is_due)
        if self._stop.agreed is not None:
            self._stop.be_patient()
            self.save()
            raise KeyboardInterrupt(self._stop.agreed)
        if is_due:
            self._last, self._was_final = steps, False
            self.save()
        if self._settings.eval_interval is None:
            self._look_for_best(steps)

    def _on_training_end(self) -> None:
        assert self._progress is not None
        steps = self._learned = self.model.num_timesteps
        if self._settings.eval_interval is not None and self._progress["evaluated_at"] != steps:
            self._evaluate(steps)

    def save(self) -> None:
        """Save a checkpoint; it says what it lacks where the steps of a rollout, or their update, did not end."""
        assert self._progress is not None
        steps = self.model.num_timesteps
        lost = f"what the last {steps - self._learned:,} steps teach: the run ended in them"
        with reported("checkpoint", steps):
            save_checkpoint(
                self.model, self._folder, self._settings.keep_checkpoints, self._progress,
                lost if steps > self._learned else None,
            )  # fmt: skip
            for name in COMPLETE:  # of a run that goes on: they are final no longer
                (self._folder / name).unlink(missing_ok=True)

    def _evaluate(self, steps: int) -> None:
        assert self._progress is not None
        mean_return = self._evaluations.evaluate(self.model)
        if mean_return is not None:
            self._progress["evaluated_at"] = steps
            self._keep_if_best(mean_return, {"timesteps": steps, "eval_episodes": self._settings.eval_episodes})

    def _look_for_best(self, steps: int) -> None:
        progress, interval = self._progress, max(self._settings.total_timesteps // 100, 1)
        assert progress is not None
        if steps - progress["looked_at"] >= interval and len(self.model.ep_info_buffer or ()) >= 10:
            progress["looked_at"] = steps
            self._keep_if_best(_mean_return(self.model), {"timesteps": steps})

    def _keep_if_best(self, mean_return: float, details: dict[str, int]) -> None:
        assert self._progress is not None
        if mean_return > self._progress["best"]:
            with reported("best.zip", details["timesteps"]):
                save_agent(self.model, self._folder / "best.zip")
                write_json(self._folder / "best.json", {"mean_return": mean_return, **details})
                self._progress["best"] = mean_return  # else the next one that is as good is kept


class Follows(BaseCallback):
    """What `Checkpoints` is on the other ranks: hands their part of a checkpoint over to rank 0."""

    model: Checkpointed

    def __init__(self, stop: StopOnSignal) -> None:
        super().__init__()
        self._stop = stop

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        is_due, evaluates = _agree(self._stop)
        if evaluates:  # rank 0, for which the others wait here
            is_due, _ = _agree(self._stop)
        if self._stop.agreed is not None:
            self._stop.be_patient()
        if is_due or self._stop.agreed is not None:
            self.save()
        if self._stop.agreed is not None:
            raise KeyboardInterrupt(self._stop.agreed)

    def save(self) -> None:
        """Hand over."""
        hand_over(self.model)


def _agree(stop: StopOnSignal, saves: bool = False, evaluates: bool = False) -> tuple[bool, bool]:
    """Let a signal of one rank stop all at once: one that comes later waits for the next time.

    Returns whether a checkpoint is due, and whether an evaluation is that has to come first: none where all stop.
    """
    said = present().gather((stop.signal, saves, evaluates))
    stop.agreed = next((signal for signal, *_ in said if signal is not None), None)
    return any(each for _, each, _ in said), stop.agreed is None and any(each for *_, each in said)


@contextlib.contextmanager
def reported(what: str, steps: int) -> Iterator[None]:
    """A file that cannot be written is no reason to end a run: say so and go on; what was saved before is there."""
    try:
        yield
    except OSError as error:
        warn(f"no {what} at {steps:,} steps ({error}); what was saved before is kept, the run goes on")


class Progress(BaseCallback):
    """Shows steps, speed, return and time left: as a bar on a terminal, else in a line per 10 % or 30 s."""

    def __init__(self, begin: int, total: int) -> None:
        super().__init__()
        self._begin = self._shown = begin
        self._total = total
        self._start = self._shown_at = time.monotonic()
        self._bar = tqdm(
            total=total, initial=begin, unit=" steps", unit_scale=True, smoothing=0, dynamic_ncols=True,
            disable=not sys.stderr.isatty(), bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
            "[{elapsed}, {remaining} left, {rate_fmt}{postfix}]",
        )  # fmt: skip

    def _on_step(self) -> bool:
        self._bar.update(min(self.num_timesteps, self._total) - self._bar.n)
        return True

    def _on_rollout_start(self) -> None:  # of the one before, which was learned from: the output may be closed
        if self.model.num_timesteps > self._begin:
            self._show()

    def _on_training_end(self) -> None:
        self._show()

    def _show(self) -> None:
        now, steps = time.monotonic(), self.model.num_timesteps
        mean = f"return {_mean_return(self.model):.1f}" if self.model.ep_info_buffer else "return -"
        self._bar.set_postfix_str(mean, refresh=False)
        if self._bar.disable and (steps - self._shown >= self._total / 10 or now - self._shown_at >= 30):
            self._shown, self._shown_at = steps, now
            speed = (steps - self._begin) / (now - self._start)
            left = tqdm.format_interval(max(self._total - steps, 0) / speed)
            print(
                f"{min(steps / self._total, 1):4.0%}  {steps:,} steps  {speed:,.0f} steps/s  {mean}  {left} left",
                flush=True,
            )

    def close(self) -> None:
        """Leave the bar as it is, also where training was cut short."""
        self._bar.close()


Report = Callable[[dict[str, Any]], None]
"""Takes news of a run for the process that started it."""


class Reports(BaseCallback):
    """Reports the steps at most twice a second, for a line about the run elsewhere."""

    def __init__(self, begin: int, report: Report) -> None:
        super().__init__()
        self._begin, self._report = begin, report
        self._start, self._reported_at = time.monotonic(), -float("inf")

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        now = time.monotonic()
        if now - self._reported_at >= 0.5 and self.model.num_timesteps > self._begin:
            self._reported_at = now
            mean = _mean_return(self.model) if self.model.ep_info_buffer else None
            seconds = now - self._start
            self._report({"steps": self.num_timesteps, "begin": self._begin, "seconds": seconds, "return": mean})


def _mean_return(model: BaseAlgorithm) -> float:
    """Mean return of the last training episodes, of which there is at least one."""
    episodes = model.ep_info_buffer or ()
    return sum(float(episode["r"]) for episode in episodes) / len(episodes)


def _best_so_far(path: Path) -> float:
    """The return of best.zip, of its best.json."""
    try:
        return float(json.loads(path.read_text())["mean_return"])
    except FileNotFoundError:
        return -float("inf")
    except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
        warn(f"{path} is damaged; the best of what follows takes the place of best.zip")
        return -float("inf")
