"""Gymnasium's MuJoCo v5 tasks on mujoco_warp: physics, rewards and resets on one device, in float32 (extra `gpu`).

    env = make_vec("HalfCheetah-v5", n_envs=4096, seed=0, backend="warp", device="cuda")

What a task observes and earns is what `mujoco_tasks.py` says, as for the batches in NumPy. The simulation is used as a
function of states: whatever determines the course of a world is in its row of them, so that a reset is a choice between
rows and no world can touch another.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import mujoco
import mujoco_warp as mjw
import torch
import warp as wp
from torch import Tensor

from .batch import make_prototype
from .known import bare_task_of_id
from .mujoco_tasks import TASKS, Batch, Task
from .tensor import TensorTask, TensorVecEnv, indexed

Solver = Literal["model", "newton"]

_MOST = 1e10
"""Above this MuJoCo calls a position, a velocity or an acceleration bad (mjMAXVAL)."""
_DRAWS = 32
"""Places drawn for Pusher's object, of which the first valid one is taken: none is with a probability of 4e-14."""


@wp.kernel  # type: ignore[untyped-decorator]
def _keep_most(contacts: wp.array[int], pairs: wp.array[int], constraints: wp.array[int], most: wp.array[int]) -> None:
    """Largest number of contacts in all worlds, and of constraints in one, so far.

    Pairs of bodies that may touch need the same room: those above it are dropped before they become contacts.
    """
    world = wp.tid()
    if world == 0:
        wp.atomic_max(most, 0, contacts[0])
        wp.atomic_max(most, 0, pairs[0])
    if constraints[world] > most[1]:
        wp.atomic_max(most, 1, constraints[world])


