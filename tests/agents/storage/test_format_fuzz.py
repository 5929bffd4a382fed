"""Files that were damaged or forged, by the thousand: each is read or refused by a CheckpointError, none executed."""

import copy
import dataclasses
import io
import json
import pickle
import random
import struct
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.logger import Logger

from driftrl import LipschitzMBPO, LipschitzMBPOConfig, PolicyFlow, PolicyFlowConfig
from driftrl.agents.storage import format as checkpoint
from driftrl.agents.storage import saving as resume
from driftrl.agents.storage.saving import Checkpointed
from driftrl.agents.storage.values import CheckpointError
from driftrl.envs import make_vec
from driftrl.runs import folder as runs

ALLOWANCE = 32 * 2**20
"""Bytes that reading may take beyond twice the size of the file: JSON of 1 MiB, parsed, and the allocator's."""

HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**60, -(10**60), 1e308, -0.5, "", "x", "../../etc/passwd", "os.system",
    "__class__", [], [[]], {}, {"a": 1}, [1] * 1000, ["8"] * 10, [10**9, 10**9], {"$tuple": [10**9]},
    {"$tuple": [30000, 30000]}, {"$float": "nan"}, {"$float": "inf"}, {"$float": "code"}, {"$class": "torch.nn.Module"},
    {"$class": "os.system"}, {"$class": "torch.optim.Adam"}, {"$class": "FlowPolicy"}, {"$class": "SACPolicy"},
    {"$object": ["Discrete", {"n": 3}]}, {"$object": ["MultiBinary", {"n": 10**15}]}, {"$tuple": 5}, {"$unknown": 1},
    {"$object": ["Box", {"low": 0, "high": 1, "shape": [10**12]}]}, {"$object": []}, {"$dict": [[[], 1]]}, {"$dict": 3},
    {"$deque": [-1, []]}, {"$deque": [10**30, [1]]}, {"$tensor": "nowhere"}, {"$array": 3}, {"$dtype": "object"},
    {"$dtype": "float64"}, {"$object": ["LinearSchedule", {"start": "a", "end": 0, "end_fraction": 0}]},
    {"$object": ["ConstantSchedule", {"val": {"$float": "nan"}}]},
    {"$object": ["TrainFrequencyUnit", {"value": "day"}]},
]  # fmt: skip


