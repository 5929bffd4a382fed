"""Stable-Baselines3's own tests with PolicyFlow in place of its PPO and LipschitzMBPO in place of its SAC.

    OMP_NUM_THREADS=1 python benchmarks/sb3_tests.py

The tests come from the source distribution of the installed version, by pip, or from --tests. Those that name another
algorithm or none are left out. `CHANGES` are made to the text of the others before they run; `exceptions` says which
fail, and why. A failure that is no exception, and an exception without a failure, end the script with an error. Needs
pandas; without ale-py one module cannot be imported, which has no test of ours.
"""

from __future__ import annotations

import fnmatch
import inspect
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import stable_baselines3
import tyro
from sb3_test_exceptions import CHANGES, EXCEPTIONS
from stable_baselines3.common.base_class import BaseAlgorithm

from driftrl import LipschitzMBPO, PolicyFlow

STAND_INS: dict[str, type[BaseAlgorithm]] = {"PPO": PolicyFlow, "SAC": LipschitzMBPO}
"""Algorithm of Stable-Baselines3 -> the agent that takes its place."""


class Swap:
    """A plugin of pytest that keeps the tests of one algorithm, which is ours, and notes how they end.

    Args:
        name: the algorithm, a key of `STAND_INS`.
    """

    def __init__(self, name: str) -> None:
        self.name, self.agent = name, STAND_INS[name]
        self.outcomes: dict[str, str] = {}
        self.messages: dict[str, str] = {}
        setattr(stable_baselines3, name, self.agent)

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        """Leave out the tests of other algorithms."""
        items[:] = [item for item in items if self._concerns(item)]

    def _concerns(self, item: pytest.Function) -> bool:
        given = item.callspec.params.values() if hasattr(item, "callspec") else ()
        kinds = [each for each in given if inspect.isclass(each) and issubclass(each, BaseAlgorithm)]
        named = [each for each in given if isinstance(each, str) and each.upper() in dir(stable_baselines3)]
        if kinds or named:
            return self.agent in kinds or self.name.lower() in named
        return f"{self.name}(" in inspect.getsource(item.function)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note failed, passed or skipped, whichever comes first in this order."""
        case = report.nodeid.rpartition("/")[2]
        if report.failed or (report.skipped and case not in self.outcomes) or report.when == "call":
            self.outcomes[case] = report.outcome
        if report.failed:
            self.messages[case] = str(getattr(report.longrepr, "reprcrash", report.longrepr)).splitlines()[0]


def prepare(source: Path | None, folder: Path) -> Path:
    """The tests with `CHANGES` made to them, in a folder of their own."""
    if source is None:
        package = f"stable_baselines3=={version('stable_baselines3')}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", package]
        subprocess.run([*command, "--dest", str(folder)], check=True)
        (archive,) = folder.glob("stable_baselines3-*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
        source = archive.with_name(archive.name.removesuffix(".tar.gz")) / "tests"
    tests = folder / "changed"
    shutil.copytree(source, tests)
    for before, after, _ in CHANGES:
        for path in tests.glob("test_*.py"):
            path.write_text(path.read_text().replace(before, after))
    return tests


def run(name: str, tests: Path, select: str) -> dict[str, Any]:
    """How the tests of one algorithm end: passed, skipped, excepted with their reason, and what should not be."""
    swap = Swap(name)
    options = ["-c", os.devnull, "--rootdir", str(tests), "-p", "no:cacheprovider", "-q", "--tb=no", "-W", "ignore"]
    pytest.main([*options, "--continue-on-collection-errors", "-k", select, str(tests)], plugins=[swap])
    found: dict[str, Any] = {"passed": [], "skipped": [], "excepted": {}, "failed": {}, "without failure": []}
    used = set()
    for case, outcome in sorted(swap.outcomes.items()):
        fits = [each for each in EXCEPTIONS[name] if fnmatch.fnmatchcase(case, each[0].replace("[", "[[]"))]
        if outcome != "failed":
            found[outcome].append(case)
        elif fits:
            used.add(fits[0])
            found["excepted"][case] = fits[0][1]
        else:
            found["failed"][case] = swap.messages[case]
    if not select:
        found["without failure"] = [pattern for pattern, why in EXCEPTIONS[name] if (pattern, why) not in used]
    return found


def main(tests: Path | None = None, select: str = "", agent: str = "", output: Path | None = None) -> None:
    """Run the tests of both algorithms, each in a process of its own, and print how they end.

    Args:
        tests: folder of the tests; None: download them.
        select: which, as for pytest's -k.
        agent: PPO or SAC: only its tests, in this process.
        output: also write the result there, as JSON.
    """
    if agent:
        assert tests is not None and output is not None
        output.write_text(json.dumps(run(agent, tests, select)))
        return
    report: dict[str, Any] = {"stable_baselines3": version("stable_baselines3")}
    with tempfile.TemporaryDirectory() as name:
        folder = prepare(tests, Path(name))
        for each in STAND_INS:
            result = Path(name) / f"{each}.json"
            options = ["--tests", str(folder), "--agent", each, "--output", str(result), f"--select={select}"]
            subprocess.run([sys.executable, __file__, *options], check=True)
            report[each] = json.loads(result.read_text())
    wrong = 0
    for each, stand_in in STAND_INS.items():
        found = report[each]
        print(f"\n{stand_in.__name__} as {each}: " + ", ".join(f"{len(cases)} {kind}" for kind, cases in found.items()))
        for reason in dict.fromkeys(found["excepted"].values()):
            print(f"  {sum(why == reason for why in found['excepted'].values()):3d} excepted: {reason}")
        for kind in ("failed", "without failure"):
            wrong += len(found[kind])
            for case in found[kind]:
                print(f"  {kind}: {case} " + (found[kind][case] if kind == "failed" else ""))
    if output:
        output.write_text(json.dumps(report, indent=1) + "\n")
    if wrong:
        raise SystemExit(f"{wrong} tests end otherwise than expected")


if __name__ == "__main__":
    tyro.cli(main)
