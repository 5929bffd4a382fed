import dataclasses
import json
import math
import threading
import zipfile
from pathlib import Path
from typing import IO

import pytest
from stable_baselines3 import PPO

from driftrl import PolicyFlow
from driftrl.agents.registry import AGENTS
from driftrl.agents.storage import files as durable
from driftrl.agents.storage import format as checkpoint
from driftrl.envs import make_vec
from driftrl.runs import folder as runs
from driftrl.runs import log as run_log
from driftrl.runs.callbacks import _best_so_far
from driftrl.runs.lock import alone, is_in_use


def settings(env_id: str = "Pendulum-v1") -> runs.RunSettings:
    return runs.RunSettings("policyflow", env_id, {"g": 9.0}, 2, 7, 100, 50, "cpu", 1, {"n_steps": 16})


def created(root: Path, settings: runs.RunSettings) -> Path:
    with runs.new_run(root, settings) as folder:
        return folder


@pytest.fixture(scope="module")
def agent() -> PolicyFlow:
    return PolicyFlow("MlpPolicy", "Pendulum-v1", n_steps=16, batch_size=16, actor_hidden=(8, 8), device="cpu")


def test_presets_are_valid_configs() -> None:
    for entry in AGENTS.values():
        for name, env_id in ((name, env_id) for name, ids in entry.presets.items() for env_id in (*ids, "none-v0")):
            preset = entry.preset(env_id, name)
            preset.pop("total_timesteps", None)
            assert preset.pop("n_envs") >= 1
            entry.config(**preset)


def test_settings_survive_and_folders_are_unique(tmp_path: Path) -> None:
    first, second = (created(tmp_path, settings("module:ns/Name-v0")) for _ in range(2))
    assert first != second
    assert first.parent == tmp_path / "module_ns_Name-v0" / "policyflow"
    assert runs.read_settings(second) == settings("module:ns/Name-v0")
    data = json.loads((first / "config.json").read_text())
    assert {"python", "driftrl", "torch", "mujoco", "stable-baselines3"} <= data["versions"].keys()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_without_a_saved_agent_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    for root in (tmp_path / "new" / "root", tmp_path):
        with pytest.raises(error), runs.new_run(root, settings()) as folder:
            assert runs.read_settings(folder) == settings()
            raise error
        assert not list(tmp_path.iterdir())

    other = created(tmp_path, settings())
    with pytest.raises(error), runs.new_run(tmp_path, settings()):
        raise error
    assert list(tmp_path.glob("*/*/*")) == [other]

    with pytest.raises(error), runs.new_run(tmp_path, settings()) as folder:
        (folder / "best.zip").touch()
        raise error
    assert folder.is_dir()


def test_resumption_is_noted(tmp_path: Path) -> None:
    folder = created(tmp_path, settings())
    runs.record_resumption(folder, 80, dataclasses.replace(settings(), total_timesteps=200))
    assert runs.read_settings(folder).total_timesteps == 200
    assert [entry["timesteps"] for entry in json.loads((folder / "config.json").read_text())["resumed"]] == [80]


@pytest.mark.parametrize(
    "change", [{"n_envs": "x"}, {"seed": -1}, {"env_kwargs": []}, {"device": 0}, {"config": None}, {"threads": True}]
)
def test_wrong_settings_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    folder = created(tmp_path, settings())
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | change))
    with pytest.raises(ValueError, match=f"unreadable run: .*config.json is damaged .*{next(iter(change))}: got"):
        runs.read_settings(folder)


def test_run_folder_is_told_from_others(tmp_path: Path, agent: PolicyFlow) -> None:
    for content in ("{}", "[]", "no JSON", '{"agent": "policyflow"}'):
        (tmp_path / "config.json").write_text(content)
        assert runs.run_folder_of(tmp_path / "lone.zip") is None


def test_newest_checkpoint_is_found(tmp_path: Path, agent: PolicyFlow) -> None:
    folder = created(tmp_path, settings())
    with pytest.raises(ValueError, match="empty run"):
        runs.find_checkpoint(folder)
    for timesteps in (900, 1000):  # in the order of numbers, not of letters
        runs.save_agent(agent, runs.checkpoint_path(folder, timesteps))
    assert runs.find_checkpoint(folder) == folder / "checkpoints" / "step_1000.zip"
    runs.save_agent(agent, folder / "final.zip")
    assert runs.find_checkpoint(folder) == folder / "final.zip"
    assert runs.find_checkpoint(folder / "checkpoints" / "step_900.zip").name == "step_900.zip"
    assert runs.run_folder_of(folder / "checkpoints" / "step_900.zip") == folder
    assert runs.run_folder_of(tmp_path) is None
    assert isinstance(runs.load_agent(folder, "cpu"), PolicyFlow)
    assert not list(folder.rglob("*.part"))


