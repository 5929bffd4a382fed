import io
import json
import math
import pickle
import random
import struct
import zipfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from gymnasium import spaces
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit

from driftrl import LipschitzMBPOConfig, PolicyFlowConfig
from driftrl.agents.storage import format as checkpoint
from driftrl.agents.storage.values import CheckpointError

VALUES: dict[str, Any] = {
    "plain": [None, True, 1, -2.5, "text", {"a": {"b": [1, [2]]}}, []],
    "not finite": [math.inf, -math.inf],
    "large integer": 2**127 + 1,
    "tuple": (1, (2, [3]), ()),
    "deque": deque([{"r": 1.0, "l": 5}], maxlen=7),
    "other keys": {1: "one", "$tuple": 2, (1, 2): 3},
    "numbers": [float(i) for i in range(40)],
    "scalar": np.float32(0.1),
    "dtype": np.dtype("float32"),
    "class": torch.nn.SiLU,
    "optimizer": torch.optim.AdamW,
    "box": spaces.Box(np.array([-1, -np.inf]), np.array([1, 2]), dtype=np.float64),
    "dict": spaces.Dict([("b", spaces.Box(-1, 1, (2, 3))), ("a", spaces.Discrete(3, start=-1))]),
    "discrete": [spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(4), spaces.MultiBinary([2, 3])],
    "config": PolicyFlowConfig(gamma=0.9, actor_hidden=(8, 8)),
    "other config": LipschitzMBPOConfig(rollout_start=1, rollout_end=2, rollout_min=3, rollout_max=4),
    "train_freq": TrainFreq(2, TrainFrequencyUnit.EPISODE),
    "random": random.Random(0).getstate(),
    "generator": np.random.default_rng(0).bit_generator.state,
}


def written(**documents: dict[str, Any]) -> io.BytesIO:
    file = io.BytesIO()
    checkpoint.write(file, {name: checkpoint.encode(content) for name, content in documents.items()})
    return file


def read(file: io.BytesIO, name: str = "agent") -> dict[str, Any]:
    return checkpoint.read(file, name, "file.zip")


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_as_they_were(name: str) -> None:
    value = VALUES[name]
    back = read(written(agent={"value": value}))["value"]
    assert back == value
    assert type(back) is type(value)
    assert repr(back) == repr(value)  # the types within, the order of keys and the length of a deque, too


def test_arrays_and_tensors_come_back_to_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    dtypes = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")
    shapes = ((), (3,), (2, 0), (4, 1, 3))
    arrays = [(rng.normal(size=shape) * 50).astype(dtype) for dtype in dtypes for shape in shapes]
    tensors = [torch.tensor([math.nan, -0.0]), torch.ones(3, dtype=torch.bfloat16), torch.arange(12).view(3, 4).T]
    tensors += [torch.ones(()).expand(1), torch.ones(2).expand(3, 2), torch.arange(9.0)[4:6]]
    back = read(written(agent={"arrays": arrays, "tensors": tensors}))
    for saved, loaded in zip(arrays, back["arrays"], strict=True):
        assert (saved.dtype, saved.shape, saved.tobytes()) == (loaded.dtype, loaded.shape, loaded.tobytes())
    for tensor, other in zip(tensors, back["tensors"], strict=True):
        assert tensor.dtype == other.dtype
        assert torch.equal(tensor.nan_to_num(7.0), other.nan_to_num(7.0))
    back["arrays"][1][0] = 1  # they can be written to


def test_names_that_meet_are_kept_apart() -> None:
    first, second = torch.zeros(2), torch.ones(3)
    back = read(written(agent={"a.b": first, "a": {"b": second}}))
    assert torch.equal(back["a.b"], first) and torch.equal(back["a"]["b"], second)


