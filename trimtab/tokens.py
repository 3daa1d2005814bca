"""Texts -> token ids: the one encode function of training, evaluation, prediction and whatever serves them.

A tokenizer here is the text of a `tokenizer.json` and a pad id. It is read from the base once, when training
starts, and travels with the adapter from then on. Knows nothing of labels' meaning or of torch.
"""

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from trimtab import durable, interrupts
from trimtab.config import Keep
from trimtab.errors import ArtefactError, BaseModelError
from trimtab.hub import tokenizer_sha256

_CHUNK = 2_000  # texts a call: enough for the library's threads, small enough that encodings do not pile up


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as data."""

    json: str
    pad_id: int
    limit: int = 0
    """The most tokens that the base says it takes; 0: it does not say."""

    @cached_property
    def backend(self) -> tokenizers.Tokenizer:
        """The library's object, without the truncation and padding that a file may bring along."""
        backend = tokenizers.Tokenizer.from_str(self.json)  # 0.1 s for MiniLM's, in which no other thread runs
        backend.no_padding()
        backend.no_truncation()
        return backend

    @cached_property
    def sha256(self) -> str:
        """Of the text of tokenizer.json."""
        return hashlib.sha256(self.json.encode()).hexdigest()

    def is_like(self, other: "Tokenizer") -> bool:
        """Whether both make the same tokens: the same files, but for settings that are false or null and not written.

        What the library writes of one tokenizer has grown with its versions (`"ignore_merges": false`).
        """
        try:
            return self.sha256 == other.sha256 or bool(self._settings == other._settings)
        except (ValueError, RecursionError):
            return False

    @cached_property
    def _settings(self) -> Any:
        return _without_defaults(json.loads(self.json))


def _without_defaults(said: Any) -> Any:
    if isinstance(said, list):
        return [_without_defaults(one) for one in said] if any(isinstance(one, dict) for one in said) else said
    if not isinstance(said, dict):
        return said
    kept = {key: _without_defaults(value) for key, value in said.items()}
    return {key: value for key, value in kept.items() if value is not None and value is not False}


