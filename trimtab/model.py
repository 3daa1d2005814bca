"""The base model with LoRA in it: loading, the head, target modules, the parameter report.

Uses transformers for the model and peft for LoRA. The head is whatever the load report says the base did not
bring; it is trained in full and saved.
"""

import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification

from trimtab.config import LoraSettings
from trimtab.errors import BaseModelError, RecipeError, did_you_mean, some

_BERT = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")

# The linear layers inside the blocks of each architecture, as suffixes of module names; first the query, then the
# value. `output.dense` also matches `attention.output.dense`; both stand here so that a list can be copied and cut.
LINEAR_LAYERS: dict[str, tuple[str, ...]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "distilbert": ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
    "albert": ("query", "key", "value", "attention.dense", "ffn", "ffn_output"),
    "mpnet": ("attn.q", "attn.k", "attn.v", "attn.o", "intermediate.dense", "output.dense"),
    "deberta-v2": (
        "query_proj",
        "key_proj",
        "value_proj",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
    "modernbert": ("Wqkv", "attn.Wo", "Wi", "mlp.Wo"),
}
QUERY_VALUE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "albert"), ("query", "value")),
    "distilbert": ("q_lin", "v_lin"),
    "mpnet": ("attn.q", "attn.v"),
    "deberta-v2": ("query_proj", "value_proj"),
    "modernbert": ("Wqkv",),
}


@dataclass(frozen=True)
class LoadedBase:
    """A base model as transformers loaded it, and what it did not bring."""

    model: Any
    """transformers' PreTrainedModel for sequence classification."""
    new_parameters: frozenset[str]
    """Names of the parameters that were newly initialised or had another size: they must be trained and saved."""


@dataclass(frozen=True)
class Parameters:
    """The parameter report: counts before and after injection."""

    base: int
    """Parameters of the base model with its head; full fine-tuning would train them all."""
    total: int
    lora: int
    head: int
    layers: dict[str, dict[str, int]]
    """For each adapted weight: rows out, columns in, weights out x in, and lora r x (in + out)."""

    @property
    def trainable(self) -> int:
        """LoRA and head."""
        return self.lora + self.head

    def as_dict(self) -> dict[str, Any]:
        """For `--json` and events."""
        return {
            **asdict(self),
            "trainable": self.trainable,
            "trainable_pct": 100 * self.trainable / self.total,
            "lora_pct": 100 * self.lora / self.total,
        }


def load_config(folder: Path, *, num_labels: int, dropout: float | str, pad_id: int) -> Any:
    """The base's config with our number of labels, and the base's dropout set where it is a number.

    Raises:
        BaseModelError: the config is not one that transformers knows.
    """
    try:
        config = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, num_labels=num_labels
        )
    except Exception as error:
        raise BaseModelError(
            "base.config",
            f"transformers {transformers.__version__} cannot read this base's config: {_first_line(error)}",
            where=str(folder / "config.json"),
            mend="is it a text model of a released architecture? Models with code of their own are not run",
        ) from error
    # A decoder's answer is read from the last token before the padding: it must be the padding that we write. An
    # encoder's position table may depend on its own pad id (RoBERTa), so that stays.
    if config.pad_token_id is None or config.model_type not in LINEAR_LAYERS:
        config.pad_token_id = pad_id
    if isinstance(dropout, float):
        _set_dropout(config, dropout)
    return config


def _set_dropout(config: Any, dropout: float) -> None:
    """Sets the base's dropout and leaves the head's as it was: the head falls back to the base's where it has none."""
    hidden = next((getattr(config, name) for name in ("hidden_dropout_prob", "dropout") if hasattr(config, name)), 0.0)
    for head in ("classifier_dropout", "classifier_dropout_prob"):
        if hasattr(config, head) and getattr(config, head) is None:
            setattr(config, head, hidden)
    for name in (
        *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "hidden_dropout"),
        *("embedding_dropout", "mlp_dropout", "activation_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
    ):
        if hasattr(config, name):
            setattr(config, name, dropout)


