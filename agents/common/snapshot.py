"""A policy as it is, to go back to: what rolling back means, for numbers that are not finite and for a collapse."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .policy import BoxPolicy


class Snapshot:
    """Weights, normalisers, average and optimizer of a policy as they are, to go back to."""

    def __init__(self, policy: BoxPolicy) -> None:
        self._policy = policy
        policy.weights.finish()
        self._tensors = [(each, each.detach().clone()) for each in chain(policy.parameters(), policy.buffers())]
        self._moments = {parameter: _copied(state) for parameter, state in policy.optimizer.state.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back, in place."""
        for tensor, before in self._tensors:
            tensor.copy_(before)
        state = self._policy.optimizer.state
        state.clear()
        state.update({parameter: _copied(moments) for parameter, moments in self._moments.items()})
        self._policy.latest_weights = None


def _copied(moments: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state of one parameter; of views only what they show, which a deep copy would not know."""
    return {name: each.clone() if isinstance(each, Tensor) else copy.deepcopy(each) for name, each in moments.items()}
