"""train.learning_rate = "search": what it tries, what it settles, what a resumed run sees of it."""

from pathlib import Path
from typing import Any

import pytest
from conftest import reviews, write_csv
from test_training import contents, small

from trimtab import config, search, training
from trimtab.errors import RecipeError
from trimtab.resolve import resolve

pytestmark = pytest.mark.usefixtures("quick")


def searched(file: Path, bert: Path, **settings: Any) -> config.Layered:
    return small(file, bert, train__learning_rate="search", train__num_epochs=10, **settings)


def test_three_rates_are_tried_and_the_best_is_recorded(tmp_path: Path, bert: Path) -> None:
    file = write_csv(tmp_path / "rows.csv", reviews(400))
    told: list[str] = []
    found = search.find_rate(searched(file, bert), told.append)
    assert len(told) == 3
    losses = {float(line.split()[2].rstrip(":")): float(line.split()[-1]) for line in told}
    assert sorted(losses) == pytest.approx([3.3e-4, 1e-3, 3e-3])  # around `auto` for this width
    assert found.recipe.train.learning_rate == min(losses, key=losses.__getitem__)
    assert found.origins["train.learning_rate"].startswith("search, evaluation loss: 0.00033 -> ")
    assert len(set(losses.values())) == 3


def test_a_trial_is_a_tenth_of_the_work(tmp_path: Path, bert: Path) -> None:
    from trimtab.resolve import resolve

    file = write_csv(tmp_path / "rows.csv", reviews(1_600))
    layered = searched(file, bert)
    usual = resolve(layered.override({"train.learning_rate": "auto"}, "test"))
    brief = search._brief(layered, usual).recipe
    work = brief.data.limit_train * int(brief.train.num_epochs) / (len(usual.train.examples) * 10)
    assert work == pytest.approx(0.1, rel=0.1)


def test_a_run_records_its_rate_and_a_repeat_does_not_search(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_csv(tmp_path / "rows.csv", reviews(96))
    events: list[Any] = []
    run = training.train(
        searched(file, bert).override({"train.num_epochs": 2}, "test"), out=str(tmp_path / "a"), observe=events.append
    )
    assert [event["event"] for event in events[:3]] == ["search"] * 3
    recipe = config.load_recipe(str(run.path)).recipe
    assert recipe.train.learning_rate in (3.3e-4, 1e-3, 3e-3)
    parts = [run.metrics[f"{part}_seconds"] for part in ("search", "load", "train", "verify")]
    assert parts[0] > 0
    assert sum(parts) < run.metrics["total_seconds"]
    monkeypatch.setattr(search, "_try", lambda *given: pytest.fail("searched again"))
    again = training.train(config.load_recipe(str(run.path)), out=str(tmp_path / "b"))
    assert contents(again.adapter) == contents(run.adapter)


def test_a_budget_and_a_search_exclude_each_other(csv_file: Path, bert: Path) -> None:
    with pytest.raises(RecipeError, match="no budget knows"):
        training.train(searched(csv_file, bert), budget="1m")


def test_a_trial_starts_its_head_as_the_run_will(csv_file: Path, bert: Path) -> None:
    layered = small(csv_file, bert)
    brief = search._brief(layered, resolve(layered))
    assert layered.recipe.train.head_start == "auto"
    assert brief.recipe.train.head_start == "probe", "settled once, by the rows of the run"
