"""The report of real runs: written with the run, read again from its files, and the same each time."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import reviews, write_csv
from samples import HOSTILE, all_metrics, scored
from test_page import Reader
from test_training import small

from trimtab import cli, markdown, runreport, training
from trimtab.errors import ArtefactError, ResourceError
from trimtab.rundir import RunDir

pytestmark = pytest.mark.usefixtures("quick_module")


@pytest.fixture(scope="module")
def whole(bert: Path, tmp_path_factory: pytest.TempPathFactory, quick_module: None) -> training.Run:
    """A run with a test file and display names; of its rows some are labelled wrongly."""
    folder = tmp_path_factory.mktemp("whole")
    rows = [(text, label if i % 11 else "posneg".replace(label, "")) for i, (text, label) in enumerate(reviews(96))]
    train, test = write_csv(folder / "reviews.csv", rows), write_csv(folder / "sealed.csv", rows[:44])
    names = {"neg": "差评/negative", "pos": "好评/positive"}
    layered = small(train, bert, data__test=(str(test),), data__names=names, train__log_every_steps=2)
    return training.train(layered, out=str(folder / "run"))


@pytest.fixture
def copy(whole: training.Run, tmp_path: Path) -> RunDir:
    """The run again, to be changed."""
    return RunDir(Path(shutil.copytree(whole.path, tmp_path / "copy")))


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`trimtab report` in this process: exit code, stdout and stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trimtab", "report", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return call


def change(file: Path, **values: object) -> None:
    """Sets keys of a JSON file; None takes one away."""
    found = json.loads(file.read_text("utf-8")) | values
    file.write_text(json.dumps({key: value for key, value in found.items() if value is not None}), "utf-8")


def test_a_run_leaves_its_report(whole: training.Run) -> None:
    text = whole.report.read_text("utf-8")
    Reader(text)
    assert f"accuracy {whole.metrics['accuracy']:.3f}" in text
    assert whole.path.name in text
    assert "好评" in text
    assert "sealed.csv" in text
    for part in ("curves", "matrix", "classes", "mistakes", "calibration", "data", "cost", "repeat"):
        assert f'id="{part}"' in text, part
    assert 'class="line train"' in text, "the training losses come from the events"


def test_the_card_says_what_the_files_say(whole: training.Run) -> None:
    """Two ways to the same findings: from memory before the adapter was written, and from the files afterwards."""
    assert (whole.adapter / "README.md").read_text("utf-8") == markdown.card(runreport.read(whole.path))


def test_the_card_is_the_same_wherever_and_whenever_the_run_was(bert: Path, tmp_path: Path) -> None:
    cards = []
    for place in ("a", "another place"):
        (tmp_path / place).mkdir()
        file = write_csv(tmp_path / place / "reviews.csv", reviews(64))
        run = training.train(small(file, bert, train__num_epochs=1), out=str(tmp_path / place / f"run {place}"))
        cards.append((run.adapter / "README.md").read_text("utf-8"))
    assert cards[0] == cards[1]
    assert str(tmp_path) not in cards[0]


def test_hostile_rows_and_labels_are_shown_and_nothing_else(bert: Path, tmp_path: Path) -> None:
    shown = HOSTILE.replace("\x00", "")
    file = tmp_path / "<b>reviews.jsonl"
    rows = [{"text": f"{shown} {text}", "label": f"{label}{shown}"} for text, label in reviews(64)]
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    run = training.train(small(file, bert, train__num_epochs=1), out=str(tmp_path / "run"))
    found = Reader(run.report.read_text("utf-8"))
    tags = [tag for tag, _ in found.elements]
    assert tags.count("script") == 1
    assert not {"img", "b"} & set(tags)
    assert "<script>alert" in "".join(found.texts)
    assert (run.adapter / "README.md").read_text("utf-8").isascii() is False
    assert "\x1b" not in (run.adapter / "README.md").read_text("utf-8")


def test_baselines_and_calibration_reach_page_and_markdown(copy: RunDir) -> None:
    rows = scored(44, 2, temperature=1.3)
    known = all_metrics(rows, ["neg", "pos"])
    change(copy.metrics, baselines=known["baselines"], calibration=known["calibration"])
    found = runreport.read(copy.path)
    assert [one.name for one in found.contenders] == ["adapter", "probe", "tfidf", "majority"]
    assert found.calibration is not None
    assert found.calibration.temperature == 1.3
    assert found.calibration.after != found.calibration.before
    runreport.write(copy, found)
    text = copy.report.read_text("utf-8")
    for shown in ("TF-IDF", "with temperature 1.30", "−0.020 … +0.040"):
        assert shown in text
        assert shown in markdown.report(found)


@pytest.mark.parametrize(
    "gone",
    [
        ("evaluations", "baselines", "majority_accuracy", "base_parameters", "total_parameters", "padding_pct"),
        ("train_seconds", "load_seconds", "verify_seconds", "total_seconds", "peak_rss_bytes", "tokens_per_s"),
        ("predictions.parquet", "events.jsonl", "data_report.json", "environment.json"),
    ],
)
def test_what_an_older_run_does_not_know_is_left_out(copy: RunDir, gone: tuple[str, ...]) -> None:
    for name in gone:
        (copy.path / name).unlink(missing_ok=True)
    change(copy.metrics, **dict.fromkeys(gone))
    found = runreport.read(copy.path)
    runreport.write(copy, found)
    Reader(copy.report.read_text("utf-8"))
    assert markdown.report(found, "zh").startswith("# 运行报告")


@pytest.mark.parametrize("damage", ["", "[]", '{"versions": 5, "processor": []}', '{"train": '])
def test_damaged_records_cost_their_part_of_the_report_and_no_more(copy: RunDir, damage: str) -> None:
    copy.environment.write_text(damage, "utf-8")
    copy.events.write_text(damage + "\n" + copy.events.read_text("utf-8")[:-9], "utf-8")
    found = runreport.read(copy.path)
    assert found.steps
    assert found.parts


def test_a_step_that_was_done_again_counts_once(copy: RunDir) -> None:
    before = runreport.read(copy.path).steps
    lines = copy.events.read_text("utf-8").splitlines(keepends=True)
    copy.events.write_text("".join([*lines, *lines]), "utf-8")
    assert runreport.read(copy.path).steps == before


def test_the_command_prints_the_report_and_writes_the_page_anew(copy: RunDir, report: Any) -> None:
    copy.report.unlink()
    code, out, err = report(copy.path)
    assert code == 0
    assert out == markdown.report(runreport.read(copy.path))
    assert "report.html" in err
    Reader(copy.report.read_text("utf-8"))
    code, out, _ = report(copy.path, "--lang", "zh")
    assert code == 0
    assert "混淆矩阵" in out


def test_what_has_no_report_is_refused_with_the_way_on(copy: RunDir, report: Any) -> None:
    assert report(copy.path, "--lang", "fr")[0] == 2
    code, _, err = report(copy.adapter)
    assert (code, "[run.not_a_run]" in err) == (7, True)
    copy.predictions.write_bytes(b"PAR1")
    code, _, err = report(copy.path)
    assert (code, "[run.predictions]" in err) == (7, True)
    copy.metrics.unlink()
    code, _, err = report(copy.path)
    assert (code, "[run.unfinished]" in err, "--resume" in err) == (7, True, True)
    with pytest.raises(ArtefactError):
        runreport.read(copy.path / "nowhere")


def test_a_run_whose_report_could_not_be_written_is_not_finished(copy: RunDir) -> None:
    told = json.loads(copy.metrics.read_text("utf-8"))
    copy.metrics.unlink()
    copy.report.unlink()
    copy.report.mkdir()
    with pytest.raises(ResourceError):
        training.resume(copy.path)
    assert not copy.metrics.exists()
    copy.report.rmdir()
    again = training.resume(copy.path)
    assert again.report.is_file()
    # What the first process told before it began stands beside what all of them took.
    estimates = ("estimated_train_seconds", "estimated_peak_bytes")
    assert [again.metrics[key] for key in estimates] == [told[key] for key in estimates]
    assert all(told[key] for key in estimates)


def test_the_template_travels_with_the_package() -> None:
    from importlib import resources

    assert (resources.files("trimtab") / "templates" / "report.html").is_file()
