"""The tests marked gpu."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

from gpu.part import NO_CUDA, ROOT, Report

WARNINGS = ("ignore:TensorFloat32 tensor cores:UserWarning",)
"""Filters beside those of pyproject.toml: torch.compile on CUDA warns that float32 products are not rounded to TF32.

The CPU tests of the same files need none under torch 2.11 and Python 3.12.
"""


def tests(report: Report) -> None:
    """Run the tests marked gpu, in the files that have some: others may need packages that the machine lacks."""
    files = [file for file in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in file.read_text()]
    names = [str(file.relative_to(ROOT)) for file in files if file.name != "test_warp.py"]  # that is the part warp
    if report.options.small and not report.cuda:
        names = names[-2:]
    headline = passing(report, names)
    report.keep(headline if report.cuda else f"{headline}: {NO_CUDA}")


def passing(report: Report, names: Sequence[str], seconds: float | None = None) -> str:
    """Run the tests marked gpu of some files; says how many passed, and exits if one did not.

    Args:
        report: gets the figures.
        names: files, from the checkout's root.
        seconds: after which they have failed; None: whenever the part is ended.
    """
    xml = report.options.scratch / "junit.xml"
    # No plugins: those that a machine happens to have would be configured, and warn, in their own ways.
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [
        sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors",
        f"--basetemp={report.options.scratch / 'pytest'}", f"--junitxml={xml}",
        *[part for each in WARNINGS for part in ("-W", each)], *names,
    ]  # fmt: skip
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=seconds).returncode
    suite = next(ElementTree.parse(xml).getroot().iter("testsuite"))
    failures, errors, skipped = (int(suite.get(key, "0")) for key in ("failures", "errors", "skipped"))
    bad = {
        f"{case.get('classname')}::{case.get('name')}": (trouble.get("message") or "").splitlines()[:1]
        for case in suite.iter("testcase")
        for trouble in case
        if trouble.tag in ("failure", "error")
    }
    passed = sum(len(case) == 0 for case in suite.iter("testcase"))
    headline = f"{passed} passed, {failures} failed, {errors} errors, {skipped} skipped"
    report.keep(passed=passed, failed=failures, errors=errors, skipped=skipped, files=list(names), trouble=bad)
    if code or (report.cuda and skipped):
        report.keep(headline)
        sys.exit(f"{headline}; pytest's exit code {code}: {', '.join(bad) or 'tests were skipped'}")
    return headline
