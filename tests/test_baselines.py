"""What an adapter is compared to: counted words and the untrained base, fitted on the same rows."""

import json
from dataclasses import replace
from pathlib import Path

import bases
import numpy as np
import pytest
import torch
from conftest import reviews, write_csv
from sklearn.feature_extraction.text import CountVectorizer
from test_training import small

import trimtab
from trimtab import baselines, build, report, resolve, training
from trimtab.resolve import Job

pytestmark = pytest.mark.usefixtures("quick")


def ready(csv_file: Path, base: Path, **settings: object) -> build.Ready:
    return build.make_ready(resolve.resolve(small(csv_file, base, **settings)))


def test_words_are_those_of_scikit_learn_and_chinese_characters_one_by_one() -> None:
    words = CountVectorizer(token_pattern=baselines._WORD).build_tokenizer()
    english = "It's a so-so film: 10/10, naïve_but brave! x"
    assert words(english) == CountVectorizer().build_tokenizer()(english)
    assert words("味道不错 very good吧") == [*"味道不错", "very", "good", "吧"]


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("first_only", [True, False])
def test_vectors_are_the_same_on_both_forwards_and_know_nothing_of_lora(
    csv_file: Path, tmp_path: Path, kind: str, first_only: bool
) -> None:
    base = bases.write_base(tmp_path / kind, kind)
    fast, stock = ready(csv_file, base), ready(csv_file, base, runtime__fast="off")
    assert (fast.engine.name, stock.engine.name) == ("fast", "stock")
    encoded, rows = fast.job.train.encoded, np.array([5, 0, 17, 3, 3])

    def vectors(one: build.Ready) -> torch.Tensor:
        assert one.engine.vectors
        return one.engine.vectors(encoded, rows, first_only=first_only)

    with torch.no_grad():
        before = vectors(fast)
        assert torch.allclose(before, vectors(stock), atol=1e-5)
        assert not torch.allclose(before[0], before[1], atol=1e-3)
        for one in (fast, stock):
            for name, parameter in one.model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.5)
            assert torch.allclose(vectors(one), before, atol=1e-5)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, bert: Path, quick_module: None) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("told")
    file = write_csv(folder / "train.csv", reviews(96))
    layered = small(file, bert, data__eval=(str(write_csv(folder / "eval.csv", reviews(40))),), train__num_epochs=2)
    return training.train(layered, out=str(folder / "run")).path, folder / "eval.csv"


def test_a_run_tells_its_baselines_on_the_rows_that_judge_it(told: tuple[Path, Path]) -> None:
    run, _ = told
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    found = metrics["baselines"]
    assert found["majority"]["accuracy"] == 0.5
    # One word tells the label, so counting words gets every row.
    assert found["tfidf"]["accuracy"] == 1.0
    assert found["tfidf"]["rows"] == found["tfidf"]["of_rows"] == 96
    for one in (found["tfidf"], found["probe"]):
        assert one["difference"] == pytest.approx(metrics["accuracy"] - one["accuracy"])
        assert one["difference_ci95"][0] <= one["difference"] <= one["difference_ci95"][1]
        assert one["c"] in (1.0, 10.0)


def test_evaluation_of_a_run_has_the_same_baselines_and_an_adapter_alone_says_why_not(told: tuple[Path, Path]) -> None:
    run, file = told
    trained = json.loads((run / "metrics.json").read_text("utf-8"))["baselines"]
    again = trimtab.evaluate(run, file)
    for name in ("tfidf", "probe"):
        assert again["baselines"][name]["accuracy"] == trained[name]["accuracy"]
    assert "baselines_missing" not in again
    alone = trimtab.evaluate(run / "adapter", file)
    assert set(alone["baselines"]) == {"majority"}
    assert "adapter alone" in "\n".join(report.score_lines(alone))


