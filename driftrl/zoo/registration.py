"""Put our agents where rl_zoo3 looks for algorithms, samplers and hyperparameters."""

from __future__ import annotations

import rl_zoo3.train
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS

from .agents import ALGORITHMS
from .manager import Manager

_LIKE = {"policyflow": "ppo", "mbpo": "sac"}
"""Our agents -> the algorithm of rl_zoo3 whose sampler they share: these hyperparameters mean the same for both."""


def register() -> None:
    """Make `--algo policyflow` and `--algo mbpo` known to rl_zoo3, in this process."""
    for name, agent in ALGORITHMS.items():
        ALGOS[name] = agent
        HYPERPARAMS_SAMPLER[name] = HYPERPARAMS_SAMPLER[_LIKE[name]]
        HYPERPARAMS_CONVERTER[name] = HYPERPARAMS_CONVERTER[_LIKE[name]]
    rl_zoo3.train.ExperimentManager = Manager