def load_base(folder: Path, config: Any) -> LoadedBase:
    """Loads the base in float32 with a fresh head, from safetensors only and without any code of its own.

    The head is drawn from torch's generator: seed it first.

    Raises:
        BaseModelError: the architecture has no sequence classification, or the weights do not fit.
    """
    try:
        with _quiet():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                str(folder),
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise BaseModelError(
            "base.load",
            f"This base cannot be loaded for sequence classification: {_first_line(error)}",
            where=str(folder),
            mend="choose a base that transformers' AutoModelForSequenceClassification can load",
        ) from error
    mismatched = [item[0] if isinstance(item, tuple) else item for item in report["mismatched_keys"]]
    return LoadedBase(model, frozenset([*report["missing_keys"], *mismatched]))


def empty_model(config: Any) -> Any:
    """The model of a config without weights (torch's meta device): names and shapes only, in milliseconds."""
    with torch.device("meta"), _quiet():
        return AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)


def outside_blocks(model: Any) -> frozenset[str]:
    """Parameters beside the base proper: the head of a base that already brought one."""
    prefix = model.base_model_prefix + "."
    return frozenset(name for name, _ in model.named_parameters() if not name.startswith(prefix))


def head_modules(model: Any, new_parameters: Iterable[str], also: Sequence[str] = ()) -> list[str]:
    """The largest modules that hold new parameters and no old one, and those of `also`: trained in full and saved.

    A base that brought a whole head keeps it as the start: then everything beside the base proper is the head.

    Raises:
        BaseModelError: a new parameter stands directly beside old ones, so that no module can be saved for it.
        RecipeError: a module of `also` does not exist.
    """
    names = {name for name, _ in model.named_parameters()}
    new = set(new_parameters) & names or outside_blocks(model)
    modules = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    if unknown := [name for name in also if name not in modules]:
        raise RecipeError(
            "lora.modules_to_save",
            f"There is no module {some(unknown)}.{did_you_mean(unknown[0], modules)}",
            where="lora.modules_to_save",
            mend=f"full names, such as {modules[-1]}",
        )
    # Blocks or embeddings that the base proper lacks are damage, not a head.
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    prefix = model.base_model_prefix + "."
    if absent := [
        name
        for name, parameter in model.named_parameters()
        if name in new
        and name.startswith(prefix)
        and (id(parameter) in embeddings or any(part.isdigit() for part in name.split(".")))
    ]:
        raise BaseModelError(
            "base.incomplete_layers",
            f"The base does not bring {some(absent)}, which its config.json promises.",
            mend="the weights belong to another architecture, or the file is incomplete: fetch the base again",
        )
    head: list[str] = []
    for name in modules:
        inside = {parameter for parameter in names if parameter.startswith(name + ".")}
        # peft takes every module whose name ends so, whatever it is told, when the task is classification.
        peft_takes_it = name.endswith(("classifier", "score"))
        if ((inside and inside <= new) or peft_takes_it or name in also) and not any(
            name.startswith(m + ".") for m in head
        ):
            head.append(name)
    if lost := sorted(name for name in new if not any(name.startswith(m + ".") for m in head)):
        raise BaseModelError(
            "base.incomplete_layers",
            f"The base does not bring {some(lost)}, which stand inside layers that it does bring.",
            mend="the weights belong to another architecture, or the file is incomplete: fetch the base again",
        )
    return head


