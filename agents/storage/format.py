"""The file format of checkpoints: JSON and tensors in a zip. Reading one executes nothing that it contains.

A checkpoint holds documents. Document NAME is two members: NAME.json, a tree of values, and NAME.safetensors, the
arrays and tensors in it. The tree is plain JSON; what JSON lacks is an object with one key that begins with "$", see
`_Decoder`. Members are stored, not deflated: a file declares the memory that it takes. docs/checkpoints.md has it all.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import reprlib
import struct
import warnings
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule
from torch import Tensor, nn

VERSION = (1, 0)
"""Major: readers of another one refuse the file. Minor: raised for additions that older readers may overlook."""

PICKLED = (
    "got a file in Stable-Baselines3's format, expected DriftRL's; loading the former executes code that is in it. "
    "If you trust where it comes from: load(..., allow_pickle=True), then save it anew"
)
_FORMAT = "driftrl checkpoint"
_MAX_TEXT = 2**20  # bytes of JSON: parsed they take up to 30 times as much
_MAX_MEMBERS, _MAX_DIRECTORY = 16, 4096
_MEMBER = re.compile(r"[\w-]+\.(json|safetensors)", re.ASCII)
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

T = TypeVar("T", bound=type)


class CheckpointError(ValueError):
    """A file that cannot be read as a checkpoint, or a value that no checkpoint can hold."""


_FIELDS: dict[type, tuple[str, ...]] = {
    spaces.Box: ("low", "high", "dtype"),
    spaces.Dict: ("spaces",),
    spaces.Discrete: ("n", "start"),
    spaces.MultiDiscrete: ("nvec",),
    spaces.MultiBinary: ("n",),
    LinearSchedule: ("start", "end", "end_fraction"),
    ConstantSchedule: ("val",),
    TrainFreq: ("frequency", "unit"),
    TrainFrequencyUnit: ("value",),
}
"""Classes whose instances can be stored -> their attributes that, as arguments, make an equal one."""

_CLASSES = {kind.__name__: kind for kind in _FIELDS}
_UPGRADES: dict[type, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def storable(kind: T | None = None, *, upgrade: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> Any:
    """Let checkpoints hold a class, by its name, and its instances if it is a dataclass. A decorator.

    Args:
        kind: the class.
        upgrade: of a dataclass: fields as any earlier version saved them -> fields of this one.
    """
    if kind is None:
        return partial(storable, upgrade=upgrade)
    _CLASSES[kind.__name__] = kind
    if dataclasses.is_dataclass(kind):
        _FIELDS[kind] = tuple(field.name for field in dataclasses.fields(kind))
    if upgrade is not None:
        _UPGRADES[kind] = upgrade
    return kind


class Document(NamedTuple):
    """A document ready to be written: its JSON, and its tensors, which are not copies."""

    text: bytes
    tensors: dict[str, Tensor]


def encode(content: dict[str, Any]) -> Document:
    """Make a document of a dictionary of values.

    Raises:
        CheckpointError: if there is a value that checkpoints cannot hold.
    """
    encoder = _Encoder()
    tree = {"format": _FORMAT, "version": list(VERSION), "content": encoder.encode(content, "")}
    text = json.dumps(tree, allow_nan=False).encode()
    if len(text) > _MAX_TEXT:
        raise CheckpointError(f"got {len(text):,} bytes of JSON to save, expected at most {_MAX_TEXT:,}; use arrays")
    return Document(text, encoder.tensors)


def write(file: IO[bytes], documents: Mapping[str, Document]) -> None:
    """Write documents, by their names, as a checkpoint."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, (text, tensors) in documents.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.json"), text)
            with archive.open(zipfile.ZipInfo(f"{name}.safetensors"), "w", force_zip64=True) as member:
                _write_tensors(member, tensors)


