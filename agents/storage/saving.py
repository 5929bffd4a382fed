"""Saving and loading of agents, and of all that their training goes on from; nothing is unpickled."""

from __future__ import annotations

import dataclasses
import io
import math
import random
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar, TypeVar, cast

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import open_path, recursive_getattr, recursive_setattr
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import check_for_correct_spaces, get_system_info
from stable_baselines3.common.vec_env import VecEnv
from torch.utils._python_dispatch import TorchDispatchMode

from . import format as checkpoint
from .values import CheckpointError, storable_schedule

Self = TypeVar("Self", bound="Checkpointed")
PathOrFile = str | Path | io.BufferedIOBase

_NEEDED: dict[str, type | tuple[type, ...]] = {
    "policy_class": (type, str), "policy_kwargs": dict, "observation_space": spaces.Space, "action_space": spaces.Space,
    "config": object,
}  # fmt: skip
"""Attributes without which no agent can be made, and what they are."""


class Checkpointed(BaseAlgorithm):
    """An agent whose saved files hold data only. A mixin, before the algorithm's own base class."""

    gamma: float
    """Discount factor."""
    _remade: ClassVar[tuple[str, ...]]
    """Attributes that `_setup_model` or `learn` makes anew: saved agents lack them."""

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed Python, NumPy, PyTorch, the environments and the agent's own generator."""
        super().set_random_seed(seed)
        self._generator = torch.Generator(self.device)
        # Resuming at num_timesteps must not replay the noise of the start.
        self._generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed + self.num_timesteps)

    def save(
        self, path: PathOrFile, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None
    ) -> None:
        """Save networks, optimizers, normalisers and all attributes, for `load`.

        Args:
            path: file, with or without .zip, or file object.
            exclude: attributes to leave out; they are the constructor's after `load`, or those given to it.
                "policy.optimizer" leaves out the optimizer's state, which then begins anew.
            include: attributes to save that are left out by default.

        Raises:
            CheckpointError: if an attribute cannot be expressed as data; the file stays as it is then.
            ValueError: if the policy or its optimizer was changed so that no new agent could take them over.
        """
        document = checkpoint.encode(self.contents(exclude, include))
        with opened(path, "w") as file:
            checkpoint.write(file, {"agent": document})

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        """As Stable-Baselines3, but an agent that could not be saved after training says so before."""
        try:
            checkpoint.encode(self.contents())
        except CheckpointError as error:
            warnings.warn(f"this agent cannot be saved as it is: {error}", UserWarning, stacklevel=3)
        except ValueError:  # weights that are pruned, say: what is made permanent later can be saved
            pass
        return super()._setup_learn(*args, **kwargs)

    def contents(self, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> dict[str, Any]:
        """What `save` writes: attributes, the parameters of networks and optimizers, and further variables."""
        stated, variables = self._get_torch_save_params()
        exclude = {exclude} if isinstance(exclude, str) else set(exclude or ())
        left_out = {*self._excluded_save_params(), *exclude} - set(include or ())
        parameters = {name: each for name, each in self.get_parameters().items() if name not in exclude}
        self.policy.check_storable("policy.optimizer" in parameters)  # type: ignore[operator]
        left_out |= {name.split(".")[0] for name in (*stated, *variables)}
        attributes = {name: value for name, value in vars(self).items() if name not in left_out}
        if "_config" in attributes:
            attributes["config"] = attributes.pop("_config")
        if callable(rate := attributes.get("learning_rate")):
            attributes["learning_rate"] = storable_schedule(rate)
        return {
            "attributes": attributes,
            "parameters": parameters,
            "variables": {name: recursive_getattr(self, name) for name in variables},
            "left_out": sorted(exclude & vars(self).keys()),
        }

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "lr_schedule", "_generator", *self._remade]

    @classmethod
    def load(
        cls: type[Self], path: PathOrFile, env: GymEnv | None = None, device: torch.device | str = "auto",
        custom_objects: dict[str, Any] | None = None, print_system_info: bool = False, force_reset: bool = True, *,
        allow_pickle: bool = False, **kwargs: Any,
    ) -> Self:  # fmt: skip
        """Make an agent of a saved file.

        Args:
            path: file, with or without .zip, or file object.
            env: environment to go on with; None where the agent is only to act.
            device: "auto", "cpu", "cuda" or a torch device.
            custom_objects: attributes in place of the saved ones, or that were left out when it was saved; others are
                ignored, as by Stable-Baselines3.
            print_system_info: print the versions of this system.
            force_reset: begin new episodes when training goes on.
            allow_pickle: read a file of Stable-Baselines3's format, too. That executes what is in it.
            **kwargs: attributes in place of the saved ones; fields of the config among them.

        Raises:
            CheckpointError: if the file is damaged, no agent of this class, written by a newer version, or in
                Stable-Baselines3's format without `allow_pickle`, or policy_kwargs are not the saved ones.
            TypeError: if a keyword is no attribute.
            ValueError: if env has other spaces.
        """
        if print_system_info:
            get_system_info()
        with opened(path, "r") as file:
            label = label_of(path, file)
            if allow_pickle and checkpoint.is_pickled(file, label):
                stream = cast(io.BufferedIOBase, file)
                return super().load(stream, env, device, custom_objects, print_system_info, force_reset, **kwargs)
            content = _read(file, label)
            size = file.seek(0, io.SEEK_END)
        attributes = content["attributes"] | (custom_objects or {})
        fields = {field.name for field in dataclasses.fields(cls.config_class)}  # type: ignore[attr-defined]
        if unknown := sorted(kwargs.keys() - attributes.keys() - fields - {"config", *dir(cls)}):
            raise TypeError(f"unknown argument: got {', '.join(unknown)}, expected attributes of {cls.__name__}")
        if "config" in kwargs and kwargs["config"].learning_rate != attributes["config"].learning_rate:
            kwargs.setdefault("_rate", kwargs["config"].learning_rate)  # in use where lr_schedule adapts it
        elif isinstance(rate := kwargs.get("learning_rate"), int | float):
            kwargs.setdefault("_rate", rate)
        if missing := [name for name in _NEEDED if name not in attributes]:
            given = f"custom_objects={{{missing[0]!r}: ...}}"
            raise CheckpointError(f"{label}: got a file saved without {', '.join(missing)}; give load {given}")
        for name, kind in _NEEDED.items():
            if not isinstance(attributes[name], kind):
                raise CheckpointError(f"no checkpoint: {label}: got a {type(attributes[name]).__name__} as {name}")
        if env is not None:
            env = cls._wrap_env(env, attributes.get("verbose", 0))
            check_for_correct_spaces(env, attributes["observation_space"], attributes["action_space"])
            attributes |= {"n_envs": env.num_envs} | ({"_last_obs": None} if force_reset else {})
        try:
            saved = attributes["policy_kwargs"]
            if kwargs.get("policy_kwargs", saved) != saved:
                raise ValueError(f"policy_kwargs: got {kwargs['policy_kwargs']}, expected the saved ones, {saved}")
            return cls._rebuild(content, attributes | kwargs, kwargs, env, device, size)
        except Exception as error:  # whatever data of other kinds and sizes lead to
            reason = error if isinstance(error, ValueError) else repr(error)
            changed = fields & kwargs.keys()
            if changed and "state_dict" in str(error):
                reason = f"{', '.join(sorted(changed))}: the saved weights are of an agent with another value"
            raise CheckpointError(f"{label}: no {cls.__name__} can be made of it: {reason}") from error

    @classmethod
    def _rebuild(
        cls: type[Self], content: dict[str, Any], attributes: dict[str, Any], given: Collection[str],
        env: GymEnv | None, device: torch.device | str, size: int,
    ) -> Self:  # fmt: skip
        """Make the agent of a document of `size` bytes; attributes given by their names need not be in it."""
        settings = {
            "config",
            *dataclasses.asdict(attributes["config"]),
            "learning_rate",
            "lr_schedule",
        }  # checked there
        for name in attributes.keys() - settings:
            if callable(getattr(cls, name, None)) or isinstance(getattr(cls, name, None), property):
                raise CheckpointError(f"got an attribute {name}, which is a method")
        model = cls(policy=attributes["policy_class"], env=env, device=device, _init_setup_model=False)  # type: ignore[call-arg]
        if type(model.config) is not type(attributes["config"]):  # type: ignore[attr-defined]
            raise CheckpointError(f"it is one of another class, with a {type(attributes['config']).__name__}")
        known = {*content["attributes"], *content.get("left_out", ()), *_NEEDED, *given, *vars(model), *dir(cls)}
        vars(model).update({name: value for name, value in attributes.items() if name in known})
        with _Allocations(size + 2**24):
            model._setup_model()
        parameters = content["parameters"]
        if "policy.optimizer" not in parameters:  # left out when it was saved
            parameters = parameters | {"policy.optimizer": model.policy.optimizer.state_dict()}
        model.set_parameters(parameters, exact_match=True, device=device)
        for name in model._get_torch_save_params()[1]:
            recursive_setattr(model, f"{name}.data", content["variables"][name])
        return model

    def set_parameters(
        self, load_path_or_dict: Any, exact_match: bool = True, device: torch.device | str = "auto", *,
        allow_pickle: bool = False,
    ) -> None:  # fmt: skip
        """Take parameters from a saved file or from a dictionary as `get_parameters` returns it.

        Args:
            load_path_or_dict: file, file object or dictionary.
            exact_match: refuse a choice of them.
            device: for Stable-Baselines3; parameters stay where they are.
            allow_pickle: see `load`.

        Raises:
            CheckpointError: if the file is none of ours, see `load`.
            ValueError: if the names are others.
        """
        parameters = load_path_or_dict
        if not isinstance(parameters, dict):
            with opened(parameters, "r") as file:
                label = label_of(load_path_or_dict, file)
                if allow_pickle and checkpoint.is_pickled(file, label):
                    return super().set_parameters(cast(Any, file), exact_match, device)
                parameters = _read(file, label)["parameters"]
        if "param_groups" in parameters.get("policy.optimizer", ()):
            upgraded: Any = self.policy.upgraded_optimizer_state(parameters["policy.optimizer"])  # type: ignore[operator]
            parameters = parameters | {"policy.optimizer": upgraded}
        super().set_parameters(parameters, exact_match, device)

    def training_state(self) -> dict[str, Any]:
        """What training goes on from, beside what `save` writes."""
        return {"device": self.device.type, "generator": self._generator.get_state()}

    def set_training_state(self, state: dict[str, Any]) -> None:
        """Go on from where `training_state` was called; on another kind of device with other random numbers."""
        if state["device"] == self.device.type:
            self._generator.set_state(state["generator"])


