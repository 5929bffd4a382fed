"""The file format of checkpoints: JSON and tensors in a zip. Reading one executes nothing that it contains.

A checkpoint holds documents. Document NAME is two members: NAME.json, a tree of values (`values.py`), and
NAME.safetensors, the arrays and tensors in it. Members are stored, not deflated: a file declares the memory that it
takes. docs/checkpoints.md has it all.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from .values import DTYPE_NAMES, DTYPES, CheckpointError, Decoder, Encoder

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


class Document(NamedTuple):
    """A document ready to be written: its JSON, and its tensors, which are not copies."""

    text: bytes
    tensors: dict[str, Tensor]


def encode(content: dict[str, Any]) -> Document:
    """Make a document of a dictionary of values.

    Raises:
        CheckpointError: if there is a value that checkpoints cannot hold.
    """
    encoder = Encoder()
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
        content = Decoder(tensors).decode(tree)
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
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
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
        dtype, shape, (start, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
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
