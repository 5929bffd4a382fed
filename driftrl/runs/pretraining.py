"""Pretraining on demonstrations in a run's folder: logged, saved while it runs, gone on with where it broke off.

Beside what `folder.py` describes the run then has pretrain.zip (until it is over: the untrained agent and all that
pretraining goes on from), pretrained.zip with pretrained.json (the agent after it, and its evaluation), and a folder
pretrain/ with the log, whose steps are gradient updates.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from ..agents.common.demonstrations import Demonstrations
from ..agents.policyflow.imitation import Imitation
from ..agents.policyflow.pretraining import Pretraining, PretrainSettings
from ..agents.storage import format as checkpoint
from ..agents.storage.files import all_or_nothing, write_json
from ..agents.storage.saving import Checkpointed
from ..agents.storage.values import CheckpointError
from ..analysis.evaluation import EVALUATION_SEED, evaluate_modes, format_table
from ..sweeps.progress_file import last_steps
from .demonstrations import read_demonstrations
from .folder import PRETRAIN, PRETRAINED, RunSettings, load_agent, save_agent
from .group import record_demonstrations
from .log import open_logger, write_row
from .signals import StopOnSignal
from .warnings import warn

_REPORT, _EPISODES = "pretrained.json", 20
_SAVE_EVERY = 60.0
"""Seconds between two saved states."""


def use_demonstrations(agent: Checkpointed, folder: Path | None, settings: RunSettings) -> None:
    """Give a run's agent the demonstrations that it learns from beside its rollouts; saved agents do not hold them.

    Without a folder, as a rank other than 0, they are not compared with those that the run was begun with.
    """
    assert isinstance(agent, Imitation)
    if agent.config.bc_coef > 0:
        _imitate(agent, _read(agent, folder, settings), settings)


def _imitate(agent: Imitation, data: Demonstrations, settings: RunSettings) -> None:
    least = settings.demonstration_return
    agent.use_demonstrations(data if least is None else data.returning(least))


def _read(agent: Checkpointed, folder: Path | None, settings: RunSettings) -> Demonstrations:
    assert settings.demonstrations is not None
    spaces = (agent.observation_space, agent.action_space)
    data = read_demonstrations(
        settings.demonstrations, *spaces, settings.demonstration_keys, settings.env_id, settings.env_kwargs
    )
    if folder is not None:
        record_demonstrations(folder, data.digest)
    return data


def pretrain(agent: Checkpointed, folder: Path, settings: RunSettings) -> None:
    """Pretrain a run's agent, or go on with it, and evaluate it; raises KeyboardInterrupt where a signal ended it."""
    assert isinstance(agent, Imitation)
    data = _read(agent, folder, settings)
    if agent.config.bc_coef > 0:
        _imitate(agent, data, settings)
    steps, episodes = len(data.actions), len(data.lengths)
    mean = data.returns.mean()
    print(f"{settings.demonstrations}: {episodes} episodes, {steps:,} steps, mean return {mean:.2f}", flush=True)
    state = _saved_state(folder / PRETRAIN)
    done = state["step"] if state is not None else None
    with contextlib.closing(open_logger(folder / "pretrain", done)) as logger, StopOnSignal() as stop:
        begin = saved_at = time.monotonic()

        def follow(pretraining: Pretraining, metrics: dict[str, float]) -> None:
            nonlocal saved_at
            write_row(logger, metrics, pretraining.step)
            now = time.monotonic()
            if stop.signal is not None or now - saved_at > _SAVE_EVERY:
                stop.be_patient()
                saved_at = now
                with all_or_nothing(folder / PRETRAIN) as partial, partial.open("wb") as file:
                    documents = {"agent": checkpoint.encode(agent.contents())}
                    checkpoint.write(file, documents | {"pretraining": checkpoint.encode(pretraining.state())})
            if stop.signal is not None:
                raise KeyboardInterrupt(stop.signal)

        how = PretrainSettings(settings.pretrain_steps, settings.pretrain_batch_size, settings.pretrain_learning_rate)
        result = agent.pretrain(data, settings=how, state=state, follow=follow)
    seconds = time.monotonic() - begin
    found = f"validation loss {result.validation_loss:.4g}, error of the solver {result.solver_error:.2g}"
    print(f"pretrained by {result.steps:,} updates in {seconds:.0f} s, {found}")
    save_agent(agent, folder / PRETRAINED)
    (folder / PRETRAIN).unlink(missing_ok=True)
    _evaluate(agent, folder, settings, result.steps)
    agent.set_random_seed(settings.seed)  # evaluating has drawn: what follows is not to depend on it


def evaluate_pretrained(folder: Path, settings: RunSettings) -> None:
    """Evaluate the pretrained agent of a run that was killed before it had been."""
    if not (folder / PRETRAINED).exists() or (folder / _REPORT).exists():
        return
    try:
        agent = load_agent(folder / PRETRAINED, settings.device)
    except CheckpointError as error:
        warn(f"the pretrained agent is not evaluated: {error}")
    else:
        _evaluate(agent, folder, settings, last_steps(folder / "pretrain"))


def _evaluate(agent: Checkpointed, folder: Path, settings: RunSettings, updates: int | None) -> None:
    modes = ("deterministic", "sampled")
    report = evaluate_modes(agent, settings.env_id, settings.env_kwargs, _EPISODES, EVALUATION_SEED, modes)
    write_json(folder / _REPORT, {"file": PRETRAINED, "updates": updates, **report})
    print(f"before reinforcement learning, {_EPISODES} episodes each\n{format_table(report)}\n", flush=True)


def _saved_state(path: Path) -> dict[str, Any] | None:
    """What pretraining goes on from; None where it begins."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        return checkpoint.read(file, "pretraining", str(path))
