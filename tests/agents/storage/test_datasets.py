"""Data sets of episodes: Minari's and robomimic's layouts, and what is wrong with one in one line."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from driftrl.agents.common.demonstrations import Demonstrations
from driftrl.agents.storage.datasets import DatasetError, find_dataset, read_episodes, read_origin, write_minari
from driftrl.envs.episodes import Episode

h5py = pytest.importorskip("h5py")

BOX, ACTIONS = spaces.Box(-9, 9, (3,)), spaces.Box(np.array([-1.0, -2.0], np.float32), np.array([1.0, 2.0], np.float32))
DICT = spaces.Dict({"b": spaces.Box(-9, 9, (2,)), "a": spaces.Box(-9, 9, (1,))})


def episodes(number: int = 4, space: spaces.Space[Any] = BOX, seed: int = 0) -> list[Episode]:
    space.seed(seed)
    rng = np.random.default_rng(seed)
    found = []
    for k in range(number):
        steps = 5 + k
        rows = [space.sample() for _ in range(steps + 1)]
        obs: Any = {key: np.stack([row[key] for row in rows]) for key in rows[0]} if isinstance(rows[0], dict) else rows
        last = np.arange(steps) == steps - 1
        actions = rng.uniform(-1, 1, (steps, 2)).astype(np.float32)
        found.append(
            Episode(
                obs if isinstance(obs, dict) else np.stack(obs), actions, rng.normal(size=steps), last, last & False
            )
        )
    return found


def assert_equal(got: Episode, expected: Episode) -> None:
    for one, other in zip(got, expected, strict=True):
        if isinstance(other, dict):
            assert set(one) == set(other)
            for key in other:
                np.testing.assert_array_equal(one[key], other[key], strict=True)
        else:
            np.testing.assert_array_equal(one, other, strict=True)


@pytest.mark.parametrize("space", [BOX, DICT])
def test_what_is_written_is_read_again(
    space: spaces.Space[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = episodes(12, space)  # more than ten: their order is that of numbers, not of names
    folder = write_minari(tmp_path / "some" / "set-v3", given, space, ACTIONS)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    for source in (folder, folder / "data", folder / "data" / "main_data.hdf5", "some/set-v3"):
        for (name, got), expected, i in zip(read_episodes(source), given, range(12), strict=True):
            assert_equal(got, expected)
            assert name.endswith(f"main_data.hdf5: episode {i}")


@pytest.mark.parametrize("space", [BOX, DICT])
def test_minari_loads_what_is_written(
    space: spaces.Space[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minari = pytest.importorskip("minari")
    given, spec = episodes(3, space), gym.spec("driftrl/Avoid-v0")
    write_minari(tmp_path / "set-v0", given, space, ACTIONS, env_spec=spec, algorithm="some")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    loaded = minari.load_dataset("set-v0")
    assert (loaded.total_episodes, loaded.total_steps) == (3, 18)
    assert (loaded.observation_space, loaded.action_space) == (space, ACTIONS)
    assert loaded.recover_environment().spec.id == "driftrl/Avoid-v0"
    for got, expected in zip(loaded.iterate_episodes(), given, strict=True):
        assert_equal(Episode(got.observations, got.actions, got.rewards, got.terminations, got.truncations), expected)


def test_the_spec_of_an_environment_that_a_function_makes_is_left_out(tmp_path: Path) -> None:
    spec = EnvSpec("Made-v0", entry_point=lambda **_: gym.make("driftrl/Avoid-v0"))
    write_minari(tmp_path / "set-v0", episodes(1, BOX), BOX, ACTIONS, env_spec=spec)
    assert "env_spec" not in json.loads((tmp_path / "set-v0" / "data" / "metadata.json").read_text())


def test_what_minari_writes_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    given = episodes(12, DICT)
    (tmp_path / "theirs-v0").mkdir()
    storage = MinariStorage.new(tmp_path / "theirs-v0" / "data", DICT, ACTIONS)
    names = {"actions": "actions", "rewards": "rewards", "terminations": "terminated", "truncations": "truncated"}
    for i, each in enumerate(given):
        parts = {theirs: list(getattr(each, ours)) for theirs, ours in names.items()}
        storage.update_episodes([EpisodeBuffer(id=i, seed=i, observations=each.observations, **parts)])
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    for (_, got), expected in zip(read_episodes("theirs-v0"), given, strict=True):
        assert_equal(got, expected)
    data = Demonstrations.of(read_episodes("theirs-v0"), DICT, ACTIONS)
    assert data.lengths.tolist() == [len(each.actions) for each in given]


def robomimic(path: Path, given: list[Episode]) -> Path:
    with h5py.File(path, "w") as file:
        for k, episode in enumerate(given):
            group = file.create_group(f"data/demo_{k}")
            for key, part in episode.observations.items():  # type: ignore[union-attr]
                group.create_dataset(f"obs/{key}", data=part[:-1])
            group.create_dataset("actions", data=episode.actions)
            group.create_dataset("rewards", data=episode.rewards)
            group.create_dataset("dones", data=episode.terminated.astype(np.int64))
    return path


@pytest.mark.parametrize("missing", ["demo_1", "demo_3"])
def test_a_robomimic_file_that_is_not_complete_is_refused(tmp_path: Path, missing: str) -> None:
    given = episodes(4, DICT)
    path = robomimic(tmp_path / "low_dim.hdf5", given)
    lengths = [len(each.actions) for each in given]
    with h5py.File(path, "a") as file:
        file["data"].attrs["total"] = sum(lengths)
        for k, length in enumerate(lengths):
            file[f"data/demo_{k}"].attrs["num_samples"] = length
    assert len(list(read_episodes(path))) == 4
    with h5py.File(path, "a") as file:
        file[f"data/{missing}"].attrs["num_samples"] = 99
    with pytest.raises(ValueError, match=rf"{missing}: got \d+ steps, expected num_samples = 99"):
        list(read_episodes(path))
    with h5py.File(path, "a") as file:
        del file[f"data/{missing}"]
    with pytest.raises(ValueError, match=rf"steps, expected total = {sum(lengths)}; the data set is not complete"):
        list(read_episodes(path))


def test_the_environment_of_a_data_set_is_known_also_where_a_class_makes_it(tmp_path: Path) -> None:
    spec = EnvSpec("Mine-v0", entry_point=Mine)
    write_minari(tmp_path / "mine-v0", episodes(2, BOX), BOX, ACTIONS, env_spec=spec)
    assert read_origin(tmp_path / "mine-v0").env_id == "Mine-v0"
    metadata = json.loads((tmp_path / "mine-v0" / "data" / "metadata.json").read_text())
    assert json.loads(metadata["env_spec"])["entry_point"] == f"{__name__}:Mine"


class Mine(gym.Env[Any, Any]):
    def __init__(self, **kwargs: Any) -> None: ...


def test_robomimics_layout_is_read(tmp_path: Path) -> None:
    given = episodes(11, DICT)
    path = robomimic(tmp_path / "low_dim.hdf5", given)
    for (name, got), expected, k in zip(read_episodes(path), given, range(11), strict=True):
        assert name == f"{path}: episode demo_{k}"
        cut = {key: part[:-1] for key, part in expected.observations.items()}  # type: ignore[union-attr]
        assert_equal(got, expected._replace(observations=cut))
    data = Demonstrations.of(read_episodes(path), DICT, ACTIONS)
    first: Any = given[0].observations
    np.testing.assert_array_equal(data.observations[:5], np.concatenate([first["a"], first["b"]], 1)[:-1])
    one = Demonstrations.of(read_episodes(path), BOX, ACTIONS, keys=["b", "a"])
    np.testing.assert_array_equal(one.observations[:5], np.concatenate([first["b"], first["a"]], 1)[:-1])
    with pytest.raises(ValueError, match=r"demo_0: observations: got a, b; name those wanted in demonstration_keys"):
        Demonstrations.of(read_episodes(path), BOX, ACTIONS)
    with pytest.raises(ValueError, match=r"demo_0: observations: got a, b, expected c among them"):
        Demonstrations.of(read_episodes(path), BOX, ACTIONS, keys=["c"])


def changed(part: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    name = f"episode_{part}"

    def damage(folder: Path) -> None:
        with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
            value = change(file[name][()] if isinstance(file[name], h5py.Dataset) else None)
            del file[name]
            if value is not None:
                file.create_dataset(name, data=value)

    return damage


def poke(row: int, value: float) -> Callable[[Any], Any]:
    def change(values: Any) -> Any:
        values[row] = value
        return values

    return change


def typed(part: str, shape: tuple[int, ...], kind: Any = h5py.h5t.NATIVE_DOUBLE) -> Callable[[Path], None]:
    """An array of that shape that is declared and never written."""

    def damage(folder: Path) -> None:
        with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
            del file[f"episode_{part}"]
            space, create = h5py.h5s.create_simple(shape), h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            create.set_chunk(tuple(min(size, 1024) for size in shape))
            h5py.h5d.create(file.id, f"episode_{part}".encode(), kind, space, create)

    return damage


def metadata(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "data" / "metadata.json").write_text(text)


def cut(folder: Path) -> None:
    path = folder / "data" / "main_data.hdf5"
    path.write_bytes(path.read_bytes()[:3000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed("2", lambda _: None), "episode 2: got none, expected 4 episodes; the data set"),
        (changed("1/actions", lambda _: None), "episode 1: actions: got none, expected an array of numbers"),
        (changed("1/observations", lambda x: x[:-1]), "episode 1: observations: got 6 rows with 6 actions"),
        (changed("3/rewards", lambda x: x[1:]), "episode 3: rewards: got 7 rows with 8 actions, expected 8"),
        (changed("0/truncations", lambda x: x[1:]), "episode 0: truncations: got 4 rows with 5 actions"),
        (changed("1/observations", poke(4, np.nan)), "episode 1: step 4: observations: got nan, expected finite"),
        (changed("1/rewards", poke(3, np.inf)), "episode 1: step 3: rewards: got inf, expected finite"),
        (changed("2/actions", poke(6, 1.5)), "episode 2: step 6: actions: got 1.5 in dimension 0"),
        (changed("2/actions", poke(6, -2.1)), r"episode 2: step 6: actions: got -2.1 in dimension 0"),
        (changed("0/actions", lambda x: x[:, :1]), r"episode 0: actions: got rows of shape \[1\], expected \[2\]"),
        (changed("0/observations", lambda x: x[:, :2]), r"observations: got rows of shape \[2\], expected \[3\]"),
        (changed("0/actions", lambda x: np.array([b"x"] * len(x))), r"actions: got \|S1 of shape \[5\]"),
        (metadata("{"), "metadata.json: damaged"),
        (changed("3", lambda _: np.zeros(4)), "episode 3: got no group, expected one with observations"),
        (changed("2/rewards", lambda x: np.stack([x, x], 1)), r"episode 2: rewards: got rows of shape \[2\], expected"),
        (changed("2/rewards", lambda x: x[:, None]), r"episode 2: rewards: got rows of shape \[1\], expected one"),
        (changed("2/terminations", lambda x: x[:, None]), r"episode 2: terminations: got rows of shape \[1\]"),
        (changed("1/terminations", poke(2, 1)), "episode 1: step 2: got an end of the episode, expected none before"),
        (changed("1/truncations", poke(4, 1)), "episode 1: step 4: got an end .*, expected none before the last"),
        (changed("1/observations", lambda x: x * np.float64(1e300)), "episode 1: step 0: observations: got .*e.30.,"),
        (changed("1/rewards", poke(3, -1e300)), r"episode 1: step 3: rewards: got -1e\+300, expected finite numbers"),
        (typed("3/rewards", (1 << 45,)), "episode 3: rewards: got 35184372088832 rows with 8 actions, expected 8"),
        (typed("3/actions", (8, 1 << 45)), "episode 3: actions: cannot be read"),
        (typed("3/rewards", (8,), h5py.h5t.UNIX_D32LE), "episode 3: rewards: got another type, expected an array of"),
        (changed("0/rewards", lambda _: h5py.Empty("f8")), r"episode 0: rewards: got float64 of shape \[\]"),
        (metadata('{"total_episodes": 3}'), "episode 3: got one more than the 3 of metadata.json"),
        (cut, "no data set of Minari or robomimic can be read"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    folder = write_minari(tmp_path / "set-v0", episodes(), BOX, ACTIONS)
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        Demonstrations.of(read_episodes(folder), BOX, ACTIONS)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_another_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Minari 0.5 lays its Arrow format out: a folder for each episode and no HDF5 file."""
    folder = tmp_path / "arrow-v0" / "data"
    (folder / "0").mkdir(parents=True)
    (folder / "0" / "0-part-0.parquet").write_bytes(b"PAR1")
    (folder / "metadata.json").write_text(json.dumps({"data_format": "arrow", "total_episodes": 1}))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    for source in (folder.parent, folder, "arrow-v0"):
        with pytest.raises(
            DatasetError, match=r"metadata\.json: got data_format 'arrow', expected hdf5; convert it with"
        ):
            find_dataset(source)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["weights"] = np.zeros(3)
    with pytest.raises(DatasetError, match=r"got weights, expected groups episode_0"):
        next(read_episodes(tmp_path / "other.hdf5"))
    with h5py.File(tmp_path / "empty.hdf5", "w") as file:
        file.create_group("data")
    with pytest.raises(DatasetError, match=r"got no group demo_<i> in data"):
        next(read_episodes(tmp_path / "empty.hdf5"))
    with pytest.raises(DatasetError, match=r"no data set: got nowhere, expected an \.hdf5 file"):
        find_dataset("nowhere")


