"""What the findings say of rows whose truth is known, and of runs that lack something."""

import shlex

import numpy as np
import pytest
from samples import HOSTILE, recipe, sample, scored

from trimtab import config, findings
from trimtab.findings import Scored, StepLoss


def rows(probabilities: list[list[float]], labels: list[int]) -> Scored:
    n = len(labels)
    places = [f"a.csv:{i + 2}" for i in range(n)]
    return Scored([f"row {i}" for i in range(n)], places, np.array(labels, np.int64), np.array(probabilities))


class TestMistakes:
    def test_the_surest_wrong_answers_come_first_and_all_are_counted(self) -> None:
        some = rows([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.7, 0.3]], [1, 1, 1, 0])
        mistakes, n = findings.worst_mistakes(some)
        assert [(one.text, one.place, one.label, one.answer, one.confidence) for one in mistakes] == [
            ("row 1", "a.csv:3", 1, 0, 0.9),
            ("row 0", "a.csv:2", 1, 0, 0.6),
        ]
        assert n == 2

    def test_twenty_are_shown_of_many(self) -> None:
        mistakes, n = findings.worst_mistakes(rows([[1.0, 0.0]] * 50, [1] * 50))
        assert (len(mistakes), n) == (20, 50)

    def test_pairs_count_both_directions(self) -> None:
        answers = np.eye(3)[[1, 1, 0, 2, 2, 0]]
        found = findings.confused_pairs(rows(answers.tolist(), [0, 0, 1, 2, 1, 0]), 3)
        assert [(one.first, one.second, one.first_as_second, one.second_as_first) for one in found] == [
            (0, 1, 2, 1),
            (1, 2, 1, 0),
        ]
        assert findings.confused_pairs(rows([[0.1, 0.9]], [0]), 2) == (), "the matrix of two labels says it all"


class TestLabelDoubts:
    def test_a_threshold_is_the_mean_probability_over_the_rows_labelled_so(self) -> None:
        # Label 0: mean 0.7 over its three rows. The last two rows are labelled 1 and answered 0, with 0.75 and 0.65.
        some = rows([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.1, 0.9], [0.75, 0.25], [0.65, 0.35]], [0, 0, 0, 1, 1, 1])
        doubts, n = findings.label_doubts(some)
        # Row 2 is answered 1 with 0.6; the threshold of label 1 is (0.9 + 0.25 + 0.35) / 3 = 0.5.
        assert [(one.example.text, round(one.threshold, 6)) for one in doubts] == [("row 4", 0.7), ("row 2", 0.5)]
        assert n == 2

    def test_a_label_without_rows_disputes_none(self) -> None:
        assert findings.label_doubts(rows([[0.1, 0.0, 0.9], [0.2, 0.7, 0.1]], [0, 1])) == ((), 0)


class TestCalibration:
    def test_bins_are_open_below_and_closed_above(self) -> None:
        bins = findings.confidence_bins(np.array([[1.0, 0.0], [0.5, 0.5], [0.8, 0.2]]), np.array([0, 1, 0]))
        assert [(i, one.rows, one.accuracy) for i, one in enumerate(bins) if one.rows] == [
            (7, 1, 0.0),
            (11, 1, 1.0),
            (14, 1, 1.0),
        ]
        assert findings.calibration_error(bins) == pytest.approx((0.5 + 0.2 + 0.0) / 3)

    def test_every_row_is_in_one_bin(self) -> None:
        some = scored(1_000, 5)
        assert sum(one.rows for one in findings.confidence_bins(some.probabilities, some.labels)) == 1_000

    def test_the_errors_are_those_of_the_metrics_and_the_diagram_has_both_sides(self) -> None:
        found = sample(temperature=1.3).calibration
        assert found is not None
        assert (found.error_before, found.error_after, found.temperature) == (0.081, 0.022, 1.3)
        assert found.before != found.after
        alone = sample(temperature=0.0).calibration
        assert alone is not None
        assert alone.after == ()
        assert alone.error_before == findings.calibration_error(alone.before)


class TestMatrix:
    @pytest.mark.parametrize("classes", [2, 12, 13, 77])
    def test_it_counts_every_row_and_says_what_is_left_out(self, classes: int) -> None:
        found = sample(2_000, classes).matrix
        assert found is not None
        assert sum(map(sum, found.counts)) == 2_000
        assert len(found.shown) == min(classes, 12)
        assert found.left_out == classes - len(found.shown)
        assert found.left_out_rows == (sum(found.counts[-1]) if found.left_out else 0)

    def test_the_labels_with_most_mistakes_are_shown(self) -> None:
        answers = np.arange(20)
        answers[[3, 17]] = [17, 3]
        found = sample(20, 20, scored=rows(np.eye(20)[answers].tolist(), list(range(20)))).matrix
        assert found is not None
        assert {3, 17} <= set(found.shown)

    def test_examples_lie_in_their_cells_and_are_bounded(self) -> None:
        some = scored(5_000, 12)
        found = sample(5_000, 12, scored=some).matrix
        assert found is not None
        assert sum(map(len, found.examples.values())) <= 160
        for (i, j), examples in found.examples.items():
            assert {(one.label, one.answer) for one in examples} == {(found.shown[i], found.shown[j])}
            assert found.counts[i][j] >= len(examples)
        mistakes = {(i, j) for i in range(12) for j in range(12) if i != j and found.counts[i][j]}
        assert mistakes <= found.examples.keys(), "every cell of mistakes opens"


