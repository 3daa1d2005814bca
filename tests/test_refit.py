"""Training once more on all rows: the same weights as a run that had them from the start, and scores that say so."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import reviews, write_csv
from test_training import contents, lasting, small

import trimtab
from trimtab import comparison, console, estimate, evaluation, predictions, runreport, training
from trimtab.errors import RecipeError
from trimtab.resolve import resolve

pytestmark = pytest.mark.usefixtures("quick")


def twice(csv_file: Path, base: Path, **settings: Any) -> Any:
    return small(csv_file, base, **{"train__refit": "on", **settings})


def test_the_weights_are_those_of_a_run_that_had_all_rows(csv_file: Path, bert: Path, tmp_path: Path) -> None:
    events: list[Mapping[str, Any]] = []
    found = training.train(
        twice(csv_file, bert, train__num_epochs=1), out=str(tmp_path / "twice"), observe=events.append
    )
    job = resolve(twice(csv_file, bert))
    in_order = [(row.text, row.label) for row in (*job.train.examples, *job.eval.examples)]
    all_rows = write_csv(tmp_path / "all.csv", in_order)
    given = {"data__eval": (str(write_csv(tmp_path / "eval.csv", reviews(20))),), "train__num_epochs": 1}
    given["data__max_length"] = job.recipe.data.max_length
    once = training.train(small(all_rows, bert, **given), out=str(tmp_path / "once"))
    assert found.metrics["refit_rows"] == len(in_order) == 96
    weights = "adapter_model.safetensors"
    assert contents(found.adapter)[weights] == contents(once.adapter)[weights]
    lines = [line for event in events for line in console.event_lines(event)]
    assert "refit   once more from the start, 1 epochs on all 96 rows, those kept for evaluation too" in lines


def test_scores_on_rows_that_were_kept_are_those_of_the_first_training(
    csv_file: Path, bert: Path, tmp_path: Path
) -> None:
    once = training.train(small(csv_file, bert), out=str(tmp_path / "once"))
    found = training.train(twice(csv_file, bert), out=str(tmp_path / "twice"))
    assert contents(found.adapter) != contents(once.adapter)
    assert (found.path / "predictions.parquet").read_bytes() == (once.path / "predictions.parquet").read_bytes()
    different = {key for key, value in lasting(found.metrics).items() if lasting(once.metrics).get(key) != value}
    assert different <= {"refit_rows", "largest_difference_after_reload"}
    assert found.metrics["calibration"] == once.metrics["calibration"]
    checked = evaluation.verify(found.path)
    assert checked.ok
    assert checked.rows == len(trimtab.load(found.path).adapter.probes)  # and none of the kept rows
    assert evaluation.verify(once.path).rows > checked.rows
    for text in (found.report.read_text("utf-8"), (found.adapter / "README.md").read_text("utf-8")):
        assert "trained once more on all 96 rows, these too" in text
    assert "重新训练了一次" in found.report.read_text("utf-8")
    assert "once more" not in once.report.read_text("utf-8")
    told = "\n".join(comparison.compare_lines(comparison.compare([once.path, found.path])))
    assert f"{found.path}: the answers before the adapter was trained once more on these rows too" in told
    assert f"{once.path}: the answers" not in told
    # The curve of the loss is that of the training that was judged.
    assert runreport.read(found.path).steps == runreport.read(once.path).steps != ()
    logged = [json.loads(line) for line in (found.path / "events.jsonl").read_text("utf-8").splitlines()]
    assert any(event["event"] == "step" and event.get("refit") for event in logged)


def test_scores_on_test_rows_are_those_of_the_adapter(csv_file: Path, bert: Path, tmp_path: Path) -> None:
    sealed = write_csv(tmp_path / "sealed.csv", [(f"{text} again", label) for text, label in reviews(30)])
    settings = {"data__test": (str(sealed),), "train__class_weights": "auto"}
    once = training.train(small(csv_file, bert, **settings), out=str(tmp_path / "once"))
    found = training.train(twice(csv_file, bert, **settings), out=str(tmp_path / "twice"))
    classifier = trimtab.load(found.path)
    said = predictions.read(found.path / "predictions.parquet", classifier.labels)
    np.testing.assert_allclose(classifier.logits(classifier.encode(said.texts)), said.logits, atol=1e-4)
    assert not comparison.read_answers(found.path).before_refit
    assert evaluation.verify(found.path).rows > len(classifier.adapter.probes)
    # Epoch and temperature come from rows that the model of then had not learned from.
    for key in ("epoch", "evaluations", "chosen_on_accuracy", "chosen_on_loss"):
        assert found.metrics[key] == once.metrics[key]
    assert found.metrics["calibration"]["temperature"] == once.metrics["calibration"]["temperature"]
    # Baselines have the rows that the adapter has.
    assert found.metrics["baselines"]["tfidf"]["rows"] == 96
    assert once.metrics["baselines"]["tfidf"]["rows"] == 86
    assert "trained once more on all 96 rows, those kept for evaluation too" in found.report.read_text("utf-8")
    again = evaluation.evaluate(found.path, [str(sealed)])
    assert again["baselines"]["tfidf"] == found.metrics["baselines"]["tfidf"]
    assert evaluation.evaluate(found.path, [str(csv_file)])["overlap_rows"] == 96


@pytest.mark.parametrize("stop_at", [1, 3, 6])
def test_stopped_in_the_second_training_it_resumes_to_the_byte(
    csv_file: Path, bert: Path, tmp_path: Path, stop_at: int
) -> None:
    layered = twice(csv_file, bert, train__save_every_s=1e-9, train__log_every_steps=4)
    whole = training.train(layered, out=str(tmp_path / "whole"))
    second = False

    def stop(event: Mapping[str, Any]) -> None:
        nonlocal second
        second = second or event["event"] == "refit"
        if second and event["event"] == "progress" and event["step"] == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(layered, out=str(tmp_path / "cut"), observe=stop)
    assert second
    assert not (tmp_path / "cut" / "adapter").exists()
    told: list[Mapping[str, Any]] = []
    resumed = training.resume(tmp_path / "cut", observe=told.append)
    assert contents(whole.adapter) == contents(resumed.adapter)
    assert lasting(whole.metrics) == lasting(resumed.metrics)
    assert not any(event["event"] in ("eval", "head") for event in told)  # nothing is done again


@pytest.mark.parametrize(
    ("rows", "settings", "refit"),
    [
        (96, {}, "on"),
        (111, {}, "on"),  # 99 without those that are kept
        (112, {}, "off"),  # 100
        (96, {"data__eval": ("EVAL",)}, "off"),
        (96, {"data__limit_train": 50}, "off"),
        (96, {"lora__layers": "top:1"}, "off"),
        (112, {"train__refit": "on"}, "on"),
        (96, {"train__refit": "off"}, "off"),
    ],
)
def test_when_it_is_done(bert: Path, tmp_path: Path, rows: int, settings: dict[str, Any], refit: str) -> None:
    file = write_csv(tmp_path / "rows.csv", [(f"{text} {i}", label) for i, (text, label) in enumerate(reviews(rows))])
    if "data__eval" in settings:
        settings = {"data__eval": (str(write_csv(tmp_path / "eval.csv", reviews(20))),)}
    job = resolve(small(file, bert, **{"train__refit": "auto", **settings}))
    assert job.recipe.train.refit == refit
    assert bool(job.all_rows) is (refit == "on")
    assert len(job.final.train.examples) == (rows if refit == "on" else len(job.train.examples))


def test_it_is_refused_where_no_rows_are_kept(csv_file: Path, bert: Path, tmp_path: Path) -> None:
    given = (str(write_csv(tmp_path / "eval.csv", reviews(20))),)
    with pytest.raises(RecipeError, match="with evaluation files none are") as caught:
        resolve(twice(csv_file, bert, data__eval=given))
    assert "train.refit=auto" in caught.value.mend


def test_with_kept_lower_layers_it_computes_all_of_them(csv_file: Path, bert: Path, tmp_path: Path) -> None:
    settings = {"lora__layers": "top:1", "base__dropout": 0.0}
    found, computed = (
        training.train(twice(csv_file, bert, **settings, runtime__trunk_cache=how), out=str(tmp_path / how), budget="")
        for how in ("on", "off")
    )
    weights = "adapter_model.safetensors"
    assert contents(found.adapter)[weights] == contents(computed.adapter)[weights]


def test_its_time_is_told_and_a_budget_leaves_it_out_first(
    csv_file: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once, planned = (training.plan(one(csv_file, bert)) for one in (small, twice))
    assert once.estimate.refit_seconds == 0
    second = planned.estimate.refit_seconds
    epochs = planned.estimate.epochs * planned.estimate.epoch_seconds
    assert epochs < second < 2 * epochs  # and a tenth more of rows
    assert planned.estimate.train_seconds > second + epochs
    assert "once more on all rows" in "\n".join(console.plan_lines(planned.as_dict()))

    def within(budget: float, found: estimate.Estimate, rows: int, eval_rows: int) -> dict[str, object]:
        return {"data.limit_train": 40} if found.refit_seconds else {}

    monkeypatch.setattr(estimate, "within", within)
    fitted = training.plan(twice(csv_file, bert), "1m")
    assert fitted.as_dict()["budget"] == {"train.refit": "off"}
    assert len(fitted.ready.job.train.examples) == 86