def resolve_targets(model: Any, wanted: str | Sequence[str], head: Sequence[str]) -> tuple[str, ...]:
    """Names of the weights that get LoRA: a preset resolved for this architecture, or names that must all exist.

    Raises:
        RecipeError: a name matches nothing, or the architecture has no preset; the message lists what it has.
    """
    linear = linear_layers(model, head)
    kind = model.config.model_type
    if isinstance(wanted, str) and not linear:
        raise RecipeError(
            "lora.target_modules",
            f"{kind} has no torch.nn.Linear in its blocks, so nothing that LoRA could stand beside.",
            where="lora.target_modules",
            mend="choose another base",
        )
    if wanted == "all-linear":
        return LINEAR_LAYERS.get(kind) or linear
    if wanted == "query-value":
        preset = QUERY_VALUE.get(kind) or peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(
            kind
        )
        if not preset:
            raise RecipeError(
                "lora.target_modules",
                f"query-value is not known for {kind}. This model has: {some(linear, 40)}.",
                where="lora.target_modules",
                mend=f"--set lora.target_modules={linear[0]} or all-linear",
            )
        return tuple(preset)
    names = list(_linears(model, head))
    known = [*linear, *(name.rpartition(".")[2] for name in linear)]
    wrong = [w for w in wanted if not any(name == w or name.endswith("." + w) for name in names)]
    if wrong or not wanted:
        raise RecipeError(
            "lora.target_modules",
            f"{some(wrong) or 'An empty list'} matches no weight of {type(model).__name__}. "
            f"This model has: {some(linear, 40)}." + (did_you_mean(wrong[0], known) if wrong else ""),
            where="lora.target_modules",
            mend="--set lora.target_modules=query-value picks the right names for this base",
        )
    return tuple(wanted)


def linear_layers(model: Any, head: Sequence[str]) -> tuple[str, ...]:
    """Suffixes of the linear layers inside the blocks: what follows the block's number in their names."""
    suffixes: dict[str, None] = {}
    for name in _linears(model, head):
        parts = name.split(".")
        if numbers := [i for i, part in enumerate(parts) if part.isdigit()]:
            suffixes[".".join(parts[numbers[-1] + 1 :])] = None
    return tuple(suffixes)


def adapted(model: Any, targets: Sequence[str], head: Sequence[str]) -> dict[str, torch.nn.Linear]:
    """The modules that targets stand for, by full name: those whose names end so, as peft matches them."""
    return {
        name: module
        for name, module in _linears(model, head).items()
        if any(name == target or name.endswith("." + target) for target in targets)
    }


def on_layers(model: Any, targets: Sequence[str], lora: LoraSettings, head: Sequence[str]) -> tuple[str, ...]:
    """The targets as peft is told them: as they are for all layers; for the top ones the full name of each module.

    peft has `layers_to_transform` for this, but looks for it in names of its own list of patterns; a full name can mean
    one module only.

    Raises:
        RecipeError: the base has no blocks that could be counted, or fewer, or no target stands in the top ones.
    """
    if not lora.top:
        return tuple(targets)
    places = {name: found for name in _linears(model, head) if (found := _IN_BLOCK.match(name))}
    roots, numbers = ({found.group(part) for found in places.values()} for part in (1, 2))
    blocks, kind = len(numbers), model.config.model_type
    layers = int(getattr(model.config, "num_hidden_layers", 0) or blocks)
    mend = "--set lora.layers=all"
    if len(roots) != 1 or set(map(int, numbers)) != set(range(blocks)):
        problem = f"The layers of {kind} are not numbered in one row, so none of them is the top"
    elif blocks < layers:
        problem = f"{kind} computes {layers} layers with the weights of {blocks}, so LoRA on one would be LoRA on all"
    elif lora.top > blocks:
        problem = f"{kind} has {blocks} layers here, and {lora.top} were asked for"
        mend = f"--set lora.layers=top:{blocks}, or fewer"
    else:
        lowest = blocks - lora.top
        inside = adapted(model, targets, head).keys() & places.keys()
        if names := [name for name in places if name in inside and int(places[name].group(2)) >= lowest]:
            return tuple(names)
        problem = f"None of {some(targets)} stands in the top {lora.top} of {blocks} layers"
    raise RecipeError("lora.layers", f"{problem}.", where=f"lora.layers = {lora.layers}", mend=mend)


