"""What all models of an environment's step share: targets, optimizer, early stopping."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def _layer(name: str) -> str:
    """The layer of a network that a weight matrix of this name belongs to: a field's first has several matrices."""
    module, _, last = name.rpartition(".")
    return name if last.isdigit() else module


@dataclass(frozen=True)
class TransitionSettings:
    """What all models share; defaults from MBPO (arXiv 1906.08253) but for ``normalize_targets``.

    Args:
        residual: predict next_obs - obs rather than next_obs.
        known_step: what is known of the step, (obs [B, O], action [B, A]) -> next_obs [B, O], differentiable: predict
            the difference to it in place of that to obs.
        normalize_targets: the targets, too. MBPO does not, and fails on badly scaled states.
        terminal_head: learn which transitions terminate, for environments whose rule is unknown.
        learning_rate: of Adam, > 0.
        weight_decay: of the weight matrices, >= 0. MBPO has L2 of 2.5e-5 in the first layer to 1e-4 in the last.
        decoupled: AdamW's decay in place of L2, from 1/K of weight_decay in the first of a network's K layers to all of
            it in the last; DHMBPO (arXiv 2512.15439) has 1e-3 there.
        batch_size: rows per gradient step, >= 1.
        patience: epochs without a gain after which a fit ends, >= 1;
        patience_updates: if they are this many updates at least, >= 0: epochs of few rows are short.
        ema_decay: of a running average of the weights, per update, which a fit judges and keeps, in [0, 1); 0: none.
        min_gain: relative fall of the hold-out error that counts as a gain, in [0, 1).
        jacobian_coef: weight of a `JacobianPrior` on d next state / d state, >= 0; 0 for none.
        bfloat16: fit the hidden layers of a `GaussianTransition` with products in bfloat16 (`precision`).
    """

    residual: bool = True
    known_step: Callable[[Tensor, Tensor], Tensor] | None = None
    normalize_targets: bool = True
    terminal_head: bool = False
    learning_rate: float = 1e-3
    weight_decay: float = 5e-5
    decoupled: bool = False
    batch_size: int = 256
    patience: int = 5
    patience_updates: int = 0
    ema_decay: float = 0.0
    min_gain: float = 0.01
    jacobian_coef: float = 0.0
    bfloat16: bool = False

    def optimizer(self, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Adam:
        """Adam in one kernel, of named parameters; only matrices decay."""
        named = list(named)
        matrices = {name: each for name, each in named if "weight" in name}
        groups = [{"params": [each for name, each in named if name not in matrices], "weight_decay": 0.0}]
        if not self.decoupled:
            groups.insert(0, {"params": [*matrices.values()], "weight_decay": self.weight_decay})
            return torch.optim.Adam(groups, self.learning_rate, fused=True)
        networks: dict[str, dict[str, int]] = {}
        for name in matrices:
            layers = networks.setdefault(name.partition(".")[0], {})
            layers.setdefault(_layer(name), 1 + len(layers))
        for name, each in matrices.items():
            layers = networks[name.partition(".")[0]]
            share = layers[_layer(name)] / len(layers)
            groups.append({"params": [each], "weight_decay": share * self.weight_decay})
        return torch.optim.AdamW(groups, self.learning_rate, fused=True)

    def __post_init__(self) -> None:
        """Raise ValueError on values out of range."""
        for name, holds, expected in (
            ("learning_rate", self.learning_rate > 0, "> 0"),
            ("weight_decay", self.weight_decay >= 0, ">= 0"),
            ("batch_size", self.batch_size >= 1, ">= 1"),
            ("patience", self.patience >= 1, ">= 1"),
            ("patience_updates", self.patience_updates >= 0, ">= 0"),
            ("jacobian_coef", self.jacobian_coef >= 0, ">= 0"),
            ("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)"),
            ("min_gain", 0 <= self.min_gain < 1, "in [0, 1)"),
        ):
            if not holds:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected {expected}")