class Code:
    """What a pickle can do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("code_was_run"),))


Base = tuple[type[Checkpointed], bytes]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Base]:
    """An agent of each class, as a checkpoint of a run."""
    small: dict[str, Any] = {"actor_hidden": (4,), "critic_hidden": (4,), "batch_size": 8, "device": "cpu", "seed": 0}
    agents: list[Checkpointed] = [
        PolicyFlow("MlpPolicy", make_vec("InvertedPendulum-v5", 1, 0), n_steps=8, n_epochs=1, **small).learn(8),
        LipschitzMBPO(
            "MlpPolicy", make_vec("InvertedPendulum-v5", 1, 0), learning_starts=8, gradient_steps=1, model_rollouts=4,
            model_hidden=(4,), model_epochs=1, buffer_size=100, **small,
        ).learn(12),
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("bases")
    return [
        (type(agent), runs.save_checkpoint(agent, folder / type(agent).__name__, 1, {}).read_bytes())
        for agent in agents
    ]


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes as a bad disk, a broken connection or an editor leaves them."""
    kind, changed = rng.choice(("flip", "flip", "cut", "drop", "insert", "zero", "double")), bytearray(data)
    at = rng.randrange(len(data)) if rng.random() < 0.5 else len(data) - rng.randrange(1, min(600, len(data)))
    length = rng.randrange(1, 200)
    if kind == "flip":
        for _ in range(rng.randrange(1, 9)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        changed[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[at:]
    elif kind == "drop":
        del changed[at : at + length]
    elif kind == "insert":
        changed[at:at] = rng.randbytes(length)
    elif kind == "zero":
        changed[at : at + length] = bytes(len(changed[at : at + length]))
    else:
        changed[at:at] = changed[at : at + length]
    return bytes(changed)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a tree, but for few of a long list's."""
    keys = list(range(len(tree)))[:20] if isinstance(tree, list) else list(tree) if isinstance(tree, dict) else []
    for key in keys:
        yield tree, key
        yield from places(tree[key])


def forge_tree(rng: random.Random, text: bytes) -> bytes:
    """JSON in which some values are others, lie elsewhere or are gone."""
    tree = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        found = list(places(tree))
        container, key = rng.choice(found)
        kind = rng.choice(("set", "set", "set", "remove", "copy", "rename", "grow"))
        if kind == "set":
            container[key] = copy.deepcopy(rng.choice(HOSTILE))  # the next change may be within
        elif kind == "remove":
            del container[key]
        elif kind == "copy":
            container[key] = json.loads(json.dumps(rng.choice([c[k] for c, k in found])))
        elif kind == "rename" and isinstance(container, dict):
            container[rng.choice(("x", "__dict__", "predict", "$tuple", f"{key}2"))] = container.pop(key)
        elif kind == "grow" and type(container[key]) in (int, float):
            container[key] *= rng.choice((-1, 0, 2, 1000, 10**9, 10**30))
    return json.dumps(tree).encode()


def forge_header(rng: random.Random, tensors: bytes) -> bytes:
    """Tensors of which the header says something else."""
    (length,) = struct.unpack("<Q", tensors[:8])
    header, data = json.loads(tensors[8 : 8 + length]), tensors[8 + length :]
    entry = header[rng.choice(list(header))]
    kind = rng.choice(("shape", "dtype", "offsets", "remove", "length", "swap"))
    if kind == "shape":
        entry["shape"] = rng.choice(([2**40, 2**40], [-1], [0], [], [10**30], "x", None, [1.5], entry["shape"][::-1]))
    elif kind == "dtype":
        entry["dtype"] = rng.choice(("F64", "F32", "BOOL", "I64", "U8", "F8_E4M3", "object", None, 3))
    elif kind == "offsets":
        entry["data_offsets"][rng.randrange(2)] = rng.choice((-1, 0, 4, 2**62, "x", None, 1.5))
    elif kind == "remove":
        del header[rng.choice(list(header))]
    elif kind == "swap":
        first, second = (rng.choice(list(header)) for _ in range(2))
        header[first], header[second] = header[second], header[first]
    text = json.dumps(header).encode()
    size = rng.choice((0, 1, 2**20, 2**40, 2**63, 2**64 - 1)) if kind == "length" else len(text)
    return struct.pack("<Q", size) + text + data


def forged(rng: random.Random, data: bytes) -> bytes:
    """A sound zip, with checksums that are right, of which a member was made by somebody else."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    kind, compression = rng.choice(("content", "content", "content", "pickle", "bomb", "path", "deep", "swap")), 0
    if kind == "content":
        members[name] = (forge_tree if name.endswith("json") else forge_header)(rng, members[name])
    elif kind == "pickle":
        members[rng.choice((name, "data", "policy.pth"))] = pickle.dumps(Code())
    elif kind == "bomb":
        members[name], compression = bytes(rng.choice((10**6, 10**7))), zipfile.ZIP_DEFLATED
    elif kind == "path":
        members[rng.choice(("../x", "/etc/x", "..\\x", "C:\\x", "a/b.json", "a\nb", "x" * 300))] = b"{}"
    elif kind == "deep":
        members["agent.json"] = rng.choice((b"[", b'{"a":')) * rng.choice((100, 10_000, 150_000))
    else:
        members[name] = members[rng.choice(list(members))]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for each, content in members.items():
            archive.writestr(each, content)
    return file.getvalue()


OBSERVATIONS = np.random.default_rng(0).normal(size=(3, 4))


def outcome(kind: type[Checkpointed], data: bytes) -> str:
    """Read all of a file as a program would: "read" or "refused", any other exception is a failure."""
    try:
        agent = kind.load(io.BytesIO(data), device="cpu")
        agent.set_logger(Logger(None, []))
        resume.restore(agent, checkpoint.read(io.BytesIO(data), "run", "file"))
    except CheckpointError as error:
        assert str(error)
        return "refused"
    if agent.observation_space.shape == OBSERVATIONS[0].shape:
        assert agent.predict(OBSERVATIONS, deterministic=True)[0].shape[0] == 3
    return "read"


class Memory:
    """The largest memory of this process since the last look, of Linux."""

    def rise(self, kind: type[Checkpointed], data: bytes) -> tuple[str, int]:
        """The outcome, and by how many bytes memory rose.

        Beyond the allowance, read again: what a file demands it demands each time. Pages of libraries that the system
        had put aside, and threads that another test left, count in one reading only.
        """
        rises = list[int]()
        while not rises or (rises[-1] > 2 * len(data) + ALLOWANCE and len(rises) < 3):
            Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
            before = self._peak()
            result = outcome(kind, data)
            rises.append(self._peak() - before)
        return result, min(rises)

    @staticmethod
    def _peak() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])


def survive(bases: list[Base], files: int, seed: int, folder: Path) -> Counter[str]:
    """Read so many files, each after a damage or forgery of its own."""
    rng, count = random.Random(seed), Counter[str]()
    for i in range(files):
        kind, data = rng.choice(bases)
        changed = (damaged if rng.random() < 0.4 else forged)(rng, data)
        try:
            result, rise = Memory().rise(kind, changed)
        except Exception as error:
            Path(folder.parent / "failed.zip").write_bytes(changed)
            raise AssertionError(f"file {i} of seed {seed}, {folder.parent / 'failed.zip'}") from error
        assert rise <= 2 * len(changed) + ALLOWANCE, f"file {i} of seed {seed} took {rise} bytes"
        count[result] += 1
    assert not list(folder.iterdir())  # no code was run
    return count


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return tmp_path / "empty"


pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured as Linux has it"),
    pytest.mark.filterwarnings("ignore:Duplicate name", "ignore:.* which this version does not know"),
]


def test_whole_files_are_read(bases: list[Base]) -> None:
    assert [outcome(kind, data) for kind, data in bases] == ["read", "read"]


def test_damaged_and_forged_files_do_no_harm(bases: list[Base], empty: Path) -> None:
    count = survive(bases, 300, 0, empty)
    assert count["refused"] > 150 and count["read"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_ten_thousand_damaged_and_forged_files_do_no_harm(bases: list[Base], empty: Path, seed: int) -> None:
    survive(bases, 1000, seed, empty)


def random_config(rng: random.Random, kind: type[Any]) -> dict[str, Any]:
    """Fields of a config, most of them sound ones and some of anything."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        sound = getattr(kind(), field.name)
        if isinstance(sound, tuple):
            sound = {"$tuple": [rng.randrange(0, 40) for _ in sound]}
        elif isinstance(sound, bool):
            sound = rng.random() < 0.5
        elif isinstance(sound, int | float):
            sound = rng.choice((sound, sound, type(sound)(sound * rng.choice((-1, 0, 0.1, 3, 1000, 10**6)))))
        fields[field.name] = copy.deepcopy(rng.choice(HOSTILE)) if rng.random() < 0.02 else sound
    return fields


def survive_configs(bases: list[Base], count: int, seed: int) -> Counter[str]:
    """Read files with so many configs."""
    rng, results = random.Random(seed), Counter[str]()
    for i in range(count):
        kind, data = rng.choice(bases)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        tree = json.loads(members["agent.json"])
        config = PolicyFlowConfig if kind is PolicyFlow else LipschitzMBPOConfig
        attributes = tree["content"]["attributes"]
        attributes["config"]["$object"][1] = random_config(rng, config)
        for name in attributes.keys() & {field.name for field in dataclasses.fields(config)}:
            del attributes[name]  # SB3's copies of the fields would win
        members["agent.json"] = json.dumps(tree).encode()
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        result, rise = Memory().rise(kind, file.getvalue())
        assert rise <= 2 * len(file.getvalue()) + ALLOWANCE, f"config {i} of seed {seed} took {rise} bytes"
        results[result] += 1
    return results


def test_random_configs_do_no_harm(bases: list[Base]) -> None:
    assert survive_configs(bases, 100, 0)["refused"] > 10


@pytest.mark.slow
def test_two_thousand_random_configs_do_no_harm(bases: list[Base]) -> None:
    begun = time.monotonic()
    survive_configs(bases, 2000, 1)
    assert time.monotonic() - begun < 600
