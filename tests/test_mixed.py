"""Rows of many adapters in one batch, against transformers and peft with each adapter alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import MAX_LENGTH, answers, write_adapter
from bases import write_base
from transformers import AutoModel

from trimtab import tokens
from trimtab.config import RuntimeSettings
from trimtab.errors import ArtefactError, BaseModelError
from trimtab.fast import blocked, mixed
from trimtab.fast.encoder import LAYOUTS
from trimtab.fast.mixed import Costs
from trimtab.hub import find_base
from trimtab.serving.base import Resident, ServedBase, describe, load_base, place
from trimtab.serving.memory import Pieces

TEXTS = [
    *("a great film", "boring", "the plot is not very good " * 9, "an awful film", "dull dull", "i love it " * 8),
    *("the worst acting", "so sad", "not so bad", "a wonderful script and a great cast"),
]

# What decides that rows are gathered, and that they are not.
GATHER = Costs(call_s=1.0, flops=1e9, batched_call_s=1e-9, batched_flops=1e9, bytes_per_s=1e12)
SEGMENT = replace(GATHER, call_s=1e-9, batched_call_s=1.0)

# name: (labels, settings of LoRA)
ADAPTERS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "plain": (("neg", "pos"), {}),
    "same-form": (("a", "b", "c"), {}),
    "another-of-it": (("x", "y"), {}),
    "rank-4": (("neg", "pos"), {"r": 4, "lora_alpha": 8}),
    "rslora": (("p", "q", "r", "s"), {"variant": "rslora", "r": 16}),
    "dora": (("neg", "pos"), {"variant": "dora"}),
    "all-weights": (("neg", "pos"), {"targets": "all-linear"}),
    "all-weights-too": (("neg", "pos", "none"), {"targets": "all-linear"}),
    "dora-all-weights": (("neg", "pos", "none"), {"targets": "all-linear", "variant": "dora", "r": 2}),
    "dora-all-weights-too": (("neg", "pos"), {"targets": "all-linear", "variant": "dora", "r": 2}),
    "top-layer": (("neg", "pos"), {"layers": "top:1"}),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[ServedBase, dict[str, Any], Path]]:
    """For a kind of base: it, peft's models of every adapter, and the folder with base/ and one folder an adapter."""
    made: dict[str, tuple[ServedBase, dict[str, Any], Path]] = {}

    def get(kind: str) -> tuple[ServedBase, dict[str, Any], Path]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            write_base(folder / "base", kind)
            models = {
                name: write_adapter(folder / name, folder / "base", seed=seed, labels=labels, **settings)
                for seed, (name, (labels, settings)) in enumerate(ADAPTERS.items())
            }
            found = find_base(str(folder / "base"))
            base = load_base(found, tokens.from_base(found.folder), RuntimeSettings(threads=1))
            made[kind] = base, models, folder
        return made[kind]

    return get


def resident(base: ServedBase, folder: Path, pieces: Pieces | None = None) -> Resident:
    found = describe(base, folder)
    return place(base, found, found.read_tensors(), folder.name, (pieces or Pieces()).take(found.layout.bytes))


def mix(base: ServedBase, residents: list[Resident], texts: list[str], costs: Costs) -> list[torch.Tensor]:
    """Logits of texts, each by the adapter at its place."""
    encoded = tokens.encode(texts, base.tokenizer, MAX_LENGTH)
    return mixed.logits(base.encoder, encoded.ids, encoded.offsets, [one.beside for one in residents], costs)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("costs", [GATHER, SEGMENT], ids=["gathered", "segments"])
def test_every_row_gets_the_answer_of_its_own_adapter(
    served: Callable[[str], tuple[ServedBase, dict[str, Any], Path]], kind: str, costs: Costs
) -> None:
    check_mix(*served(kind), costs)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("costs", [GATHER, SEGMENT], ids=["gathered", "segments"])
