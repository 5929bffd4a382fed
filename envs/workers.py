"""Environments in processes of their own, of which one may crash or hang without ending the training."""

from __future__ import annotations

import contextlib
import multiprocessing
import select
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import SubprocVecEnv
from stable_baselines3.common.vec_env.base_vec_env import (
    CloudpickleWrapper,
    VecEnvIndices,
    VecEnvObs,
    VecEnvStepReturn,
)
from stable_baselines3.common.vec_env.subproc_vec_env import _stack_obs, _worker

STARTUP = 120.0
"""Seconds that workers have for their imports and environments, beside the time for the reset."""
_FAREWELL = 5.0  # seconds that a worker has to end
_START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


class SupervisedVecEnv(SubprocVecEnv):
    """Stable-Baselines3's `SubprocVecEnv` that restarts a worker which dies or does not answer in time.

    A worker dies of an exception in the environment, too: its traceback is printed. What training sees of a restart is
    an episode that ends as truncated, with reward 0 and the last observation as ``terminal_observation``, an info with
    ``worker_restarted``, and a new episode. No ``episode`` is reported, as its return is not known. The new environment
    is not seeded: after the same seed it would meet the same fault. Attributes that `set_attr` has set are set again.

    Args:
        env_fns: makers of the environments.
        timeout: seconds for a step of all workers, > 0; a reset has `STARTUP` more.
        max_restarts: restarts of all workers together, >= 0, after which the next fault is an error.

    Attributes:
        restarts: how many there were.

    Raises:
        ValueError: if an argument is outside its range.
        ChildProcessError: by `step` and `reset`, if a worker fails once more.
    """

    def __init__(
        self, env_fns: Sequence[Callable[[], gym.Env[Any, Any]]], timeout: float = 60.0, max_restarts: int = 10
    ) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout: got {timeout}, expected a number of seconds above 0")
        if max_restarts < 0:
            raise ValueError(f"max_restarts: got {max_restarts}, expected an integer of at least 0")
        self.timeout, self.max_restarts, self.restarts = timeout, max_restarts, 0
        self._makers: list[Callable[[], gym.Env[Any, Any]]] = [partial(_undisturbed, maker) for maker in env_fns]
        super().__init__(self._makers, _START_METHOD)
        self.remotes = list(self.remotes)  # restarts replace them
        self._seen: list[Any] = [None] * len(env_fns)  # last observations
        self._set: list[dict[str, Any]] = [{} for _ in env_fns]  # attributes that a restart sets again

    def step_async(self, actions: np.ndarray) -> None:
        """Send the actions, [N, ...], to the workers; to one that is dead `step_wait` attends."""
        for remote, action in zip(self.remotes, actions, strict=True):
            with contextlib.suppress(OSError):
                remote.send(("step", action))
        self.waiting = True

    def step_wait(self) -> VecEnvStepReturn:
        """The step of every environment, or a restart."""
        deadline = time.monotonic() + self.timeout
        results = [self._stepped(i, deadline) for i in range(self.num_envs)]
        self.waiting = False
        self._seen, rewards, ended, infos, self.reset_infos = map(list, zip(*results, strict=True))
        rewards = [np.reshape(reward, ()) for reward in rewards]  # some environments give arrays of one element
        return self._stacked(), np.stack(rewards), np.stack(ended), infos

    def reset(self) -> VecEnvObs:
        """Reset every environment, with the seeds and options set for it; a worker that fails is restarted."""
        for remote, seed, options in zip(self.remotes, self._seeds, self._options, strict=True):
            with contextlib.suppress(OSError):
                remote.send(("reset", (seed, options)))
        deadline = time.monotonic() + STARTUP + self.timeout
        results = [self._reset(i, deadline) for i in range(self.num_envs)]
        self._seen, self.reset_infos = map(list, zip(*results, strict=True))
        self._reset_seeds()
        self._reset_options()
        return self._stacked()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Attributes of the environments.

        Raises:
            ValueError: if they are environments: a copy, not begun, would come here.
        """
        answers = self._ask("get_attr", attr_name, indices)
        if any(isinstance(answer, gym.Env) for answer in answers):
            raise ValueError(
                f"get_attr: got {attr_name!r}, an environment, which stays in its process; call its methods by "
                "env_method, or use the backend 'sync'"
            )
        return answers

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the environments."""
        self._ask("set_attr", (attr_name, value), indices)
        for i in self._get_indices(indices):
            self._set[i][attr_name] = value

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Pictures of the environments."""
        return self._ask("render", "a picture", None) if self.render_mode == "rgb_array" else super().get_images()

    def has_attr(self, attr_name: str) -> bool:
        """Whether all environments have an attribute."""
        return all(self._ask("has_attr", attr_name, None))

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        """Call a method of the environments."""
        return self._ask("env_method", (method_name, method_args, kwargs), indices)

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Whether the environments have a wrapper."""
        return self._ask("is_wrapped", wrapper_class, indices)

    def _ask(self, question: str, data: Any, indices: VecEnvIndices) -> list[Any]:
        """The answers of workers. All are read, also where one is dead: the next `step` must not find an old one.

        Raises:
            ChildProcessError: if a worker is dead, or died of the question.
        """
        chosen, answers, dead = list(self._get_indices(indices)), list[Any](), list[int]()
        for i in chosen:
            with contextlib.suppress(OSError):
                self.remotes[i].send((question, data))
        for i in chosen:
            try:
                answers.append(self.remotes[i].recv())
            except (EOFError, OSError):
                dead.append(i)
        if dead:
            name = data if isinstance(data, str) else data[0] if isinstance(data, tuple) else data.__name__
            raise ChildProcessError(
                f"environment {dead[0]}: its worker died, got no answer to {question} {name!r}; see what it printed; "
                "the next step or reset restarts it"
            )
        return answers

    def close(self) -> None:
        """End the workers, by force if need be."""
        if self.closed:
            return
        for remote in self.remotes:
            with contextlib.suppress(OSError):
                remote.send(("close", None))
        deadline = time.monotonic() + _FAREWELL
        for remote, process in zip(self.remotes, self.processes, strict=True):
            process.join(max(deadline - time.monotonic(), 0))
            process.kill()
            process.join()
            remote.close()
        self.closed = True

    def _stacked(self) -> VecEnvObs:
        return _stack_obs(self._seen, self.observation_space)

    def _stepped(self, i: int, deadline: float) -> tuple[Any, ...]:
        """What worker i answers to a step: observation, reward, whether the episode ended, info, info of the reset."""
        try:
            answer: tuple[Any, ...] = self._receive(i, deadline)
            return answer
        except (EOFError, OSError) as fault:
            info = {"terminal_observation": self._seen[i], "TimeLimit.truncated": True, "worker_restarted": True}
            obs, reset_info = self._restart(i, fault)
            return obs, 0.0, True, info, reset_info

    def _reset(self, i: int, deadline: float) -> tuple[Any, dict[str, Any]]:
        try:
            answer: tuple[Any, dict[str, Any]] = self._receive(i, deadline)
            return answer
        except (EOFError, OSError) as fault:
            return self._restart(i, fault)

    def _receive(self, i: int, deadline: float) -> Any:
        """The answer of worker i; EOFError or OSError if it is dead, or has none before the deadline."""
        poller = select.poll()  # takes a sixth of the time of the connection's own poll
        poller.register(self.remotes[i], select.POLLIN)
        if not poller.poll(1000 * max(deadline - time.monotonic(), 0)):
            raise TimeoutError(f"no answer within {self.timeout:g} s")
        return self.remotes[i].recv()

    def _restart(self, i: int, fault: Exception) -> tuple[Any, dict[str, Any]]:
        """Start worker i anew and reset its environment; returns observation and info."""
        while True:
            if not isinstance(fault, TimeoutError):
                self.processes[i].join(_FAREWELL)
            self.processes[i].kill()
            self.processes[i].join()
            what = str(fault) if isinstance(fault, TimeoutError) else f"died, exit code {self.processes[i].exitcode}"
            if self.restarts == self.max_restarts:
                raise ChildProcessError(
                    f"environment {i}: its worker failed ({what}), expected at most {self.max_restarts} restarts of "
                    "workers; see what it printed, repair the environment or allow more"
                ) from fault
            self.restarts += 1
            text = f"environment {i}: its worker failed ({what}); restart {self.restarts} of {self.max_restarts}"
            warnings.warn(text, RuntimeWarning, stacklevel=4)
            self.remotes[i].close()
            self._start(i)
            try:
                for attribute in self._set[i].items():
                    self.remotes[i].send(("set_attr", attribute))
                self.remotes[i].send(("reset", (None, {})))
                deadline = time.monotonic() + STARTUP + self.timeout
                answers = [self._receive(i, deadline) for _ in range(len(self._set[i]) + 1)]
                reset: tuple[Any, dict[str, Any]] = answers[-1]
                return reset
            except (EOFError, OSError) as again:
                fault = again

    def _start(self, i: int) -> None:
        context: Any = multiprocessing.get_context(_START_METHOD)
        self.remotes[i], theirs = context.Pipe()
        arguments = (theirs, self.remotes[i], CloudpickleWrapper(self._makers[i]))
        self.processes[i] = context.Process(target=_worker, args=arguments, daemon=True)
        self.processes[i].start()
        theirs.close()


def _undisturbed(maker: Callable[[], gym.Env[Any, Any]]) -> gym.Env[Any, Any]:
    """Make an environment in a process that Ctrl-C does not reach: the trainer ends it after it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return maker()
