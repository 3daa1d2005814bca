"""What a run will cost: the arithmetic, the budget, the refusal. How close it comes is a matter of benchmarks/."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import reviews, write_csv
from test_training import contents, small
from typer.testing import CliRunner

from trimtab import cli, config, device, estimate, training
from trimtab.device import Placement
from trimtab.errors import RecipeError, ResourceError
from trimtab.estimate import Ahead, Estimate, Speed

STEADY = Speed(train_seconds=1e-8, eval_seconds=4e-9, train_bytes=1e6, eval_bytes=1e4, resident_bytes=10**9)
A_RUN = Estimate(
    epochs=3,
    steps=300,
    epoch_seconds=100.0,
    eval_seconds=10.0,
    test_seconds=0.0,
    needed_bytes=10**9,
    peak_bytes=10**9,
    available_bytes=10**10,
)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose speed is known."""
    monkeypatch.setattr(estimate, "measure", lambda job, model, engine, trunk: STEADY)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("5m", 300), ("1h30m", 5_400), (" 1H 5m 3s ", 3_903)])
def test_budgets_are_read(text: str, seconds: int) -> None:
    assert estimate.parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "m", "5 minutes", "-5m", "0s", "5m3h", "1.5h"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is no time"):
        estimate.parse_budget(text)


@pytest.mark.parametrize(
    ("lengths", "tried"),
    [
        ([256, 40, 256, 256, 90, 256, 256, 256], [256, 256, 256, 256]),
        ([300, 310, 320, 330, 340], [310, 320]),
        ([20, 30, 40], [20, 30]),
        ([600, 500, 700], [600]),
        ([2_000], [2_000]),
    ],
)
def test_rows_of_middle_length_are_tried_out_as_many_on_each_core(lengths: list[int], tried: list[int]) -> None:
    rows = np.arange(len(lengths))[::-1]
    assert np.array(lengths)[estimate._middle(rows, np.array(lengths))].tolist() == tried


class TestWithin:
    def test_enough_time_changes_nothing(self) -> None:
        assert estimate.within(400, A_RUN, 1_000, 100) == {}

    def test_epochs_go_first(self) -> None:
        assert estimate.within(300, A_RUN, 1_000, 100) == {"train.num_epochs": 2}

    def test_then_rows(self) -> None:
        values = estimate.within(120, A_RUN, 1_000, 100)
        assert values["train.num_epochs"] == 2
        rows = values["data.limit_train"]
        assert isinstance(rows, int)
        assert 2 * (100 * rows / 1_000 + 10) <= 120
        assert 2 * (100 * (rows + 20) / 1_000 + 10) > 0.95 * 120, "no more is left out than must be"

    def test_sentence_vectors_are_left_out_before_a_row_is_and_kept_where_two_epochs_fit_beside_them(self) -> None:
        taught = replace(A_RUN, sentence_seconds=80.0, probe_seconds=20.0, probe_rows=1_000)
        assert estimate.within(460, taught, 1_000, 100) == {}
        assert estimate.within(350, taught, 1_000, 100) == {"train.num_epochs": 2}
        assert estimate.within(300, taught, 1_000, 100) == {"train.head_start": "probe", "train.num_epochs": 2}
        fewer = estimate.within(120, taught, 1_000, 100)
        assert fewer.keys() == {"train.head_start", "train.num_epochs", "data.limit_train"}
        rows = fewer["data.limit_train"]
        assert isinstance(rows, int)
        assert 0.95 * 120 - 1 < 2 * (100 * rows / 1_000 + 10) + 20 * rows / 1_000 <= 0.95 * 120
        brief = replace(taught, epochs=1)
        assert estimate.within(140, brief, 1_000, 100) == {"train.head_start": "probe"}

    @pytest.mark.parametrize("budget", [40, 120, 180])
    def test_a_probe_reads_what_is_left_of_the_rows_and_at_most_its_own(self, budget: int) -> None:
        many = replace(A_RUN, eval_seconds=5.0, probe_seconds=40.0, probe_rows=1_000)
        rows = estimate.within(budget, many, 2_000, 100)["data.limit_train"]
        assert isinstance(rows, int)
        taken = 2 * (100 * rows / 2_000 + 5) + 40 * min(rows, 1_000) / 1_000
        assert 0.95 * budget - 1 < taken <= 0.95 * budget

    def test_evaluation_gets_at_most_a_fifth(self) -> None:
        judged = Estimate(**{**A_RUN.__dict__, "eval_seconds": 100.0})
        values = estimate.within(240, judged, 1_000, 5_000)
        fewer, rows = values["data.limit_eval"], values["data.limit_train"]
        assert isinstance(fewer, int)
        assert isinstance(rows, int)
        assert 2 * 100 * fewer / 5_000 <= 0.2 * 240
        assert 2 * (100 * rows / 1_000 + 100 * fewer / 5_000) <= 240

    def test_and_a_fifth_of_as_many_epochs_as_fit(self) -> None:
        judged = replace(A_RUN, epochs=10, epoch_seconds=10.0, eval_seconds=9.5)
        values = estimate.within(105, judged, 1_000, 5_000)
        epochs, fewer = values["train.num_epochs"], values["data.limit_eval"]
        assert isinstance(epochs, int)
        assert isinstance(fewer, int)
        assert epochs > 2
        assert epochs * 9.5 * fewer / 5_000 <= 0.2 * 105
        assert epochs * (10 + 9.5 * fewer / 5_000) <= 105

    def test_less_than_a_hundred_rows_is_refused_with_the_time_that_is_enough(self) -> None:
        with pytest.raises(RecipeError, match="2 epochs of 100 rows") as refused:
            estimate.within(20, A_RUN, 1_000, 100)
        named = float(refused.value.mend.partition("--budget ")[2].partition("s")[0])
        assert estimate.within(named, A_RUN, 1_000, 100)["data.limit_train"]
        started = replace(A_RUN, sentence_seconds=80.0, probe_seconds=50.0, probe_rows=1_000)
        with pytest.raises(RecipeError, match="2 epochs of 100 rows") as refused:
            estimate.within(20, started, 1_000, 100)
        named = float(refused.value.mend.partition("--budget ")[2].partition("s")[0])
        assert estimate.within(named, started, 1_000, 100)["data.limit_train"]

    def test_small_files_are_never_drawn_from_below_their_size(self) -> None:
        with pytest.raises(RecipeError, match="2 epochs of 60 rows"):
            estimate.within(100, A_RUN, 60, 100)