@dataclass(frozen=True)
class Encoded:
    """Token ids of n texts, end to end.

    ids int32[N], offsets int64[n + 1], labels int64[n] (-1: unlabelled), full_lengths int64[n]: tokens before cutting.
    """

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    full_lengths: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each text, after cutting: int64[n]."""
        return np.diff(self.offsets)

    @property
    def truncated(self) -> npt.NDArray[np.bool_]:
        """Whether a text was cut: bool[n]."""
        return self.full_lengths > self.lengths

    def only(self, rows: npt.NDArray[np.int64]) -> "Encoded":
        """Some of the texts, in the order of `rows`."""
        pieces = [self.ids[self.offsets[row] : self.offsets[row + 1]] for row in rows]
        ends = np.cumsum(self.lengths[rows])
        return Encoded(
            ids=np.concatenate(pieces) if pieces else self.ids[:0],
            offsets=np.concatenate([np.zeros(1, np.int64), ends]),
            labels=self.labels[rows],
            full_lengths=self.full_lengths[rows],
        )


def encode(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    max_length: int,
    labels: Sequence[int] | None = None,
    *,
    keep: Keep = "start",
) -> Encoded:
    """Encodes texts with the base's special tokens, each cut to `max_length` tokens.

    `keep` says what is left of a longer text: its start; or both ends, a quarter of what is kept from the first and
    three from the last (head + tail: Sun et al. 2019, arXiv 1905.05583).
    """
    pieces: list[npt.NDArray[np.int32]] = []
    full: list[int] = []
    for start in range(0, len(texts), _CHUNK):
        interrupts.check()
        for encoding in tokenizer.backend.encode_batch_fast(list(texts[start : start + _CHUNK])):
            ids = np.array(encoding.ids, np.int32)
            full.append(len(ids))
            # Not the library's truncation: that is a state of its object, which threads would switch for one another.
            if (excess := len(ids) - max_length) > 0:
                of_the_text = np.flatnonzero(np.array(encoding.special_tokens_mask) == 0)
                kept = max(0, len(of_the_text) - excess)
                begin = kept if keep == "start" else kept // 4
                ids = np.delete(ids, of_the_text[begin : begin + excess])
            # A base without special tokens makes none of an empty text, and a forward needs one.
            pieces.append(ids if len(ids) else np.array([tokenizer.pad_id], np.int32))
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    return Encoded(
        ids=np.concatenate(pieces) if pieces else np.zeros(0, np.int32),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        labels=np.full(len(pieces), -1, np.int64) if labels is None else np.array(labels, np.int64),
        full_lengths=np.array(full, np.int64),
    )


def fitting_length(texts: Sequence[str], tokenizer: Tokenizer, *, most: int) -> int:
    """The smallest multiple of 32 tokens, at most `most`, under which 99 of 100 texts stay whole."""
    lengths = encode(texts, tokenizer, 1 << 30).full_lengths
    return int(min(most, 32 * np.ceil(np.percentile(lengths, 99) / 32)))


def unknown_tokens(encoded: Encoded, tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """How many tokens of each text the base does not know: int64[n]; none where its tokens are bytes."""
    model: Any = tokenizer.backend.model
    unknown = tokenizer.backend.token_to_id(getattr(model, "unk_token", None) or "")
    if unknown is None:
        return np.zeros(len(encoded), np.int64)
    of_text = np.repeat(np.arange(len(encoded)), encoded.lengths)
    return np.bincount(of_text[encoded.ids == unknown], minlength=len(encoded))


def foreign_script(texts: Sequence[str], tokenizer: Tokenizer) -> str:
    """A warning where the base's vocabulary does not cover the script of a tenth of the texts, else an empty string.

    Judged by what the tokenizer makes of the texts in that script: more than 3 % unknown tokens, or more than 1.5
    tokens for each character (byte pieces). English texts under an English base stand near 0 % and far below 1.
    """
    sample = [texts[i] for i in np.linspace(0, len(texts) - 1, min(len(texts), 1_000)).astype(int)]
    of_script: dict[str, list[str]] = {}
    for text in sample:
        letters = Counter(_script(char) for char in text if char.isalpha())
        if letters:
            of_script.setdefault(letters.most_common(1)[0][0], []).append(text)
    of_script.pop("Latin", None)
    script, foreign = max(of_script.items(), key=lambda found: len(found[1]), default=("", []))
    if len(foreign) < 0.1 * len(sample) or not foreign:
        return ""
    encoded = encode(foreign, tokenizer, 1 << 30)
    unknown_share = float(unknown_tokens(encoded, tokenizer).sum() / len(encoded.ids))
    special = len(foreign) * tokenizer.backend.num_special_tokens_to_add(is_pair=False)
    per_character = (len(encoded.ids) - special) / sum(not char.isspace() for text in foreign for char in text)
    if unknown_share <= 0.03 and per_character <= 1.5:
        return ""
    found = (
        f"{unknown_share:.0%} of their tokens are unknown to it"
        if unknown_share > 0.03
        else f"it cuts a character into {per_character:.1f} pieces"
    )
    return (
        f"{len(foreign) / len(sample):.0%} of the texts are {script}, and this base was not made for them ({found}). "
        "A base for that language will do better: --base bert-base-chinese or --base xlm-roberta-base"
    )


def _script(char: str) -> str:
    """The script of a letter, as far as warnings need it."""
    code = ord(char)
    for name, ranges in _SCRIPTS.items():
        if any(low <= code <= high for low, high in ranges):
            return name
    return "Latin" if code < 0x0250 or 0x1E00 <= code < 0x1F00 else "of another script"


_SCRIPTS = {
    "Chinese": [(0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)],
    "Japanese": [(0x3040, 0x30FF)],
    "Korean": [(0x1100, 0x11FF), (0xAC00, 0xD7AF)],
    "Cyrillic": [(0x0400, 0x052F)],
    "Greek": [(0x0370, 0x03FF)],
    "Arabic": [(0x0600, 0x06FF), (0x0750, 0x077F)],
    "Hebrew": [(0x0590, 0x05FF)],
    "Devanagari": [(0x0900, 0x097F)],
    "Thai": [(0x0E00, 0x0E7F)],
}


def from_base(folder: Path) -> Tokenizer:
    """The tokenizer of a base model, as transformers loads it: that is what the base was trained with.

    Raises:
        BaseModelError: the folder has none, or none with a fast form.
    """
    from transformers import AutoTokenizer

    mend = "put tokenizer.json and tokenizer_config.json of this model beside its weights"
    if not tokenizer_sha256(folder):  # transformers would make one that knows no word
        raise BaseModelError("base.tokenizer", "The base has no tokenizer.", where=str(folder), mend=mend)
    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly anything here
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BaseModelError(
            "base.tokenizer", f"The base's tokenizer cannot be loaded: {reason}", where=str(folder), mend=mend
        ) from error
    if not hasattr(loaded, "backend_tokenizer"):
        raise BaseModelError(
            "base.slow_tokenizer",
            f"{type(loaded).__name__} is written in Python and has no tokenizer.json form.",
            where=str(folder),
            mend="choose a base with a tokenizer.json",
        )
    backend = loaded.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    # Decoders have no pad token; their end-of-text token is never read behind the mask.
    pad = next((i for i in (loaded.pad_token_id, loaded.eos_token_id, 0) if i is not None), 0)
    limit = loaded.model_max_length if loaded.model_max_length < 1_000_000 else 0
    return Tokenizer(backend.to_str(), pad, limit)


def save(tokenizer: Tokenizer, base_folder: Path, folder: Path) -> None:
    """Writes the tokenizer's own files: tokenizer.json as it is used here, the base's others as they are."""
    durable.write_bytes(folder / "tokenizer.json", tokenizer.json.encode())
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        with contextlib.suppress(FileNotFoundError):
            durable.write_bytes(folder / name, (base_folder / name).read_bytes())


_MOST_TOKENS = 10_000_000  # the largest vocabularies have 260,000
_LONG_NUMBER = re.compile(rb":\s*\d{8,}")  # only then the file is looked into, not at every start


def load(folder: Path, pad_id: int, sha256: str, expected: Tokenizer | None = None) -> Tokenizer:
    """Reads the tokenizer of an adapter folder.

    Args:
        folder: The adapter's folder.
        pad_id: What the adapter says of padding.
        sha256: Of the tokenizer that it was trained with.
        expected: What it is only to be compared with, and never used: one that is much longer is not read.

    Raises:
        ArtefactError: it is missing, not the one that the adapter was trained with, too long, or numbers tokens beyond
            any base.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ArtefactError(
            "adapter.incomplete",
            "The adapter has lost its tokenizer.json.",
            where=str(folder),
            mend="copy the whole folder again",
        )
    if expected is not None and (size := file.stat().st_size) > 1.25 * len(expected.json.encode()) + 65_536:
        raise ArtefactError(
            "adapter.other_tokenizer",
            f"This adapter was trained with another tokenizer than the base's: it has {size:,} bytes.",
            where=str(file),
            mend="trimtab predict answers with it",
        )
    data = file.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ArtefactError(
            "adapter.tokenizer",
            "tokenizer.json is not the one that this adapter was trained with.",
            where=f"{file}: sha256 {found[:12]}, expected {sha256[:12]}",
            mend="copy the whole adapter folder again",
        )
    if expected is None and _LONG_NUMBER.search(data) and (largest := _largest_id(json.loads(data))) >= _MOST_TOKENS:
        raise ArtefactError(
            "adapter.tokenizer",
            f"tokenizer.json numbers a token {largest:,}, and no base has so many vectors.",
            where=str(file),
            mend="copy the whole adapter folder again",
        )
    return Tokenizer(data.decode(), pad_id)


def _largest_id(said: Any) -> int:
    """The largest number of a token in a tokenizer.json; the library would make a table of that many."""
    words = said.get("model", {}).get("vocab")
    ids = [*words.values()] if isinstance(words, dict) else []
    ids += [token["id"] for token in said.get("added_tokens") or ()]
    return max((number for number in ids if isinstance(number, int)), default=0)