def test_a_baseline_that_fails_costs_no_scores(told: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run, file = told

    def failing(*_: object) -> None:
        raise MemoryError("too many words")

    monkeypatch.setattr(baselines, "compute", failing)
    found = trimtab.evaluate(run, file)
    assert found["accuracy"] > 0
    assert "too many words" in found["baselines_missing"]


def test_evaluation_of_a_run_tells_the_rows_that_it_was_trained_on(told: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = told
    rows = reviews(30)
    mixed = write_csv(tmp_path / "mixed.csv", [*rows[:20], *((f"unseen {text}", label) for text, label in rows[20:])])
    found = trimtab.evaluate(run, mixed)
    assert (found["overlap_rows"], found["clean"]["eval_rows"]) == (20, 10)
    said = "\n".join(report.score_lines(found))
    assert "on the 10 rows that are in no other file of the run" in said
    assert "20 of these rows stand in the run's own files too" in said
    assert "overlap_rows" not in trimtab.evaluate(run / "adapter", mixed)


def test_a_run_whose_training_file_is_gone_is_evaluated_without(told: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    run, file = told
    shutil.copytree(run, tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.toml"
    recipe.write_text(recipe.read_text("utf-8").replace("train.csv", "gone.csv"), "utf-8")
    found = trimtab.evaluate(tmp_path / "run", file)
    assert set(found["baselines"]) == {"majority"}
    assert "could not be computed again" in found["baselines_missing"]


def test_an_adapter_that_does_not_beat_them_says_so() -> None:
    labels, right = np.arange(40) % 2, np.eye(2, dtype=np.float32)
    perfect = baselines.Baseline(labels, 1.0, 10)
    wrong = right[1 - labels]
    told = {"baselines": baselines.against(wrong, labels, {"tfidf": perfect}, 20)}
    lines = report.verdict_lines(told)
    assert lines[0].startswith("! this adapter is worse than counting words (TF-IDF): -1.000")
    assert "learned from 10 of 20 rows" in lines[1]
    told = {"baselines": baselines.against(right[labels], labels, {"tfidf": perfect}, 10)}
    assert report.verdict_lines(told)[0].startswith("! this adapter is not seen to beat")
    assert "McNemar" not in report.verdict_lines(told)[0], "the interval holds zero and says it all"
    answers = np.where(np.arange(40) < 4, 1 - labels, labels)  # 4 rows against none: an interval above zero, p 0.125
    told = {"baselines": baselines.against(right[labels], labels, {"tfidf": replace(perfect, answers=answers)}, 10)}
    (line,) = report.verdict_lines(told)
    assert line.startswith("! this adapter is not seen to beat counting words (TF-IDF): +0.100 (95 % interval +0.0")
    assert line.endswith("so few rows differ that chance may have done it (McNemar p 0.12)")
    guessing = replace(perfect, answers=np.zeros(40, np.int64))
    told = {"baselines": baselines.against(right[labels], labels, {"tfidf": guessing}, 10)}
    assert report.verdict_lines(told) == [
        "better than counting words (TF-IDF) by +0.500 (95 % interval +0.350 to +0.650, same rows)"
    ]


def test_the_probe_takes_a_sample_where_all_rows_would_cost_over_a_third_of_training(
    csv_file: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = ready(csv_file, bert)
    job: Job = one.job
    brief = baselines._probe(job, job.eval, one.engine.vectors, one.model, 1)  # type: ignore[arg-type]
    assert brief.rows == len(job.train.examples)  # so few are all encoded
    monkeypatch.setattr(baselines, "_FEWEST_FOR_SAMPLE", 10)
    whole = baselines._probe(job, job.eval, one.engine.vectors, one.model, 3)  # type: ignore[arg-type]
    brief = baselines._probe(job, job.eval, one.engine.vectors, one.model, 1)  # type: ignore[arg-type]
    assert whole.rows == len(job.train.examples)
    assert 0 < brief.rows < whole.rows


def test_texts_without_words_and_classes_of_one_row_do_not_stop_a_run(tmp_path: Path, bert: Path) -> None:
    rows = [("!?" * (1 + i % 3), "pos" if i % 2 else "neg") for i in range(20)] + [("...", "rare")]
    one = ready(write_csv(tmp_path / "odd.csv", rows), bert)
    found = baselines.compute(one.job, one.job.eval, one.engine.vectors, one.model, 3)
    assert all(len(baseline.answers) == len(one.job.eval.examples) for baseline in found.values())


def test_baselines_that_fail_cost_their_lines_and_not_the_adapter(
    csv_file: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*given: object) -> dict[str, baselines.Baseline]:
        raise MemoryError("too many words")

    monkeypatch.setattr(baselines, "compute", failing)
    run = training.train(small(csv_file, bert), out=str(tmp_path / "run"))
    assert run.adapter.is_dir()
    assert "too many words" in run.metrics["baselines_missing"]
    assert set(run.metrics["baselines"]) == {"majority"}
