"""`evaluate.py RUN ... --record DATASET`: episodes of one policy or several as a Minari data set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gymnasium.envs.registration import EnvSpec

from ..agents.storage.datasets import write_minari
from ..envs import make_vec
from ..envs.episodes import Episode
from ..runs.demonstrations import record_episodes
from ..runs.folder import load_saved
from .target import target_of

_SEEDS_APART = 1000
"""Between the seeds of two runs: more than the environments that are played at a time."""


def record(paths: Sequence[Path], args: argparse.Namespace, out: Any) -> None:
    """Record `--episodes` episodes of each run, one run after the other, and say what was written.

    Args:
        paths: runs or saved files.
        args: of `evaluate.py`; record names the folder, sample the sampled policy in place of the deterministic one.
        out: where to print.

    Raises:
        ValueError: if the runs have different environments, or as `write_minari` and `record_episodes`.
    """
    targets = [target_of(path, args) for path in paths]
    first = targets[0]
    for target in targets:
        if (target.env_id, target.env_kwargs) != (first.env_id, first.env_kwargs):
            raise ValueError(f"record: got runs on {first.env_id} and {target.env_id}, expected one environment")
    env = make_vec(first.env_id, 1, None, **first.env_kwargs)
    spec: EnvSpec = env.get_attr("spec")[0]
    returns: list[float] = []

    def episodes() -> Iterator[Episode]:
        for i, path in enumerate(paths):
            _, agent, skipped = load_saved(path, args.device)
            for reason in skipped:
                print(f"warning: skipped {reason}", file=sys.stderr)
            seed = (args.seed + _SEEDS_APART * i) % 2**31
            for episode in record_episodes(
                agent, first.env_id, first.env_kwargs, args.episodes, seed, sample=args.sample,
                max_steps=args.max_steps,
            ):  # fmt: skip
                returns.append(float(episode.rewards.sum()))
                yield episode

    try:
        write_minari(
            args.record, episodes(), env.observation_space, env.action_space, env_spec=spec,
            algorithm=", ".join(dict.fromkeys(target.settings.agent for target in targets if target.settings)),
        )  # fmt: skip
    finally:
        env.close()
    policy = "sampled" if args.sample else "deterministic"
    mean = sum(returns) / len(returns)
    print(f"recorded {len(returns)} episodes of the {policy} policy in {args.record}, mean return {mean:.2f}", file=out)
