"""The run directory, as those find it who come while a run is under way."""

from collections.abc import Callable
from pathlib import Path

import pytest

from trimtab import comparison, rundir, runreport
from trimtab.errors import ArtefactError, RecipeError
from trimtab.rundir import RunDir


def test_a_run_directory_without_a_name_is_not_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").mkdir()
    for out in ("", " "):
        with pytest.raises(RecipeError, match="has no name"):
            rundir.create(out, "reviews")
    with pytest.raises(RecipeError, match="is not empty"):
        rundir.create(".", "reviews")
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


def test_commands_to_copy_are_quoted(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "my run")
    run.path.mkdir()
    run.recipe.touch()
    with pytest.raises(ArtefactError) as caught:
        rundir.adapter_in(run.path)
    assert caught.value.mend == f"trimtab train --resume '{run.path}'"


@pytest.mark.parametrize("ask", [rundir.adapter_in, comparison.read_answers, runreport.read])
def test_a_run_under_way_is_waited_for_and_one_that_was_stopped_goes_on(
    tmp_path: Path, ask: Callable[[Path], object]
) -> None:
    run = RunDir(tmp_path)
    run.recipe.touch()
    with rundir.only_writer(run):
        with pytest.raises(ArtefactError, match="it is still training") as caught:
            ask(run.path)
        assert caught.value.mend.startswith("wait until it ends")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ArtefactError, match="it did not come to its end") as caught:
        ask(run.path)
    assert caught.value.mend == f"trimtab train --resume {run.path}"
    (run.path / ".writer.json").touch()  # as a process leaves it that is killed
    with pytest.raises(ArtefactError, match="it did not come to its end"):
        ask(run.path)
    (run.path / ".writer.json").unlink()
    assert sorted(tmp_path.iterdir()) == before
    with rundir.only_writer(run):  # who asks holds no lock
        pass
