"""A new head that begins with what the base knows."""

import shutil
from pathlib import Path
from typing import Any

import bases
import numpy as np
import pytest
import torch
from conftest import reviews, write_csv
from test_training import contents, small

from trimtab import baselines, build, headstart, logistic, resolve, training
from trimtab.classification import compute_logits, mean_loss
from trimtab.forward import stock

pytestmark = pytest.mark.usefixtures("quick")


def three_labels(rows: int) -> list[tuple[str, str]]:
    return [(text, label if i % 3 else "none") for i, (text, label) in enumerate(reviews(rows))]


@pytest.fixture
def sentence_bert(bert: Path, tmp_path: Path) -> Path:
    """A base whose folder says that it speaks in the mean of its tokens."""
    return pooled(bert, tmp_path / "sentence", '{"pooling_mode_mean_tokens": true}')


def pooled(base: Path, folder: Path, said: str) -> Path:
    shutil.copytree(base, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(said, "utf-8")
    return folder


def started(one: build.Ready) -> str:
    """Starts the head, and gives what people are told."""
    lines: list[str] = []
    headstart.start_head(one, lines.append)
    return "\n".join(lines)


def ready(file: Path, base: Path, **settings: object) -> build.Ready:
    return build.make_ready(resolve.resolve(small(file, base, **settings)))


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra"])
@pytest.mark.parametrize("labels", [2, 3])
def test_the_answers_are_those_of_logistic_regression_on_what_the_last_layer_sees(
    tmp_path: Path, kind: str, labels: int
) -> None:
    base = bases.write_base(tmp_path / kind, kind)
    one = ready(write_csv(tmp_path / "rows.csv", reviews(96) if labels == 2 else three_labels(96)), base)
    assert "linear probe on" in started(one)
    seen: list[torch.Tensor] = []
    inner = one.model.get_base_model()
    out = inner.classifier.modules_to_save["default"] if kind in ("bert", "distilbert") else inner.classifier
    out = out.modules_to_save["default"].out_proj if kind in ("roberta", "electra") else out
    out.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    encoded = one.job.train.encoded
    with torch.no_grad():
        logits = stock(one.model, one.job.tokenizer.pad_id)(encoded, np.arange(len(encoded))).numpy()
    probe, _ = logistic.fit(torch.cat(seen).numpy(), encoded.labels, [1.0])
    theirs = probe.decision_function(torch.cat(seen).numpy())
    ours = logits[:, 1] - logits[:, 0] if labels == 2 else logits - logits.mean(axis=1, keepdims=True)
    assert np.allclose(ours, theirs if labels == 2 else theirs - theirs.mean(axis=1, keepdims=True), atol=6e-2)


def test_a_head_at_random_is_left_alone_and_so_is_one_that_the_base_brought(csv_file: Path, bert: Path) -> None:
    def before_and_after(one: build.Ready) -> tuple[Any, Any, str]:
        names = [name for name, parameter in one.model.named_parameters() if parameter.requires_grad]
        copy = {name: one.model.get_parameter(name).detach().clone() for name in names}
        line = started(one)
        return copy, {name: one.model.get_parameter(name) for name in names}, line

    before, after, line = before_and_after(ready(csv_file, bert, train__head_start="random"))
    assert line == ""
    assert all(torch.equal(before[name], after[name]) for name in before)
    brought = ready(csv_file, bert)
    object.__setattr__(brought, "head_is_new", False)
    before, after, line = before_and_after(brought)
    assert "brought it" in line
    assert all(torch.equal(before[name], after[name]) for name in before)
    _, _, line = before_and_after(ready(csv_file, bert, runtime__fast="off", train__head_start="probe"))
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


def nearness(one: build.Ready, wanted: Any) -> float:
    """The mean cosine of first tokens to vectors, over the training rows."""
    encoded = one.job.train.encoded
    assert one.engine.encoder is not None
    states = headstart._states(one.engine.encoder, encoded, np.arange(len(encoded)))
    return float(torch.cosine_similarity(torch.from_numpy(states), torch.from_numpy(wanted)).mean())


def test_the_first_token_learns_the_sentence_vector_of_the_frozen_base(csv_file: Path, sentence_bert: Path) -> None:
    one = ready(csv_file, sentence_bert)
    assert one.job.recipe.train.head_start == "sentence"
    encoded, vectors = one.job.train.encoded, one.engine.vectors
    assert vectors is not None
    wanted = baselines.encoder(vectors, sentence_bert)(encoded, np.arange(len(encoded)))
    frozen = {name: p.detach().clone() for name, p in one.model.named_parameters() if not p.requires_grad}
    before = nearness(one, wanted)
    assert "LoRA learns the base's sentence vectors, 100 steps" in started(one)
    assert 1 - nearness(one, wanted) < 0.5 * (1 - before)
    assert all(torch.equal(frozen[name], one.model.get_parameter(name)) for name in frozen)
    assert np.array_equal(baselines.encoder(vectors, sentence_bert)(encoded, np.arange(len(encoded))), wanted)
    assert all(parameter.grad is None for parameter in one.model.parameters())


def test_wider_bases_learn_sentence_vectors_at_a_lower_rate() -> None:
    assert [headstart.sentence_rate(width) for width in (32, 384, 768)] == [6e-3, 6e-3, 3e-3]


def test_rates_for_the_labels_are_compared_from_one_start(csv_file: Path, sentence_bert: Path) -> None:
    starts = []
    for rate in (1e-5, 1e-2):
        one = ready(csv_file, sentence_bert, train__learning_rate=rate)
        started(one)
        starts.append({name: p.detach().clone() for name, p in one.model.named_parameters() if p.requires_grad})
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])


