"""Fixtures of all tests: no hub, no network but loopback, a small real base, a small labelled file."""

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from trimtab.resolve import Job

# Small models are slower on two threads than on one, and two spinning test runs on two cores are slower by far.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_PROXY"] = "127.0.0.1"
os.environ.pop("HF_ENDPOINT", None)
sys.path.insert(0, str(Path(__file__).parent))

import bases

GOOD = ("good", "wonderful", "great")
BAD = ("bad", "boring", "awful")


@pytest.fixture(scope="session", autouse=True)
def _float32() -> Iterator[None]:
    """Tests state what float32 gives, on every processor; the processes that they start choose as users' do."""
    from trimtab import forward
    from trimtab.machine import Processor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "processor", lambda: Processor("without bfloat16", ("avx2",)))
        yield


FIGURES: Counter[str] = Counter()
"""What the tests of faults have done; told at the end."""


def later(values: Iterable[object]) -> list[Any]:
    """Parameters that belong to `make test-long`."""
    return [pytest.param(value, marks=pytest.mark.long) for value in values]


def tiers(short: int, long: int) -> list[Any]:
    """Numbers of trials as parameters: the first belong to every run of the tests, the others to `make test-long`."""
    return [*range(short), *later(range(short, long))]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes (pytest-xdist)
        session.config.workeroutput["figures"] = dict(FIGURES)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    FIGURES.update(getattr(node, "workeroutput", {}).get("figures", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if FIGURES:
        terminalreporter.write_line("faults: " + ", ".join(f"{count:,} {what}" for what, count in FIGURES.items()))


def reviews(rows: int) -> list[tuple[str, str]]:
    """Short reviews whose label is told by one word; lengths differ, so that batches need padding."""
    found = []
    for i in range(rows):
        word, label = (GOOD[i % 3], "pos") if i % 2 else (BAD[i % 3], "neg")
        found.append((f"the film {'and the plot ' * (i % 4)}was {word} {i % 7}", label))
    return found


def write_csv(path: Path, rows: list[tuple[str, str]], header: str = "text,label") -> Path:
    path.write_text("\n".join([header, *(f"{text},{label}" for text, label in rows)]) + "\n", "utf-8")
    return path


def built(job: "Job") -> tuple[Any, list[str], dict[str, Any]]:
    """The model of a job, the modules trained in full, and the parameter report."""
    from trimtab import training

    ready = training.make_ready(job)
    return ready.model, ready.head, ready.parameters


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bases.write_base(tmp_path_factory.mktemp("bases") / "bert", "bert")


@pytest.fixture
def csv_file(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "reviews.csv", reviews(96))


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test works in a folder of its own, so that ./runs is nobody else's."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_fresh_process(monkeypatch)


@pytest.fixture(scope="module")
def quick_module() -> Iterator[None]:
    """As `quick`, for the fixtures of a module too."""
    with pytest.MonkeyPatch.context() as patch:
        leave_out_fresh_process(patch)
        yield


def leave_out_fresh_process(patch: pytest.MonkeyPatch) -> None:
    """Leaves out the check in a fresh process, which takes seconds of imports; other tests hold that check."""
    from trimtab import training

    patch.setattr(training, "_verify_in_fresh_process", lambda run: {"largest_difference": 0.0, "seconds": 0.0})
