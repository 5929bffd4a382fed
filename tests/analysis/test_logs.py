"""Logs are read as Stable-Baselines3's own tools write them; what is damaged is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor

from driftrl.analysis.logs import Curve, read_evaluations, read_monitors, read_progress, read_zoo_file, thinned

HEAD = "rollout/ep_rew_mean,time/time_elapsed,time/total_timesteps\n"


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Monitor[Any, Any]]:
    """The folder of a run of Stable-Baselines3, and its environment."""
    folder = tmp_path_factory.mktemp("ppo")
    env: Monitor[Any, Any] = Monitor(gym.make("InvertedPendulum-v5"), str(folder / "monitor.csv"))
    agent = PPO("MlpPolicy", env, n_steps=128, batch_size=64, n_epochs=1, seed=0, device="cpu")
    agent.set_logger(configure(str(folder), ["csv"]))
    evaluation: Monitor[Any, Any] = Monitor(gym.make("InvertedPendulum-v5"))
    agent.learn(
        512, callback=EvalCallback(evaluation, n_eval_episodes=3, eval_freq=128, log_path=str(folder), verbose=0)
    )
    agent.logger.close()
    env.close()
    return folder, env


@pytest.fixture(scope="module")
def sb3_run(monitored: tuple[Path, Monitor[Any, Any]]) -> Path:
    return monitored[0]


def test_progress_of_sb3(sb3_run: Path) -> None:
    log = read_progress(sb3_run / "progress.csv")
    assert set(log.curves) == {"training", "evaluation"} and log.notes == () and log.steps == 512
    assert log.curves["training"].steps.tolist() == log.curves["evaluation"].steps.tolist() == [128, 256, 384, 512]


def test_evaluations_of_sb3(sb3_run: Path) -> None:
    log = read_evaluations(sb3_run / "evaluations.npz")
    logged = read_progress(sb3_run / "progress.csv").curves["evaluation"]
    assert log.curves["evaluation"].returns == pytest.approx(logged.returns, rel=1e-5)


def test_monitor_files_have_the_steps_of_monitor_and_the_means_of_sb3s_logger(
    monitored: tuple[Path, Monitor[Any, Any]],
) -> None:
    folder, env = monitored
    log = read_monitors([folder / "monitor.csv"])
    curve = log.curves["training"]
    assert log.env_id == "InvertedPendulum-v5"
    assert curve.steps.tolist() == np.cumsum(env.get_episode_lengths()).tolist()
    logged = read_progress(folder / "progress.csv").curves["training"].returns[0]
    first = np.searchsorted(curve.steps, 128, side="right") - 1
    assert curve.returns[first] == pytest.approx(logged, rel=1e-5)


def test_monitor_files_of_parallel_environments_are_ordered_by_time(tmp_path: Path) -> None:
    for i, rows in enumerate(("1.0,10,1.0\n3.0,30,3.0\n", "2.0,20,0.5\n")):
        header = json.dumps({"t_start": 100.0 + i, "env_id": "Hopper-v5"})
        (tmp_path / f"{i}.monitor.csv").write_text(f"#{header}\nr,l,t\n{rows}")
    curve = read_monitors(sorted(tmp_path.iterdir())).curves["training"]
    assert curve.steps.tolist() == [10, 30, 60]
    assert curve.returns.tolist() == [1.0, 1.5, 2.0]
    assert curve.seconds.tolist() == [1.0, 1.5, 3.0]


def test_rows_that_cannot_be_used_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "progress.csv"
    path.write_text(f"{HEAD},0,10\nnan,1,20\n5,2,30\nwhat,3,40\n6,4,50\n7,5,6")  # the last is being written
    log = read_progress(path)
    assert log.curves["training"].returns.tolist() == [5, 6]
    assert log.notes == (f"{path}: 1 unreadable row left out", f"{path}: 1 return not finite, left out")


def test_seconds_add_up_where_a_run_was_resumed(tmp_path: Path) -> None:
    path = tmp_path / "progress.csv"
    path.write_text(f"{HEAD}1,5,10\n2,10,20\n3,4,30\n")
    assert read_progress(path).curves["training"].seconds.tolist() == [5, 10, 14]


def test_seconds_add_up_where_the_first_row_after_a_resumption_comes_late(tmp_path: Path) -> None:
    path = tmp_path / "progress.csv"
    path.write_text(f"{HEAD}1,5,10\n2,8,20\n3,12,30\n4,13,40\n")
    curves = read_progress(path, resumed=[0, 10, 30]).curves
    assert curves["training"].seconds.tolist() == [5, 13, 17, 30]


def test_what_was_logged_after_the_step_where_a_run_goes_on_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "progress.csv"
    path.write_text(f"{HEAD}1,1,10\n2,2,20\n3,3,30\n7,4,20\n8,5,30\n")
    assert read_progress(path).curves["training"].returns.tolist() == [1, 7, 8]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\x01\n\x00\n", b"a,b\n1,2\n"])
def test_a_file_that_is_no_progress_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "progress.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"progress\.csv is damaged"):
        read_progress(tmp_path / "progress.csv")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.npz"
    np.savez(path, timesteps=[1], results=np.array([[print]], dtype=object))
    with pytest.raises(ValueError, match=r"evaluations\.npz is damaged") as caught:
        read_evaluations(path)
    assert "allow_pickle" not in str(caught.value)  # NumPy's advice is to load it unsafely
    path.write_bytes(b"PK half a file")
    with pytest.raises(ValueError, match=r"evaluations\.npz is damaged"):
        read_evaluations(path)


@pytest.mark.parametrize(("place", "value"), [(4, 148), (6, 1), (6, 32), (8, 99)])
def test_a_damaged_header_of_a_zip_is_named(tmp_path: Path, place: int, value: int) -> None:
    """Version needed, encrypted, patched, method of compression: zipfile has an error of its own for each."""
    path = tmp_path / "evaluations.npz"
    np.savez(path, timesteps=[1], results=[[2.0]])
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + place + 2] = value  # of the directory, two bytes longer than the header
    content[place] = value
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"evaluations\.npz is damaged"):
        read_evaluations(path)


def test_steps_that_are_not_finite_are_damage(tmp_path: Path) -> None:
    np.savez(tmp_path / "evaluations.npz", timesteps=[np.nan], results=[[2.0]])
    with pytest.raises(ValueError, match="its steps are not finite"):
        read_evaluations(tmp_path / "evaluations.npz")


def test_a_monitor_file_without_its_first_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "monitor.csv").write_text("r,l,t\n1,2,3\n")
    with pytest.raises(ValueError, match=r"monitor\.csv is damaged"):
        read_monitors([tmp_path / "monitor.csv"])


def test_settings_of_rl_zoo3(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text(
        "!!python/object/apply:collections.OrderedDict\n- - - batch_size\n    - 64\n  - - env_wrapper\n"
        "    - - a.Wrapper\n  - - policy\n    - 'MlpPolicy'\n  - - seed\n    - 7\n"
    )
    assert read_zoo_file(path) == {"batch_size": "64", "policy": "MlpPolicy", "seed": "7"}


def test_a_thinned_curve_keeps_its_ends() -> None:
    x = np.arange(1001.0)
    few = thinned(Curve(x, x, x), 10)
    assert len(few.steps) == 10 and (few.steps[0], few.steps[-1]) == (0, 1000)


def test_every_episode_of_a_monitor_file_is_in_the_curve(tmp_path: Path) -> None:
    """A return that only one episode of thousands reaches is not thinned away before anybody looks for it."""
    rows = "".join(f"{200.0 if i == 2001 else 0.0},1,{i}\n" for i in range(4001))
    (tmp_path / "monitor.csv").write_text(f'#{{"t_start": 0.0}}\nr,l,t\n{rows}')
    curve = read_monitors([tmp_path / "monitor.csv"]).curves["training"]
    assert len(curve.steps) == 4001
    assert curve.steps[np.argmax(curve.returns > 0)] == 2002


@pytest.mark.parametrize("row", ["1,-5,2", "1,0,2", "2,inf,2", "2,nan,2", "2,5,nan"])
def test_an_episode_without_a_length_or_an_end_is_left_out(tmp_path: Path, row: str) -> None:
    path = tmp_path / "monitor.csv"
    path.write_text(f'#{{"t_start": 0.0}}\nr,l,t\n1,10,1\n{row}\n1,10,3\n')
    log = read_monitors([path])
    assert log.curves["training"].steps.tolist() == [10, 20]
    assert log.notes == (f"{path}: 1 unreadable row left out",)


def test_points_that_a_second_learn_replaces_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "progress.csv"
    path.write_text(f"{HEAD}1,1,100\n2,2,200\n3,3,100\n")
    assert read_progress(path).replaced == 2
    np.savez(tmp_path / "evaluations.npz", timesteps=[100, 200, 100], results=[[1.0], [2.0], [3.0]])
    assert read_evaluations(tmp_path / "evaluations.npz").replaced == 2


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    text = "time/total_timesteps,rollout/ep_rew_mean\n100,1\n"
    (tmp_path / "progress.csv").write_text(text, encoding="utf-8-sig")
    assert read_progress(tmp_path / "progress.csv").steps == 100
    (tmp_path / "monitor.csv").write_text('#{"t_start": 0.0}\nr,l,t\n1,10,1\n', encoding="utf-8-sig")
    assert read_monitors([tmp_path / "monitor.csv"]).steps == 10


@pytest.mark.parametrize(
    ("steps", "results"),
    [
        ([1], [[1j]]),
        ([1 + 0j], [[1.0]]),
        ([1, 2], np.zeros((2, 0))),
        (np.zeros((3, 2)), np.zeros((3, 2))),
        (["a"], [[1.0]]),
    ],
)
def test_evaluations_that_are_no_numbers_are_damaged(tmp_path: Path, steps: Any, results: Any) -> None:
    np.savez(tmp_path / "evaluations.npz", timesteps=steps, results=results)
    with pytest.raises(ValueError, match=r"evaluations\.npz is damaged"):
        read_evaluations(tmp_path / "evaluations.npz")
