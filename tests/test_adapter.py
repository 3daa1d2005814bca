import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import peft
import pytest
import torch
import transformers
from bases import write_base
from conftest import built, tiers
from safetensors.torch import load_file, save_file

from trimtab import adapter, config, predict, tokens
from trimtab.classification import Labels
from trimtab.config import MINILM, Keep
from trimtab.errors import ArtefactError, BaseModelError
from trimtab.forward import stock
from trimtab.hub import MINILM_WEIGHTS, find_base
from trimtab.resolve import Job, resolve

ROOT = Path(adapter.__file__).resolve().parent.parent
NAMES = {"0": "差评/negative", "1": "好评/positive"}

# What a process does that knows nothing of this one; `trained` does the same.
WRITE = """
import sys
from pathlib import Path
import torch
from trimtab import adapter, config, training
from trimtab.forward import stock
from trimtab.resolve import resolve

rows, base, out = sys.argv[1:]
flags = {"data.train": (rows,), "base.model": base, "data.names": {"0": "差评/negative", "1": "好评/positive"}}
job = resolve(config.assemble("default", flags, ["runtime.device=cpu", "runtime.threads=1", "runtime.dtype=float32"]))
ready = training.make_ready(job)
model, head = ready.model, ready.head
adapter.write(Path(out), model, stock(model, job.tokenizer.pad_id), labels=job.labels, max_length=32, keep="start",
              tokenizer=job.tokenizer, base=job.base, head=head, card="# A card\\n")
"""

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds base/, other/ of another seed, rows.csv, and adapter/, written with the umask 022."""
    place = tmp_path_factory.mktemp("adapter")
    write_base(place / "base", "bert")
    write_base(place / "other", "bert", seed=1)
    rows = [f"the film was {word},{label}" for word, label in (("good", 1), ("bad", 0), ("very slow", 0))]
    (place / "rows.csv").write_text("\n".join(["text,label", *rows * 4]) + "\n", "utf-8")
    mask = os.umask(0o022)
    write(place / "adapter", *build(make_job(place)))
    os.umask(mask)
    return place


@pytest.fixture
def copied(place: Path, tmp_path: Path) -> Path:
    """A copy of the adapter folder, to be damaged."""
    return shutil.copytree(place / "adapter", tmp_path / "adapter")


def make_job(place: Path) -> Job:
    flags = {"data.train": (str(place / "rows.csv"),), "base.model": str(place / "base"), "data.names": NAMES}
    return resolve(config.assemble("default", flags, ["runtime.device=cpu", "runtime.threads=1"]))


def build(job: Job) -> tuple[Job, Any, list[str]]:
    model, head, _ = built(job)
    return job, model, head


def write(
    folder: Path, job: Job, model: Any, head: list[str], labels: Labels | None = None, keep: Keep = "start"
) -> None:
    adapter.write(
        folder,
        model,
        stock(model, job.tokenizer.pad_id),
        labels=labels or job.labels,
        max_length=32,
        keep=keep,
        tokenizer=job.tokenizer,
        base=job.base,
        head=head,
        card="# A card\n",
    )


# What is written


def test_everything_that_was_known_in_training_is_read_again(place: Path) -> None:
    job = make_job(place)

    read = adapter.read(place / "adapter")

    assert read.labels == job.labels
    assert [read.labels.name(i, language) for i in (0, 1) for language in ("zh", "en")] == [
        "差评",
        "negative",
        "好评",
        "positive",
    ]
    assert (read.max_length, read.tokenizer.pad_id, read.tokenizer.json) == (
        32,
        job.tokenizer.pad_id,
        job.tokenizer.json,
    )
    assert read.lora.model_dump(exclude={"target_modules"}) == job.recipe.lora.model_dump(exclude={"target_modules"})
    assert set(read.lora.target_modules) == set(job.recipe.lora.target_modules)
    assert read.head == ("bert.pooler", "classifier")
    assert read.base == {
        "name": str(place / "base"),
        "hub_id": "",
        "weights_sha256": job.base.weights_sha256,
        "tokenizer_sha256": job.base.tokenizer_sha256,
    }


def test_a_long_text_is_cut_as_in_training(place: Path, tmp_path: Path) -> None:
    job, model, head = build(make_job(place))
    text = "good film " * 20 + "bad film " * 20
    both: tuple[Keep, Keep] = ("start", "ends")
    for keep in both:
        write(tmp_path / keep, job, model, head, keep=keep)
        classifier = predict.load(tmp_path / keep)
        assert classifier.adapter.keep == keep
        cut = tokens.encode([text], job.tokenizer, 32, keep=keep)
        assert np.array_equal(classifier.encode([text]).ids, cut.ids)
    bad = tokens.encode(["bad"], job.tokenizer, 32).ids[1]
    assert [bad in predict.load(tmp_path / keep).encode([text]).ids for keep in both] == [False, True]


def test_the_probes_are_answered_as_they_were(place: Path) -> None:
    classifier = predict.load(place / "adapter")

    texts, logits = zip(*classifier.adapter.probes, strict=True)
    said = classifier.adapter
    answers = adapter.probe(classifier.engine.forward, said.tokenizer, said.max_length, said.keep)
    assert texts == adapter.PROBES
    np.testing.assert_allclose(answers, np.array(logits), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("差评/negative", "好评/positive"),
        ("terrible", "wonderful"),  # one name for both languages
        ("差评/negative", "wonderful"),
        ("客服/服务/service", "其他/other"),
    ],
)
def test_names_survive(place: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    labels = Labels(("0", "1"), names)
    write(tmp_path / "adapter", *build(make_job(place)), labels)

    read = adapter.read(tmp_path / "adapter").labels

    for language in ("", "zh", "en"):
        assert [read.name(i, language) for i in (0, 1)] == [labels.name(i, language) for i in (0, 1)]


def test_files_can_be_read_by_others(place: Path) -> None:
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in (place / "adapter").iterdir()}

    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "trimtab.json"} < modes.keys()
    assert set(modes.values()) == {"0o644"}
    assert (place / "adapter").stat().st_mode & 0o777 == 0o755


def test_another_process_at_another_time_writes_the_same_bytes(place: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE, *map(str, (place / "rows.csv", place / "base", tmp_path / "adapter"))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "3", "PYTHONUTF8": "1", "TZ": "Asia/Tokyo"}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr

    first, second = (
        {file.name: file.read_bytes() for file in folder.iterdir()}
        for folder in (place / "adapter", tmp_path / "adapter")
    )
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    times = re.compile(rb"20\d\d-\d\d-\d\d|\b1[6-9]\d{8}\b|\d\d:\d\d:\d\d")
    assert [name for name in first if name != "tokenizer.json" and times.search(first[name])] == []


def test_a_write_that_fails_leaves_nothing_and_can_be_repeated(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    made = build(make_job(place))
    with monkeypatch.context() as patch:
        patch.setattr(adapter, "probe", full)
        with pytest.raises(OSError, match="No space"):
            write(tmp_path / "adapter", *made)
    assert not (tmp_path / "adapter").exists()

    write(tmp_path / "adapter", *made)

    adapter.read(tmp_path / "adapter")
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


# Damage


def edit_tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return damage


def edit_json(name: str, edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        value = json.loads((folder / name).read_text("utf-8"))
        edit(value)
        (folder / name).write_text(json.dumps(value), "utf-8")
        seal(folder)

    return damage


def seal(folder: Path) -> None:
    """Puts the sums right, as whoever means harm would."""
    meta = json.loads((folder / "trimtab.json").read_text("utf-8"))
    meta["config_sha256"] = hashlib.sha256((folder / "adapter_config.json").read_bytes()).hexdigest()
    (folder / "trimtab.json").write_text(json.dumps(meta | {"sha256": adapter._digest(meta)}), "utf-8")


def overwrite(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def truncate(name: str) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


QUERY = "base_model.model.bert.encoder.layer.1.attention.self.query.lora_A.weight"
CLASSIFIER = "base_model.model.classifier.weight"

DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a tensor less": (edit_tensors(lambda t: t.pop(QUERY)), (QUERY, "missing")),
    "the head less": (edit_tensors(lambda t: t.pop(CLASSIFIER)), (CLASSIFIER, "missing")),
    "a tensor more": (edit_tensors(lambda t: t.update(stray=torch.zeros(2))), ("stray", "does not belong")),
    "another shape": (edit_tensors(lambda t: t.update({QUERY: torch.zeros(4, 32)})), (QUERY, "(4, 32)", "(8, 32)")),
    "transposed": (edit_tensors(lambda t: t.update({QUERY: torch.zeros(32, 8)})), (QUERY, "(32, 8)")),
    "not a number": (edit_tensors(lambda t: t[QUERY][0].fill_(torch.nan)), (QUERY, "not finite")),
    "infinite": (edit_tensors(lambda t: t[CLASSIFIER][0].fill_(torch.inf)), (CLASSIFIER, "not finite")),
    "tensors cut": (truncate("adapter_model.safetensors"), ("adapter_model.safetensors",)),
    "tensors empty": (overwrite("adapter_model.safetensors", b""), ("adapter_model.safetensors",)),
    "tensors gone": (remove("adapter_model.safetensors"), ("adapter_model.safetensors",)),
    "tokenizer changed": (
        lambda folder: (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b"\n"),
        ("tokenizer.json", "not the one"),
    ),
    "tokenizer not text": (overwrite("tokenizer.json", b"\xff\xfe\x00"), ("tokenizer.json",)),
    "tokenizer gone": (remove("tokenizer.json"), ("tokenizer.json",)),
    "plain peft": (remove("trimtab.json"), ("Plain peft", "labels")),
    "no peft config": (remove("adapter_config.json"), ("adapter_config.json",)),
    "newer schema": (
        edit_json("trimtab.json", lambda meta: meta.update(schema_version=adapter.SCHEMA_VERSION + 1)),
        ("schema version 2", "trimtab.json", "newer trimtab"),
    ),
    "description cut": (truncate("trimtab.json"), ("trimtab.json is not JSON",)),
    "description a list": (overwrite("trimtab.json", b"[]"), ("trimtab.json",)),
    "description not text": (overwrite("trimtab.json", b"\xff\xfe\x00"), ("trimtab.json is not JSON",)),
    "peft config cut": (truncate("adapter_config.json"), ("adapter_config.json is not JSON",)),
    "no labels": (edit_json("trimtab.json", lambda meta: meta.pop("labels")), ("labels",)),
    "a label less": (edit_json("trimtab.json", lambda meta: meta["labels"].pop()), ("a logit for each label",)),
    "a name less": (edit_json("trimtab.json", lambda meta: meta["labels"][0].pop("names")), ("name",)),
    "no base": (edit_json("trimtab.json", lambda meta: meta.pop("base")), ("base",)),
    "no sha256 of the base": (
        edit_json("trimtab.json", lambda meta: meta["base"].pop("weights_sha256")),
        ("weights_sha256",),
    ),
    "no rank": (edit_json("adapter_config.json", lambda config: config.pop("r")), ("'r'",)),
    "another rank": (edit_json("adapter_config.json", lambda config: config.update(r=4)), ("shape", "(8, 32)")),
    "fewer targets": (
        edit_json("adapter_config.json", lambda config: config["target_modules"].remove("query")),
        (".query.lora_A", "does not belong"),
    ),
    "strange targets": (
        edit_json("adapter_config.json", lambda config: config.update(target_modules=["nothing"])),
        ("nothing",),
    ),
    "strange head": (edit_json("trimtab.json", lambda meta: meta.update(head=["nothing"])), ("nothing",)),
    "an empty folder": (lambda folder: [file.unlink() for file in folder.iterdir()], ("trimtab.json",)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_an_error_that_names_the_thing(copied: Path, damage: str) -> None:
    do, words = DAMAGES[damage]
    do(copied)

    with pytest.raises(ArtefactError) as caught:
        predict.load(copied)

    assert caught.value.exit_code == 7
    assert caught.value.mend
    assert str(copied) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("trimtab.json", lambda meta: meta["labels"].reverse()),
        ("trimtab.json", lambda meta: meta["labels"][0].update(label="2")),
        ("trimtab.json", lambda meta: meta["preprocessing"].update(max_length=31)),
        ("trimtab.json", lambda meta: meta["preprocessing"].update(pad_id=1)),
        ("trimtab.json", lambda meta: meta["preprocessing"].update(keep="ends")),
        ("trimtab.json", lambda meta: meta["probes"][0]["logits"].reverse()),
        ("adapter_config.json", lambda config: config.update(lora_alpha=32)),
        ("adapter_config.json", lambda config: config.update(use_rslora=True)),
    ],
)
def test_what_was_edited_by_hand_is_refused(copied: Path, name: str, edit: Callable[[Any], object]) -> None:
    value = json.loads((copied / name).read_text("utf-8"))
    edit(value)
    (copied / name).write_text(json.dumps(value), "utf-8")
    with pytest.raises(ArtefactError, match=f"{name} is not what training wrote"):
        predict.load(copied)


@pytest.mark.parametrize("trial", tiers(100, 1_000))
def test_no_bit_and_no_length_can_change_without_being_found(copied: Path, trial: int) -> None:
    rng = random.Random(trial)
    file = copied / rng.choice(["adapter_model.safetensors", "adapter_config.json", "trimtab.json", "tokenizer.json"])
    before = file.read_bytes()
    after = bytearray(before[: rng.randrange(len(before))] if rng.random() < 0.3 else before)
    if len(after) == len(before):
        after[rng.randrange(len(after))] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(after))
    if file.name == "trimtab.json" and _says(after) == _says(before):  # blanks between the words
        return
    with pytest.raises(ArtefactError):
        predict.load(copied)


def test_an_adapter_of_before_there_were_sums_of_descriptions_loads(copied: Path) -> None:
    meta = json.loads((copied / "trimtab.json").read_text("utf-8"))
    kept = {key: value for key, value in meta.items() if key not in ("sha256", "config_sha256")}
    (copied / "trimtab.json").write_text(json.dumps(kept), "utf-8")
    predict.load(copied)


@pytest.mark.parametrize("gone", ["sha256", "config_sha256"])
def test_one_sum_without_the_other_is_damage(copied: Path, gone: str) -> None:
    meta = json.loads((copied / "trimtab.json").read_text("utf-8"))
    meta["sha257"] = meta.pop(gone)
    if gone == "config_sha256":
        meta["sha256"] = adapter._digest(meta)
    (copied / "trimtab.json").write_text(json.dumps(meta), "utf-8")
    with pytest.raises(ArtefactError, match="is not what training wrote"):
        predict.load(copied)


def _says(raw: bytes | bytearray) -> object:
    try:
        return json.loads(bytes(raw))
    except ValueError:
        return None


def test_an_adapter_of_plain_peft_is_told_from_ours(place: Path, tmp_path: Path) -> None:
    model = build(make_job(place))[1]
    model.save_pretrained(tmp_path / "plain")

    with pytest.raises(ArtefactError, match="Plain peft wrote this adapter") as caught:
        predict.load(tmp_path / "plain")
    assert caught.value.mend.startswith("trimtab adopt FOLDER --base BASE --names LABEL,LABEL ")


def test_a_run_where_an_adapter_is_expected_says_where_its_adapter_lies(copied: Path, tmp_path: Path) -> None:
    """As in `serve --adapter-dir runs`."""
    run = tmp_path / "runs" / "20260101-000000-reviews"
    run.mkdir(parents=True)
    (run / "recipe.toml").touch()
    with pytest.raises(ArtefactError, match="has no adapter yet") as caught:
        adapter.read(run)
    assert caught.value.mend.startswith("when the run has come to its end: cp -r ")
    shutil.copytree(copied, run / "adapter")
    with pytest.raises(ArtefactError, match="This is a run directory") as caught:
        adapter.read(run)
    assert caught.value.mend == "cp -r RUN/adapter adapters/NAME; or trimtab serve NAME=RUN"
    (run.parent / "latest").symlink_to(run.name)
    with pytest.raises(ArtefactError, match="not an adapter") as caught:
        predict.load(run.parent)
    assert caught.value.mend == "one of the folders in it, such as latest"
    with pytest.raises(ArtefactError, match="not an adapter"):
        adapter._read_json(tmp_path / "gone", "trimtab.json")


@pytest.mark.parametrize("loader", [adapter.read, lambda folder: peft.PeftConfig.from_pretrained(str(folder))])
def test_an_untouched_copy_is_read(copied: Path, loader: Callable[[Path], object]) -> None:
    loader(copied)


# The base


def copy_base(place: Path, folder: Path) -> Path:
    return shutil.copytree(place / "base", folder)


def change_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text("utf-8").replace('"film"', '"filn"'), "utf-8")


def test_a_base_that_was_moved_is_taken_where_it_is_given(place: Path, tmp_path: Path) -> None:
    moved = copy_base(place, tmp_path / "moved")
    read = replace_base(place, name=str(tmp_path / "gone"))

    assert adapter.locate_base(read, str(moved)).folder == moved
    with pytest.raises(BaseModelError) as caught:
        adapter.locate_base(read)
    assert caught.value.exit_code == 4
    assert str(tmp_path / "gone") in str(caught.value)
    assert "--base" in caught.value.mend


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda folder, place: shutil.copy(place / "other" / "model.safetensors", folder), "weights"),
        (lambda folder, place: change_tokenizer(folder), "tokenizer"),
    ],
    ids=["weights", "tokenizer"],
)
def test_another_base_is_refused_whether_given_or_recorded(
    place: Path, tmp_path: Path, change: Callable[[Path, Path], object], part: str
) -> None:
    folder = copy_base(place, tmp_path / "base")
    change(folder, place)

    with pytest.raises(ArtefactError, match=f"the {part} of .* are not the same") as given:
        predict.load(place / "adapter", base=str(folder))
    assert given.value.exit_code == 7
    assert str(folder) in str(given.value)

    with pytest.raises(BaseModelError, match=f"other {part}") as recorded:
        adapter.locate_base(replace_base(place, name=str(folder)))
    assert str(folder) in str(recorded.value)


def test_the_adapter_answers_the_same_over_its_base_without_a_tokenizer(place: Path, tmp_path: Path) -> None:
    """Its own tokenizer travels with it."""
    bare = copy_base(place, tmp_path / "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    text = ["a boring film"]

    here = predict.load(place / "adapter").predict(text)

    assert predict.load(place / "adapter", base=str(bare)).predict(text) == here


@pytest.mark.parametrize("hub_id", [MINILM, ""])
def test_minilm_is_found_in_its_package_when_the_recorded_folder_is_gone(
    place: Path, tmp_path: Path, hub_id: str
) -> None:
    packaged = find_base(MINILM)
    read = replace_base(
        place,
        name=str(tmp_path / "gone"),
        hub_id=hub_id,
        weights_sha256=MINILM_WEIGHTS,
        tokenizer_sha256=packaged.tokenizer_sha256,
    )

    assert adapter.locate_base(read) == replace(packaged, name=MINILM)


def test_a_base_from_the_hub_is_found_in_the_cache_and_everything_tried_is_named_when_not(
    place: Path, tmp_path: Path
) -> None:
    read = replace_base(place, name="owner/base", hub_id="owner/base")
    with pytest.raises(BaseModelError) as caught:
        adapter.locate_base(read)
    assert "owner/base" in caught.value.what
    assert "HF_HUB_OFFLINE" in caught.value.where

    repo = tmp_path / "hub-cache" / "models--owner--base"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    copy_base(place, repo / "snapshots" / ("0" * 40))

    found = adapter.locate_base(read)
    assert (found.source, found.recorded_as) == ("cache", "owner/base")


def replace_base(place: Path, **values: str) -> adapter.Adapter:
    """The adapter, with another record of its base."""
    read = adapter.read(place / "adapter")
    return replace(read, base=read.base | values)
