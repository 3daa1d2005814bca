"""What is settled otherwise where rows a label are few: names of labels that teach; and base dropout."""

from pathlib import Path
from typing import Any

import pytest
from conftest import reviews, write_csv
from test_headstart import pooled
from test_training import contents, small

from trimtab import config, console, estimate, labelnames, report, search, tokens, training
from trimtab.classification import make_labels
from trimtab.resolve import Job, resolve


@pytest.fixture
def sentence_bert(bert: Path, tmp_path: Path) -> Path:
    return pooled(bert, tmp_path / "sentence", '{"pooling_mode_mean_tokens": true}')


def job(file: Path, base: Path, **settings: Any) -> Job:
    return resolve(small(file, base, **settings))


def named(found: Job) -> list[tuple[str, str, int]]:
    """Text, label and place of the training rows that stand in no file."""
    return [(row.text, row.label, row.line) for row in found.train.examples if row.file == labelnames.FILE]


def labelled(file: Path, *labels: str) -> Path:
    rows = [(f"{text} {i}", labels[i % len(labels)]) for i, (text, _) in enumerate(reviews(24 * len(labels)))]
    return write_csv(file, rows)


def test_names_that_say_something_are_training_rows(tmp_path: Path, sentence_bert: Path) -> None:
    file = labelled(tmp_path / "rows.csv", "good_film", "bad-plot", "slow/film", "7", "b c", "!good plot")
    without, found = (job(file, sentence_bert, data__label_names=how) for how in ("off", "auto"))
    assert named(without) == []
    assert named(found) == [("bad plot", "bad-plot", 4), ("good film", "good_film", 5), ("slow film", "slow/film", 6)]
    assert found.train.examples[:-3] == without.train.examples
    assert found.train.encoded.labels[-3:].tolist() == [3, 4, 5]
    assert len(found.train.encoded) == len(found.train.known) == len(without.train.encoded) + 3
    assert found.eval.examples == without.eval.examples
    # What is said of the files is said of the files.
    assert found.data_report["train"].pop("label_names") == 3
    assert without.data_report["train"].pop("label_names") == 0
    assert found.data_report == without.data_report


@pytest.mark.parametrize(
    ("labels", "names", "rows"),
    [
        (("0", "1"), {}, []),
        (("0", "1"), {"0": "差/bad plot", "1": "好/good plot"}, [("bad plot", "0"), ("good plot", "1")]),
        (("film a", "film_a"), {}, []),  # the same words
        (("0", "1"), {"0": "good_film/Good film!", "1": "bad/bad"}, [("good film", "0"), ("bad", "1")]),
        (("LABEL_0", "LABEL_1"), {}, []),
        (("日本 語", "film"), {}, [("film", "film")]),  # of characters that the base does not know
    ],
)
def test_which_names_say_something(
    bert: Path, labels: tuple[str, ...], names: dict[str, str], rows: list[tuple[str, str]]
) -> None:
    found = labelnames.rows(make_labels(list(labels), names), [], tokens.from_base(bert))
    assert [(row.text, row.label) for row in found] == rows


def test_words_are_left_as_they_are_written() -> None:
    for name in ("शिकायत", "บริการ", "re\u0301clamation", "查询余额", "iPhone"):
        assert labelnames._words(name) == name


def test_a_name_that_is_judged_or_taught_already_is_no_row(tmp_path: Path, sentence_bert: Path) -> None:
    file = labelled(tmp_path / "rows.csv", "film", "plot", "good", "bad")
    test = write_csv(tmp_path / "test.csv", [("Film!", "film")])
    for row in ("Plot!,plot", "good.,good"):  # wherever the split puts them
        file.write_text(file.read_text("utf-8") + row + "\n", "utf-8")
    found = job(file, sentence_bert, data__test=(str(test),))
    assert [text for text, _, _ in named(found)] == ["bad"]


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


def test_with_fifty_rows_a_label_names_are_left_out(tmp_path: Path, sentence_bert: Path) -> None:
    for rows, names in ((110, "on"), (112, "off")):  # nine tenths of them are trained on
        file = write_csv(tmp_path / f"{rows}.csv", reviews(rows))
        recipe = job(file, sentence_bert, base__dropout="auto").recipe
        assert (recipe.data.label_names, recipe.base.dropout) == (names, 0.1), rows


