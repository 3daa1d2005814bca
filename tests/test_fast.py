"""The fast forward against its slow twins: transformers and peft, and plain autograd with the same masks."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import seal
from bases import write_base
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from trimtab import config, evaluation, forward, predict, tokens, training
from trimtab.classification import loss_sum
from trimtab.config import MINILM, LoraSettings, RuntimeSettings
from trimtab.errors import DataError, RecipeError
from trimtab.fast import blocked, cores, encoder, layer
from trimtab.fast.dropout import Noise, keep_scale
from trimtab.fast.encoder import LAYOUTS, Batch, NotSupported
from trimtab.fast.layer import Group, Layer
from trimtab.fast.workspace import Workspace
from trimtab.hub import find_base
from trimtab.machine import Processor
from trimtab.model import head_modules, inject, load_base, load_config, on_layers, resolve_targets, trainable
from trimtab.tokens import Encoded

TEXTS = ["a great film", "boring", "the plot is not very good " * 9, "an awful film", "dull dull", "i love it " * 8]
ROWS = np.array([4, 0, 2, 3, 5, 1])
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = write_base(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return folder


def make_model(
    folder: Path,
    targets: str = "all-linear",
    *,
    dropout: float = 0.0,
    change: dict[str, Any] | None = None,
    **lora: Any,
) -> tuple[Any, Encoded]:
    """A peft model whose LoRA already matters, and the encoded texts."""
    tokenizer = tokens.from_base(folder)
    base_config = load_config(folder, num_labels=3, dropout=dropout, pad_id=tokenizer.pad_id)
    for name, value in (change or {}).items():
        setattr(base_config, name, value)
    torch.manual_seed(0)
    base = load_base(folder, base_config)
    head = head_modules(base.model, base.new_parameters)
    settings = LoraSettings(**lora)
    head += [name for name in settings.also_saved if name not in head]
    names = on_layers(base.model, resolve_targets(base.model, targets, head), settings, head)
    model = inject(base.model, settings, names, head, "base")
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model, tokens.encode(TEXTS, tokenizer, 48)


def compare(model: Any, encoded: Encoded, rows: np.ndarray[Any, Any], pad_id: int) -> tuple[float, float]:
    """Largest difference of a logit, with gradients or without, and largest relative difference of a gradient."""
    labels = torch.arange(len(rows)) % 3
    parameters = trainable(model)
    outcomes = []
    for run in (forward.stock(model, pad_id), forward.fast(encoder.of_peft_model(model))):
        model.zero_grad()
        logits = run(encoded, rows, 0)
        loss_sum(logits, labels).backward()  # type: ignore[no-untyped-call]
        with torch.inference_mode():
            both = torch.stack([logits.detach(), run(encoded, rows)])
        outcomes.append((both, {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}))
    (slow, slow_gradients), (quick, gradients) = outcomes
    assert slow_gradients.keys() == gradients.keys() == parameters.keys()
    relative = [((gradients[n] - g).norm() / g.norm().clamp_min(1e-12)).item() for n, g in slow_gradients.items()]
    return (slow - quick).abs().max().item(), max(relative)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("targets", ["query-value", "all-linear"])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], np.array([1, 4, 1]), np.array([2])], ids=str)
def test_logits_and_gradients_are_those_of_transformers_and_peft(
    folders: Callable[[str], Path], kind: str, targets: str, rows: np.ndarray[Any, Any]
) -> None:
    model, encoded = make_model(folders(kind), targets)
    logit, gradient = compare(model, encoded, rows, model.config.pad_token_id)
    assert logit < 1e-5
    assert gradient < 1e-4


@pytest.fixture
def two_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Batches of a few short rows are cut too, and there are two threads for them."""
    monkeypatch.setattr(cores, "_LEAST_TOKENS", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.usefixtures("two_parts")
def test_parts_side_by_side_are_the_whole_batch(folders: Callable[[str], Path], kind: str) -> None:
    model, encoded = make_model(folders(kind))
    built = encoder.of_peft_model(model)
    parts, whole = encoder.cut(encoded.ids, encoded.offsets, ROWS), encoder.pack(encoded.ids, encoded.offsets, ROWS)
    assert len(parts.parts) == 2
    logit, gradient = compare(model, encoded, ROWS, model.config.pad_token_id)
    assert logit < 1e-5
    assert gradient < 1e-4
    for first_only in (True, False):
        one = encoder.vectors(built, parts, first_only=first_only)
        other = encoder.vectors(built, Batch([whole], whole.order), first_only=first_only)
        assert (one - other).abs().max() < 1e-5


@pytest.mark.usefixtures("two_parts")
def test_parts_have_masks_of_their_own_and_give_the_same_bytes_on_any_threads(folders: Callable[[str], Path]) -> None:
    model, encoded = make_model(folders("bert"), dropout=0.3)
    built, batch = encoder.of_peft_model(model), encoder.cut(encoded.ids, encoded.offsets, np.array([1, 1]))
    found = [encoder.first_tokens(built, batch, Noise(7)) for _ in range(20)]
    torch.set_num_threads(1)
    found.append(encoder.first_tokens(built, batch, Noise(7)))
    assert all(torch.equal(one, found[0]) for one in found)
    assert not torch.equal(found[0][0], found[0][1])
    assert torch.equal(*encoder.first_tokens(built, batch))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_lora_on_the_top_layer_alone(folders: Callable[[str], Path], kind: str) -> None:
    model, encoded = make_model(folders(kind), layers="top:1")
    logit, gradient = compare(model, encoded, ROWS, model.config.pad_token_id)
    assert logit < 1e-5
    assert gradient < 1e-4


@pytest.mark.parametrize("variant", ["lora", "rslora"])
@pytest.mark.parametrize("target", [("key",), ("intermediate.dense",), ("layer.1.output.dense",)])
def test_lora_beside_any_one_weight(folders: Callable[[str], Path], target: tuple[str, ...], variant: str) -> None:
    model, encoded = make_model(folders("bert"), target, variant=variant, r=3)  # type: ignore[arg-type]
    logit, gradient = compare(model, encoded, ROWS, 0)
    assert logit < 1e-5
    assert gradient < 1e-4


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_text_that_holds_the_pad_token_itself(folders: Callable[[str], Path], kind: str) -> None:
    model, encoded = make_model(folders(kind))
    pad = model.config.pad_token_id
    encoded.ids[int(encoded.offsets[2]) + 3] = pad
    encoded.ids[int(encoded.offsets[5]) + 1] = pad
    assert compare(model, encoded, ROWS, pad)[0] < 1e-5


def test_the_loss_falls_as_with_transformers_over_50_steps(folders: Callable[[str], Path]) -> None:
    curves = []
    for choice in ("off", "on"):
        model, encoded = make_model(folders("roberta"))
        run = forward.choose(model, 1, CPU, RuntimeSettings(fast=choice)).forward  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3)
        curve = []
        for step in range(50):
            loss = loss_sum(run(encoded, np.roll(ROWS, step)[:4], step), torch.tensor([0, 1, 2, 0]))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(np.array(curve))
    assert np.abs(curves[0] - curves[1]).max() < 1e-4
    assert np.abs(np.diff(curves[0])).max() > 0.1  # the curve moves