def test_padding_costs_time_where_it_is_computed(csv_file: Path, bert: Path) -> None:
    lengths = np.array([4, 16])
    ready = training.make_ready(training.resolve(small(csv_file, bert)))
    short, long = estimate.work(ready.model, lengths)
    assert long > 4 * short, "pairs of tokens count too"
    fast = estimate.estimate(ready.job, ready.model, ready.engine, ready.trunk, Ahead(), STEADY)
    slow = training.make_ready(training.resolve(small(csv_file, bert, runtime__fast="off")))
    stock = estimate.estimate(slow.job, slow.model, slow.engine, slow.trunk, Ahead(), STEADY)
    assert stock.train_seconds > fast.train_seconds
    assert fast.steps == 2 * 6
    assert fast.train_seconds == pytest.approx(2 * (fast.epoch_seconds + fast.eval_seconds))


def test_memory_is_told_without_padding_where_none_is_computed(csv_file: Path, bert: Path) -> None:
    for fast in ("on", "off"):
        ready = training.make_ready(training.resolve(small(csv_file, bert, runtime__fast=fast)))
        lengths, batches = ready.job.train.encoded.lengths, ready.job.batches(0)
        assert lengths.min() < lengths.max()
        computed = max(lengths[rows].sum() if fast == "on" else lengths[rows].max() * len(rows) for rows in batches)
        found = estimate.estimate(ready.job, ready.model, ready.engine, ready.trunk, Ahead(), STEADY)
        assert found.needed_bytes == 10**9 + 10**6 * computed


def test_memory_is_told_by_several_rows_where_a_batch_has_one(
    csv_file: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = training.make_ready(training.resolve(small(csv_file, bert, train__batch_size=1)))
    growing = iter([10**9, 10**9 + 10**6, 10**9 + 3 * 10**6])
    monkeypatch.setattr(estimate.psutil.Process, "memory_info", lambda self: Memory(next(growing)))
    found = estimate.measure(ready.job, ready.model, ready.engine, ready.trunk)
    tokens = float(ready.job.train.encoded.lengths.mean())
    assert 3 * 10**6 / (20 * tokens) < found.train_bytes < 3 * 10**6 / (4 * tokens)
    assert found.eval_bytes == pytest.approx(found.train_bytes / 3)


def test_trying_a_batch_out_changes_no_byte(csv_file: Path, bert: Path, tmp_path: Path, quick: None) -> None:
    recipe = small(csv_file, bert, runtime__fast="off")  # there dropout comes from torch's own generator
    tried = training.train(recipe, out=str(tmp_path / "tried"))
    assert tried.metrics["estimated_train_seconds"] > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "measure", lambda job, model, engine, trunk: STEADY)
        untried = training.train(recipe, out=str(tmp_path / "untried"))
    assert contents(tried.adapter) == contents(untried.adapter)