class Executed:
    def __reduce__(self) -> Any:
        return pytest.fail, ("reading unpickled something",)


def test_reading_executes_nothing(tmp_path: Path) -> None:
    folder = write_minari(tmp_path / "set-v0", episodes(), BOX, ACTIONS)
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        file["episode_0"].attrs["options"] = np.void(pickle.dumps(Executed()))
        del file["episode_1/rewards"]
        file["episode_1"].create_dataset("rewards", data=np.void(pickle.dumps(Executed())))
    content = json.loads((folder / "data" / "metadata.json").read_text())
    evil = {"id": "x-v0", "entry_point": "pytest:fail", "kwargs": {"reason": "an environment was made"}}
    (folder / "data" / "metadata.json").write_text(json.dumps(content | {"env_spec": json.dumps(evil)}))
    with pytest.raises(DatasetError, match=r"episode 1: rewards: got \|V\d+ of shape \[\], expected rows of numbers"):
        list(read_episodes(folder))


def test_a_target_is_checked_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a folder named NAME-vN"):
        write_minari(tmp_path / "set", episodes(), BOX, ACTIONS)
    folder = write_minari(tmp_path / "set-v0", episodes(), BOX, ACTIONS)
    with pytest.raises(ValueError, match="which exists, expected a new folder"):
        write_minari(folder, episodes(), BOX, ACTIONS)

    def broken() -> Any:
        yield episodes()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_minari(tmp_path / "other-v0", broken(), BOX, ACTIONS)
    with pytest.raises(ValueError, match="got no episode, expected one at least"):
        write_minari(tmp_path / "other-v0", [], BOX, ACTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["set-v0"]


def test_missing_h5py_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_minari(tmp_path / "set-v0", episodes(), BOX, ACTIONS)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ValueError, match=r"h5py is not installed; run pip install 'driftrl\[data\]'"):
        next(read_episodes(folder))
