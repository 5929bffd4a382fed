"""LipschitzMBPO's tuned hyperparameters as rl_zoo3 reads them: `-conf driftrl.zoo.mbpo`, the default."""

from .presets import zoo_hyperparameters

hyperparams = zoo_hyperparameters("mbpo")