# -- dropout ---------------------------------------------------------------------------------------------------


def mask(rate: float, shape: tuple[int, ...], *site: int, seed: int = 5) -> torch.Tensor:
    return Noise(seed).fill(torch.empty(shape, dtype=torch.uint8), rate, *site)


def twin(block: Layer, x: torch.Tensor, groups: list[Group], number: int, first: Any) -> torch.Tensor:
    """The layer in plain autograd, with the masks of the fast one."""

    def dropped(t: torch.Tensor, rate: float, site: int) -> torch.Tensor:
        return t * mask(rate, t.shape, number, site) * keep_scale(rate) if rate else t

    def product(item: layer.Linear, t: torch.Tensor, place: int) -> torch.Tensor:
        y = torch.nn.functional.linear(t, item.weight, item.bias)
        if item.lora is None:
            return y
        low = dropped(t, item.lora.dropout, layer.LORA + place) @ item.lora.a.t()
        return y + item.lora.scaling * low @ item.lora.b.t()

    def norm(item: layer.Norm, t: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(t, t.shape[-1:], item.weight, item.bias, item.eps)

    queried = x if first is None else x[first]
    q, k, v = product(block.query, queried, 0), product(block.key, x, 1), product(block.value, x, 2)
    heads, first_only = block.heads, first is not None
    scores = (layer._scores(groups, heads, first_only=first_only),)
    kept = mask(block.attention_dropout, scores, number, layer.ATTENTION)
    pieces = []
    for piece in layer.pieces(groups, heads, first_only=first_only):
        query, key, value = (
            t.reshape(piece.rows, -1, heads, t.shape[1] // heads).transpose(1, 2)
            for t in (q[piece.queries], k[piece.tokens], v[piece.tokens])
        )
        p = torch.softmax(query @ key.transpose(2, 3) * block.scale, -1)
        if block.attention_dropout:
            p = p * kept[piece.scores].view(p.shape) * keep_scale(block.attention_dropout)
        pieces.append((p @ value).transpose(1, 2).reshape(-1, q.shape[1]))
    attention = product(block.attention_output, torch.cat(pieces), 3)
    y = norm(block.attention_norm, dropped(attention, block.attention_output_dropout, 1) + queried)
    raised = torch.nn.functional.gelu(product(block.up, y, 4))
    return norm(block.output_norm, dropped(product(block.down, raised, 5), block.output_dropout, 2) + y)


@pytest.mark.parametrize("whole", [True, False], ids=["all tokens", "first tokens"])
@pytest.mark.parametrize("piece", [1, 200, 1 << 20])
@pytest.mark.parametrize("targets", ["query-value", "all-linear"])
def test_the_backward_with_dropout_is_that_of_autograd(
    folders: Callable[[str], Path], targets: str, piece: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer, "_PIECE", piece)
    model, encoded = make_model(folders("bert"), targets, dropout=0.3, lora_dropout=0.2)
    block = encoder.of_peft_model(model).layers[1]
    batch = encoder.pack(encoded.ids, encoded.offsets, np.array([0, 3, 1, 2, 5, 0]))
    width = block.query.weight.shape[0]
    x = torch.randn(len(batch.ids), width, generator=torch.Generator().manual_seed(1), requires_grad=True)
    first = None if whole else batch.first
    slow = twin(block, x, batch.groups, 1, first)
    dy = torch.randn(slow.shape, generator=torch.Generator().manual_seed(2))
    slow_gradients = torch.autograd.grad((slow * dy).sum(), [x, *block.trained()])
    with torch.no_grad():
        scope = layer.Scope(1, batch.groups, Workspace(), Noise(5), keeps=True, dtype=x.dtype)
        quick, saved = layer.forward(block, x, scope, first)
        dx, gradients = layer.backward(block, dy, saved, scope, first, needs_dx=True)
        assert dx is not None
        dx = dx.clone()  # its memory is used again
        without_dx, others = layer.backward(block, dy, saved, scope, first, needs_dx=False)
        quick = quick.clone()
        clean = layer.forward(block, x, replace(scope, noise=None), first)[0].clone()
        answer, _ = layer.forward(block, x, replace(scope, noise=None, keeps=False), first)
    for one, other in zip((slow, *slow_gradients), (quick, dx, *gradients), strict=True):
        assert (one - other).norm() < 1e-5 * one.norm()
    assert without_dx is None
    assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))
    assert (clean - quick).norm() > 0.1 * quick.norm()  # dropout was on
    assert (answer - clean).norm() < 1e-5 * clean.norm()


