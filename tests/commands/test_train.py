import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from driftrl.agents.registry import AGENTS
from driftrl.analysis.evaluation import evaluate_modes
from driftrl.commands import train, training
from driftrl.commands.config_file import ConfigFile
from driftrl.commands.evaluate import main as evaluate
from driftrl.commands.settings import settings_of_file
from driftrl.runs.folder import load_agent
from driftrl.runs.log import open_logger

TINY = ["--n-envs", "2", "--n-steps", "16", "--batch-size", "16", "--n-epochs", "1", "--device", "cpu"]
SMALL = [*TINY, "--actor-hidden", "8", "8", "--critic-hidden", "8", "8"]


class Turning(gym.Env[object, np.ndarray]):
    """Episodes of 5 steps, the kind of observation and a first step with a wrong number to choose."""

    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, observation: str = "box", nan_at: int = 10**9, inf_reward_at: int = 10**9) -> None:
        vector = spaces.Box(-1, 1, (2,))
        self.observation_space = spaces.Dict(a=vector, b=vector) if observation == "dict" else vector
        self.nan_at, self.inf_reward_at, self.steps = nan_at, inf_reward_at, 0

    def _observe(self) -> object:
        vector = np.full(2, np.nan if self.steps >= self.nan_at else 0.1, np.float32)
        return {"a": vector, "b": vector} if isinstance(self.observation_space, spaces.Dict) else vector

    def reset(self, *, seed: int | None = None, options: object = None) -> tuple[object, dict[str, object]]:
        self.left = 5
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[object, float, bool, bool, dict[str, object]]:
        self.steps += 1
        self.left -= 1
        reward = np.inf if self.steps >= self.inf_reward_at else float(action[0])
        return self._observe(), reward, False, self.left == 0, {}


