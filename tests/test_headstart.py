"""A head that begins as a linear probe of the base."""

from pathlib import Path
from typing import Any

import bases
import numpy as np
import pytest
import torch
from conftest import reviews, write_csv
from sklearn.linear_model import LogisticRegression
from test_training import small

from trimtab import build, headstart, resolve, training
from trimtab.classification import compute_logits, mean_loss
from trimtab.forward import stock

pytestmark = pytest.mark.usefixtures("quick")


def three_labels(rows: int) -> list[tuple[str, str]]:
    return [(text, label if i % 3 else "none") for i, (text, label) in enumerate(reviews(rows))]


def ready(file: Path, base: Path, **settings: object) -> build.Ready:
    return build.make_ready(resolve.resolve(small(file, base, **settings)))


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra"])
@pytest.mark.parametrize("labels", [2, 3])
def test_the_answers_are_those_of_logistic_regression_on_what_the_last_layer_sees(
    tmp_path: Path, kind: str, labels: int
) -> None:
    base = bases.write_base(tmp_path / kind, kind)
    one = ready(write_csv(tmp_path / "rows.csv", reviews(96) if labels == 2 else three_labels(96)), base)
    assert "linear probe on" in headstart.start_head(one)
    seen: list[torch.Tensor] = []
    inner = one.model.get_base_model()
    out = inner.classifier.modules_to_save["default"] if kind in ("bert", "distilbert") else inner.classifier
    out = out.modules_to_save["default"].out_proj if kind in ("roberta", "electra") else out
    out.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    encoded = one.job.train.encoded
    with torch.no_grad():
        logits = stock(one.model, one.job.tokenizer.pad_id)(encoded, np.arange(len(encoded))).numpy()
    probe = LogisticRegression(C=1.0, max_iter=500).fit(torch.cat(seen).numpy(), encoded.labels)
    theirs = probe.decision_function(torch.cat(seen).numpy())
    ours = logits[:, 1] - logits[:, 0] if labels == 2 else logits - logits.mean(axis=1, keepdims=True)
    assert np.allclose(ours, theirs if labels == 2 else theirs - theirs.mean(axis=1, keepdims=True), atol=6e-2)


def test_a_head_at_random_is_left_alone_and_so_is_one_that_the_base_brought(csv_file: Path, bert: Path) -> None:
    def before_and_after(one: build.Ready) -> tuple[Any, Any, str]:
        names = [name for name, parameter in one.model.named_parameters() if parameter.requires_grad]
        copy = {name: one.model.get_parameter(name).detach().clone() for name in names}
        line = headstart.start_head(one)
        return copy, {name: one.model.get_parameter(name) for name in names}, line

    before, after, line = before_and_after(ready(csv_file, bert, train__head_start="random"))
    assert line == ""
    assert all(torch.equal(before[name], after[name]) for name in before)
    brought = ready(csv_file, bert)
    object.__setattr__(brought, "head_is_new", False)
    before, after, line = before_and_after(brought)
    assert "brought it" in line
    assert all(torch.equal(before[name], after[name]) for name in before)
    _, _, line = before_and_after(ready(csv_file, bert, runtime__fast="off"))
    assert "at random" in line


def test_it_pays_before_the_first_step_and_changes_no_lora(tmp_path: Path, bert: Path) -> None:
    file = write_csv(tmp_path / "rows.csv", reviews(96))
    cold, warm = ready(file, bert, train__head_start="random"), ready(file, bert)
    lora = [parameter.detach().clone() for name, parameter in warm.model.named_parameters() if "lora" in name]
    headstart.start_head(warm)
    assert all(
        torch.equal(a, b)
        for a, (name, b) in zip(
            lora, [item for item in warm.model.named_parameters() if "lora" in item[0]], strict=True
        )
    )
    encoded = warm.job.eval.encoded
    logits = [compute_logits(one.engine.forward, encoded) for one in (cold, warm)]
    assert mean_loss(logits[1], encoded.labels) < mean_loss(logits[0], encoded.labels)


def test_a_label_without_training_rows_does_not_stop_it() -> None:
    rng = np.random.default_rng(0)
    weight, bias = headstart._logistic(rng.normal(size=(20, 4)).astype(np.float32), np.arange(20) % 2 * 2, 4)
    assert weight.shape == (4, 4)
    assert not weight[[1, 3]].any()
    assert (bias[[1, 3]] <= bias[[0, 2]].min()).all()


def test_a_run_says_how_its_head_began(csv_file: Path, bert: Path, tmp_path: Path) -> None:
    events: list[Any] = []
    training.train(small(csv_file, bert), out=str(tmp_path / "run"), observe=events.append)
    told = [event["text"] for event in events if event["event"] == "head"]
    assert told == ["the head starts as a linear probe on 86 rows"]
