import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from driftrl.agents.registry import AGENTS
from driftrl.commands import train, training
from driftrl.commands.config_file import read_config_file, read_names
from driftrl.runs.fields import made_of
from driftrl.runs.folder import load_agent, read_settings

YAML = """
env: InvertedPendulum-v5
n-envs: 2
total_timesteps: 1e2
device: cpu
seed: 4
compile: off            # a boolean for YAML
learning_rate: 1e-3     # text for YAML
actor_hidden: [8, 8]
config: {critic_hidden: [8, 8], n_steps: 16, batch_size: 16, n_epochs: 2}
"""


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "_FINAL_EPISODES", 1)


def run(root: str) -> Path:
    (folder,) = Path(root).glob("*/*/*")
    return folder


def test_a_file_sets_what_flags_set_and_flags_come_after_it() -> None:
    Path("run.yaml").write_text(YAML)
    assert train.main(["policyflow", "--config", "run.yaml", "--n-steps", "8", "--run-dir", "file"]) == 0
    flags = "--env InvertedPendulum-v5 --n-envs 2 --total-timesteps 100 --device cpu --seed 4 --compile off"
    flags += " --learning-rate 0.001 --actor-hidden 8 8 --critic-hidden 8 8 --n-steps 8 --batch-size 16 --n-epochs 2"
    assert train.main(["policyflow", *flags.split(), "--run-dir", "flags"]) == 0
    assert read_settings(run("file")) == read_settings(run("flags"))
    assert (read_settings(run("file")).config["n_steps"], read_settings(run("file")).seed) == (8, 4)


def test_the_config_of_a_run_repeats_it_to_the_last_bit() -> None:
    Path("run.yaml").write_text(YAML)
    assert train.main(["policyflow", "--config", "run.yaml", "--run-dir", "first"]) == 0
    first = run("first")
    assert train.main(["--config", str(first), "--run-dir", "second"]) == 0  # names its agent itself
    assert train.main(["policyflow", f"--config={first / 'config.json'}", "--seed", "5", "--run-dir", "third"]) == 0
    policies = [load_agent(run(root) / "final.zip", "cpu").get_parameters()["policy"] for root in ("first", "second")]
    assert all(torch.equal(policies[0][name], policies[1][name]) for name in policies[0])
    assert read_settings(run("third")).seed == 5
    assert read_settings(run("third")).config == read_settings(first).config