class _Allocations(TorchDispatchMode):
    """Refuses new tensors of more bytes in all than a limit: networks that a file describes must be those it holds."""

    def __init__(self, limit: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._limit = self._left = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the size first, then do it."""
        kwargs = kwargs or {}
        if args and isinstance(args[0], list) and all(isinstance(n, int) for n in args[0]):
            self._left -= math.prod(args[0]) * (kwargs.get("dtype") or torch.get_default_dtype()).itemsize
            if self._left < 0:
                raise CheckpointError(f"got networks of more than the file's {self._limit} bytes, expected those in it")
        return func(*args, **kwargs)


def _read(file: IO[bytes], label: str) -> dict[str, Any]:
    """What `contents` returned."""
    content = checkpoint.read(file, "agent", label)
    for part in ("attributes", "parameters", "variables"):
        if not isinstance(content.get(part), dict):
            raise CheckpointError(f"no checkpoint: {label}: got no {part}, expected names with values")
    return content


@contextmanager
def opened(path: PathOrFile, mode: str) -> Iterator[IO[bytes]]:
    """A file by its path, as Stable-Baselines3 finds it, or the file object itself."""
    file = cast(IO[bytes], open_path(path, mode, suffix="zip"))
    try:
        yield file
    finally:
        if isinstance(path, str | Path):
            file.close()


def label_of(path: PathOrFile, file: IO[bytes]) -> str:
    """What messages call a file."""
    return str(path if isinstance(path, str | Path) else getattr(file, "name", "the file object"))


def capture(agent: Checkpointed) -> dict[str, Any]:
    """All that training goes on from and `save` leaves out; taken between an update and the next rollout.

    Replay, imagined transitions, noise with memory, random generators, environments that can tell their state (those
    of `BatchVecEnv`), and what was recorded for the log but not yet written.
    """
    log, env = agent.logger, agent.get_env()
    return {
        "training": agent.training_state(),
        "environments": env.get_state() if tells_its_state(env) else None,  # type: ignore[union-attr]
        "random": random_state(agent),
        "log": [dict(log.name_to_value), dict(log.name_to_count), dict(log.name_to_excluded)],
    }


def random_state(agent: Checkpointed) -> dict[str, Any]:
    """The random generators of the process and of the action space; the agent's own is in its training state."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(agent.device)] if agent.device.type == "cuda" else [],
        "action_space": agent.action_space.np_random.bit_generator.state,
    }


