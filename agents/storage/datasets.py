"""Episodes in HDF5 files: Minari's data sets, read and written, and robomimic's, read.

Minari (0.4.0 to 0.5.4) is a folder ``<name>-vN/data/`` with ``metadata.json`` and ``main_data.hdf5``, in which a group
``episode_<i>`` holds ``observations`` (T + 1 rows; of a Dict space a group), ``actions``, ``rewards``, ``terminations``
and ``truncations`` (T rows). robomimic is one file with ``data/demo_<i>/{obs/*, actions, rewards, dones}``. Both are
read with h5py as arrays of numbers: nothing in a file is unpickled, imported or made an environment of.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from ...envs.episodes import Array, Episode

if TYPE_CHECKING:
    import h5py

MAIN, METADATA = "main_data.hdf5", "metadata.json"
_WRITTEN_AS = "0.5.3"
"""Version of Minari whose layout is written; later ones read it."""
_NAME = re.compile(r"[-_\w]+-v\d+")


class DatasetError(ValueError):
    """A data set that cannot be read: names the file and, where it is one's fault, the episode and the step."""


class Named(NamedTuple):
    """An episode, and what messages call it: the file and the group in it."""

    name: str
    episode: Episode


class Origin(NamedTuple):
    """What metadata.json of a Minari data set says of the environment; None where it does not say."""

    file: Path
    env_id: str | None
    action_bounds: tuple[Array, Array] | None
    """Lower and upper ones, of a Box."""
    env_kwargs: dict[str, Any] | None = None
    """Its options."""


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ValueError("demonstrations: h5py is not installed; run pip install 'driftrl[data]'") from error
    return h5py


def find_dataset(source: str | os.PathLike[str]) -> Path:
    """The HDF5 file of a data set.

    Args:
        source: an .hdf5 file; the folder of a Minari data set; or a Minari id, which is looked for in
            ``$MINARI_DATASETS_PATH``, or else ``~/.minari/datasets``.

    Raises:
        DatasetError: if there is none, or it is in another format.
        ValueError: if h5py is missing, without which nothing of it can be read.
    """
    _h5py()
    path = Path(source)
    if path.is_file():
        return path
    root = _root()
    for folder in (path, path / "data", root / path / "data"):
        _metadata(folder)  # first: of data in another format there is no such file
        if (folder / MAIN).is_file():
            return folder / MAIN
    raise DatasetError(
        f"no data set: got {source}, expected an .hdf5 file, the folder of a Minari data set, or an id of one in {root}"
    )


def lasting_name(source: str) -> str:
    """What a data set is called wherever one works: its id, if it was found by it, or else the path of its HDF5 file.

    Raises:
        DatasetError: if there is none, or it is in another format.
        ValueError: if h5py is missing.
    """
    found = find_dataset(source)
    is_id = not Path(source).is_absolute() and found == _root() / source / "data" / MAIN
    return source if is_id else str(found.resolve())


def _root() -> Path:
    return Path(os.environ.get("MINARI_DATASETS_PATH", Path.home() / ".minari" / "datasets"))


def read_episodes(source: str | os.PathLike[str]) -> Iterator[Named]:
    """The episodes of a data set of Minari or robomimic, in their order.

    Raises:
        DatasetError: if there is none, it is damaged, an episode is missing, or lengths do not agree.
        ValueError: if h5py is not installed.
    """
    h5py, path = _h5py(), find_dataset(source)
    try:
        with h5py.File(path, "r") as file:
            is_robomimic = isinstance(file.get("data"), h5py.Group)
            yield from _robomimic(path, file) if is_robomimic else _minari(path, file)
    except (OSError, KeyError, RuntimeError, ValueError) as error:  # whatever h5py makes of a damaged file
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path}: no data set of Minari or robomimic can be read ({error})") from error


def _minari(path: Path, file: h5py.File) -> Iterator[Named]:
    number = _metadata(path.parent).get("total_episodes")
    groups = [name for name in file if re.fullmatch(r"episode_\d+", name)]
    if not groups:
        raise DatasetError(f"{path}: got {', '.join(list(file)[:3]) or 'nothing'}, expected groups episode_0, ...")
    number = number if isinstance(number, int) else len(groups)
    for i in range(max(number, len(groups))):
        name = f"{path}: episode {i}"
        if i >= number:
            raise DatasetError(f"{name}: got one more than the {number} of {METADATA}")
        if f"episode_{i}" not in file:
            raise DatasetError(f"{name}: got none, expected {number} episodes; the data set is not complete")
        columns = ("rewards", "terminations", "truncations")
        observations, actions, rewards, *ends = _parts(name, file[f"episode_{i}"], "observations", columns, extra=1)
        episode = Episode(observations, actions, rewards, *(each.astype(bool) for each in ends))
        if (early := (episode.terminated | episode.truncated)[:-1]).any():
            last = f"expected none before the last one, step {len(early)}"
            raise DatasetError(f"{name}: step {int(np.argmax(early))}: got an end of the episode, {last}")
        yield Named(name, episode)


