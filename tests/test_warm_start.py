"""Training that starts from an adapter: its A, its B, its head, its settings; and what does not fit is told."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bases import write_base
from conftest import reviews, write_csv
from safetensors.torch import load_file
from test_training import contents, small

from trimtab import config, training
from trimtab.classification import compute_logits
from trimtab.config import Layered
from trimtab.errors import ArtefactError, DataError, RecipeError
from trimtab.resolve import resolve

FIRST = {"lora.r": 4, "lora.lora_alpha": 12, "lora.target_modules": "query-value", "lora.layers": "top:1"}


@pytest.fixture(scope="module")
def first(bert: Path, tmp_path_factory: pytest.TempPathFactory, quick_module: None) -> training.Run:
    place = tmp_path_factory.mktemp("first")
    layered = small(write_csv(place / "rows.csv", reviews(48)), bert, train__num_epochs=1, train__learning_rate=0.05)
    return training.train(layered.override(FIRST, "test"), out=str(place / "run"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "rows.csv", reviews(64)[16:])


def test_a_long_text_is_cut_as_the_adapter_was_trained_unless_the_recipe_says_otherwise(
    first: training.Run, file: Path, bert: Path, tmp_path: Path
) -> None:
    at_start = small(file, bert, train__num_epochs=1, data__keep="start")
    other = training.train(at_start, out=str(tmp_path / "other"))
    assert resolve(start(file, bert, first.path)).recipe.data.keep == "ends"
    assert resolve(start(file, bert, other.path)).recipe.data.keep == "start"
    assert resolve(start(file, bert, other.path, data__keep="ends")).recipe.data.keep == "ends"


def test_rows_that_the_first_adapter_may_know_are_told(first: training.Run, file: Path, bert: Path) -> None:
    assert any("never saw (--eval FILE)" in said for said in resolve(start(file, bert, first.path)).warnings)
    given = start(file, bert, first.path, data__eval=(str(file),))
    assert not any("never saw (--eval FILE)" in said for said in resolve(given).warnings)


def start(file: Path, base: Path, path: Path | str, **settings: Any) -> Layered:
    return small(file, base, lora__init_from=str(path), train__num_epochs=1, **settings)


def stored(run: training.Run) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def answers(ready: training.Ready) -> Any:
    return compute_logits(ready.engine.forward, ready.job.eval.encoded)


def expected(first: training.Run, ready: training.Ready) -> Any:
    return training.evaluation.load(first.path).logits(ready.job.eval.encoded)


def test_what_is_left_open_is_the_adapters_and_so_are_the_first_answers(
    file: Path, bert: Path, first: training.Run
) -> None:
    ready = training.make_ready(resolve(start(file, bert, first.path)))
    lora, origins = ready.job.recipe.lora, ready.job.layered.origins
    assert (lora.r, lora.lora_alpha, lora.variant, lora.layers) == (4, 12, "lora", "top:1")
    assert set(lora.target_modules) == {"attention.self.query", "attention.self.value"}
    assert {origins[f"lora.{key}"] for key in ("r", "lora_alpha", "variant", "layers", "target_modules")} == {
        "as the adapter in lora.init_from"
    }
    assert lora.init_from == str(first.adapter)
    np.testing.assert_allclose(answers(ready), expected(first, ready), atol=1e-5)
    assert ready.warm_start.endswith("and its head")


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_another_alpha_starts_at_the_same_answers(
    file: Path, bert: Path, tmp_path: Path, variant: str, quick: None
) -> None:
    layered = small(file, bert, lora__variant=variant, train__num_epochs=1, train__learning_rate=0.05)
    before = training.train(layered, out=str(tmp_path / "before"))
    ready = training.make_ready(resolve(start(file, bert, before.path, lora__lora_alpha=50)))
    assert ready.job.recipe.lora.lora_alpha == 50
    np.testing.assert_allclose(answers(ready), expected(before, ready), atol=1e-5)
    assert "B times 0.32" in ready.warm_start


@pytest.mark.parametrize("named", [("good", "bad"), ("neg", "pos", "so-so")])
def test_other_labels_get_a_new_head(
    tmp_path: Path, bert: Path, first: training.Run, named: tuple[str, ...], quick: None
) -> None:
    rows = [(text, named[i % len(named)]) for i, (text, _) in enumerate(reviews(48))]
    events: list[Any] = []
    layered = start(write_csv(tmp_path / "other.csv", rows), bert, first.path, train__learning_rate=1e-9)
    run = training.train(layered, out=str(tmp_path / "run"), observe=events.append)
    (line,) = [event["warm_start"] for event in events if event["event"] == "start"]
    assert "whose head is left" in line
    assert "neg, pos" in line
    for name, tensor in stored(first).items():
        if ".lora_" in name:
            torch.testing.assert_close(stored(run)[name], tensor, rtol=0, atol=1e-6)
        elif name.endswith("classifier.weight"):
            assert tensor.shape != stored(run)[name].shape or not torch.allclose(stored(run)[name], tensor, atol=1e-3)


def test_the_run_repeats_resumes_and_knows_its_adapter(
    file: Path, bert: Path, first: training.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """Relative, by runs/latest and by ~ it is the same adapter; one that was changed is refused."""
    copied = Path(shutil.copytree(first.path, tmp_path / "home" / "runs" / "one"))
    (tmp_path / "home" / "runs" / "latest").symlink_to("one")
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run = training.train(start(file, bert, "runs/latest"), out=str(tmp_path / "a"))
    recipe = config.load_recipe(str(run.path)).recipe
    assert recipe.lora.init_from == str(copied / "adapter")
    assert recipe.lora.init_from in recipe.sha256
    assert recipe.sha256[recipe.lora.init_from] in (run.adapter / "README.md").read_text("utf-8")
    again = training.train(start(file, bert, "~/runs/latest/adapter"), out=str(tmp_path / "b"))
    repeated = training.train(config.load_recipe(str(run.path)), out=str(tmp_path / "c"))
    assert contents(run.adapter) == contents(again.adapter) == contents(repeated.adapter)
    anew = training.train(start(file, bert, "", **{k.replace(".", "__"): v for k, v in FIRST.items()}))
    assert contents(anew.adapter) != contents(run.adapter)

    shutil.rmtree(copied / "adapter")
    shutil.copytree(anew.adapter, copied / "adapter")
    with pytest.raises(DataError, match="is not what this recipe was written for"):
        training.train(config.load_recipe(str(run.path)), out=str(tmp_path / "d"))
    (run.path / "metrics.json").unlink()
    with pytest.raises(DataError, match="is not what this recipe was written for"):
        training.resume(run.path)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"lora__r": 8}, ["lora.r = 8, the adapter has 4", "--set lora.r=4"]),
        ({"lora__variant": "dora"}, ["lora.variant = dora, the adapter has lora"]),
        ({"lora__layers": "all"}, ["beside 4 weights", "beside 2", "--set lora.layers=top:1"]),
        ({"lora__target_modules": ("query",)}, ["beside 1 weights", "lora.target_modules=attention.self.query,"]),
    ],
)
def test_what_does_not_fit_is_refused_with_the_setting(
    file: Path, bert: Path, first: training.Run, settings: dict[str, Any], told: list[str]
) -> None:
    with pytest.raises(RecipeError, match="does not fit") as refused:
        resolve(start(file, bert, first.path, **settings))
    assert all(word in str(refused.value) for word in told), str(refused.value)


def test_settings_that_fit_may_be_said(file: Path, bert: Path, first: training.Run) -> None:
    said = {key.replace(".", "__"): value for key, value in FIRST.items()}
    assert resolve(start(file, bert, first.path, **said)).recipe.lora.lora_alpha == 12


def test_another_base_or_none_is_refused(file: Path, bert: Path, first: training.Run, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other", "bert", seed=1)
    with pytest.raises(ArtefactError, match=r"weights of .* are not the same") as refused:
        resolve(start(file, other, first.path))
    assert f"--base {bert}" in refused.value.mend
    with pytest.raises(ArtefactError, match="is a file"):
        resolve(start(file, bert, file))
    with pytest.raises(ArtefactError, match="There is no run or adapter"):
        resolve(start(file, bert, "runs/nothing"))


def test_a_damaged_tensor_is_refused(file: Path, bert: Path, first: training.Run, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(first.adapter, tmp_path / "adapter"))
    tensors = copied / "adapter_model.safetensors"
    raw = bytearray(tensors.read_bytes())
    raw[-1] ^= 1
    tensors.write_bytes(raw)
    with pytest.raises(ArtefactError):
        training.make_ready(resolve(start(file, bert, copied)))


def test_the_parameters_are_counted_as_they_would_be_trained(bert: Path, first: training.Run) -> None:
    layered = config.assemble(flags={"base.model": str(bert), "lora.init_from": str(first.path)})
    ours = first.metrics["trainable_parameters"]
    assert training.count_parameters(layered, 2)["trainable"] == ours
    assert os.path.isdir(first.adapter)
