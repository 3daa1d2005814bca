"""Adapters that plain peft wrote become ours: they answer as under peft, and what cannot be adopted says why."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bases
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import trimtab
from trimtab import adapter, cli, forward, tokens
from trimtab.adopt import Adopted, adopt
from trimtab.config import RuntimeSettings
from trimtab.errors import ArtefactError, BaseModelError, RecipeError, ResourceError, TrimtabError
from trimtab.hub import find_base
from trimtab.machine import Processor
from trimtab.serving import base as serving

KINDS = ("bert", "roberta", "distilbert", "xlm-roberta", "electra")
VARIANTS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
TEXTS = [
    "a good film",
    "the plot was boring and the cast was awful",
    "so sad " * 12,
    "wonderful music; the ending too",
    "it",
    "very slow " * 60,  # longer than any base takes
]
NAMES = "negative,positive"


def with_pooler(folder: Path) -> Path:
    """A bert base that brings its pooler, as BERT's own checkpoints do."""
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small base of each kind."""
    root = tmp_path_factory.mktemp("bases")
    found = {kind: bases.write_base(root / kind, kind) for kind in KINDS}
    with_pooler(found["bert"])
    return found


def peft_model(base: Path, *, seed: int = 0, num_labels: int = 2, **lora: Any) -> Any:
    """A model of peft over a base, as if it had been trained: B is not zero, the head is its own."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels)
    targets = ["q_lin", "v_lin"] if model.config.model_type == "distilbert" else ["query", "value"]
    settings = {"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": targets}
    model = peft.get_peft_model(model, peft.LoraConfig(**(settings | lora)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif parameter.requires_grad and "lora_" not in name:
                parameter.normal_(std=0.3)
    return model.eval()


def write_peft(folder: Path, base: Path, **settings: Any) -> Path:
    peft_model(base, **settings).save_pretrained(folder)
    return folder


def peft_answers(folder: Path, base: Path, num_labels: int = 2, max_length: int = 64) -> np.ndarray[Any, Any]:
    """The logits of TEXTS by transformers and peft alone, from the files that peft wrote."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels)
    model = peft.PeftModel.from_pretrained(model, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.inference_mode():
        batch = tokenizer(TEXTS, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        return model(**batch).logits.numpy()


def our_answers(folder: Path, texts: list[str] = TEXTS) -> np.ndarray[Any, Any]:
    classifier = trimtab.load(folder)
    return classifier.logits(classifier.encode(texts))


def served_base(folder: Path) -> serving.ServedBase:
    return serving.load_base(find_base(str(folder)), tokens.from_base(folder), RuntimeSettings())


def check_answers(found: Adopted, expected: np.ndarray[Any, Any]) -> None:
    answers = our_answers(found.folder)
    assert np.abs(answers - expected).max() < 1e-4
    assert np.ptp(answers, axis=0).max() > 0.01  # not all the same


# What becomes ours


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft_answers_as_before(places: dict[str, Path], tmp_path: Path, kind: str, variant: str) -> None:
    source = write_peft(tmp_path / "peft", places[kind], **VARIANTS[variant])
    before = {file.name: file.read_bytes() for file in source.iterdir()}

    found = adopt(source, tmp_path / "ours", names=NAMES)

    check_answers(found, peft_answers(source, places[kind]))
    assert found.labels.values == ("negative", "positive")
    assert found.max_length == 64
    assert found.difference < 1e-4
    assert found.is_served
    read = serving.describe(served_base(places[kind]), found.folder)
    assert read.adapter.lora.variant == variant
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_all_linear_of_peft_is_adopted_and_served(places: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """On roberta it names the layers of the head too, which are trained in full and saved without LoRA."""
    targets = [*("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2")] if kind == "distilbert" else "all-linear"
    if kind == "bert":
        targets = ["query", "key", "value", "attention.output.dense", "intermediate.dense"]
    source = write_peft(tmp_path / "peft", places[kind], target_modules=targets)

    found = adopt(source, tmp_path / "ours", names=NAMES)

    check_answers(found, peft_answers(source, places[kind]))
    assert found.is_served
    serving.describe(served_base(places[kind]), found.folder)


def test_all_linear_over_a_base_that_brings_its_head(places: dict[str, Path], tmp_path: Path) -> None:
    """A classifier that is trained on: its head stands in the base's files, and peft's targets name its layers."""
    base = shutil.copytree(places["roberta"], tmp_path / "base")
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).save_pretrained(base)
    source = write_peft(tmp_path / "peft", base, target_modules="all-linear")
    assert "classifier.dense" in json.loads((source / CONFIG).read_text())["target_modules"]

    found = adopt(source, tmp_path / "ours", names=NAMES)

    check_answers(found, peft_answers(source, base))
    assert found.is_served
    serving.describe(served_base(base), found.folder)


def test_lora_outside_the_layers_is_adopted_and_not_served(places: dict[str, Path], tmp_path: Path) -> None:
    source = write_peft(tmp_path / "peft", places["bert"], target_modules=["query", "dense"])  # bert.pooler.dense too

    found = adopt(source, tmp_path / "ours", names=NAMES)

    check_answers(found, peft_answers(source, places["bert"]))
    assert not found.is_served
    with pytest.raises(ArtefactError, match=r"LoRA stands beside bert\.pooler\.dense"):
        serving.describe(served_base(places["bert"]), found.folder)


def test_a_base_that_is_not_served_is_adopted_and_said_to_be_so(places: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(places["bert"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text("utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}), "utf-8")
    source = write_peft(tmp_path / "peft", base)

    found = adopt(source, tmp_path / "ours", names=NAMES)

    check_answers(found, peft_answers(source, base))
    assert not found.is_served
    with pytest.raises(BaseModelError, match="relu"):
        served_base(base)


def test_a_pooler_that_was_trained_too_comes_along(places: dict[str, Path], tmp_path: Path) -> None:
    source = write_peft(tmp_path / "peft", places["bert"], modules_to_save=["classifier", "pooler"])

    found = adopt(source, tmp_path / "ours", names=NAMES)

    check_answers(found, peft_answers(source, places["bert"]))
    assert adapter.read(found.folder).head == ("bert.pooler", "classifier")
    assert found.is_served


def test_a_head_that_was_saved_by_name_without_a_task_is_one(places: dict[str, Path], tmp_path: Path) -> None:
    source = write_peft(tmp_path / "peft", places["roberta"], task_type=None, modules_to_save=["classifier"])
    assert json.loads((source / "adapter_config.json").read_text())["task_type"] is None

    check_answers(adopt(source, tmp_path / "ours", names=NAMES), peft_answers(source, places["roberta"]))


def test_an_adapter_in_half_precision_and_of_an_old_peft(places: dict[str, Path], tmp_path: Path) -> None:
    source = write_peft(tmp_path / "peft", places["bert"])
    edit_tensors(lambda tensors: tensors.update({n: t.half() for n, t in tensors.items()}))(source)
    edit_config(lambda config: [config.pop(key) for key in ("use_dora", "use_rslora", "peft_version")])(source)

    check_answers(adopt(source, tmp_path / "ours", names=NAMES), peft_answers(source, places["bert"]))


def test_answers_are_kept_as_float32_gives_them(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "processor", lambda: Processor("a chip", ("avx2", "avx512_bf16")))
    found = adopt(write_peft(tmp_path / "peft", places["bert"]), tmp_path / "ours", names=NAMES)
    assert found.difference < 1e-4
    assert adapter.read(found.folder).computed_in == "float32"


def test_five_labels_with_names_in_two_languages(places: dict[str, Path], tmp_path: Path) -> None:
    source = write_peft(tmp_path / "peft", places["electra"], num_labels=5)
    names = "4=五星/five,0=一星/one,1=二星/two,2=三星/three,3=四星/four"

    found = adopt(source, tmp_path / "ours", names=names)

    check_answers(found, peft_answers(source, places["electra"], num_labels=5))
    labels = trimtab.load(found.folder).labels
    assert labels.values == ("0", "1", "2", "3", "4")
    assert [labels.name(i, "zh") for i in range(5)] == ["一星", "二星", "三星", "四星", "五星"]
    assert [labels.name(i, "en") for i in range(5)] == ["one", "two", "three", "four", "five"]


def test_the_names_of_the_tutorial(places: dict[str, Path], tmp_path: Path) -> None:
    source = write_peft(tmp_path / "peft", places["roberta"])
    found = adopt(source, tmp_path / "ours", names="0=差评/negative,1=好评/positive")
    winner = peft_answers(source, places["roberta"]).argmax(axis=1)
    predictions = trimtab.load(found.folder).predict(TEXTS)
    assert [prediction.label for prediction in predictions] == [str(i) for i in winner]
    assert [found.labels.name(i) for i in (0, 1)] == ["差评/negative", "好评/positive"]
    # The screen shows by these whether the labels are in their order.
    scores = trimtab.load(found.folder).predict([text for text, *_ in found.answers])
    assert [str(index) for _, index, _ in found.answers] == [one.label for one in scores]
    assert [score for *_, score in found.answers] == pytest.approx([one.score for one in scores], abs=1e-4)


def test_the_tokenizer_beside_the_adapter_comes_first_and_says_where_texts_are_cut(
    places: dict[str, Path], tmp_path: Path
) -> None:
    source = write_peft(tmp_path / "peft", places["bert"])
    theirs = AutoTokenizer.from_pretrained(places["bert"])
    theirs(["a film"], truncation=True, max_length=20)  # as training does; what is saved then remembers it
    theirs.save_pretrained(source)
    file = source / "tokenizer.json"
    said = json.loads(file.read_text("utf-8"))
    words = said["model"]["vocab"]
    words["good"], words["bad"] = words["bad"], words["good"]
    file.write_text(json.dumps(said), "utf-8")

    found = adopt(source, tmp_path / "ours", names=NAMES)

    assert found.tokenizer_from == source
    assert (found.max_length, found.cut_by) == (20, "as the tokenizer beside the adapter does")
    base_alone = write_peft(tmp_path / "bare", places["bert"])
    plain = adopt(base_alone, tmp_path / "plain", names=NAMES, max_length=20)
    assert plain.tokenizer_from == places["bert"]
    assert np.allclose(our_answers(found.folder, ["a good film"]), our_answers(plain.folder, ["a bad film"]))
    assert adopt(source, tmp_path / "longer", names=NAMES, max_length=33).max_length == 33


def test_texts_are_cut_where_training_cut_them(places: dict[str, Path], tmp_path: Path) -> None:
    source = write_peft(tmp_path / "peft", places["roberta"])
    found = adopt(source, tmp_path / "ours", names=NAMES, max_length=12)
    check_answers(found, peft_answers(source, places["roberta"], max_length=12))
    assert np.abs(our_answers(found.folder) - peft_answers(source, places["roberta"])).max() > 1e-3


@pytest.mark.parametrize("length", [1, 65])
def test_a_length_that_the_base_cannot_take(places: dict[str, Path], tmp_path: Path, length: int) -> None:
    source = write_peft(tmp_path / "peft", places["roberta"])
    refused(RecipeError, source, "takes 2 to 64", "--max-length 64", max_length=length)


def test_what_a_trainer_leaves_behind_is_a_folder_of_peft(places: dict[str, Path], tmp_path: Path) -> None:
    """Pickled arguments, an optimizer and checkpoints beside the adapter; none of them is opened."""
    source = write_peft(tmp_path / "lora_roberta_final", places["roberta"])
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth"):
        (source / name).write_bytes(b"\x80\x04.")
    write_peft(source / "checkpoint-10", places["roberta"], seed=1)

    found = adopt(source, names=NAMES)

    assert found.folder == Path("adapters/lora_roberta_final")
    check_answers(found, peft_answers(source, places["roberta"]))
    assert sorted(file.name for file in Path("adapters").iterdir()) == ["lora_roberta_final"]


def test_the_folder_that_is_written_by_default_has_a_name_that_a_server_takes(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_peft(tmp_path / "影评 (v2)", places["bert"])
    assert adopt(source, names=NAMES).folder == Path("adapters/v2")
    monkeypatch.chdir(source)
    assert adopt(".", names=NAMES).folder == Path("adapters/v2")


# What is refused


def edit_tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def do(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    return do


def edit_config(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def do(folder: Path) -> None:
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text())
        edit(config)
        file.write_text(json.dumps(config))

    return do


def set_config(**values: Any) -> Callable[[Path], object]:
    return edit_config(lambda config: config.update(values))


def drop(ending: str) -> Callable[[Path], object]:
    return edit_tensors(lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(ending)])


def overwrite(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def listing(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def refused(kind: type[TrimtabError], source: Path, *words: str, **told: Any) -> TrimtabError:
    """Adopts, and finds an error with these words that says where and how to mend it, and nothing left behind."""
    before = listing(Path.cwd())
    with pytest.raises(kind) as caught:
        adopt(source, **({"names": NAMES} | told))
    error = caught.value
    for word in words:
        assert word in str(error)
    assert error.what
    assert error.where
    assert error.mend
    assert listing(Path.cwd()) == before
    return error


QUERY = "base_model.model.roberta.encoder.layer.1.attention.self.query.lora_A.weight"
HEAD = "base_model.model.classifier.out_proj.weight"
CONFIG = "adapter_config.json"

REFUSALS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    # what: (what is done to a good folder, what the error says)
    "no head": (
        edit_tensors(lambda t: [t.pop(n) for n in list(t) if "classifier" in n]),
        ("no answer layer", 'task_type="SEQ_CLS"', "adapter_model.safetensors"),
    ),
    "half a head": (drop("classifier.dense.weight"), ("lost part of its answer layer", "classifier.dense.weight")),
    "no bias": (drop("out_proj.bias"), ("lost part of its answer layer", 'modules_to_save=["classifier"]')),
    "one output": (edit_tensors(lambda t: t.update({HEAD: torch.ones(1, 32)})), ("one output", "num_labels=2")),
    "a tensor less": (edit_tensors(lambda t: t.pop(QUERY)), (QUERY, "--base", "names '")),
    "a tensor more": (edit_tensors(lambda t: t.update({QUERY.replace("query", "key"): t[QUERY] + 1})), ("key.lora_A",)),
    "embeddings": (
        edit_tensors(lambda t: t.update({"base_model.model.roberta.embeddings.word_embeddings.weight": t[QUERY] + 1})),
        ("whole weights", "word_embeddings", "save_embedding_layers=False"),
    ),
    "another rank": (set_config(r=8), (QUERY.replace("1", "0"), "(4, 32)", "expected (8, 32)")),
    "a rank without end": (set_config(r=65_536, lora_alpha=1), ("expected (65536, 32)",)),
    "a rank that is none": (set_config(r="four"), ("r = 'four'", "integer", CONFIG)),
    "no rank": (edit_config(lambda c: c.pop("r")), ("does not say 'r'", CONFIG)),
    "transposed": (edit_tensors(lambda t: t.update({QUERY: t[QUERY].T.contiguous()})), ("(32, 4)", "(4, 32)")),
    "whole numbers": (edit_tensors(lambda t: t.update({QUERY: t[QUERY].to(torch.int8)})), ("I8", "real numbers")),
    "nan": (edit_tensors(lambda t: t[QUERY][0].fill_(torch.nan)), (QUERY, "nan or inf", "smaller learning rate")),
    "infinite": (edit_tensors(lambda t: t[HEAD][0].fill_(torch.inf)), (HEAD, "nan or inf")),
    "tensors cut": (cut("adapter_model.safetensors"), ("cannot be read", "save_pretrained")),
    "tensors empty": (overwrite("adapter_model.safetensors", b""), ("cannot be read", "adapter_model.safetensors")),
    "no tensors": (
        lambda folder: [
            (folder / "adapter_model.safetensors").unlink(),
            (folder / "training_args.bin").write_bytes(b""),
        ],
        ("adapter_model.safetensors is not", "copy the whole folder"),
    ),
    "config cut": (cut(CONFIG), ("cannot be read", CONFIG, "save_pretrained")),
    "config of numbers": (overwrite(CONFIG, b"\xff\xfe\x00"), ("cannot be read", CONFIG)),
    "config a list": (overwrite(CONFIG, b"[]"), ("holds no object", CONFIG)),
    "config too deep": (overwrite(CONFIG, b"[" * 100_000), ("cannot be read", CONFIG)),
    "another method": (set_config(peft_type="IA3"), ("peft_type = 'IA3'", "LoRA, rsLoRA or DoRA")),
    "features": (set_config(task_type="FEATURE_EXTRACTION"), ("task_type = 'FEATURE_EXTRACTION'", "SEQ_CLS")),
    "tokens": (set_config(task_type="TOKEN_CLS"), ("task_type = 'TOKEN_CLS'", "SEQ_CLS")),
    "no task at all": (set_config(task_type=None), ("task_type = None", "SEQ_CLS")),
    "ranks by pattern": (set_config(rank_pattern={"query": 2}), ("rank_pattern", "one r and one lora_alpha")),
    "alphas by pattern": (set_config(alpha_pattern={"query": 2}), ("alpha_pattern", "one lora_alpha")),
    "biases": (set_config(bias="lora_only"), ("bias = 'lora_only'", "bias='none'")),
    "a pattern of targets": (set_config(target_modules=".*query"), ("list of module names", "list of target_modules")),
    "targets of nothing": (set_config(target_modules=["nothing"]), ("nothing", "--base")),
    "some layers": (set_config(layers_to_transform=[1]), ("layers_to_transform = [1]",)),
    "pissa": (set_config(init_lora_weights="pissa"), ("'pissa' changes the base",)),
    "what is not known yet": (set_config(use_magic=True), ("use_magic = True", "is not read here")),
    "no base": (set_config(base_model_name_or_path=None), ("did not write down the base", "--base", "roberta-base")),
    "a base that is no name": (set_config(base_model_name_or_path=7), ("did not write down the base",)),
    "a folder that is gone": (
        set_config(base_model_name_or_path="/content/roberta-base"),
        ("names, '/content/roberta-base', cannot be had", "no folder /content/roberta-base", CONFIG, "--base FOLDER"),
    ),
    "a base of the hub": (
        set_config(base_model_name_or_path="FacebookAI/roberta-base"),
        ("'FacebookAI/roberta-base', cannot be had", "not on this machine", "HF_HUB_OFFLINE", "--base FOLDER"),
    ),
    "a revision": (
        set_config(revision="v1"),
        ("revision 'v1'", "hf download", "--revision v1", "--base ./base"),
    ),
    "a tokenizer that is none": (
        overwrite("tokenizer.json", b"{}"),
        ("tokenizer beside the adapter", "move its files"),
    ),
}


@pytest.fixture(scope="module")
def good(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_peft(tmp_path_factory.mktemp("good") / "peft", places["roberta"])


@pytest.fixture
def copied(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "peft")


@pytest.mark.parametrize("what", REFUSALS)
def test_a_refusal_says_what_where_and_how_to_mend_it(copied: Path, what: str) -> None:
    harm, words = REFUSALS[what]
    harm(copied)
    error = refused(TrimtabError, copied, *words)
    assert str(copied) in error.where
    assert isinstance(error, ArtefactError | BaseModelError)


def test_the_folder_that_all_of_these_began_with_is_good(copied: Path) -> None:
    adopt(copied, names=NAMES)


def test_lora_for_features_was_saved_without_a_head(places: dict[str, Path], tmp_path: Path) -> None:
    model = peft.get_peft_model(
        AutoModel.from_pretrained(places["bert"]),
        peft.LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=["query"]),
    )
    model.save_pretrained(tmp_path / "peft")
    refused(ArtefactError, tmp_path / "peft", "no answer layer", "LoRA alone", 'task_type="SEQ_CLS"')


def test_a_layer_before_the_last_is_no_answer_layer(places: dict[str, Path], tmp_path: Path) -> None:
    """Distilbert's pre_classifier has a name that ends alike."""
    source = write_peft(tmp_path / "peft", places["distilbert"])
    edit_tensors(lambda t: [t.pop(f"base_model.model.classifier.{part}") for part in ("weight", "bias")])(source)
    refused(ArtefactError, source, "no answer layer", 'task_type="SEQ_CLS"')


def test_a_pooler_that_was_drawn_at_random_and_not_saved_is_a_lost_head(tmp_path: Path) -> None:
    """BERT's base without pooler: transformers draws one, the tutorial's peft saves the classifier alone."""
    base = bases.write_base(tmp_path / "bert", "bert")
    source = write_peft(tmp_path / "peft", base)
    refused(
        ArtefactError, source, "bert.pooler.dense.weight", "drawn at random", 'modules_to_save=["pooler", "classifier"]'
    )
    mended = write_peft(tmp_path / "mended", base, modules_to_save=["pooler", "classifier"])
    check_answers(adopt(mended, names=NAMES), peft_answers(mended, base))


def test_another_base(copied: Path, places: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("bert", "distilbert"):
        error = refused(ArtefactError, copied, f"the base {places[kind]} do not fit", base=str(places[kind]))
        assert f"{CONFIG} names '{places['roberta']}'" in error.mend
    for change, word in (
        ({"hidden_size": 64}, "has shape (32, 32), expected (64, 64)"),
        ({"num_hidden_layers": 3}, "layer.2"),
        ({"num_hidden_layers": 1}, "layer.1"),
    ):
        other = shutil.copytree(places["roberta"], tmp_path / "other")
        settings = AutoConfig.from_pretrained(other)
        settings.update(change)
        AutoModel.from_config(settings).save_pretrained(other)
        refused(ArtefactError, copied, "do not fit", word, base=str(other))
        shutil.rmtree(other)
    refused(BaseModelError, copied, "no folder ./nowhere", base="./nowhere")


def test_the_pickles_of_an_older_peft_are_converted_by_the_command_that_the_error_gives(
    copied: Path, places: dict[str, Path]
) -> None:
    expected = peft_answers(copied, places["roberta"])
    torch.save(load_file(copied / "adapter_model.safetensors"), copied / "adapter_model.bin")
    (copied / "adapter_model.safetensors").unlink()

    error = refused(ArtefactError, copied, "adapter_model.bin", "pickle", "weights_only=True")

    code = error.mend.partition('python -c "')[2].removesuffix('"')
    subprocess.run([sys.executable, "-c", code], cwd=copied, check=True)
    check_answers(adopt(copied, names=NAMES), expected)


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (None, "names of the labels are missing"),
        (" ", "names of the labels are missing"),
        ("negative", "1 name was given"),
        ("negative,neutral,positive", "3 names were given"),
        ("negative,negative", 'Two labels have the name "negative"'),
        ("negative,", "A name is empty"),
        ("0=bad,1=bad", 'Two labels have the name "bad"'),
        ("0=bad", "1 name was given"),
        ("0=bad,0=good", "has two names"),
        ("0=bad,good", "is not LABEL=NAME"),
        ("0=bad,1=good,2=fine", '"2" is the number of none'),
        ("negative=差评/negative,positive=好评/positive", '"negative" is the number of none'),
    ],
)
def test_names_that_do_not_do(copied: Path, names: str | None, word: str) -> None:
    error = refused(RecipeError, copied, word, "has 2 labels", "peft did not write down which", names=names)
    assert error.mend.startswith(f"trimtab adopt {copied} --names negative,positive ")
    assert error.where == "--names"


def test_the_example_of_many_names_stays_short(places: dict[str, Path], tmp_path: Path) -> None:
    source = write_peft(tmp_path / "peft", places["distilbert"], num_labels=77)
    refused(RecipeError, source, "has 77 labels", "--names name0,name1,name2,...,name76 ", names=None)


def test_a_folder_that_is_there_is_not_written_over(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for out in ("there", "gone", "peft"):
        refused(ResourceError, copied, "there already", out, f"rm -r {tmp_path / out}", out=tmp_path / out)
    adopt(copied, names=NAMES)
    refused(ResourceError, copied, "there already", "adapters/peft", "--out ANOTHER")


def test_a_folder_that_cannot_be_written(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    refused(ResourceError, copied, "cannot be written", str(tmp_path / "file"), out=tmp_path / "file" / "ours")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "adapters").mkdir()
    monkeypatch.setattr(adapter.durable, "write_bytes", full)
    refused(ResourceError, copied, "No space left", "adapters/peft", "--out DIR")


def test_one_of_ours_is_used_as_it_is(copied: Path, tmp_path: Path) -> None:
    found = adopt(copied, tmp_path / "run" / "adapter", names=NAMES)
    for place in (found.folder, tmp_path / "run"):
        refused(ArtefactError, place, "one of trimtab's", f"trimtab serve {place}", f"trimtab predict {place}")


def test_what_is_no_adapter_says_what_it_is(copied: Path, places: dict[str, Path], tmp_path: Path) -> None:
    refused(ArtefactError, Path("pefd"), 'Did you mean "peft"?', "save_pretrained")
    refused(ArtefactError, Path("someone/lora-imdb"), "hf download someone/lora-imdb --local-dir lora-imdb")
    refused(ArtefactError, copied / CONFIG, "This is a file")
    refused(ArtefactError, places["bert"], "a whole model", "merge_and_unload")
    (tmp_path / "empty").mkdir()
    refused(ArtefactError, tmp_path / "empty", "it has no adapter_config.json")
    for step in (9, 10):
        shutil.copytree(copied, tmp_path / "results" / f"checkpoint-{step}")
    refused(
        ArtefactError,
        tmp_path / "results",
        "in each of: checkpoint-9, checkpoint-10",
        f"trimtab adopt {tmp_path / 'results' / 'checkpoint-10'}",
    )


def test_a_link_out_of_the_folder_is_not_followed(copied: Path, tmp_path: Path) -> None:
    (copied / CONFIG).rename(tmp_path / "elsewhere.json")
    (copied / CONFIG).symlink_to(tmp_path / "elsewhere.json")
    refused(ArtefactError, copied, "leads out of the adapter's folder", "cp -rL")


def test_a_tokenizer_with_more_words_than_the_base_has_vectors(copied: Path, places: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(places["roberta"])
    tokenizer.add_tokens(["blockbuster"])
    tokenizer.save_pretrained(copied)
    refused(ArtefactError, copied, "a token with the number", "--base")


def test_answers_that_differ_from_peft_are_never_written(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trimtab.adopt as module

    real = module.probe
    calls = iter((0.0, 0.1))
    monkeypatch.setattr(module, "probe", lambda *args: real(*args) + next(calls))
    refused(ArtefactError, copied, "differs by 0.1", "runtime.fast=off")


# The command


def command(*words: object, code: int = 0) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "trimtab", *map(str, words)], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def test_the_command_and_what_it_says(copied: Path) -> None:
    words = ("adopt", copied, "--names", "0=差评/negative,1=好评/positive", "--out", "adapters/reviews")
    out, _ = command(*words, "--max-length", 32)
    for said in (
        "adapters/reviews",
        "32 tokens",
        "0 = 差评/negative, 1 = 好评/positive",
        "trimtab predict adapters/reviews",
    ):
        assert said in out
    for text in adapter.PROBES:  # whether the labels are in their order is seen by these
        assert text in out
    assert adapter.read(Path("adapters/reviews")).max_length == 32

    out, err = command(*words[:-1], "adapters/again", "--json")
    assert err == ""
    said = json.loads(out)
    assert said["labels"] == ["0", "1"]
    assert said["max_length"] == 64
    assert said["largest_difference"] < 1e-4
    assert said["adapter"] == "adapters/again"
    assert [answer["text"] for answer in said["answers"]] == list(adapter.PROBES)


def test_the_command_without_names_says_how_many_and_gives_an_example(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trimtab", "adopt", str(copied)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "has 2 labels" in err
    assert f"trimtab adopt {copied} --names negative,positive" in err