@pytest.mark.parametrize(
    ("settings", "dropout"),
    [
        ({}, 0.1),
        ({"lora__layers": "top:1"}, 0.0),
        ({"lora__layers": "top:2"}, 0.1),
        ({"lora__target_modules": ("encoder.layer.1.attention.self.query",)}, 0.0),
        ({"base__dropout": 0.3}, 0.3),
        ({"base__dropout": "config"}, "config"),
    ],
)
def test_base_dropout(csv_file: Path, bert: Path, settings: dict[str, Any], dropout: float | str) -> None:
    found = job(csv_file, bert, **{"base__dropout": "auto", **settings})
    assert found.recipe.base.dropout == dropout
    drops = 0.1 if dropout == "config" else dropout  # the test's base says 0.1 itself
    assert found.model_config.hidden_dropout_prob == found.model_config.attention_probs_dropout_prob == drops


def test_many_labels_are_learned_at_twice_the_rate(tmp_path: Path, bert: Path) -> None:
    for count, rows, rate in ((19, 72, 1e-3), (20, 72, 2e-3), (20, 48, 1e-3)):
        labels = [f"{i} film" for i in range(count)]
        file = labelled(tmp_path / f"{count}-{rows}.csv", *labels * (rows // 24))
        assert job(file, bert, train__learning_rate="auto").recipe.train.learning_rate == rate


def test_lower_layers_of_an_adapter_to_start_from_can_be_kept(csv_file: Path, bert: Path, tmp_path: Path) -> None:
    first = training.train(small(csv_file, bert, lora__layers="top:1"), out=str(tmp_path / "first"))
    flags = {"data.train": (str(csv_file),), "base.model": str(bert)}
    found = resolve(config.assemble(flags=flags, settings=[f"lora.init_from={first.path}"]))
    assert (found.recipe.lora.layers, found.recipe.base.dropout) == ("top:1", 0.0)


def test_a_search_tries_rates_on_the_recipe_of_the_run(tmp_path: Path, sentence_bert: Path) -> None:
    labels = [f"{one} film" for one in ("good", "bad", "slow", "the", "wonderful", "terrible", "plot", "was")]
    for times, names in ((1, "on"), (3, "off")):
        layered = small(labelled(tmp_path / f"{times}.csv", *labels * times), sentence_bert)
        usual = resolve(layered)
        brief = resolve(search._brief(layered, usual))
        assert len(brief.train.examples) < 50 * len(labels)  # fewer rows a label than the run has
        for settled in (usual.recipe, brief.recipe):
            assert settled.data.label_names == names


def test_a_budget_that_binds_leaves_names_out_first(
    tmp_path: Path, sentence_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layered = small(labelled(tmp_path / "rows.csv", "good film", "bad film"), sentence_bert)
    whole = len(resolve(layered).train.examples)
    without = whole - 2
    for fitting, asked in ((whole, [whole]), (without, [whole, without]), (9, [whole, without])):
        calls: list[int] = []

        def within(
            budget: float, found: Any, rows: int, eval_rows: int, fitting: int = fitting, calls: list[int] = calls
        ) -> dict[str, object]:
            calls.append(rows)
            return {"data.limit_train": fitting} if rows > fitting else {}

        monkeypatch.setattr(estimate, "within", within)
        assert len(training.plan(layered, "1m").ready.job.train.examples) == fitting
        assert calls == asked


def test_a_run_says_it_and_one_that_goes_on_has_the_same_rows(
    csv_file: Path, sentence_bert: Path, tmp_path: Path
) -> None:
    events: list[Any] = []
    whole = training.train(small(csv_file, sentence_bert), out=str(tmp_path / "whole"), observe=events.append)
    started = next(event for event in events if event["event"] == "start")
    assert "88 rows to train on (2 of them label names), 10 to evaluate" in "\n".join(console._start_lines(started))
    assert ["label", "names", "2", "-"] in [line.split() for line in report.data_lines(started["data"])]
    assert "label names beside them" in whole.report.read_text("utf-8")
    planned = training.plan(small(csv_file, sentence_bert)).as_dict()
    assert "88 rows to train on (2 of them label names)" in "\n".join(console.plan_lines(planned))

    def stop(event: Any) -> None:
        if event["event"] == "checkpoint":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(small(csv_file, sentence_bert), out=str(tmp_path / "cut"), observe=stop)
    again = resolve(config.load_recipe(str(tmp_path / "cut" / "recipe.toml")))
    assert named(again) == [("neg", "neg", 1), ("pos", "pos", 2)]
    assert contents(training.resume(tmp_path / "cut").adapter) == contents(whole.adapter)