def set_random_state(agent: Checkpointed, state: dict[str, Any]) -> None:
    """Go on from what `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and agent.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"][0], agent.device)
    agent.action_space.np_random.bit_generator.state = state["action_space"]


def restore(agent: Checkpointed, state: dict[str, Any]) -> list[str]:
    """Go on from what `capture` returned; right before `learn`, with the agent's environments and logger set.

    Returns:
        What could not be restored, in words; nothing where training goes on exactly.

    Raises:
        CheckpointError: if it is none of this agent's.
    """
    try:
        return _restored(agent, state)
    except Exception as error:  # whatever data of other kinds and sizes lead to
        raise CheckpointError(f"the checkpoint holds no state of a run of this agent: {error!r}") from error


def _restored(agent: Checkpointed, state: dict[str, Any]) -> list[str]:
    missing = []
    agent.set_training_state(state["training"])
    env = agent.get_env()
    if state["environments"] is not None and tells_its_state(env):
        cast(Any, env).set_state(state["environments"])
    else:
        missing.append("the environments, which cannot tell their state: they start new episodes")
    if state["training"]["device"] != agent.device.type:
        missing.append(f"the random numbers, which are others on {agent.device.type}")
    set_random_state(agent, state["random"])
    log = agent.logger
    for values, saved in zip((log.name_to_value, log.name_to_count, log.name_to_excluded), state["log"], strict=True):
        cast("dict[str, Any]", values).update(saved)
    return missing


def tells_its_state(env: VecEnv | None) -> bool:
    """Whether environments can be put back where they were."""
    return hasattr(env, "get_state") and hasattr(env, "set_state")
