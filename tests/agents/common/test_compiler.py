"""The compiler's process: what it is told, how it ends, what it leaves behind, and who waits for whom."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from driftrl.agents.common import compiler
from driftrl.agents.common.compiler import CompilerError, compile_program
from driftrl.agents.common.compiling import Compiled, _warn_of_failure, prepared
from driftrl.envs.native.build import find_compiler

GRAPH = torch.fx.symbolic_trace(nn.Identity())
CPU = torch.device("cpu")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """In place of the compiler: the variables that it gets, one mapping for each program."""
    environments = list[dict[str, str]]()

    def run(command: list[str], environment: dict[str, str]) -> None:
        environments.append(environment)
        time.sleep(0.2)
        Path(command[-1]).write_bytes(b"program")

    monkeypatch.setattr(compiler, "_run", run)
    return environments


def make(package: Path) -> None:
    compile_program(GRAPH, [], False, package)


def test_the_compiler_is_the_one_that_is_there(
    tmp_path: Path, told: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    make(tmp_path / "a.pt2")
    assert told[0].get("CXX") == find_compiler() != "/nonexistent/c++"


@pytest.mark.usefixtures("told")
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CompilerError, match="No space left on device; make room"):
        make(tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())
    assert compiler._used_at(tmp_path / "gone.pt2") == 0


def test_those_who_want_the_same_program_wait_for_the_first(tmp_path: Path, told: list[dict[str, str]]) -> None:
    threads = [threading.Thread(target=make, args=(tmp_path / "a.pt2",)) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(told) == 1
    make(tmp_path / "b.pt2")
    assert len(told) == 2
    assert {each.name for each in tmp_path.iterdir()} == {"a.pt2", "b.pt2"}


def test_paths_with_blanks_are_kept_from_the_compiler(
    tmp_path: Path, told: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    blank = tmp_path / "with a blank"
    (blank / "torch").mkdir(parents=True)
    monkeypatch.setattr(torch, "__file__", str(blank / "torch" / "__init__.py"))
    monkeypatch.setattr("tempfile.tempdir", str(blank))
    make(tmp_path / "a.pt2")
    (environment,) = told
    for name in ("PYTHONPATH", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert " " not in environment[name].split(os.pathsep)[0]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CompilerError, match="expected a folder without blanks"):
        make(tmp_path / "b.pt2")


def test_what_killed_processes_left_is_removed_after_a_day(
    tmp_path: Path, told: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "_places", lambda: [str(tmp_path)])
    old, young = (tmp_path / f"driftrl-compile-{name}" for name in ("old", "young"))
    for each in (old, young):
        each.mkdir()
    os.utime(old, (time.time() - 100_000,) * 2)
    (tmp_path / "programs").mkdir()
    make(tmp_path / "programs" / "a.pt2")
    assert not old.exists() and young.exists()


def test_a_folder_that_cannot_be_used_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="this run compiles anew, and so will the next"):
        place = compiler.folder()
    assert place.is_dir() and compiler.folder() == place


STARTS_ANOTHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_interrupt_ends_the_compiler_and_what_it_started(tmp_path: Path) -> None:
    mark = f"{tmp_path}-mark"
    command = [sys.executable, "-c", STARTS_ANOTHER.replace("60)", f"60) #{mark}"), mark]

    def alive() -> list[str]:
        found = subprocess.run(["pgrep", "-f", mark], capture_output=True, text=True, check=False)
        return found.stdout.split()

    def interrupt() -> None:
        while len(alive()) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores the signal
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            compiler._run(command, dict(os.environ))
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 10
    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive()


def test_ctrl_c_of_the_terminal_does_not_reach_the_compiler() -> None:
    said = "import os; assert os.getpgid(0) == os.getpid() != os.getppid()"
    compiler._run([sys.executable, "-c", said], dict(os.environ))
    with pytest.raises(CompilerError, match="compiler failed, AssertionError; use compile='off'\nTraceback"):
        compiler._run([sys.executable, "-c", "assert False"], dict(os.environ))


def test_a_compiler_that_fails_is_an_error_where_it_is_asked_for_and_else_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*arguments: Any) -> None:
        raise CompilerError("compile: PyTorch's compiler failed, why; use compile='off'\nmuch")

    monkeypatch.setattr(compiler, "_run", broken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _warn_of_failure.cache_clear()
    asked, offered = (prepared(lambda x: 3 * x, wanted, CPU) for wanted in ("on", "auto"))
    with pytest.raises(CompilerError):
        asked(torch.ones(7))
    assert isinstance(offered, Compiled)
    with pytest.warns(RuntimeWarning, match="failed, why; .*; training is eager"):
        assert torch.equal(offered(torch.ones(7)), torch.full((7,), 3.0))
    assert offered.failed
    graph = Compiled(lambda x: 3 * x, torch.device("cuda"))
    _warn_of_failure.cache_clear()

    def triton(*arguments: Any) -> None:
        raise torch._dynamo.exc.TorchDynamoException("no C compiler\nmuch")

    monkeypatch.setattr(graph._compiled, "_graph", triton)
    with pytest.warns(RuntimeWarning, match="failed, no C compiler; .*; training is eager"):
        assert torch.equal(graph(torch.ones(7)), torch.full((7,), 3.0))
    assert torch.equal(offered(torch.ones(7)), torch.full((7,), 3.0))