def test_masks_keep_what_they_should_and_depend_on_seed_and_site_alone() -> None:
    shape = (1_000, 1_003)
    first = mask(0.1, shape, 1, 2)
    assert abs(first.float().mean() * keep_scale(0.1) - 1) < 0.002
    assert set(first.unique().tolist()) == {0, 1}
    assert torch.equal(mask(0.1, shape, 1, 2), first)
    for other in (mask(0.1, shape, 1, 2, seed=4), mask(0.1, shape, 2, 2), mask(0.1, shape, 1, 3)):
        agreement = (other == first).float().mean().item()
        assert abs(agreement - (0.9**2 + 0.1**2)) < 0.01  # independent
    # Neither is a part of a mask a copy of another part.
    flat = first.view(-1)
    half = len(flat) // 2
    assert abs((flat[:half] == flat[-half:]).float().mean() - (0.9**2 + 0.1**2)) < 0.01


def test_nothing_is_kept_where_no_backward_follows(folders: Callable[[str], Path]) -> None:
    model, encoded = make_model(folders("bert"))
    whole, batch = encoder.of_peft_model(model), encoder.pack(encoded.ids, encoded.offsets, ROWS)
    kept = []
    with torch.no_grad():
        for keeps in (False, True):
            x = encoder._embed(whole.embeddings, batch, None, whole.workspace)
            kept.append(len(encoder._layers(whole, x, range(2), batch, None, keeps=keeps)[1]))
    assert kept == [0, 2]


