"""The commands as people call them: what they print, where, with which exit code."""

import csv
import gc
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import bases
import pytest
from conftest import reviews, write_csv
from test_adapter import seal

from trimtab import cli


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Calls a command in this process."""

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["trimtab", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), printed.out, printed.err)

    return run


def process(*words: object, stdin: str = "", **environment: str) -> Outcome:
    """Calls a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "trimtab", *map(str, words)],
        input=stdin.encode(),
        capture_output=True,
        env=os.environ | environment,
        check=False,
    )
    return Outcome(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))


@pytest.fixture(scope="module")
def run(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with display names, trained through the command line in a process of its own."""
    folder = tmp_path_factory.mktemp("run")
    data = write_csv(folder / "reviews.csv", reviews(96))
    done = process(
        "train",
        data,
        "--base",
        bert,
        "--out",
        folder / "run",
        "--names",
        "neg=差评/negative,pos=好评/positive",
        "--set",
        "train.num_epochs=8",
        "--set",
        "train.learning_rate=1e-2",
        "--set",
        "runtime.dtype=float32",  # as the commands in this process compute, so `verify` is as exact as it can be
    )
    assert done.code == 0, done.err
    return folder / "run"


def test_help_is_quick_and_light() -> None:
    code = (
        "import sys; sys.argv = ['trimtab', '--help']\nfrom trimtab.cli import main\ntry: main()\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'peft', 'sklearn', 'pyarrow'} & set(sys.modules)\n"
        "    assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert "predict" in done.stdout


class TestTrain:
    def test_a_run_directory_holds_what_it_promises(self, run: Path) -> None:
        names = {path.name for path in run.iterdir()}
        assert names == {
            ".lock",
            "recipe.toml",
            "environment.json",
            "events.jsonl",
            "data_report.json",
            "metrics.json",
            "predictions.parquet",
            "report.html",
            "adapter",
            "checkpoints",
            "checkpoints-refit",
        }
        adapter = {path.name for path in (run / "adapter").iterdir()}
        assert {
            "adapter_config.json",
            "adapter_model.safetensors",
            "trimtab.json",
            "tokenizer.json",
            "README.md",
        } <= adapter
        metrics = json.loads((run / "metrics.json").read_text())
        for key in (
            "accuracy",
            "accuracy_ci95",
            "macro_f1",
            "per_class",
            "eval_rows",
            "train_seconds",
            "total_seconds",
            "peak_rss_bytes",
            "tokens_per_s",
            "padding_pct",
            "load_seconds",
            "verify_seconds",
        ):
            assert key in metrics

    def test_a_run_of_1000_rows_logs_under_60_lines_without_control_codes(self, bert: Path, tmp_path: Path) -> None:
        data = write_csv(tmp_path / "r.csv", reviews(1_000))
        done = process("train", data, "--base", bert, "--recipe", "tutorial", "--set", "data.limit_train=0")
        assert done.code == 0, done.err
        text = done.out + done.err
        assert len(text.splitlines()) < 60
        assert "\x1b" not in text
        assert "\r" not in text
        latest = tmp_path / "runs" / "latest"
        assert (latest / "metrics.json").is_file()
        assert "accuracy" in text
        assert "trimtab predict runs/" in done.out

    def test_json_is_the_event_stream_and_nothing_else(self, call, quick: None, csv_file: Path, bert: Path) -> None:
        outcome = call("train", csv_file, "--base", bert, "--set", "train.num_epochs=2", "--json", "--out", "run")
        assert outcome.code == 0
        events = [json.loads(line) for line in outcome.out.splitlines()]
        stored = [json.loads(line) for line in Path("run/events.jsonl").read_text().splitlines()]
        assert events == stored
        kinds = [event["event"] for event in events]
        assert kinds[0] == "start"
        assert kinds[-1] == "end"
        assert kinds.count("eval") == 2
        again = [event.get("refit", False) for event in events if event["event"] == "checkpoint"]
        assert again == [False, False] + [True] * events[-1]["metrics"]["epoch"]
        assert outcome.err == ""

    def test_dry_run_shows_every_value_with_its_origin_and_writes_nothing(
        self, call, csv_file: Path, bert: Path
    ) -> None:
        outcome = call("train", csv_file, "--base", bert, "--dry-run", "--set", "lora.r=4", "--recipe", "tutorial")
        assert outcome.code == 0
        lines = {line.split(" =")[0]: line for line in outcome.out.splitlines() if " = " in line}
        assert lines["r"].endswith("# --set")
        assert lines["lora_alpha"].endswith("# recipe tutorial")
        assert lines["seed"].endswith("# default")
        assert lines["model"].endswith("# --base")
        assert "auto: found by name" in lines["label"]
        assert not Path("runs").exists()

    @pytest.mark.parametrize(
        ("words", "code", "told"),
        [
            (["train", "reviews.cvs"], 3, 'Did you mean "reviews.csv"?'),
            (["train", "reviews.csv", "--text", "txt"], 3, 'Did you mean "text"?'),
            (["train", "reviews.csv", "--set", "train.epochs=3"], 2, "train.num_epochs"),
            (["train", "reviews.csv", "--set", "lora.r=0"], 2, "lora.r = 0"),
            (["train", "reviews.csv", "--recipe", "tutorail"], 2, 'Did you mean "tutorial"?'),
            (["train", "reviews.csv", "--base", "./nowhere"], 4, "no folder"),
            (["train", "reviews.csv", "--base", "roberta-base"], 4, "HF_HUB_OFFLINE"),
            (["train", "reviews.csv", "--eval", "unseen.csv"], 3, '"meh"'),
            (["train"], 2, "No training file"),
            (["train", "--resume", "nothing"], 7, "no run"),
            (["train", "--resume", "nothing", "--set", "lora.r=4"], 2, "--resume goes on"),
            (["train", "reviews.csv", "--names", "neg=a,neg=b"], 2, '"neg" has two names'),
            (["train", "reviews.csv", "--base", "a" * 300], 4, "hub"),
            (["train", "reviews.csv", "--bogus"], 2, "--bogus"),
            (["predict", "nothing", "a text"], 7, "no run or adapter"),
            (["eval", ".", "reviews.csv"], 7, "trimtab.json"),
            (["trian", "reviews.csv"], 2, "trian"),
        ],
    )
    def test_errors(self, call, csv_file: Path, words: list[str], code: int, told: str) -> None:
        write_csv(Path("unseen.csv"), [*reviews(4), ("so so", "meh")])
        outcome = call(*words)
        assert outcome.code == code, outcome.err
        assert told in outcome.err
        assert "Traceback" not in outcome.err
        assert not Path("runs").exists()

    def test_an_error_is_json_too(self, call) -> None:
        outcome = call("train", "nowhere.csv", "--json")
        assert outcome.code == 3
        assert json.loads(outcome.out)["error"]["code"] == "data.missing_file"


class TestPredict:
    def test_texts_from_arguments_stdin_and_files_are_answered_alike(self, call, run: Path) -> None:
        texts = [text for text, _ in reviews(6)]
        write_csv(Path("t.csv"), [(text, str(i)) for i, text in enumerate(texts)], header="review,id")
        as_arguments = call("predict", run, *texts, "--json").out
        as_file = call("predict", run, "--file", "t.csv", "--json").out
        assert as_arguments == as_file
        answers = [json.loads(line) for line in as_arguments.splitlines()]
        assert [answer["text"] for answer in answers] == texts
        assert [answer["label"] for answer in answers] == [label for _, label in reviews(6)]
        for answer in answers:
            assert set(answer) == {"text", "label", "score", "scores", "truncated"}
            assert sum(answer["scores"].values()) == pytest.approx(1)
            assert answer["score"] == max(answer["scores"].values())

    @pytest.mark.parametrize(("lang", "name"), [("zh", "好评"), ("en", "positive")])
    def test_names(self, call, run: Path, lang: str, name: str) -> None:
        assert json.loads(call("predict", run, reviews(2)[1][0], "--json", "--lang", lang).out)["name"] == name
        assert call("predict", run, reviews(2)[1][0], "--lang", lang).out.startswith(name)
        assert call("predict", run, reviews(2)[1][0]).out.startswith("好评/positive")

    def test_labels_cannot_drive_the_terminal(self, call, quick: None, bert: Path, run: Path) -> None:
        names = {"neg": "\x1b[31mred\x1b]0;owned\x07", "pos": "\u202eevil"}
        write_csv(Path("wild.csv"), [(text, names[label]) for text, label in reviews(40)])
        outcome = call("train", "wild.csv", "--base", bert, "--set", "train.num_epochs=1", "--out", "wild")
        assert outcome.code == 0, outcome.err
        told = call("predict", "wild", "a good day")
        refused = call("compare", "wild", run)
        assert "[compare.labels]" in refused.err
        for text in (outcome.out, outcome.err, told.out, refused.err):
            assert all(line.isprintable() for line in text.split("\n"))

    @pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet", "tsv"])
    def test_out_keeps_rows_order_and_columns(self, call, run: Path, ending: str) -> None:
        rows = [*reviews(5), ("", "empty text")]
        write_csv(Path("t.csv"), rows, header="text,id")
        outcome = call("predict", run, "--file", "t.csv", "--out", f"answers.{ending}")
        assert outcome.code == 0, outcome.err
        if ending == "parquet":
            import pyarrow.parquet as pq

            written = pq.read_table("answers.parquet").to_pylist()
        elif ending == "jsonl":
            written = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
        else:
            with Path(f"answers.{ending}").open(newline="") as file:
                written = list(csv.DictReader(file, delimiter="\t" if ending == "tsv" else ","))
        assert [row["text"] for row in written] == [text for text, _ in rows]
        assert [row["id"] for row in written] == [label for _, label in rows]
        assert [row["predicted_label"] for row in written[:5]] == [label for _, label in rows[:5]]

    def test_a_long_text_is_cut_and_flagged(self, call, run: Path) -> None:
        answer = json.loads(call("predict", run, "good " * 600, "--json").out)
        assert answer["truncated"] is True
        assert "[cut" in call("predict", run, "good " * 600).out

    @pytest.mark.parametrize("encoding", ["gbk", "ascii"])
    def test_no_console_makes_it_crash(self, run: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
        screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("好看 😀 the film was good\n".encode())))
        monkeypatch.setattr(sys, "argv", ["trimtab", "predict", str(run)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        screen.flush()
        shown = screen.buffer.getvalue().decode(encoding)
        assert "? the film was good" in shown
        assert ("好看" in shown) == (encoding == "gbk")

    def test_garbage_is_looked_for_again_however_it_ends(self, call, run: Path, tmp_path: Path) -> None:
        gc.unfreeze()  # what other tests of this process left
        assert call("predict", tmp_path / "nowhere", "A text.").code == 7
        assert (gc.isenabled(), gc.get_freeze_count()) == (True, 0)
        assert call("predict", run, "A text.", "--lang", "fr").code == 2
        assert (gc.isenabled(), gc.get_freeze_count()) == (True, 0)
        try:
            assert call("predict", run, "A text.").code == 0
            assert gc.isenabled()
            assert gc.get_freeze_count() > 0
        finally:
            gc.unfreeze()

    def test_the_adapter_alone_is_enough_elsewhere(self, run: Path, tmp_path: Path) -> None:
        moved = tmp_path / "copied"
        (run / "adapter").rename(moved)
        try:
            done = process("predict", moved, "the film was boring", "--json")
            assert json.loads(done.out)["label"] == "neg"
        finally:
            moved.rename(run / "adapter")


def test_eval_scores_a_file(call, run: Path) -> None:
    data = write_csv(Path("more.csv"), reviews(40))
    scores = json.loads(call("eval", run, data, "--json").out)
    assert scores["eval_rows"] == 40
    assert scores["accuracy"] > 0.9
    low, high = scores["accuracy_ci95"]
    assert low <= scores["accuracy"] <= high
    assert {"macro_f1", "per_class", "majority_accuracy"} <= set(scores)
    printed = call("eval", run, data).out
    assert "always answering the commonest label: 0.500" in printed


def test_verify_notices_a_changed_adapter(call, run: Path, tmp_path: Path) -> None:
    assert call("verify", run).code == 0
    copy = Path(shutil.copytree(run / "adapter", tmp_path / "copy"))
    meta = json.loads((copy / "trimtab.json").read_text())
    meta["probes"][0]["logits"][0] += 0.01
    (copy / "trimtab.json").write_text(json.dumps(meta))
    seal(copy)
    outcome = call("verify", copy, "--json")
    assert outcome.code == 7
    assert json.loads(outcome.out)["ok"] is False


def test_params_tells_lora_and_head_apart(call, bert: Path) -> None:
    found = json.loads(
        call("params", bert, "--set", "lora.r=4", "--set", "lora.target_modules=query-value", "--json").out
    )
    assert found["lora"] == 2 * 2 * 4 * (32 + 32), "two layers, query and value, r (in + out)"
    assert found["head"] == 32 * 32 + 32 + 2 * 32 + 2, "the pooler is new in this base, and the classifier"
    assert found["total"] == found["base"] + found["lora"] + found["head"]
    assert "1,024 weights stay frozen, A and B have 256 instead" in call("params", bert, "--set", "lora.r=4").out


def test_demo_on_the_real_model_and_the_real_reviews(tmp_path: Path) -> None:
    """The whole way on MiniLM and IMDB, cut to a few rows; `make demo` is the same without the cut."""
    if bases.minilm_folder() is None:
        pytest.skip("the extra `demo` is not installed")
    done = process(
        "demo",
        "--set",
        "data.limit_train=48",
        "--set",
        "data.limit_eval=32",
        "--set",
        "train.num_epochs=1",
        "--set",
        "data.max_length=64",
    )
    assert done.code == 0, done.err
    import pyarrow.parquet as pq

    assert pq.read_metadata("runs/demo-data/imdb-train.parquet").num_rows == 20_000
    assert pq.read_metadata("runs/demo-data/imdb-eval.parquet").num_rows == 5_000
    for word in ("73,728 (0.32 %)", "负面/negative", "praise", "off-topic", "try next"):
        assert word in done.out


def test_commands_that_use_an_adapter_take_runtime_settings_and_no_other(call, run: Path) -> None:
    assert call("predict", run, "a film", "--set", "runtime.fast=off").code == 0
    for setting in ("lora.r=4", "runtime.trunk_cache=on"):
        refused = call("predict", run, "a film", "--set", setting, "--json")
        assert refused.code == 2
        assert json.loads(refused.out)["error"]["code"] == "usage"


def test_json_holds_every_character_on_any_stream(run: Path) -> None:
    done = process("predict", run, "差评 🙂", "--json", PYTHONIOENCODING="ascii")
    assert json.loads(done.out)["text"] == "差评 🙂"


def test_texts_that_are_trained_on_and_judged_by_are_told(call, bert: Path) -> None:
    write_csv(Path("a.csv"), reviews(40))
    told = call("train", "a.csv", "--eval", "a.csv", "--base", bert, "--dry-run")
    assert "40 of the eval rows stand in the training file too" in told.err
    assert told.out.startswith("# 40 rows to train on, 40 to evaluate; 2 labels\n")
    assert "only 40 rows judge this run" in told.err
    assert "training file too" not in call("train", "a.csv", "--base", bert, "--dry-run").err
    assert call("predict", "run", "a.csv").err.startswith("error [usage]: a.csv is a file")


@pytest.mark.parametrize("words", [["--version"], ["doctor", "--json"]])
def test_a_full_disk_behind_the_output_is_an_error(words: list[str]) -> None:
    """Also where the words wait in a buffer until the end."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "trimtab", *words], stdout=full, stderr=subprocess.PIPE, env=environment
        )
    assert done.returncode == 5
    assert b"The output cannot be written: No space left on device" in done.stderr


def test_without_its_packages_serving_tells_how_to_install_them(call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "trimtab.serving.server", raising=False)
    monkeypatch.delattr("trimtab.serving.server", raising=False)
    code, _, err = call("serve", "runs/latest")
    assert code == 2
    assert "error [serve.extra]: Serving needs what is not installed: uvicorn." in err
    assert 'mend:  pip install -c constraints.txt ".[serve]" in the folder' in err


def test_a_command_without_streams_works() -> None:
    done = subprocess.run(["sh", "-c", f"{sys.executable} -m trimtab --version >&- 2>&-"])
    assert done.returncode == 0
