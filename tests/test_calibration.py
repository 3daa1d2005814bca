"""Temperatures: fitted, told, kept in the adapter and used."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import reviews, write_csv
from test_training import small

import trimtab
from trimtab import calibration, report, training
from trimtab.classification import calibration_error, mean_loss, softmax
from trimtab.errors import ArtefactError, RecipeError

pytestmark = pytest.mark.usefixtures("quick")


def overconfident(rows: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits float32[n, 3] of honest scores times a temperature, and labels drawn from those scores."""
    rng = np.random.default_rng(seed)
    honest = rng.normal(0, 1.5, (rows, 3)).astype(np.float32)
    labels = np.array([rng.choice(3, p=p) for p in softmax(honest)])
    return honest * np.float32(temperature), labels


def test_the_temperature_that_was_multiplied_in_is_found() -> None:
    logits, labels = overconfident(5_000, 3.0)
    found = calibration.fit_temperature(logits, labels)
    assert found == pytest.approx(3.0, rel=0.07)
    assert mean_loss(logits / np.float32(found), labels) <= min(
        mean_loss(logits / np.float32(t), labels) for t in (found * 0.9, found * 1.1, 1.0)
    )


def test_calibration_error_by_hand() -> None:
    # Two rows at 0.9, one right: |0.9 - 0.5|; two at 0.6, both right: |0.6 - 1|. Mean over the rows: 0.4.
    logits = np.log(np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]], np.float32))
    assert calibration_error(logits, np.array([0, 1, 0, 0])) == pytest.approx(0.4, abs=1e-6)


def test_test_rows_are_judged_under_the_temperature_of_the_evaluation_rows() -> None:
    found = calibration.judge(*overconfident(2_000, 3.0), overconfident(2_000, 3.0, seed=1))
    assert (found["reported_on"], found["fitted_rows"]) == ("test", 2_000)
    assert found["ece_after"] < 0.03 < 0.1 < found["ece_before"]
    assert found["loss_after"] < found["loss_before"]


