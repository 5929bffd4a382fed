"""The GPU check on a machine without a GPU: its table, what it does with parts that fail, and all of it once."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

sys.path.append(str(Path(__file__).parent))  # scripts import each other by their bare names

from gpu import check, contenders, needs, part, slim
from gpu.check import Row, limits, supervise, table

GPU = Path(__file__).parent / "gpu"


def run(tmp_path: Path, code: str, limit: float = 20.0) -> Row:
    """What becomes of a part that is this Python code; `result` is its JSON file."""
    json_file = tmp_path / "part.json"
    begin = f"import json, os, pathlib, sys, time\nresult = pathlib.Path({str(json_file)!r})\n"
    return supervise("part", [sys.executable, "-c", begin + code], json_file, tmp_path / "log.txt", limit)


def test_contenders_take_turns_and_those_that_fail_are_said(tmp_path: Path) -> None:
    options = part.Options(device="cpu", small=True, limit=60.0, scratch=tmp_path)
    turns: dict[str, Any] = {"a": lambda: lambda: time.sleep(1e-3), "b": lambda: lambda: time.sleep(3e-3)}
    turns["c"] = lambda: 1 / 0
    named, report = {name: contenders.Contender("cpu", each) for name, each in turns.items()}, tmp_path / "part.json"
    rows = contenders.measure(part.Report(report, options), named, updates=2, seconds=0.1, rounds=3, reference="b")
    assert rows["a"]["turns"] == 3
    assert 1 < rows["a"]["speed_over_b"][1] < 6
    assert contenders.failures(rows) == ["c: ZeroDivisionError: division by zero"]


def test_a_part_that_ends_well_shows_its_headline(tmp_path: Path) -> None:
    write = "result.write_text(json.dumps({'state': %r, 'headline': '3 x'}))"
    assert run(tmp_path, write % "ok")[:2] == ("part", "ok")
    assert run(tmp_path, write % "skipped").note == "3 x"
    assert run(tmp_path, write % "skipped").good


def test_a_part_that_raises_shows_code_and_last_line(tmp_path: Path) -> None:
    row = run(tmp_path, "print('before')\nraise ValueError('no such device')")
    assert (row.state, row.note) == ("FAILED", "exit code 1: ValueError: no such device")
    assert "before" in (tmp_path / "log.txt").read_text()
    assert run(tmp_path, "sys.exit(3)").note == "exit code 3: it printed nothing"


def test_a_part_that_leaves_no_result_has_failed(tmp_path: Path) -> None:
    assert run(tmp_path, "pass")[1] == "FAILED"
    assert run(tmp_path, 'result.write_text(\'{"state": "running"}\')')[1] == "FAILED"
    assert run(tmp_path, "result.write_text('[')")[1] == "FAILED"


def test_a_part_that_hangs_is_ended_with_its_children_and_keeps_what_it_had(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = (
        "import subprocess\n"
        "result.write_text(json.dumps({'state': 'running', 'headline': '2 of 3'}))\n"
        "process = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(process.pid))\n"
        "time.sleep(60)"
    )
    row = run(tmp_path, code, limit=3.0)
    assert (row.state, row.note) == ("timed out", "after 3 s; had 2 of 3")
    assert row.seconds < 20
    deadline = time.monotonic() + 10
    while _runs(int(child.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(int(child.read_text()))


def _runs(pid: int) -> bool:
    """Whether a process runs: one that has ended may wait for somebody to ask for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_part_that_is_killed_says_by_what(tmp_path: Path) -> None:
    row = run(tmp_path, "print('half way', flush=True)\nos.kill(os.getpid(), 9)")
    assert (row.state, row.note) == ("FAILED", "killed by SIGKILL: half way")


def test_the_table_has_a_row_for_each_part_and_no_stray_cells() -> None:
    rows = [Row("tests", "ok", 12.4, "16 passed"), Row("train", "FAILED", 3.0, "exit code 1: a | b\nc")]
    assert table(rows).splitlines()[2:] == [
        "| tests | ok | 12 | 16 passed |",
        "| train | FAILED | 3 | exit code 1: a / b c |",
    ]


def test_time_that_a_part_leaves_is_shared_among_the_others() -> None:
    names = list(part.PARTS)
    assert set(check.SHARES) == set(names)
    assert sum(check.SHARES.values()) == 480
    assert limits(names, 480.0) == check.SHARES[names[0]]
    assert limits(names[1:], 480.0) > check.SHARES[names[1]]
    assert limits(names[-1:], 200.0) == 200.0
    assert limits(names[-1:], -5.0) == 1.0


def wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    """A wheel that holds nothing but its METADATA."""
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")


def test_what_a_folder_of_wheels_lacks_is_found(tmp_path: Path) -> None:
    wheel(tmp_path, "one", "1.0", "two>=2", "numpy", "old; python_version < '3.12'", "three; extra == 'more'")
    wheel(tmp_path, "two", "1.5")
    wheels = needs.read(tmp_path)
    root = [Requirement("one[more]")]
    faults = needs.lacking(wheels, root, {"numpy"})
    assert sum("three" in each and "neither in the folder nor on the machine" in each for each in faults) == 1
    assert {each for each in faults if "three" not in each} == {
        f"{by} needs two>=2, and the folder has 1.5" for by in ("one", "one[more]")
    }
    wheel(tmp_path, "two", "2.1")
    (tmp_path / "two-1.5-py3-none-any.whl").unlink()
    wheel(tmp_path, "three", "1.0")
    assert not needs.lacking(needs.read(tmp_path), root, {"numpy"})