@pytest.mark.parametrize(
    ("said", "settings", "start"),
    [
        ('{"pooling_mode_mean_tokens": true}', {}, "sentence"),
        ('{"pooling_mode": "mean"}', {}, "sentence"),
        ('{"pooling_mode_mean_tokens": true}', {"lora__layers": "top:1"}, "probe"),
        ('{"pooling_mode_mean_tokens": true}', {"train__head_start": "random"}, "random"),
        ('{"pooling_mode_mean_tokens": true}', {"runtime__fast": "off"}, "random"),
        ('{"pooling_mode_cls_token": true}', {}, "probe"),
        ("[]", {}, "probe"),
    ],
)
def test_how_a_head_starts_by_itself(
    csv_file: Path, bert: Path, tmp_path: Path, said: str, settings: dict[str, object], start: str
) -> None:
    base = pooled(bert, tmp_path / "base", said)
    assert ready(csv_file, base, **settings).job.recipe.train.head_start == start


def test_with_many_rows_a_label_the_first_token_learns_by_itself(sentence_bert: Path, tmp_path: Path) -> None:
    for rows, start in ((440, "sentence"), (460, "probe")):  # nine tenths of them are trained on
        file = write_csv(tmp_path / f"{rows}.csv", reviews(rows))
        assert ready(file, sentence_bert).job.recipe.train.head_start == start


def test_lora_of_another_adapter_is_not_taught_anew_and_a_first_token_that_speaks_has_nothing_to_learn(
    csv_file: Path, sentence_bert: Path, bert: Path, tmp_path: Path
) -> None:
    first = training.train(small(csv_file, sentence_bert, train__num_epochs=1), out=str(tmp_path / "first"))
    warm = {"lora__init_from": str(first.path)}
    assert ready(csv_file, sentence_bert, **warm).job.recipe.train.head_start == "probe"
    other = write_csv(tmp_path / "other.csv", three_labels(96))  # so that the head is new
    base = pooled(bert, tmp_path / "cls", '{"pooling_mode_cls_token": true}')
    for one in (
        ready(other, sentence_bert, train__head_start="sentence", **warm),
        ready(csv_file, base, train__head_start="sentence"),
    ):
        lora = {name: p.detach().clone() for name, p in one.model.named_parameters() if "lora_" in name}
        assert started(one) == f"the head starts as a linear probe on {len(one.job.train.examples)} rows"
        assert all(torch.equal(lora[name], one.model.get_parameter(name)) for name in lora)


def test_what_comes_before_the_first_step_is_in_the_estimate(csv_file: Path, sentence_bert: Path) -> None:
    for none in ({"train__head_start": "random"}, {"runtime__fast": "off"}):
        found = headstart.work_ahead(ready(csv_file, sentence_bert, **none))
        assert (len(found.probed), len(found.taught)) == (0, 0)
    found = headstart.work_ahead(ready(csv_file, sentence_bert))
    assert (len(found.probed), len(found.taught)) == (88, 100)  # two names of labels among them
    probed = training.plan(small(csv_file, sentence_bert, train__head_start="probe")).estimate
    taught = training.plan(small(csv_file, sentence_bert)).estimate
    assert probed.probe_seconds > 0 == probed.sentence_seconds
    assert taught.sentence_seconds > taught.probe_seconds > 0
    for one in (probed, taught):
        epochs = one.epochs * (one.epoch_seconds + one.eval_seconds)
        assert one.train_seconds == pytest.approx(one.probe_seconds + one.sentence_seconds + epochs)


def test_a_run_that_goes_on_starts_no_head_again(csv_file: Path, sentence_bert: Path, tmp_path: Path) -> None:
    layered = small(csv_file, sentence_bert, train__save_every_s=1e-9)
    whole = training.train(layered, out=str(tmp_path / "whole"))

    def stop_at(event: str) -> Any:
        def stop(found: Any) -> None:
            if found["event"] == event:
                raise KeyboardInterrupt

        return stop

    # Before the first checkpoint, after it, and with none that is whole.
    for name, event, heads in (("early", "head", 2), ("late", "checkpoint", 0), ("damaged", "checkpoint", 2)):
        with pytest.raises(KeyboardInterrupt):
            training.train(layered, out=str(tmp_path / name), observe=stop_at(event))
        if name == "damaged":
            for file in (tmp_path / name).glob("checkpoints/*/tensors.safetensors"):
                file.write_bytes(b"")
        told: list[str] = []
        resumed = training.resume(tmp_path / name, observe=lambda found, told=told: told.append(found["event"]))  # type: ignore[misc]
        assert told.count("head") == heads
        assert contents(whole.adapter) == contents(resumed.adapter)


def test_a_label_without_training_rows_does_not_stop_it() -> None:
    rng = np.random.default_rng(0)
    weight, bias = headstart._logistic(rng.normal(size=(20, 4)).astype(np.float32), np.arange(20) % 2 * 2, 4, [1.0])
    assert weight.shape == (4, 4)
    assert not weight[[1, 3]].any()
    assert (bias[[1, 3]] <= bias[[0, 2]].min()).all()


def test_a_run_says_how_its_head_began(csv_file: Path, bert: Path, tmp_path: Path) -> None:
    events: list[Any] = []
    training.train(small(csv_file, bert), out=str(tmp_path / "run"), observe=events.append)
    told = [event["text"] for event in events if event["event"] == "head"]
    assert told == ["the head starts as a linear probe on 86 rows"]
