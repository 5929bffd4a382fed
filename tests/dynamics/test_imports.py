"""The package's names, and what an import loads: heavy modules only where they are used."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import driftrl
from driftrl import dynamics


def loaded_by(code: str) -> set[str]:
    """Modules of driftrl.dynamics that a fresh interpreter has loaded after running the code."""
    tell = "import sys; print(*(name for name in sys.modules if name.startswith('driftrl.dynamics.')))"
    folder = Path(driftrl.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", f"{code}\n{tell}"], capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr
    return {name.removeprefix("driftrl.dynamics.") for name in run.stdout.split()}


def test_fields_and_fixed_steps_load_nothing_heavy() -> None:
    """The default path of PolicyFlow."""
    code = "from driftrl.dynamics.ode import odeint; from driftrl.dynamics.fields import MLPField"
    assert loaded_by(code) == {"activations", "fields", "ode"}


def test_gaussian_model_and_adversary_load_neither_flows_nor_sdes() -> None:
    """The default path of LipschitzMBPO."""
    code = (
        "from driftrl.dynamics.transition import TRANSITIONS, GaussianTransition\n"
        "from driftrl.dynamics.lipschitz import adversarial_states, spectral_norms\n"
        "assert TRANSITIONS['gaussian'] is GaussianTransition"
    )
    light = {
        "activations",
        "ensemble",
        "fields",
        "fitting",
        "holdout",
        "jacobian_prior",
        "lipschitz",
        "precision",
        "special_fields",
        "transition",
        "transition_base",
        "transition_settings",
    }
    assert loaded_by(code) == light
    assert "sde" in loaded_by(code + "\nTRANSITIONS['langevin']")


def test_package_loads_a_name_on_first_use_only() -> None:
    assert loaded_by("import driftrl.dynamics") == set()
    assert loaded_by("from driftrl.dynamics import MLPField") == {"activations", "fields"}
    assert "sde" in loaded_by("from driftrl.dynamics import sdeint")


def test_every_exported_name_resolves_and_is_listed() -> None:
    assert set(dynamics.__all__) <= set(dir(dynamics))
    for name in dynamics.__all__:
        assert getattr(dynamics, name) is not None
    everything: dict[str, object] = {}
    exec("from driftrl.dynamics import *", everything)
    assert set(dynamics.__all__) <= set(everything)


def test_no_exported_name_is_a_module() -> None:
    """Such a name would mean the module as soon as that is loaded."""
    folder = Path(dynamics.__file__).parent
    assert not {path.stem for path in folder.glob("*.py")} & set(dynamics.__all__)


def test_every_module_can_be_imported_first() -> None:
    for path in Path(dynamics.__file__).parent.glob("*.py"):
        if path.stem != "__init__":
            importlib.import_module(f"driftrl.dynamics.{path.stem}")


def test_unknown_name_is_an_attribute_error() -> None:
    name = "odeinf"
    with pytest.raises(AttributeError, match=r"module 'driftrl\.dynamics' has no attribute 'odeinf'"):
        getattr(dynamics, name)


def test_page_says_where_each_name_is() -> None:
    page = (Path(__file__).parents[2] / "docs" / "dynamics.md").read_text()
    table = page[page.index("| module | names |") : page.index("## Choose a field")]
    exported = set()
    for module, names in re.findall(r"^\| `(\w+)` \| (.*) \|$", table, flags=re.MULTILINE):
        loaded = importlib.import_module(f"driftrl.dynamics.{module}")
        for bold, name in re.findall(r"(\*\*)?`(\w+)`", names):
            assert hasattr(loaded, name), f"{module} has no {name}"
            exported |= {name} if bold else set()
    assert exported == set(dynamics.__all__)
