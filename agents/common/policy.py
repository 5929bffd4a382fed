"""The base of both agents' policies: Box actions, vector observations, an optimizer, a weight average."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, preprocess_obs
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from ...envs.make import check_spaces
from .observations import RunningNorm, to_box
from .weights import Weights, held_by, in_order


class BoxPolicy(BasePolicy):
    """A Stable-Baselines3 policy for Box actions and vector observations.

    A subclass builds its networks and `obs_norm`, then calls `_make_optimizer`.

    Args:
        observation_space: Box, or Dict of Boxes; no images.
        action_space: Box with finite bounds. The networks work in [-1, 1], and `predict` maps to the bounds.
        optimizer_class: optimizer of all parameters.
        optimizer_kwargs: its arguments besides the learning rate.
        chunk: steps that an action of the networks covers.

    Raises:
        ValueError: if a space is not supported.
    """

    obs_norm: RunningNorm
    draws: int
    """Standard normals per action dimension that a sampled action takes."""
    followed: ClassVar[str]
    """Name of the module that the weight average follows."""
    follower: ClassVar[str]
    """Name of the module that holds the average, or of None."""
    followers: ClassVar[Mapping[str, str]] = {}
    """Further modules whose weights are averages and do not learn -> what they follow."""

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.Space,  # type: ignore[type-arg]
        optimizer_class: type[torch.optim.Optimizer], optimizer_kwargs: dict[str, object] | None, chunk: int = 1,
    ) -> None:  # fmt: skip
        check_spaces(observation_space, action_space)
        super().__init__(
            observation_space,
            action_space,
            squash_output=True,  # predict() maps our [-1, 1] to the bounds
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )
        self.obs_dim = get_flattened_obs_dim(observation_space)
        self.chunk, self._action_shape = chunk, action_space.shape
        self._bounds: Tensor | None = None  # of the actions, where they were last asked for
        self.action_dim = chunk * get_flattened_obs_dim(action_space)
        self.averaging = 1.0
        """Share of the followed weights in the average, per update."""
        self.latest_weights: Weights | None = None
        """`weights` as they were when last asked for."""

    def _own_parameters(self) -> dict[str, nn.Parameter]:
        """All but those of averages, by name."""
        averages = {self.follower, *self.followers}
        return {name: each for name, each in self.named_parameters() if name.partition(".")[0] not in averages}

    def _make_optimizer(self, lr_schedule: Schedule) -> None:
        if "lr" in self.optimizer_kwargs:
            raise ValueError("optimizer_kwargs: got lr, expected it as the agent's learning_rate")
        options = {"lr": lr_schedule(1), **self.optimizer_kwargs}
        self.optimizer = self.optimizer_class(list(self._own_parameters().values()), **options)
        self._made, self._known, self._names = self.optimizer, self._own_parameters(), tuple(self._own_parameters())
        self._shapes = {name: each.shape for name, each in self._own_parameters().items()}
        self._learning = frozenset(name for name, each in self._own_parameters().items() if each.requires_grad)

    @property
    def weights(self) -> Weights:
        """What an update reads and writes, ready for it; made anew if parameters or optimizer were changed."""
        return Weights.of(self)

    def adopt_weights(self) -> None:
        """Let the optimizer know parameters that were replaced since it was made; at the start of training.

        A parameter that takes the place of another of the same name also takes its place in the optimizer, with its
        moments if the shapes agree.

        Raises:
            ValueError: if a parameter requires a gradient and the policy's own optimizer does not hold it, nothing
                would learn, the average has other parameters than what it follows, or a hook or an optimizer is of a
                kind that updates cannot serve.
        """
        present = self._own_parameters()
        if isinstance(self.optimizer, torch.optim.LBFGS):
            raise ValueError("optimizer_class: got LBFGS, expected one whose step takes no closure")
        if hooked := [name for name, each in present.items() if each._post_accumulate_grad_hooks]:
            raise ValueError(
                f"weights: hooks of {', '.join(hooked)} that follow the accumulation of gradients would not be called; "
                "use register_hook"
            )
        held, kept = {id(each) for each in held_by(self.optimizer)}, {id(each) for each in present.values()}
        added = present.keys() - self._known.keys()
        for name, before in self._known.items():
            if name not in present or id(before) in kept or present[name] is before:
                continue
            new = [] if id(present[name]) in held else [present[name]]  # the user may have given it to the optimizer
            for group in self.optimizer.param_groups:
                group["params"] = [one for each in group["params"] for one in (new if each is before else [each])]
            moments = self.optimizer.state.pop(before, None)
            if moments and new and before.shape == present[name].shape:
                self.optimizer.state[present[name]] = moments
            self.latest_weights = None
        self._known = present
        held = {id(each) for each in held_by(self.optimizer)}
        lost = [name for name, each in present.items() if each.requires_grad and id(each) not in held]
        if self.optimizer is not self._made:  # a user's own may leave out what it likes, but for what came after it
            lost = [name for name in lost if name in added]
        if lost:
            raise ValueError(
                f"weights: {', '.join(lost)} would not learn, policy.optimizer does not hold them; add them "
                "(policy.optimizer.add_param_group), or freeze them (requires_grad_(False))"
            )
        for follower, what in {self.follower: self.followed, **self.followers}.items():
            if (average := getattr(self, follower)) is None:
                continue
            mean, followed = (
                {name: each.shape for name, each in module.named_parameters()}
                for module in (average, getattr(self, what))
            )
            if mean != followed:
                wrong = ", ".join(sorted(str(name) for name in mean.keys() ^ followed.keys())) or "their shapes"
                raise ValueError(
                    f"weights: {follower} has other parameters than {what}, which it follows ({wrong}); "
                    f"do the same to both"
                )
        self.latest_weights = None
        if not self.weights.parameters:
            raise ValueError("weights: got none that learns, expected one at least; unfreeze some (requires_grad_)")

    def upgraded_optimizer_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """A saved state of the optimizer, of a version in which it held one vector, as that of single parameters."""
        (group, *more) = state["param_groups"]
        own = self._own_parameters()
        if more or len(group["params"]) != 1 or len(own) == 1:
            return state
        if isinstance(self.optimizer, torch.optim.Adafactor):
            raise ValueError("optimizer_class: got Adafactor, whose state of one vector is not that of its parts")
        (moments,) = state["state"].values() or ({},)
        place, states = {name: i for i, name in enumerate(own)}, dict[int, dict[str, Any]]()
        end = 0
        for name, each in in_order(self, ((name, own[name]) for name in own if name in self._learning)):
            part, end = slice(end, end + each.numel()), end + each.numel()
            states[place[name]] = {
                key: value[part].view_as(each).clone() if value.dim() else value.clone()
                for key, value in moments.items()
                if isinstance(value, Tensor)
            } | {key: value for key, value in moments.items() if not isinstance(value, Tensor)}
        group = group | {"params": list(range(len(own)))}
        return {"state": states if moments else {}, "param_groups": [group]}

    def check_storable(self, optimizer: bool) -> None:
        """Whether another policy of the same settings could take over the parameters, and the optimizer's state.

        Raises:
            ValueError: if there are others than when the policy was made.
        """
        present = self._own_parameters()
        if odd := sorted(present.keys() ^ set(self._names)):
            raise ValueError(
                f"policy: got other parameters than a new agent has ({', '.join(odd)}), expected the same; make pruning"
                " and parametrizations permanent before saving (prune.remove, remove_parametrizations)"
            )
        for name, shape in self._shapes.items():
            if present[name].shape != shape:
                raise ValueError(
                    f"policy: got {name} of shape {list(present[name].shape)}, a new agent has {list(shape)}"
                )
        latest = {id(each): present.get(name, each) for name, each in self._known.items()}  # not adopted yet
        held = [id(latest.get(id(each), each)) for each in held_by(self.optimizer)]
        own = [id(present[name]) for name in self._names]
        same = type(self.optimizer) is self.optimizer_class and len(self.optimizer.param_groups) == 1 and held == own
        if optimizer and not same:
            raise ValueError(
                "policy.optimizer: got one of another class than optimizer_class, or one that does not hold just the "
                "policy's parameters in one group, as a new agent's does; save with exclude=['policy.optimizer'], "
                "which restarts its moments when it is loaded"
            )

    @abstractmethod
    def decide(self, features: Tensor, noise: Tensor | None) -> Tensor:
        """Actions [B, D] in [-1, 1] given raw observation vectors [B, O] and standard normal noise [draws, B, D].

        Without noise the deterministic ones. All of `predict` between the observation and the bounds of the actions.
        """

    def draw(self, features: Tensor, generator: torch.Generator) -> np.ndarray:
        """Sampled actions [B, *shape] in [-1, 1] given raw observation vectors [B, O], by a generator."""
        size = (self.draws, len(features), self.action_dim)
        with torch.inference_mode():
            action = self.decide(features, torch.randn(size, generator=generator, device=features.device))
        assert self._action_shape is not None
        return action.cpu().numpy().reshape(-1, *self._action_shape)

    def scale_action(self, action: np.ndarray) -> np.ndarray:
        """Actions within the Box to [-1, 1]; 0 in a dimension of zero width."""
        box: Any = self.action_space
        width = box.high - box.low
        scaled: np.ndarray = np.where(width > 0, 2 * (action - box.low) / np.where(width > 0, width, 1) - 1, 0)
        return scaled.astype(np.float32)

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """Actions in [-1, 1] to the Box, to the last bit within it."""
        return to_box(scaled_action, self.action_space)

    def to_units(self, scaled: Tensor) -> Tensor:
        """Normalised actions [..., D] to the units of the environment, not clipped."""
        middle, half = self._middle_and_half(scaled)
        return middle + half * scaled

    def to_normalised(self, action: Tensor) -> Tensor:
        """Actions [..., D] in the units of the environment to normalised ones; 0 in a dimension of zero width."""
        middle, half = self._middle_and_half(action)
        return (action - middle) / torch.where(half > 0, half, 1.0)

    def widths(self) -> Tensor:
        """Whether each dimension of an action has a width, bool [D]: the others are constant."""
        return self._middle_and_half(torch.empty(0, dtype=torch.float64))[1].to(self.device) > 0

    def log_half_ranges(self) -> float:
        """Sum of the logs of half the ranges: log-densities in normalised units exceed the environment's by it."""
        half = self._middle_and_half(torch.empty(0, dtype=torch.float64))[1]
        return float(half[half > 0].log().sum())

    def _middle_and_half(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self._bounds is None or self._bounds.device != like.device or self._bounds.dtype != like.dtype:
            box: Any = self.action_space
            both = torch.as_tensor(np.stack([box.low.ravel(), box.high.ravel()]))
            self._bounds = both.to(like).repeat(1, self.chunk)  # kept: a copy to the device waits for it
        low, high = self._bounds
        return (low + high) / 2, (high - low) / 2

    def features(self, obs: PyTorchObs) -> Tensor:
        """Flatten a batch of observations to raw vectors [B, O] (Dict entries in the order of their space)."""
        encoded = preprocess_obs(obs, self.observation_space, normalize_images=False)
        if isinstance(encoded, dict):
            assert isinstance(self.observation_space, spaces.Dict)
            parts = [encoded[key] for key in self.observation_space.spaces]
            return torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)
        return encoded.reshape(len(encoded), -1)

    def set_training_mode(self, mode: bool) -> None:
        """As `train`, but free when nothing changes: `predict` asks each time."""
        if self.training != mode:
            self.train(mode)

    def predict(
        self, observation: np.ndarray | dict[str, np.ndarray], state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None, deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:  # fmt: skip
        """As in Stable-Baselines3, with a short way for one vector: a control loop waits for it."""
        if not isinstance(observation, np.ndarray) or observation.shape != self.observation_space.shape:
            return super().predict(observation, state, episode_start, deterministic)
        self.set_training_mode(False)
        features = torch.tensor(observation, dtype=torch.float32, device=self.device).view(1, -1)
        action = self._choose(features, deterministic).cpu().numpy()
        return self.unscale_action(action.reshape(self._action_shape)), state

    @torch.inference_mode()
    def _choose(self, features: Tensor, deterministic: bool) -> Tensor:
        if deterministic:
            return self.decide(features, None)
        size = (self.draws, len(features), self.action_dim)
        return self.decide(features, torch.randn(size, dtype=features.dtype, device=features.device))

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        return self._choose(self.features(observation), deterministic)
