"""Each example runs and prints what it says."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_minimal_loop() -> None:
    assert "74,498 of 22,788,484 parameters are trained" in run("minimal_loop.py")


def test_train_and_predict() -> None:
    assert "praise" in run("train_and_predict.py")


def test_load_in_peft(csv_file: Path, bert: Path, tmp_path: Path, quick: None) -> None:
    import trimtab

    made = trimtab.train(csv_file, base=bert, settings={"train.num_epochs": 1}, out=tmp_path / "run")
    assert "largest difference" in run("load_in_peft.py", str(made.path))
