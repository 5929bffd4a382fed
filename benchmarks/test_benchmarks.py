import importlib
import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A benchmark's module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up, and scripts each other
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def learning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark's module, with its results elsewhere."""
    arms = benchmark("learning_arms", monkeypatch)
    monkeypatch.setattr(arms, "RESULTS", tmp_path / "results")
    module = benchmark("learning", monkeypatch)
    module.arms = arms  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "CURVE_POINTS", 4)
    return module


def test_kept_results_make_the_table(learning: ModuleType, tmp_path: Path) -> None:
    arms = ("policyflow:solver_steps=1,activation=tanh", "sb3-preset")
    for arm in arms:
        learning.execute(learning.Run("InvertedPendulum-v5", arm, 0, 2048))
    result = json.loads(
        (tmp_path / "results/InvertedPendulum-v5-2k/policyflow_solver_steps_1_activation_tanh/s0.json").read_text()
    )
    assert (result["settings"]["solver_steps"], result["settings"]["activation"]) == (1, "tanh")
    assert len(result["evaluation"]["sampled"]["returns"]) == learning.EVALUATION_EPISODES
    assert [int(steps) // 500 for steps, _ in result["curve"]] == [1, 2, 3, 4]
    table = learning.table(("InvertedPendulum-v5",), arms, 2048).splitlines()
    assert len(table) == 4
    times = learning.time_table(("InvertedPendulum-v5",), arms, 2048, reference="sb3-preset").splitlines()
    assert len(times) == 3
    learning.plot(("InvertedPendulum-v5",), arms, 2048, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_interrupted_run_goes_on_from_a_checkpoint_of_its_last_fifth(
    learning: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from driftrl.runs import folder

    save, saved = folder.save_checkpoint, list[int]()

    def save_and_break_off(agent: Any, *rest: Any) -> None:
        save(agent, *rest)
        saved.append(agent.num_timesteps)
        if len(saved) == 9:  # of 10 iterations
            raise KeyboardInterrupt

    monkeypatch.setattr(folder, "save_checkpoint", save_and_break_off)
    for name, value in {"CHECKPOINT_SECONDS": -1.0, "LATE_EPISODES": 1, "EVALUATION_EPISODES": 1}.items():
        monkeypatch.setattr(learning, name, value)
    arm = "policyflow:n_envs=2,n_steps=64,ema_decay=0.9,compile=off"
    run = learning.Run("InvertedPendulum-v5", arm, 0, 1280)
    with pytest.raises(KeyboardInterrupt):
        learning.execute(run)
    assert saved == [128 * k for k in range(9)]
    learning.execute(run)
    result = json.loads(run.path.read_text())
    assert saved[9:] == [1024, 1152]  # goes on where it was broken off
    assert [row["steps"] for row in result["late"]] == [1024, 1152]


@pytest.mark.parametrize("env", ["HalfCheetah-v5", "Hopper-v5", "Humanoid-v5", "Pusher-v5"])
def test_controls_get_the_presets_hyperparameters(learning: ModuleType, env: str) -> None:
    agent, settings = learning.arms.sb3_preset(learning.Run(env, "sb3-preset", 0, 1))
    n_envs, config = learning.arms.preset(env)
    assert (agent.n_envs, agent.n_steps, agent.batch_size) == (n_envs, config.n_steps, config.batch_size)
    assert (agent.gamma, agent.n_epochs, agent.clip_range(1)) == (config.gamma, config.n_epochs, config.clip_range)
    assert settings["net_arch"]["pi"] == list(config.actor_hidden)
    assert [m.out_features for m in agent.policy.mlp_extractor.policy_net[::2]] == list(config.actor_hidden)
    critic = {id(each) for name, each in agent.policy.named_parameters() if "value_net" in name}
    agent._current_progress_remaining = 0.5
    agent._update_learning_rate(agent.policy.optimizer)
    for group in agent.policy.optimizer.param_groups:
        learning_critic = {id(each) for each in group["params"]} & critic
        assert learning_critic in (set(), critic)
        own = config.critic_learning_rate if learning_critic and config.critic_learning_rate else config.learning_rate
        assert group["lr"] == own
    assert len(agent.policy.optimizer.param_groups) == 1 + (config.critic_learning_rate is not None)
    moves = config.desired_kl_end is not None
    assert settings["desired_kl_end"] == (0.005 if moves else None) and moves == (env == "Pusher-v5")


@pytest.mark.parametrize("arm", ["policyflow", "mbpo", "sac", "sb3-sac", "sb3-preset"])
def test_agents_read_dict_observations(learning: ModuleType, arm: str) -> None:
    pytest.importorskip("gymnasium_robotics")
    agent, _ = learning.build(learning.Run("driftrl/PointMazeMedium-v0", arm, 0, 1))
    agent.predict(agent.get_env().reset())


def test_every_ratio_has_results_of_its_own_and_explores_as_much(
    learning: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = benchmark("flow_ratios", monkeypatch)
    for env in ratios.STEPS:
        arms = [ratios.setting(env, ratio, values) for ratio in ratios.ARMS for values in ratios.grid(env)]
        folders = {learning.result_folder(env, arm, 1000) for arm in arms}
        assert len(folders) == len(arms)
    _, config = learning.arms.preset("HalfCheetah-v5")
    assert (config.action_std, config.solver_steps, config.base_std) == (0.5, 4, 0.1)
    assert ratios.setting("HalfCheetah-v5", "chain", "x=1") == "policyflow:ratio=chain,action_std=0.25,x=1"
    fpo = "policyflow:ratio=fpo,base=standard,base_std=0.5,action_std=0.1,x=1"
    assert ratios.setting("HalfCheetah-v5", "fpo", "x=1") == fpo


def test_ratios_are_tuned_alike_and_compared(
    learning: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env, page = "driftrl/SoftMultiGoal-v0", tmp_path / "page.md"
    ratios = benchmark("flow_ratios", monkeypatch)
    small = "n_envs=8,batch_size=64,diagnostics_interval=1,spread_coef=0"
    monkeypatch.setattr(ratios, "STEPS", {env: 2048})
    monkeypatch.setattr(ratios, "grid", lambda env: (f"clip_range=0.1,{small}", f"clip_range=0.2,{small}"))
    monkeypatch.setattr(ratios, "BIAS_TASKS", (env,))
    monkeypatch.setattr(learning, "run_missing", lambda runs, jobs: [learning.execute(run) for run in runs])
    page.write_text("before\n<!-- tasks -->\nold\n<!-- /tasks -->\n<!-- bias -->\n<!-- /bias -->\nafter\n")

    ratios.main((env,), ("interpolation", "gaussian"), (0, 1), 1, page=page, figures=tmp_path)

    arms = {clip: ratios.setting(env, "gaussian", f"clip_range={clip},{small}") for clip in (0.1, 0.2)}
    tried = {clip: ratios.score(learning.load(env, arm, 1024)[0]) for clip, arm in arms.items()}
    best, worse = sorted(tried, key=tried.__getitem__, reverse=True)
    kept = learning.load(env, arms[best], 2048)
    assert [result["seed"] for result in kept] == [0, 1]
    assert learning.load(env, arms[worse], 2048) == []
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == ["| `interpolation`", "| `gaussian`"]
    assert rows[1][1] == f"0.01, {best}"
    assert rows[1][3] == ", ".join(f"{ratios.score(result):.0f}" for result in kept)
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    assert "old" not in page.read_text()
    logged = kept[0]["logged"]["flow/exact_clip_fraction"]
    assert [steps for steps, _ in logged] == [256 * i for i in range(1, 9)]
    assert all((tmp_path / name).exists() for name in ("flow_ratios.png", "ratio_bias.png"))


def test_moving_the_centre_moves_what_the_policy_sees_near_the_origin_only(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark("paired", monkeypatch)
    centre = benchmark("multigoal_centre", monkeypatch)

    class Echo:
        def predict(self, observation: np.ndarray, **kwargs: bool) -> tuple[np.ndarray, None]:
            return observation, None

    obs = np.array([[0, 0, 3, 4], [1.5, 0, 0, 0], [7, 7, 1, 2]], dtype=np.float32)
    moved, _ = centre.Moved(Echo(), np.array([0.5, -1])).predict(obs)
    near = math.exp(-0.5)  # one width from the origin
    expected = np.array([[0.5, -1, 3, 4], [1.5 + 0.5 * near, -near, 0, 0], [7, 7, 1, 2]])
    np.testing.assert_allclose(moved, expected, atol=1e-6)


def test_returns_near_the_origin_of_a_policy_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark("paired", monkeypatch)
    centre = benchmark("multigoal_centre", monkeypatch)
    starts = []

    class Still:
        def predict(self, observation: np.ndarray, **kwargs: bool) -> tuple[np.ndarray, None]:
            starts.append(observation)
            return np.zeros((len(observation), 2), dtype=np.float32), None

    returns = centre.near_returns(Still(), 500, 0.95)
    distances = np.hypot(*starts[0][:, :2].T)
    assert distances.max() < 2
    np.testing.assert_allclose((distances < np.sqrt(2)).mean(), 0.5, atol=0.1)  # uniform: half of the disc
    goals = 5 * np.exp(1j * np.pi / 3 * np.arange(6))
    m = np.square(np.abs(starts[0][:, :1] + 1j * starts[0][:, 1:2] - goals).min(axis=1))
    reward = 0.1 * (np.exp(-0.3 * m) + np.exp(-0.1 * m))
    np.testing.assert_allclose(returns, reward * (1 - 0.95**50) / (1 - 0.95), rtol=1e-5)


def test_models_and_regularizers_are_compared_from_kept_results(
    learning: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lipschitz, page = benchmark("lipschitz", monkeypatch), tmp_path / "page.md"
    labels = lipschitz.arms(("none", "ensemble"), ("none", "robust"), 3)
    assert list(labels.values()) == ["SAC alone", "ensemble, none", "ensemble, robust"]
    sac, _, robust = labels
    assert "members=7,elites=5,regularizer=robust,gradient_steps=3" in robust
    for arm, seed, training, final in ((sac, 0, 10, 20), (robust, 0, 30, 40), (robust, 1, 50, 70)):
        run = learning.Run("Hopper-v5", arm, seed, 1000)
        run.path.parent.mkdir(parents=True, exist_ok=True)
        evaluation = {"deterministic": {"returns": [final - 1, final + 1]}, "sampled": {"returns": [0]}}
        curve = [[500, 1], [1000, training]]
        kept = {"seed": seed, "evaluation": evaluation, "curve": curve, "cpu_seconds": 8 + 2 * seed}
        run.path.write_text(json.dumps(kept))
    page.write_text("before\n<!-- models, 1000 steps -->\nold\n<!-- /models, 1000 steps -->\nafter\n")
    options = {"total_timesteps": 1000, "gradient_steps": 3, "table_only": True}

    lipschitz.main(
        models=("none", "ensemble"),
        regularizers=("none", "robust"),
        horizons=(),
        page=page,
        figure=tmp_path / "f.png",
        **options,
    )

    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith(("| SAC", "| ensemble"))]
    assert [(row[0], row[2], row[4], row[5]) for row in rows] == [
        ("| SAC alone", "10", "20", "8 |"), ("| ensemble, robust", "30, 50", "40, 70", "9 |"),
    ]  # fmt: skip
    assert rows[1][1] == "**40** [30, 50]"
    assert page.read_text().startswith("before\n") and page.read_text().endswith("after\n")
    assert (tmp_path / "f_1000.png").exists()


def test_a_page_keeps_its_tables_unless_all_of_them_are_made_again(
    learning: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lipschitz, page, figure = benchmark("lipschitz", monkeypatch), tmp_path / "page.md", tmp_path / "figure.png"
    old = "<!-- models, 1000 steps -->\n\nHopper-v5, 1,000 steps:\n\nold\n\n<!-- /models, 1000 steps -->\n"
    page.write_text(old)
    monkeypatch.setattr(lipschitz, "FIGURE", figure)
    options = {"models": ("none",), "horizons": (), "table_only": True, "page": page, "figure": figure}
    evaluation = {"deterministic": {"returns": [3]}}
    result = {"seed": 0, "evaluation": evaluation, "curve": [[500, 1], [1000, 2]], "cpu_seconds": 4}
    (arm,) = lipschitz.arms(("none",), ("none",), 10)
    path = learning.Run("Ant-v5", arm, 0, 1000).path
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result))
    shows, misses = "it shows Hopper-v5, not among the given envs", "there are no results of Hopper-v5"
    for envs, reason in ((("Ant-v5",), shows), (("Hopper-v5",), misses), (("Ant-v5", "Hopper-v5"), misses)):
        lipschitz.main(envs, total_timesteps=1000, **options)
        assert f"{page}, part 'models, 1000 steps', is left as it is: {reason}\n" in capsys.readouterr().out
        assert page.read_text() == old
        assert list(tmp_path.glob("*.png")) == []

    path = learning.Run("Hopper-v5", arm, 0, 1000).path
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result))
    lipschitz.main(("Ant-v5", "Hopper-v5"), total_timesteps=1000, **options)

    assert "left as it is" not in capsys.readouterr().out
    assert re.findall(r"(\S+), 1,000 steps:", page.read_text()) == ["Ant-v5", "Hopper-v5"]
    assert page.read_text().count("| SAC alone | **2** [2, 2] | 2 | **3** [3, 3] | 3 | 4 |") == 2
    assert (tmp_path / "figure_1000.png").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"models": ("none",)}, "models: got none, expected some of single, .*; SAC alone .* need --horizons"),
        ({"models": ("single", "five")}, "models: got five, expected some of single, 3 members"),
        ({"models": ("single",), "horizons": ()}, "models: got single, expected some of none, deterministic, "),
        ({"regularizers": ("l2", "none")}, "regularizers: got l2, expected some of none, robust, spectral$"),
        ({"regularizers": ()}, "regularizers: got an empty list, expected at least one of none, robust, spectral"),
        ({"envs": ()}, "envs: got none, expected at least one environment id"),
    ],
)
def test_models_that_cannot_be_compared_are_refused(
    learning: ModuleType, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], text: str
) -> None:
    lipschitz = benchmark("lipschitz", monkeypatch)
    monkeypatch.setattr(learning, "run_missing", lambda *_: pytest.fail("ran"))
    with pytest.raises(ValueError, match=text) as refused:
        lipschitz.main(**options)
    assert "\n" not in str(refused.value)


