"""Sweeps on a Ray cluster that the test starts: drivers and workers are killed, the results are those of a whole."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
from killing import EXACT, EXACT_SETTINGS, begin, finish, kill, processes_of, run_folders, until, write_spec
from run_differences import differences

pytestmark = pytest.mark.slow
pytest.importorskip("ray")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A cluster of this machine, as `ray start --head` makes it, with room for three runs."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:  # short: sockets
        log = (tmp_path / "ray.log").open("wb")
        call = [str(Path(sys.executable).with_name("ray")), "start", "--head", f"--port={port}", "--num-cpus=3"]
        call += ["--include-dashboard=false", "--disable-usage-stats", "--block", "--temp-dir", folder]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}  # as if it were installed
        environment["RAY_worker_niceness"] = "0"  # its 15 starves workers beside other programs
        head = subprocess.Popen(call, stdout=log, stderr=log, start_new_session=True, env=environment)
        try:
            until(lambda: b"Ray runtime started" in (tmp_path / "ray.log").read_bytes(), 120)
            yield f"127.0.0.1:{port}"
        finally:
            head.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                head.wait(15)
            for number in processes_of(folder):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            head.wait()
            log.close()


def worker_of(run: int) -> int:
    """The process of Ray that started a run."""
    return int(re.findall(r"\d+", Path(f"/proc/{run}/stat").read_text().rpartition(")")[2])[0])


def run_in_training(folder: Path, done: int) -> int:
    """Wait until one of `in_training` is there."""
    found: list[int] = []

    def look() -> bool:
        found[:] = in_training(folder, done)
        return bool(found)

    until(look, 200)
    return found[0]


def in_training(folder: Path, done: int) -> list[int]:
    """The processes of runs that have a checkpoint and are not complete, once so many runs are complete."""
    runs = run_folders(folder)
    if sum((run / "eval.json").exists() for run in runs) < done:
        return []
    open_runs = [run for run in runs if list(run.glob("checkpoints/*.zip")) and not (run / "final.zip").exists()]
    found = [each for run in open_runs for each in processes_of(f"--resume\0{run}\0")]
    return [each for each in found if worker_of(each) != 1]


def test_twelve_runs_survive_the_death_of_drivers_and_workers(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("whole", "killed"):
        write_spec(
            Path(f"{name}.yaml"), EXACT, seeds=[0, 1, 2], grid={"gamma": [0.9, 0.99], "clip_range": [0.1, 0.2]},
            settings=EXACT_SETTINGS, executor="ray", ray={"address": address},
        )  # fmt: skip
    assert "3 at a time" in finish(begin(Path("whole.yaml").resolve()), Path("whole.yaml"))
    spec, folder = Path("killed.yaml").resolve(), Path("killed").resolve()
    for done in (1, 4, 7):  # the driver is killed three times
        process = begin(spec)
        run_in_training(folder, done)
        kill(process)
    process = begin(spec)
    for done, what in ((8, "a worker"), (9, "the run"), (10, "another worker")):
        run = run_in_training(folder, done)
        os.kill(run if what == "the run" else worker_of(run), signal.SIGKILL)
    finish(process, spec)
    pairs = list(zip(run_folders(Path("whole")), run_folders(folder), strict=True))
    assert len(pairs) == 12
    assert all(one.relative_to("whole") == other.relative_to(folder) for one, other in pairs)
    assert [differences(one, other) for one, other in pairs] == [[]] * 12
    resumed = sum((run / "output.log").read_text().count("resumed from") for run in run_folders(folder))
    assert resumed >= 4


def test_a_cluster_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    address = f"127.0.0.1:{free_port()}"
    write_spec(Path("some.yaml"), EXACT, seeds=[0], executor="ray", ray={"address": address})
    process = begin(Path("some.yaml").resolve())
    assert process.wait(60) == 2
    lines = Path("some.log").read_text().splitlines()
    assert lines[-1].startswith(f"error: ray.address: found no cluster at {address}")


def test_a_signal_stops_the_tasks_with_checkpoints(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow").touch()
    options = {"address": address, "cpus": 0.5}
    write_spec(Path("some.yaml"), seeds=[0, 1], executor="ray", ray=options, jobs=1, settings={"total_timesteps": 640})
    process = begin(Path("some.yaml").resolve())
    until(lambda: list(Path("some").rglob("step_*.zip")))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert Path("some.log").read_text().count("(0 of 2 runs complete)") == 2
    assert not processes_of(f"--resume\0{Path('some').resolve()}")
    (tmp_path / "slow").unlink()
    finish(begin(Path("some.yaml").resolve()), Path("some.yaml"))