def test_a_batch_that_another_has_overwritten_is_refused(folders: Callable[[str], Path]) -> None:
    model, encoded = make_model(folders("bert"))
    run = forward.fast(encoder.of_peft_model(model))
    first, second = run(encoded, ROWS, 1), run(encoded, ROWS, 2)
    loss_sum(second, torch.arange(6) % 3).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="another batch ran"):
        loss_sum(first, torch.arange(6) % 3).backward()  # type: ignore[no-untyped-call]


def test_batches_of_other_sizes_and_evaluation_in_between_change_nothing(folders: Callable[[str], Path]) -> None:
    def run_all(*, fresh: bool) -> list[torch.Tensor]:
        model, encoded = make_model(folders("bert"), dropout=0.1, lora_dropout=0.1)
        run = forward.fast(encoder.of_peft_model(model))
        found = []
        for step, rows in enumerate(([1, 4], ROWS, [0], [2, 5, 3])):
            if fresh:
                run = forward.fast(encoder.of_peft_model(model))
            model.zero_grad()
            loss_sum(run(encoded, np.array(rows), step), torch.zeros(len(rows), dtype=torch.long)).backward()  # type: ignore[no-untyped-call]
            found += [parameter.grad.clone() for parameter in trainable(model).values() if parameter.grad is not None]
            with torch.inference_mode():
                found.append(run(encoded, ROWS).clone())
        return found

    assert all(torch.equal(one, other) for one, other in zip(run_all(fresh=True), run_all(fresh=False), strict=True))


def test_threads_that_predict_at_once_get_their_own_answers(folders: Callable[[str], Path]) -> None:
    model, encoded = make_model(folders("bert"))
    run = forward.fast(encoder.of_peft_model(model))

    def answer(row: int) -> torch.Tensor:
        with torch.inference_mode():
            return run(encoded, np.array([row]))

    alone = [answer(row) for row in range(6)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(answer, list(range(6)) * 50))
    assert all(torch.equal(one, alone[i % 6]) for i, one in enumerate(together))


def test_dropout_differs_from_batch_to_batch_and_is_off_for_evaluation(folders: Callable[[str], Path]) -> None:
    model, encoded = make_model(folders("bert"), dropout=0.5)
    run = forward.fast(encoder.of_peft_model(model))
    with torch.no_grad():
        assert torch.equal(run(encoded, ROWS, 1), run(encoded, ROWS, 1))
        assert not torch.equal(run(encoded, ROWS, 1), run(encoded, ROWS, 2))
        assert torch.equal(run(encoded, ROWS), run(encoded, ROWS))
        assert (run(encoded, ROWS) - forward.stock(model, 0)(encoded, ROWS)).abs().max() < 1e-5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_has_memory_of_its_own(folders: Callable[[str], Path]) -> None:
    model, encoded = make_model(folders("bert"))
    run = forward.fast(encoder.of_peft_model(model))

    def passes(rows: list[int], times: int) -> bool:
        with torch.inference_mode():
            alone = run(encoded, np.array(rows))
            return all(torch.equal(run(encoded, np.array(rows)), alone) for _ in range(times))

    passes([0, 1, 2], 1)
    child = os.fork()
    if child == 0:
        os._exit(0 if passes([2, 4, 5], 200) else 1)
    same = passes([0, 1, 3], 200)
    assert (same, os.waitpid(child, 0)[1]) == (True, 0)


