"""What cannot work is refused before anything long begins, in one line that says what to change."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from driftrl.commands import evaluate, train, training
from driftrl.envs import check_env, make_vec

SMALL = [
    "--n-envs", "1", "--n-steps", "16", "--batch-size", "16", "--n-epochs", "1", "--actor-hidden", "4",
    "--critic-hidden", "4", "--compile", "off", "--device", "cpu", "--seed", "0", "--total-timesteps", "16",
]  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "_FINAL_EPISODES", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["policyflow", "--actor-hidden", "1000000", "1000000"], "actor_hidden: got 1000000 1000000, whose 1,000,0"),
        (["policyflow", "--critic-hidden", "1000000", "1000000"], "critic_hidden: got 1000000 1000000, whose 1,0"),
        (["mbpo", "--model-hidden", "1000000", "1000000"], "take at least 14,901 GiB of memory, the machine has"),
        (["mbpo", "--critic-hidden", "1000000", "1000000"], "critic_hidden: got 1000000 1000000, whose 3,000,000,0"),
        (["policyflow", "--n-envs", "10000000000"], "n_envs: got 10000000000, which take at least 37,253 GiB"),
        (["policyflow", "--n-envs", "10000000", "--backend", "subproc"], "n_envs: got 10000000, which take at least"),
        (["policyflow", "--n-steps", "10000000000000"], "n_steps: got a storage of 10000000000001 x 8 x 4 numbers"),
        (["mbpo", "--buffer-size", "1000000000000000"], "buffer_size, or model_rollouts and model_retain: got a stor"),
        (["policyflow", "--env-kwargs", "reset_noise_scale=abc"], "env-kwargs: InvertedPendulum-v5 with {'reset_noise"),
        (["policyflow", "--env-kwargs", "reset_noise_scale=NaN"], "nan} cannot be stepped: OverflowError: high - low"),
        (
            ["policyflow", "--env", "Hopper-v5", "--env-kwargs", "healthy_reward=abc"],
            "env-kwargs: Hopper-v5 with {'healthy_reward': 'abc'} cannot be stepped: ",
        ),
        (
            ["mbpo", "--env", "Hopper-v5", "--env-kwargs", "healthy_reward=Infinity"],
            "env-kwargs: Hopper-v5 with {'healthy_reward': inf} begins with a reward of inf; check their values",
        ),
        (["policyflow", "--env", "Pong-v5"], "got 'Pong-v5', expected a registered Gymnasium id; gymnasium.pprint"),
        (["policyflow", "--env", "Hoper-v5"], "did you mean Hopper-v5?"),
        (["policyflow", "--seed", "abc"], "error: --seed: got abc, expected INT or None; see "),
        (["policyflow", "--seed=1.5"], "error: --seed: got 1.5, expected INT or None; see"),
        (["policyflow", "--gamma", "abc"], "error: --gamma: got abc, expected FLOAT; see"),
        (["policyflow", "--actor-hidden", "a", "b"], "error: --actor-hidden: got a b, expected INT ...; see"),
        (["policyflow", "--lr-schedule", "foo"], "--lr-schedule: got foo, expected adaptive or linear or constant"),
        (["policyflow", "--n-steps"], "error: --n-steps: got none, expected INT; see"),
        (["policyflow", "--n-steps", "8", "9"], "error: unknown options: 9; see"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_at_once(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    agent, *options = arguments
    assert train.main([agent, "--env", "InvertedPendulum-v5", "--device", "cpu", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not Path("runs").exists()


def test_evaluation_refuses_the_same_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["policyflow", "--env", "InvertedPendulum-v5", *SMALL]) == 0
    capsys.readouterr()
    assert evaluate.main(["runs/InvertedPendulum-v5", "--env-kwargs", "reset_noise_scale=abc"]) == 2
    assert "with {'reset_noise_scale': 'abc'} cannot be stepped: " in capsys.readouterr().err
    assert evaluate.main(["runs/InvertedPendulum-v5", "--env", "InvertdPendulum-v5"]) == 2
    assert "did you mean InvertedPendulum-v" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("id", "remedy"),
    [
        ("a_module_of_tasks:HalfCheeta-v5", "did you mean a_module_of_tasks:HalfCheetah-v5?"),
        ("a_module_of_tasks:Pong-v5", "; gymnasium.pprint_registry"),
        ("halfcheetah-v5", "did you mean HalfCheetah-v5?"),
        ("driftrl/MultiGoals-v0", "did you mean driftrl/MultiGoal-v0"),
    ],
)
def test_suggestions_are_near_and_keep_their_module(id: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "a_module_of_tasks", types.ModuleType("a_module_of_tasks"))
    with pytest.raises(ValueError) as refused:
        check_env(id)
    assert remedy in str(refused.value)
    assert "Ant" not in str(refused.value)


def test_a_trial_does_not_move_the_environments() -> None:
    plain, tried = make_vec("Hopper-v5", 2, 7), make_vec("Hopper-v5", 2, 7, healthy_reward=1.0)
    assert (plain.reset() == tried.reset()).all()  # type: ignore[union-attr]