def test_failed_save_keeps_the_old_file(tmp_path: Path, agent: PolicyFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.save_agent(agent, tmp_path / "final.zip")
    before = (tmp_path / "final.zip").read_bytes()

    def fail(file: IO[bytes], documents: object) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        runs.save_agent(agent, tmp_path / "final.zip")
    assert (tmp_path / "final.zip").read_bytes() == before

    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        durable.write_json(tmp_path / "folder", {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        durable.write_json(tmp_path / "nan.json", float("nan"))
    assert {path.name for path in tmp_path.iterdir()} == {"final.zip", "folder"}


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, agent: PolicyFlow) -> None:
    agent.save(tmp_path / "whole.zip")
    (tmp_path / "damaged.zip").write_bytes((tmp_path / "whole.zip").read_bytes()[:1000])
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme", "hello")
    PPO("MlpPolicy", "Pendulum-v1", n_steps=16, batch_size=16, device="cpu").save(tmp_path / "ppo.zip")
    with zipfile.ZipFile(tmp_path / "whole.zip") as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    damage: dict[str, dict[str, bytes | None]] = {
        "list.zip": {"agent.json": b"[]"},
        "weightless.zip": {"agent.safetensors": None},
        "garbage.zip": {"agent.safetensors": b"hello"},
        "config.zip": {"agent.json": members["agent.json"].replace(b"PolicyFlowConfig", b"OtherConfig")},
    }
    for name, changes in damage.items():
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member, content in {**members, **changes}.items():
                if content is not None:
                    archive.writestr(member, content)
    flipped = bytearray((tmp_path / "whole.zip").read_bytes())
    flipped[len(flipped) // 2] ^= 255
    (tmp_path / "flipped.zip").write_bytes(flipped)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    messages = {
        "missing": "no such run: got .*missing",
        "damaged.zip": "no checkpoint: .*damaged.zip: got no zip, or half of one",
        "other.zip": "no checkpoint: .*other.zip: got a member 'readme'",
        "ppo.zip": "Stable-Baselines3's format",
        "list.zip": "no checkpoint: .*list.zip: got another program's agent.json",
        "weightless.zip": "no checkpoint: .*weightless.zip.*agent.safetensors",
        "garbage.zip": "no checkpoint: .*garbage.zip",
        "config.zip": "foreign checkpoint: got .*config.zip with a config 'OtherConfig'",
        "flipped.zip": "no checkpoint: .*flipped.zip.*Bad CRC-32",
        "empty": "no run: got .*empty",
        "broken": "unreadable run",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            runs.load_agent(tmp_path / name, "cpu")


def test_progress_file_is_continued(tmp_path: Path) -> None:
    for value in (1, 2):
        logger = run_log.open_logger(tmp_path)
        logger.record("a", value)
        if value == 2:
            logger.record("b", 5)
        logger.dump(value)
        logger.close()
    assert (tmp_path / "progress.csv").read_text().splitlines() == ["a,b", "1,", "2,5"]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"mean_return": null}', "[" * 200_000])
def test_a_damaged_best_return_is_named_and_none(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "best.json"
    assert _best_so_far(path) == -math.inf
    assert capsys.readouterr().err == ""
    path.write_text(content)
    assert _best_so_far(path) == -math.inf
    assert f"warning: {path} is damaged" in capsys.readouterr().err
    path.write_text('{"mean_return": 3}')
    assert _best_so_far(path) == 3


def test_a_data_set_that_was_broken_off_is_no_hindrance(tmp_path: Path, agent: PolicyFlow) -> None:
    folder = created(tmp_path, settings())
    runs.save_agent(agent, folder / "final.zip")
    (folder / ".data-v0.part" / "data").mkdir(parents=True)
    (folder / "final.zip.part").touch()
    assert runs.load_newest(folder, "cpu", make_vec("Pendulum-v1", 1, 0)).file.name == "final.zip"
    assert not (folder / "final.zip.part").exists() and (folder / ".data-v0.part").exists()


def test_who_looks_whether_a_run_trains_does_not_keep_others_from_it(tmp_path: Path) -> None:
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            is_in_use(tmp_path)

    looks = threading.Thread(target=look)
    looks.start()
    try:
        for _ in range(100):
            with alone(tmp_path):
                pass
    finally:
        over.set()
        looks.join()


def test_an_error_while_a_run_trains_is_not_taken_for_another_process(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError, match="the terminal"), alone(tmp_path):
        raise BlockingIOError("the terminal is full")
    with alone(tmp_path), pytest.raises(ValueError, match="run in use: another process trains"), alone(tmp_path):
        pass