@pytest.mark.usefixtures("steady")
class TestMemory:
    def test_what_does_not_fit_is_refused_with_what_does(
        self, csv_file: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(estimate, "available_memory", lambda: 100_000_000)
        monkeypatch.setattr(estimate.psutil.Process, "memory_info", lambda self: Memory(10**9))
        monkeypatch.setattr(estimate, "peak_rss_bytes", lambda: 10**9)
        with pytest.raises(ResourceError, match=r"would need about 1\.3 GB, and 1\.1 GB can be had") as refused:
            training.train(small(csv_file, bert), out=str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()
        fits = int(refused.value.mend.partition("train.batch_size=")[2].partition(";")[0])
        assert 1 <= fits < 16
        planned = training.plan(small(csv_file, bert, train__batch_size=fits))
        estimate.check_memory(planned.ready.job, planned.speed, planned.estimate)

    def test_memory_that_was_given_back_is_not_needed(
        self, csv_file: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(estimate, "peak_rss_bytes", lambda: 10**15)
        planned = training.plan(small(csv_file, bert))
        assert planned.estimate.peak_bytes == 10**15
        estimate.check_memory(planned.ready.job, planned.speed, planned.estimate)

    def test_where_one_row_does_not_fit_no_batch_size_is_named(
        self, csv_file: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(estimate, "available_memory", lambda: 1_000_000)
        monkeypatch.setattr(estimate.psutil.Process, "memory_info", lambda self: Memory(10**9))
        with pytest.raises(ResourceError, match=r"memory\.too_little|would need") as refused:
            training.train(small(csv_file, bert), out=str(tmp_path / "run"))
        assert "batch_size" not in refused.value.mend


class Memory:
    def __init__(self, rss: int) -> None:
        self.rss = rss


class TestCommands:
    def test_estimate_says_time_and_memory_and_writes_nothing(self, csv_file: Path, bert: Path, tmp_path: Path) -> None:
        before = sorted(tmp_path.iterdir())
        done = CliRunner().invoke(cli.app, ["estimate", str(csv_file), "--base", str(bert)])
        assert done.exit_code == 0, done.output
        assert "86 rows to train on" in done.stdout
        assert "of training" in done.stdout
        assert "GB of memory" in done.stdout
        assert sorted(tmp_path.iterdir()) == before
        done = CliRunner().invoke(cli.app, ["estimate", str(csv_file), "--base", str(bert), "--json"])
        found = json.loads(done.stdout)
        assert found["rows"] == 86
        assert found["estimate"]["train_seconds"] > 0
        assert found["estimate"]["peak_bytes"] > 10**8

    @pytest.mark.usefixtures("steady", "quick")
    def test_a_budget_is_kept_in_the_recipe_and_repeats(self, bert: Path, tmp_path: Path) -> None:
        file = write_csv(tmp_path / "many.csv", reviews(2_000))
        full = training.plan(config.assemble(flags={"data.train": (str(file),), "base.model": str(bert)}))
        budget = f"{max(1, round(full.estimate.train_seconds / 6))}s"
        found: list[dict[str, Any]] = []
        run = training.train(
            config.assemble(flags={"data.train": (str(file),), "base.model": str(bert)}),
            out=str(tmp_path / "run"),
            budget=budget,
            observe=lambda event: found.append(dict(event)),
        )
        start = next(event for event in found if event["event"] == "start")
        assert start["budget"]["train.num_epochs"] == 2
        assert start["rows"] == start["budget"]["data.limit_train"] < 1_800
        assert f"# --budget {budget}" in (run.path / "recipe.toml").read_text("utf-8")
        again = training.train(config.load_recipe(str(run.path / "recipe.toml")), out=str(tmp_path / "again"))
        assert contents(run.adapter) == contents(again.adapter)

    def test_a_dry_run_measures_nothing(self, csv_file: Path, bert: Path) -> None:
        done = CliRunner().invoke(cli.app, ["train", str(csv_file), "--base", str(bert), "--dry-run", "--budget", "5m"])
        assert isinstance(done.exception, RecipeError)
        assert "trimtab estimate" in str(done.exception)


@pytest.mark.usefixtures("quick")
def test_after_twenty_steps_the_rest_is_told_again(csv_file: Path, bert: Path, tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    training.train(
        small(csv_file, bert, train__num_epochs=4, train__early_stopping_patience=0),
        out=str(tmp_path / "run"),
        observe=lambda event: found.append(dict(event)),
    )
    told = [event for event in found if event["event"] == "forecast"]
    assert [event["step"] for event in told] == [20]
    left = [event["remaining_s"] for event in found if event["event"] == "progress" and "remaining_s" in event]
    assert left[-1] < left[0]


def test_remaining_time_counts_evaluations() -> None:
    common = {"step_seconds": 10.0, "tokens": 100, "tokens_left": 200, "evals_left": 2, "eval_tokens": 50}
    assert estimate.remaining_seconds(**common, eval_seconds=0.0, evals=0) == pytest.approx(20 + 2 * 0.4 * 0.1 * 50)
    assert estimate.remaining_seconds(**common, eval_seconds=9.0, evals=3) == pytest.approx(20 + 2 * 3)


def test_one_thread_on_several_cores_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "usable_cores", lambda: 4)
    cpu = device.torch.device("cpu")
    assert "--set runtime.threads=4" in Placement(cpu, "", 1, "OMP_NUM_THREADS").throttled
    assert Placement(cpu, "", 2, "").throttled == ""
    monkeypatch.setattr(device, "usable_cores", lambda: 1)
    assert Placement(cpu, "", 1, "").throttled == ""