def test_wheels_are_installed_where_the_machine_has_none_that_does(tmp_path: Path) -> None:
    wheel(tmp_path, "one", "1.0", "two>=2")
    wheel(tmp_path, "two", "2.1")
    wheel(tmp_path, "mujoco", "3.8.1")
    wheels = needs.read(tmp_path)
    for have, expected in (
        ({}, {"one", "two", "mujoco"}),
        ({"one": "0.9", "two": "1.0", "mujoco": "3.8.1"}, {"two"}),
        ({"one": "0.9", "two": "3.0", "mujoco": "4.0"}, {"mujoco"}),
    ):
        assert {each.name for each in needs.missing(wheels, have)} == expected


def test_the_archive_of_warp_leaves_out_what_a_gpu_machine_does_not_use(tmp_path: Path) -> None:
    wheel(tmp_path, "warp", "1.0")
    with zipfile.ZipFile(tmp_path / "warp-1.0-py3-none-any.whl", "a") as archive:
        for name in ("warp/bin/warp.so", "warp/bin/warp-clang.so", "warp/tests/test_a.py", "warp/__init__.py"):
            archive.writestr(name, name)
    packed = slim.pack(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["warp.tar.xz"]
    with tarfile.open(packed) as tar:
        assert set(tar.getnames()) == {"warp-1.0.dist-info/METADATA", "warp/bin/warp.so", "warp/__init__.py"}
        content = tar.extractfile("warp/bin/warp.so")
        assert content is not None and content.read() == b"warp/bin/warp.so"


def test_the_archive_of_warp_keeps_what_one_kind_of_gpu_runs() -> None:
    def entry(kind: int, target: int, program: bytes) -> bytes:
        header = struct.pack("<HHIQIIHHI", kind, 257, 64, len(program), 0, 0, 0, 8, target)
        return header.ljust(64, b"h") + program

    def table_of(*entries: bytes) -> bytes:
        return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, sum(map(len, entries))) + b"".join(entries)

    first = (entry(2, 80, b"eighty  "), entry(2, 90, b"ninety  "), entry(1, 75, b"portable"))
    second = (entry(2, 90, b"ninety  "), entry(2, 120, b"newer   "))
    chance = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, 1 << 40)  # the number, but no table
    library = b"code" + chance + table_of(*first) + b"padding" + table_of(*second) + b"end"
    slimmed = slim.without_other_architectures(library, 90)
    expected = library.replace(b"eighty  ", bytes(8)).replace(b"newer   ", bytes(8))
    assert slimmed == expected != library
    assert slim.without_other_architectures(b"no table", 90) == b"no table"


def test_the_packages_that_driftrl_depends_on_are_those_of_pyproject() -> None:
    names = {each.name for each in needs.roots(part.ROOT / "pyproject.toml")}
    assert {"torch", "gymnasium", "mujoco", "stable-baselines3", "tyro"} <= names
    fetched = re.findall(r"^([a-z0-9-]+)(?:==\S+)? +\S", (GPU / "wheels.sh").read_text().split("wheels='")[1], re.M)
    assert names <= {*fetched, *needs.MACHINE, *needs.NOT_IMPORTED}


def test_bad_options_are_refused(tmp_path: Path) -> None:
    for options in (["--unknown"], ["--parts", "tests,nothing", "--cpu"], ["--budget", "abc"]):
        done = _check(tmp_path, *options)
        assert done.returncode == 2
        assert "usage" in done.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_the_scripts_are_clean() -> None:
    subprocess.run(["shellcheck", *GPU.glob("*.sh")], check=True)


def _check(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable}
    command = ["bash", str(GPU / "check.sh"), "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_the_whole_check_runs_on_the_cpu(tmp_path: Path) -> None:
    done = _check(tmp_path / "out", "--cpu", "--small", "--budget", "600")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out/check.json").read_text())
    assert {name: row["state"] for name, row in result["parts"].items()} == dict.fromkeys(part.PARTS, "ok") | {
        "warp": "skipped"
    }
    lines = done.stdout[done.stdout.index("| part |") :].splitlines()
    assert [line.split(" | ")[0] for line in lines[2 : 2 + len(part.PARTS)]] == [f"| {name}" for name in part.PARTS]
    rows = result["parts"]["policyflow-update"]["figures"]["batch_32"]["rows"]
    assert rows["cuda graphs"] == {"left_out": "no CUDA device"}
    assert all(len(rows[name]["ms_per_update"]) == 3 for name in ("cpu eager", "cpu SB3 PPO"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "check.json", "log.txt", *(f"{name}.json" for name in part.PARTS)
    }  # fmt: skip


@pytest.mark.slow
def test_the_check_refuses_a_machine_without_cuda(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = _check(tmp_path)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
