"""Finished runs, and methods over seeds, against each other."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import reviews, write_csv
from test_training import small
from typer.testing import CliRunner

from trimtab import comparison, config, evaluation, rivals, rundir, training, trials
from trimtab.cli import app
from trimtab.errors import ArtefactError, DivergedError, RecipeError, ResourceError
from trimtab.resolve import resolve

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, bert: Path, quick_module: None) -> list[Path]:
    """A run of one brief epoch and one that has learned, judged on the same rows."""
    folder = tmp_path_factory.mktemp("runs")
    train, evaluation = write_csv(folder / "t.csv", reviews(96)), write_csv(folder / "e.csv", reviews(60))
    return [
        training.train(
            small(
                train,
                bert,
                data__eval=(str(evaluation),),
                train__num_epochs=epochs,
                train__learning_rate=rate,
                train__head_start="random",
            ),
            out=str(folder / name),
        ).path
        for name, epochs, rate in (("brief", 1, 1e-5), ("learned", 6, 1e-2))
    ]


def test_two_runs(runs: list[Path]) -> None:
    found = comparison.compare(runs)
    brief, learned = (json.loads((run / "metrics.json").read_text("utf-8")) for run in runs)
    (against,) = found["against"]
    assert against["difference"] == pytest.approx(learned["accuracy"] - brief["accuracy"])
    assert against["verdict"] == "better"
    assert against["p"] < 0.01
    rows = [pq.read_table(run / "predictions.parquet").to_pylist() for run in runs]
    changed = [(a, b) for a, b in zip(*rows, strict=True) if a["predicted_label"] != b["predicted_label"]]
    assert len(against["changed"]) == len(changed)
    assert {row["text"] for row in against["changed"]} == {a["text"] for a, _ in changed}
    mended = sum(b["predicted_label"] == b["label"] for _, b in changed)
    assert all(row["after"] == row["label"] for row in against["changed"][:mended])
    for label, by in against["per_class"].items():
        assert by["recall"] == pytest.approx(
            learned["per_class"][label]["recall"] - brief["per_class"][label]["recall"]
        )


def test_texts_and_labels_cannot_drive_the_terminal(runs: list[Path]) -> None:
    found = comparison.compare(runs)
    changed, per_class = found["against"][0]["changed"], found["against"][0]["per_class"]
    changed[0] |= {"text": "a\x1b]0;owned\x07", "label": "\x1b[2J", "before": "\u202e", "after": "\x9b"}
    per_class["\x1b[31m"] = {"f1": 1.0, "recall": 1.0}
    assert all(line.isprintable() for line in comparison.compare_lines(found))


def test_the_command_prints_it_and_json_has_every_changed_row(runs: list[Path]) -> None:
    names = [str(run) for run in runs]
    printed = CliRunner().invoke(app, ["compare", *names]).output
    assert "better" in printed
    assert "McNemar p" in printed
    assert "60 rows that all of them answered" in printed
    found = json.loads(CliRunner().invoke(app, ["compare", *names, "--json", "--metric", "macro_f1"]).output)
    assert found["metric"] == "macro_f1"
    assert found["against"][0]["difference"] == pytest.approx(
        found["runs"][1]["macro_f1"] - found["runs"][0]["macro_f1"]
    )


def test_what_cannot_be_compared_is_refused(runs: list[Path], tmp_path: Path, bert: Path) -> None:
    with pytest.raises(RecipeError, match='Did you mean "accuracy"'):
        comparison.compare(runs, "acuracy")
    with pytest.raises(RecipeError, match="One run alone"):
        comparison.compare(runs[:1])
    bare = Path(shutil.copytree(runs[0], tmp_path / "bare"))
    (bare / "predictions.parquet").unlink()
    with pytest.raises(ArtefactError, match=r"no predictions\.parquet"):
        comparison.compare([runs[0], bare])
    other = training.train(
        small(runs[0].parent / "t.csv", bert, data__eval=(str(write_csv(tmp_path / "o.csv", reviews(61))),)),
        out=str(tmp_path / "other"),
    ).path
    with pytest.raises(ArtefactError, match=r"60 rows and .*61") as caught:
        comparison.compare([runs[0], other])
    assert f"trimtab eval {runs[0]} FILE and trimtab eval {other} FILE" in caught.value.mend
    named = [(text, {"pos": "yes", "neg": "no"}[label]) for text, label in reviews(60)]
    relabelled = training.train(small(write_csv(tmp_path / "n.csv", named), bert), out=str(tmp_path / "named")).path
    with pytest.raises(ArtefactError, match="known to one alone") as caught:
        comparison.compare([runs[0], relabelled])
    assert caught.value.mend == "train both on the same labels", "no label is known to both"


def test_runs_judged_on_other_rows_can_be_compared_as_the_error_says(
    runs: list[Path], tmp_path: Path, bert: Path
) -> None:
    other = training.train(small(runs[0].parent / "t.csv", bert, train__num_epochs=1), out=str(tmp_path / "other")).path
    with pytest.raises(ArtefactError, match="judged on") as caught:
        comparison.compare([runs[0], other])
    assert caught.value.mend.endswith("trimtab train --recipe RUN/recipe.toml --test FILE")
    test = str(write_csv(tmp_path / "test.csv", reviews(30)))
    again = []
    for run in (runs[0], other):
        assert evaluation.evaluate(run, [test])["eval_rows"] == 30
        layered = config.assemble(str(run / "recipe.toml"), {"data.test": (test,)})
        again.append(training.train(layered, out=str(tmp_path / f"{run.name}-again")).path)
    assert comparison.compare(again)["rows"] == 30


def test_damaged_answers_are_an_error_of_ours(runs: list[Path], tmp_path: Path) -> None:
    torn = Path(shutil.copytree(runs[0], tmp_path / "torn"))
    file = torn / "predictions.parquet"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ArtefactError, match="cannot be read"):
        comparison.compare([runs[0], torn])


# -- methods over seeds -----------------------------------------------------------------------------------------

METHODS = ("lora", "head", "full")
METRICS = ("accuracy", "macro_f1", "loss")


def in_this_process(command: Sequence[str], log: Path) -> int:
    """A trial without the seconds that a process of its own takes; the long tier starts real ones."""
    if "trimtab.rivals" in command:
        rivals.run(Path(command[-1]))
        return 0
    result = CliRunner().invoke(app, list(command[4:]), catch_exceptions=False)
    log.write_text(result.output, "utf-8")
    return result.exit_code


@pytest.fixture(scope="module")
def compared(
    tmp_path_factory: pytest.TempPathFactory, bert: Path, quick_module: None
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """lora, head and full over two seeds and two rates; twice, the second time without a training."""
    folder = tmp_path_factory.mktemp("methods")
    layered = small(write_csv(folder / "rows.csv", reviews(120)), bert)
    plan = trials.Plan(METHODS, seeds=2, rates=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "_in_a_process", in_this_process)
        found = trials.run(layered, plan, out=str(folder / "out"), tell=print)
        patch.setattr(trials, "_in_a_process", lambda command, log: pytest.fail(f"trained again: {command}"))
        assert trials.run(layered, plan, out=str(folder / "out"), tell=print) == found
        yield folder / "out", found


@pytest.mark.long
def test_a_comparison_that_is_killed_repeats_nothing_that_finished(tmp_path: Path, bert: Path) -> None:
    folder = tmp_path
    file = write_csv(folder / "rows.csv", reviews(120))
    command = [sys.executable, "-m", "trimtab", "compare", str(file), "--methods", ",".join(METHODS)]
    command += ["--base", str(bert), "--seeds", "2", "--rates", "2", "--set", "train.num_epochs=2", "--json"]
    command += ["--out", str(folder / "out")]
    begun = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    while not list((folder / "out").glob("trials/*/*/seed-*/metrics.json")) and begun.poll() is None:
        time.sleep(0.05)
    begun.kill()
    begun.communicate()
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("trials/*/*/seed-*/metrics.json")}
    assert before
    time.sleep(1.0)  # a trial of the killed process may still be writing its run
    ended = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    for _ in range(20):
        if ended.returncode == 0 or "is writing this run" not in ended.stderr:
            break
        time.sleep(1.0)
        ended = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert ended.returncode == 0, ended.stderr
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    found = json.loads(ended.stdout)
    assert [one["method"] for one in found["methods"]] == list(METHODS)
    assert all(one["peak_rss_bytes"] > 1e8 for one in found["methods"])


def test_methods_are_trained_at_equal_tuning_and_compared(compared: tuple[Path, dict[str, Any]]) -> None:
    folder, found = compared
    assert [one["method"] for one in found["methods"]] == list(METHODS)
    for one in found["methods"]:
        tried = {path.parent.name for path in folder.glob(f"trials/{one['method']}/*/seed-42")}
        assert len(tried) == 2
        assert len(one["accuracies"]) == (1 if one["method"] == "head" else 2)  # the probe has no seed
        assert one["ci95"][0] <= one["accuracy"] <= one["ci95"][1]
        assert min(one[key] for key in ("trainable_parameters", "adapter_bytes", "core_seconds", "peak_rss_bytes")) > 0
    lora, head, full = found["methods"]
    assert full["trainable_parameters"] > lora["trainable_parameters"] > head["trainable_parameters"]
    assert {"difference", "verdict"} <= set(full)
    assert "| full |" in (folder / "comparison.md").read_text("utf-8")


def test_the_rate_is_chosen_by_the_evaluation_rows(compared: tuple[Path, dict[str, Any]]) -> None:
    folder, found = compared
    for one in found["methods"]:
        tried = {
            path.parent.parent.name: json.loads(path.read_text("utf-8"))
            for path in folder.glob(f"trials/{one['method']}/*/seed-42/metrics.json")
        }
        best = max(tried, key=lambda rate: (tried[rate]["chosen_on_accuracy"], -tried[rate]["chosen_on_loss"]))
        assert f"{one['rate']:.2g}" == best


def test_the_rows_that_decide_were_not_trained_on(compared: tuple[Path, dict[str, Any]]) -> None:
    folder, found = compared
    train, test = (pq.read_table(folder / "data" / f"{role}.parquet").to_pylist() for role in ("train", "test"))
    assert found["test_rows"] == len(test)
    assert not {row["text"] for row in train} & {row["text"] for row in test}
    assert 0.1 < len(test) / (len(train) + len(test)) < 0.3


def test_rows_that_were_changed_since_are_those_of_before(
    compared: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab import config

    kept = Path(shutil.copytree(compared[0], tmp_path / "c"))
    wanted = [pq.read_table(kept / "data" / f"{role}.parquet") for role in ("train", "test")]
    pq.write_table(
        wanted[0].slice(0, len(wanted[1])), kept / "data" / "test.parquet"
    )  # whoever learned them knows them
    (kept / "data" / "train.parquet").write_bytes(b"PAR1")
    trials._split(config.load_recipe(str(kept / trials.PLAN)), kept)
    assert [pq.read_table(kept / "data" / f"{role}.parquet") for role in ("train", "test")] == wanted
    monkeypatch.setattr(pq, "write_table", lambda *given: pytest.fail("the same rows were written again"))
    trials._split(config.load_recipe(str(kept / trials.PLAN)), kept)


def test_a_trial_that_was_judged_on_other_rows_is_in_no_table(
    compared: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(compared[0], tmp_path / "c"))
    (place,) = (folder / "trials" / "full").glob("*/seed-43")
    rows = pq.read_table(place / "predictions.parquet")
    pq.write_table(rows.set_column(0, "text", [["another text"] * len(rows)]), place / "predictions.parquet")
    rate = place.parent.name
    done = {"full": [trials.Trial("full", float(rate), seed) for seed in (42, 43)]}
    with pytest.raises(ArtefactError, match="judged on other rows") as told:
        trials._compare(folder, done, trials.Plan(METHODS, seeds=2, rates=2))
    assert str(place) in told.value.mend


def test_full_fine_tuning_learns_and_the_probe_has_no_seeds(compared: tuple[Path, dict[str, Any]]) -> None:
    _, found = compared
    _, head, full = found["methods"]
    assert full["accuracy"] > 0.5
    assert head["std"] is None


def made_up(
    monkeypatch: pytest.MonkeyPatch, right: Callable[[str], np.ndarray], diverging: tuple[str, ...] = ()
) -> None:
    """Trials without a training: each answers the rows rightly that `right` says of its name, or diverges."""

    def train(place: rundir.RunDir, layered: config.Layered, trial: trials.Trial) -> dict[str, Any]:
        if trial.name.startswith(diverging):
            raise DivergedError("trial.failed", "it diverged")
        place.path.mkdir(parents=True)
        costs = dict.fromkeys(("trainable_parameters", "adapter_bytes", "core_seconds", "peak_rss_bytes"), 1)
        scores = dict.fromkeys((*(f"chosen_on_{key}" for key in METRICS), "macro_f1", "accuracy"), 0.5)
        place.metrics.write_text(json.dumps({**costs, **scores, "per_class": {}}), "utf-8")
        return trials._metrics(place)

    def answers(place: rundir.RunDir) -> Any:
        told = right(str(place.path.relative_to(place.path.parents[2])))
        return SimpleNamespace(rows=SimpleNamespace(texts=(), told=told, truth=np.ones(len(told), np.bool_)))

    monkeypatch.setattr(trials, "_train", train)
    monkeypatch.setattr(trials, "_answers", answers)


@pytest.mark.parametrize(
    ("diverging", "left", "lost"),
    [
        (("lora/0.001/seed-43",), ["head", "full"], ["lora"]),
        (("full/",), ["lora", "head"], ["full"]),
        (("lora/", "head/", "full/"), [], []),
    ],
)
def test_a_method_that_diverges_costs_the_others_nothing(
    diverging: tuple[str, ...],
    left: list[str],
    lost: list[str],
    csv_file: Path,
    bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made_up(monkeypatch, lambda name: np.arange(9) < len(name) % 9, diverging)
    layered = small(csv_file, bert, train__learning_rate=1e-3)
    plan = trials.Plan(METHODS, seeds=2, rates=1)
    if not left:
        with pytest.raises(DivergedError, match="Every method diverged"):
            trials.run(layered, plan, out=str(tmp_path / "o"), tell=print)
        return
    found = trials.run(layered, plan, out=str(tmp_path / "o"), tell=print)
    assert [one["method"] for one in found["methods"]] == left
    assert [one["method"] for one in found["diverged"]] == lost
    assert "verdict" in found["methods"][1]
    for lines in (trials.table_lines(found), trials.markdown_lines(found)):
        assert f"! {lost[0]} diverged at its best rate" in "\n".join(lines)


@pytest.mark.parametrize(
    ("seeds", "rows", "verdict"), [(1, 4, "not resolved"), (1, 8, "better"), (5, 4, "not resolved"), (5, 8, "better")]
)
def test_a_verdict_needs_more_rows_than_chance_would_give(
    seeds: int, rows: int, verdict: str, csv_file: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(monkeypatch, lambda name: np.arange(1_000) >= (0 if name.startswith("full") else rows))
    plan = trials.Plan(("lora", "full"), seeds=seeds, rates=1, margin=0.001)
    found = trials.run(small(csv_file, bert), plan, out=str(tmp_path / "o"), tell=print)
    assert found["methods"][1]["verdict"] == verdict


def test_what_is_wrong_with_the_rows_is_told(
    csv_file: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(monkeypatch, lambda name: np.arange(9) < 5)
    told: list[str] = []
    layered = small(csv_file, bert, data__test=(str(csv_file),))
    trials.run(layered, trials.Plan(("lora", "full"), seeds=1), out=str(tmp_path / "o"), tell=told.append)
    assert any(line.startswith("! ") and "stand in the training file too" in line for line in told)


def test_another_comparison_is_not_mixed_into_a_folder(
    compared: tuple[Path, dict[str, Any]], tmp_path: Path, bert: Path
) -> None:
    from trimtab import config

    folder, _ = compared
    layered = config.assemble(
        "default", {"data.train": (str(write_csv(tmp_path / "x.csv", reviews(80))),), "base.model": str(bert)}
    )
    with pytest.raises(RecipeError, match="has no name"):
        trials.run(layered, trials.Plan(("lora", "full")), out=" ", tell=print)
    before = sorted(os.listdir(folder))
    with pytest.raises(RecipeError, match="another recipe or other rows"):
        trials.run(layered, trials.Plan(("lora", "full")), out=str(folder), tell=print)
    assert sorted(os.listdir(folder)) == before


def test_wrong_plans_are_refused_before_anything_is_written(
    csv_file: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layered = small(csv_file, bert)
    for methods, said in ((("lora", "loar"), 'no method "loar"'), (("lora",), "One method alone")):
        with pytest.raises(RecipeError, match=said):
            trials.run(layered, trials.Plan(methods), out=str(tmp_path / "o"), tell=print)
    assert not (tmp_path / "o").exists()
    with pytest.raises(RecipeError, match="from 0 up to 1"):
        trials.run(layered, trials.Plan(("lora", "full"), margin=float("nan")), out=str(tmp_path / "o"), tell=print)
    with pytest.raises(RecipeError, match="would favour one"):
        trials.run(
            layered.override({"lora.init_from": "x"}, "test"),
            trials.Plan(("lora", "full")),
            out=str(tmp_path / "o"),
            tell=print,
        )
    monkeypatch.setattr(trials, "available_memory", lambda: 1)
    with pytest.raises(ResourceError, match="Full fine-tuning"):
        trials.run(layered, trials.Plan(("lora", "full")), out=str(tmp_path / "o"), tell=print)
    assert not (tmp_path / "o").exists()


def test_a_damaged_trial_is_named_with_the_way_out(
    compared: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _found = compared
    place = rundir.RunDir(Path(shutil.copytree(folder, tmp_path / "c")) / "trials" / "full")
    (answers,) = place.path.glob("*/seed-43/predictions.parquet")
    answers.write_bytes(b"PAR")
    with pytest.raises(ArtefactError, match="trial that had finished is damaged") as told:
        trials._answers(rundir.RunDir(answers.parent))
    assert "delete the folder" in told.value.mend
    (answers.parent / "metrics.json").write_text("{bad", "utf-8")
    with pytest.raises(ArtefactError, match=r"metrics\.json"):
        trials.train_once(rundir.RunDir(answers.parent), None)  # type: ignore[arg-type]


def test_a_best_rate_at_the_edge_of_its_grid_is_told(compared: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    _, found = compared
    assert all(one["at_edge"] for one in found["methods"])  # of two rates, each is at an edge
    assert "at an edge" in trials.table_lines(found)[-2]
    for rate in (3.3e-4, 1e-3, 3e-3):
        (tmp_path / "trials" / trials.Trial("lora", rate, 42).name).mkdir(parents=True)
    edges = [trials._is_at_edge(tmp_path, "lora", trials.Trial("lora", rate, 42)) for rate in (3.3e-4, 1e-3, 3e-3)]
    assert edges == [True, False, True]


def test_rows_that_are_kept_for_the_test_keep_the_names_of_their_columns(tmp_path: Path, bert: Path) -> None:
    file = write_csv(tmp_path / "rows.csv", reviews(80), header="review,sentiment")
    layered = small(
        file, bert, data__eval=(str(write_csv(tmp_path / "e.csv", reviews(20), header="review,sentiment")),)
    )
    folder, split = trials._prepare(layered, str(tmp_path / "out"))
    assert pq.read_table(folder / "data" / "test.parquet").column_names == ["review", "sentiment"]
    assert len(resolve(split).eval.examples) == 20


@pytest.mark.parametrize(("metric", "best"), [("accuracy", 0.2), ("macro_f1", 0.1), ("loss", 0.3)])
def test_a_rate_is_chosen_by_the_metric_of_the_recipe_and_one_that_diverges_last(
    metric: str, best: float, tmp_path: Path, csv_file: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {0.1: (0.7, 0.6, 3.0), 0.2: (0.8, 0.5, 2.0), 0.3: (0.0, 0.0, 1.0)}

    def carry_out(folder: Path, layered: Any, trial: trials.Trial, tell: Any) -> dict[str, Any]:
        if trial.rate not in scores:
            raise DivergedError("trial.failed", "it diverged")
        keys = ("chosen_on_accuracy", "chosen_on_macro_f1", "chosen_on_loss")
        return dict(zip(keys, scores[trial.rate], strict=True))

    monkeypatch.setattr(trials, "_carry_out", carry_out)
    tried = [trials.Trial("lora", rate, 42) for rate in (0.1, 0.2, 0.3, 1.0)]
    chosen = [trials._chosen_by(tmp_path, small(csv_file, bert), trial, metric, print) for trial in tried]
    assert tried[chosen.index(max(chosen))].rate == best
    assert min(chosen) == chosen[-1]


def test_a_folder_of_trials_is_no_run(compared: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = compared
    with pytest.raises(ArtefactError, match="not a run directory"):
        training.resume(folder)


def test_why_a_trial_failed_is_told_with_its_own_exit_code(
    csv_file: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(command: Sequence[str], log: Path) -> int:
        log.write_text("step 1\nerror [train.diverged]: not finite\n  mend: smaller\n", "utf-8")
        return 6

    for tried in (failing, lambda command, log: pytest.fail("it was trained into divergence again")):
        monkeypatch.setattr(trials, "_in_a_process", tried)
        with pytest.raises(DivergedError, match=r"error \[train\.diverged\]: not finite"):
            trials.train_once(rundir.RunDir(tmp_path / "t"), small(csv_file, bert))


def test_a_signal_lets_a_trial_save(csv_file: Path, bert: Path, tmp_path: Path) -> None:
    """The trial hears it from its parent and ends as it would alone; then the same command goes on."""
    command = [sys.executable, "-m", "trimtab", "compare", str(csv_file), "--methods", "lora,head", "--base", str(bert)]
    command += ["--seeds", "1", "--rates", "1", "--set", "train.num_epochs=2000", "--out", str(tmp_path / "out")]
    begun = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8")
    trial = tmp_path / "out" / "trials" / "lora"
    while not any('"epoch"' in file.read_text("utf-8") for file in trial.glob("*/seed-42/events.jsonl")):
        assert begun.poll() is None
        time.sleep(0.05)
    begun.terminate()
    _, said = begun.communicate()
    assert begun.returncode == 75, said
    (log,) = trial.glob("*/seed-42.log")
    assert "stopped by SIGTERM; go on with" in log.read_text("utf-8")
    last = json.loads((log.with_suffix("") / "events.jsonl").read_text("utf-8").splitlines()[-1])
    assert last["event"] == "checkpoint"


def test_flags_that_belong_elsewhere_are_refused(runs: list[Path], csv_file: Path) -> None:
    for arguments, said in (
        ([str(run) for run in runs] + ["--seeds", "3"], "belong to --methods"),
        ([str(runs[0]), str(csv_file)], "is a file of rows"),
        ([str(csv_file), "--methods", "lora, full", "--metric", "macro_f1"], "compared by accuracy"),
    ):
        result = CliRunner().invoke(app, ["compare", *arguments])
        assert isinstance(result.exception, RecipeError)
        assert said in str(result.exception)
