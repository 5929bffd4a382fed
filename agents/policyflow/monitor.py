"""A monitor for long runs: notices that training collapses and warns, lowers the learning rate or rolls back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..common.snapshot import Snapshot
from .policy import FlowPolicy

# Healthy runs (Hopper-v5, HalfCheetah-v5, InvertedPendulum-v5, presets) had at most 2.1 x desired_kl, 37 % of ratios
# clipped and 0.07 nats per dimension; one with a high first learning rate began with 8 x desired_kl.
KL_FACTOR = 30.0
"""An update whose mean KL is that many times desired_kl has left the policy that acted."""
CLIP_FRACTION = 0.8
"""So have updates with that share of ratios clipped, on the mean over their minibatches."""
ENTROPY_STEP = 0.5
"""Nats per action dimension that the Gaussians' entropy changes by in one iteration, at most."""
WARM_UP = 10
"""Iterations with all of the episodes that the mean return is taken of, before its fall means anything."""
GOOD = 0.1
"""Weights are good if the return lies this share of its range below the best, or less."""


class CollapseMonitor:
    """Watches KL, ratios, entropy and return after every update, and acts if they show a collapse.

    The fall of the return is ``(best - now) / (best - worst)`` of the mean over the latest episodes, so far; it counts
    where it also exceeds the standard deviation of their returns. Rolling back restores the last weights, optimizer and
    normalisers that acted while that fall was at most `GOOD`; they are kept in memory, not in saved files.

    Args:
        choice: "warn", "lower_rate" or "rollback"; all of them warn.
        drop: fall of the return that is a collapse, in (0, 1].
        desired_kl: KL per iteration that is aimed at, in nats.
        action_dim: number of action dimensions.
    """

    def __init__(self, choice: str, drop: float, desired_kl: float, action_dim: int) -> None:
        self.settings = (choice, drop, desired_kl, action_dim)
        self.choice, self.drop, self.desired_kl, self.action_dim = self.settings
        self.alarms = self.rollbacks = 0
        self._best, self._worst, self._fall, self._seen = -math.inf, math.inf, 0.0, 0
        self._entropy: float | None = None
        self._good: tuple[Snapshot, float] | None = None  # acted, and its return was good; with its learning rate
        self._next: tuple[Snapshot, float] | None = None  # came after it and acts now

    def alarm(self, metrics: Mapping[str, float], returns: Sequence[float], window: int) -> str | None:
        """What is wrong after an update, or None.

        Args:
            metrics: means of `losses` over the update.
            returns: of the latest episodes, oldest first.
            window: number of episodes that the mean return is taken of; fewer say nothing.
        """
        kl, clipped, entropy = (metrics[f"train/{name}"] for name in ("approx_kl", "clip_fraction", "entropy_loss"))
        before, self._entropy = self._entropy, entropy
        if kl > KL_FACTOR * self.desired_kl:
            return f"the KL of an update is {kl:.3g} where {self.desired_kl:.3g} is desired"
        if clipped > CLIP_FRACTION:
            return f"{clipped:.0%} of the ratios are clipped"
        if before is not None and abs(entropy - before) > ENTROPY_STEP * self.action_dim:
            return f"the entropy of the Gaussians moved from {-before:.3g} to {-entropy:.3g} nats in one update"
        if len(returns) < window:
            return None
        now = float(np.mean(returns))
        self._seen += 1
        self._best, self._worst = max(self._best, now), min(self._worst, now)
        self._fall = (self._best - now) / max(self._best - self._worst, 1e-9)
        if self._seen > WARM_UP and self._fall > self.drop and self._best - now > np.std(returns):
            text = f"the mean return is {now:.4g}, after a best of {self._best:.4g}"
            self._best = now if self.choice != "rollback" else self._best  # said once per fall
            return text
        return None

    def watch(
        self, policy: FlowPolicy, metrics: Mapping[str, float], episodes: Any, rate: float
    ) -> tuple[float, dict[str, float]]:
        """Look at an iteration after its update, and act.

        Args:
            policy: the updated policy; rolling back changes it in place.
            metrics: means of `losses` over the update.
            episodes: Stable-Baselines3's deque of the latest episodes; rolling back empties it.
            rate: the adaptive learning rate.

        Returns:
            The learning rate to go on with; collapse/alarms and collapse/rollbacks so far if there were any,
            collapse/return_fall.
        """
        reason = self.alarm(metrics, [float(episode["r"]) for episode in episodes], episodes.maxlen)
        if reason is not None:
            self.alarms += 1
            action = "nothing is done"
            if self.choice == "lower_rate":
                rate, action = rate / 2, "the learning rate is halved"
            elif self.choice == "rollback" and self._good is not None:
                snapshot, its_rate = self._good
                rate, action = min(rate, its_rate) / 2, "back to the last good weights, at half their rate"
                snapshot.restore()
                episodes.clear()
                self.rollbacks, self._next, self._entropy = self.rollbacks + 1, None, None
            warnings.warn(f"collapse: {reason}; {action}", stacklevel=2)
        elif self.choice == "rollback":
            if self._fall <= GOOD:
                self._good = self._next or self._good
            self._next = Snapshot(policy), rate
        counts = {"collapse/alarms": self.alarms, "collapse/rollbacks": self.rollbacks}
        return rate, {name: count for name, count in counts.items() if count} | {"collapse/return_fall": self._fall}