class TestContenders:
    def test_the_interval_decides_against_the_commonest_label(self) -> None:
        verdicts = {}
        for share in (0.1, 0.9, 0.999):
            known = sample(baselines=False)
            metrics = {"accuracy": 0.9, "accuracy_ci95": [0.86, 0.93], "majority_accuracy": share}
            changed = _metrics(known) | metrics
            verdicts[share] = [(one.name, one.verdict) for one in sample(metrics=changed).contenders]
        assert verdicts == {
            0.1: [("adapter", ""), ("majority", "better")],
            0.9: [("adapter", ""), ("majority", "not resolved")],
            0.999: [("adapter", ""), ("majority", "worse")],
        }

    def test_the_strongest_baseline_stands_next_to_the_adapter(self) -> None:
        assert [one.name for one in sample().contenders] == ["adapter", "probe", "tfidf", "majority"]

    @pytest.mark.parametrize("baselines", [None, {}, {"tfidf": None}, {"tfidf": {"accuracy": 0.5}}])
    def test_baselines_that_are_missing_are_left_out(self, baselines: object) -> None:
        found = sample(metrics=_metrics(sample()) | {"baselines": baselines})
        assert {one.name for one in found.contenders} >= {"adapter", "majority"}


def _metrics(found: findings.Findings) -> dict[str, object]:
    from samples import all_metrics

    return all_metrics(scored(300, 2, temperature=1.3), [label.value for label in found.labels], baselines=False)


class TestShown:
    def test_it_is_one_line_without_characters_that_act(self) -> None:
        cleaned = findings.shown("a\n\tb\x1b[31m \u202ec\u2028d\x00", 100)
        assert cleaned == "a b\ufffd[31m \ufffdc d\ufffd"

    def test_it_is_cut_with_an_ellipsis_and_never_longer(self) -> None:
        assert findings.shown("abcdef", 6) == "abcdef"
        assert findings.shown("abcdefg", 6) == "abcde…"
        assert findings.shown(" " * 1_000 + "a", 6).endswith("…"), "what is cut away unseen is told too"
        assert all(len(findings.shown(HOSTILE * 9, most)) <= most for most in range(1, 60))

    def test_signs_that_join_others_stay(self) -> None:
        assert findings.shown("👩\u200d🚀 می\u200cخواهم", 30) == "👩\u200d🚀 می\u200cخواهم"


class TestRepeat:
    def test_the_command_gives_the_recipe_again(self) -> None:
        some = recipe(lora__r=16, data__names={"0": "差评/negative", "1": 'a "b"/c'}, train__class_weights="auto")
        words = shlex.split(sample(recipe=some).repeat.command)
        assert words[:5] == ["trimtab", "train", "reviews.csv", "--test", "sealed.csv"]
        settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        again = config.assemble(settings=settings).recipe
        for section in ("data", "lora", "train", "runtime"):
            paths = {"train", "test"} if section == "data" else set()
            assert getattr(again, section).model_dump(exclude=paths) == getattr(some, section).model_dump(exclude=paths)

    def test_an_adapter_to_start_from_is_in_the_command(self) -> None:
        words = shlex.split(sample(recipe=recipe(lora__init_from="/home/a/runs/films")).repeat.command)
        assert words[words.index("lora.init_from=films") - 1] == "--set"

    def test_only_settings_that_differ_are_told(self) -> None:
        told = {key for key, _, _ in sample(recipe=recipe(lora__r=16)).repeat.settings}
        assert "lora.r" in told
        assert not told & {"train.batch_size", "data.train", "base.model", "lora.lora_alpha"}

    def test_a_command_that_nobody_could_type_is_left_out(self) -> None:
        many = tuple(f"/data/{i:05}.csv" for i in range(1_000))
        assert sample(recipe=recipe(data__train=many)).repeat.command == ""


def test_steps_of_a_long_run_are_thinned_and_keep_their_mean() -> None:
    steps = [StepLoss(i, i / 100, float(i % 2)) for i in range(1, 10_001)]
    found = sample(steps=steps).steps
    assert len(found) <= 200
    assert found[-1].step == 10_000
    assert {one.loss for one in found} == {0.5}


def test_what_lasts_knows_neither_clock_nor_place() -> None:
    here = sample()
    metrics = dict.fromkeys(("load_seconds", "train_seconds", "total_seconds", "peak_rss_bytes", "tokens_per_s"), 9.9)
    there = sample(
        metrics=_all(here) | metrics,
        started=1.0,
        run="/elsewhere/b",
        steps=(),
        environment={"versions": dict(here.repeat.versions), "cores": 64, "device": "cuda"},
    )
    assert here != there
    assert findings.lasting(here) == findings.lasting(there)


def _all(found: findings.Findings) -> dict[str, object]:
    from samples import all_metrics

    return all_metrics(scored(300, 2, temperature=1.3), [label.value for label in found.labels])


def test_paths_in_warnings_become_names() -> None:
    assert sample().warnings[0].startswith("reviews.csv: 3 of the training rows")