# -- what only looks like one of the family --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("bert", {"hidden_act": "relu"}, "its activation is relu"),
        ("roberta", {"hidden_act": "gelu_new"}, "its activation is gelu_new"),
        ("distilbert", {"activation": "relu"}, "its activation is relu"),
        ("bert", {"position_embedding_type": "relative_key"}, "its positions are relative_key"),
        ("roberta", {"is_decoder": True}, "is_decoder"),
        ("albert", {}, "albert is not of the BERT family"),
        ("deberta-v2", {}, "deberta-v2 is not of the BERT family"),
        ("modernbert", {}, "modernbert is not of the BERT family"),
        ("mpnet", {}, "mpnet is not of the BERT family"),
    ],
)
def test_another_config_runs_stock(
    folders: Callable[[str], Path], kind: str, change: dict[str, Any], reason: str
) -> None:
    model, encoded = make_model(folders(kind), change=change)
    engine = forward.choose(model, 0, CPU, RuntimeSettings())
    assert engine.name == "stock"
    assert reason in engine.reason
    assert engine.forward(encoded, ROWS).shape == (6, 3)
    with pytest.raises(RecipeError, match="fast forward cannot be had"):
        forward.choose(model, 0, CPU, RuntimeSettings(fast="on"))


def test_another_structure_runs_stock(folders: Callable[[str], Path]) -> None:
    def reason() -> str:
        return forward.choose(model, 0, CPU, RuntimeSettings()).reason

    model, _ = make_model(folders("bert"), variant="dora")
    assert "another variant" in reason()
    model, _ = make_model(folders("bert"))
    block = model.get_base_model().bert.encoder.layer[1]
    block.extra = torch.nn.Linear(2, 2)
    assert "bert.encoder.layer.1.extra.bias" in reason()
    del block.extra
    assert forward.choose(model, 0, CPU, RuntimeSettings()).name == "fast"
    block.attention.self.key.base_layer.weight = torch.nn.Parameter(torch.zeros(16, 32))
    assert "key.weight has shape (16, 32)" in reason()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"lora_dropout": 0.999}, "a dropout of 0.999"),
        ({"lora_dropout": 0.001}, "a dropout of 0.001"),
        ({"modules_to_save": ("bert.embeddings.LayerNorm",)}, "bert.embeddings.LayerNorm.weight is trained in full"),
    ],
)
def test_settings_that_are_not_computed_run_stock(
    folders: Callable[[str], Path], settings: dict[str, Any], reason: str
) -> None:
    model, _ = make_model(folders("bert"), **settings)
    assert reason in forward.choose(model, 0, CPU, RuntimeSettings()).reason


def test_lora_beside_a_head_that_came_with_the_base_runs_stock() -> None:
    model, _ = make_model(find_base(MINILM).folder, ("dense",))
    assert "LoRA stands beside bert.pooler.dense" in forward.choose(model, 0, CPU, RuntimeSettings()).reason


def test_a_class_of_someone_else_runs_stock(folders: Callable[[str], Path]) -> None:
    model, _ = make_model(folders("bert"))
    inner = model.get_base_model()
    inner.__class__ = type("TheirBert", (type(inner),), {"__module__": "theirs"})
    with pytest.raises(NotSupported, match="TheirBert"):
        encoder.of_peft_model(model)