def test_tensors_are_in_the_format_of_safetensors() -> None:
    tensors = {"x": torch.arange(6.0).view(2, 3), "flag": torch.tensor([True, False]), "none": torch.zeros(0, 4)}
    archive = zipfile.ZipFile(written(agent=tensors))
    theirs = safetensors.torch.load(archive.read("agent.safetensors"))
    assert theirs.keys() == tensors.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in tensors.items())
    # and what the library writes is read
    other = rebuilt(written(agent=tensors), {"agent.safetensors": safetensors.torch.save(tensors, {"made": "there"})})
    assert all(torch.equal(read(other)[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "value", [lambda x: x, object(), np.array([None]), np.array(["text"]), {1, 2}, torch.zeros(1).to_sparse(), Path]
)
def test_what_is_no_data_is_refused_by_its_name(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"^rate: got .* in attributes.rate.1, .*exclude=\['rate'\]"):
        checkpoint.encode({"attributes": {"rate": [0, value]}})


def rebuilt(file: io.BytesIO, changes: dict[str, bytes | None], **options: Any) -> io.BytesIO:
    """The zip with other members, with checksums that are right."""
    members: dict[str, bytes | None] = {
        name: zipfile.ZipFile(file).read(name) for name in zipfile.ZipFile(file).namelist()
    }
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w", **options) as archive:
        for name, content in (members | changes).items():
            if content is not None:
                archive.writestr(name, content)
    return other


def with_tree(change: Callable[[dict[str, Any]], object]) -> io.BytesIO:
    file = written(agent={"x": torch.zeros(3), "y": np.float64(1)})
    tree = json.loads(zipfile.ZipFile(file).read("agent.json"))
    change(tree)
    return rebuilt(file, {"agent.json": json.dumps(tree).encode()})


def with_content(content: str) -> io.BytesIO:
    text = '{"format": "driftrl checkpoint", "version": [1, 0], "content": {"x": ' + content + "}}"
    return rebuilt(written(agent={}), {"agent.json": text.encode()})


def with_header(header: object, data: bytes = b"\0" * 12, length: int | None = None) -> io.BytesIO:
    text = json.dumps(header).encode()
    tensors = struct.pack("<Q", len(text) if length is None else length) + text + data
    return rebuilt(written(agent={"x": torch.zeros(3)}), {"agent.safetensors": tensors})


def entry(dtype: str = "F32", shape: Any = (3,), start: Any = 0, end: Any = 12) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def encrypted() -> io.BytesIO:
    data = bytearray(written(agent={}).getvalue())
    data[data.rindex(b"PK\1\2") + 8] |= 1
    return io.BytesIO(data)


def doubled() -> io.BytesIO:
    file = written(agent={})
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "a") as archive:
        archive.writestr("agent.json", "{}")
    return file


def crowded() -> io.BytesIO:
    return rebuilt(written(agent={}), {f"m{i}.json": b"" for i in range(10_000)})


class Pickled:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("code_was_run"),))


