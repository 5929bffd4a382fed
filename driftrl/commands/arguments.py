"""The options of `train.py AGENT` that belong to the run; those of the agent are the fields of its Config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from ..envs.make import Backend


@dataclass(frozen=True)
class Arguments:
    """Options of `train.py <agent>`: those of the run, and as flags of their own those of the agent's Config."""

    env: str
    """Gymnasium id with Box actions, e.g. Hopper-v5."""
    n_envs: int
    """Parallel environments, >= 1."""
    preset: str = "standard"
    """Preset of the agent whose values are the defaults."""
    total_timesteps: int = 1_000_000
    """Environment steps to train for, >= 1, all environments together."""
    demonstrations: str | None = None
    """Data set to pretrain on, of Minari (folder, id or .hdf5) or robomimic (.hdf5)."""
    demonstration_keys: tuple[str, ...] = ()
    """Names of the data set's observations to join, in this order, where the environment's has no names."""
    demonstration_return: float | None = None
    """With bc_coef: least return of the episodes that updates imitate; pretraining learns from all. None: all."""
    pretrain_steps: int = 0
    """Gradient updates of pretraining at most, >= 0; fewer where held-out episodes show no gain. With it
    total_timesteps may be 0."""
    pretrain_batch_size: int = 512
    """Demonstrated steps per update, >= 1."""
    pretrain_learning_rate: float = 1e-2
    """Learning rate of pretraining at its beginning, > 0; it falls to 0 by half a cosine."""
    seed: int | None = None
    """Seed of everything random, 0 .. 2**31 - 1; None: drawn, and recorded."""
    seeds: tuple[int, ...] = ()
    """Several seeds in place of one: a run each, in a process of its own, in the folder of a group."""
    jobs: int = 1
    """With seeds: how many of the runs train at a time, >= 1."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of networks and rollouts."""
    threads: int = 1
    """CPU threads of PyTorch's updates, >= 1. More than one helps on an idle machine only."""
    run_dir: Path = Path("runs")
    """Folder under which the run's folder is made."""
    checkpoint_interval: int | None = None
    """Steps between checkpoints, >= 1; None: a tenth of the run, 100,000 at most."""
    keep_checkpoints: int = 3
    """How many checkpoints to keep, the newest, >= 1; the best agent is kept apart."""
    eval_interval: int | None = None
    """Steps between evaluations of the deterministic policy while training, >= 1; best.zip is the best of them."""
    eval_episodes: int = 10
    """Episodes of each, >= 1."""
    track: Literal["none", "wandb", "trackio", "mlflow"] = "none"
    """Also log to a tracker, which has to be installed. wandb is offline where WANDB_MODE=offline says so."""
    env_kwargs: tuple[str, ...] = ()
    """Arguments of the environment: key=value pairs, or one JSON object."""
    backend: Backend = "auto"
    """How environments are stepped: as a batch, one by one, each in its own process, or on the agent's device."""
    warp_solver: Literal["model", "newton"] = "model"
    """With backend warp: the model's solver, or Newton's where mujoco_warp lacks it (Humanoid)."""
    warp_contacts: int | None = None
    """With backend warp: room for contacts per environment, >= 1; None: as mujoco_warp guesses."""
    warp_constraints: int | None = None
    """With backend warp: room for constraints in each environment, >= 1; None: as mujoco_warp guesses."""
    worker_timeout: float = 60.0
    """Seconds for a step, > 0, after which such a process counts as hung and is restarted."""
    worker_restarts: int = 10
    """Restarts of processes that died or hang, >= 0, all together; the next is an error."""
    config: tyro.conf.OmitArgPrefixes[Any] = None
    """Hyperparameters of the agent."""
