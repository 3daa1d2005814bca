import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from bases import (
    ARCHITECTURES,
    MAX_TOKENS,
    WORDS,
    minilm_folder,
    write_base,
    write_decoder,
    write_roberta_from_minilm,
)
from conftest import built
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from trimtab import adapter, config, predict, tokens, training
from trimtab.classification import compute_logits, loss_sum
from trimtab.config import LoraSettings
from trimtab.errors import BaseModelError, RecipeError
from trimtab.fast import encoder
from trimtab.forward import stock
from trimtab.model import (
    by_layers,
    count,
    empty_model,
    head_modules,
    inject,
    load_base,
    load_config,
    longest_input,
    on_layers,
    outside_blocks,
    resolve_targets,
    trainable,
)
from trimtab.resolve import Job, resolve

DECODER = "llama"
KINDS = (*ARCHITECTURES, DECODER)

# What a masked or causal language model does not bring to a classifier.
HEADS = {
    "bert": ["bert.pooler", "classifier"],
    "albert": ["albert.pooler", "classifier"],
    "deberta-v2": ["pooler", "classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    DECODER: ["score"],
}

TEXTS = [" ".join(WORDS[start : start + size]) for start, size in ((0, 3), (20, 9), (40, 24), (7, 60))]

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The small base of an architecture, written once."""
    root = tmp_path_factory.mktemp("bases")
    return cache(lambda kind: write_decoder(root / kind) if kind == DECODER else write_base(root / kind, kind))


@pytest.fixture(scope="module")
def make_job(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    file = tmp_path_factory.mktemp("data") / "reviews.csv"
    rows = [f"the film was {word},{label}" for word, label in (("good", 1), ("bad", 0), ("very slow", 0))]
    file.write_text("\n".join(["text,label", *rows * 4]) + "\n", "utf-8")

    def make(folder: Path, *settings: str) -> Job:
        flags = {"data.train": (str(file),), "base.model": str(folder)}
        return resolve(config.assemble("default", flags, ["runtime.device=cpu", "runtime.threads=1", *settings]))

    return make


@pytest.fixture(scope="module")
def roberta_from_minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_roberta_from_minilm(minilm_folder(), tmp_path_factory.mktemp("real") / "roberta")


def skeleton(folder: Path) -> Any:
    return empty_model(load_config(folder, num_labels=2, dropout="config", pad_id=0))


def train_two_steps(model: Any, job: Job) -> None:
    encoded = tokens.encode(TEXTS[:2], job.tokenizer, 16)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.02)
    model.train()
    for _ in range(2):
        rows = [
            model(input_ids=torch.tensor(encoded.ids[None, start:stop].astype(np.int64))).logits
            for start, stop in zip(encoded.offsets, encoded.offsets[1:], strict=False)
        ]
        loss_sum(torch.cat(rows), torch.tensor([0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()


def logits_of(model: Any, job: Job) -> Any:
    return compute_logits(stock(model, job.tokenizer.pad_id), tokens.encode(TEXTS, job.tokenizer, 48))


def save(folder: Path, model: Any, job: Job, head: list[str]) -> Path:
    adapter.write(
        folder,
        model,
        stock(model, job.tokenizer.pad_id),
        labels=job.labels,
        max_length=48,
        keep="start",
        tokenizer=job.tokenizer,
        base=job.base,
        head=head,
        card="",
    )
    return folder


def logits_over_another_seed(folder: Path, job: Job) -> Any:
    torch.manual_seed(987)
    read = adapter.read(folder)
    return logits_of(adapter.load_model(read, adapter.locate_base(read)), job)


def logits_by_plain_peft(folder: Path, job: Job, **options: Any) -> Any:
    """One row at a time, so without padding."""
    torch.manual_seed(654)
    plain = AutoModelForSequenceClassification.from_pretrained(
        job.base.folder, num_labels=len(job.labels), **options
    ).eval()
    model = peft.PeftModel.from_pretrained(plain, str(folder)).eval()
    rows = [tokens.encode([text], job.tokenizer, 48).ids for text in TEXTS]
    with torch.no_grad():
        return np.concatenate([model(input_ids=torch.tensor(row[None].astype(np.int64))).logits for row in rows])


# Presets


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", ["all-linear", "query-value"])
def test_a_preset_matches_the_linear_layers_inside_the_blocks_and_no_others(
    base: Callable[[str], Path], kind: str, preset: str
) -> None:
    model = skeleton(base(kind))
    head = head_modules(model, outside_blocks(model))

    targets = resolve_targets(model, preset, head)

    modules = dict(model.named_modules())
    matched = {name for name in modules if any(name.endswith("." + target) for target in targets)}
    assert all(any(name.endswith("." + target) for name in matched) for target in targets)
    inside = {
        name
        for name, module in modules.items()
        if isinstance(module, torch.nn.Linear) and any(part.isdigit() for part in name.split("."))
    }
    assert inside
    if preset == "all-linear":
        assert matched == inside
    else:
        weights = {"albert": 2, "modernbert": 2}.get(kind, 4)  # one shared block; query, key and value in one
        assert matched < inside
        assert len(matched) == weights


@pytest.mark.parametrize("kind", KINDS)
def test_lora_and_whatever_the_base_did_not_bring_is_trained_and_nothing_else(
    base: Callable[[str], Path], make_job: Callable[..., Job], kind: str
) -> None:
    job = make_job(base(kind))
    new = load_base(job.base.folder, job.model_config).new_parameters

    model, head, _ = built(job)

    assert head == HEADS.get(kind, ["classifier"])
    names = set(trainable(model))
    lora = {name for name in names if ".lora_A." in name or ".lora_B." in name}
    full = {name.removeprefix("base_model.model.").replace(".modules_to_save.default", "") for name in names - lora}
    assert new <= full
    assert all(any(name.startswith(module + ".") for module in head) for name in full)
    assert all("modules_to_save.default" in name for name in names - lora)
    assert not any(name.startswith(f"base_model.model.{module}.") for name in lora for module in head)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_closed_form_counts_what_is_really_there(
    base: Callable[[str], Path], make_job: Callable[..., Job], kind: str, variant: str
) -> None:
    model, _, parameters = built(make_job(base(kind), f"lora.variant={variant}", "lora.r=3"))

    assert parameters["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert parameters["total"] == sum(p.numel() for p in model.parameters())
    lora = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert parameters["lora"] == lora == sum(layer["lora"] for layer in parameters["layers"].values())


@pytest.mark.parametrize(
    ("variant", "scale", "magnitudes"), [("lora", 2.0, False), ("rslora", 16 / 8**0.5, False), ("dora", 2.0, True)]
)
def test_a_variant_is_what_its_name_says(
    base: Callable[[str], Path], make_job: Callable[..., Job], variant: str, scale: float, magnitudes: bool
) -> None:
    model, _, _ = built(make_job(base("bert"), f"lora.variant={variant}"))

    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert {layer.scaling["default"] for layer in layers} == {scale}
    assert any("lora_magnitude_vector" in name for name in trainable(model)) == magnitudes


@pytest.mark.parametrize(
    ("kind", "variant"),
    [*((kind, "lora") for kind in KINDS), *((kind, v) for kind in ("bert", DECODER) for v in ("rslora", "dora"))],
)
def test_a_trained_adapter_answers_the_same_after_loading_here_and_by_plain_peft(
    base: Callable[[str], Path], make_job: Callable[..., Job], tmp_path: Path, kind: str, variant: str
) -> None:
    job = make_job(base(kind), f"lora.variant={variant}")
    model, head, _ = built(job)
    before = logits_of(model, job)
    train_two_steps(model, job)
    after = logits_of(model, job)
    assert np.abs(after - before).max() > 1e-2

    folder = save(tmp_path / "adapter", model, job, head)

    np.testing.assert_allclose(logits_over_another_seed(folder, job), after, rtol=0, atol=1e-6)
    np.testing.assert_allclose(logits_by_plain_peft(folder, job), after, rtol=0, atol=1e-4)


# LoRA on the top layers


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "albert"])
def test_lora_on_the_top_layers_counts_answers_and_loads_everywhere(
    base: Callable[[str], Path], make_job: Callable[..., Job], tmp_path: Path, kind: str
) -> None:
    job = make_job(base(kind), "lora.layers=top:1")
    model, head, parameters = built(job)
    names = {name.partition(".lora_A")[0] for name in trainable(model) if ".lora_A." in name}
    assert names
    assert all({part for part in name.split(".") if part.isdigit()} == {"1"} for name in names)
    assert {f"base_model.model.{name}" for name in parameters["layers"]} == names
    everywhere = built(make_job(base(kind)))[2]
    assert 2 * parameters["lora"] == everywhere["lora"]
    assert training.count_parameters(job.layered, 2)["lora"] == parameters["lora"]
    train_two_steps(model, job)
    after = logits_of(model, job)

    folder = save(tmp_path / "adapter", model, job, head)

    np.testing.assert_allclose(logits_over_another_seed(folder, job), after, rtol=0, atol=1e-6)
    np.testing.assert_allclose(logits_by_plain_peft(folder, job), after, rtol=0, atol=1e-4)
    quick = predict.load(folder)
    assert quick.engine.name == ("fast" if kind in encoder.LAYOUTS else "stock")
    np.testing.assert_allclose(quick.logits(quick.encode(TEXTS)), after, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "modernbert", DECODER])
def test_layers_are_read_back_from_the_names_of_an_adapter(base: Callable[[str], Path], kind: str) -> None:
    model = skeleton(base(kind))
    head = head_modules(model, outside_blocks(model))
    targets = resolve_targets(model, "query-value", head)
    lora = LoraSettings(layers="top:1")
    names = on_layers(model, targets, lora, head)
    suffixes, layers = by_layers(model, names, head)
    assert layers == "top:1"
    assert on_layers(model, suffixes, lora, head) == names
    assert by_layers(model, targets, head) == (targets, "all")
    odd = (*names, *(name.replace(".1.", ".0.") for name in names[:1]))
    assert by_layers(model, odd, head)[1] == ("all" if len(names) > 1 else "top:2")


def test_a_long_list_of_targets_is_recorded_as_it_was_told(tmp_path: Path) -> None:
    """From 20 names on, peft would write endings of its own choice."""
    model = empty_model(AutoConfig.for_model("bert", num_hidden_layers=6, vocab_size=50, hidden_size=8,
                                             num_attention_heads=2, intermediate_size=16))  # fmt: skip
    head = head_modules(model, outside_blocks(model))
    lora = LoraSettings(layers="top:6")
    names = on_layers(model, resolve_targets(model, "all-linear", head), lora, head)
    assert len(names) == 36
    injected = inject(model, lora, names, head, "base")
    assert injected.peft_config["default"].target_modules == set(names)
    adapted_ = {name.partition(".lora_A")[0] for name, _ in injected.named_modules() if name.endswith(".lora_A")}
    assert adapted_ == {f"base_model.model.{name}" for name in names}


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        ("bert", ["lora.layers=top:3"], ["bert has 2 layers here, and 3 were asked for", "lora.layers=top:2"]),
        ("albert", ["lora.layers=top:1"], ["albert computes 2 layers with the weights of 1", "lora.layers=all"]),
        ("bert", ["lora.layers=top:1", "lora.target_modules=layer.0.output.dense"], ["None of layer.0.output.dense"]),
    ],
)
def test_layers_that_cannot_be_are_refused_before_anything_is_loaded(
    base: Callable[[str], Path], make_job: Callable[..., Job], kind: str, settings: list[str], told: list[str]
) -> None:
    with pytest.raises(RecipeError) as refused:
        make_job(base(kind), *settings)
    assert all(word in str(refused.value) for word in told), str(refused.value)


def test_layers_in_two_rows_have_no_top() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 40}
    model = empty_model(AutoConfig.for_model("bart", **sizes, encoder_attention_heads=2, decoder_attention_heads=2))
    with pytest.raises(RecipeError, match="not numbered in one row"):
        on_layers(model, ("q_proj",), LoraSettings(layers="top:1"), ["classification_head"])


# Bases that bring more, less, or something else


@pytest.mark.parametrize("classes", [2, 5], ids=["of the same size", "of another size"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "deberta-v2", DECODER])
def test_a_base_that_brings_a_head(
    base: Callable[[str], Path], make_job: Callable[..., Job], tmp_path: Path, kind: str, classes: int
) -> None:
    torch.manual_seed(5)
    classifier = AutoModelForSequenceClassification.from_pretrained(base(kind), num_labels=classes)
    folder = shutil.copytree(base(kind), tmp_path / "base")
    classifier.save_pretrained(folder)
    job = make_job(folder)

    model, head, _ = built(job)

    # Of the same size, all that stands beside the base proper is the head; BERT's pooler is part of the base.
    brings_pooler = kind == "bert" or (kind == "deberta-v2" and classes == 5)
    assert head == (["classifier"] if brings_pooler else HEADS.get(kind, ["classifier"]))
    brought = load_file(folder / "model.safetensors")
    of_another_size = []
    for name, parameter in trainable(model).items():
        tensor = brought.get(name.removeprefix("base_model.model.").replace(".modules_to_save.default", ""))
        if tensor is not None and tensor.shape == parameter.shape:  # where training starts
            assert torch.equal(parameter, tensor)
        elif ".lora_" not in name:
            of_another_size.append(name)
    assert bool(of_another_size) == (classes == 5)

    train_two_steps(model, job)
    after = logits_of(model, job)
    saved = save(tmp_path / "adapter", model, job, head)
    np.testing.assert_allclose(logits_over_another_seed(saved, job), after, rtol=0, atol=1e-6)
    plain = logits_by_plain_peft(saved, job, ignore_mismatched_sizes=True)
    np.testing.assert_allclose(plain, after, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("bert", {"num_hidden_layers": 3}),
        ("bert", {"vocab_size": 300}),
        ("bert", {"intermediate_size": 128}),
        ("bert", {"model_type": "roberta"}),
        (DECODER, {"num_hidden_layers": 3}),
    ],
    ids=str,
)
def test_weights_that_do_not_fill_the_base_proper_are_refused_not_trained_from_nothing(
    base: Callable[[str], Path], make_job: Callable[..., Job], tmp_path: Path, kind: str, changed: dict[str, Any]
) -> None:
    folder = shutil.copytree(base(kind), tmp_path / "base")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changed), "utf-8")

    with pytest.raises(BaseModelError, match="does not bring"):
        built(make_job(folder))


def test_shared_weights_are_not_mistaken_for_a_head() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 40}
    model = empty_model(AutoConfig.for_model("bart", **sizes, encoder_attention_heads=2, decoder_attention_heads=2))

    assert head_modules(model, outside_blocks(model)) == ["classification_head"]


# Names of target modules


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("qurey", 'Did you mean "query"'),
        ("attention.self.qurey", 'Did you mean "attention.self.query"'),
        ("query,intermediate.dens", 'Did you mean "intermediate.dense"'),
        ("word_embeddings", "word_embeddings matches no weight"),
        ("q_proj,query", "q_proj matches no weight"),
        ("classifier", "classifier matches no weight"),  # it is trained in full and gets no LoRA
        ("query,classifier", "classifier matches no weight"),
    ],
)
def test_a_wrong_target_module_is_answered_with_what_the_model_has(
    base: Callable[[str], Path], make_job: Callable[..., Job], wanted: str, expected: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        built(make_job(base("bert"), f"lora.target_modules={wanted}"))

    message = str(caught.value)
    assert expected in message
    for name in ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"):
        assert name in message
    assert "lora.target_modules" in message


@pytest.mark.parametrize("wanted", ["query,dense", "output.dense"])
def test_names_that_also_match_the_head_count_and_adapt_only_the_blocks(
    base: Callable[[str], Path], make_job: Callable[..., Job], wanted: str
) -> None:
    model, _, parameters = built(make_job(base("bert"), f"lora.target_modules={wanted}"))

    assert parameters["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert all("encoder.layer" in name for name in trainable(model) if ".lora_" in name)


@pytest.mark.parametrize("preset", ["all-linear", "query-value"])
def test_a_base_without_linear_layers_is_refused_or_counted_right(
    base: Callable[[str], Path], make_job: Callable[..., Job], tmp_path: Path, preset: str
) -> None:
    """GPT-2 writes its weights as Conv1D, which is no torch.nn.Linear."""
    folder = shutil.copytree(base(DECODER), tmp_path / "gpt2")
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 600}
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes, **ids)).save_pretrained(folder)
    try:
        model, _, parameters = built(make_job(folder, f"lora.target_modules={preset}"))
    except (RecipeError, BaseModelError) as error:
        assert "gpt2" in str(error).casefold()  # noqa: PT017
    else:
        assert parameters["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("also", "expected"), [("bert.poolr", 'Did you mean "bert.pooler"'), ("nothing.like.it", "nothing.like.it")]
)
def test_a_wrong_module_to_save_is_named(
    base: Callable[[str], Path], make_job: Callable[..., Job], also: str, expected: str
) -> None:
    with pytest.raises(RecipeError, match=r"lora\.modules_to_save") as caught:
        built(make_job(base("bert"), f"lora.modules_to_save={also}"))
    assert expected in str(caught.value)


def test_a_module_to_save_is_trained_beside_the_head(base: Callable[[str], Path], make_job: Callable[..., Job]) -> None:
    also = "bert.encoder.layer.1.output.dense"
    job = make_job(base("bert"), f"lora.modules_to_save={also}")
    model, head, parameters = built(job)

    assert set(head) == {also, "bert.pooler", "classifier"}
    assert parameters["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"base_model.model.{also}.modules_to_save.default.weight" in trainable(model)


# Length


@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_input_of_a_small_base(base: Callable[[str], Path], kind: str) -> None:
    assert longest_input(skeleton(base(kind))) == MAX_TOKENS


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_of_600_tokens_is_cut_to_what_the_base_takes(
    base: Callable[[str], Path], make_job: Callable[..., Job], kind: str
) -> None:
    job = make_job(base(kind), "data.max_length=600")
    model, _, _ = built(job)
    encoded = tokens.encode(["film " * 600], job.tokenizer, int(job.recipe.data.max_length))

    assert encoded.lengths.tolist() == [MAX_TOKENS]
    assert encoded.truncated.all()
    assert np.isfinite(compute_logits(stock(model, job.tokenizer.pad_id), encoded)).all()


def test_a_decoder_reads_the_last_token_before_the_padding_that_we_write(
    tmp_path: Path, make_job: Callable[..., Job]
) -> None:
    folder = write_decoder(tmp_path / "decoder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 5}))
    job = make_job(folder)
    model, _, _ = built(job)
    encoded = tokens.encode(["a film", "a very good film and a great story"], job.tokenizer, 48)
    run = stock(model, job.tokenizer.pad_id)
    with torch.no_grad():
        together, alone = run(encoded, np.array([0, 1]))[0], run(encoded, np.array([0]))[0]
    assert torch.allclose(together, alone, atol=1e-5)


# Real weights


def test_roberta_with_the_weights_of_minilm_takes_512_tokens_and_no_more(
    roberta_from_minilm: Path, make_job: Callable[..., Job]
) -> None:
    assert longest_input(skeleton(roberta_from_minilm)) == 512

    job = make_job(roberta_from_minilm, "data.max_length=600")
    model, _, _ = built(job)
    encoded = tokens.encode(["film " * 600, "a film"], job.tokenizer, int(job.recipe.data.max_length))

    assert encoded.lengths.tolist() == [512, 4]
    assert np.isfinite(compute_logits(stock(model, job.tokenizer.pad_id), encoded)).all()


def test_roberta_with_the_weights_of_minilm_sees_what_bert_sees(
    roberta_from_minilm: Path, make_job: Callable[..., Job]
) -> None:
    texts = ["An unforgettable film: warm, funny and beautifully acted.", "Dull.", "It is fine, I suppose."]
    job = make_job(roberta_from_minilm)
    model, head, parameters = built(job)
    assert head == ["classifier"]
    bert = AutoModel.from_pretrained(minilm_folder(), dtype=torch.float32).eval()
    hidden = {}
    for name, tokenizer, network in (
        ("bert", tokens.from_base(minilm_folder()), bert),
        ("roberta", job.tokenizer, model.base_model.model.roberta.eval()),
    ):
        encoded = tokens.encode(texts, tokenizer, 32)
        length = int(encoded.lengths.max())
        ids = np.full((len(texts), length), tokenizer.pad_id, np.int64)
        for row, (start, stop) in enumerate(zip(encoded.offsets, encoded.offsets[1:], strict=False)):
            ids[row, : stop - start] = encoded.ids[start:stop]
        mask = torch.tensor(np.arange(length) < encoded.lengths[:, None]).long()
        with torch.no_grad():
            output = network(input_ids=torch.tensor(ids), attention_mask=mask).last_hidden_state
        hidden[name] = output[mask.bool()].numpy()

    np.testing.assert_allclose(hidden["roberta"], hidden["bert"], rtol=0, atol=1e-5)
    # 6 blocks of width 384 and 1,536: four square weights and two of the feed-forward part, rank 8.
    assert parameters["lora"] == 6 * 8 * (4 * (384 + 384) + 2 * (384 + 1536))


def test_count_of_one_weight_is_rank_times_rows_and_columns() -> None:
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(7, 5)]), "head": torch.nn.Linear(5, 2)})
    plain = count(model, config.LoraSettings(r=3), ["layers.0"], ["head"])
    dora = count(model, config.LoraSettings(r=3, variant="dora"), ["layers.0"], ["head"])

    assert (plain.lora, plain.head, plain.base, plain.total) == (3 * 12, 12, 52, 52 + 36 + 12)
    assert dora.lora == plain.lora + 5
