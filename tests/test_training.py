"""The loop: repeats to the byte, resumes to the byte, keeps the best, and does what transformers' Trainer does."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import built, reviews, write_csv

import trimtab
from trimtab import batching, build, checkpoint, config, loop, training
from trimtab.config import Layered
from trimtab.errors import ArtefactError, DataError, DivergedError, RecipeError, ResourceError
from trimtab.loop import Progress
from trimtab.resolve import resolve


def small(csv_file: Path, base: Path, **settings: Any) -> Layered:
    values = {"train.num_epochs": 2, "train.learning_rate": 5e-3, "base.dropout": 0.1, "lora.lora_dropout": 0.1}
    values |= {"train.refit": "off"}  # its tests: test_refit.py
    values |= {key.replace("__", "."): value for key, value in settings.items()}
    return config.assemble(flags={"data.train": (str(csv_file),), "base.model": str(base)}).override(values, "test")


@pytest.fixture
def still_bert(bert: Path, tmp_path: Path) -> Path:
    """A base without any dropout, that of the head included."""
    folder = Path(shutil.copytree(bert, tmp_path / "still"))
    config_file = folder / "config.json"
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | still))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def lasting(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics without times, memory and rates."""
    return {k: v for k, v in metrics.items() if not k.endswith(("_seconds", "_bytes", "_per_s"))}