@pytest.mark.parametrize("name", AGENTS)
def test_every_preset_survives_json(name: str) -> None:
    entry = AGENTS[name]
    for preset, env_id in ((preset, each) for preset, ids in entry.presets.items() for each in (*ids, "none-v0")):
        config = entry.settings(env_id, preset)[1]
        assert made_of(entry.config, json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "gama: 0.9", "a.yaml: gama: unknown key; did you mean gamma?"),
        ("a.yaml", "zzzz: 1", "a.yaml: zzzz: unknown key; train.py AGENT --help-all lists them"),
        ("a.yaml", "gamma: 2", "a.yaml: gamma: got 2.0, expected a number in [0, 1]"),
        ("a.yaml", "gamma: high", "a.yaml: gamma: got 'high', expected a number"),
        ("a.yaml", "n_envs: 1.5", "a.yaml: n_envs: got 1.5, expected an integer"),
        ("a.yaml", "n_envs: 0", "a.yaml: n_envs: got 0, expected an integer of at least 1"),
        ("a.yaml", "n_envs: true", "a.yaml: n_envs: got True, expected an integer"),
        ("a.yaml", "device: tpu", "a.yaml: device: got 'tpu', expected auto or cpu or cuda"),
        ("a.yaml", "actor_hidden: 8", "a.yaml: actor_hidden: got 8, expected a list of an integer"),
        ("a.yaml", "gamma: 0.9\ngamma: 0.8", "a.yaml: no YAML that we can read: gamma stands there twice"),
        ("a.yaml", "gamma: [", "a.yaml: no YAML that we can read: while parsing"),
        ("a.yaml", "- gamma", "a.yaml: got a list, expected names with values"),
        ("a.yaml", "", "a.yaml: the file is empty, expected names with values"),
        ("a.yaml", "word", "a.yaml: got 'word', expected names with values"),
        ("a.json", " ", "a.json: the file is empty, expected names with values"),
        ("a.yaml", "x: !!python/object/apply:os.system ['touch pwned']", "could not determine a constructor"),
        ("a.yaml", "gamma: 1\nconfig: {gamma: 1}", "a.yaml: gamma: got it twice"),
        ("a.yaml", "seed: 1\nseeds: [1, 2]", "a.yaml: seed: got it and seeds, expected one of them"),
        ("a.yaml", "seeds: [1, 1]", "a.yaml: seeds: got 1 more than once"),
        ("a.yaml", "eval_episodes: 3", "a.yaml: eval_episodes: got 3, which changes nothing without eval_interval"),
        ("a.yaml", "versions: {}\nagent: mbpo", "a.yaml: agent: got mbpo, but the command is for policyflow"),
        ("a.yaml", "n_steps: 8\nn-steps: 9", "a.yaml: n-steps: got it twice, as n_steps in two spellings"),
        ("a.yaml", "env: A-v0\nenv_id: B-v0", "a.yaml: env_id: got it twice, as env in two spellings"),
        ("a.json", '{"n-envs": 1, "config": {"n_envs": 2}}', "a.json: n_envs: got it twice, as n_envs in two"),
        ("a.yaml", "? [a]\n: 1", "a.yaml: no YAML that we can read: while constructing a mapping"),
        ("a.yaml", "agent: [policyflow]", "a.yaml: agent: got ['policyflow'], expected policyflow or mbpo"),
        ("a.yaml", "{1: 2, a: 3, config: {1: 2, a: 3}}", "a.yaml: 1: got it twice, expected it in config or beside it"),
        ("a.yaml", "gamma: !!bool x", "a.yaml: no YAML that we can read"),
        ("a.yaml", "gamma: !!timestamp x", "a.yaml: no YAML that we can read"),
        ("a.yaml", "env_kwargs: {x: 2020-01-01}", "a.yaml: env_kwargs: got {'x': datetime.date(2020, 1, 1)}, expected"),
        ("a.yaml", "<<: {gamma: 1}\ngamma: 1\ngamma: 2", "a.yaml: no YAML that we can read: gamma stands there twice"),
        ("a.json", '{"gama": 1}', "a.json: gama: unknown key; did you mean gamma?"),
        ("a.json", '{"gamma": 1, "gamma": 1}', "a.json: no JSON that we can read: gamma stands there twice"),
        ("a.json", "{", "a.json: no JSON that we can read"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_in_one_line(
    name: str, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(name).write_text(content)
    assert train.main(["policyflow", "--config", name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert [each.name for each in Path().iterdir()] == [name]


def test_a_file_that_is_not_there_or_names_no_agent(capsys: pytest.CaptureFixture[str]) -> None:
    Path("group").mkdir()
    Path("group/group.json").write_text('{"runs": ["s0"]}')
    for args, message in (
        (["policyflow", "--config", "missing.yaml"], "config: got missing.yaml, expected a .yaml or .json file"),
        (["policyflow", "--config", "."], "config: got ., expected a .yaml or .json file, or a run folder"),
        (
            ["policyflow", "--config", "group"],
            "config: got group, a group of runs, expected one of them, such as group/s0",
        ),
        (["policyflow", "--config"], "expected one argument"),
    ):
        assert train.main(args) == 2
        assert message in capsys.readouterr().err
    Path("a.yaml").write_text("gamma: 0.9")
    assert train.main(["--config", "a.yaml"]) == 2
    assert "a.yaml: agent: got none, expected policyflow or mbpo, there or in the command" in capsys.readouterr().err


def test_flags_replace_the_seeds_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.json").write_text(json.dumps({"agent": "policyflow", "seeds": [1, 2], "jobs": 2, "env_kwargs": {"g": 9}}))
    file = read_config_file(Path("a.json"), None)
    assert file.run == {"seeds": (1, 2), "jobs": 2, "env_kwargs": ('{"g": 9}',)}
    begun: list[Any] = []

    def begin(*arguments: Any) -> int:
        begun.append(arguments)
        return 0

    monkeypatch.setattr(train, "train_group", begin)
    assert train.main(["--config", "a.json", "--env", "Pendulum-v1", "--seeds", "3", "4"]) == 0
    (group,) = Path("runs").glob("*/*/*/group.json")
    assert json.loads(group.read_text()) == {"runs": ["s3", "s4"]}
    assert begun == [(group.parent, 2)]
    assert read_settings(group.parent / "s3").env_kwargs == {"g": 9}


def test_options_by_their_former_names_are_read() -> None:
    Path("old.yaml").write_text("env: InvertedPendulum-v5\nguard: rollback\nbrownian_coef: 0.1\nsampler: sde\n")
    fields = read_config_file(Path("old.yaml"), "policyflow").fields
    assert fields == {"on_collapse": "rollback", "spread_coef": 0.1, "langevin_eps": 0.1}
    Path("both.yaml").write_text("guard: rollback\non_collapse: warn\n")
    with pytest.raises(ValueError, match=r"both\.yaml: guard: got it and on_collapse, its present name"):
        read_config_file(Path("both.yaml"), "policyflow")
    for name, agent in (("policyflow_paper", "policyflow"), ("mbpo", "mbpo")):
        folder = Path(__file__).parents[1] / "runs" / "last_release" / name
        assert read_config_file(next(folder.rglob("config.json")), agent).is_of_a_run


def test_merge_keys_of_yaml_are_read_and_own_names_win() -> None:
    Path("a.yaml").write_text("<<: {gamma: 0.5, n_steps: 32}\ngamma: 0.9\n")
    assert read_config_file(Path("a.yaml"), "policyflow").fields == {"gamma": 0.9, "n_steps": 32}
    chain = "a: &a {g: 1}\nb: {c: &c {<<: *a, g: 2}}\nd: {<<: *c}\n"
    Path("b.yaml").write_text(chain)
    assert read_names(Path("b.yaml")) == {"a": {"g": 1}, "b": {"c": {"g": 2}}, "d": {"g": 2}}