def read(file: IO[bytes], name: str, label: str) -> dict[str, Any]:
    """Read a document of a checkpoint.

    Memory: one times that of the document's arrays, and some 30 MB at most for anything else.

    Args:
        file: seekable.
        name: of the document.
        label: what messages call the file.

    Raises:
        CheckpointError: if the file is no checkpoint, is damaged, lacks the document or was written by a newer version.
    """
    with _archive(file, label) as archive:
        tree = _tree(archive, name)
        with archive.open(f"{name}.safetensors") as member:
            tensors = _read_tensors(member, archive.getinfo(f"{name}.safetensors").file_size)
        content = _Decoder(tensors).decode(tree)
        if not isinstance(content, dict):
            raise CheckpointError(f"got a {type(content).__name__} in {name}.json, expected an object")
        return content


def config_name(file: IO[bytes], label: str) -> str:
    """Name of the class of a saved agent's config, found without reading the rest.

    Raises:
        CheckpointError: as `read`.
    """
    with _archive(file, label) as archive:
        return str(_tree(archive, "agent")["attributes"]["config"]["$object"][0])


def is_pickled(file: IO[bytes], label: str) -> bool:
    """Whether a zip is in Stable-Baselines3's format, which has a member "data"; the file is then at its beginning.

    Raises:
        CheckpointError: if it is neither that nor a checkpoint.
    """
    with _archive(file, label) as archive:
        found = "data" in archive.namelist()
    file.seek(0)
    return found


def _tree(archive: zipfile.ZipFile, name: str) -> Any:
    """The undecoded content of a document."""
    members = {info.filename: info for info in archive.infolist()}
    if "data" in members:
        raise CheckpointError(PICKLED)
    if f"{name}.json" not in members:
        raise CheckpointError(f"got one with {', '.join(members) or 'no members'}, expected {name}.json in it")
    if members[f"{name}.json"].file_size > _MAX_TEXT:
        raise CheckpointError(f"got {name}.json of more than {_MAX_TEXT} bytes, expected less")
    tree = _parse(archive.read(f"{name}.json"))
    if not isinstance(tree, dict) or tree.get("format") != _FORMAT:
        raise CheckpointError(f"got another program's {name}.json, expected one with format: {_FORMAT!r}")
    major = tree["version"][0]
    if major != VERSION[0]:
        remedy = "written by a newer DriftRL: upgrade driftrl" if major > VERSION[0] else "no version ever had it"
        raise CheckpointError(f"got format version {tree['version']}, expected {VERSION[0]}.x; {remedy}")
    return tree["content"]


@contextmanager
def _archive(file: IO[bytes], label: str) -> Iterator[zipfile.ZipFile]:
    """The zip, checked before anything is taken from it; whatever goes wrong within becomes a CheckpointError."""
    try:
        _check_directory(file)
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            found = [info.filename for info in members]
            if len(set(found)) < len(found):
                raise CheckpointError("got a zip with several members of one name, expected one of each")
            if "data" not in found:  # else Stable-Baselines3's: what it may contain is not ours to say
                for info in members:
                    if not _MEMBER.fullmatch(info.filename):
                        raise CheckpointError(f"got a member {info.filename!r}, expected NAME.json, NAME.safetensors")
                    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                        raise CheckpointError(f"got {info.filename} compressed, expected it stored")
                if sum(info.file_size for info in members) > file.seek(0, 2):
                    raise CheckpointError("got members that overlap, expected one after the other")
            yield archive
    except CheckpointError as error:
        raise CheckpointError(f"no checkpoint: {label}: {error}") from error.__cause__
    except Exception as error:  # damage leads anywhere: another compression, a password, an offset beyond the end, ...
        raise CheckpointError(
            f"no checkpoint: {label}: got something damaged or else, expected a file saved by DriftRL ({error!r})"
        ) from error


def _check_directory(file: IO[bytes]) -> None:
    """Refuse a zip with a large directory: zipfile makes an object of each entry, ten times its size, at once."""
    file.seek(0, 2)
    tail = b""
    if file.tell() >= 22:
        file.seek(-min(file.tell(), 98), 2)
        tail = file.read()
    if tail[-22:-18] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
        raise CheckpointError("got no zip, or half of one, expected a file saved by DriftRL")
    count, size = struct.unpack("<HI", tail[-12:-6])
    if tail[-42:-38] == b"PK\x06\x07":  # the record for large files precedes, and holds instead
        count, size = struct.unpack("<QQ", tail[24:32] + tail[40:48])
    if count > _MAX_MEMBERS or size > _MAX_DIRECTORY:
        raise CheckpointError(f"got a zip of {count} members, expected at most {_MAX_MEMBERS}")


