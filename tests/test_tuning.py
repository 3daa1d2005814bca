"""`trimtab tune`: what it tries, keeps and goes on with."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import reviews, write_csv
from test_compare import in_this_process
from test_training import small

from trimtab import config, trials, tuning
from trimtab.errors import ArtefactError, DivergedError, MissingExtraError, RecipeError, ResourceError
from trimtab.resolve import resolve

pytestmark = pytest.mark.usefixtures("quick")
optuna = pytest.importorskip("optuna")


@pytest.fixture(scope="module")
def searched(
    tmp_path_factory: pytest.TempPathFactory, bert: Path, quick_module: None
) -> tuple[Path, config.Layered, dict[str, Any], list[str]]:
    """Two recipes tried, a third begun and stopped, four asked for."""
    folder = tmp_path_factory.mktemp("tune")
    file = write_csv(folder / "rows.csv", reviews(120))
    layered = config.assemble(
        "default",
        {
            "data.train": (str(file),),
            "data.test": (str(write_csv(folder / "test.csv", reviews(20))),),
            "base.model": str(bert),
        },
    )
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "_in_a_process", in_this_process)
        patch.setattr(tuning, "_EPOCHS", (1, 3))
        tuning.tune(layered, 2, out=str(folder / "out"), tell=told.append)
        study = optuna.load_study(study_name="trimtab", storage=f"sqlite:///{folder / 'out' / 'study.db'}")
        tuning._suggest(study.ask(), layered, resolve(layered))
        found = tuning.tune(layered, 4, out=str(folder / "out"), tell=told.append)
    return folder / "out", layered, found, told


def test_it_goes_on_where_it_was_stopped(searched: tuple[Path, config.Layered, dict[str, Any], list[str]]) -> None:
    folder, _, found, told = searched
    assert [line.split()[1] for line in told if line.startswith("trial")] == ["1/2", "2/2", "3/4", "4/4"]
    study = optuna.load_study(study_name="trimtab", storage=f"sqlite:///{folder / 'study.db'}")
    states = [trial.state.name for trial in study.trials]
    assert states.count("COMPLETE") == 4
    assert states.count("FAIL") == 1  # the one that was stopped; its values were tried again
    drawn = [tuple(sorted(t.params.items())) for t in study.trials if t.state.name == "COMPLETE"]
    assert len(set(drawn)) == 4
    stopped = next(trial for trial in study.trials if trial.state.name == "FAIL")
    assert any(t.params == stopped.params for t in study.trials if t.state.name == "COMPLETE")
    best = min if found["metric"] == "loss" else max
    assert found["best"] == best(trial.value for trial in study.trials if trial.value is not None)


def test_the_recipe_as_it_is_comes_first(
    searched: tuple[Path, config.Layered, dict[str, Any], list[str]],
) -> None:
    folder, layered, _, told = searched
    usual = resolve(layered).recipe
    assert int(usual.train.num_epochs) == 20  # more than are searched where `auto` takes fewer
    wanted = f"learning_rate {usual.train.learning_rate}, num_epochs 20"
    assert sum(wanted in line for line in told) == 1
    assert f"r {usual.lora.r}, target_modules all-linear, {wanted}" in told[1]
    study = optuna.load_study(study_name="trimtab", storage=f"sqlite:///{folder / 'study.db'}")
    assert study.trials[0].params["num_epochs"] == 20
    assert study.trials[-1].distributions["num_epochs"].high == 20


def test_the_best_recipe_is_that_of_the_best_trial(
    searched: tuple[Path, config.Layered, dict[str, Any], list[str]],
) -> None:
    folder, layered, found, _ = searched
    recipe = config.load_recipe(found["recipe"]).recipe
    run = folder / "trials" / tuning._name(found["values"])
    assert json.loads((run / "metrics.json").read_text("utf-8"))[found["metric"]] == found["best"]
    tried = config.load_recipe(str(run)).recipe
    assert recipe.lora == tried.lora
    assert recipe.train.learning_rate == tried.train.learning_rate
    assert recipe.lora.lora_alpha == 2 * recipe.lora.r
    # The test rows belong to the recipe, and no trial saw them.
    assert [Path(file).name for file in recipe.data.test] == [Path(file).name for file in layered.recipe.data.test]
    assert tried.data.test == ()


def test_a_folder_of_another_search_is_refused(
    searched: tuple[Path, config.Layered, dict[str, Any], list[str]], csv_file: Path, bert: Path
) -> None:
    folder, *_ = searched
    with pytest.raises(RecipeError, match="another recipe"):
        tuning.tune(small(csv_file, bert), 1, out=str(folder), tell=print)


def test_a_folder_that_was_barely_begun_is_taken(csv_file: Path, bert: Path, tmp_path: Path) -> None:
    folder, layered = tmp_path / "o", small(csv_file, bert)
    folder.mkdir()
    (folder / "plan.toml.tmp").write_text("half a pl", "utf-8")  # of a process that was killed
    for _ in range(2):
        assert trials.own_folder(str(folder), "tune", layered, "a plan\n") == folder
    assert (folder / "plan.toml").read_text("utf-8") == "a plan\n"
    (tmp_path / "file").write_text("x", "utf-8")
    with pytest.raises(ResourceError, match="folder cannot be used"):
        trials.own_folder(str(tmp_path / "file"), "tune", layered, "a plan\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x", "utf-8")
    with pytest.raises(RecipeError, match="is not empty"):
        trials.own_folder(str(tmp_path / "other"), "tune", layered, "a plan\n")


def test_what_the_recipe_fixes_is_not_searched(csv_file: Path, bert: Path, tmp_path: Path) -> None:
    fixed = config.assemble("default", {"data.train": (str(csv_file),)}, ["lora.r=2", "train.num_epochs=1"])
    assert tuning._open_settings(fixed) == ("train.learning_rate", "lora.target_modules")
    start = fixed.override({"lora.init_from": "elsewhere"}, "--set")
    assert tuning._open_settings(start) == ("train.learning_rate",)
    with pytest.raises(RecipeError, match="fixes all that is searched"):
        tuning.tune(
            config.assemble("tutorial", {"data.train": (str(csv_file),), "base.model": str(bert)}),
            2,
            out=str(tmp_path / "t"),
            tell=print,
        )
    assert not (tmp_path / "t").exists()


def test_a_recipe_that_diverges_does_not_end_the_search(
    csv_file: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[str] = []

    def train(place: Any, layered: Any) -> dict[str, Any]:
        rounds.append(place.path.name)
        if len(rounds) == 1:
            raise DivergedError("trial.failed", "it diverged")
        return {"loss": 0.5, "accuracy": 0.5, "macro_f1": 0.5}

    monkeypatch.setattr(tuning, "train_once", train)
    told: list[str] = []
    layered = config.assemble("default", {"data.train": (str(csv_file),), "base.model": str(bert)})
    assert tuning.tune(layered, 3, out=str(tmp_path / "t"), tell=told.append)["best"] == 0.5
    assert len(rounds) == 3
    assert sum("diverged" in line for line in told) == 1


def test_a_damaged_record_and_a_second_searcher_are_refused(csv_file: Path, bert: Path, tmp_path: Path) -> None:
    from trimtab import rundir

    layered = config.assemble("default", {"data.train": (str(csv_file),), "base.model": str(bert)})
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / trials.PLAN).write_text(config.dump(resolve(layered).layered), "utf-8")
    (folder / "study.db").write_text("garbage", "utf-8")
    with pytest.raises(ArtefactError, match="damaged"):
        tuning.tune(layered, 1, out=str(folder), tell=print)
    (folder / "study.db").unlink()
    with rundir.only_writer(rundir.RunDir(folder)), pytest.raises(ResourceError, match="is writing this run"):
        tuning.tune(layered, 1, out=str(folder), tell=print)


def test_without_optuna_the_extra_is_named(csv_file: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r'pip install -c constraints\.txt "\.\[tune\]"'):
        tuning.tune(small(csv_file, bert), 1, tell=print)
