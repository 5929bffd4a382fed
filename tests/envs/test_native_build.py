"""How the compiled stepper is built, kept and found again, and what happens where that fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from driftrl.envs import make_vec
from driftrl.envs.mujoco_batch import MujocoVecEnv
from driftrl.envs.native import build

needs_compiler = pytest.mark.skipif(build.find_compiler() is None or os.name != "posix", reason="needs a compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of this test, and a process that has not looked for the library yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build._loaded.cache_clear()
    yield tmp_path / "driftrl"
    build._loaded.cache_clear()


def steps_natively() -> bool:
    env = MujocoVecEnv("Hopper-v5", 2)
    env.reset()
    env.step(np.zeros((2, 3)))
    env.close()
    return env.native


def no_compiler_may_run(*arguments: object, **keywords: object) -> None:
    raise AssertionError("the library was to come from the cache")


@needs_compiler
def test_it_is_built_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert steps_natively()
    assert len(list(cache.iterdir())) == 1
    build._loaded.cache_clear()
    monkeypatch.setattr(subprocess, "run", no_compiler_may_run)
    assert steps_natively()


@needs_compiler
@pytest.mark.parametrize("content", [b"", b"not a library", None])
def test_a_damaged_file_is_built_anew(cache: Path, content: bytes | None) -> None:
    assert steps_natively()
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.unlink()  # it is loaded: its content must stay
    kept.write_bytes(whole[: len(whole) // 2] if content is None else content)
    build._loaded.cache_clear()
    assert steps_natively()
    assert kept.read_bytes() == whole or len(list(cache.iterdir())) == 2


@needs_compiler
def test_another_source_version_or_compiler_is_another_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = build.find_compiler()
    assert compiler is not None
    keys = {build._key(compiler)}
    monkeypatch.setattr("mujoco.__version__", "3.99")
    keys.add(build._key(compiler))
    changed = tmp_path / "step.cpp"
    changed.write_text(build.SOURCE.read_text() + "\n")
    monkeypatch.setattr(build, "SOURCE", changed)
    keys.add(build._key(compiler))
    keys.add(build._key(sys.executable))
    assert len(keys) == 4


@needs_compiler
def test_a_cache_that_cannot_be_written_costs_a_build_only(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    assert steps_natively()


@needs_compiler
def test_processes_that_build_at_once_do_not_disturb_each_other(cache: Path) -> None:
    code = "from driftrl.envs.native.build import library; print(library().driftrl_make is not None)"
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=300)[0].strip() for process in running] == ["True"] * 3
    assert not list(cache.glob("build-*"))


def test_without_a_compiler_threads_of_python_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not steps_natively()
    env = make_vec("Hopper-v5", 2, 0, backend="batched")
    assert isinstance(env, MujocoVecEnv)
    assert not env.native
    with pytest.raises(ValueError, match="native: got True, but no C\\+\\+ compiler is found"):
        MujocoVecEnv("Hopper-v5", 2, native=True)


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands for a compiler")
def test_a_compiler_that_fails_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'fatal error: no such header' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.warns(RuntimeWarning, match=r"no such header; the simulators are stepped by threads of Python"):
        assert not steps_natively()
    assert not steps_natively()
    with pytest.raises(ValueError, match="no such header"):
        MujocoVecEnv("Hopper-v5", 2, native=True)


@needs_compiler
def test_what_mujoco_does_not_offer_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("driftrl.envs.simulators._CALLBACKS", ("mjcb_no_such",))
    assert not steps_natively()
    with pytest.raises(ValueError, match="lacks what native stepping needs"):
        MujocoVecEnv("Hopper-v5", 2, native=True)