def test_fast_off_is_stock_and_says_so(folders: Callable[[str], Path]) -> None:
    model, _ = make_model(folders("bert"))
    assert (
        forward.choose(model, 0, CPU, RuntimeSettings(fast="off")).line
        == "stock forward in float32 (as the recipe says)"
    )
    assert forward.choose(model, 0, CPU, RuntimeSettings()).line == "fast forward in float32 (bert on a CPU)"
    assert "meta" in forward.choose(model.to("meta"), 0, torch.device("meta"), RuntimeSettings()).reason


# -- files -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A short run on the small base of an architecture."""
    made: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in made:
            place = tmp_path_factory.mktemp(f"run-{kind}")
            rows = [f"{text.strip()},{label}" for text in TEXTS for label in ("a", "b") for _ in range(2)]
            (place / "rows.csv").write_text("\n".join(["text,label", *rows]), "utf-8")
            layered = config.assemble(
                "default",
                {"data.train": (str(place / "rows.csv"),), "base.model": str(folders(kind))},
                ["runtime.device=cpu", "train.num_epochs=1", "train.learning_rate=0.05"],
            )
            with pytest.MonkeyPatch.context() as patch:  # the tests below check what is saved
                checked = {"largest_difference": 0.0, "seconds": 0.0}
                patch.setattr(training, "_verify_in_fresh_process", lambda run: checked)
                made[kind] = training.train(layered, out=str(place / "run")).path
        return made[kind]

    return run


@pytest.mark.parametrize("kind", LAYOUTS)
def test_merged_files_answer_as_peft_does(runs: Callable[[str], Path], kind: str) -> None:
    quick, slow = (predict.load(runs(kind), runtime=RuntimeSettings(fast=fast)) for fast in ("on", "off"))  # type: ignore[arg-type]
    assert (quick.engine.name, slow.engine.name) == ("fast", "stock")
    encoded = quick.encode([*TEXTS, "film", "the great film " * 40])
    assert np.abs(quick.logits(encoded) - slow.logits(encoded)).max() < 1e-5


@pytest.mark.parametrize(
    ("name", "features", "dtype", "has_onednn", "expected"),
    [
        ("AMD EPYC", ("avx2",), torch.float32, True, True),
        ("AMD EPYC", ("avx2",), torch.bfloat16, True, False),
        ("AMD EPYC", ("avx2",), torch.float32, False, False),
        ("AMD EPYC 9654", ("avx2", "avx512_bf16", "avx512f"), torch.float32, True, False),
        ("AMD EPYC 9654", ("avx2", "avx512_bf16", "avx512f"), torch.bfloat16, True, True),
        ("AMD EPYC 9654", ("avx2", "avx512_bf16", "avx512f"), torch.bfloat16, False, False),
        ("Intel(R) Xeon(R)", ("avx2",), torch.float32, True, False),
        ("AMD64", ("avx2",), torch.float32, True, False),  # what Windows may call an Intel too
    ],
)
def test_onednn_is_taken_where_it_was_measured(
    name: str,
    features: tuple[str, ...],
    dtype: torch.dtype,
    has_onednn: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocked, "processor", lambda: Processor(name, features))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)
    assert blocked.pays(dtype) is expected


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 0.05)])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_weights_in_the_layout_of_onednn_answer_alike(
    runs: Callable[[str], Path], kind: str, dtype: Any, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "has_bf16", lambda chip: True)
    monkeypatch.setattr(blocked, "LEAST_TOKENS", 10)
    loaded, products, product = [], [], blocked.Blocked.product
    for pays in (False, True):
        monkeypatch.setattr(blocked, "pays", lambda dtype, pays=pays: pays)
        loaded.append(predict.load(runs(kind), runtime=RuntimeSettings(dtype=dtype)))
    monkeypatch.setattr(blocked.Blocked, "product", lambda *args: products.append(len(args[1])) or product(*args))
    plain, kept = loaded
    for texts in (TEXTS, ["film"], [*TEXTS, "the great film " * 40]):
        encoded = plain.encode(texts)
        assert np.abs(plain.logits(encoded) - kept.logits(encoded)).max() < bound
    assert products
    assert (min(products) < 10) == (dtype == "bfloat16")  # few tokens take it too in bfloat16 alone