@pytest.mark.usefixtures("quick")
class TestRepeat:
    def test_the_recipe_of_a_run_repeats_it_to_the_byte(self, csv_file: Path, bert: Path, tmp_path: Path) -> None:
        first = training.train(small(csv_file, bert), out=str(tmp_path / "a"))
        recipe = str(first.path / "recipe.toml")
        again = training.train(config.load_recipe(recipe), out=str(tmp_path / "b"))
        assert contents(first.adapter) == contents(again.adapter)
        assert lasting(first.metrics) == lasting(again.metrics)
        assert config.load_recipe(str(again.path / "recipe.toml")).recipe == config.load_recipe(recipe).recipe
        other = training.train(small(csv_file, bert, train__seed=7), out=str(tmp_path / "c"))
        assert contents(first.adapter) != contents(other.adapter), "the seed must reach the weights"

    @pytest.mark.parametrize("stop_at", [1, 4, 6, 9])
    def test_a_stopped_run_resumes_to_the_byte(self, csv_file: Path, bert: Path, tmp_path: Path, stop_at: int) -> None:
        layered = small(csv_file, bert, train__save_every_s=1e-9, train__log_every_steps=4)
        whole = training.train(layered, out=str(tmp_path / "whole"))

        def stop(event: Mapping[str, Any]) -> None:
            if event["event"] == "progress" and event.get("step") == stop_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            training.train(layered, out=str(tmp_path / "cut"), observe=stop)
        assert not (tmp_path / "cut" / "adapter").exists()
        resumed = training.resume(tmp_path / "cut")
        assert contents(whole.adapter) == contents(resumed.adapter)
        assert (whole.path / "predictions.parquet").read_bytes() == (resumed.path / "predictions.parquet").read_bytes()
        assert lasting(whole.metrics) == lasting(resumed.metrics)

    def test_a_damaged_checkpoint_is_passed_over(self, csv_file: Path, bert: Path, tmp_path: Path) -> None:
        layered = small(csv_file, bert)
        whole = training.train(layered, out=str(tmp_path / "whole"))
        cut = training.train(layered, out=str(tmp_path / "cut"))
        (cut.path / "metrics.json").unlink()
        newest = sorted(cut.path.glob("checkpoints/step-*"))[-1]
        raw = bytearray((newest / "tensors.safetensors").read_bytes())
        raw[-1] ^= 1
        (newest / "tensors.safetensors").write_bytes(bytes(raw))
        for file in cut.adapter.iterdir():
            file.unlink()
        cut.adapter.rmdir()
        told: list[str] = []
        resumed = training.resume(cut.path, observe=lambda event: told.append(str(event.get("text", ""))))
        assert any(newest.name in text for text in told)
        assert contents(whole.adapter) == contents(resumed.adapter)
        assert (newest.parent / f".damaged-{newest.name}").is_dir()
        checkpoint.read(newest)  # written anew, in the place of the damaged one

    def test_a_damaged_best_checkpoint_costs_nothing(self, csv_file: Path, bert: Path, tmp_path: Path) -> None:
        layered = small(csv_file, bert)
        whole = training.train(layered, out=str(tmp_path / "whole"))
        cut = training.train(layered, out=str(tmp_path / "cut"))
        (cut.path / "metrics.json").unlink()
        shutil.rmtree(cut.adapter)
        best = cut.path / "checkpoints" / f"step-{cut.metrics['step']:06d}-evaluated" / "tensors.safetensors"
        best.write_bytes(best.read_bytes()[:-1])
        assert contents(training.resume(cut.path).adapter) == contents(whole.adapter)

    def test_a_recipe_that_was_changed_is_refused(self, csv_file: Path, bert: Path, tmp_path: Path) -> None:
        run = training.train(small(csv_file, bert), out=str(tmp_path / "a"))
        run.path.joinpath("metrics.json").unlink()
        recipe = run.path / "recipe.toml"
        recipe.write_text(recipe.read_text("utf-8").replace("weight_decay = ", "weight_decay = 0.5  # "), "utf-8")
        with pytest.raises(ArtefactError, match="is not what this run was started with") as refused:
            training.resume(run.path)
        assert "-weight_decay = 0.01" in refused.value.where
        assert "+weight_decay = 0.5" in refused.value.where

    def test_a_disk_without_room_is_told_with_the_way_to_go_on(
        self, csv_file: Path, bert: Path, tmp_path: Path
    ) -> None:
        run = training.train(small(csv_file, bert), out=str(tmp_path / "a"))
        run.path.joinpath("metrics.json").unlink()
        run.path.joinpath("metrics.json.tmp").symlink_to("/dev/full")
        with pytest.raises(ResourceError, match="No space left on device") as caught:
            training.resume(run.path)
        assert "recipe.toml, predictions.parquet, adapter, checkpoints/step-" in caught.value.what
        assert f"trimtab train --resume {run.path}" in caught.value.mend

    def test_events_that_cannot_be_written_do_not_stop_a_run(self, csv_file: Path, bert: Path, tmp_path: Path) -> None:
        whole = training.train(small(csv_file, bert), out=str(tmp_path / "a"))
        run = training.train(small(csv_file, bert), out=str(tmp_path / "b"))
        for name in ("metrics.json", "events.jsonl"):
            run.path.joinpath(name).unlink()
        run.path.joinpath("events.jsonl").symlink_to("/dev/full")
        told: list[str] = []
        again = training.resume(run.path, observe=lambda event: told.append(str(event.get("text", ""))))
        assert contents(again.adapter) == contents(whole.adapter)
        assert sum("events.jsonl cannot be written" in text for text in told) == 1

    def test_a_file_of_the_user_does_not_take_the_place_of_a_library(
        self, csv_file: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("email.py").write_text("raise SystemExit('user email.py')")
        assert training.train(small(csv_file, bert, train__num_epochs=1), out="run").metrics["eval_rows"]

    def test_a_finished_run_is_left_as_it_is(self, csv_file: Path, bert: Path, tmp_path: Path) -> None:
        run = training.train(small(csv_file, bert), out=str(tmp_path / "a"))
        before = {file: file.stat().st_mtime_ns for file in run.path.rglob("*")}
        assert training.resume(run.path).metrics == run.metrics
        assert before == {file: file.stat().st_mtime_ns for file in run.path.rglob("*")}

    @pytest.mark.parametrize("name", ["predictions.parquet", "metrics.json"])
    def test_a_finished_run_that_lost_a_file_is_finished_again(
        self, csv_file: Path, bert: Path, tmp_path: Path, name: str
    ) -> None:
        run = training.train(small(csv_file, bert), out=str(tmp_path / "a"))
        before = contents(run.adapter) | {"predictions": (run.path / "predictions.parquet").read_bytes()}
        if name == "metrics.json":
            (run.path / name).write_text("{}", "utf-8")
        else:
            (run.path / name).unlink()
        again = training.resume(run.path)
        assert lasting(again.metrics) == lasting(run.metrics)
        assert before == contents(run.adapter) | {"predictions": (run.path / "predictions.parquet").read_bytes()}

    def test_a_run_killed_before_it_described_itself_is_described(
        self, csv_file: Path, bert: Path, tmp_path: Path
    ) -> None:
        csv_file.write_text(csv_file.read_text("utf-8") + ",pos\n", "utf-8")
        run = training.train(small(csv_file, bert, data__bad_rows="skip"), out=str(tmp_path / "a"))
        files = ("data_report.json", "rejects.csv", "environment.json")
        before = [(run.path / name).read_bytes() for name in files]
        for name in (*files, "metrics.json"):
            (run.path / name).unlink()
        training.resume(run.path)
        assert [(run.path / name).read_bytes() for name in files] == before

    def test_a_folder_of_a_run_killed_before_its_recipe_is_empty(
        self, csv_file: Path, bert: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "a"
        out.mkdir()
        for name in (".lock", ".writer.json", "recipe.toml.tmp"):
            (out / name).touch()
        assert training.train(small(csv_file, bert), out=str(out)).metrics["scored_on"] == "eval"

    @pytest.mark.parametrize("damage", ["[]", "{", '{"versions": 5}'])
    def test_a_damaged_record_of_the_environment_stops_nothing(
        self, csv_file: Path, bert: Path, tmp_path: Path, damage: str
    ) -> None:
        run = training.train(small(csv_file, bert), out=str(tmp_path / "a"))
        run.path.joinpath("metrics.json").unlink()
        run.path.joinpath("environment.json").write_text(damage, "utf-8")
        assert training.resume(run.path).metrics["scored_on"] == "eval"

    def test_a_terminal_that_goes_away_does_not_stop_a_run(self, csv_file: Path, bert: Path, tmp_path: Path) -> None:
        told = []

        def observe(event: Mapping[str, Any]) -> None:
            told.append(event)
            if event.get("step") == 3:
                raise OSError(5, "Input/output error")

        whole = training.train(small(csv_file, bert), out=str(tmp_path / "a"))
        deaf = training.train(small(csv_file, bert), out=str(tmp_path / "b"), observe=observe)
        assert contents(deaf.adapter) == contents(whole.adapter)
        assert told[-1]["step"] == 3

    def test_a_finished_run_that_does_not_verify_is_told(self, csv_file: Path, bert: Path, tmp_path: Path) -> None:
        run = training.train(small(csv_file, bert), out=str(tmp_path / "a"))
        other = training.train(small(csv_file, bert, train__seed=7), out=str(tmp_path / "b"))
        (run.path / "predictions.parquet").write_bytes((other.path / "predictions.parquet").read_bytes())
        with pytest.raises(ArtefactError, match="does not answer as it did"):
            training.resume(run.path)

    def test_changed_data_is_refused(self, csv_file: Path, bert: Path, tmp_path: Path) -> None:
        run = training.train(small(csv_file, bert), out=str(tmp_path / "a"))
        write_csv(csv_file, reviews(98))
        with pytest.raises(DataError, match="not what this recipe was written for"):
            training.train(config.load_recipe(str(run.path)), out=str(tmp_path / "b"))
        assert not (tmp_path / "b").exists()
        run.path.joinpath("metrics.json").unlink()
        with pytest.raises(DataError, match="the very rows that it began with") as refused:
            training.resume(run.path)
        assert "COPY" in refused.value.mend

    def test_a_changed_base_is_refused(self, csv_file: Path, bert: Path, tmp_path: Path) -> None:
        base = Path(shutil.copytree(bert, tmp_path / "base"))
        run = training.train(small(csv_file, base), out=str(tmp_path / "a"))
        run.path.joinpath("metrics.json").unlink()
        weights = bytearray((base / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (base / "model.safetensors").write_bytes(weights)
        with pytest.raises(DataError, match="base is not what this recipe was written for: sha256 "):
            training.resume(run.path)

    def test_stored_answers_that_cannot_be_read_are_told(self, csv_file: Path, bert: Path, tmp_path: Path) -> None:
        run = training.train(small(csv_file, bert), out=str(tmp_path / "a"))
        stored = run.path / "predictions.parquet"
        whole = pq.read_table(stored)
        odd = [whole.slice(0, 0), whole.set_column(0, "text", pa.nulls(len(whole), pa.string()))]
        odd += [whole.set_column(whole.column_names.index("logits"), "logits", pa.array([[1.0]] * len(whole)))]
        odd += [whole.set_column(0, "text", pa.array([1] * len(whole)))]
        written = []
        for table in odd:
            pq.write_table(table, tmp_path / "odd.parquet")
            written.append((tmp_path / "odd.parquet").read_bytes())
        for damaged in (b"", b"PAR1", stored.read_bytes()[:-9], *written):
            stored.write_bytes(damaged)
            with pytest.raises(ArtefactError, match="stored answers cannot be read"):
                training.resume(run.path)


@pytest.mark.usefixtures("quick")
class TestLoop:
    def test_it_learns_and_the_best_epoch_is_what_is_saved(self, csv_file: Path, bert: Path, tmp_path: Path) -> None:
        evaluation = write_csv(tmp_path / "eval.csv", reviews(40))
        run = training.train(
            small(csv_file, bert, train__num_epochs=12, data__eval=(str(evaluation),)), out=str(tmp_path / "run")
        )
        scores = run.metrics["evaluations"]
        assert run.metrics["accuracy"] == max(entry["accuracy"] for entry in scores) > 0.9
        assert run.metrics["chosen_on_these_rows"] is True
        classifier = trimtab.load(run.path)
        answers = classifier.predict([text for text, _ in reviews(40)])
        right = np.mean([answer.label == label for answer, (_, label) in zip(answers, reviews(40), strict=True)])
        assert right == run.metrics["accuracy"]

    @pytest.mark.parametrize("keep", ["ends", "start"])
    def test_long_texts_are_cut_alike_in_training_and_after_it(self, bert: Path, tmp_path: Path, keep: str) -> None:
        rows = [(f"{'the ' * 30}{text}", label) for text, label in reviews(96)]
        file = write_csv(tmp_path / "long.csv", rows)
        recipe = small(file, bert, data__max_length=16, data__keep=keep, train__num_epochs=8)
        told: list[Mapping[str, Any]] = []
        run = training.train(recipe, out=str(tmp_path / "run"), observe=told.append)
        assert (run.metrics["accuracy"] > 0.9) == (keep == "ends"), "what decides stands at the end"
        warned = " ".join(str(event.get("text")) for event in told)
        assert ("in the middle" if keep == "ends" else "at the end") in warned
        classifier = trimtab.load(run.adapter)
        assert classifier.adapter.keep == keep
        cut = classifier.encode(["good " * 4 + "the " * 60 + "bad " * 4]).ids.tolist()
        assert (classifier.adapter.tokenizer.backend.token_to_id("bad") in cut) == (keep == "ends")
        card = (run.adapter / "README.md").read_text("utf-8")
        assert ("three quarters its last" in card) == (keep == "ends")

    def test_test_rows_are_the_headline(self, csv_file: Path, bert: Path, tmp_path: Path) -> None:
        test = write_csv(tmp_path / "test.csv", reviews(30))
        run = training.train(small(csv_file, bert, data__test=(str(test),)), out=str(tmp_path / "run"))
        assert run.metrics["scored_on"] == "test"
        assert run.metrics["eval_rows"] == 30
        assert run.metrics["chosen_on_these_rows"] is False
        assert "chosen_on_accuracy" in run.metrics

    def test_early_stopping(self, csv_file: Path, bert: Path, tmp_path: Path) -> None:
        run = training.train(
            small(csv_file, bert, train__num_epochs=9, train__early_stopping_patience=2, train__learning_rate=1e-30),
            out=str(tmp_path / "run"),
        )
        assert [entry["epoch"] for entry in run.metrics["evaluations"]] == [1, 2, 3]
        assert run.metrics["epoch"] == 3, "of equal scores, that of the lowest rate"
        by_loss = small(csv_file, bert, train__num_epochs=3, train__learning_rate=1e-30).override(
            {"train.metric_for_best_model": "loss"}, "test"
        )
        assert training.train(by_loss, out=str(tmp_path / "by_loss")).metrics["epoch"] == 1

    def test_a_loss_that_falls_by_nothing_that_is_seen_does_not_keep_a_run_going(
        self, csv_file: Path, bert: Path, tmp_path: Path
    ) -> None:
        """Each epoch is the best so far, by a hundred-thousandth; a run that was cut ends in the same bytes."""
        recipe = small(csv_file, bert, train__num_epochs=9, train__early_stopping_patience=2, train__learning_rate=1e-7)
        told: list[Mapping[str, Any]] = []
        run = training.train(recipe, out=str(tmp_path / "run"), observe=told.append)
        losses = [entry["loss"] for entry in run.metrics["evaluations"]]
        assert len(losses) == 3
        assert losses[0] > losses[1] > losses[2] > losses[0] - 1e-4
        assert run.metrics["epoch"] == 3, "it is the best nevertheless"
        warnings = [event["text"] for event in told if event["event"] == "warning"]
        assert any("none of the last 2 was better by 0.0001 or more" in text for text in warnings)

        def stop(event: Mapping[str, Any]) -> None:
            if event["event"] == "checkpoint" and event["step"] > run.metrics["step"] / 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            training.train(recipe, out=str(tmp_path / "cut"), observe=stop)
        again = training.resume(tmp_path / "cut")
        assert contents(again.adapter) == contents(run.adapter)
        assert again.metrics["evaluations"] == run.metrics["evaluations"]

    def test_accumulating_two_halves_is_one_batch(self, csv_file: Path, still_bert: Path, tmp_path: Path) -> None:
        still = {"base__dropout": 0.0, "lora__lora_dropout": 0.0, "train__group_by_length": False}
        whole = training.train(small(csv_file, still_bert, train__batch_size=16, **still), out=str(tmp_path / "a"))
        halves = training.train(
            small(csv_file, still_bert, train__batch_size=8, train__gradient_accumulation_steps=2, **still),
            out=str(tmp_path / "b"),
        )
        for one, two in zip(whole.metrics["evaluations"], halves.metrics["evaluations"], strict=True):
            assert one["loss"] == pytest.approx(two["loss"], abs=1e-4)

    def test_divergence_suggests_a_rate(self, csv_file: Path, bert: Path, tmp_path: Path) -> None:
        with pytest.raises(DivergedError, match="learning_rate="):
            training.train(
                small(csv_file, bert, train__learning_rate=1e30, train__num_epochs=20), out=str(tmp_path / "run")
            )

    def test_a_step_without_a_finite_loss_changes_nothing_and_is_recorded(
        self, csv_file: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Steps 3 and 8 of 12 give no number; the others go on, and a resumed run ends in the same bytes."""
        forward, calls = build.choose, []

        def broken(*given: Any) -> Any:
            engine = forward(*given)

            def sometimes(encoded: Any, rows: Any, dropout_seed: int | None = None) -> torch.Tensor:
                logits = engine.forward(encoded, rows, dropout_seed)
                return logits * math.nan if dropout_seed in spoilt else logits

            return replace(engine, forward=sometimes)

        spoilt = {loop.dropout_seed(42, batch) for batch in (2, 7)}
        monkeypatch.setattr(build, "choose", broken)
        run = training.train(small(csv_file, bert), out=str(tmp_path / "run"), observe=calls.append)
        told = [event for event in calls if event["event"] == "not_finite"]
        assert [event["step"] for event in told] == [3, 8]
        assert all(len(event["rows"]) == 16 and event["rows"][0].startswith("reviews.csv:") for event in told)
        assert told[0]["largest_logit"] == "nan"
        assert math.isfinite(run.metrics["loss"])

        def stop(event: Mapping[str, Any]) -> None:
            if event["event"] == "progress" and event.get("step") == 9:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            training.train(small(csv_file, bert), out=str(tmp_path / "cut"), observe=stop)
        assert contents(training.resume(tmp_path / "cut").adapter) == contents(run.adapter)

    def test_a_first_step_without_a_finite_loss_can_be_saved_and_gone_on_from(
        self, csv_file: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Before the first update AdamW has no moments."""
        forward = build.choose

        def broken(*given: Any) -> Any:
            engine = forward(*given)

            def first_is_not(encoded: Any, rows: Any, dropout_seed: int | None = None) -> torch.Tensor:
                logits = engine.forward(encoded, rows, dropout_seed)
                return logits * math.nan if dropout_seed == loop.dropout_seed(42, 0) else logits

            return replace(engine, forward=first_is_not)

        monkeypatch.setattr(build, "choose", broken)
        recipe = small(csv_file, bert, train__save_every_s=1e-9)
        run = training.train(recipe, out=str(tmp_path / "run"))

        def stop(event: Mapping[str, Any]) -> None:
            if event["event"] == "checkpoint":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            training.train(recipe, out=str(tmp_path / "cut"), observe=stop)
        assert contents(training.resume(tmp_path / "cut").adapter) == contents(run.adapter)

    def test_another_environment_is_told_and_the_run_goes_on(self, csv_file: Path, bert: Path, tmp_path: Path) -> None:
        run = training.train(small(csv_file, bert), out=str(tmp_path / "run"))
        (run.path / "metrics.json").unlink()
        file = run.path / "environment.json"
        then = json.loads(file.read_text("utf-8"))
        then["versions"]["torch"], then["threads"] = "2.0.0", 64
        file.write_text(json.dumps(then), "utf-8")
        told: list[str] = []
        training.resume(run.path, observe=lambda event: told.append(str(event.get("text", ""))))
        changed = next(text for text in told if "began elsewhere" in text)
        assert "torch 2.0.0 -> " in changed
        assert "threads 64 -> 1" in changed
        assert "may differ" in changed

    def test_a_volume_without_room_is_found_before_the_run(
        self, csv_file: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = shutil.disk_usage(tmp_path)
        asked = []

        def nearly_full(path: Path) -> Any:
            asked.append(path)
            return usage._replace(free=1_000_000)

        monkeypatch.setattr(shutil, "disk_usage", nearly_full)
        with pytest.raises(ResourceError, match=r"writes up to \d+ MB, and 1 MB are free") as refused:
            training.train(small(csv_file, bert), out=str(tmp_path / "deep" / "run"))
        assert refused.value.code == "disk.too_little"
        assert set(asked) == {tmp_path}
        assert not (tmp_path / "deep").exists()

    def test_a_used_out_is_refused_untouched(self, csv_file: Path, bert: Path, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("years of work")
        with pytest.raises(RecipeError, match="not empty"):
            training.train(small(csv_file, bert), out=str(tmp_path / "mine"))
        with pytest.raises(RecipeError, match="not empty"):
            training.train(
                small(csv_file, bert, train__learning_rate="search"),
                out=str(tmp_path / "mine"),
                observe=lambda event: pytest.fail(f"searched first: {event}"),
            )
        assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]

    def test_bad_rows_leave_no_run_behind(self, csv_file: Path, bert: Path, tmp_path: Path) -> None:
        csv_file.write_text(csv_file.read_text() + ",pos\n")
        with pytest.raises(DataError, match="line 98"):
            training.train(small(csv_file, bert))
        assert not (tmp_path / "runs").exists()
        run = training.train(small(csv_file, bert, data__bad_rows="skip"))
        assert (run.path / "rejects.csv").read_text().splitlines()[1].endswith(",98,empty,,text")
        assert json.loads((run.path / "data_report.json").read_text())["train"]["rows_skipped"] == {"empty": 1}


def test_a_fresh_process_checks_the_saved_adapter(csv_file: Path, bert: Path, tmp_path: Path) -> None:
    run = training.train(small(csv_file, bert, train__num_epochs=1), out=str(tmp_path / "run"))
    assert run.metrics["largest_difference_after_reload"] < 1e-5
    predictions = (run.path / "predictions.parquet").read_bytes()
    other = training.train(small(csv_file, bert, train__num_epochs=1, train__seed=7), out=str(tmp_path / "other"))
    (other.path / "predictions.parquet").write_bytes(predictions)
    with pytest.raises(ArtefactError, match="does not answer as the trained model did"):
        training._verify_in_fresh_process(training.RunDir(other.path))


def test_the_tutorial_does_what_transformers_trainer_does(csv_file: Path, still_bert: Path, tmp_path: Path) -> None:
    """The same rows in the same order through transformers' own Trainer: the same weights, the same best epoch."""
    from transformers import Trainer, TrainingArguments

    settings = {"lora.lora_dropout": 0.0, "data.limit_train": 0, "data.limit_eval": 0}
    layered = config.assemble("tutorial", {"data.train": (str(csv_file),), "base.model": str(still_bert)})
    job = resolve(layered.override(settings, "test"))
    run = training.train(layered.override(settings, "test"), out=str(tmp_path / "ours"))

    model, _, _ = built(job)
    pad = job.tokenizer.pad_id

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        encoded = job.train.encoded if rows[0] < 1_000 else job.eval.encoded
        batch = batching.collate(encoded, np.array(rows) % 1_000, pad)
        return {
            "input_ids": torch.from_numpy(batch.input_ids),
            "attention_mask": torch.from_numpy(batch.attention_mask).long(),
            "labels": torch.from_numpy(batch.labels),
        }

    order = [int(row) for epoch in range(3) for rows in job.batches(epoch) for row in rows]

    class InOurOrder(Trainer):
        epoch = 0

        def _get_train_sampler(self, *_: Any) -> list[int]:
            return _Epochs(order, len(job.train.encoded))

    trainer = InOurOrder(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path / "theirs"),
            use_cpu=True,
            num_train_epochs=3,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            weight_decay=0.01,
            eval_strategy="epoch",
            save_strategy="epoch",
            logging_steps=10,
            load_best_model_at_end=True,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=list(range(len(job.train.encoded))),
        eval_dataset=[1_000 + row for row in range(len(job.eval.encoded))],
        data_collator=collate,
    )
    trainer.train()
    theirs = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    ours = [entry["loss"] for entry in run.metrics["evaluations"]]
    assert ours == pytest.approx(theirs, abs=1e-5)
    best = checkpoint.read(run.path / "checkpoints" / f"step-{run.metrics['step']:06d}-evaluated")
    for name, parameter in training.trainable(model).items():
        torch.testing.assert_close(best.tensors[f"parameter/{name}"], parameter.data, atol=2e-5, rtol=1e-4)


class _Epochs:
    """A sampler that gives the next epoch's rows each time it is asked."""

    def __init__(self, order: list[int], rows: int) -> None:
        self.order, self.rows, self.epoch = order, rows, 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Any:
        start = self.epoch * self.rows
        self.epoch += 1
        return iter(self.order[start : start + self.rows])


def test_the_schedule_is_linear() -> None:
    assert [loop.schedule(step, 4, 0.0) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    warm = [loop.schedule(step, 100, 0.06) for step in range(100)]
    assert warm.index(max(warm)) == 10, "at least 10 steps"
    assert warm[0] == pytest.approx(1 / 11)
    assert warm[-1] == pytest.approx(1 / 90)
    assert max(loop.schedule(step, 6, 0.5) for step in range(6)) == 1.0, "a short run still reaches its rate"


def test_by_loss_the_lowest_is_kept_and_of_equal_ones_the_earlier() -> None:
    progress = Progress(best_step=5, evaluations=[{"epoch": 1, "step": 5, "accuracy": 0.8, "loss": 0.5}])
    assert loop._is_better({"accuracy": 0.7, "loss": 0.4}, progress, "loss", 100)
    assert not loop._is_better({"accuracy": 0.9, "loss": 0.5}, progress, "loss", 100)
    assert not loop._is_better({"accuracy": 0.9, "loss": 0.6}, progress, "loss", 100)


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_by_right_answers_the_latest_is_kept_that_is_within_a_standard_error_of_the_highest(metric: str) -> None:
    def is_kept(score: float, rows: int, *earlier: float) -> bool:
        progress = Progress(
            best_step=len(earlier), evaluations=[{"step": i + 1, metric: s} for i, s in enumerate(earlier)]
        )
        return loop._is_better({metric: score}, progress, metric, rows)

    assert is_kept(0.8, 100, 0.8)
    assert is_kept(0.761, 100, 0.8), "0.04 is a standard error of 100 rows"
    assert not is_kept(0.759, 100, 0.8)
    assert not is_kept(0.79, 10_000, 0.8), "and 0.004 one of 10,000"
    assert not is_kept(0.73, 100, 0.8, 0.765), "the highest of all counts, not the one that is kept"
    assert is_kept(1.0, 100, 1.0)
    assert not is_kept(0.999, 100, 1.0)


@pytest.mark.parametrize(
    ("metric", "scores", "waited"),
    [
        ("loss", [(0.5, 0.8), (0.4, 0.8), (0.45, 0.8), (0.39, 0.8)], [0, 0, 1, 0]),
        ("loss", [(3e-5, 0.8), (2e-5, 0.9), (1e-5, 0.9)], [0, 1, 2]),
        ("loss", [(5e-4, 0.8), (4.6e-4, 0.8), (4.2e-4, 0.8), (3.8e-4, 0.8)], [0, 1, 2, 0]),  # all together are seen
        ("accuracy", [(0.5, 0.8), (0.6, 0.80001), (0.6, 0.80001), (0.5, 0.80001)], [0, 0, 1, 0]),
        ("accuracy", [(3e-5, 1.0), (2e-5, 1.0), (1e-5, 1.0)], [0, 1, 2]),
        ("accuracy", [(3e-5, 1.0), (2e-5, 0.9), (1e-5, 1.0)], [0, 1, 2]),
    ],
)
def test_patience_begins_anew_where_an_epoch_is_better_by_what_is_seen(
    metric: str, scores: list[tuple[float, float]], waited: list[int]
) -> None:
    progress, found = Progress(), []
    for step, (loss_of_epoch, accuracy) in enumerate(scores):
        entry = {"step": step, "loss": loss_of_epoch, "accuracy": accuracy}
        progress = loop._with_evaluation(progress, entry, metric, 1_000)
        found.append(progress.epochs_without_better)
        assert progress.best_step == step or progress.epochs_without_better, "worth it is better too"
    assert found == waited


def test_dropout_seeds_differ_from_batch_to_batch() -> None:
    seeds = {loop.dropout_seed(seed, batch) for seed in range(20) for batch in range(200)}
    assert len(seeds) == 4_000
    assert all(0 <= seed < 2**63 for seed in seeds)