def test_the_same_beside_weights_in_the_layout_of_onednn(
    served: Callable[[str], tuple[ServedBase, dict[str, Any], Path]], costs: Costs, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, models, folder = served("bert")
    monkeypatch.setattr(blocked, "pays", lambda dtype: True)
    monkeypatch.setattr(blocked, "LEAST_TOKENS", 10)
    found = find_base(str(folder / "base"))
    base = load_base(found, tokens.from_base(found.folder), RuntimeSettings(threads=1, dtype="float32"))
    products = []
    product = blocked.Blocked.product
    monkeypatch.setattr(blocked.Blocked, "product", lambda *args: products.append(args) or product(*args))
    check_mix(base, models, folder, costs)
    assert products


def check_mix(base: ServedBase, models: dict[str, Any], folder: Path, costs: Costs) -> None:
    """Sixty rows, each of an adapter drawn at random, against peft's model of that adapter."""
    there = {name: resident(base, folder / name) for name in models}
    rng = np.random.default_rng(0)
    names = [str(name) for name in rng.choice(list(models), 60)]
    texts = [str(text) for text in rng.choice(TEXTS, 60)]
    found = mix(base, [there[name] for name in names], texts, costs)
    expected = {name: dict(zip(TEXTS, answers(models[name], TEXTS, folder / "base"), strict=True)) for name in models}
    differences = [
        float(np.abs(one.numpy() - expected[name][text]).max())
        for one, name, text in zip(found, names, texts, strict=True)
    ]
    assert [len(one) for one in found] == [len(ADAPTERS[name][0]) for name in names]
    assert max(differences) < 1e-4


def test_a_first_layer_of_the_head_is_shared_or_an_adapters_own(tmp_path: Path) -> None:
    """A bert base that brings its pooler, as BERT's own checkpoints do."""
    write_base(tmp_path / "base", "bert")
    AutoModel.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "base")
    found = find_base(str(tmp_path / "base"))
    base = load_base(found, tokens.from_base(found.folder), RuntimeSettings(threads=1))
    own = {"modules_to_save": ("bert.pooler",)}
    settings: dict[str, dict[str, Any]] = {"a": {}, "own": own, "b": {}, "c": {}, "own too": own}
    models = {
        name: write_adapter(tmp_path / name, tmp_path / "base", seed=seed, **each)
        for seed, (name, each) in enumerate(settings.items())
    }
    there = [resident(base, tmp_path / name) for name in models]
    assert [one.beside.head.dense is base.encoder.head.dense for one in there] == [True, False, True, True, False]
    for some in (there, there[1::3], there[::2]):  # both, own ones alone, shared ones alone
        mixed_ = mix(base, some * 2, (TEXTS * 2)[: 2 * len(some)], GATHER)
        for one, who, text in zip(mixed_, some * 2, TEXTS * 2, strict=False):
            assert np.abs(one.numpy() - answers(models[who.name], [text], tmp_path / "base")[0]).max() < 1e-5


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS[2:3], ["boring"] * 7, TEXTS], ids=["one", "long", "alike", "all"])
def test_one_adapter_alone_and_alone_in_a_batch(
    served: Callable[[str], tuple[ServedBase, dict[str, Any], Path]], texts: list[str]
) -> None:
    base, models, folder = served("bert")
    one = resident(base, folder / "plain")
    found = torch.stack(mix(base, [one] * len(texts), texts, GATHER)).numpy()
    assert np.abs(found - answers(models["plain"], texts, folder / "base")).max() < 1e-5


def test_both_ways_are_taken(
    served: Callable[[str], tuple[ServedBase, dict[str, Any], Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, folder = served("bert")
    there = [resident(base, folder / name) for name in ("plain", "same-form", "another-of-it")]
    ndims: list[int] = []
    add = mixed._add

    def noted(block: Any, *rest: Any) -> None:
        ndims.append(block.numbers.ndim)
        add(block, *rest)

    monkeypatch.setattr(mixed, "_add", noted)
    mix(base, there * 2, ["boring"] * 6, GATHER)
    assert set(ndims) == {2}
    ndims.clear()
    mix(base, there * 2, ["boring"] * 6, SEGMENT)
    assert set(ndims) == {1}


def test_an_evicted_adapters_memory_is_another_ones_and_nobody_elses(
    served: Callable[[str], tuple[ServedBase, dict[str, Any], Path]],
) -> None:
    base, models, folder = served("bert")
    pieces = Pieces()
    first, kept = resident(base, folder / "plain", pieces), resident(base, folder / "another-of-it", pieces)
    before = torch.stack(mix(base, [kept] * 3, TEXTS[:3], GATHER))
    pieces.give_back(first.memory)
    again = resident(base, folder / "plain", pieces)
    assert again.memory.data_ptr() == first.memory.data_ptr()
    assert torch.equal(before, torch.stack(mix(base, [kept] * 3, TEXTS[:3], GATHER)))
    found = torch.stack(mix(base, [again] * 3, TEXTS[:3], GATHER)).numpy()
    assert np.abs(found - answers(models["plain"], TEXTS[:3], folder / "base")).max() < 1e-5


def test_an_adapter_takes_little_more_than_its_numbers(
    served: Callable[[str], tuple[ServedBase, dict[str, Any], Path]],
) -> None:
    base, models, folder = served("bert")
    for name, model in models.items():
        numbers = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert 4 * numbers <= describe(base, folder / name).layout.bytes <= 4 * numbers + 128


def test_bfloat16_is_near_float32(served: Callable[[str], tuple[ServedBase, dict[str, Any], Path]]) -> None:
    base, models, folder = served("bert")
    config, tensors = dict(base.config), None
    from trimtab import adapter
    from trimtab.fast import encoder

    tensors = adapter.base_tensors(base.base)
    half = replace(base, encoder=encoder.of_base(config, tensors, torch.bfloat16), dtype=torch.bfloat16)
    names = ["plain", "dora", "rslora", "all-weights", "dora-all-weights", "dora-all-weights-too"] * 2
    texts = (TEXTS * 2)[: len(names)]
    found = mix(half, [resident(half, folder / name) for name in names], texts, GATHER)
    for one, name, text in zip(found, names, texts, strict=True):
        exact = answers(models[name], [text], folder / "base")[0]
        assert np.abs(one.numpy() - exact).max() < 0.1 * max(1.0, float(np.abs(exact).max()))


def test_a_base_of_another_family_is_refused(tmp_path: Path) -> None:
    write_base(tmp_path / "base", "albert")
    with pytest.raises(BaseModelError, match="albert"):
        load_base(find_base(str(tmp_path / "base")), tokens.from_base(tmp_path / "base"), RuntimeSettings())


def test_an_adapter_of_another_base_is_refused(
    served: Callable[[str], tuple[ServedBase, dict[str, Any], Path]], tmp_path: Path
) -> None:
    base, _, _ = served("bert")
    write_base(tmp_path / "base", "bert", seed=1)
    write_adapter(tmp_path / "adapter", tmp_path / "base")
    with pytest.raises(ArtefactError, match="weights are not the base's here"):
        describe(base, tmp_path / "adapter")


def test_what_small_products_cost_is_measured() -> None:
    costs = mixed.measure(64, torch.float32)
    assert all(0 < cost < float("inf") for cost in vars(costs).values())
