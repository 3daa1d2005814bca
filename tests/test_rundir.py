"""The run directory, as those find it who come while a run is under way."""

from collections.abc import Callable
from pathlib import Path

import pytest

from trimtab import comparison, rundir, runreport
from trimtab.errors import ArtefactError
from trimtab.rundir import RunDir


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
