"""Training once more on all rows: the same weights as a run that had them from the start, and scores that say so."""

import json
import os
import shutil
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import reviews, write_csv
from test_training import contents, lasting, small

import trimtab
from trimtab import comparison, console, estimate, evaluation, predictions, runreport, training
from trimtab.errors import ArtefactError, DivergedError, RecipeError, ResourceError
from trimtab.model import trainable
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
    assert "refit   once more from the start, 1 epochs; 96 rows to train on, those kept for evaluation too" in lines


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
        assert "trained once more, on 96 rows: these too" in text
    assert "Then once more from the start on 96 rows" in (found.adapter / "README.md").read_text("utf-8")
    assert "重新训练了一次" in found.report.read_text("utf-8")
    assert "once more" not in once.report.read_text("utf-8") + (once.adapter / "README.md").read_text("utf-8")
    told = "\n".join(comparison.compare_lines(comparison.compare([once.path, found.path])))
    assert f"{found.path}: the answers before the adapter was trained once more on these rows too" in told
    assert f"{once.path}: the answers" not in told
    # The curve of the loss is that of the training that was judged.
    assert runreport.read(found.path).steps == runreport.read(once.path).steps != ()
    logged = [json.loads(line) for line in (found.path / "events.jsonl").read_text("utf-8").splitlines()]
    assert any(event["event"] == "step" and event.get("refit") for event in logged)


def test_scores_on_test_rows_are_those_of_the_adapter(csv_file: Path, bert: Path, tmp_path: Path) -> None:
    sealed = write_csv(tmp_path / "sealed.csv", [(f"{text} again", label) for text, label in reviews(30)])
    settings = {"data__test": (str(sealed),)}
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
    assert "trained once more, on 96 rows: those kept for evaluation too" in found.report.read_text("utf-8")
    rows = [one.train_rows for one in runreport.read(found.path).classes]
    assert (rows, sum(one.train_rows or 0 for one in runreport.read(once.path).classes)) == ([48, 48], 86)
    again = evaluation.evaluate(found.path, [str(sealed)])
    assert again["baselines"]["tfidf"] == found.metrics["baselines"]["tfidf"]
    assert evaluation.evaluate(found.path, [str(csv_file)])["overlap_rows"] == 96


@pytest.mark.parametrize("stop_at", [1, 2, 4, 7])
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
    assert not any(event["event"] == "eval" for event in told)  # nothing that was saved is done again
    lines = [line for event in told for line in console.event_lines(event)]
    begins, goes_on = (
        "refit   once more from the start",
        f"resume  from step-{stop_at - 1:06d} of the training on all rows",
    )
    assert any(line.startswith(begins) for line in lines) is (stop_at == 1)
    assert (goes_on in lines) is (stop_at > 1)
    assert {event["refit"] for event in told if event["event"] == "progress" and "step" in event} == {True}


