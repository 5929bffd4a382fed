"""Pack mujoco-warp and warp-lang for a GPU machine in one archive, without what is of no use there.

    python benchmarks/gpu/slim.py FOLDER [--architecture 90]    # its wheels become FOLDER/warp.tar.xz, in some minutes

Left out are the compiler for Warp's CPU device, a third of its libraries; tests, examples and models for them; and
Warp's own kernels compiled for other GPUs than that of the architecture, 90 for Hopper (H100, H200). Their portable
form (PTX) stays, from which the driver compiles them on any other GPU at the first start.
"""

from __future__ import annotations

import argparse
import io
import lzma
import struct
import tarfile
import zipfile
from pathlib import Path

ARCHIVE = "warp.tar.xz"
_USELESS = ("warp-clang", "warp/tests/", "warp/examples/", "mujoco_warp/test_data/", "_test.py")
_FATBIN = struct.pack("<I", 0xBA55ED50)
"""What a table of one program for several GPUs (fat binary) begins with."""
_TABLE, _ENTRY = struct.Struct("<IHHQ"), struct.Struct("<HHIQIIHHI")
"""Magic number, version, size of this header, size of what follows; kind, _, size of this header, size of the program,
size compressed, _, minor and major version, architecture."""
_COMPILED = 2
"""The kind of entries that are compiled for one architecture; 1 is PTX."""


def without_other_architectures(library: bytes, architecture: int) -> bytes:
    """A library whose programs for other GPUs are zeros, which compress to nothing; sizes and places stay as they are.

    The driver takes the entry of its own architecture and does not look into the others.
    """
    slim, start = bytearray(library), library.find(_FATBIN)
    while start >= 0:
        _, version, header, size = _TABLE.unpack_from(library, start)
        stop = start + header + size
        if version != 1 or header != _TABLE.size or stop > len(library):  # the number stands there by chance
            start = library.find(_FATBIN, start + len(_FATBIN))
            continue
        entry = start + header
        while entry + _ENTRY.size <= stop:
            kind, _, own, length, _, _, _, _, target = _ENTRY.unpack_from(library, entry)
            if kind == _COMPILED and target != architecture:
                slim[entry + own : entry + own + length] = bytes(length)
            entry += own + length
        start = library.find(_FATBIN, stop)
    return bytes(slim)


def pack(folder: Path, architecture: int = 90) -> Path:
    """Put what the wheels of a folder hold into one archive there, and remove them."""
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 9}]
    wheels, archive = sorted(folder.glob("*.whl")), folder / ARCHIVE
    with lzma.open(archive, "wb", filters=filters) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as files:
                for name in files.namelist():
                    if name.endswith("/") or any(part in name for part in _USELESS):
                        continue
                    content = files.read(name)
                    if name.endswith(".so"):
                        content = without_other_architectures(content, architecture)
                    entry = tarfile.TarInfo(name)
                    entry.size, entry.mode = len(content), 0o644
                    tar.addfile(entry, io.BytesIO(content))
    for wheel in wheels:
        wheel.unlink()
    return archive


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--architecture", type=int, default=90, help="of the GPU, such as 90 for compute capability 9.0"
    )
    options = parser.parse_args()
    packed = pack(options.folder, options.architecture)
    print(f"{packed}: {packed.stat().st_size / 2**20:.1f} MiB")