def _metadata(folder: Path) -> dict[str, Any]:
    """What metadata.json of a data set says; nothing if there is none.

    Raises:
        DatasetError: if it is damaged, or the data are in another format.
    """
    path = folder / METADATA
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        form = content.get("data_format", "hdf5")
    except (ValueError, AttributeError, OSError, RecursionError) as error:
        raise DatasetError(f"{path}: damaged ({error})") from error
    if form != "hdf5":
        raise DatasetError(f"{path}: got data_format {form!r}, expected hdf5; convert it with Minari")
    return content


def read_origin(source: str | os.PathLike[str]) -> Origin:
    """Where a data set comes from; nothing of it is imported or made.

    Raises:
        DatasetError: if there is no data set, or its metadata.json is damaged.
        ValueError: if h5py is not installed.
    """
    folder = find_dataset(source).parent
    env, space = (_nested(_metadata(folder), key) for key in ("env_spec", "action_space"))
    env_id, bounds = env.get("id"), None
    if space.get("type") == "Box":
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # some other way to write a space
            low, high = (np.array(space.get(key), dtype=np.float64) for key in ("low", "high"))
            bounds = (low, high)
    kwargs = env.get("kwargs")
    return Origin(
        folder / METADATA,
        env_id if isinstance(env_id, str) else None,
        bounds,
        kwargs if isinstance(kwargs, dict) else None,
    )


def _nested(content: dict[str, Any], key: str) -> dict[str, Any]:
    """JSON that is text in JSON; nothing where there is none."""
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        inner = json.loads(content.get(key, ""))
        return inner if isinstance(inner, dict) else {}
    return {}


def _robomimic(path: Path, file: h5py.File) -> Iterator[Named]:
    names = [name for name in file["data"] if re.fullmatch(r"demo_\d+", name)]
    if not names:
        raise DatasetError(f"{path}: got no group demo_<i> in data, expected robomimic's layout")
    numbers = sorted(int(name.removeprefix("demo_")) for name in names)
    total, steps = file["data"].attrs.get("total"), 0
    for number in numbers:
        key = f"demo_{number}"
        name = f"{path}: episode {key}"
        observations, actions, rewards, dones = _parts(name, file["data"][key], "obs", ("rewards", "dones"), extra=0)
        said = file["data"][key].attrs.get("num_samples")
        if said is not None and said != len(actions):
            raise DatasetError(f"{name}: got {len(actions)} steps, expected num_samples = {said}")
        steps, ended = steps + len(actions), dones.astype(bool)
        yield Named(name, Episode(observations, actions, rewards, ended, np.zeros_like(ended)))
    if total is not None and total != steps:  # filtered data have gaps in their numbers; their steps are counted anew
        raise DatasetError(f"{path}: got {steps} steps, expected total = {total}; the data set is not complete")


def _parts(name: str, group: Any, observations: str, columns: Sequence[str], extra: int) -> list[Any]:
    """Observations, actions and columns of one number a step; nothing is read before all shapes agree.

    Args:
        name: of the episode.
        group: in the file.
        observations: key of them.
        columns: keys of the columns.
        extra: rows of observations beyond the steps.
    """
    h5py = _h5py()
    if not isinstance(group, h5py.Group):
        raise DatasetError(f"{name}: got no group, expected one with {observations}, actions, {', '.join(columns)}")
    named = group.get(observations)
    is_dict = isinstance(named, h5py.Group)
    seen = [f"{observations}/{key}" for key in named] if is_dict else [observations]
    found = {key: _array(name, group, key) for key in (*seen, "actions", *columns)}
    steps = found["actions"].shape[0]
    if steps == 0:
        raise DatasetError(f"{name}: got no steps, expected one at least")
    for key, each in found.items():
        got, expected = each.shape[0], steps + extra if key in seen else steps
        if got != expected:
            raise DatasetError(f"{name}: {key}: got {got} rows with {steps} actions, expected {expected}")
        if key in columns and each.shape != (steps,):
            raise DatasetError(f"{name}: {key}: got rows of shape {list(each.shape[1:])}, expected one number each")
    values = {key: _read(name, key, each) for key, each in found.items()}
    parts = {key.partition("/")[2]: values[key] for key in seen}
    return [parts if is_dict else values[observations], *(values[key] for key in ("actions", *columns))]