class _Encoder:
    """Turns values into a tree for JSON; `tensors` collects what goes beside it."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def encode(self, value: Any, where: str) -> Any:
        """The tree for a value that lies at `where`, a path of names and numbers."""
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": str(value)}
        if isinstance(value, Tensor):
            return {"$tensor": self._add(value.detach(), where)}
        if isinstance(value, np.ndarray | np.generic):
            return {"$array" if kind is np.ndarray else "$scalar": self._add_array(value, where)}
        if kind in (dict, OrderedDict):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: self.encode(each, f"{where}.{key}" if where else key) for key, each in value.items()}
            return {"$dict": self.encode([list(item) for item in value.items()], where)}
        if kind is list and len(value) >= 16 and all(type(each) is float for each in value):
            return {"$floats": self._add(torch.tensor(value, dtype=torch.float64), where)}
        if kind in (list, tuple, deque):
            items = [self.encode(each, f"{where}.{i}") for i, each in enumerate(value)]
            return items if kind is list else {"$tuple": items} if kind is tuple else {"$deque": [value.maxlen, items]}
        if isinstance(value, np.dtype) and value.kind in "biufc":
            return {"$dtype": value.name}
        if isinstance(value, type) and (name := _class_name(value)):
            return {"$class": name}
        if kind in _FIELDS:
            fields = {name: getattr(value, name) for name in _FIELDS[kind]}
            if kind is spaces.Dict:
                fields["spaces"] = list(value.spaces.items())  # of a dict it would sort the keys
            return {"$object": [kind.__name__, self.encode(fields, where)]}
        raise _unstorable(value, where)

    def _add(self, tensor: Tensor, where: str) -> str:
        if tensor.dtype not in _DTYPE_NAMES or tensor.layout is not torch.strided:
            raise _unstorable(tensor, where)
        while where in self.tensors:  # names with dots can meet
            where += "'"
        self.tensors[where] = tensor
        return where

    def _add_array(self, value: Any, where: str) -> str:
        try:
            return self._add(torch.from_numpy(np.array(value, order="C")), where)
        except TypeError:  # objects, text
            raise _unstorable(value, where) from None


def _unstorable(value: object, where: str) -> CheckpointError:
    names = where.split(".")
    attribute = names[1] if names[0] == "attributes" and len(names) > 1 else names[0]
    place = f" in {where}" if len(names) > 2 else ""
    return CheckpointError(
        f"{attribute}: got {reprlib.repr(value)}{place}, which a checkpoint cannot hold, only data and the classes of "
        f"DriftRL and torch; save(..., exclude=[{attribute!r}]) leaves it out, load(..., "
        f"custom_objects={{{attribute!r}: ...}}) puts it back"
    )


def _class_name(kind: type) -> str | None:
    """The name of a class that checkpoints can refer to, or None."""
    if _CLASSES.get(kind.__name__) is kind:
        return kind.__name__
    for prefix, module in (("torch.nn", nn), ("torch.optim", torch.optim)):
        if getattr(module, kind.__name__, None) is kind:
            return f"{prefix}.{kind.__name__}"
    return None


def _class_of(name: str) -> type:
    if name in _CLASSES:
        return _CLASSES[name]
    for prefix, module, base in (("torch.nn.", nn, nn.Module), ("torch.optim.", torch.optim, torch.optim.Optimizer)):
        kind = getattr(module, name.removeprefix(prefix), None) if name.startswith(prefix) else None
        if isinstance(kind, type) and issubclass(kind, base):
            return kind
    raise CheckpointError(f"got the class {name!r}, expected one of DriftRL, torch.nn or torch.optim")


class _Decoder:
    """Turns a tree back into values."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self._readers: dict[str, Callable[[Any], Any]] = {
            "$float": lambda text: _NOT_FINITE[text],
            "$tensor": lambda name: tensors[name],
            "$array": lambda name: tensors[name].numpy(),
            "$scalar": lambda name: tensors[name].numpy()[()],
            "$floats": lambda name: tensors[name].tolist(),
            "$dict": lambda items: {key: value for key, value in self.decode(items)},
            "$tuple": lambda items: tuple(self.decode(items)),
            "$deque": lambda parts: deque(self.decode(parts[1]), maxlen=parts[0]),
            "$dtype": self._dtype,
            "$class": _class_of,
            "$object": self._object,
        }

    def decode(self, tree: Any) -> Any:
        """The value of a tree."""
        if isinstance(tree, list):
            return [self.decode(each) for each in tree]
        if not isinstance(tree, dict):
            return tree
        if not any(key.startswith("$") for key in tree):
            return {key: self.decode(value) for key, value in tree.items()}
        ((tag, value),) = tree.items()
        return self._readers[tag](value)

    @staticmethod
    def _dtype(name: str) -> np.dtype[Any]:
        if not re.fullmatch(r"(bool|u?int|float|complex)\d*", name):
            raise CheckpointError(f"got the dtype {name!r}, expected one of numbers")
        return np.dtype(name)

    def _object(self, parts: list[Any]) -> Any:
        name, tree = parts
        kind, arguments = _CLASSES[name], self.decode(tree)
        if kind in _UPGRADES:
            arguments = _UPGRADES[kind](arguments)
        unknown = sorted(arguments.keys() - set(_FIELDS[kind]))
        if unknown and not dataclasses.is_dataclass(kind):  # other arguments could make it of any size
            raise CheckpointError(f"got {name} with {', '.join(unknown)}, expected {', '.join(_FIELDS[kind])}")
        if unknown:
            warnings.warn(f"{name}: ignored {', '.join(unknown)}, which this version does not know", stacklevel=2)
        return kind(**{field: value for field, value in arguments.items() if field not in unknown})


