import json
import shutil
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from scipy import stats

from driftrl import LipschitzMBPO, PolicyFlow, PolicyFlowConfig
from driftrl.analysis import plots as pictures
from driftrl.analysis.evaluation import evaluate_agent
from driftrl.analysis.statistics import bootstrap_interval, interquartile_mean
from driftrl.analysis.video import follow_with_camera, record_video
from driftrl.commands import evaluate as evaluate_module
from driftrl.commands.evaluate import main
from driftrl.envs import make_vec
from driftrl.runs.folder import RunSettings, load_agent, new_run, save_agent


class Lengths(gym.Env[np.ndarray, np.ndarray]):
    """Episodes whose length is drawn from 1 and 19; the return is the length. Renders its step number."""

    action_space = spaces.Box(-1, 1, (1,))
    observation_space = spaces.Box(-1, 1, (2,))

    reward = 1.0
    observation = np.zeros(2, np.float32)

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012  as gymnasium declares it

    def __init__(self, render_mode: str | None = None, broken: bool = False) -> None:
        self.render_mode, self.broken = render_mode, broken

    def reset(self, *, seed: int | None = None, options: object = None) -> tuple[np.ndarray, dict[str, object]]:
        super().reset(seed=seed)
        self.left = int(self.np_random.choice([1, 19]))
        return self.observation.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, object]]:
        self.left -= 1
        return self.observation.copy(), self.reward, self.left == 0, False, {}

    def render(self) -> np.ndarray:
        if self.broken:
            raise RuntimeError("no OpenGL")
        return np.full((32, 32, 3), 10 * self.left, np.uint8)


