"""A folder for the Hugging Face Hub: the agent, its settings, its results and a model card. Nothing is pickled."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from ..agents.registry import AGENTS
from ..agents.storage.datasets import MAIN
from ..agents.storage.files import all_or_nothing, write_json
from ..agents.storage.saving import Checkpointed
from ..envs.make import with_module
from ..runs.folder import RunSettings, save_agent
from ..runs.kinds import AGENT, SHARED_FILES, VIDEO, is_shared
from ..runs.trackers import settings_rows

_CARD = """---
{head}---

# {agent} on {env}

{summary}. Trained with DriftRL {version} for {steps:,} steps, seed {seed}.

## Results

Each policy played {episodes} episodes. Their starts (seed {evaluation_seed}) are not those of training. The interval is
a percentile bootstrap over episodes: it does not cover other seeds of training.

| policy | mean return | standard deviation | IQM | 95 % interval of the IQM | episode length |
|---|---|---|---|---|---|
{rows}
## Use

```python
import gymnasium as gym
from driftrl import {kind}

agent = {kind}.load("{file}")  # data only: loading executes nothing that is in the file
env = gym.make("{made}"{kwargs})
obs, _ = env.reset(seed=0)
action, state = agent.predict(obs, deterministic=True)
```
{state}
`{file}` holds JSON and safetensors. `huggingface_hub.hf_hub_download("USER/NAME", "{file}")` downloads it and gives its
path.

## Versions

{versions}
## Settings

| setting | value |
|---|---|
{settings}
"""


_STATE = """
The policy decides on several steps at once. Give `predict` the state of the call before, and it goes on with them:
`agent.predict(obs, state, episode_start, deterministic=True)`.
"""


def check_hub_folder(folder: Path) -> None:
    """Refuse a place where files of somebody else would be pushed or overwritten.

    Raises:
        ValueError: if it is a file, or a folder that is not empty and was not written by `write_hub_folder`.
    """
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if folder.is_file() or (there and not (is_shared(folder) and set(there) <= set(SHARED_FILES))):
        raise ValueError(f"hub: got {folder}, expected a new folder: all that lies in it will be pushed")


def write_hub_folder(
    folder: Path, agent: Checkpointed, run: Path, settings: RunSettings, report: dict[str, Any],
    video: Path | None = None,
) -> list[Path]:  # fmt: skip
    """Write the folder; returns its files. What an earlier call wrote into it is replaced, its video removed.

    Args:
        folder: to write, with its parents.
        agent: what is shared; nothing of its training goes along.
        run: folder of the run.
        settings: of the run.
        report: of `evaluate_modes`.
        video: an episode, .mp4, which the Hub shows beside the card.

    Raises:
        ValueError: as `check_hub_folder`.
    """
    check_hub_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if video is None:
        (folder / VIDEO).unlink(missing_ok=True)  # it may show another agent
    elif video.resolve() != (folder / VIDEO).resolve():
        shutil.copyfile(video, folder / VIDEO)
    config = json.loads((run / "config.json").read_text())
    if settings.demonstrations is not None:
        settings = dataclasses.replace(settings, demonstrations=_without_folders(settings.demonstrations))
        config["demonstrations"] = settings.demonstrations
    write_json(folder / "config.json", config)
    save_agent(agent, folder / AGENT)
    write_json(folder / "results.json", report)
    with all_or_nothing(folder / "README.md") as partial:
        partial.write_text(model_card(settings, report, config.get("versions", {})), encoding="utf-8")
    return sorted(folder.iterdir())


def model_card(settings: RunSettings, report: dict[str, Any], versions: dict[str, str]) -> str:
    """The model card of a run, with the Hub's metadata at its head.

    Args:
        settings: of the run.
        report: of `evaluate_modes`.
        versions: of what results depend on, by package.
    """
    entry = AGENTS[settings.agent]
    modes = {mode: report[mode] for mode in ("deterministic", "sampled") if mode in report}
    rows = "".join(
        f"| {mode} | {each['mean']:.1f} | {each['std']:.1f} | {each['iqm']:.1f} "
        f"| [{each['iqm_low']:.1f}, {each['iqm_high']:.1f}] | {sum(each['lengths']) / len(each['lengths']):.0f} |\n"
        for mode, each in modes.items()
    )
    kwargs = "".join(f", {name}={value!r}" for name, value in report["env_kwargs"].items())
    return _CARD.format(
        head=_head(settings, report, next(iter(modes.values()))), agent=_kind(settings), kind=_kind(settings),
        env=report["env_id"], made=with_module(report["env_id"]), summary=entry.summary[0].upper() + entry.summary[1:],
        version=versions.get("driftrl", "?"), steps=report["timesteps"], seed=settings.seed,
        episodes=report["episodes"], evaluation_seed=report["seed"],
        rows=rows, file=AGENT, kwargs=kwargs, state=_STATE if settings.config.get("chunk", 1) > 1 else "",
        versions="".join(f"- {name} {version}\n" for name, version in versions.items()),
        settings=settings_rows(settings),
    )  # fmt: skip


def _without_folders(data_set: str) -> str:
    """The name of a data set; where it lies on this machine is nobody's business."""
    path = Path(data_set)
    if not path.is_absolute():
        return data_set
    return next((part for part in reversed(path.parts[1:]) if part not in ("data", MAIN)), MAIN)


def _kind(settings: RunSettings) -> str:
    """The name of the agent's class, as `driftrl` has it."""
    agent: Any = AGENTS[settings.agent].agent
    return str(agent.__name__)


def _head(settings: RunSettings, report: dict[str, Any], best: dict[str, Any]) -> str:
    """The metadata that the Hub reads."""
    import yaml

    env = report["env_id"]
    metric = {"type": "mean_reward", "name": "mean_reward", "value": f"{best['mean']:.2f} +/- {best['std']:.2f}"}
    result = {
        "task": {"type": "reinforcement-learning", "name": "reinforcement-learning"},
        "dataset": {"name": env, "type": env},
        "metrics": [{**metric, "verified": False}],
    }
    data = {
        "library_name": "driftrl",
        "pipeline_tag": "reinforcement-learning",
        "tags": [env, "reinforcement-learning", "deep-reinforcement-learning", "driftrl", settings.agent],
        "model-index": [{"name": _kind(settings), "results": [result]}],
    }
    return str(yaml.safe_dump(data, sort_keys=False))