gym.register("DriftRLTest/Turning-v0", lambda **kwargs: Turning(**kwargs))


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """SIGINT interrupts, also where the tests run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def only_run() -> Path:
    (folder,) = Path("runs").glob("*/*/*")
    return folder


def start(*options: str, env: str = "InvertedPendulum-v5", steps: int = 96) -> int:
    return train.main(["policyflow", "--env", env, "--total-timesteps", str(steps), *SMALL, *options])


def test_what_another_choice_switched_off_is_not_called_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    assert start("--lr-schedule", "constant", "--env", "Pendulum-v1") == 0
    (yours,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("set by you:"))
    assert "lr_schedule=constant" in yours
    assert "desired_kl" not in yours


def test_a_killed_short_run_keeps_nine_tenths() -> None:
    assert start(steps=320) == 0
    folder = only_run()
    assert json.loads((folder / "config.json").read_text())["checkpoint_interval"] == 32
    assert {path.name for path in folder.rglob("step_*")} == {"step_256.zip", "step_288.zip", "step_320.zip"}


@pytest.mark.parametrize(("steps", "interval"), [(3_000_000, 100_000), (5_000, 500), (3, 1)])
def test_checkpoints_are_a_tenth_of_the_run_apart_and_100000_steps_at_most(steps: int, interval: int) -> None:
    file = ConfigFile(agent="policyflow", run={"total_timesteps": steps})
    assert settings_of_file(file).checkpoint_interval == interval


def test_a_run_from_start_to_resumption(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        start("--seed", "3", "--checkpoint-interval", "32", "--gamma", "0.9", "--keep-checkpoints", "2", steps=640) == 0
    )
    out = capsys.readouterr().out
    folder = only_run()
    for part in ("seed 3", "set by you:", "gamma=0.9", "deterministic", "sampled", "--resume", "--video", "--logdir"):
        assert part in out
    config = json.loads((folder / "config.json").read_text())
    assert (config["seed"], config["env_id"], config["n_envs"]) == (3, "InvertedPendulum-v5", 2)
    assert (config["config"]["gamma"], config["config"]["actor_hidden"]) == (0.9, [8, 8])
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert {"final.zip", "best.zip", "best.json", "eval.json", "progress.csv"} <= names
    assert {name for name in names if name.startswith("step_")} == {"step_608.zip", "step_640.zip"}
    assert any(name.startswith("events.out.tfevents") for name in names)
    report = json.loads((folder / "eval.json").read_text())
    assert report["timesteps"] == 640
    assert len(report["sampled"]["returns"]) == len(report["deterministic"]["returns"]) == 10

    assert train.main(["--resume", str(folder)]) == 0
    assert "nothing left to do" in capsys.readouterr().out
    assert train.main(["--resume", str(folder), "--total-timesteps", "704"]) == 0
    assert "all restored" in capsys.readouterr().out
    assert load_agent(folder, "cpu").num_timesteps == 704
    with (folder / "progress.csv").open() as file:
        steps = [int(row["time/total_timesteps"]) for row in csv.DictReader(file)]
    assert steps == list(range(32, 705, 32))
    assert evaluate([str(folder), "--episodes", "2"]) == 0


def test_same_seed_same_policy() -> None:
    for root in ("a", "b"):
        assert start("--seed", "1", "--run-dir", root) == 0
    first, second = (load_agent(next(Path(root).glob("*/*/*")), "cpu").get_parameters() for root in ("a", "b"))
    for name, tensor in first["policy"].items():
        assert (tensor == second["policy"][name]).all(), name


def test_dict_observations_and_env_kwargs() -> None:
    assert start("--env-kwargs", "observation=dict", env="DriftRLTest/Turning-v0") == 0
    config = json.loads((only_run() / "config.json").read_text())
    assert config["env_kwargs"] == {"observation": "dict"}
    assert 0 <= config["seed"] < 2**31


def test_preset_applies_by_id(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["policyflow", "--env=HalfCheetah-v5", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "defaults are those of the preset standard for HalfCheetah-v5" in out
    gamma = AGENTS["policyflow"].preset("HalfCheetah-v5", "standard")["gamma"]
    assert f"--gamma {gamma} Discount factor, in [0, 1]." in out


@pytest.mark.parametrize("flag", ["-h", "--help", "--help-all"])
def test_overview(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([flag]) == 0
    out = capsys.readouterr().out
    assert "policyflow" in out
    assert "--help-all" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "got no agent, expected policyflow"),
        (["ppo"], "got ppo, expected policyflow"),
        (["policyflow", "--env", "HalfCheeta-v5"], "did you mean HalfCheetah-v5"),
        (["policyflow", "--env", "CartPole-v1"], "unsupported action space"),
        (["policyflow", "--threads", "0"], "threads: got 0"),
        (["policyflow", "--n-steps", "0"], "n_steps: got 0"),
        (["policyflow", "--solver-steps", "0"], "solver_steps: got 0"),
        (["policyflow", "--ratio", "exact"], "got exact"),
        (["policyflow", "--n-steps", "many"], "got many"),
        (["policyflow", "--gama", "1"], "did you mean --gamma?"),
        (["policyflow", "--n-envs", "0"], "n_envs: got 0"),
        (["policyflow", "--total-timesteps", "0"], "total_timesteps: got 0"),
        (["policyflow", "--checkpoint-interval", "0"], "checkpoint_interval: got 0"),
        (["policyflow", "--seed", "-1"], "seed: got -1"),
        (["policyflow", "--seeds", "1", "2", "1"], "seeds: got 1 more than once, expected different integers"),
        (["policyflow", "--seeds"], "seeds: got none, expected different integers"),
        (["policyflow", "--seeds", "0", "-1"], "seed: got -1, expected an integer of 0 .. 2**31 - 1"),
        (["policyflow", "--seeds", "0", "1", "--seed", "2"], "seed: got 2 and seeds, expected one of them"),
        (["policyflow", "--seeds", "0", "--jobs", "0"], "jobs: got 0, expected an integer of at least 1"),
        (["policyflow", "--jobs", "2"], "jobs: got 2, which changes nothing without seeds"),
        (["policyflow", "--seeds", "0", "--env", "CartPole-v1"], "unsupported action space"),
        (["policyflow", "--backend", "threads"], "got threads"),
        (["policyflow", "--worker-timeout", "0"], "worker_timeout: got 0"),
        (["policyflow", "--worker-restarts", "-1"], "worker_restarts: got -1"),
        (["policyflow", "--env-kwargs", "a"], "expected key=value"),
        (["--resume", "missing"], "no such run: got missing"),
        (["--resume", "."], "no run: got ."),
        (["--resume", "missing", "--gamma", "1"], "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not list(Path().iterdir())


def test_a_batch_larger_than_the_rollout_warns_and_trains() -> None:
    with pytest.warns(UserWarning, match="batch_size: got 33, more than the rollout's .* 16 x 2 = 32 samples"):
        assert start("--batch-size", "33", steps=32) == 0
    load_agent(only_run(), "cpu")  # nobody trains: a warning would fail the test


def test_the_batch_size_of_a_preset_is_no_warning(capsys: pytest.CaptureFixture[str]) -> None:
    task = ["--env", "InvertedPendulum-v5", "--n-envs", "1", "--n-steps", "16", "--n-epochs", "1", "--device", "cpu"]
    assert train.main(["policyflow", *task, "--compile", "off", "--total-timesteps", "16"]) == 0
    assert load_agent(only_run(), "cpu").config.batch_size > 16  # type: ignore[attr-defined]
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["nan_at=20", "inf_reward_at=20"])
def test_wrong_numbers_end_training(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert start("--env-kwargs", wrong, env="DriftRLTest/Turning-v0") == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert "no time limit" in warning
    assert error.startswith("error: ")
    assert f"kept {only_run()}" in error
    assert load_agent(only_run(), "cpu").num_timesteps == 40
    shutil.rmtree("runs")

    assert start("--env-kwargs", wrong, "--checkpoint-interval", "32", env="DriftRLTest/Turning-v0") == 2
    assert str(only_run()) in capsys.readouterr().err
    assert load_agent(only_run(), "cpu").num_timesteps == 40  # two environments


FAULTY = """
import os
import gymnasium as gym, numpy as np

