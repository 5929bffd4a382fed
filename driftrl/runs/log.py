"""What a run says while it trains: TensorBoard's events, progress.csv, warnings."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import (
    CSVOutputFormat,
    KVWriter,
    Logger,
    TensorBoardOutputFormat,
    filter_excluded_keys,
)
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from ..agents.storage.files import all_or_nothing
from .folder import RunSettings
from .trackers import hyperparameters, open_tracker, settings_rows
from .warnings import warn

_STEPS = "time/total_timesteps"  # the column of progress.csv
_MEASURES = ("rollout/ep_rew_mean", "eval/mean_return")
"""What TensorBoard's table of hparams shows of a run."""


def open_logger(folder: Path, done: int | None = None, settings: RunSettings | None = None) -> Logger:
    """Logger to TensorBoard's events, progress.csv and the run's tracker, which are continued where they exist.

    Args:
        folder: of the run.
        done: steps after which a run goes on; what was logged later, before it broke off, is dropped.
        settings: of the run, for TensorBoard's tables and the tracker; None: there is neither.

    Raises:
        ValueError: if the tracker does not begin.
    """
    tracker = open_tracker(folder, settings) if settings is not None and settings.track != "none" else None  # may fail
    events = _Events(folder, done)
    if settings is not None and not done:
        events.describe(settings)
    outputs: list[KVWriter] = [events, _ProgressFile(folder / "progress.csv", done)]
    outputs += [tracker] if tracker is not None else []
    return _RunLogger(str(folder), outputs)


@contextlib.contextmanager
def messages_shown() -> Iterator[None]:
    """Print what the library tells by Python's logging, such as that it compiles."""

    class Print(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print(record.getMessage(), flush=True)

    logger, handler = logging.getLogger("driftrl"), Print()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _RunLogger(Logger):
    """A logger that cannot end training: where the disk is full it warns and goes on."""

    def dump(self, step: int = 0) -> None:
        """Write what was recorded."""
        try:
            super().dump(step)
        except OSError as error:
            warn(f"the log of step {step} is lost ({error}); training goes on")
            for values in (self.name_to_value, self.name_to_count, self.name_to_excluded):
                values.clear()


def write_row(logger: Logger, values: dict[str, float], step: int) -> None:
    """Write values at once, in a row of their own; what waits for the next row is left alone."""
    row: dict[str, float] = {**values, _STEPS: step}
    left_out: dict[str, tuple[str, ...]] = {name: ("tensorboard",) if name == _STEPS else () for name in row}
    try:
        for output in logger.output_formats:
            output.write(row, left_out, step)
    except OSError as error:
        warn(f"the log of step {step} is lost ({error}); training goes on")


class _Events(TensorBoardOutputFormat):
    """TensorBoard's events; of a run that goes on it hides those after the step where it does."""

    def __init__(self, folder: Path, done: int | None) -> None:
        self.writer = SummaryWriter(log_dir=str(folder), purge_step=done + 1 if done else None)
        self._is_closed = False

    def describe(self, settings: RunSettings) -> None:
        """Write the settings, as hparams and as text."""
        names = hyperparameters(settings)
        values = {key: each if isinstance(each, bool | int | float | str) else str(each) for key, each in names.items()}
        for summary in hparams(values, dict.fromkeys(_MEASURES, 0.0)):
            self.writer._get_file_writer().add_summary(summary)
        self.writer.add_text("settings", f"| setting | value |\n|---|---|\n{settings_rows(settings)}")


class _ProgressFile(CSVOutputFormat):
    """progress.csv, continued where there is one; at no time is a row that was written before in danger."""

    def __init__(self, path: Path, done: int | None) -> None:
        self._path = path
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        self.keys = [key for key in lines[0].strip().split(",") if key] if lines else []
        rows = [line.rstrip("\n") for line in lines[1:] if line.endswith("\n")]  # the last may be half a one
        if _STEPS in self.keys and done is not None:
            rows = [row for row in rows if int(row.split(",")[self.keys.index(_STEPS)]) <= done]
        self._rewrite(rows)

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Add a row, and columns for new keys in the order in which they came."""
        new = [key for key in filter_excluded_keys(key_values, key_excluded, "csv") if key not in self.keys]
        if new:
            self.file.close()
            self.keys += new
            self._rewrite([row + "," * len(new) for row in self._path.read_text().splitlines()[1:]])
        super().write(key_values, key_excluded, step)

    def _rewrite(self, rows: list[str]) -> None:
        with all_or_nothing(self._path) as partial:
            partial.write_text("".join(f"{line}\n" for line in (",".join(self.keys), *rows)) if self.keys else "")
        self.file = self._path.open("r+")
        self.file.seek(0, os.SEEK_END)