class Worlds(Batch):
    """N worlds of one model on a device, and what the functions of a task read of them.

    ``worlds["qpos"]`` is a copy of that field after the last call of `read`, made at the first access.

    Args:
        env: the prototype, with the task's arguments as attributes.
        model: its model, perhaps with another solver.
        task: what is observed, and whether contact forces are.
        n: number of worlds, N.
        device: where they are.
        contacts: room for contacts, of all worlds together so many per world; None: as mujoco_warp guesses.
        constraints: room for constraints in each world; None: as mujoco_warp guesses.

    Attributes:
        fields: names of what determines the course of a world, beside its controls.
        most: [2], largest number of contacts in all worlds, and of constraints in one, so far.
        room: how many of each there is room for.
    """

    xp = torch

    def __init__(
        self, env: Any, model: Any, task: Task, n: int, device: torch.device, contacts: int | None,
        constraints: int | None,
    ) -> None:  # fmt: skip
        self.env, self.model, self._task, self._n = env, model, task, n
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        wp.config.quiet = True  # else it prints its version, and every kernel that it compiles
        wp.init()
        self._device = wp.device_from_torch(device)
        with wp.ScopedDevice(self._device):
            self._model = mjw.put_model(model)
            self._data = mjw.put_data(model, data, nworld=n, nconmax=contacts, njmax=constraints)
            self._most = wp.zeros(2, dtype=int)
        self.fields = ("qpos", "qvel", *(("act",) if model.na else ()), "qacc_warmstart")
        self.most, self.room = wp.to_torch(self._most), (self._data.naconmax, self._data.njmax)
        self._mass = torch.as_tensor(model.body_mass, dtype=torch.float32, device=device)[:, None]
        self._arrays: dict[str, Tensor] = {}
        self._views: dict[str, Tensor] = {}
        self.simulate = self._recorded(self._simulate)
        self.forward = self._recorded(lambda: mjw.forward(self._model, self._data)) if task.derived else None

    def _simulate(self) -> None:
        for _ in range(self.env.frame_skip):
            mjw.step(self._model, self._data)
            counts = [self._data.nacon, self._data.ncollision, self._data.nefc]
            wp.launch(_keep_most, self._n, inputs=counts, outputs=[self._most])
        if self._task.contact_forces:
            mjw.rne_postconstraint(self._model, self._data)

    def _recorded(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run it once, which compiles its kernels. On CUDA it is one graph from then on, on PyTorch's stream."""

        def eager() -> None:
            with wp.ScopedDevice(self._device):
                run()

        eager()
        if not self._device.is_cuda:
            return eager
        with wp.ScopedDevice(self._device), wp.ScopedCapture(self._device) as capture:
            run()
        wp.synchronize_device(self._device)
        where = wp.device_to_torch(self._device)

        def launch() -> None:
            wp.capture_launch(capture.graph, wp.stream_from_torch(torch.cuda.current_stream(where)))

        return launch

    def view(self, field: str) -> Tensor:
        """A field of mujoco_warp's data, not copied, [N, ...]."""
        if field not in self._views:
            self._views[field] = wp.to_torch(getattr(self._data, field))
        return self._views[field]

    def load(self, parts: Sequence[Tensor], controls: Tensor | None = None) -> None:
        """Put the worlds into a state: of each of the `fields` its part, [N, k]; controls [N, nu], None: 0."""
        for field, part in zip(self.fields, parts, strict=True):
            self.view(field).copy_(part)
        held = self.view("ctrl")
        held.zero_() if controls is None else held.copy_(controls)

    def read(self) -> Tensor:
        """The state of the worlds, [N, K]: of each of the `fields` its part."""
        parts = [self.view(field) for field in self.fields]
        state = torch.cat(parts, 1)
        self._arrays = dict(zip(self.fields, state.split([part.shape[1] for part in parts], 1), strict=True))
        return state

    def __getitem__(self, field: str) -> Tensor:
        if field not in self._arrays:
            self._arrays[field] = self.view(field).clone()
        return self._arrays[field]

    def mass_centers(self) -> Tensor:
        """Centre of mass of each model in the plane, [N, 2]."""
        return ((self._mass * self["xipos"]).sum(1) / self._mass.sum())[:, :2]


class WarpTask(TensorTask):
    """One of the `TASKS` for n worlds, see `WarpVecEnv`.

    States are positions, velocities, what the solver starts from, the point whose displacement pays, the observation.
    """

    def __init__(
        self, id: str, n: int, device: torch.device, solver: Solver, contacts: int | None, constraints: int | None,
        env_kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        name = bare_task_of_id(id)
        if name not in TASKS:
            raise ValueError(f"warp: got {id!r}, expected one of {', '.join(TASKS)}; use another backend")
        if env_kwargs.get("render_mode"):
            raise ValueError(f"warp: got render_mode={env_kwargs['render_mode']!r}, expected None; use another backend")
        prototype = make_prototype(id, n, env_kwargs)
        env: Any = prototype.unwrapped
        self._task, self._env, self.spec = TASKS[name], env, prototype.spec
        steps = prototype.spec.max_episode_steps if prototype.spec else None
        self.limit = math.inf if steps is None or steps < 0 else steps
        self.observation_space, self.action_space = env.observation_space, env.action_space
        try:
            model = _model(id, env.model, solver)
            self.worlds = Worlds(env, model, self._task, n, device, contacts, constraints)
        except (NotImplementedError, ValueError) as error:
            raise ValueError(f"warp: {id} cannot be simulated: {error}") from error
        if name == "Ant-v5":
            warnings.warn(
                "warp: Ant-v5's contacts differ from MuJoCo's, whose friction has other directions where a leg stands "
                "steeply: a policy may do better or worse in the task itself",
                UserWarning, stacklevel=3,
            )  # fmt: skip
        self._first = [
            torch.as_tensor(each, dtype=torch.float32, device=device) for each in (env.init_qpos, env.init_qvel)
        ]
        self._overflowed = False
        self._sizes = [self.worlds.view(field).shape[1] for field in self.worlds.fields]

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """As the task's own reset draws it, with other random numbers."""

        def uniform(columns: int) -> Tensor:
            return 2 * torch.rand(count, columns, generator=generator, device=generator.device) - 1

        (qpos, qvel), kind = self._first, self._task.start
        if kind in ("uniform", "normal"):
            scale, velocity = self._env._reset_noise_scale, uniform(len(qvel))
            if kind == "normal":
                velocity = torch.randn(velocity.shape, generator=generator, device=generator.device)
            return self.begin(qpos + scale * uniform(len(qpos)), qvel + scale * velocity)
        positions, velocities = qpos.repeat(count, 1), qvel + 0.005 * uniform(len(qvel))
        if kind == "reacher":  # the target anywhere in a disk of radius 0.2
            radius, angle = 0.2 * (0.5 + 0.5 * uniform(1)).sqrt(), math.pi * uniform(1)
            positions += 0.1 * uniform(len(qpos))
            positions[:, -2:] = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
            velocities[:, -2:] = 0
        else:  # the object in a rectangle, but not within 0.17 of the goal at the origin
            places = torch.stack([0.15 * uniform(_DRAWS) - 0.15, 0.2 * uniform(_DRAWS)], 2)
            first = (places.square().sum(2) > 0.17**2).to(torch.uint8).argmax(1)
            positions[:, -4:-2] = places.gather(1, first[:, None, None].expand(-1, 1, 2)).squeeze(1)
            positions[:, -2:] = velocities[:, -4:-2] = velocities[:, -2:] = 0
        return self.begin(positions, velocities)

    def begin(self, qpos: Tensor, qvel: Tensor) -> Tensor:
        """States of episodes that begin with positions [N, nq] and velocities [N, nv]."""
        worlds = self.worlds
        nothing = [qpos.new_zeros(len(qpos), size) for size in self._sizes[2:]]
        worlds.load([qpos, qvel, *nothing])
        if worlds.forward is not None:
            worlds.forward()
            if self._task.contact_forces:
                worlds.view("cfrc_ext").zero_()
        return self._states()

    def _states(self) -> Tensor:
        """The states in which the worlds are."""
        worlds, task = self.worlds, self._task
        parts = [worlds.read()]
        if task.point is not None:
            worlds.after = task.point(worlds)
            parts.append(worlds.after.reshape(len(parts[0]), -1))
        return torch.cat([*parts, *(part(worlds) for part in task.observation)], 1)

    def observe(self, state: Tensor) -> Tensor:
        """The last columns."""
        return state[:, -self.observation_space.shape[0] :]

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """frame_skip steps; a world that becomes unstable terminates with reward 0 and its last sound state."""
        worlds, size = self.worlds, sum(self._sizes)
        worlds.load(state[:, :size].split(self._sizes, 1), action)
        worlds.actions = action
        worlds.simulate()
        after = self._states()
        if self._task.point is not None:
            worlds.before = state[:, size : -self.observation_space.shape[0]].reshape(worlds.after.shape)
        reward, terminated, info = self._task.outcome(worlds)
        sound = (after.abs() <= _MOST).all(1) & reward.isfinite()
        reward, info["simulation_diverged"] = torch.where(sound, reward, 0.0), ~sound
        return torch.where(sound[:, None], after, state), reward, terminated | ~sound, info

    def look(self) -> None:
        """Warn, once, if there were more contacts or constraints than there is room for."""
        if self._overflowed:
            return
        needed, n = self.worlds.most.tolist(), len(self.worlds.view("qpos"))
        for name, most, room, per in zip(("contacts", "constraints"), needed, self.worlds.room, (n, 1), strict=True):
            if most > room:
                self._overflowed = True
                warnings.warn(
                    f"warp_{name}: got room for {room // per} per world, but {math.ceil(most / per)} were needed; the "
                    f"others are left out of the simulation; set warp_{name} higher",
                    RuntimeWarning, stacklevel=3,
                )  # fmt: skip


class WarpVecEnv(TensorVecEnv):
    """N environments of one of the `TASKS`, simulated by mujoco_warp.

    An episode ends as terminated, with reward 0, if its simulation becomes unstable: a number is not finite or above
    1e10. `diverged` counts them, infos have "simulation_diverged".

    Args:
        id: Gymnasium id of one of the `TASKS`: of its class, not wrapped.
        n_envs: number of environments, N.
        device: where they are; "cpu" is for tests, it steps the worlds one after the other.
        solver: "newton" where the model asks for PGS (Humanoid-v5, HumanoidStandup-v5), which mujoco_warp does not
            have: it is another task then, with other contact forces.
        contacts: room for contacts, so many per world in the mean of all; None: as mujoco_warp guesses.
        constraints: room for constraints in each world; None: as mujoco_warp guesses. A warning says, once, if there
            was too little.
        stagger: whether first episodes have random limits, see `TensorVecEnv`; without limit they have none.
        **env_kwargs: arguments of the environment.

    Raises:
        ValueError: if the id is of none of the `TASKS`, mujoco_warp cannot simulate the model, there is no room for
            its first contacts, or the solver is asked for where the model has it.
    """

    task: WarpTask

    def __init__(
        self, id: str, n_envs: int, device: torch.device | str = "cpu", *, solver: Solver = "model",
        contacts: int | None = None, constraints: int | None = None, stagger: bool = True, **env_kwargs: Any,
    ) -> None:  # fmt: skip
        if solver not in get_args(Solver):
            raise ValueError(f"warp_solver: got {solver!r}, expected {' or '.join(get_args(Solver))}")
        for name, room in (("n_envs", n_envs), ("warp_contacts", contacts), ("warp_constraints", constraints)):
            if room is not None and (room < 1 or room % 1):
                raise ValueError(f"{name}: got {room}, expected an integer of at least 1")
        task = WarpTask(id, n_envs, indexed(device), solver, contacts, constraints, env_kwargs)
        super().__init__(task, n_envs, device, stagger=stagger and task.limit < math.inf)


def _model(id: str, model: Any, solver: Solver) -> Any:
    """The model, with the solver that is asked for."""
    kinds = mujoco.mjtSolver
    if solver == "newton":
        if model.opt.solver == kinds.mjSOL_NEWTON:
            raise ValueError("warp_solver: got newton, which the model has; leave it out")
        model = copy.copy(model)
        model.opt.solver = kinds.mjSOL_NEWTON
    elif model.opt.solver == kinds.mjSOL_PGS:
        raise ValueError("its model asks for the PGS solver; warp_solver=newton takes Newton's, which is another task")
    return model