HOSTILE: dict[str, tuple[Callable[[], io.BytesIO], str]] = {
    "empty": (lambda: io.BytesIO(), "got no zip"),
    "text": (lambda: io.BytesIO(b"hello" * 50), "got no zip"),
    "half": (lambda: io.BytesIO(written(agent={"x": torch.zeros(99)}).getvalue()[:300]), "got no zip"),
    "comment": (lambda: io.BytesIO(written(agent={}).getvalue()[:-2] + b"\5\0hello"), "got no zip"),
    "pickle for JSON": (lambda: rebuilt(written(agent={}), {"agent.json": pickle.dumps(Pickled())}), "damaged"),
    "pickle for tensors": (
        lambda: rebuilt(written(agent={}), {"agent.safetensors": pickle.dumps(Pickled())}),
        "header",
    ),
    "pickle alone": (lambda: io.BytesIO(pickle.dumps(Pickled())), "got no zip"),
    "Stable-Baselines3": (lambda: rebuilt(written(agent={}), {"data": b"{}"}), "allow_pickle=True"),
    "another program": (lambda: rebuilt(written(agent={}), {"agent.json": b"{}"}), "another program's agent.json"),
    "no document": (lambda: written(other={}), "expected agent.json in it"),
    "path traversal": (lambda: rebuilt(written(agent={}), {"../evil.json": b"{}"}), "got a member '../evil.json'"),
    "absolute path": (lambda: rebuilt(written(agent={}), {"/etc/evil.json": b"{}"}), "got a member"),
    "code": (lambda: rebuilt(written(agent={}), {"evil.py": b""}), "got a member 'evil.py'"),
    "zip bomb": (
        lambda: rebuilt(written(agent={}), {"agent.json": b" " * 10**8}, compression=zipfile.ZIP_DEFLATED),
        "compressed, expected it stored",
    ),
    "long JSON": (lambda: rebuilt(written(agent={}), {"agent.json": b" " * 2**21}), "more than 1048576 bytes"),
    "many members": (crowded, "got a zip of 10002 members"),
    "two of one name": (doubled, "several members of one name"),
    "password": (encrypted, "damaged"),
    "deep": (lambda: with_content("[" * 200_000 + "]" * 200_000), "RecursionError"),
    "deep tree": (lambda: with_content('{"a":' * 5000 + "1" + "}" * 5000), "RecursionError"),
    "NaN": (lambda: with_content("NaN"), "got the number NaN"),
    "infinite": (lambda: with_content("1e999"), "got the number 1e999"),
    "digits": (lambda: with_content("9" * 5000), "got the number 9999"),
    "name twice": (lambda: with_content('{"a": 1, "a": 2}'), "a name twice"),
    "unknown tag": (lambda: with_content('{"$code": 1}'), "KeyError"),
    "two tags": (lambda: with_content('{"$tuple": [], "$array": "x"}'), "damaged"),
    "unknown class": (lambda: with_content('{"$class": "os.system"}'), "got the class 'os.system'"),
    "function of torch": (lambda: with_content('{"$class": "torch.nn.init"}'), "got the class 'torch.nn.init'"),
    "base class": (lambda: with_content('{"$class": "torch.nn.Module.dump"}'), "got the class"),
    "instance of a module": (lambda: with_content('{"$object": ["FlowPolicy", {}]}'), "KeyError"),
    "large space": (
        lambda: with_content('{"$object": ["Box", {"low": 0, "high": 1, "shape": [1000000000]}]}'),
        "shape",
    ),
    "dtype of objects": (lambda: with_content('{"$dtype": "object"}'), "got the dtype 'object'"),
    "large dtype": (lambda: with_content('{"$dtype": "(1000000,1000000)f8"}'), "got the dtype"),
    "config out of range": (lambda: with_content('{"$object": ["PolicyFlowConfig", {"gamma": 2}]}'), "gamma: got 2"),
    "missing tensor": (lambda: with_content('{"$tensor": "nowhere"}'), "KeyError"),
    "huge header": (lambda: with_header({}, length=2**62), "header of 4611686018427387904 bytes"),
    "header is a list": (lambda: with_header([]), "damaged"),
    "huge shape": (lambda: with_header({"x": entry(shape=(2**40, 2**40))}), "side by side"),
    "shape of other size": (lambda: with_header({"x": entry(shape=(4,))}), "side by side"),
    "negative shape": (lambda: with_header({"x": entry(shape=(-1, -3))}), "RuntimeError"),
    "fractional shape": (lambda: with_header({"x": entry(shape=(1.5, 2))}), "damaged"),
    "beyond the end": (lambda: with_header({"x": entry(shape=(2**20,), end=2**22)}), "side by side"),
    "the same bytes twice": (lambda: with_header({"x": entry(), "y": entry()}), "side by side"),
    "gap": (lambda: with_header({"x": entry(shape=(2,), start=4)}), "side by side"),
    "more bytes": (lambda: with_header({"x": entry(shape=(2,), end=8)}), "more bytes"),
    "unknown dtype": (lambda: with_header({"x": entry(dtype="F999")}), "KeyError"),
    "no version": (lambda: with_tree(lambda tree: tree.pop("version")), "KeyError"),
    "newer": (lambda: with_tree(lambda tree: tree.update(version=[2, 0])), r"got format version \[2, 0\].*upgrade"),
    "older": (lambda: with_tree(lambda tree: tree.update(version=[0, 3])), "no version ever had it"),
    "no object": (lambda: with_tree(lambda tree: tree.update(content=[])), "got a list"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_and_not_executed(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = HOSTILE[kind]
    file = make()
    with pytest.raises(CheckpointError, match=rf"(?s)^no checkpoint: file\.zip: .*{message}"):
        read(file)
    assert not list(tmp_path.iterdir())


def test_additions_of_later_versions_are_overlooked() -> None:
    def add(tree: dict[str, Any]) -> None:
        tree["version"] = [1, 7]
        tree["signature"] = "later"
        tree["content"]["more"] = 1

    assert read(rebuilt(with_tree(add), {"notes.json": b"{}"}))["more"] == 1
    newer = with_content('{"$object": ["PolicyFlowConfig", {"gamma": 0.5, "later": 1}]}')
    with pytest.warns(UserWarning, match="PolicyFlowConfig: ignored later, which this version does not know"):
        assert read(newer)["x"] == PolicyFlowConfig(gamma=0.5)


def test_nothing_is_written_of_what_cannot_be_stored() -> None:
    with pytest.raises(CheckpointError, match="1,048,576; use arrays"):
        checkpoint.encode({"x": ["text" * 100] * 5000})
