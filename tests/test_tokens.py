import json
from pathlib import Path

import bases
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trimtab import tokens
from trimtab.errors import ArtefactError, BaseModelError
from trimtab.tokens import Tokenizer

MINILM = bases.minilm_folder()
TEXTS = [
    "",
    " ",
    "A great film!",
    "naïve café, déjà-vu\n\ttwice",
    "这部电影很好看",
    "\U0001f600 \u200b\x00",
    "unbelievably antidisestablishmentarian",
    "[SEP] [MASK] [PAD]",
    "the plot " * 300,
]
CHINESE = ["这部电影非常好看", "剧情无聊，演员也不好"]


@pytest.fixture(scope="module")
def minilm() -> Tokenizer:
    return tokens.from_base(MINILM)


def test_a_text_of_no_tokens_gets_one() -> None:
    encoded = tokens.encode(["", "good film"], from_words(["good", "film"]), 8)
    assert encoded.lengths.tolist() == [1, 2]
    assert not encoded.truncated.any()


@pytest.fixture(scope="module")
def original() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(MINILM), local_files_only=True)


def rows_of(encoded: tokens.Encoded) -> list[list[int]]:
    return [encoded.ids[a:b].tolist() for a, b in zip(encoded.offsets[:-1], encoded.offsets[1:], strict=True)]


def from_words(words: list[str]) -> Tokenizer:
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["[UNK]", *words]))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.normalizer = tokenizers.normalizers.BertNormalizer()
    return Tokenizer(backend.to_str(), 0)


# -- encode ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [3, 16, 256])
def test_ids_are_those_of_transformers(minilm: Tokenizer, original: PreTrainedTokenizerBase, max_length: int) -> None:
    encoded = tokens.encode(TEXTS, minilm, max_length)
    assert rows_of(encoded) == original(TEXTS, truncation=True, max_length=max_length)["input_ids"]
    full = [len(ids) for ids in original(TEXTS, truncation=False)["input_ids"]]
    assert encoded.full_lengths.tolist() == full
    assert encoded.truncated.tolist() == [length > max_length for length in full]


def test_pad_id_and_limit_are_the_bases(minilm: Tokenizer, original: PreTrainedTokenizerBase) -> None:
    assert (minilm.pad_id, minilm.limit) == (original.pad_token_id, original.model_max_length) == (0, 512)


@settings(deadline=None)
@given(texts=st.lists(st.text("ab .,é好", max_size=40), max_size=5), max_length=st.integers(2, 12))
def test_a_text_is_cut_on_its_right_between_its_special_tokens(
    minilm: Tokenizer, texts: list[str], max_length: int
) -> None:
    whole = [encoding.ids for encoding in minilm.backend.encode_batch(texts)]
    encoded = tokens.encode(texts, minilm, max_length)
    assert rows_of(encoded) == [ids if len(ids) <= max_length else [*ids[: max_length - 1], ids[-1]] for ids in whole]
    assert encoded.full_lengths.tolist() == [len(ids) for ids in whole]
    assert len(encoded) == len(texts)
    assert (encoded.lengths <= max_length).all()


@settings(deadline=None)
@given(texts=st.lists(st.text("ab .,é好", max_size=40), max_size=5), max_length=st.integers(2, 12))
def test_a_text_whose_ends_are_kept_loses_its_middle(minilm: Tokenizer, texts: list[str], max_length: int) -> None:
    whole = [encoding.ids for encoding in minilm.backend.encode_batch(texts)]
    encoded = tokens.encode(texts, minilm, max_length, keep="ends")
    first = (max_length - 2) // 4
    last = max_length - 2 - first
    assert rows_of(encoded) == [
        ids if len(ids) <= max_length else [*ids[: 1 + first], *ids[len(ids) - 1 - last : -1], ids[-1]] for ids in whole
    ]
    assert encoded.full_lengths.tolist() == [len(ids) for ids in whole]


def test_types_and_labels(minilm: Tokenizer) -> None:
    encoded = tokens.encode(["a", "", "b c"], minilm, 16, [2, 0, 1])
    assert [encoded.ids.dtype, encoded.offsets.dtype, encoded.labels.dtype, encoded.full_lengths.dtype] == [
        np.int32, np.int64, np.int64, np.int64,
    ]  # fmt: skip
    assert encoded.labels.tolist() == [2, 0, 1]
    assert encoded.lengths.tolist() == [3, 2, 4]
    assert tokens.encode(["a", "b"], minilm, 16).labels.tolist() == [-1, -1]


def test_no_text_at_all(minilm: Tokenizer) -> None:
    encoded = tokens.encode([], minilm, 16)
    assert (len(encoded), encoded.ids.tolist(), encoded.offsets.tolist()) == (0, [], [0])