def test_a_base_saved_without_its_prefix_and_with_old_names(runs: Callable[[str], Path], tmp_path: Path) -> None:
    classifier = predict.load(runs("bert"))
    tensors = load_file(classifier.base.folder / "model.safetensors")
    renamed = {
        name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma"): tensor
        for name, tensor in tensors.items()
        if name.startswith("bert.")
    }
    assert set(renamed).isdisjoint(tensors)
    made = encoder.of_files(
        json.loads((classifier.base.folder / "config.json").read_bytes()),
        renamed | {"embeddings.position_ids": torch.arange(64)[None]},
        load_file(classifier.adapter.folder / "adapter_model.safetensors"),
        targets=classifier.adapter.lora.target_modules,
        rank=8,
        scaling=2.0,
        head=classifier.adapter.head,
        num_labels=2,
    )
    encoded = classifier.encode(TEXTS)
    with torch.no_grad():
        assert torch.equal(forward.fast(made)(encoded, ROWS), classifier.engine.forward(encoded, ROWS))


def test_another_safetensors_beside_the_weights_is_not_read(runs: Callable[[str], Path], tmp_path: Path) -> None:
    classifier = predict.load(runs("bert"))
    base = Path(shutil.copytree(classifier.base.folder, tmp_path / "base"))
    save_file({n: t * 2 for n, t in load_file(base / "model.safetensors").items()}, base / "old.safetensors")
    other = predict.load(runs("bert"), base=str(base))
    encoded = classifier.encode(TEXTS)
    assert np.array_equal(other.logits(encoded), classifier.logits(encoded))


def test_threads_that_predict_long_texts_at_once(runs: Callable[[str], Path]) -> None:
    classifier = predict.load(runs("bert"))
    texts = ["the plot is good " * 120, "boring"]
    alone = classifier.predict(texts)
    with ThreadPoolExecutor(4) as pool:
        assert all(found == alone for found in pool.map(classifier.predict, [texts] * 40))


def test_half_a_character_is_told(runs: Callable[[str], Path]) -> None:
    with pytest.raises(DataError, match="in text 1"):
        predict.load(runs("bert")).predict(["a film", "caf\udce9"])


@pytest.mark.parametrize(
    ("features", "has_onednn", "asked", "expected"),
    [
        (("avx2", "avx512_bf16"), True, "auto", torch.bfloat16),
        (("avx2", "avx512_bf16"), False, "auto", torch.float32),
        (("avx2", "avx512_bf16"), True, "float32", torch.float32),
        (("avx2",), True, "auto", torch.float32),
        (("bf16",), True, "auto", torch.float32),  # nobody has measured ARM's
        (("bf16",), True, "bfloat16", torch.bfloat16),
    ],
)
def test_bfloat16_is_taken_where_it_was_measured(
    features: tuple[str, ...], has_onednn: bool, asked: Any, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "processor", lambda: Processor("a chip", features))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)
    assert forward.fast_dtype(RuntimeSettings(dtype=asked)) == expected


def test_a_run_is_verified_with_its_own_runtime(runs: Callable[[str], Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs("bert"), tmp_path / "run"))
    recipe = (run / "recipe.toml").read_text("utf-8")
    (run / "recipe.toml").write_text(recipe.replace('fast = "auto"', 'fast = "off"'), "utf-8")
    assert 'fast = "off"' in (run / "recipe.toml").read_text("utf-8")
    assert evaluation.verify(run).ok
    (run / "recipe.toml").write_text(recipe.replace('dtype = "auto"', 'dtype = "bfloat16"'), "utf-8")
    with pytest.raises(RecipeError, match="no bfloat16 instructions"):
        evaluation.verify(run)