class Faulty(gym.Env):  # dies at its 40th step
    observation_space, action_space, steps = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,)), 0

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.steps == 40:
            os._exit(1)
        return np.zeros(2, np.float32), 1.0, False, self.steps % 5 == 0, {}

gym.register("Faulty-v0", Faulty)
"""


def test_a_process_that_fails_once_too_often_ends_training_with_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("faulty.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(Path.cwd())
    with pytest.warns(RuntimeWarning, match="restart 1 of 1"):
        code = start(
            "--backend", "subproc", "--n-envs", "1", "--worker-restarts", "1", env="faulty:Faulty-v0", steps=999
        )
    assert code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: environment 0: its worker failed (died, exit code 1), expected at most 1 restarts")
    assert str(only_run()) in error
    assert load_agent(only_run(), "cpu").num_timesteps == 79  # 40 steps end with a restart, 39 with the error
    config = json.loads((only_run() / "config.json").read_text())
    assert (config["backend"], config["worker_restarts"]) == ("subproc", 1)


def with_signals(function: Callable[..., Any], signals: dict[int, int]) -> Callable[..., Any]:
    """The function, with a signal to this process before the calls of the given numbers."""
    numbers = itertools.count()

    def with_signal(*args: Any, **kwargs: Any) -> Any:
        if (number := signals.get(next(numbers))) is not None:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    return with_signal


def test_sigterm_saves(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Turning, "step", with_signals(Turning.step, {80: signal.SIGTERM}))
    assert start(env="DriftRLTest/Turning-v0", steps=1000) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert "stopped at 96 of 1,000 steps" in capsys.readouterr().out
    assert load_agent(only_run(), "cpu").num_timesteps == 96  # the iteration of step 80 was finished


def test_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    step = Turning.step
    monkeypatch.setattr(Turning, "step", with_signals(step, {20: signal.SIGINT, 21: signal.SIGTERM}))
    assert start(env="DriftRLTest/Turning-v0", steps=1000) == 128 + signal.SIGTERM
    assert not Path("runs").exists()

    monkeypatch.setattr(Turning, "step", with_signals(step, {80: signal.SIGTERM, 81: signal.SIGTERM}))
    assert start("--checkpoint-interval", "32", env="DriftRLTest/Turning-v0", steps=1000) == 128 + signal.SIGTERM
    assert f"saved in {only_run() / 'checkpoints' / 'step_64.zip'}" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_before_the_first_step_leaves_nothing(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "open_logger", with_signals(open_logger, {0: number}))
    assert start() == 128 + number
    assert not Path("runs").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_in_the_final_evaluation_says_what_is_saved(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "evaluate_modes", with_signals(evaluate_modes, {0: number}))
    assert start() == 128 + number
    out, folder = capsys.readouterr().out, only_run()
    assert f"saved in {folder / 'final.zip'}" in out
    assert f"{folder} --episodes 20" in out
    assert f"--resume {folder} --total-timesteps 192" in out


def test_an_error_of_the_environment_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Turning, action: np.ndarray) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(Turning, "step", fail)
    Path("runs").mkdir()
    with pytest.raises(RuntimeError, match="broken"):
        start(env="DriftRLTest/Turning-v0")
    assert not list(Path("runs").iterdir())


def test_resumption_needs_steps_to_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert start(steps=10) == 0  # a rollout has 32
    assert "--total-timesteps 64\n" in capsys.readouterr().out
    for steps in ("0", "-5"):
        assert train.main(["--resume", str(only_run()), "--total-timesteps", steps]) == 2
        assert f"total_timesteps: got {steps}, expected" in capsys.readouterr().err


def test_progress_before_the_first_episode_has_ended(capsys: pytest.CaptureFixture[str]) -> None:
    assert start(env="Pendulum-v1") == 0
    out = capsys.readouterr().out
    assert "return -  " in out
    assert "nan" not in out


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "driftrl.commands.train", *args]


def environment() -> dict[str, str]:
    root = str(Path(train.__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


def test_ctrl_c_saves_and_says_where() -> None:
    options = ["--env", "InvertedPendulum-v5", "--total-timesteps", "10000000", "--compile", "off", *SMALL]
    process = subprocess.Popen(
        command("policyflow", *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size for file in Path().glob("runs/*/*/*/progress.csv")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    (checkpoint,) = only_run().glob("checkpoints/step_*.zip")
    assert str(checkpoint) in out
    assert f"--resume {only_run()}" in out


def test_exit_code_of_the_process() -> None:
    result = subprocess.run(command("policyflow", "--n-envs", "0"), capture_output=True, text=True, env=environment())
    assert result.returncode == 2
    assert result.stderr == "error: n_envs: got 0, expected an integer of at least 1\n"
    assert not result.stdout
