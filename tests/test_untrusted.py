"""Adapters from strangers: no code of theirs runs, nothing outside their folder is read, nothing odd is accepted."""

import hashlib
import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import FIGURES, later, reviews, tiers, write_csv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_adapter import seal
from test_training import small

from trimtab import adapter, evaluation, predict, training
from trimtab.config import Layered, RuntimeSettings
from trimtab.errors import ArtefactError, TrimtabError

TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def good(bert: Path, tmp_path_factory: pytest.TempPathFactory, quick_module: None) -> Path:
    """A trained adapter of rank 4 beside its base."""
    place = tmp_path_factory.mktemp("good")
    layered = small(write_csv(place / "rows.csv", reviews(40)), bert, train__num_epochs=1)
    return training.train(layered, out=str(place / "run")).adapter


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


class Payload:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.mark}",))


def edited(name: str, **values: object) -> Callable[[Path, Path], None]:
    def do(folder: Path, mark: Path) -> None:
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | values), "utf-8")
        seal(folder)

    return do


def described(change: Callable[[Any], object]) -> Callable[[Path, Path], None]:
    def do(folder: Path, mark: Path) -> None:
        meta = json.loads((folder / "trimtab.json").read_text("utf-8"))
        change(meta)
        (folder / "trimtab.json").write_text(json.dumps(meta), "utf-8")
        seal(folder)

    return do


def pickled(name: str, *, alone: bool = True) -> Callable[[Path, Path], None]:
    def do(folder: Path, mark: Path) -> None:
        if alone:
            (folder / TENSORS).unlink()
        (folder / name).write_bytes(pickle.dumps(Payload(mark)))

    return do


def saved_by_torch(name: str) -> Callable[[Path, Path], None]:
    def do(folder: Path, mark: Path) -> None:
        (folder / TENSORS).unlink()
        torch.save({"a": Payload(mark)}, folder / name)

    return do


def linked(name: str, *, absolute: bool) -> Callable[[Path, Path], None]:
    def do(folder: Path, mark: Path) -> None:
        outside = folder.parent / "outside"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside if absolute else Path("..") / "outside")

    return do


def circle(folder: Path, mark: Path) -> None:
    (folder / TENSORS).unlink()
    (folder / TENSORS).symlink_to(TENSORS)


def header(said: dict[str, Any], *, length: int | None = None, data: bytes = b"") -> Callable[[Path, Path], None]:
    def do(folder: Path, mark: Path) -> None:
        written = json.dumps(said).encode()
        size = len(written) if length is None else length
        (folder / TENSORS).write_bytes(struct.pack("<Q", size) + written + data)

    return do


