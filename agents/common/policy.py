"""Policies whose learning parameters are one vector: what an update does to them it does in a handful of kernels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, preprocess_obs
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from ...envs.make import check_spaces
from .networks import RunningNorm


class JoinedPolicy(BasePolicy):
    """A Stable-Baselines3 policy for Box actions and vector observations, with one vector of parameters.

    A subclass builds its networks, `obs_norm` and `normalize_observation`, then calls `_join`.

    Args:
        observation_space: Box, or Dict of Boxes; no images.
        action_space: Box with finite bounds. The networks work in [-1, 1], and `predict` maps to the bounds.
        optimizer_class: optimizer of all parameters.
        optimizer_kwargs: its arguments besides the learning rate.

    Raises:
        ValueError: if a space is not supported.
    """

    obs_norm: RunningNorm
    normalize_observation: bool
    draws: int
    """Standard normals per action dimension that a sampled action takes."""
    followed: ClassVar[str]
    """Name of the module that `average` follows; its parameters are the first of the vector."""
    follower: ClassVar[str]
    """Name of the module that holds the average, or of None."""

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.Space,  # type: ignore[type-arg]
        optimizer_class: type[torch.optim.Optimizer], optimizer_kwargs: dict[str, object] | None,
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
        self.action_dim, self._action_shape = get_flattened_obs_dim(action_space), action_space.shape
        self.averaging = 1.0
        self._average: Tensor | None = None
        self._first: str | None = None  # name of the first of the trained parameters, which are slow to list

    def _join(self, lr_schedule: Schedule) -> None:
        """Make the optimizer, of one vector that holds all `trained` parameters."""
        vector = nn.Parameter(torch.empty(0))
        options = {"lr": lr_schedule(1), **self.optimizer_kwargs}
        self.optimizer = self.optimizer_class([vector], **options)
        self.joined()

    def normalize(self, features: Tensor) -> Tensor:
        """Raw observation vectors [B, O] as the networks see them: standardised by its own statistics, or raw."""
        return self.obs_norm.forward(features) if self.normalize_observation else features

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name: `followed` first, the larger before the smaller for their alignment."""
        named = [item for item in self.named_parameters() if item[1].requires_grad]
        prefix = f"{self.followed}."
        return dict(sorted(named, key=lambda item: (not item[0].startswith(prefix), -item[1].numel())))

    def joined(self) -> nn.Parameter:
        """The optimizer's one parameter, of which all `trained` ones are views.

        A move to another device or a deep copy leaves them on their own; then they are joined anew.
        """
        vector: nn.Parameter = self.optimizer.param_groups[0]["params"][0]
        if self._first is None or self.get_parameter(self._first).data_ptr() != vector.data_ptr():
            parameters = self.trained()
            self._first = next(iter(parameters))
            vector.data = _join(list(parameters.values()))
            average: nn.Module | None = getattr(self, self.follower)
            if average is not None:
                prefix = f"{self.followed}."
                names = [name.removeprefix(prefix) for name in parameters if name.startswith(prefix)]
                self._average = _join([average.get_parameter(name) for name in names])
        return vector

    def average(self, vector: Tensor) -> None:
        """Move the follower towards what it follows, which the `joined` vector begins with, by `averaging`."""
        if self._average is not None:
            self._average.lerp_(vector[: len(self._average)], self.averaging)

    def snapshot(self) -> Callable[[], None]:
        """Keep what an update changes: weights, their average, the optimizer's state. The result puts it back."""
        vector, states = self.joined(), self.optimizer.state
        changing = [vector.detach(), self._average, *states.get(vector, {}).values()]
        kept = [(tensor, tensor.clone()) for tensor in changing if isinstance(tensor, Tensor)]
        is_new = vector not in states

        def restore() -> None:
            for tensor, before in kept:
                tensor.copy_(before)
            if is_new:
                states.clear()

        return restore

    @abstractmethod
    def decide(self, features: Tensor, noise: Tensor | None) -> Tensor:
        """Actions [B, D] in [-1, 1] given raw observation vectors [B, O] and standard normal noise [draws, B, D].

        Without noise the deterministic ones. All of `predict` between the observation and the bounds of the actions.
        """

    def features(self, obs: PyTorchObs) -> Tensor:
        """Flatten a batch of observations to raw vectors [B, O] (Dict entries in the order of their space)."""
        encoded = preprocess_obs(obs, self.observation_space, normalize_images=False)
        if isinstance(encoded, dict):
            assert isinstance(self.observation_space, spaces.Dict)
            return torch.cat([encoded[key].flatten(1) for key in self.observation_space.spaces], dim=1)
        return encoded.flatten(1)

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
        return self.decide(features, torch.randn(self.draws, len(features), self.action_dim, device=features.device))

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        return self._choose(self.features(observation), deterministic)


def _join(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Make the parameters views of one vector, which is returned: what is done to it is done to all of them at once."""
    vector = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for parameter, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view_as(parameter)
    return vector