def _array(name: str, group: h5py.Group, key: str) -> h5py.Dataset:
    """A data set of numbers, which is not read yet."""
    part = group.get(key)
    if not isinstance(part, _h5py().Dataset):
        got = "none" if part is None else "no array"
        raise DatasetError(f"{name}: {key}: got {got}, expected an array of numbers")
    try:
        kind = part.dtype
    except (TypeError, ValueError) as error:  # of times, say, which NumPy does not know
        raise DatasetError(f"{name}: {key}: got another type, expected an array of numbers ({error})") from error
    if kind.kind not in "fiub" or not part.shape:
        raise DatasetError(f"{name}: {key}: got {kind} of shape {list(part.shape or ())}, expected rows of numbers")
    return part


def _read(name: str, key: str, part: h5py.Dataset) -> Array:
    try:
        values: Array = part[()]
    except (OSError, MemoryError) as error:
        raise DatasetError(f"{name}: {key}: cannot be read ({error})") from error
    return values


def write_minari(
    folder: str | os.PathLike[str], episodes: Iterable[Episode], observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any], *, env_spec: EnvSpec | None = None, algorithm: str = "",
) -> Path:  # fmt: skip
    """Write a data set that Minari loads, all or nothing.

    Args:
        folder: ``.../<name>-vN``, as Minari has it; where Minari's own datasets lie, it finds it by that name.
        episodes: with T + 1 observations each; taken one by one.
        observation_space: Box, or Dict of Boxes.
        action_space: Box.
        env_spec: the environment's, left out where Gymnasium cannot write it as JSON: one that is made by a function.
        algorithm: what played.

    Returns:
        The folder.

    Raises:
        ValueError: if the folder exists or has another name, there is no episode, or h5py is not installed.
    """
    h5py, target = _h5py(), Path(folder)
    check_target(target)
    partial = target.with_name(f".{target.name}.part")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed while it wrote
    (partial / "data").mkdir(parents=True)
    try:
        number = total = 0
        with h5py.File(partial / "data" / MAIN, "w", track_order=True) as file:
            for episode in episodes:
                group = file.create_group(f"episode_{number}")
                group.attrs["id"], group.attrs["total_steps"] = number, len(episode.actions)
                _write_episode(group, episode)
                number, total = number + 1, total + len(episode.actions)
        if not number:
            raise ValueError(f"{target}: got no episode, expected one at least")
        metadata: dict[str, Any] = {
            "total_episodes": number, "total_steps": total, "data_format": "hdf5", "jpeg_encoding": False,
            "observation_space": json.dumps(_space(observation_space)),
            "action_space": json.dumps(_space(action_space)), "dataset_id": target.name,
            "minari_version": _WRITTEN_AS, "algorithm_name": algorithm,
            "dataset_size": round((partial / "data" / MAIN).stat().st_size / 1e6, 1),
        }  # fmt: skip
        if env_spec is not None:
            made_by: Any = env_spec.entry_point
            if isinstance(made_by, type):
                env_spec = dataclasses.replace(env_spec, entry_point=f"{made_by.__module__}:{made_by.__qualname__}")
            with contextlib.suppress(ValueError):
                metadata["env_spec"] = env_spec.to_json()
        (partial / "data" / METADATA).write_text(json.dumps(metadata))
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def check_target(folder: Path) -> None:
    """Refuse a folder that `write_minari` could not write, before episodes are spent on it.

    Raises:
        ValueError: if it exists, has no name of Minari's kind, or h5py is not installed.
    """
    _h5py()
    if not _NAME.fullmatch(folder.name):
        raise ValueError(f"data set: got {folder}, expected a folder named NAME-vN, such as avoid-v0, as Minari has it")
    if folder.exists():
        raise ValueError(f"data set: got {folder}, which exists, expected a new folder; choose another version")


def _write_episode(group: h5py.Group, episode: Episode) -> None:
    if isinstance(episode.observations, dict):
        observations = group.create_group("observations")
        for key, part in episode.observations.items():
            observations.create_dataset(key, data=part)
    else:
        group.create_dataset("observations", data=episode.observations)
    names = {"actions": "actions", "rewards": "rewards", "terminations": "terminated", "truncations": "truncated"}
    for theirs, ours in names.items():
        group.create_dataset(theirs, data=getattr(episode, ours))


def _space(space: spaces.Space[Any]) -> dict[str, Any]:
    """A space as Minari writes it down."""
    if isinstance(space, spaces.Dict):
        return {"type": "Dict", "subspaces": {key: _space(part) for key, part in space.spaces.items()}}
    assert isinstance(space, spaces.Box)  # `check_spaces` lets no other pass
    bounds = {"low": space.low.tolist(), "high": space.high.tolist()}
    return {"type": "Box", "dtype": str(space.dtype), "shape": list(space.shape), **bounds}
