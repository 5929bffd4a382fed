import dataclasses
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from driftrl.agents.registry import AGENTS
from driftrl.commands import train
from driftrl.commands.arguments import Arguments
from driftrl.commands.help import Option, field_docstrings, format_help, grouped, options

CONFIGS = [entry.config for entry in AGENTS.values()]


@dataclass(frozen=True)
class Base:
    rate: float = 1e-3
    """Step size,
    above 0."""


@dataclass(frozen=True)
class Settings(Base):
    kind: Literal["a", "b", "c"] = "b"
    """Which."""
    bound: float | None = None
    """None: no bound."""
    clip: float | None = 0.2
    widths: tuple[int, ...] = (8, 8)
    pairs: tuple[str, ...] = ()
    is_on: bool = False
    """Whether it is."""
    folder: Path = Path("runs")


def page(name: str, flag: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert train.main([name, flag]) == 0
    return capsys.readouterr().out


def titles(text: str) -> list[str]:
    return re.findall(r"^(\w[\w ]*):$", text, flags=re.MULTILINE)


@pytest.mark.parametrize("name", AGENTS)
def test_every_field_is_in_exactly_one_group(name: str) -> None:
    entry = AGENTS[name]
    fields = {field.name for field in dataclasses.fields(entry.config)}
    assert Counter(each for names in entry.groups.values() for each in names) == Counter(fields)


@pytest.mark.parametrize("config", [*CONFIGS, Arguments])
def test_every_flag_is_described(config: type) -> None:
    assert set(field_docstrings(config)) == {field.name for field in dataclasses.fields(config)}


def run_options(name: str) -> set[str]:
    """Without those of demonstrations where the agent cannot learn from them."""
    found = {field.name for field in dataclasses.fields(Arguments)}
    if hasattr(AGENTS[name].agent, "pretrain"):
        return found
    return {each for each in found if not each.startswith(("demonstration", "pretrain"))}


@pytest.mark.parametrize("name", AGENTS)
def test_help_shows_the_run_and_the_basics(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, groups = page(name, "--help", capsys), AGENTS[name].groups
    first, *others = groups
    assert titles(text) == ["run", first]
    shown = {each.replace("no-", "") for each in re.findall(r"^  --\[?([\w-]+\]?[\w-]*)", text, flags=re.MULTILINE)}
    run = run_options(name)
    assert {each.replace("]", "").replace("-", "_") for each in shown} == run | set(groups[first])
    last = text.split("\n\n")[-1]
    assert "--help-all" in last
    assert all(title in last for title in others)


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("width", [100, 120])
def test_all_flags_in_their_groups_on_two_lines_at_most(
    name: str, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = page(name, "--help-all", capsys)
    assert titles(text) == ["run", *AGENTS[name].groups]
    assert max(map(len, text.splitlines())) <= width
    flags = re.findall(r"^  --.*\n(?:   .*\n)*", text, flags=re.MULTILINE)
    assert len(flags) == sum(map(len, AGENTS[name].groups.values())) + len(run_options(name))
    assert [flag for flag in flags if flag.count("\n") > 2] == []


def test_values_and_defaults() -> None:
    found = options(Settings())
    assert found["rate"] == Option("--rate 0.001", "Step size, above 0.")
    assert found["kind"].name == "--kind b|a|c"
    assert found["bound"] == Option("--bound None|FLOAT", "None: no bound.")
    assert found["clip"] == Option("--clip 0.2|None", "")
    assert found["widths"].name == "--widths 8 8"
    assert found["pairs"].name == "--pairs [STR ...]"
    assert found["is_on"] == Option("--[no-]is-on", "Whether it is. Default: off.")
    assert found["folder"].name == "--folder runs"


def test_renamed_fields_are_still_shown() -> None:
    groups = {"basics": ("rate", "gone"), "empty": ("lost",)}
    assert grouped(groups, ["rate", "new"]) == {"basics": ["rate"], "other": ["new"]}


def test_only_a_terminal_gets_bold_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sections = {"run": [Option("--env ID", "Which.")]}
    assert format_help("head", sections, "foot") == "head\n\nrun:\n  --env ID  Which.\n\nfoot"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033[1m--env ID\033[0m  Which." in format_help("head", sections, "foot")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in format_help("head", sections, "foot")
