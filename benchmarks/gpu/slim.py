"""Pack mujoco-warp and warp-lang for a GPU machine in one archive, without what is of no use there.

    python benchmarks/gpu/slim.py FOLDER        # its wheels become FOLDER/warp.tar.xz, in some minutes

Left out are the compiler for Warp's CPU device, a third of its libraries, and tests, examples and models for them.
"""

from __future__ import annotations

import argparse
import io
import lzma
import tarfile
import zipfile
from pathlib import Path

ARCHIVE = "warp.tar.xz"
_USELESS = ("warp-clang", "warp/tests/", "warp/examples/", "mujoco_warp/test_data/", "_test.py")


_WINDOW = 1 << 28
"""Bytes in which repetitions are found: nearly the whole library, which holds the same kernels for several GPUs."""


def pack(folder: Path, window: int = _WINDOW) -> Path:
    """Put what the wheels of a folder hold into one archive there, and remove them; takes 11 windows of memory."""
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": window}]
    wheels, archive = sorted(folder.glob("*.whl")), folder / ARCHIVE
    with lzma.open(archive, "wb", filters=filters) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as files:
                for name in files.namelist():
                    if name.endswith("/") or any(part in name for part in _USELESS):
                        continue
                    content = files.read(name)
                    entry = tarfile.TarInfo(name)
                    entry.size, entry.mode = len(content), 0o644
                    tar.addfile(entry, io.BytesIO(content))
    for wheel in wheels:
        wheel.unlink()
    return archive


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    packed = pack(parser.parse_args().folder)
    print(f"{packed}: {packed.stat().st_size / 2**20:.1f} MiB")
