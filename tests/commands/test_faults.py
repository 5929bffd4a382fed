"""What goes wrong in the user's code, on the disk or in how a number is written; nothing that was learned is lost."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from driftrl.commands import evaluate, train, training
from driftrl.runs import folder as runs
from driftrl.runs.folder import load_agent
from driftrl.runs.lock import alone

SMALL = [
    "--n-envs", "1", "--n-steps", "16", "--batch-size", "16", "--n-epochs", "1", "--actor-hidden", "4",
    "--critic-hidden", "4", "--compile", "off", "--device", "cpu", "--seed", "0",
]  # fmt: skip
PENDULUM = ["policyflow", "--env", "InvertedPendulum-v5", *SMALL]


KINDS: dict[str, type[BaseException]] = {
    "ValueError": ValueError, "OSError": OSError, "KeyError": KeyError, "RuntimeError": RuntimeError,
    "SystemExit": SystemExit,
}  # fmt: skip


class Faulty(gym.Env[np.ndarray, np.ndarray]):
    """Fails at a step of its life, if one is given; otherwise its episodes never end."""

    observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (1,))

    def __init__(self, fails_at: int | None = None, how: str = "ValueError") -> None:
        self.fails_at, self.how, self.steps = fails_at, how, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        if self.steps == self.fails_at:
            if self.how == "ValueError":
                np.zeros(3).reshape(7)
            raise (KeyboardInterrupt if self.how == "KeyboardInterrupt" else KINDS[self.how]("the user's own"))
        return np.zeros(2, np.float32), 1.0, False, False, {}


@pytest.fixture(autouse=True)
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "_FINAL_EPISODES", 2)
    kind: Any = Faulty
    gym.register("test/Faulty-v0", kind)
    yield
    del gym.registry["test/Faulty-v0"]


def only_run() -> Path:
    (run,) = (path.parent for path in Path("runs").rglob("config.json"))
    return run


@pytest.mark.parametrize("how", KINDS)
def test_an_error_in_the_users_environment_keeps_its_traceback_and_what_was_learned(
    how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = ["--env-kwargs", "fails_at=90", f"how={how}"]
    with pytest.raises(KINDS[how]) as caught:
        train.main(["policyflow", "--env", "test/Faulty-v0", *SMALL, "--total-timesteps", "1000", *fault])
    error = capsys.readouterr().err
    assert f"test/Faulty-v0 ended training at 89 of 1,000 steps, in {__file__}:" in error
    assert f"({how}); kept {only_run()}/checkpoints/step_89.zip" in error
    assert any(Path(frame.path).name == Path(__file__).name for frame in caught.traceback)
    assert load_agent(only_run(), "cpu").num_timesteps == 89
    assert (only_run() / "progress.csv").read_text().count("\n") > 3
    rollout = int(SMALL[SMALL.index("--n-steps") + 1])
    with pytest.raises(KINDS[how]):  # the evaluation fails, too
        train.main(["--resume", str(only_run()), "--total-timesteps", "128"])
    lost = f"not restored: what the last {89 % rollout} steps teach: the run ended in them\n"
    assert lost in capsys.readouterr().out


def test_an_interrupt_that_the_users_environment_raises_keeps_what_was_learned() -> None:
    fault = ["--env-kwargs", "fails_at=90", "how=KeyboardInterrupt"]
    assert train.main(["policyflow", "--env", "test/Faulty-v0", *SMALL, "--total-timesteps", "1000", *fault]) == 130
    assert load_agent(only_run(), "cpu").num_timesteps == 89


def test_our_own_refusals_stay_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*PENDULUM, "--gamma", "2"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_full_disk_is_said_and_the_agent_is_evaluated_all_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = runs._save

    def full(path: Path, *arguments: Any) -> None:
        if path.name == "final.zip":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, *arguments)

    monkeypatch.setattr(runs, "_save", full)
    assert train.main([*PENDULUM, "--total-timesteps", "64"]) == 0
    out, error = capsys.readouterr()
    assert "no final.zip at 64 steps" in error and "No space left on device" in error
    assert "deterministic" in out
    assert load_agent(only_run(), "cpu").num_timesteps == 64


def test_half_a_file_is_skipped_for_the_next_best(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*PENDULUM, "--total-timesteps", "64"]) == 0
    final = only_run() / "final.zip"
    final.write_bytes(final.read_bytes()[: final.stat().st_size // 2])
    capsys.readouterr()
    assert evaluate.main([str(only_run()), "--episodes", "1"]) == 0
    out, error = capsys.readouterr()
    assert "skipped" in error and "final.zip" in error
    assert out.startswith(str(only_run() / "checkpoints" / "step_64.zip"))
    assert evaluate.main([str(final), "--episodes", "1"]) == 2  # the file itself was asked for


def test_a_folder_of_one_run_is_that_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*PENDULUM, "--total-timesteps", "16"]) == 0
    capsys.readouterr()
    assert evaluate.main(["runs/InvertedPendulum-v5", "--episodes", "1"]) == 0
    assert capsys.readouterr().out.startswith(f"{only_run() / 'final.zip'}: 16 steps")


def test_longest_episodes_are_refused_where_the_task_has_a_limit(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*PENDULUM, "--total-timesteps", "16", "--env-kwargs", "reset_noise_scale=0.02"]) == 0
    capsys.readouterr()
    assert evaluate.main([str(only_run()), "--max-steps", "5"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(
        "error: max-steps: got 5, expected an environment without a time limit, InvertedPendulum-v5"
    )
    _, flag, remedy = error.partition("--env-kwargs ")
    assert evaluate.main([str(only_run()), "--episodes", "1", "--json", "-", flag.strip(), *remedy.split()]) == 0
    report = json.loads(capsys.readouterr().out)
    assert max(report["sampled"]["lengths"]) <= 5
    assert report["env_kwargs"] == {"reset_noise_scale": 0.02, "max_episode_steps": 5}


def test_episodes_without_an_end_are_cut_off(capsys: pytest.CaptureFixture[str]) -> None:
    task = ["policyflow", "--env", "test/Faulty-v0", *SMALL, "--total-timesteps", "32"]
    assert train.main(task) == 0
    out, error = capsys.readouterr()
    assert "test/Faulty-v0 has no time limit" in error
    assert "deterministic: 2 of 2 episodes had no end and were cut off" in out
    assert evaluate.main([str(only_run()), "--episodes", "3", "--max-steps", "50", "--json", "report.json"]) == 0
    report = json.loads(Path("report.json").read_text())
    assert report["sampled"]["lengths"] == [50] * 3 and report["sampled"]["cut_off"] == 3
    assert evaluate.main([str(only_run()), "--max-steps", "0"]) == 2


def test_integers_as_people_write_them(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*PENDULUM, "--total-timesteps", "3.2e1", "--checkpoint-interval=1_000"]
    assert train.main(arguments) == 0
    assert load_agent(only_run(), "cpu").num_timesteps == 32
    assert train.main(["--resume", str(only_run()), "--total-timesteps", "4.8e1"]) == 0
    assert load_agent(only_run(), "cpu").num_timesteps == 48
    for wrong in ("1.5", "1e-3", "many", "1e400", "nan"):
        assert train.main([*PENDULUM, "--total-timesteps", wrong]) == 2
        assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(("given", "meant"), [("--lr", "--learning-rate"), ("--timesteps", "--total-timesteps")])
def test_names_of_other_programs_get_a_hint(given: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*PENDULUM, given, "1"]) == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--version"]) == 0
    with pytest.raises(SystemExit):
        evaluate.main(["--version"])
    assert capsys.readouterr().out.count("driftrl 0.") == 2


def test_ids_without_a_version_have_the_preset_of_the_newest(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--total-timesteps", "64", "--n-envs", "2", "--n-steps", "16", "--batch-size", "16", "--n-epochs", "1"]
    assert train.main(["policyflow", "--env", "Hopper", *options, "--compile", "off", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "policyflow on Hopper-v5" in out and "preset standard, Hopper-v5:" in out


def test_two_processes_do_not_train_in_one_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*PENDULUM, "--total-timesteps", "32"]) == 0
    run = only_run()
    with alone(run):
        assert train.main(["--resume", str(run), "--total-timesteps", "64"]) == 2
    assert f"error: run in use: another process trains {run}" in capsys.readouterr().err
    assert train.main(["--resume", str(run), "--total-timesteps", "64"]) == 0


def test_a_task_of_the_present_folder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", list(sys.path))
    text = "import gymnasium as gym\n"
    text += "gym.register('Here-v0', 'gymnasium.envs.mujoco.reacher_v5:ReacherEnv', max_episode_steps=5)\n"
    Path("tasks_of_the_present_folder.py").write_text(text)
    try:
        assert (
            train.main(
                ["policyflow", "--env", "tasks_of_the_present_folder:Here-v0", *SMALL, "--total-timesteps", "16"]
            )
            == 0
        )
    finally:
        gym.registry.pop("Here-v0", None)
        sys.modules.pop("tasks_of_the_present_folder", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--brownian-std", "0.1"], "did you mean --spread-std?"),
        (["--guard_drop", "0.1"], "did you mean --collapse-drop?"),
        (
            ["--env", "driftrl/MultiGoal-v0", "--spread-coef", "0"],
            "the preset for driftrl/MultiGoal-v0 sets target_entropy=",
        ),
        (
            ["--env", "HalfCheetah-v5", "--lr-schedule", "constant", "--desired-kl", "0.02"],
            "desired_kl: got 0.02, which changes",
        ),
    ],
)
def test_hints_name_what_the_user_can_change(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["policyflow", *options, "--total-timesteps", "16"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


class Dirty(gym.Env[np.ndarray, np.ndarray]):
    """Episodes of 5 steps, of which every third, or all, have a reward or an observation that is not finite."""

    observation_space, action_space = spaces.Box(-np.inf, np.inf, (2,)), spaces.Box(-1, 1, (1,))

    def __init__(self, what: str = "reward", every: int = 3) -> None:
        self.what, self.every, self.episodes = what, every, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.episodes, self.steps = self.episodes + 1, 0
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        dirty = self.steps == 2 and self.episodes % self.every == 0
        obs = np.full(2, np.nan if dirty and self.what == "observation" else self.steps, np.float32)
        return obs, np.nan if dirty and self.what == "reward" else 1.0, self.steps == 5, False, {}


@pytest.mark.parametrize("what", ["reward", "observation"])
@pytest.mark.parametrize("choice", ["skip", "rollback"])
@pytest.mark.filterwarnings("ignore:.*(NaN|nan|obs returned|reward is):UserWarning")  # of Gymnasium's checker
@pytest.mark.filterwarnings("ignore:non-finite:RuntimeWarning")
def test_what_training_leaves_out_evaluation_does_not_count(
    what: str, choice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind: Any = Dirty
    gym.register("test/Dirty-v0", kind, max_episode_steps=100)
    try:
        options = ["--total-timesteps", "64", "--env-kwargs", f"what={what}", "--nonfinite", choice]
        assert train.main(["policyflow", "--env", "test/Dirty-v0", *SMALL, *options]) == 0
        assert "more episodes had numbers that are not finite" not in capsys.readouterr().out  # 2 episodes, not 3
        assert evaluate.main([str(only_run()), "--episodes", "25", "--json", "report.json"]) == 0
        out = capsys.readouterr().out
        report = json.loads(Path("report.json").read_text())
        for mode in ("deterministic", "sampled"):
            assert report[mode]["returns"] == [5.0] * 25 and report[mode]["left_out"] >= 5
            left_out = report[mode]["left_out"]
            assert f"{mode}: {left_out} more episodes had numbers that are not finite and do not count" in out
        every = ["--env-kwargs", f"what={what}", "every=1"]
        assert evaluate.main([str(only_run()), "--episodes", "3", *every]) == 2
        assert "error: non-finite episodes: got 3" in capsys.readouterr().err
    finally:
        del gym.registry["test/Dirty-v0"]