@pytest.mark.parametrize(
    ("rows", "settings", "refit"),
    [
        (96, {}, "on"),
        (111, {}, "on"),  # 99 without those that are kept
        (112, {}, "off"),  # 100
        (96, {"data__eval": ("EVAL",)}, "off"),
        (96, {"data__limit_train": 50}, "off"),
        (96, {"data__limit_eval": 5}, "off"),
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

    # Between once and twice: learning twice is left out, and nothing else.
    for seconds, left_out in ((25.0, {}), (20.0, {"train.refit": "off"}), (11.0, {"train.refit": "off"})):
        found = replace(
            planned.estimate, epochs=10, epoch_seconds=0.9, eval_seconds=0.1, refit_seconds=11.0, trunk_seconds=0.0,
            probe_seconds=0.0, sentence_seconds=0.0,
        )  # fmt: skip
        assert estimate.within(seconds, found, 86, 10) == left_out
    assert estimate.within(8.0, found, 86, 10) == {"train.refit": "off", "train.num_epochs": 7}
    monkeypatch.setattr(estimate, "estimate", lambda *given: found)
    fitted = training.plan(twice(csv_file, bert), "20s")
    assert fitted.as_dict()["budget"] == {"train.refit": "off"}
    assert fitted.ready.job.all_rows is None


def test_class_weights_and_names_are_those_of_all_rows(bert: Path, tmp_path: Path) -> None:
    """Three rows of one label to one of the other, and names that teach: as in a run that has the rows in one file."""
    rows = [(f"{text} {i}", "pos" if i % 4 else "neg") for i, (text, _) in enumerate(reviews(60))]
    settings = {"train__num_epochs": 1, "train__class_weights": "auto", "train__head_start": "random"}
    settings["data__label_names"] = "on"
    events: list[Mapping[str, Any]] = []
    file = write_csv(tmp_path / "rows.csv", rows)
    found = training.train(twice(file, bert, **settings), out=str(tmp_path / "twice"), observe=events.append)
    job = resolve(twice(file, bert, **settings))
    assert [row.text for row in job.final.train.examples[-2:]] == ["neg", "pos"]
    in_order = [(row.text, row.label) for row in (*job.train.examples[:-2], *job.eval.examples)]
    given = {"data__eval": (str(write_csv(tmp_path / "eval.csv", reviews(20))),)}
    given["data__max_length"] = job.recipe.data.max_length
    layered = small(write_csv(tmp_path / "all.csv", in_order), bert, **settings, **given)
    once = training.train(layered, out=str(tmp_path / "once"))
    weights = "adapter_model.safetensors"
    assert contents(found.adapter)[weights] == contents(once.adapter)[weights]
    assert found.metrics["refit_rows"] == 60  # names stand in no file
    lines = [line for event in events for line in console.event_lines(event)]
    assert any("62 rows to train on (2 of them label names), those kept for evaluation too" in line for line in lines)


def test_where_it_diverges_the_first_training_stands(
    csv_file: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = training.train(small(csv_file, bert), out=str(tmp_path / "once"))

    def diverges(*given: Any) -> None:
        with torch.no_grad():
            for parameter in trainable(given[2]).values():
                parameter.fill_(float("nan"))
        raise DivergedError("train.diverged", "Loss or gradients were not finite.")

    monkeypatch.setattr(training, "refit", diverges)
    events: list[Mapping[str, Any]] = []
    found = training.train(twice(csv_file, bert), out=str(tmp_path / "twice"), observe=events.append)
    weights = "adapter_model.safetensors"
    assert contents(found.adapter)[weights] == contents(once.adapter)[weights]
    assert found.metrics["refit_rows"] == 0
    assert any("it diverged, and the adapter is that of before" in str(event.get("text")) for event in events)


def test_a_run_of_before_goes_on_without(csv_file: Path, bert: Path, tmp_path: Path) -> None:
    """Its recipe says nothing of learning twice."""
    whole = training.train(small(csv_file, bert), out=str(tmp_path / "whole"))
    old = Path(shutil.copytree(whole.path, tmp_path / "old"))
    recipe = (old / "recipe.toml").read_text("utf-8")
    without = "".join(line for line in recipe.splitlines(keepends=True) if not line.startswith("refit ="))
    assert without != recipe
    (old / "recipe.toml").write_text(without, "utf-8")
    assert evaluation.evaluate(old, [str(csv_file)])["baselines"]["tfidf"]["rows"] == 86
    assert evaluation.verify(old).rows == evaluation.verify(whole.path).rows
    (old / "metrics.json").unlink()
    shutil.rmtree(old / "adapter")
    shutil.rmtree(old / "checkpoints")
    resumed = training.resume(old)
    assert contents(resumed.adapter) == contents(whole.adapter)


def test_damaged_predictions_are_told(csv_file: Path, bert: Path, tmp_path: Path) -> None:
    found = training.train(twice(csv_file, bert), out=str(tmp_path / "run"))
    file = found.path / "predictions.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ArtefactError, match=r"predictions\.parquet"):
        evaluation.verify(found.path)


def test_a_disk_that_is_full_is_told_with_the_way_to_go_on(csv_file: Path, bert: Path, tmp_path: Path) -> None:
    def fill(event: Mapping[str, Any]) -> None:
        if event["event"] == "refit":
            (tmp_path / "run" / "checkpoints-refit").write_text("in the way", "utf-8")
        if event["event"] == "progress" and event.get("refit") and event.get("step") == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(ResourceError) as caught:
        training.train(twice(csv_file, bert), out=str(tmp_path / "run"), observe=fill)
    assert caught.value.mend.endswith(f"trimtab train --resume {tmp_path / 'run'}")


def test_the_time_left_has_the_second_training_in_it(csv_file: Path, bert: Path, tmp_path: Path) -> None:
    seen: list[Mapping[str, Any]] = []
    training.train(twice(csv_file, bert, train__num_epochs=4), out=str(tmp_path / "run"), observe=seen.append)
    first = [event for event in seen if event["event"] == "progress" and "step" in event and "refit" not in event]
    # Of the last step of the first training about as much is left as all of it took.
    tokens_per_s = first[-1]["tokens_per_s"]
    job = resolve(twice(csv_file, bert))
    left = 4 * int(job.final.train.encoded.lengths.sum()) / tokens_per_s
    assert first[-1]["remaining_s"] >= left * 0.99