def by_layers(model: Any, targets: Sequence[str], head: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """`target_modules` and `layers` of a recipe, from the targets that an adapter knows: `on_layers` backwards."""
    names = adapted(model, targets, head)
    if set(names) != set(targets):
        return tuple(targets), "all"
    found = [_IN_BLOCK.match(name) for name in names]
    numbers = sorted({int(one.group(2)) for one in found if one})
    suffixes = tuple(dict.fromkeys(one.group(3) for one in found if one))
    lora = LoraSettings(layers=f"top:{max(1, len(numbers))}")
    try:
        same = set(on_layers(model, suffixes, lora, head)) == set(names)
    except RecipeError:
        same = False
    return (suffixes, lora.layers) if same else (tuple(targets), "all")


def lowest_block(model: Any, targets: Sequence[str], head: Sequence[str]) -> int:
    """The number of the lowest block with a target in it; 0 where one stands in no block."""
    found = [_IN_BLOCK.match(name) for name in adapted(model, targets, head)]
    return min((int(one.group(2)) if one else 0 for one in found), default=0)


_IN_BLOCK = re.compile(r"((?:[^.]+\.)*?)(\d+)\.(.+)")
"""What stands before the number of a block, the number, and what follows."""


def _linears(model: Any, head: Sequence[str]) -> dict[str, torch.nn.Linear]:
    """Every torch.nn.Linear outside the head, by full name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not any(name == m or name.startswith(m + ".") for m in head)
    }


def inject(model: Any, lora: LoraSettings, targets: Sequence[str], head: Sequence[str], base_name: str) -> Any:
    """Puts LoRA beside the targets and marks the head for training, through peft; returns peft's model.

    A is drawn from torch's generator: seed it first. B is zero, so the model's answers do not change yet.

    Raises:
        RecipeError: peft trains other modules than it was told to.
    """
    config = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=list(targets),
        modules_to_save=list(head),
        use_rslora=lora.variant == "rslora",
        use_dora=lora.variant == "dora",
        base_model_name_or_path=base_name,
    )
    with _quiet():
        injected = peft.get_peft_model(model, config)
    # From 20 names on, peft shortens the list to the shortest endings that mean the same; which, depends on the others.
    injected.peft_config["default"].target_modules = set(targets)
    # peft matches modules by the end of their names; a stray match would train and save something else.
    told = {f"base_model.model.{name}" for name in head}
    done = {name for name, module in injected.named_modules() if isinstance(module, peft.utils.ModulesToSaveWrapper)}
    if done != told:
        raise RecipeError(
            "lora.modules_to_save",
            f"peft trains {some(sorted(done))} in full, expected {some(sorted(told))}.",
            where="lora.modules_to_save",
            mend="--set lora.modules_to_save=auto",
        )
    return injected


def count(model: Any, lora: LoraSettings, targets: Sequence[str], head: Sequence[str]) -> Parameters:
    """The parameter report of a model before injection, in closed form: r x (in + out) for each adapted weight."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    layers: dict[str, dict[str, int]] = {}
    for name, module in adapted(model, targets, head).items():
        rows, columns = module.weight.shape
        # DoRA adds one magnitude for each row of W (Liu et al. 2024, arXiv 2402.09353).
        extra = rows if lora.variant == "dora" else 0
        layers[name] = {
            "out": rows,
            "in": columns,
            "weights": rows * columns,
            "lora": lora.r * (rows + columns) + extra,
        }
    base = sum(sizes.values())
    head_size = sum(size for name, size in sizes.items() if any(name.startswith(m + ".") for m in head))
    lora_size = sum(layer["lora"] for layer in layers.values())
    return Parameters(base, base + lora_size + head_size, lora_size, head_size, layers)


def longest_input(model: Any) -> int:
    """The most tokens that the position table takes; 0 where there is none.

    RoBERTa and its kin start counting behind the pad id, so that 514 rows serve 512 tokens; their table says so by
    its padding_idx.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            return int(module.num_embeddings - offset)
    return int(getattr(model.config, "max_position_embeddings", 0) or 0)


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters that training changes, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' progress bars and its load report off the screen: the head is new by design, and told."""
    logger = logging.getLogger("transformers")
    level = logger.level
    bars = transformers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # peft calls what transformers has renamed; that is between the two of them.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
