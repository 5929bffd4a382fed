"""What a folder of wheels lacks, and which of them a Python needs.

    python benchmarks/gpu/needs.py complete FOLDER [NAME ...]    # exit code 1 if a dependency is nowhere
    python benchmarks/gpu/needs.py missing FOLDER                # the wheels that this Python needs, one a line

`complete` follows the dependencies of pyproject.toml and of every wheel through the wheels' METADATA, for Python 3.12
on x86-64 Linux. `missing` leaves out what this Python has in a version that satisfies all wheels, so that the machine's
own NumPy and SciPy, which fit each other, stay; the packages that results depend on are always those of the folder.
"""

from __future__ import annotations

import argparse
import email
import importlib.metadata
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MACHINE = (
    "torch filelock fsspec jinja2 markupsafe mpmath networkx setuptools sympy triton "
    "numpy tensorboard tensorboard-data-server grpcio markdown protobuf werkzeug pytest iniconfig packaging pluggy"
).split()  # fmt: skip
"""What the machine has: torch, NumPy, TensorBoard, pytest and their dependencies."""
NOT_IMPORTED = ("etils", "pyopengl", "pyyaml")
"""The first is read by mujoco's own tests only, the second to draw pictures; the third reads files of settings."""
PINNED = ("gymnasium", "mujoco", "stable-baselines3")
"""Results depend on their versions (pyproject.toml, [tool.uv])."""
_TARGET = {
    "python_version": "3.12", "python_full_version": "3.12.3", "sys_platform": "linux", "platform_system": "Linux",
    "platform_machine": "x86_64", "os_name": "posix", "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
}  # fmt: skip


class Wheel(NamedTuple):
    """A wheel and what its METADATA says."""

    file: Path
    name: str
    version: str
    requires: list[Requirement]


def read(folder: Path) -> dict[str, Wheel]:
    """The wheels of a folder by their canonical names."""
    wheels: dict[str, Wheel] = {}
    for file in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(file) as archive:
            entry = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            metadata = email.message_from_bytes(archive.read(entry))
        requires = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
        name = canonicalize_name(metadata["Name"])
        wheels[name] = Wheel(file, name, metadata["Version"], requires)
    return wheels


def applicable(requires: list[Requirement], extras: frozenset[str]) -> Iterator[Requirement]:
    """The requirements that hold on the target machine with some extras."""
    for each in requires:
        if each.marker is None or any(each.marker.evaluate(_TARGET | {"extra": extra}) for extra in {"", *extras}):
            yield each


def lacking(wheels: dict[str, Wheel], roots: list[Requirement], have: set[str]) -> list[str]:
    """Sentences about the requirements that neither a wheel nor the machine meets."""
    faults, seen = [], set[tuple[str, frozenset[str]]]()
    waiting = [(root, "pyproject.toml") for root in roots]
    waiting += [(each, wheel.name) for wheel in wheels.values() for each in applicable(wheel.requires, frozenset())]
    while waiting:
        needed, by = waiting.pop()
        name, extras = canonicalize_name(needed.name), frozenset(needed.extras)
        wheel = wheels.get(name)
        if wheel is None:
            if name not in have:
                faults.append(f"{by} needs {needed}, which is neither in the folder nor on the machine")
            continue
        if not needed.specifier.contains(wheel.version, prereleases=True):
            faults.append(f"{by} needs {needed}, and the folder has {wheel.version}")
        if (name, extras) not in seen:
            seen.add((name, extras))
            waiting += [(each, f"{name}[{','.join(extras)}]") for each in applicable(wheel.requires, extras)]
    return sorted(set(faults))


def installed() -> dict[str, str]:
    """Versions of this Python's distributions by their canonical names."""
    found: dict[str, str] = {}
    for each in importlib.metadata.distributions():
        found.setdefault(canonicalize_name(each.metadata["Name"]), each.version)
    return found


def missing(wheels: dict[str, Wheel], have: dict[str, str]) -> list[Wheel]:
    """The wheels whose packages a Python lacks or has in a version that does not do."""
    wanted = [each for wheel in wheels.values() for each in applicable(wheel.requires, frozenset())]
    result = []
    for name, wheel in wheels.items():
        limits = [each.specifier for each in wanted if canonicalize_name(each.name) == name]
        own = have.get(name)
        if own is None or not all(limit.contains(own, prereleases=True) for limit in limits):
            result.append(wheel)
        elif name in PINNED and own != wheel.version:
            result.append(wheel)
    return result


def roots(pyproject: Path) -> list[Requirement]:
    """What DriftRL itself depends on."""
    lines = pyproject.read_text().split("\ndependencies = [\n")[1].split("\n]\n")[0].splitlines()
    return [Requirement(line.split('"')[1]) for line in lines]


def main() -> int:
    """Run one of the two commands; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("complete", "missing"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("have", nargs="*", help="complete: further packages that the machine has")
    arguments = parser.parse_args()
    wheels = read(arguments.folder)
    if not wheels:
        print(f"no wheels in {arguments.folder}", file=sys.stderr)
        return 1
    if arguments.command == "missing":
        print("\n".join(str(wheel.file) for wheel in missing(wheels, installed())))
        return 0
    have: set[str] = {canonicalize_name(name) for name in (*MACHINE, *NOT_IMPORTED, *arguments.have)}
    faults = lacking(wheels, roots(Path(__file__).parents[2] / "pyproject.toml"), have)
    print("\n".join(faults) or "complete: every dependency is in the folder or on the machine")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
