"""Every command with the network cut, in a namespace that has no way out, with local files alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import reviews, write_csv

CUT = ["unshare", "--map-root-user", "--net"]

PROGRAM = """
import contextlib, io, json, socket, sys
from trimtab.cli import main

reached = socket.socket()
reached.settimeout(5)
try:
    reached.connect(("1.1.1.1", 443))
except OSError:
    pass
else:
    sys.exit("the network is not cut")
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["trimtab", *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
    print(json.dumps([code, err.getvalue()]))
"""


def can_cut() -> bool:
    try:
        return subprocess.run([*CUT, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not can_cut(), reason="no network namespaces here (unshare --map-root-user --net)")
def test_every_command_works_with_the_network_cut(tmp_path: Path, bert: Path) -> None:
    write_csv(tmp_path / "rows.csv", reviews(60))
    (tmp_path / "texts.csv").write_text("text\na good film\nan awful plot\n", "utf-8")
    data = ["rows.csv", "--base", str(bert)]
    fine = [
        ["data", "check", *data],
        ["estimate", *data],
        ["params", str(bert)],
        ["train", *data, "--set", "train.num_epochs=1", "--out", "run"],
        ["train", "--resume", "run"],
        ["train", "--recipe", "run/recipe.toml", "--out", "again"],
        ["predict", "run", "a good film"],
        ["predict", "run", "--file", "texts.csv", "--out", "answers.csv"],
        ["eval", "run", "rows.csv"],
        ["verify", "run"],
        ["doctor"],
    ]
    lost = ["train", "rows.csv", "--base", "roberta-base"]
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_HOME": str(tmp_path / "empty"), "HF_ENDPOINT": "https://mirror.invalid"}
    done = subprocess.run(
        [*CUT, sys.executable, "-c", PROGRAM, json.dumps([*fine, lost])],
        capture_output=True,
        encoding="utf-8",
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [(words[0], *outcome) for words, outcome in zip(fine, outcomes, strict=False) if outcome[0]] == []
    code, said = outcomes[-1]
    assert len(outcomes) == len(fine) + 1
    assert code == 4
    for way in ("https://mirror.invalid for ", "HF_ENDPOINT=", "--base FOLDER", "HF_HOME"):
        assert way in said