def test_walks_count_files_lines_and_hops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walks = benchmark("walks", monkeypatch)
    (tmp_path / "room").mkdir()
    (tmp_path / "link").symlink_to("room")
    (tmp_path / "one.py").write_text(
        "import sys\nimport two\n\n\n"
        "def outer():\n    def nested():\n        return two.inner(1)\n\n"
        "    import three\n\n"
        "    return nested() + two.inner(2) + sorted([3], key=two.key)[0]\n\n\n"
        "def not_called():\n    return 0\n"
    )  # fmt: skip
    (tmp_path / "room" / "two.py").write_text(
        "def inner(x):\n    return [each + 1\n            for each in [x]][0]\n\n\n"
        "def key(x):\n    class Body:\n        y = x\n\n    return Body.y\n"
    )  # fmt: skip
    (tmp_path / "three.py").write_text("def at_import():\n    return 1\n\n\nONE = at_import()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "link")
    for name in ("one", "two", "three"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    one = importlib.import_module("one")

    with walks.Trace(tmp_path) as trace:
        assert one.outer() == 8

    assert trace.walk() == {"one.py": 7, "room/two.py": 8}  # outer, with nested within; inner and key
    assert trace.hops == 3  # two calls of inner, one of key by way of sorted
    assert walks.folders(trace.walk()) == "top level 1, room 1"


def test_the_picture_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark("front_picture", monkeypatch)
    for name, number in (("EPISODES", 20), ("DRAWN", 20), ("SAMPLES", 100)):
        monkeypatch.setattr(module, name, number)
    module.main(steps=2, figure=tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 20_000
    percents = module.whole_percents([0.046, 0.256, 0.046, 0.034, 0.453, 0.055])
    assert percents == [5, 26, 5, 3, 45, 5]  # 89 in all; each for itself they would be 90


def test_latent_models_of_equal_size_are_compared(
    learning: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark("paired", monkeypatch)
    latent = benchmark("latent_dynamics", monkeypatch)
    for obs_dim, action_dim in ((5, 3), (8, 6)):
        sizes = [latent.size(latent.build(arm, obs_dim, action_dim)) for arm in latent.ARMS]
        assert max(sizes) < 1.05 * min(sizes)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- latent -->\nold\n<!-- /latent -->\n")
    monkeypatch.setattr(latent, "RESULTS", tmp_path / "results")
    small = {"rows": 1600, "learned": 1024, "folder": tmp_path / "data", "page": page}

    latent.main(("HalfCheetah-v5",), seeds=(0,), updates=2, **small)
    text = page.read_text()
    latent.main(("HalfCheetah-v5",), seeds=(0,), updates=0, **small)  # what is kept is not fitted again

    assert page.read_text() == text
    assert [line.split(" | ")[1] for line in text.splitlines()[5:-1]] == [
        *latent.NAMES.values(),
        "the last observation",
    ]
    _, held_out = latent.data("HalfCheetah-v5", tmp_path / "data", 0, 0)
    true = held_out.obs.transpose(0, 1)[latent.HISTORY :], held_out.reward.T[latent.HISTORY - 1 :]
    assert latent.errors(true, held_out) == {"obs": [0.0] * 4, "reward": [0.0] * 4}


def test_kept_results_name_no_place_of_a_machine() -> None:
    kept = list((Path(__file__).parent / "results").rglob("*.json"))
    assert kept
    assert [str(each) for each in kept if '": "/' in each.read_text()] == []