def test_the_order_holds_over_chunks(minilm: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a " * (i % 5) for i in range(23)]
    whole = tokens.encode(texts, minilm, 4)
    monkeypatch.setattr(tokens, "_CHUNK", 4)
    chunked = tokens.encode(texts, minilm, 4)
    assert rows_of(chunked) == rows_of(whole)
    assert chunked.full_lengths.tolist() == whole.full_lengths.tolist()


@pytest.mark.parametrize(
    ("words", "most", "length"),
    [
        ([5] * 100, 256, 32),
        ([30] * 100, 256, 32),
        ([31] * 100, 256, 64),
        ([5] * 199 + [200], 256, 32),
        ([5] * 90 + [200] * 10, 256, 224),
        ([5] * 90 + [400] * 10, 256, 256),
        ([40] * 10, 50, 50),
    ],
)
def test_fitting_length(minilm: Tokenizer, words: list[int], most: int, length: int) -> None:
    assert tokens.fitting_length(["film " * count for count in words], minilm, most=most) == length


# -- scripts ---------------------------------------------------------------------------------------------------


def test_chinese_under_an_english_vocabulary_is_warned_of(minilm: Tokenizer) -> None:
    warning = tokens.foreign_script(CHINESE, minilm)
    assert "100% of the texts are Chinese" in warning
    assert "unknown" in warning
    assert "--base bert-base-chinese" in warning


def test_chinese_in_bytes_is_warned_of(tmp_path: Path) -> None:
    warning = tokens.foreign_script(CHINESE, tokens.from_base(bases.write_base(tmp_path, "roberta")))
    assert "3." in warning
    assert "pieces" in warning


def test_short_texts_under_a_vocabulary_that_holds_them_are_not(tmp_path: Path) -> None:
    folder = bases.write_base(tmp_path, "bert")  # [CLS] and [SEP] around every text
    made = json.loads(tokens.from_base(folder).json)
    made["model"]["vocab"] |= {char: 10_000 + i for i, char in enumerate("好吃难很不错！。")}
    assert tokens.foreign_script(["好吃！", "难吃。", "很好", "不错！"], Tokenizer(json.dumps(made), 0)) == ""


def test_chinese_under_a_vocabulary_that_holds_it_is_not() -> None:
    assert tokens.foreign_script(CHINESE, from_words(list("".join(CHINESE)))) == ""


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("好\u3400\ufa30\U00020000", "Chinese"),
        ("とてもカワイイ", "Japanese"),
        ("정말 \u1100", "Korean"),
        ("Отличный фильм", "Cyrillic"),
        ("ταινία", "Greek"),
        ("فيلم رائع", "Arabic"),
        ("סרט נהדר", "Hebrew"),
        ("फिल्म", "Devanagari"),
        ("หนังดี", "Thai"),
        ("ფილმი", "of another script"),
    ],
)
def test_the_script_is_named(text: str, script: str) -> None:
    assert tokens.foreign_script([text], from_words([])).startswith(f"100% of the texts are {script}, ")


def test_a_tenth_of_the_texts_in_another_script_is_enough(minilm: Tokenizer) -> None:
    english = ["a great film"] * 900
    assert tokens.foreign_script([*english, *CHINESE[:1] * 99], minilm) == ""
    assert tokens.foreign_script([*english, *CHINESE[:1] * 101], minilm).startswith("10% of the texts are Chinese")


def test_the_sample_reaches_the_end_of_the_file(minilm: Tokenizer) -> None:
    texts = ["a great film"] * 1_000 + CHINESE[:1] * 999
    assert tokens.foreign_script(texts, minilm).startswith("50% of the texts are Chinese")


@pytest.mark.parametrize(
    "texts",
    [
        [],
        [""],
        ["123 !!"],
        ["A great film", "dull"],
        ["Ein schöner Film, très drôle"],
        ["Phim rất hay, cảm động"],
        ["a great film by 李安"],
    ],
)
def test_english_and_its_like_is_not(minilm: Tokenizer, texts: list[str]) -> None:
    assert tokens.foreign_script(texts, minilm) == ""


# -- from a base, to and from a folder -------------------------------------------------------------------------


def test_a_base_without_a_pad_token_pads_with_something_it_knows(tmp_path: Path) -> None:
    tokenizer = tokens.from_base(bases.write_decoder(tmp_path))
    assert 0 <= tokenizer.pad_id < tokenizer.backend.get_vocab_size()


def test_a_base_that_states_no_limit(tmp_path: Path) -> None:
    assert tokens.from_base(bases.write_base(tmp_path, "deberta-v2")).limit == 0


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BaseModelError) as caught:
        tokens.from_base(tmp_path)
    assert caught.value.exit_code == 4
    assert str(tmp_path) in str(caught.value)
    assert "tokenizer.json" in caught.value.mend


def test_it_travels_with_the_adapter(minilm: Tokenizer, tmp_path: Path) -> None:
    tokens.save(minilm, MINILM, tmp_path)
    loaded = tokens.load(tmp_path, minilm.pad_id, minilm.sha256)
    assert rows_of(tokens.encode(TEXTS, loaded, 16)) == rows_of(tokens.encode(TEXTS, minilm, 16))
    assert (tmp_path / "tokenizer_config.json").read_bytes() == (MINILM / "tokenizer_config.json").read_bytes()
    again = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    assert again(TEXTS)["input_ids"] == rows_of(tokens.encode(TEXTS, minilm, 10_000))


def test_another_tokenizer_is_refused(minilm: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"lost its tokenizer\.json") as caught:
        tokens.load(tmp_path, 0, minilm.sha256)
    assert caught.value.exit_code == 7
    tokens.save(from_words(["a"]), MINILM, tmp_path)
    with pytest.raises(ArtefactError, match="not the one"):
        tokens.load(tmp_path, 0, minilm.sha256)