class Unseen(Lengths):
    """Cannot be rendered."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()


gym.register("DriftRLTest/Lengths-v0", lambda **kwargs: Lengths(**kwargs), disable_env_checker=True)
gym.register("DriftRLTest/Unseen-v0", lambda **kwargs: Unseen(**kwargs))


def agent() -> PolicyFlow:
    config = PolicyFlowConfig(n_steps=16, batch_size=16, actor_hidden=(8, 8), critic_hidden=(8, 8))
    return PolicyFlow("MlpPolicy", "DriftRLTest/Lengths-v0", config=config, device="cpu", seed=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = RunSettings("policyflow", "DriftRLTest/Lengths-v0", {}, 1, 0, 16, 16, "cpu", 1, {})
    with new_run(tmp_path_factory.mktemp("runs"), settings) as folder:
        save_agent(agent(), folder / "final.zip")
    return folder


def test_interquartile_mean_against_closed_forms() -> None:
    assert interquartile_mean([3.0]) == 3.0
    assert interquartile_mean([1.0, 3.0]) == 2.0
    # n = 3: the middle half is 1.5 values wide, the one in the middle whole and its neighbours by a quarter
    assert interquartile_mean([5.0, 0.0, 3.0]) == pytest.approx((0 / 4 + 3 + 5 / 4) / 1.5)
    # a linear quantile function: the middle half has the mean of the whole
    assert interquartile_mean(np.arange(7.0)) == pytest.approx(3.0)
    # n = 6: the middle half is 3 values wide, the 2 in the middle whole and their neighbours by half
    assert interquartile_mean([0, 10, 20, 40, 80, 900]) == pytest.approx((10 / 2 + 20 + 40 + 80 / 2) / 3)
    sample = np.random.default_rng(0).standard_cauchy((5, 24))
    np.testing.assert_allclose(interquartile_mean(sample), stats.trim_mean(sample, 0.25, axis=-1))


def test_bootstrap_interval_of_a_mean() -> None:
    sample = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = bootstrap_interval(sample, lambda x: x.mean(axis=-1), level=0.9, rng=np.random.default_rng(1))
    half = stats.norm.ppf(0.95) * sample.std() / np.sqrt(sample.size)  # the bootstrap's own normal limit
    assert low == pytest.approx(sample.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(sample.mean() + half, abs=0.05 * half)


def test_bootstrap_interval_of_two_values() -> None:
    # resamples of (0, 1) have the means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4
    def mean(x: np.ndarray) -> np.ndarray:
        return np.asarray(x.mean(axis=-1))

    assert bootstrap_interval([0.0, 1.0], mean, level=0.95, rng=np.random.default_rng(0)) == (0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], mean, level=0.3, rng=np.random.default_rng(0)) == (0.5, 0.5)


def test_statistics_refuse_what_has_none() -> None:
    with pytest.raises(ValueError, match="got no values"):
        interquartile_mean([])
    with pytest.raises(ValueError, match="got values of shape"):
        bootstrap_interval([], interquartile_mean, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="level: got 1"):
        bootstrap_interval([1.0], interquartile_mean, level=1, rng=np.random.default_rng(0))


def test_short_episodes_are_not_over_represented() -> None:
    result = evaluate_agent(agent(), "DriftRLTest/Lengths-v0", {}, 203, 0, sample=False)
    assert len(result.returns) == 203
    assert result.returns == result.lengths
    assert 0.4 < np.mean(np.array(result.lengths) == 1) < 0.6  # 0.95 of the first 203 to end would be short


def test_same_seed_same_result() -> None:
    first, second, other = (
        evaluate_agent(agent(), "DriftRLTest/Lengths-v0", {}, 30, seed, sample=True) for seed in (5, 5, 6)
    )
    assert first == second
    assert first != other


def test_both_policies_by_default(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--episodes", "4", "--json", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    assert "final.zip" in out
    assert "95 % interval" in out
    report = json.loads((tmp_path / "out.json").read_text())
    for mode in ("deterministic", "sampled"):
        assert mode in out
        row = report[mode]
        assert len(row["returns"]) == 4
        assert row["mean"] == pytest.approx(np.mean(row["returns"]))
        assert row["median"] == pytest.approx(np.median(row["returns"]))
        assert row["iqm_low"] <= row["iqm"] <= row["iqm_high"]


def test_json_on_stdout_is_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--episodes", "1", "--sample", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "sampled" in report
    assert "deterministic" not in report


@pytest.mark.parametrize(("options", "inputs"), [([], 1), (["--sample"], 2)])
def test_export_writes_the_policy_that_is_evaluated(
    run: Path, tmp_path: Path, options: list[str], inputs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "policy.pt2"
    assert main([str(run), "--episodes", "1", "--export", str(path), *options]) == 0
    assert f"policy to {path}" in capsys.readouterr().out
    program = torch.export.load(path)
    assert len(program.graph_signature.user_inputs) == inputs
    if inputs == 1:
        obs = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
        got = program.module()(obs=torch.from_numpy(obs))
        np.testing.assert_allclose(got, load_agent(run, "cpu").predict(obs, deterministic=True)[0], atol=1e-5)


def test_saved_files(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run / "final.zip"), "--episodes", "1"]) == 0  # config.json beside it tells the environment
    lone = tmp_path / "lone.zip"
    shutil.copy(run / "final.zip", lone)
    (tmp_path / "config.json").write_text('{"of": "another program"}')
    assert main([str(lone), "--episodes", "1", "--env", "DriftRLTest/Lengths-v0"]) == 0
    capsys.readouterr()
    assert main([str(lone), "--episodes", "1"]) == 2
    assert "add --env ID" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--episodes", "0"], "episodes: got 0"),
        (["--episodes", "x"], "argument --episodes: got x, expected an integer"),
        (["--seed", "-1"], "seed: got -1"),
        (["--seed", "99999999999"], "seed: got 99999999999, expected an integer of 0 .. 2**31 - 1"),
        (["--json", "."], "json: got the folder ., expected a file"),
        (["--json", ""], "json: got the folder ., expected a file"),
        (["--json", "missing/out.json"], "json: got missing/out.json, expected a file in an existing folder"),
        (["--video", "missing/out.mp4"], "video: got missing/out.mp4, expected a file in an existing folder"),
        (["--video", "out.mp4", "--env", "DriftRLTest/Unseen-v0"], "has the render modes none, expected rgb_array"),
        (["--env", "InvertedPendulum-v5"], "expected Box(-1.0, 1.0, (2,)"),
        (["--env", "CartPole-v1"], "unsupported action space"),
        (["--export", "missing/out.onnx"], "export: got missing/out.onnx, expected a file in an existing folder"),
        (["--export", "out.pt2", "--env", "Pendulum-v1"], "observation_space of Pendulum-v1: got "),
        (["--export", "out.pt"], "export: got out.pt, expected a name that ends in .onnx or .pt2"),
        (["--video", "out.avi"], "expected a name that ends in .mp4"),
        (["--plot", "out"], "plot: nothing to draw for DriftRLTest/Lengths-v0"),
        (["--start", "0", "0"], "start: DriftRLTest/Lengths-v0 has no choice of it"),
        (["--video", "out.mp4", "--env-kwargs", "broken=true"], "no OpenGL"),
    ],
)
def test_bad_input_is_one_line(
    run: Path, tmp_path: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate_module, "choose_renderer", lambda: None)
    assert main([str(run), *args]) == 2
    out, error = capsys.readouterr()
    assert "95 % interval" not in out  # before any episode
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("reward", np.nan, "non-finite return: got nan from episode 1 of DriftRLTest/Lengths-v0"),
        ("reward", -np.inf, "non-finite return: got -inf from episode 1 of DriftRLTest/Lengths-v0"),
        ("observation", np.array([0, np.inf], np.float32), "non-finite observation: got inf from DriftRLTest/Len"),
    ],
)
@pytest.mark.parametrize("video", [False, True])
def test_wrong_numbers_end_the_evaluation(
    run: Path, tmp_path: Path, name: str, value: object, message: str, video: bool,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Lengths, name, value)
    monkeypatch.setattr(evaluate_module, "choose_renderer", lambda: None)
    options = ["--video", str(tmp_path / "out.gif")] if video else []
    assert main([str(run), "--episodes", "2", "--json", str(tmp_path / "out.json"), *options]) == 2
    out, error = capsys.readouterr()
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert "nan" not in out
    assert not list(tmp_path.glob("*.json*"))


def test_options_may_come_first(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args in (
        ["--episodes", "1", "--env-kwargs", "broken=true", str(run)],
        ["--env-kwargs", "broken=true", str(run), "--episodes", "1"],
        ["--env-kwargs", "broken=true", "--episodes", "1", str(run)],
        ["--episodes", "1", str(run), "--env-kwargs", "broken=true"],
    ):
        assert main([*args, "--sample", "--json", str(tmp_path / "out.json")]) == 0
        assert json.loads((tmp_path / "out.json").read_text())["env_kwargs"] == {"broken": True}
        assert "; 1 episode each\n" in capsys.readouterr().out
    assert main(["--episodes", "1"]) == 2
    assert "got no RUN_OR_FILE" in capsys.readouterr().err


def test_missing_and_foreign_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.zip").write_text("hello")
    assert main([str(tmp_path / "missing")]) == 2
    assert "no such run" in capsys.readouterr().err
    assert main([str(tmp_path / "text.zip"), "--env", "Pendulum-v1"]) == 2
    assert "no checkpoint" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO")  # imageio leaves the pipes to ffmpeg open
def test_video_shows_one_episode(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imageio = pytest.importorskip("imageio.v2")
    monkeypatch.setattr(evaluate_module, "choose_renderer", lambda: None)
    video = tmp_path / "out.mp4"
    assert main([str(run), "--episodes", "1", "--video", str(video)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    with imageio.get_reader(video) as reader:
        frames = [int(frame.mean()) for frame in reader]
    assert len(frames) in (2, 20)  # a frame before the first step and one after each
    assert frames[-1] == pytest.approx(0, abs=3)
    assert frames[0] == pytest.approx(10 * (len(frames) - 1), abs=5)


@pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO")
def test_a_video_of_an_episode_without_end_is_cut_off(goal_run: Path, tmp_path: Path) -> None:
    imageio = pytest.importorskip("imageio.v2")
    kwargs = {"max_episode_steps": -1, "start": (0, 0)}  # the goals are equally far: the policy stays
    record_video(
        load_agent(goal_run), "driftrl/MultiGoal-v0", kwargs, tmp_path / "out.gif", 0, sample=False, max_steps=5
    )
    assert len(imageio.mimread(tmp_path / "out.gif")) in (1, 6)  # equal pictures may be one


def test_camera_follows_the_body() -> None:
    env = gym.make("HalfCheetah-v5", render_mode="rgb_array")
    renderer = env.unwrapped.mujoco_renderer  # type: ignore[attr-defined]
    assert renderer.camera_id == -1
    follow_with_camera(env)
    assert renderer.model.cam(renderer.camera_id).name == "track"
    follow_with_camera(gym.make("Pendulum-v1"))  # nothing to follow, and no error


@pytest.fixture(scope="module")
def goal_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an untrained policy, whose deterministic action is zero."""
    settings = RunSettings("policyflow", "driftrl/MultiGoal-v0", {}, 1, 0, 16, 16, "cpu", 1, {})
    with new_run(tmp_path_factory.mktemp("runs"), settings) as folder:
        config = PolicyFlowConfig(n_steps=16, batch_size=16, actor_hidden=(8, 8), critic_hidden=(8, 8))
        agent = PolicyFlow("MlpPolicy", "driftrl/MultiGoal-v0", config=config, device="cpu", seed=0)
        save_agent(agent, folder / "final.zip")
    return folder