def _parse(text: bytes) -> Any:
    """JSON of one meaning: UTF-8, no name twice, no numbers that are not finite or have hundreds of digits."""

    def refuse(constant: str) -> Any:
        raise CheckpointError(f"got the number {constant[:20]} in JSON, expected finite ones of at most 64 digits")

    def integer(digits: str) -> int:
        return int(digits) if len(digits) <= 64 else refuse(digits)

    def real(digits: str) -> float:
        return value if math.isfinite(value := float(digits)) else refuse(digits)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise CheckpointError("got JSON with a name twice in one object, expected each once")
        return found

    return json.loads(
        text.decode(), parse_int=integer, parse_float=real, parse_constant=refuse, object_pairs_hook=unique
    )


def _write_tensors(file: IO[bytes], tensors: dict[str, Tensor]) -> None:
    """Write tensors in the format of safetensors, one at a time: its library would hold all of them twice."""
    header, end = {}, 0
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # keeps each of them aligned
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for _, tensor in ordered:
        flat = tensor.cpu().contiguous().as_strided((tensor.numel(),), (1,))  # a lone number may have any stride
        file.write(flat.view(torch.uint8).numpy().data)


def _read_tensors(file: IO[bytes], size: int) -> dict[str, Tensor]:
    """Read tensors, which must lie side by side: so together they cannot be larger than the file.

    Args:
        file: at its beginning, in the format of safetensors.
        size: its length in bytes.
    """
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(_MAX_TEXT, size - 8):
        raise CheckpointError(f"got a header of {length} bytes for tensors, expected at most {_MAX_TEXT}")
    header = _parse(file.read(length))
    header.pop("__metadata__", None)
    tensors, at = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (start, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if start != at or end - start != math.prod(shape) * dtype.itemsize or not start <= end <= size - 8 - length:
            raise CheckpointError(f"got {entry} for {name!r} of {size} bytes, expected tensors side by side")
        flat = torch.empty(end - start, dtype=torch.uint8)
        if file.readinto(flat.numpy()) != end - start:  # type: ignore[attr-defined]
            raise CheckpointError(f"got fewer bytes than the header says for {name!r}, expected {end - start}")
        tensors[name] = (flat != 0 if dtype == torch.bool else flat.view(dtype)).view(shape)
        at = end
    if file.read(1):  # at the end zipfile also compares the checksum
        raise CheckpointError("got more bytes than the header says, expected as many")
    return tensors
