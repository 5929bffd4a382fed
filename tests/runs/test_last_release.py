"""Runs that the last release began, with its names of options: they load, are evaluated, and go on as they would have.

`expected.json` holds what that release had after going on: total timesteps and deterministic actions. Left
out are those of mbpo, which has drawn the actions of training from another generator since, and of policyflow, whose
spread "score" and target entropy have been estimated otherwise since; both were the same to the last bit before.
policyflow_paper is that run with spread "paper" and a fixed weight.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from driftrl.commands import evaluate, train, training
from driftrl.runs.folder import find_checkpoint, load_agent

KEPT = Path(__file__).parent / "last_release"


@pytest.mark.parametrize("name", ["policyflow", "policyflow_paper", "mbpo"])
def test_a_run_goes_on_as_the_release_would_have(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_FINAL_EPISODES", 1)
    folder = tmp_path / name
    shutil.copytree(KEPT / name, folder)
    expected = json.loads((folder / "expected.json").read_text())
    assert train.main(["--resume", str(folder), "--total-timesteps", str(expected["timesteps"])]) == 0
    assert "all restored: as if it had not been interrupted" in capsys.readouterr().out
    agent = load_agent(folder)
    assert agent.num_timesteps == expected["timesteps"]
    size = agent.observation_space.shape
    assert size is not None
    obs = np.linspace(-1, 1, 3 * size[0], dtype=np.float32).reshape(3, *size)
    actions = agent.predict(obs, deterministic=True)[0]
    np.testing.assert_allclose(actions, np.array(expected.get("actions", actions)), rtol=1e-3, atol=1e-4)
    assert np.isfinite(actions).all()


@pytest.mark.parametrize("name", ["policyflow", "mbpo"])
def test_a_run_is_evaluated(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(find_checkpoint(KEPT / name)), "--episodes", "1"]) == 0
    assert "deterministic" in capsys.readouterr().out
    agent: Any = load_agent(KEPT / name)
    config = agent.config
    if name == "policyflow":
        assert (config.spread, config.on_collapse, config.exploration_noise) == ("score", "warn", "ou")
    else:
        assert (config.robust_actions, config.rollout_min, config.rollout_max) == ("same_action", 1, 5)
        assert (config.rollout_start, config.rollout_end) == (5_000, 30_000)