def test_goals_are_reported(goal_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    assert main([str(goal_run), "--episodes", "1", "--start", "5", "0", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    goals = report["deterministic"]["multimodality"]
    assert (goals["reached"], goals["goals_found"], goals["fractions"][0]) == (1, 1, 1)
    assert goals["return_mean"] == pytest.approx(100 * 0.2, rel=1e-6)  # it stays where it is
    assert report["sampled"]["multimodality"]["return_mean"] < 20
    assert "1000 trajectories of up to 100 steps from (5, 0)" in capsys.readouterr().out


def test_pictures_are_written(goal_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib_image = pytest.importorskip("matplotlib.image")
    monkeypatch.setattr(pictures, "_ACTIONS", 100)
    folder = tmp_path / "new" / "pictures"
    assert main([str(goal_run), "--episodes", "1", "--plot", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {
        f"multigoal_{kind}.png" for kind in ("trajectories", "actions", "velocity")
    }
    for path in folder.iterdir():
        height, width, _ = matplotlib_image.imread(path).shape
        assert height > 300 and width > 500


def test_pictures_of_an_agent_without_a_flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("gymnasium_robotics")
    monkeypatch.setattr(pictures, "_ACTIONS", 100)
    id, env_kwargs = "driftrl/PointMazeMedium-v0", {"max_episode_steps": 5}
    agent = LipschitzMBPO("MultiInputPolicy", make_vec(id, 1, 0), device="cpu")
    written = pictures.draw_pictures(agent, agent, id, env_kwargs, (0, 0), 0, tmp_path)
    assert [path.name for path in written] == ["pointmazemedium_trajectories.png", "pointmazemedium_actions.png"]
    assert sorted(written) == sorted(tmp_path.iterdir())


def test_pictures_of_obstacles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(pictures, "_ACTIONS", 100)
    agent = PolicyFlow("MlpPolicy", make_vec("driftrl/Avoid-v0", 1, 0), n_steps=16, batch_size=16, device="cpu")
    written = pictures.draw_pictures(agent, agent, "driftrl/Avoid-v0", {}, (0, 0), 0, tmp_path)
    assert [path.stem for path in written] == [f"avoid_{kind}" for kind in ("trajectories", "actions", "velocity")]


@pytest.mark.parametrize(
    ("option", "module", "extra"),
    [("--video=a.mp4", "imageio", "video"), ("--export=a.onnx", "onnx", "export"), ("--plot=out", "matplotlib", "plot"),
     ("--record=data-v0", "h5py", "data")],
)  # fmt: skip
def test_a_missing_package_is_named_before_anything_is_loaded(
    option: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["nowhere", option]) == 2
    name = option.partition("=")[0].removeprefix("--")
    error = f"error: {name}: {module} is not installed; run pip install 'driftrl[{extra}]'\n"
    assert capsys.readouterr().err == error


def test_missing_matplotlib_is_named(
    goal_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([str(goal_run), "--plot", str(tmp_path / "out")]) == 2
    assert "pip install 'driftrl[plot]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    assert main([str(goal_run), "--plot", str(tmp_path / "file")]) == 2
    assert f"plot: got the file {tmp_path / 'file'}, expected a folder" in capsys.readouterr().err
