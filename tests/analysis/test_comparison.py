"""Groups, and what is said of them: against SciPy, against numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from driftrl.analysis.comparison import Section, compare, settings_table
from driftrl.analysis.comparison_tables import as_json, csv_rows, format_section
from driftrl.analysis.logs import Curve
from driftrl.analysis.records import Record
from driftrl.analysis.statistics import improvement_interval, probability_of_improvement

RNG = np.random.default_rng(0)
RETURNS = st.lists(st.integers(-5, 5), min_size=1, max_size=8)


def record(score: float | None = 1.0, seed: int | None = 0, **fields: Any) -> Record:
    """A complete run of 300 steps, whose training return climbs to its score within them."""
    end = 1.0 if score is None or not math.isfinite(score) else score
    line = Curve(np.array([100.0, 200.0, 300.0]), np.array([0.0, end / 2, end]), np.array([1.0, 2.0, 3.0]))
    standard: dict[str, Any] = {
        "folder": Path(f"/runs/{seed}"), "agent": "ppo", "env_id": "Hopper-v5", "settings": {"gamma": 0.9, "lr": 1},
        "curves": {"training": line}, "steps": 300, "complete": True,
    }  # fmt: skip
    return Record(seed=seed, evaluation=score, **(standard | fields))


def only(records: list[Record], **options: Any) -> Section:
    sections, problems = compare(records, **options)
    assert len(sections) == 1 and problems == []
    return sections[0]


@given(RETURNS, RETURNS)
def test_probability_of_improvement_is_that_of_mann_and_whitney(x: list[int], y: list[int]) -> None:
    u = mannwhitneyu(x, y, method="asymptotic").statistic if len({*x, *y}) > 1 else len(x) * len(y) / 2
    assert probability_of_improvement(x, y) == pytest.approx(u / (len(x) * len(y)))
    assert probability_of_improvement(y, x) == pytest.approx(1 - probability_of_improvement(x, y))


def test_interval_of_the_probability_of_improvement() -> None:
    assert improvement_interval([3, 4], [1, 2], rng=np.random.default_rng(0)) == (1, 1)
    low, high = improvement_interval([1, 2, 3, 4], [1, 2, 3, 4], rng=np.random.default_rng(0))
    assert 0 <= low < 0.5 < high <= 1


def test_seeds_are_one_group_and_settings_tell_groups_apart() -> None:
    runs = [record(seed=seed, settings={"gamma": gamma, "lr": 1}) for gamma in (0.9, 0.99) for seed in (2, 0, 1)]
    section = only([*runs, record(agent="sac", settings={"tau": 0.1})])
    assert [group.name for group in section.groups] == ["ppo gamma=0.9", "ppo gamma=0.99", "sac"]
    assert [run.record.seed for run in section.groups[0].runs] == [0, 1, 2]
    assert settings_table(section) == [("gamma", ["0.9", "0.99", "-"])]  # tau is sac's alone, lr the same in both


def test_a_setting_that_only_one_run_has_tells_groups_apart() -> None:
    section = only([record(), record(settings={"gamma": 0.9, "lr": 1, "new": 2})])
    assert [group.name for group in section.groups] == ["ppo new=-", "ppo new=2"]


def test_long_names_become_numbers() -> None:
    settings = [{f"setting_{i}": value for i in range(9)} for value in (1, 2)]
    assert [g.name for g in only([record(settings=each) for each in settings]).groups] == ["ppo #1", "ppo #2"]


def test_trials_of_a_search_are_named_as_their_folders_and_numbered_in_a_wide_table() -> None:
    settings = [{f"setting_{i}": i + j / 7 for i in range(9)} for j in range(3)]
    section = only([record(settings=each, group=f"trial-000{i}") for i, each in enumerate(settings)])
    assert [g.name for g in section.groups] == ["ppo trial-0000", "ppo trial-0001", "ppo trial-0002"]
    text = format_section(section)
    assert "0.1429" in text and "0.14285714" not in text
    assert "setting that differs  ppo trial-0000" in text
    many = only([record(settings={"a": i, "b": i}, name=f"a group of a rather long name, {i}") for i in range(4)])
    text = format_section(many)
    assert "(4) a group of a rather long name, 3  1 of 1" in text
    assert max(map(len, text[text.index("setting that") :].partition("\n\n")[0].splitlines())) < 60


def test_numbers_are_shortened_only_where_that_tells_them_apart() -> None:
    section = only([record(settings={"lr": value}) for value in (0.1234567, 0.1234568)])
    assert settings_table(section) == [("lr", ["0.1234567", "0.1234568"])]


def test_a_group_whose_runs_differ_shows_all_values() -> None:
    runs = [record(seed=seed, settings={"steps": steps}, name="x") for seed, steps in enumerate((9000, 2000, 9000))]
    assert settings_table(only([*runs, record(settings={"steps": 9000}, name="y")])) == [
        ("steps", ["9000, 2000", "9000"])
    ]


def test_without_curves_a_note_says_why_there_is_no_threshold() -> None:
    section = only([record(curves={})])
    assert any(note.startswith("no threshold: no complete run has a") for note in section.notes)
    assert "reached the threshold  steps to it" in format_section(section)
    assert "0 of 1" not in format_section(section)


def test_a_note_says_that_curves_and_evaluations_are_two_measures() -> None:
    says = "curves and threshold are of the return while training"
    assert any(note.startswith(says) for note in only([record()]).notes)
    assert not any(note.startswith(says) for note in only([record()], measure="training").notes)


def test_logs_that_do_not_tell_their_end_are_not_called_complete() -> None:
    section = only([record(tells_its_end=False), record(seed=1), record(seed=2, complete=False)])
    (group,) = as_json([section], [])["sections"][0]["groups"]
    assert [run["state"] for run in group["runs"]] == ["not known", "complete", "unfinished"]


def test_evaluations_are_those_while_training_and_the_last() -> None:
    while_training = Curve(np.array([100.0, 200.0]), np.array([5.0, 6.0]), np.full(2, np.nan))
    curves = {"training": record().curves["training"], "evaluation": while_training}
    assert record(7.0, curves=curves).evaluations() == [(100, 5), (200, 6), (300, 7)]
    assert record(6.0, curves=curves, steps=200).evaluations() == [(100, 5), (200, 6)]
    assert record(None).evaluations() == []


def test_iqm_interval_and_times() -> None:
    section = only([record(score, seed) for seed, score in enumerate((1.0, 2.0, 3.0, 10.0))], threshold=1.0)
    (group,) = section.groups
    assert group.iqm == 2.5  # the middle two of four
    assert group.interval is not None and 1 <= group.interval[0] < 2.5 < group.interval[1] <= 10
    assert [run.reached for run in group.runs] == [(300, 3), (200, 2), (200, 2), (200, 2)]
    assert (group.steps, group.seconds) == (200, 2)
    assert group.mean is not None and group.mean[-1, :2].tolist() == [300, 2.5]


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=3))
def test_over_half_of_the_runs_of_each_group_reach_the_threshold(scores: list[list[int]]) -> None:
    section = only([record(score, name=str(i)) for i, each in enumerate(scores) for score in each])
    for group in section.groups:
        assert 2 * sum(run.reached is not None for run in group.runs) > len(group.runs)
        assert math.isfinite(group.steps) and math.isfinite(group.seconds)


def test_where_half_of_the_runs_never_reach_the_threshold_the_group_does_not() -> None:
    section = only([record(score, name=name) for name, score in (("a", 5), ("b", 4), ("b", 1), ("b", 1))], threshold=2)
    assert [group.steps for group in section.groups] == [200, math.inf]
    assert "not reached" in format_section(section) and "1 of 3" in format_section(section)


def test_unfinished_runs_are_shown_and_do_not_count() -> None:
    section = only([record(2.0), record(None, seed=1, complete=False)])
    (group,) = section.groups
    assert (group.iqm, len(group.runs), group.interval) == (2.0, 2, None)
    assert "note: ppo, seed 1: unfinished, at 300 steps; does not count" in format_section(section)
    assert "one run only, so no interval" in format_section(section)


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_return_that_is_not_finite_does_not_count(score: float) -> None:
    section = only([record(2.0), record(4.0, seed=1), record(score, seed=2)])
    assert section.groups[0].iqm == 3.0
    assert f"ppo, seed 2: its return is {score}; does not count" in section.notes
    assert as_json([section], [])["sections"][0]["groups"][0]["runs"][2]["score"] is None


def test_a_setting_that_is_not_finite_is_text_in_json() -> None:
    section = only([record(settings={"target": math.inf, "limits": [math.nan, 1]})])
    (group,) = as_json([section], [])["sections"][0]["groups"]
    assert group["settings"] == {"target": "Infinity", "limits": ["NaN", 1]}


def test_text_and_number_are_told_apart_within_an_agent() -> None:
    section = only([record(settings={"x": value}) for value in ("1", 1)])
    assert [group.name for group in section.groups] == ['ppo x="1"', "ppo x=1"]
    assert settings_table(section) == [("x", ['"1"', "1"])]
    section = only([record(settings={"x": "1"}), record(agent="other", settings={"x": 1})])  # a log holds text alone
    assert [group.name for group in section.groups] == ["ppo", "other"]
    assert settings_table(section) == []


def test_a_given_name_stays_however_long_it_is() -> None:
    assert only([record(name="n" * 60)]).groups[0].name == "n" * 60


def test_a_run_that_is_not_over_counts_neither_in_scores_nor_in_times() -> None:
    high = Curve(np.array([100.0, 900.0]), np.array([0.0, 9.0]), np.array([1.0, 9.0]))
    low = Curve(np.array([100.0, 900.0]), np.array([0.0, 1.0]), np.array([1.0, 9.0]))
    runs = [record(9.0, curves={"training": high}), record(1.0, seed=1, complete=False, curves={"training": low})]
    (group,) = only(runs, threshold=5.0).groups
    assert (group.scores, group.iqm) == ([9.0], 9.0)
    assert (group.steps, group.seconds) == (900, 9)


def test_without_a_finished_run_there_is_no_iqm() -> None:
    section = only([record(None, complete=False)])
    assert math.isnan(section.groups[0].iqm) and "nan" not in format_section(section)
    assert csv_rows([section])[1][5] == ""


def test_like_is_compared_with_like() -> None:
    section = only([record(50.0), record(None, agent="other")])
    assert section.measure == "training" and "not every run was evaluated" in " ".join(section.notes)
    section = only([record(50.0), record(None, agent="other")], measure="evaluation")
    assert [len(group.scores) for group in section.groups] == [1, 0]
    assert "other, seed 0: no evaluation return; does not count" in section.notes


def test_environments_have_sections_and_a_log_without_one_takes_the_only_one() -> None:
    kwargs = {"frame_skip": 2}
    sections, _ = compare([record(), record(env_id="Ant-v5"), record(env_kwargs=kwargs)])
    assert [section.env for section in sections] == ["Ant-v5", "Hopper-v5", "Hopper-v5 frame_skip=2"]
    section = only([record(), record(env_id=None, seed=1), record(env_id=None, seed=2)])
    assert (
        len(section.groups[0].runs) == 3
        and section.notes.count("logs that do not tell their environment are taken as Hopper-v5") == 1
    )
    sections, problems = compare([record(), record(env_id="Ant-v5"), record(env_id=None)])
    assert len(sections) == 2 and problems == ["/runs/0 does not tell its environment; add --env ID"]
    sections, problems = compare([record(env_id=None)], env="Ant-v5")
    assert sections[0].env == "Ant-v5" and problems == []


def test_a_group_that_mixes_things_says_so() -> None:
    runs = [
        record(seed=0, name="mine", versions={"torch": "1"}),
        record(seed=0, name="mine", settings={"gamma": 0.5, "lr": 1}, versions={"torch": "2"}, steps=900),
    ]
    text = format_section(only(runs))
    for words in ("a seed occurs twice", "differ in gamma", "versions of torch", "300 to 900 steps"):
        assert words in text