def test_without_test_rows_no_half_is_judged_under_its_own_temperature() -> None:
    logits, labels = overconfident(400, 3.0)
    found = calibration.judge(logits, labels, None)
    rng = np.random.default_rng(calibration._SEED)
    draws = [np.array_split(rng.permutation(400), 2) for _ in range(calibration._DRAWS)]
    expected = [
        mean_loss(logits[half] / np.float32(calibration.fit_temperature(logits[other], labels[other])), labels[half])
        for first, second in draws
        for half, other in ((first, second), (second, first))
    ]
    assert found["reported_on"] == "halves"
    assert found["loss_after"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert found["loss_after"] > mean_loss(logits / np.float32(found["temperature"]), labels)  # that saw every row


def test_a_temperature_that_does_harm_is_told() -> None:
    figures = {"temperature": 3.06, "fitted_rows": 16, "reported_on": "halves", "loss_before": 0.9, "ece_before": 0.2}
    (better,) = report.calibration_lines({"calibration": figures | {"loss_after": 1.0, "ece_after": 0.1}})
    (worse,) = report.calibration_lines({"calibration": figures | {"loss_after": 1.0, "ece_after": 0.3}})
    (hardly,) = report.calibration_lines({"calibration": figures | {"loss_after": 0.91, "ece_after": 0.3}})
    assert better.startswith("scores at")
    assert hardly.startswith("scores at")
    assert worse.startswith("! scores at temperature 3.06")
    assert worse.endswith("they are worse for it; it was fitted on 16 rows")


def test_halves_of_150_rows_have_a_temperature_too() -> None:
    found = calibration.judge(*overconfident(150, 4.0), None)
    assert found["temperature"] > 2
    assert found["loss_after"] < found["loss_before"]


def test_few_rows_move_it_little_and_the_right_way() -> None:
    """What a handful of rows says is weighed against 1; more of them are believed."""
    found = {
        rows: [calibration.fit_temperature(*overconfident(rows, 5.0, seed)) for seed in range(20)] for rows in (5, 80)
    }
    assert 1.3 < np.median(found[5]) < np.median(found[80]) < 5.5
    assert max(found[5]) < 10  # without a prior, five rows with one mistake reach the end of the search
    assert calibration.fit_temperature(np.zeros((0, 2), np.float32), np.zeros(0, np.int64)) == 1.0
    assert calibration.judge(*overconfident(1, 3.0), None)["fitted_rows"] == 1


def test_a_perfect_model_keeps_finite_scores() -> None:
    labels = np.arange(200) % 2
    logits = np.where(np.arange(2) == labels[:, None], 5.0, -5.0).astype(np.float32)
    assert 0.49 < calibration.fit_temperature(logits, labels) < 1
    assert np.isfinite(calibration.judge(logits, labels, None)["loss_after"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, bert: Path, quick_module: None) -> Path:
    """A run whose temperature is not 1: every tenth label of 120 evaluation rows is wrong."""
    folder = tmp_path_factory.mktemp("cooled")
    rows = reviews(120)
    for i in range(0, 120, 10):
        rows[i] = (rows[i][0], "pos" if rows[i][1] == "neg" else "neg")
    layered = small(
        write_csv(folder / "train.csv", reviews(160)),
        bert,
        data__eval=(str(write_csv(folder / "eval.csv", rows)),),
        train__num_epochs=6,
        train__learning_rate=1e-2,
    )
    return training.train(layered, out=str(folder / "run")).path


def test_predict_and_eval_use_the_temperature_and_raw_scores_do_not(run: Path) -> None:
    classifier = trimtab.load(run)
    temperature = classifier.adapter.temperature
    assert temperature == json.loads((run / "metrics.json").read_text("utf-8"))["calibration"]["temperature"] != 1.0
    text = "the film was good 1"
    logits = classifier.logits(classifier.encode([text]))
    assert classifier.predict([text])[0].score == pytest.approx(softmax(logits / np.float32(temperature)).max())
    assert classifier.predict([text], raw_scores=True)[0].score == pytest.approx(softmax(logits).max())
    file = run.parent / "eval.csv"
    cooled, raw = trimtab.evaluate(run, file), trimtab.evaluate(run, file, raw_scores=True)
    assert cooled["accuracy"] == raw["accuracy"]
    assert cooled["loss"] < raw["loss"]
    assert (cooled["temperature"], raw["temperature"]) == (temperature, 1.0)
    assert raw["loss"] == pytest.approx(json.loads((run / "metrics.json").read_text("utf-8"))["loss"], abs=1e-5)


def test_low_scores_are_unsure(run: Path) -> None:
    classifier = trimtab.load(run)
    texts = ["the film was good 1", "the film was good bad 1"]
    scores = sorted(prediction.score for prediction in classifier.predict(texts))
    between = sum(scores) / 2
    found = [prediction.label for prediction in classifier.predict(texts, min_score=between)]
    assert found.count("unsure") == 1
    assert "unsure" not in {prediction.label for prediction in classifier.predict(texts)}
    with pytest.raises(RecipeError, match="from 0 to 1"):
        classifier.predict(texts, min_score=80)


@pytest.mark.parametrize("said", [0, -1, "2", None, float("inf")])
def test_a_temperature_that_cannot_be_is_refused(run: Path, tmp_path: Path, said: object) -> None:
    import shutil

    from trimtab import adapter

    shutil.copytree(run / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "trimtab.json"
    meta = json.loads(file.read_text("utf-8")) | {"temperature": said}
    meta.pop("sha256")
    file.write_text(json.dumps(meta | {"sha256": adapter._digest(meta)}), "utf-8")
    with pytest.raises(ArtefactError, match="temperature"):
        trimtab.load(tmp_path / "adapter")
