"""What is told of the rows before training: repeats, contradictions, overlap, small classes; and what it changes."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import reviews, write_csv
from hypothesis import given
from hypothesis import strategies as st
from test_training import small
from typer.testing import CliRunner

from trimtab import cli, config, data, evaluation, preflight, training
from trimtab.classification import class_weights
from trimtab.data import Example
from trimtab.resolve import resolve


def rows(*pairs: tuple[str, str]) -> list[Example]:
    return [Example(text, label, "a.csv", line) for line, (text, label) in enumerate(pairs, start=2)]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Good film!", "good  FILM", True),
        ("Good<br />film", "Goodbrfilm", True),
        ("STRASSE", "straße", True),
        ("好看！", "好看", True),
        ("good_film", "good film", True),
        ("good ❤️", "good ❤", True),
        ("दिन", "दान", False),
        ("กา", "กี", False),
        ("good film", "good films", False),
        ("10", "100", False),
        ("!!!", "???", False),
        (":)", " :) ", True),
    ],
)
def test_texts_are_the_same_by_their_letters_and_digits(one: str, other: str, same: bool) -> None:
    assert (data.reduced(one) == data.reduced(other)) == same


def test_repeats_and_contradictions_are_counted() -> None:
    found = preflight.repeats(rows(("Good.", "a"), ("good", "a"), ("GOOD!", "b"), ("bad", "b"), ("good", "b")))
    assert (found.duplicate_rows, found.conflicting_texts) == (2, 1)
    assert found.conflict is not None
    assert [example.line for example in found.conflict] == [2, 4]


def test_overlap_is_told_row_by_row() -> None:
    known, judged = (
        data.Rows(rows(*pairs), [], "text", "label", [])
        for pairs in ([("a film.", "b"), ("more", "a")], [("a Film", "a"), ("another", "b")])
    )
    found = preflight.known_rows(
        {"train": known, "eval": judged}, {"train": known.examples[1:], "eval": judged.examples, "test": known.examples}
    )
    assert {role: flags.tolist() for role, flags in found.items()} == {
        "train": [False],
        "eval": [True, False],  # against the whole file, though its row was not drawn
        "test": [False, False],  # not of a file of its own
    }


def test_test_rows_are_no_judge_where_they_chose() -> None:
    train, judged, test = (
        data.Rows(rows(*pairs), [], "text", "label", [])
        for pairs in (
            [("a film", "b")],
            [("more", "a"), ("A film!", "b")],
            [("More.", "a"), ("a film", "b"), ("c", "b")],
        )
    )
    found = preflight.known_rows(
        {"train": train, "eval": judged, "test": test},
        {"train": train.examples, "eval": judged.examples[1:], "test": test.examples},
    )
    assert found["test"].tolist() == [True, True, False]


WORDS = st.sampled_from(["a", "A!", "b", "c", "d", "e e", "ee", "f"])


@given(st.lists(st.tuples(WORDS, st.sampled_from("xy")), min_size=1))
def test_a_split_never_parts_what_is_the_same(pairs: list[tuple[str, str]]) -> None:
    examples = rows(*pairs)
    train, evaluation = data.split(examples, 0.3, 7)
    assert sorted(train + evaluation, key=lambda e: e.line) == examples
    assert {data.reduced(e.text) for e in train}.isdisjoint(data.reduced(e.text) for e in evaluation)
    assert train


def test_without_repeats_the_split_is_that_of_the_rows() -> None:
    examples = rows(*((f"text {i}", "ab"[i % 2]) for i in range(40)))
    _, evaluation = data.split(examples, 0.1, 42)
    rng = np.random.default_rng(42)
    expected = {int(row) for label in (0, 1) for row in rng.permutation(list(range(label, 40, 2)))[:2]}
    assert {example.line - 2 for example in evaluation} == expected


@pytest.fixture
def overlapping(tmp_path: Path) -> tuple[Path, Path]:
    """96 training rows, and 40 judged ones of which 10 stand among them, in other letters."""
    train = reviews(96)
    judged = [(text + " indeed", label) for text, label in reviews(30)]
    judged += [(text.upper() + "!", label) for text, label in train[:10]]
    return write_csv(tmp_path / "train.csv", train), write_csv(tmp_path / "judged.csv", judged)


@pytest.mark.usefixtures("quick")
def test_the_headline_is_given_on_clean_rows_too(overlapping: tuple[Path, Path], bert: Path, tmp_path: Path) -> None:
    train, judged = overlapping
    told: list[str] = []
    run = training.train(
        small(train, bert, data__test=(str(judged),)),
        out=str(tmp_path / "run"),
        observe=lambda event: told.append(str(event.get("text", ""))),
    )
    assert run.metrics["overlap_rows"] == 10
    assert run.metrics["eval_rows"] == 40
    assert run.metrics["clean"]["eval_rows"] == 30
    report = json.loads((run.path / "data_report.json").read_text("utf-8"))
    assert report["test"]["overlap_rows"] == 10
    assert any("10 of the test rows stand in the training file too" in text for text in told)
    report_page = run.report.read_text("utf-8")
    assert "but 10 of them stand in the files that the run was trained or chosen on" in report_page
    assert "nothing was chosen on them" not in report_page


@pytest.mark.usefixtures("quick")
def test_rows_that_chose_do_not_pass_for_unseen(overlapping: tuple[Path, Path], bert: Path, tmp_path: Path) -> None:
    train, judged = overlapping
    told: list[str] = []
    run = training.train(
        small(train, bert, data__eval=(str(judged),), data__test=(str(judged),)),
        out=str(tmp_path / "run"),
        observe=lambda event: told.append(str(event.get("text", ""))),
    )
    assert run.metrics["overlap_rows"] == 40
    assert any("40 of the test rows stand in the training or evaluation file too" in text for text in told)
    assert evaluation.evaluate(run.path, [str(judged)])["overlap_rows"] == 40


def test_rows_that_were_not_drawn_count_as_training_rows(overlapping: tuple[Path, Path], bert: Path) -> None:
    train, judged = overlapping
    job = resolve(small(train, bert, data__eval=(str(judged),), data__limit_train=20))
    assert job.eval.known.sum() == 10
    assert not job.train.known.any()


def test_data_check_tells_and_writes_nothing(overlapping: tuple[Path, Path], bert: Path, tmp_path: Path) -> None:
    train, judged = overlapping
    before = sorted(tmp_path.iterdir())
    command = ["data", "check", str(train), "--eval", str(judged), "--base", str(bert)]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    lines = {line[:16].strip(): line[16:].split() for line in done.stdout.splitlines() if not line.startswith("!")}
    assert lines["rows in"] == ["96", "40"]
    assert lines["known before"] == ["-", "10"]
    assert "! 10 of the eval rows stand in the training file too" in done.stdout
    found = json.loads(CliRunner().invoke(cli.app, [*command, "--json"]).stdout)
    assert found["eval"]["overlap_rows"] == 10
    assert sorted(tmp_path.iterdir()) == before


def test_imbalance_small_classes_and_look_alikes_are_told(bert: Path, tmp_path: Path) -> None:
    pairs = [(f"a film number {i}", "good") for i in range(60)] + [(f"a plot number {i}", "Good ") for i in range(3)]
    file = write_csv(tmp_path / "a.csv", pairs)
    job = resolve(config.assemble(flags={"data.train": (str(file),), "base.model": str(bert)}))
    said = "\n".join(job.warnings)
    assert "always answering the commonest label" in said
    assert "--set train.class_weights=auto" in said
    assert "fewer than 5 training rows" in said
    assert "differ in case or spaces alone" in said
    assert job.recipe.train.metric_for_best_model == "macro_f1"


def test_class_weights_count_every_class_alike() -> None:
    labels = np.array([0, 0, 0, 1])
    weights = class_weights(labels, 3)
    assert weights.tolist() == pytest.approx([4 / 9, 4 / 3, 0.0])
    assert class_weights(labels, 2)[labels].mean() == pytest.approx(1.0)


@pytest.mark.usefixtures("quick")
def test_weighing_changes_what_is_learned(bert: Path, tmp_path: Path) -> None:
    pairs = [(f"a film number {i}", "good") for i in range(80)] + [(f"a plot number {i}", "bad") for i in range(10)]
    file = write_csv(tmp_path / "a.csv", pairs)
    runs = [
        training.train(
            small(file, bert, train__class_weights=how, train__num_epochs=1, train__learning_rate=1e-3),
            out=str(tmp_path / how),
        )
        for how in ("none", "auto")
    ]
    assert runs[0].metrics["loss"] != runs[1].metrics["loss"]


def test_a_text_that_stands_there_often_does_not_fill_the_evaluation_part() -> None:
    examples = rows(*[("the same", "a")] * 50, *[(f"text {i}", "a") for i in range(50)])
    for seed in range(50):
        assert len(data.split(examples, 0.1, seed)[1]) == 10


def test_with_every_row_in_the_training_file_no_fair_score_is_promised(bert: Path, tmp_path: Path) -> None:
    file = str(write_csv(tmp_path / "a.csv", reviews(40)))
    job = resolve(config.assemble(flags={"data.train": (file,), "data.eval": (file,), "base.model": str(bert)}))
    assert any("none is left for a fair score" in warning for warning in job.warnings)


def test_more_tokens_are_advised_up_to_what_the_base_takes(bert: Path, tmp_path: Path) -> None:
    long = write_csv(tmp_path / "long.csv", [(f"{text} {'film ' * 600}", label) for text, label in reviews(40)])
    most = resolve(small(long, bert, data__max_length=512)).recipe.data.max_length
    for length, advised in ((8, True), (most, False)):
        (told,) = [
            line for line in resolve(small(long, bert, data__max_length=length)).warnings if "are cut at" in line
        ]
        assert (f"--set data.max_length={most} reads more" in told) == advised
