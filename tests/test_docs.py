import inspect
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from stable_baselines3 import PPO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from driftrl import LipschitzMBPO, PolicyFlow, PolicyFlowConfig
from driftrl.commands import demonstrate
from driftrl.runs.folder import PRETRAIN, PRETRAINED
from driftrl.runs.log import open_logger

ROOT = Path(__file__).parents[1]

# What makes the documented settings quick: the code is run as it stands otherwise.
QUICKER = [
    (r"total_timesteps=[\d_]+", "total_timesteps=64"),
    (r"n_steps=\d+, batch_size=\d+", "n_steps=16, batch_size=16"),
    (r'PolicyFlow\("MlpPolicy", "InvertedPendulum-v5"(?!, config)', r"\g<0>, n_steps=16, batch_size=16"),
    (r'PPO\("MlpPolicy", "InvertedPendulum-v5"', r"\g<0>, n_steps=16, batch_size=16"),
    (r"range\(3000\)", "range(3)"),
    (r"_freq=[\d_]+", "_freq=8"),
]


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/checkpoints.md",
        "docs/compare.md",
        "docs/dynamics.md",
        "docs/export.md",
        "docs/recipes.md",
        "docs/sb3.md",
        "docs/solvers.md",
        "docs/howto/environment.md",
        "docs/howto/network.md",
    ],
)
@pytest.mark.filterwarnings("ignore::tqdm.TqdmExperimentalWarning")  # of the progress bar of Stable-Baselines3
@pytest.mark.filterwarnings("ignore:this agent cannot be saved as it is:UserWarning")  # pages say how it can
def test_code_of_the_documentation_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        for pattern, replacement in QUICKER:
            block = re.sub(pattern, replacement, block)
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", ["README.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))])
def test_links_of_the_documentation_exist(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


def test_readme_activates_the_environment_before_it_is_needed() -> None:
    text = (ROOT / "README.md").read_text()
    assert 0 < text.find("    . .venv/bin/activate") < text.find("\n    python ")


def test_differences_from_ppo_are_those_documented() -> None:
    kinds = {name: parameter.kind for name, parameter in inspect.signature(PolicyFlow).parameters.items()}
    positional = [name for name, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == ["policy", "env", "learning_rate"]
    assert (PolicyFlowConfig().max_grad_norm, inspect.signature(PPO).parameters["max_grad_norm"].default) == (1.0, 0.5)
    agent = PolicyFlow("MlpPolicy", "Pendulum-v1", n_steps=16, batch_size=16, device="cpu")
    for name in ("n_epochs", "batch_size", "clip_range", "target_kl"):
        assert getattr(agent, name) == getattr(agent.config, name)
    assert not hasattr(agent.policy, "get_distribution")
    with pytest.raises(gym.error.NameNotFound):
        PolicyFlow("MlpPolicy", "Pendulu-v1")


def test_log_is_where_and_what_the_page_says(tmp_path: Path) -> None:
    for _ in range(2):
        agent = PolicyFlow("MlpPolicy", "Pendulum-v1", n_steps=16, batch_size=16, n_epochs=1, device="cpu")
        logger = open_logger(tmp_path)
        agent.set_logger(logger)
        agent.learn(32)
        logger.close()
    names, *rows = ((tmp_path / "progress.csv").read_text().split("\n")[i].split(",") for i in range(5))
    assert [row[names.index("time/iterations")] for row in rows] == ["1", "2", "1", "2"]
    events = EventAccumulator(str(tmp_path)).Reload()
    left_out = {"time/iterations", "time/time_elapsed", "time/total_timesteps", "train/n_updates"}
    assert set(names) - set(events.Tags()["scalars"]) == left_out
    metrics = (ROOT / "docs" / "policyflow.md").read_text().partition("## Metrics")[2]
    assert all(f"`{name}`" in metrics for name in names)
    assert all(f"`{name}`" in metrics.partition("All of them are in progress.csv")[2] for name in left_out)


@pytest.mark.parametrize(
    "fields",
    [{}, {"termination": "learned", "adversary": "langevin"}, {"value_gradient": 2, "members": 2, "elites": 2}],
)
def test_the_page_names_every_metric_of_the_model_based_agent(fields: dict[str, Any]) -> None:
    agent = LipschitzMBPO(
        "MlpPolicy", "InvertedPendulum-v5", learning_starts=20, gradient_steps=1, model_epochs=1, model_hidden=(8,),
        model_rollouts=2, diagnostics_interval=10, compile="off", device="cpu", **fields,
    )  # fmt: skip
    agent.learn(40, log_interval=10**6)
    names = {name for name in agent.logger.name_to_value if name.split("/")[0] not in ("time", "rollout")}
    page = (ROOT / "docs" / "lipschitz_mbpo.md").read_text().partition("## Metrics")[2]
    assert names == {name for name in names if f"| `{name}` |" in page}


def test_the_code_on_demonstrations_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("h5py")
    monkeypatch.chdir(tmp_path)
    assert demonstrate.main(["data/avoid-v0", "--episodes", "24"]) == 0
    (block,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/demonstrations.md").read_text(), re.MULTILINE | re.DOTALL
    )
    exec(compile(block.replace("10_000", "20").replace("100_000", "64"), "docs/demonstrations.md", "exec"), {})


def test_the_page_on_demonstrations_names_its_metrics_and_files(tmp_path: Path) -> None:
    page = (ROOT / "docs/demonstrations.md").read_text()
    assert all(f"`{name}`" in page for name in ("pretrain/loss", "pretrain/validation_loss", "pretrain/"))
    assert all(f"`{name}`" in page for name in (PRETRAIN, PRETRAINED, "pretrained.json"))