def test_what_float32_computed_is_verified_in_float32(
    runs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "processor", lambda: Processor("a chip", ("avx2", "avx512_bf16")))
    assert predict.load(runs("bert")).engine.dtype == "bfloat16"
    found = evaluation.verify(runs("bert"))
    assert found.ok
    assert found.tolerance < 1e-3  # not bfloat16's


@pytest.mark.parametrize(("before", "share"), [("float32", 1e-4), ("bfloat16", 5e-2)])
def test_what_bfloat16_computed_may_differ_from_float32(
    runs: Callable[[str], Path], tmp_path: Path, before: str, share: float
) -> None:
    copy = Path(shutil.copytree(runs("bert") / "adapter", tmp_path / "adapter"))
    meta = json.loads((copy / "trimtab.json").read_text("utf-8"))
    (copy / "trimtab.json").write_text(json.dumps(meta | {"computed_in": before}), "utf-8")
    seal(copy)
    found = evaluation.verify(copy)
    largest = max(1.0, np.abs([probe["logits"] for probe in meta["probes"]]).max())
    assert found.tolerance == pytest.approx(share * largest)


def test_predicting_imports_neither_transformers_nor_peft(runs: Callable[[str], Path]) -> None:
    program = (
        "import sys; from trimtab.cli import main; sys.argv = ['trimtab', 'predict', sys.argv[1], 'a film', '--json']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'transformers', 'peft', 'sklearn', 'pyarrow'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(runs("bert"))], capture_output=True, text=True, check=True
    )
    answer, imported = done.stdout.splitlines()
    assert json.loads(answer)["text"] == "a film"
    assert imported == "[]"


# -- bfloat16, slow where the processor has no instructions for it, and right everywhere -----------------------


@pytest.mark.parametrize("kind", LAYOUTS)
def test_bfloat16_is_close_to_float32(folders: Callable[[str], Path], kind: str) -> None:
    outcomes = []
    for dtype in (torch.float32, torch.bfloat16):
        model, encoded = make_model(folders(kind))
        run = forward.fast(encoder.of_peft_model(model, dtype))
        logits = run(encoded, ROWS, 0)
        loss_sum(logits, torch.arange(6) % 3).backward()  # type: ignore[no-untyped-call]
        gradients = torch.cat([p.grad.flatten() for p in trainable(model).values() if p.grad is not None])
        outcomes.append((logits.detach(), gradients))
        assert all(parameter.dtype == torch.float32 for parameter in trainable(model).values())
    (exact, exact_gradient), (rounded, gradient) = outcomes
    assert 0 < (exact - rounded).abs().max() < 0.1
    assert torch.cosine_similarity(exact_gradient, gradient, dim=0) > 0.999
    assert model.get_base_model().get_input_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps is Linux's")
def test_weights_in_bfloat16_let_go_of_the_base_s_file(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """86 MB of MiniLM's stayed in memory for its pooler, which is not converted."""
    folder = Path(shutil.copytree(folders("bert"), tmp_path / "base"))
    AutoModel.from_pretrained(str(folder)).save_pretrained(str(folder))  # with a pooler
    maps, file = Path("/proc/self/maps"), str(folder / "model.safetensors")
    model, _ = make_model(folder)
    assert file in maps.read_text()
    encoder.of_peft_model(model, torch.bfloat16)
    assert file not in maps.read_text()


def test_files_in_bfloat16_keep_lora_beside_the_weights(
    runs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "has_bf16", lambda chip: False)
    with pytest.raises(RecipeError, match="no bfloat16 instructions"):
        predict.load(runs("bert"), runtime=RuntimeSettings(dtype="bfloat16"))
    monkeypatch.setattr(forward, "has_bf16", lambda chip: True)
    rounded = predict.load(runs("bert"), runtime=RuntimeSettings(dtype="bfloat16"))
    exact = predict.load(runs("bert"), runtime=RuntimeSettings(dtype="float32"))
    assert (rounded.engine.dtype, exact.engine.dtype) == ("bfloat16", "float32")
    encoded = exact.encode(TEXTS)
    assert 0 < np.abs(rounded.logits(encoded) - exact.logits(encoded)).max() < 0.05