def huge(folder: Path, mark: Path) -> None:
    """A file that says that it holds, and does hold, 40 GB: a hole."""
    bytes_ = 40 << 30
    written = json.dumps({"a": {"dtype": "F32", "shape": [bytes_ // 4], "data_offsets": [0, bytes_]}}).encode()
    with (folder / TENSORS).open("wb") as file:
        file.write(struct.pack("<Q", len(written)) + written)
        file.truncate(8 + len(written) + bytes_)


def huge_rank(folder: Path, mark: Path) -> None:
    edited("adapter_config.json", r=65_536)(folder, mark)


def pipe(name: str) -> Callable[[Path, Path], None]:
    """Opening it would wait for ever."""

    def do(folder: Path, mark: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return do


def long_file(name: str, size: int) -> Callable[[Path, Path], None]:
    return lambda folder, mark: os.truncate(folder / name, size)


def nested(name: str) -> Callable[[Path, Path], None]:
    return lambda folder, mark: (folder / name).write_text("[" * 100_000, "utf-8") and None


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}

PAYLOADS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "a pickle named as tensors": (pickled(TENSORS), "cannot be read"),
    "a pickle, .bin": (pickled("adapter_model.bin"), "weights_only=True"),
    "a pickle, .pt": (pickled("adapter_model.pt"), "weights_only=True"),
    "a pickle, .pkl": (pickled("adapter_model.pkl"), "weights_only=True"),
    "torch.save, .bin": (saved_by_torch("adapter_model.bin"), "weights_only=True"),
    "torch.save, .pth": (saved_by_torch("adapter_model.pth"), "weights_only=True"),
    "torch.save named as tensors": (saved_by_torch(TENSORS), "cannot be read"),
    "tensors elsewhere": (linked(TENSORS, absolute=True), "leads out of"),
    "tensors above": (linked(TENSORS, absolute=False), "leads out of"),
    "a tokenizer elsewhere": (linked("tokenizer.json", absolute=True), "leads out of"),
    "a description above": (linked("trimtab.json", absolute=False), "leads out of"),
    "a config elsewhere": (linked("adapter_config.json", absolute=True), "leads out of"),
    "a pipe for tensors": (pipe(TENSORS), "not a plain file"),
    "a pipe for a description": (pipe("trimtab.json"), "not a plain file"),
    "links in a circle": (circle, "leads out of"),
    "40 GB of tensors": (huge, "is missing"),
    "a rank of 65,536": (huge_rank, "expected (65536"),
    "a header of 2^60 bytes": (header({"a": ONE}, length=1 << 60), "cannot be read"),
    "a header of lies": (header({"a": ONE}, data=b""), "cannot be read"),
    "offsets before the start": (header({"a": ONE | {"data_offsets": [-4, 0]}}, data=bytes(4)), "cannot be read"),
    "two tensors in one place": (header({"a": ONE, "b": ONE}, data=bytes(4)), "cannot be read"),
    "1 GB of description": (long_file("trimtab.json", 1 << 30), "none of this kind"),
    "1 GB of tokenizer": (long_file("tokenizer.json", 1 << 30), "none of this kind"),
    "brackets without end": (nested("trimtab.json"), "not JSON"),
    "other layers by pattern": (edited("adapter_config.json", rank_pattern={"query": 2}), "rank_pattern"),
    "another scale by pattern": (edited("adapter_config.json", alpha_pattern={"query": 99}), "alpha_pattern"),
    "a head that never ends": (edited("trimtab.json", head=["(a|a|a)*" * 9 + "b"]), "head is a list"),
    "targets that never end": (edited("adapter_config.json", target_modules=["(.*)*" * 9 + "b"]), "target_modules is"),
    "a pad id of 10^30": (described(lambda meta: meta["preprocessing"].update(pad_id=10**30)), "pad_id"),
    "texts cut in no known way": (described(lambda meta: meta["preprocessing"].update(keep="middle")), "keep middle"),
    "another method": (edited("adapter_config.json", peft_type="IA3"), "peft_type"),
    "trained biases": (edited("adapter_config.json", bias="all"), "bias"),
}


def load_without_the_fast_forward(folder: Path) -> object:
    return predict.load(folder, runtime=RuntimeSettings(fast="off"))


@pytest.mark.parametrize("take", [predict.load, *later([load_without_the_fast_forward, evaluation.verify])])
@pytest.mark.parametrize("kind", PAYLOADS)
def test_nothing_of_a_stranger_runs_is_followed_or_accepted(
    folder: Path, tmp_path: Path, kind: str, take: Callable[[Path], object]
) -> None:
    do, reason = PAYLOADS[kind]
    mark = tmp_path / "mark"
    do(folder, mark)
    FIGURES["payloads"] += 1
    with pytest.raises(ArtefactError) as refused:
        take(folder)
    assert reason in str(refused.value)
    assert not mark.exists()


def other_numbers(folder: Path, number: int = 1_000_000) -> None:
    """A word whose number the base has no vector for."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    tokenizer["model"]["vocab"]["film"] = number
    written = json.dumps(tokenizer).encode()
    (folder / "tokenizer.json").write_bytes(written)
    digest = hashlib.sha256(written).hexdigest()
    described(lambda meta: meta["preprocessing"].update(tokenizer_sha256=digest))(folder, folder)


def test_an_adapter_that_does_not_say_what_of_a_text_is_kept_was_cut_at_its_end(folder: Path) -> None:
    described(lambda meta: meta["preprocessing"].update(keep="ends"))(folder, folder)
    assert adapter.read(folder).keep == "ends"
    described(lambda meta: meta["preprocessing"].pop("keep"))(folder, folder)
    assert adapter.read(folder).keep == "start"


@pytest.mark.parametrize("fast", ["auto", "off"])
@pytest.mark.parametrize(
    "change",
    [
        other_numbers,
        lambda folder: described(lambda meta: meta["preprocessing"].update(max_length=100_000))(folder, folder),
        lambda folder: described(lambda meta: meta["preprocessing"].update(pad_id=1_000_000_000))(folder, folder),
    ],
)
def test_tokens_that_the_base_does_not_have_are_an_error_or_change_nothing(
    good: Path, folder: Path, change: Callable[[Path], None], fast: Any
) -> None:
    texts = ["the film was good", "a film " * 400]
    change(folder)
    expected = [said.label for said in predict.load(good).predict(texts)]
    try:
        found = predict.load(folder, runtime=RuntimeSettings(fast=fast)).predict(texts)
    except ArtefactError as refused:
        assert "no vectors for" in str(refused)  # noqa: PT017
    else:
        assert [said.label for said in found] == expected


def test_a_number_of_a_token_that_would_need_gigabytes_is_refused_before_it_is_used(folder: Path) -> None:
    """The tokenizers library makes a table up to the largest: 35 s for this one (read once, by hand)."""
    other_numbers(folder, 3_000_000_000)
    with pytest.raises(ArtefactError, match="numbers a token 3,000,000,000"):
        adapter.read(folder)


def test_a_pickle_beside_the_tensors_is_not_opened(folder: Path, tmp_path: Path) -> None:
    pickled("adapter_model.bin", alone=False)(folder, tmp_path / "mark")
    predict.load(folder)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("key", ["auto_mapping", "auto_map", "loftq_config", "base_model_name_or_path", "revision"])
def test_no_name_in_a_config_is_imported_or_fetched(
    folder: Path, tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It loads, for the key decides nothing here, and the module that it names stays unread."""
    (tmp_path / "evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('mark').touch()", "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    named = {"base_model_class": "evil.Model", "parent_library": "evil", "AutoModel": "evil.Model"}
    value = "evil" if key in ("base_model_name_or_path", "revision") else named
    edited("adapter_config.json", **{key: value})(folder, tmp_path)
    predict.load(folder)
    assert not (tmp_path / "mark").exists()


def test_no_name_of_a_file_gets_into_a_command(folder: Path) -> None:
    (folder / TENSORS).rename(folder / "$(touch mark).bin")
    with pytest.raises(ArtefactError) as refused:
        predict.load(folder)
    assert "$(" not in refused.value.mend
    assert "torch.load('FILE'" in refused.value.mend


def test_the_conversion_that_is_named_brings_the_very_tensors(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / TENSORS).unlink()
    with pytest.raises(ArtefactError) as refused:
        predict.load(folder)
    program = refused.value.mend.split('python -c "')[1].rstrip('"')
    here = Path.cwd()
    try:
        os.chdir(folder)
        exec(program, {})  # what a reader of the message would run
    finally:
        os.chdir(here)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(folder / TENSORS).items())


# -- malformed -------------------------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def spots(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at] * bool(at) + [way for key, one in inner for way in spots(one, (*at, key))]


def put(value: Any, way: tuple[Any, ...], new: object) -> None:
    for key in way[:-1]:
        value = value[key]
    value[way[-1]] = new


def taken(folder: Path) -> predict.Classifier | None:
    """The classifier, or None where the adapter is refused; any other error is a crash."""
    try:
        return predict.load(folder)
    except TrimtabError:
        return None


def probed(classifier: predict.Classifier) -> npt.NDArray[np.float32]:
    said = classifier.adapter
    return adapter.probe(classifier.engine.forward, said.tokenizer, said.max_length, said.keep)


def many(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """So many drawn examples; the fixtures are made once for all of them."""
    once = [HealthCheck.function_scoped_fixture]
    return lambda test: settings(max_examples=examples, deadline=None, suppress_health_check=once)(
        given(data=st.data())(test)
    )


def a_malformed_description(good: Path, folder: Path, data: st.DataObject) -> None:
    """Its sums are put right, as whoever means harm would; what the stored answers do not tell changes none."""
    FIGURES["malformed adapters"] += 1
    restore(good, folder)
    name = data.draw(st.sampled_from(["trimtab.json", "adapter_config.json"]))
    value = json.loads((folder / name).read_text("utf-8"))
    put(value, data.draw(st.sampled_from(spots(value))), data.draw(JSON_VALUES))
    (folder / name).write_text(json.dumps(value), "utf-8")
    seal(folder)
    classifier = taken(folder)
    if classifier is not None and evaluation.verify(folder).ok:
        assert np.abs(probed(classifier) - probed(predict.load(good))).max() < 1e-4


def malformed_tensors(good: Path, folder: Path, data: st.DataObject) -> None:
    """Refused, also where their own sum was put right."""
    FIGURES["malformed adapters"] += 1
    restore(good, folder)
    tensors = load_file(folder / TENSORS)
    name = data.draw(st.sampled_from(sorted(tensors)))
    spoil(tensors, name, data.draw(st.sampled_from(["drop", "rename", "shape", "dtype", "nan", "inf", "add"])), data)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    edited("trimtab.json", tensors_sha256=hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest())(folder, folder)
    assert taken(folder) is None


def spoil(tensors: dict[str, torch.Tensor], name: str, change: str, data: st.DataObject) -> None:
    tensor = tensors[name].clone()
    if change in ("drop", "rename"):
        del tensors[name]
    if change == "rename":
        tensors[data.draw(st.text(min_size=1, max_size=30).filter(lambda new: new != name))] = tensor
    elif change == "shape":
        other = st.lists(st.integers(0, 40), max_size=3).filter(lambda shape: tuple(shape) != tuple(tensor.shape))
        tensors[name] = torch.zeros(data.draw(other))
    elif change == "dtype":
        tensors[name] = tensor.to(data.draw(st.sampled_from([torch.float64, torch.int64, torch.int8, torch.bool])))
    elif change == "add":
        tensors[name + data.draw(st.sampled_from([".weight", "2", ".default"]))] = tensor
    elif change in ("nan", "inf"):
        tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = float(change)
        tensors[name] = tensor


test_a_malformed_description_is_refused_or_answers_as_before = many(60)(a_malformed_description)
test_malformed_tensors_are_refused = many(40)(malformed_tensors)
test_a_malformed_description_often = pytest.mark.long(many(600)(a_malformed_description))
test_malformed_tensors_often = pytest.mark.long(many(400)(malformed_tensors))


def restore(good: Path, folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(good, folder)


# -- right-looking and wrong -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def others(bert: Path, good: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters that differ from the good one in one thing each."""
    place = tmp_path_factory.mktemp("others")
    rows = reviews(40)
    three = [*rows, *((text + " so so", "so") for text, _ in rows[:10])]
    turned = [(text, {"neg": "pos", "pos": "neg"}[label]) for text, label in rows]

    def job(name: str, of: list[tuple[str, str]] = rows, **settings: Any) -> Layered:
        return small(write_csv(place / f"{name}.csv", of), bert, train__num_epochs=1, **settings)

    made = {
        "rank": job("rank", lora__r=2),
        "head size": job("head", three),
        "labels of the opposite": job("turned", turned),
        "length": job("length", data__max_length=8),
        "targets": job("targets", lora__target_modules=("query", "value")),
        "variant": job("variant", lora__variant="rslora"),
        "seed": job("seed", train__seed=7),
    }
    return {name: training.train(layered, out=str(place / name)).adapter for name, layered in made.items()}


def swap_files(folder: Path, others: dict[str, Path], rng: random.Random) -> tuple[str, ...]:
    """Some of an adapter's files, and not all, are those of another that differs in one thing."""
    other = others[rng.choice(sorted(others))]
    names = ["trimtab.json", "adapter_config.json", TENSORS]
    different = [name for name in names if (folder / name).read_bytes() != (other / name).read_bytes()]
    for name in rng.sample(different, rng.randint(1, len(different) - 1)):
        shutil.copy(other / name, folder / name)
    return "is not what training wrote", "expected (", "missing", "does not belong here"


def swap_words(folder: Path, others: dict[str, Path], rng: random.Random) -> tuple[str, ...]:
    """A tokenizer in which two words have each other's number."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    words = tokenizer["model"]["vocab"]
    first, second = rng.sample(sorted(words), 2)
    words[first], words[second] = words[second], words[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    return ("not the one that this adapter was trained with",)


def swap_labels(folder: Path, others: dict[str, Path], rng: random.Random) -> tuple[str, ...]:
    """The labels in another order."""
    meta = json.loads((folder / "trimtab.json").read_text("utf-8"))
    meta["labels"].reverse()
    (folder / "trimtab.json").write_text(json.dumps(meta), "utf-8")
    return ("trimtab.json is not what training wrote",)


def scale(folder: Path, others: dict[str, Path], rng: random.Random) -> tuple[str, ...]:
    """Another alpha, and with it another share of B A."""
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    config["lora_alpha"] = rng.choice([1, 2, 4, 8, 32, 64])
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    return ("adapter_config.json is not what training wrote",)


def nudge_base(folder: Path, others: dict[str, Path], rng: random.Random) -> tuple[str, ...]:
    """A base of the same shape, one number of which is another."""
    meta = json.loads((folder / "trimtab.json").read_text("utf-8"))
    base = Path(shutil.copytree(meta["base"]["name"], folder.parent / "base"))
    tensors = load_file(base / "model.safetensors")
    tensor = tensors[rng.choice(sorted(tensors))].view(-1)
    tensor[rng.randrange(tensor.numel())] += 0.01
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return ("was trained on",)


WRONG = (swap_files, swap_words, swap_files, swap_labels, swap_files, scale, nudge_base)


@pytest.mark.parametrize("trial", tiers(21, 300))
def test_a_right_looking_adapter_that_is_wrong_is_refused(folder: Path, others: dict[str, Path], trial: int) -> None:
    reasons = WRONG[trial % len(WRONG)](folder, others, random.Random(trial))
    base = folder.parent / "base"
    with pytest.raises(ArtefactError) as refused:
        predict.load(folder, base=str(base) if base.is_dir() else None)
    assert any(reason in str(refused.value) for reason in reasons)
    FIGURES["right-looking wrong adapters"] += 1
