"""What gets installed: one top-level name, typed, with its commands, and the same from a wheel as from an sdist."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

import driftrl

ROOT = Path(__file__).parents[1]


def python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    """Output of a Python process, which looks for packages in `path` first."""
    environment = {**os.environ, "PYTHONPATH": str(path)} if path else None
    result = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def build(source: Path, target: str, folder: Path) -> Path:
    """Build `target` (wheel or sdist) of the project in `source` with the backend itself: no network, no isolation."""
    python("-m", "hatchling", "build", "--target", target, "--directory", str(folder), cwd=source)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel_files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def dist_info(wheel_files: dict[str, bytes]) -> str:
    (folder,) = {name.split("/")[0] for name in wheel_files if ".dist-info/" in name}
    return folder


def test_wheel_installs_driftrl_and_no_other_name(wheel_files: dict[str, bytes], dist_info: str) -> None:
    assert {name.split("/")[0] for name in wheel_files} == {"driftrl", dist_info}


def test_wheel_holds_every_module_of_the_checkout(wheel_files: dict[str, bytes]) -> None:
    folders = ("agents", "envs", "dynamics")
    modules = {
        f"driftrl/{path.relative_to(ROOT).as_posix()}": path for each in folders for path in (ROOT / each).rglob("*.py")
    }
    modules |= {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "driftrl").rglob("*.py")}  # links it skips
    expected = {name: path.read_bytes() for name, path in modules.items()}
    rooms = (*folders, "commands", "runs", "analysis", "sweeps", "zoo")
    assert {f"driftrl/{folder}/__init__.py" for folder in rooms} <= set(expected)
    assert {name: content for name, content in wheel_files.items() if name.endswith(".py")} == expected


def test_wheel_holds_what_the_report_page_is_made_of(wheel_files: dict[str, bytes]) -> None:
    for name in ("driftrl/analysis/report.css", "driftrl/analysis/report.js"):
        assert wheel_files[name] == (ROOT / name).read_bytes()


def test_wheel_holds_the_source_that_is_compiled_at_first_use(wheel_files: dict[str, bytes]) -> None:
    name = "envs/native/step.cpp"
    assert wheel_files[f"driftrl/{name}"] == (ROOT / name).read_bytes()


def test_wheel_is_marked_as_typed(wheel_files: dict[str, bytes]) -> None:
    assert "driftrl/py.typed" in wheel_files


def test_versions_agree(wheel_files: dict[str, bytes], dist_info: str) -> None:
    metadata = email.message_from_bytes(wheel_files[f"{dist_info}/METADATA"])
    assert metadata["Version"] == driftrl.__version__


def test_wheel_declares_the_commands(wheel_files: dict[str, bytes], dist_info: str) -> None:
    entry_points = ConfigParser()
    entry_points.read_string(wheel_files[f"{dist_info}/entry_points.txt"].decode())
    assert dict(entry_points["console_scripts"]) == {
        "driftrl-train": "driftrl.commands.train:main",
        "driftrl-evaluate": "driftrl.commands.evaluate:main",
        "driftrl-compare": "driftrl.commands.compare:main",
        "driftrl-sweep": "driftrl.commands.sweep:main",
    }


def test_sdist_builds_the_same_wheel(wheel_files: dict[str, bytes], tmp_path: Path) -> None:
    sdist = build(ROOT, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    with zipfile.ZipFile(build(source, "wheel", tmp_path / "wheel")) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == wheel_files


@pytest.fixture(scope="module")
def plain_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout as it is where symbolic links are plain files that hold the target's path."""
    folder = tmp_path_factory.mktemp("without links") / "driftrl"
    folder.mkdir(parents=True)
    for name in ("agents", "envs", "dynamics", "driftrl"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "evaluate.py", "compare.py", "sweep.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for link in [path for path in (folder / "driftrl").iterdir() if path.is_symlink()]:
        target = os.readlink(link)
        link.unlink()
        link.write_text(target)
    assert (folder / "driftrl" / "agents").read_text() == "../agents"
    return folder


def test_a_checkout_without_links_builds_the_same_wheel(
    plain_checkout: Path, wheel_files: dict[str, bytes], tmp_path: Path
) -> None:
    with zipfile.ZipFile(build(plain_checkout, "wheel", tmp_path / "wheel")) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == wheel_files


def test_a_checkout_without_links_runs_the_commands(plain_checkout: Path) -> None:
    assert "--resume RUN" in python("train.py", "--help", cwd=plain_checkout, path=plain_checkout)
    assert "--episodes" in python("evaluate.py", "--help", cwd=plain_checkout, path=plain_checkout)
    assert "--html" in python("compare.py", "--help", cwd=plain_checkout, path=plain_checkout)
    where = "import driftrl.agents.policyflow, driftrl.envs.make as m; print(m.__file__)"
    assert Path(python("-c", where, cwd=plain_checkout, path=plain_checkout)).is_relative_to(plain_checkout)


def test_public_names_exist() -> None:
    assert all(hasattr(driftrl, name) for name in driftrl.__all__)


def test_dir_shows_the_public_names(tmp_path: Path) -> None:
    code = "import driftrl; print(sorted(driftrl.__all__) == dir(driftrl))"
    assert python("-c", code, cwd=tmp_path) == "True"  # a fresh process: none of them has been loaded


def test_unknown_name_is_an_attribute_error() -> None:
    name = "PolicyFlop"
    with pytest.raises(AttributeError, match="no attribute 'PolicyFlop'"):
        getattr(driftrl, name)


def test_dynamics_needs_neither_stable_baselines3_nor_mujoco(tmp_path: Path) -> None:
    code = "import sys, driftrl.dynamics; print({'stable_baselines3', 'mujoco'} & set(sys.modules))"
    assert python("-c", code, cwd=tmp_path) == "set()"


@pytest.mark.slow
def test_installed_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    python("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel), cwd=tmp_path)
    file = python("-c", "import driftrl.agents; print(driftrl.agents.__file__)", cwd=tmp_path, path=site)
    assert Path(file).is_relative_to(site)
    assert "--total-timesteps" in python(
        "-m", "driftrl.commands.train", "policyflow", "--help", cwd=tmp_path, path=site
    )
    assert "--episodes" in python("-m", "driftrl.commands.evaluate", "--help", cwd=tmp_path, path=site)


def test_commands_load_what_few_need_only_when_it_is_needed(tmp_path: Path) -> None:
    code = "import sys, driftrl.commands.train; print({'yaml', 'matplotlib', 'onnx', 'pandas'} & set(sys.modules))"
    assert python("-c", code, cwd=tmp_path) == "set()"
