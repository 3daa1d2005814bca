"""What is settled otherwise where rows a label are few: base dropout, and names of labels that teach."""

from pathlib import Path
from typing import Any

import pytest
from conftest import reviews, write_csv
from test_headstart import pooled
from test_training import small

from trimtab import config, console, estimate, report, training
from trimtab.resolve import Job, resolve


@pytest.fixture
def sentence_bert(bert: Path, tmp_path: Path) -> Path:
    return pooled(bert, tmp_path / "sentence", '{"pooling_mode_mean_tokens": true}')


def job(file: Path, base: Path, **settings: Any) -> Job:
    return resolve(small(file, base, **settings))


def named(found: Job) -> list[tuple[str, str, int]]:
    """Text, label and place of the training rows that stand in no file."""
    return [(row.text, row.label, row.line) for row in found.train.examples if row.file == "the names of the labels"]


def labelled(file: Path, *labels: str) -> Path:
    rows = [(f"{text} {i}", labels[i % len(labels)]) for i, (text, _) in enumerate(reviews(24 * len(labels)))]
    return write_csv(file, rows)


def test_names_of_labels_that_say_something_are_training_rows(tmp_path: Path, sentence_bert: Path) -> None:
    file = labelled(tmp_path / "rows.csv", "card_arrival", "lostCard", "查询-余额", "7", "A1", "b c")
    without, found = (job(file, sentence_bert, data__label_names=how) for how in ("off", "auto"))
    assert named(without) == []
    assert named(found) == [
        ("card arrival", "card_arrival", 4),
        ("lost Card", "lostCard", 5),
        ("查询 余额", "查询-余额", 6),
    ]
    assert found.train.examples[:-3] == without.train.examples
    assert found.train.encoded.labels[-3:].tolist() == [3, 4, 5]
    assert len(found.train.encoded) == len(found.train.known) == len(without.train.encoded) + 3
    assert found.eval.examples == without.eval.examples
    assert found.recipe.data.label_names == "on"
    # What is said of the files is said of the files.
    train = found.data_report["train"]
    assert (train["rows_used"], train["label_names"]) == (len(without.train.examples), 3)
    assert train["rows_per_label"] == without.data_report["train"]["rows_per_label"]
    assert any(line.split() == ["label", "names", "3", "-"] for line in report.data_lines(found.data_report))


def test_a_name_that_is_a_text_already_or_two_labels_at_once_is_no_row(tmp_path: Path, sentence_bert: Path) -> None:
    file = labelled(tmp_path / "rows.csv", "card_arrival", "Card Arrival", "lost_card", "refund")
    file.write_text(file.read_text("utf-8") + "Refund!,refund\n" * 2, "utf-8")
    assert [text for text, _, _ in named(job(file, sentence_bert, data__eval_fraction=0.01))] == ["lost card"]


@pytest.mark.parametrize(
    ("settings", "how"),
    [
        ({}, "on"),
        ({"data__label_names": "off"}, "off"),
        ({"train__head_start": "probe"}, "off"),
        ({"train__head_start": "probe", "data__label_names": "on"}, "on"),
    ],
)
def test_when_names_teach(csv_file: Path, sentence_bert: Path, settings: dict[str, Any], how: str) -> None:
    found = job(csv_file, sentence_bert, **settings)
    assert found.recipe.data.label_names == how
    assert [text for text, _, _ in named(found)] == (["neg", "pos"] if how == "on" else [])


def test_with_fifty_rows_a_label_names_and_base_dropout_are_left_out(tmp_path: Path, sentence_bert: Path) -> None:
    for rows, few in ((110, True), (112, False)):  # nine tenths of them are trained on
        file = write_csv(tmp_path / f"{rows}.csv", reviews(rows))
        recipe = job(file, sentence_bert, base__dropout="auto").recipe
        assert (recipe.data.label_names, recipe.base.dropout) == (("on", 0.1) if few else ("off", 0.0)), rows


@pytest.mark.parametrize(
    ("settings", "dropout"),
    [
        ({}, 0.1),
        ({"lora__layers": "top:1"}, 0.0),
        ({"runtime__trunk_cache": "on"}, 0.0),
        ({"base__dropout": 0.3}, 0.3),
        ({"base__dropout": "config"}, "config"),
    ],
)
def test_base_dropout(csv_file: Path, bert: Path, settings: dict[str, Any], dropout: float | str) -> None:
    found = job(csv_file, bert, **{"base__dropout": "auto", **settings})
    assert found.recipe.base.dropout == dropout
    drops = 0.1 if dropout == "config" else dropout  # the test's base says 0.1 itself
    assert found.model_config.hidden_dropout_prob == found.model_config.attention_probs_dropout_prob == drops


def test_a_budget_that_leaves_out_rows_leaves_out_names(
    tmp_path: Path, sentence_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = labelled(tmp_path / "rows.csv", *(f"label {letter * 2}" for letter in "abcdefgh"))
    layered = small(file, sentence_bert)
    for values, rows in (({"data.limit_train": 120}, 120), ({"train.num_epochs": 1}, 181)):
        monkeypatch.setattr(estimate, "within", lambda *_, values=values: dict(values))
        assert len(training.plan(layered, "1m").ready.job.train.examples) == rows


def test_a_run_says_it_and_one_that_goes_on_has_the_same_rows(
    csv_file: Path, sentence_bert: Path, tmp_path: Path
) -> None:
    events: list[Any] = []
    layered = small(csv_file, sentence_bert, train__num_epochs=1)
    run = training.train(layered, out=str(tmp_path / "run"), observe=events.append)
    started = next(event for event in events if event["event"] == "start")
    assert "data    88 rows to train on (2 of them the labels' names), 10 to evaluate" in "\n".join(
        console._start_lines(started)
    )
    again = resolve(config.load_recipe(str(run.path / "recipe.toml")))
    assert again.train.examples == job(csv_file, sentence_bert).train.examples
    assert "names of labels beside them" in run.report.read_text("utf-8")
