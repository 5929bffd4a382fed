"""The house keeps its order: what may import what, and how long a file may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARIES = ("agents", "envs", "dynamics", "driftrl")
MAY_IMPORT = {
    "dynamics": {"dynamics"},
    "envs": {"envs"},
    "agents/common": {"agents/common", "dynamics", "envs"},
    "agents/storage": {"agents/storage", "dynamics", "envs"},
    "agents/policyflow": {"agents/policyflow", "agents/common", "agents/storage", "dynamics", "envs"},
    "agents/lipschitz_mbpo": {"agents/lipschitz_mbpo", "agents/common", "agents/storage", "dynamics", "envs"},
    "agents": {"agents", "agents/policyflow", "agents/lipschitz_mbpo", "agents/common", "agents/storage", "envs"},
    "driftrl": {"driftrl", "agents", "agents/policyflow", "agents/lipschitz_mbpo", "agents/common", "agents/storage",
                "dynamics", "envs"},
}  # fmt: skip
"""Room -> rooms that its modules may import."""
SYSTEM = {"dynamics": {"torch"}}
"""Room -> third-party packages that it may import; others may import any."""
THIRD_PARTY = {"gymnasium", "stable_baselines3", "mujoco", "numpy", "torch", "tyro", "matplotlib", "scipy"}


def modules() -> Iterator[Path]:
    for library in LIBRARIES:
        for path in sorted((ROOT / library).rglob("*.py")):
            if not any((ROOT / library / part).is_symlink() for part in path.relative_to(ROOT / library).parts[:1]):
                yield path.relative_to(ROOT)


def room(parts: tuple[str, ...]) -> str:
    """The room of a module, by the parts of its path below the root or below driftrl."""
    if parts[0] == "agents" and len(parts) > 1 and f"agents/{parts[1]}" in MAY_IMPORT:
        return f"agents/{parts[1]}"
    return parts[0] if parts[0] in MAY_IMPORT else "driftrl"


@pytest.mark.parametrize("path", list(modules()), ids=str)
def test_arrows_point_down(path: Path) -> None:
    mine = room(path.parts)
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            names = [("theirs", *each.name.split(".")) for each in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [("theirs", *(node.module or "").split("."))]
        elif isinstance(node, ast.ImportFrom):
            package = list(path.parts[:-1])
            package = package[1:] if package[0] == "driftrl" else package
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            names = [("ours", *base, each.name) for each in node.names]
        for kind, *parts in names:
            if kind == "theirs":
                assert parts[0] != "driftrl", f"{path} imports driftrl by its name, not relatively"
                allowed = SYSTEM.get(mine, THIRD_PARTY)
                assert parts[0] not in THIRD_PARTY or parts[0] in allowed, f"{path} imports {parts[0]}"
            else:
                target = room(tuple(parts))
                version = target == "driftrl" and parts == ["__version__"]
                assert version or target in MAY_IMPORT[mine], f"{path} imports {'.'.join(parts)}: {mine} -> {target}"


def test_no_file_is_longer_than_400_lines() -> None:
    places = [*LIBRARIES, "tests", "benchmarks", "docs"]
    files = {path for place in places for path in (ROOT / place).rglob("*.py")}
    long = {str(path.relative_to(ROOT)): n for path in files if (n := len(path.read_text().splitlines())) > 400}
    assert long == {}


def test_agents_shows_two_algorithms() -> None:
    shown = {path.name for path in (ROOT / "agents").iterdir() if not path.name.startswith("_")}
    assert shown == {"policyflow", "lipschitz_mbpo", "common", "storage", "registry.py", "presets.py"}
