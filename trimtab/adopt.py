"""An adapter that plain peft trained -> one of ours: with labels, the sums of its base, its tokenizer and probes.

What peft writes knows neither its labels nor which files its base had; both are told here, once, and from then on
checked. Nothing is guessed: an answer layer that was not saved, or a tensor that does not fit, is an error.
"""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from trimtab import adapter, hub, tokens, untrusted
from trimtab.adapter import PROBES, described_lora, probe
from trimtab.classification import LONGEST_SERVED_LABEL, Labels, softmax
from trimtab.config import LoraSettings, RuntimeSettings, read_names
from trimtab.device import place
from trimtab.errors import ArtefactError, BaseModelError, RecipeError, ResourceError, did_you_mean, quoted, some
from trimtab.fast import encoder
from trimtab.forward import choose, stock
from trimtab.hub import Base
from trimtab.tokens import Tokenizer

_CONFIG = "adapter_config.json"
_PEFT = "base_model.model."
_LAST_LAYERS = (".classifier.weight", ".classifier.out_proj.weight", ".score.weight")
"""Where transformers' classifiers keep their last layer: [labels, width]."""

# Keys that are read here, or say how an adapter was trained and not what it answers. Any other key, of this peft or of
# a later one, must be off.
_KNOWN_KEYS = {
    *("peft_type", "task_type", "bias", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save"),
    *("use_rslora", "use_dora", "init_lora_weights", "base_model_name_or_path", "revision", "auto_mapping"),
    *("inference_mode", "peft_version", "layers_pattern", "megatron_core", "loftq_config", "eva_config"),
    *("qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
# The others (pissa, olora, corda, loftq, lora_ga) take a part of W out of the base, which is not in its files.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

_WHAT_CAN_BE = (
    "LoRA, rsLoRA or DoRA with one r and one lora_alpha, bias='none', a list of target_modules and "
    'task_type="SEQ_CLS" can be adopted: train it again so; plain peft goes on loading this one'
)


@dataclass(frozen=True)
class Adopted:
    """What came of it."""

    folder: Path
    base: Base
    labels: Labels
    max_length: int
    cut_by: str
    """Where that length comes from."""
    tokenizer_from: Path
    difference: float
    """The largest, between the logits of the probe sentences under peft and transformers and those that are stored."""
    answers: tuple[tuple[str, int, float], ...]
    """Probe sentences, the label of each and its score: whether the labels are in their order is seen by these."""
    is_served: bool
    """Whether `trimtab serve` takes it: a base of the BERT family with its own tokenizer, LoRA inside its layers."""


def adopt(
    source: str | Path,
    out: str | Path | None = None,
    *,
    names: str | None = None,
    base: str | None = None,
    max_length: int | None = None,
    runtime: RuntimeSettings | None = None,
) -> Adopted:
    """Writes an adapter folder of ours beside one of peft's, which stays as it is.

    Args:
        source: The folder that `save_pretrained` of a peft model wrote, or `save_model` of its Trainer.
        out: The folder to write; None: one of the same name in `adapters`.
        names: The labels in the order of the logits: `negative,positive`; or the number of each with the names to show,
            `0=差评/negative,1=好评/positive`. peft did not write them down, so None is an error that says how many.
        base: Its base; None: the one that its config names.
        max_length: Tokens at which texts are cut, as in training; None: as the tokenizer beside it cut them, else as
            many as the base takes.
        runtime: Device and threads.

    Raises:
        ArtefactError: the folder holds no such adapter, lost its answer layer, or does not fit the base.
        RecipeError: the labels are not told, or not as many as the adapter's.
        BaseModelError: its base is not there.
        ResourceError: the folder to write is there already, or cannot be written.
    """
    folder = Path(source)
    config = _read_config(folder)
    stored = _read_header(folder)
    labels = _labels(names, _count_labels(stored, folder), folder)
    lora = _lora(config, folder)
    target = _target(out, folder)
    found_base = _find_base(base, config, folder)

    from trimtab.model import count, empty_model, head_modules, inject, load_base, load_config, longest_input

    tokenizer, tokenizer_from = _tokenizer(folder, found_base)
    model_config = load_config(found_base.folder, num_labels=len(labels), dropout="config", pad_id=tokenizer.pad_id)
    loaded = load_base(found_base.folder, model_config)
    head = head_modules(loaded.model, loaded.new_parameters, _saved_beside(loaded.model, config, stored))
    lora = _outside_head(lora, head, stored)
    try:
        skeleton = inject(empty_model(model_config), lora, lora.target_modules, head, found_base.recorded_as)
    except (ValueError, AssertionError) as error:  # peft's, our RecipeError
        problem = f"of the targets {some(lora.target_modules)} peft says: {str(error).splitlines()[0]}"
        raise _other_base(problem, found_base, config, folder) from None
    expected = _shapes(skeleton)
    _check_names(stored, expected, head, found_base, config, folder)
    tensors = _read_tensors(folder, expected, found_base, config)
    _check_vocabulary(tokenizer, tokenizer_from, loaded.model, found_base)
    limit = min(filter(None, (tokenizer.limit, longest_input(loaded.model))), default=512)
    length, cut_by = _length(max_length, limit, tokenizer_from)

    parameters = count(loaded.model, lora, lora.target_modules, head).as_dict()
    model = inject(loaded.model, lora, lora.target_modules, head, found_base.recorded_as)
    _fill(model, tensors)
    settings = runtime or RuntimeSettings()
    if settings.dtype == "auto":  # the answers that are kept with it are peft's to the last bit but one
        settings = settings.model_copy(update={"dtype": "float32"})
    device = place(settings).device
    model = model.to(device).eval()
    alone = probe(stock(model, tokenizer.pad_id), tokenizer, length, "start")
    engine = choose(model, tokenizer.pad_id, device, settings)
    difference = float(np.abs(probe(engine.forward, tokenizer, length, "start") - alone).max())
    # Sums in another order differ by 1e-5; bfloat16 has 8 bits.
    if difference > (1e-3 if engine.dtype == "float32" else 0.05) * max(1.0, float(np.abs(alone).max())):
        raise ArtefactError(
            "adopt.answers",
            f"The fast forward does not answer as peft does: a logit differs by {difference:.2g}.",
            where=str(folder),
            mend="--set runtime.fast=off answers by transformers itself; please report this",
        )
    try:
        adapter.write(
            target,
            model,
            engine.forward,
            labels=labels,
            max_length=length,
            keep="start",
            tokenizer=tokenizer,
            base=found_base,
            head=head,
            card=_card(labels, found_base, lora, length, parameters),
            computed_in=engine.dtype,
        )
    except OSError as error:
        raise ResourceError(
            "adopt.out",
            f"The adapter cannot be written: {error.strerror or error}.",
            where=str(target),
            mend="--out DIR where there is room and you may write",
        ) from None
    return Adopted(
        folder=target,
        base=found_base,
        labels=labels,
        max_length=length,
        cut_by=cut_by,
        tokenizer_from=tokenizer_from,
        difference=difference,
        answers=_answers(alone),
        is_served=_is_served(found_base, lora, labels, tokenizer, tokenizer_from),
    )


# The folder of peft


def _read_config(folder: Path) -> dict[str, Any]:
    """What peft says of the adapter."""
    if not folder.is_dir():
        raise _no_folder(folder)
    if not os.path.lexists(folder / _CONFIG):
        raise _no_adapter(folder)
    if (folder / "trimtab.json").exists():
        raise _ours(folder)
    if not any(os.path.lexists(folder / name) for name in (untrusted.TENSORS, "adapter_model.bin")):
        raise ArtefactError(
            "adopt.source",
            f"{_CONFIG} is here, and {untrusted.TENSORS} is not: the folder was not copied or written whole.",
            where=str(folder),
            mend=f"copy the whole folder again, with {untrusted.TENSORS}",
        )
    untrusted.check_files(folder)
    try:
        config = json.loads((folder / _CONFIG).read_bytes())
        if not isinstance(config, dict):
            raise ValueError("it holds no object")
    except (ValueError, RecursionError) as error:
        raise ArtefactError(
            "adopt.source",
            f"{_CONFIG} cannot be read: {error}",
            where=str(folder / _CONFIG),
            mend="copy it again from where it was trained, or save it again: model.save_pretrained(FOLDER)",
        ) from None
    # Before these two keys, peft had neither kind.
    return {"use_dora": False, "use_rslora": False} | config


def _no_folder(folder: Path) -> ArtefactError:
    siblings = [item.name for item in folder.parent.iterdir()] if folder.parent.is_dir() else []
    mend = "the folder that model.save_pretrained or trainer.save_model wrote"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):  # perhaps an id of the hub
        mend += f"; of one on the hub: hf download {folder} --local-dir {folder.name}, then trimtab adopt {folder.name}"
    if folder.exists():
        return ArtefactError("adopt.source", "This is a file, not a folder.", where=str(folder), mend=mend)
    found = f"There is no folder {folder}.{did_you_mean(folder.name, siblings)}"
    return ArtefactError("adopt.source", found, where=f"looked from {Path.cwd()}", mend=mend)


def _no_adapter(folder: Path) -> ArtefactError:
    """What the folder is instead."""
    if (folder / "adapter" / "trimtab.json").is_file():
        return _ours(folder)
    what = f"This is no adapter of peft: it has no {_CONFIG}."
    mend = "the folder that model.save_pretrained of a peft model wrote"
    inside = [file.parent for pattern in ("*", "*/*") for file in folder.glob(f"{pattern}/{_CONFIG}")]
    if inside:

        def step(place: Path) -> tuple[int, str]:
            number = re.search(r"(\d+)$", place.name)
            return int(number.group(1)) if number else 0, str(place)

        inside.sort(key=step)
        what += f" There is one in each of: {some(place.relative_to(folder) for place in inside)}."
        mend = f"choose one, such as the last: {_again(inside[-1])}"
    elif (folder / "config.json").is_file():
        what += " It holds a whole model: fine-tuned in full, or merged (merge_and_unload)."
        mend += ", before it was merged"
    return ArtefactError("adopt.source", what, where=str(folder), mend=mend)


def _ours(folder: Path) -> ArtefactError:
    place = quoted(folder)
    return ArtefactError(
        "adopt.ours",
        "This adapter is one of trimtab's: it knows its labels and its base already.",
        where=str(folder),
        mend=f'use it as it is: trimtab predict {place} "a text", trimtab serve {place}',
    )


def _again(folder: Path, *words: str) -> str:
    """The command, to copy."""
    return shlex.join(["trimtab", "adopt", str(folder), *words])


def _read_header(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the adapter's tensors."""
    file = folder / untrusted.TENSORS
    try:
        with safe_open(file, "np") as header:
            return {name: tuple(header.get_slice(name).get_shape()) for name in header.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtefactError(
            "adapter.damaged",
            f"The adapter's tensors cannot be read: {error}",
            where=str(file),
            mend="copy it again from where it was trained, or save it again: model.save_pretrained(FOLDER)",
        ) from None


def _count_labels(stored: Mapping[str, tuple[int, ...]], folder: Path) -> int:
    """How many labels the adapter's answer layer has."""
    rows = [shape[0] for name, shape in stored.items() if name.endswith(_LAST_LAYERS) and len(shape) == 2]
    if not rows:
        raise ArtefactError(
            "adopt.no_head",
            "This adapter has no answer layer: peft saved LoRA alone, and the layer that makes labels of it is lost.",
            where=str(folder / untrusted.TENSORS),
            mend='train it again with task_type="SEQ_CLS", or with modules_to_save=["classifier"]',
        )
    if rows[0] < 2:
        raise ArtefactError(
            "adopt.one_output",
            "The answer layer has one output: a number, such as a rating, and no choice between labels.",
            where=str(folder / untrusted.TENSORS),
            mend="train it again with num_labels=2 or more",
        )
    return rows[0]


# What was told


def _labels(said: str | None, classes: int, folder: Path) -> Labels:
    """The labels in the order of the logits."""
    few = ["negative", "positive"] if classes == 2 else [f"name{i}" for i in range(classes)]
    example = ",".join(few if classes <= 12 else [*few[:3], "...", few[-1]])

    def wrong(what: str) -> RecipeError:
        return RecipeError(
            "adopt.names",
            f"{what} This adapter has {classes} labels, and peft did not write down which.",
            where="--names",
            mend=f"{_again(folder, '--names', example)}   (the name of label 0 first, then of label 1: in the order of "
            "the numbers in the training data, or of id2label)",
        )

    if not said or not said.strip():
        raise wrong("The names of the labels are missing.")
    if "=" not in said:
        values = tuple(part.strip() for part in said.split(","))
        labels = Labels(values)
    else:
        try:
            by_number = read_names(said)
        except ValueError as error:
            raise wrong(f"{error}.") from None
        values = tuple(by_number.values())
        numbers = tuple(str(i) for i in range(classes))
        if unknown := [label for label in by_number if label not in numbers]:
            raise wrong(f'"{unknown[0]}" is the number of none; they have the numbers 0 to {classes - 1}.')
        labels = Labels(numbers, tuple(by_number.get(number, number) for number in numbers))
    if not all(values):
        raise wrong("A name is empty.")
    if doubled := sorted({value for value in values if values.count(value) > 1}):
        raise wrong(f'Two labels have the name "{doubled[0]}".')
    if len(values) != classes:
        raise wrong(f"{len(values)} {'name was' if len(values) == 1 else 'names were'} given.")
    return labels


def _target(out: str | Path | None, folder: Path) -> Path:
    """The folder to write."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._") or "adapter"  # as a server names it
    target = Path(out) if out else Path("adapters", name)
    if os.path.lexists(target):
        raise ResourceError(
            "adopt.out",
            "The folder to write is there already, and nothing is overwritten.",
            where=str(target),
            mend=f"--out ANOTHER, or remove it first: rm -r {quoted(target)}",
        )
    return target


def _length(said: int | None, limit: int, tokenizer_from: Path) -> tuple[int, str]:
    """Tokens at which texts are cut, and who says so."""
    if said is not None:
        if not 2 <= said <= limit:
            raise RecipeError(
                "adopt.max_length",
                f"{said:,} tokens cannot be: this base takes 2 to {limit:,}.",
                where="--max-length",
                mend=f"--max-length {limit}",
            )
        return said, "as told"
    file = tokenizer_from / "tokenizer.json"
    if (tokenizer_from / _CONFIG).is_file() and file.is_file():  # a tokenizer is saved with what it last cut texts at
        truncation = json.loads(file.read_bytes()).get("truncation") or {}
        if 2 <= int(truncation.get("max_length", 0)) <= limit:
            return int(truncation["max_length"]), "as the tokenizer beside the adapter does"
    return limit, "all that the base takes; if training cut them earlier: --max-length"


# What the config says


def _lora(config: Mapping[str, Any], folder: Path) -> LoraSettings:
    """r, alpha, targets and kind, where that is all that there is to it."""
    told = dict(config)
    mapping = told.get("auto_mapping")
    model_class = str(mapping.get("base_model_class", "")) if isinstance(mapping, dict) else ""
    if told.get("task_type") is None and model_class.endswith("ForSequenceClassification"):
        told["task_type"] = "SEQ_CLS"  # whoever saves the answer layer by name may leave the task out
    try:
        if told.get("init_lora_weights", True) not in _STARTS:
            raise ValueError(
                f"init_lora_weights = {told['init_lora_weights']!r} changes the base, which is not saved with it"
            )
        if strange := [f"{key} = {value!r}" for key, value in told.items() if value and key not in _KNOWN_KEYS]:
            raise ValueError(f"{_CONFIG} asks for what is not read here: {some(strange)}")
        return described_lora(told)
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc']))} = {first['input']!r}: {first['msg']}"
    except KeyError as error:
        problem = f"{_CONFIG} does not say {error}"
    except (TypeError, ValueError) as error:
        problem = str(error)
    raise ArtefactError(
        "adopt.config", f"This adapter cannot be adopted: {problem}.", where=str(folder / _CONFIG), mend=_WHAT_CAN_BE
    )


def _recorded(config: Mapping[str, Any]) -> str:
    """What peft calls the base; empty where it does not say."""
    said = config.get("base_model_name_or_path")
    return said.strip() if isinstance(said, str) else ""


def _find_base(given: str | None, config: Mapping[str, Any], folder: Path) -> Base:
    recorded, place = _recorded(config), str(folder / _CONFIG)
    if given is not None:
        return hub.find_base(given)
    if not recorded:
        raise BaseModelError(
            "adopt.base",
            "peft did not write down the base of this adapter.",
            where=place,
            mend="--base with the one it was trained on: a folder, or a hub id such as roberta-base",
        )
    if revision := config.get("revision"):
        raise BaseModelError(
            "adopt.base",
            f"This adapter was trained on the revision {revision!r} of {recorded}, and a base is found by its name "
            "alone.",
            where=place,
            mend=f"hf download {quoted(recorded)} --revision {quoted(revision)} --local-dir base, then --base ./base",
        )
    try:
        return hub.find_base(recorded)
    except BaseModelError as error:
        what = f"The base that this adapter names, {recorded!r}, cannot be had: {error.what}"
        raise BaseModelError(error.code, what, where=f"{place}; {error.where}", mend=error.mend) from None


# What fits the base


def _tokenizer(folder: Path, base: Base) -> tuple[Tokenizer, Path]:
    """The tokenizer beside the adapter, where its training saved one, else the base's; and its folder."""
    if not hub.tokenizer_sha256(folder):
        return tokens.from_base(base.folder), base.folder
    try:
        return tokens.from_base(folder), folder
    except BaseModelError as error:
        raise ArtefactError(
            "adopt.tokenizer",
            f"The tokenizer beside the adapter cannot be used. {error.what}",
            where=str(folder),
            mend="tokenizer.save_pretrained(FOLDER) again; or move its files away (tokenizer*, vocab*, merges.txt): "
            "then the base's own is used",
        ) from None


def _check_vocabulary(tokenizer: Tokenizer, tokenizer_from: Path, model: Any, base: Base) -> None:
    """A token beyond the base's vectors would stop the answer to a text that holds it."""
    rows = model.get_input_embeddings().num_embeddings
    if (largest := max(tokenizer.backend.get_vocab().values(), default=0)) >= rows:
        raise ArtefactError(
            "adopt.tokenizer",
            f"The tokenizer has a token with the number {largest:,}, and the base has vectors for {rows:,} tokens.",
            where=f"{tokenizer_from}; base {base.folder}",
            mend="--base with the one it was trained on; an adapter with new words in its vocabulary cannot be adopted",
        )


def _saved_beside(model: Any, config: Mapping[str, Any], stored: Collection[str]) -> list[str]:
    """Modules outside the layers that were trained in full though the base brings them, such as BERT's pooler."""
    said = config.get("modules_to_save")
    endings = tuple(f".{name}" for name in said if isinstance(name, str)) if isinstance(said, list) else ()
    found = []
    for name, module in model.named_modules():
        parameters = [f"{name}.{parameter}" for parameter, _ in module.named_parameters()]
        in_layers = any("embed" in one or any(part.isdigit() for part in one.split(".")) for one in parameters)
        if f".{name}".endswith(endings) and not in_layers and any(_PEFT + one in stored for one in parameters):
            found.append(name)
    return found


def _outside_head(lora: LoraSettings, head: Sequence[str], stored: Collection[str]) -> LoraSettings:
    """The targets without the answer layer.

    peft's `all-linear` names the layers of some heads too; these are trained in full, and their LoRA is not saved.
    """
    in_head = [f"{_PEFT}{name}." for name in head]
    layers = {name.removeprefix(_PEFT).partition(".lora_")[0] for name in stored if ".lora_" in name}
    heads = {
        name.rpartition(".")[0].removeprefix(_PEFT)
        for name in stored
        if ".lora_" not in name and name.startswith(tuple(in_head))
    }
    targets = tuple(f".{target}" for target in lora.target_modules)
    if not any(f".{name}".endswith(targets) for name in heads):
        return lora
    return lora.model_copy(update={"target_modules": tuple(sorted(layers))})


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what peft saves of a model."""
    import peft

    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _fill(model: Any, tensors: dict[str, Any]) -> None:
    import peft

    peft.set_peft_model_state_dict(model, tensors)


def _check_names(
    stored: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    head: Sequence[str],
    base: Base,
    config: Mapping[str, Any],
    folder: Path,
) -> None:
    """What is missing or too much, from the most telling to the least: another base, a lost head, weights besides."""
    file = folder / untrusted.TENSORS

    def lora(names: Collection[str]) -> set[str]:
        return {name for name in names if ".lora_" in name}

    if problems := [
        *(f"{name} is missing" for name in sorted(lora(expected) - lora(stored))),
        *(f"{name} is not in it" for name in sorted(lora(stored) - lora(expected))),
        *(
            f"{name} has shape {stored[name]}, expected {expected[name]}"
            for name in sorted(stored.keys() & expected.keys())
            if stored[name] != expected[name]
        ),
    ]:
        raise _other_base(some(problems, 3), base, config, folder)
    if lost := sorted(expected.keys() - stored.keys()):
        raise ArtefactError(
            "adopt.no_head",
            f"This adapter has lost part of its answer layer: {some(lost)}. The base does not bring it either, so it "
            "was drawn at random in training and not saved.",
            where=str(file),
            mend="train it again with modules_to_save=" + json.dumps([name.rpartition(".")[2] for name in head]),
        )
    if more := sorted(stored.keys() - expected.keys()):
        raise ArtefactError(
            "adopt.more",
            f"This adapter holds whole weights beside LoRA and its answer layer: {some(more)}.",
            where=str(file),
            mend="if they are embeddings that training did not change: save_pretrained(FOLDER, "
            "save_embedding_layers=False); else train it again with modules_to_save="
            + json.dumps([name.rpartition(".")[2] for name in head]),
        )


def _other_base(problem: str, base: Base, config: Mapping[str, Any], folder: Path) -> ArtefactError:
    named = f"; {_CONFIG} names {_recorded(config)!r}" if _recorded(config) else ""
    return ArtefactError(
        "adopt.other_base",
        f"This adapter and the base {base.name} do not fit: {problem.rstrip('.')}.",
        where=f"{folder / untrusted.TENSORS}; base {base.folder}",
        mend=f"--base with the one it was trained on{named}; if it is that one, copy the adapter again",
    )


def _read_tensors(
    folder: Path, expected: Mapping[str, tuple[int, ...]], base: Base, config: Mapping[str, Any]
) -> dict[str, Any]:
    """The adapter's tensors, if they are just what peft has for this base."""
    file = folder / untrusted.TENSORS
    try:
        return untrusted.read_tensors(file, expected, hashlib.sha256(file.read_bytes()).hexdigest())
    except ArtefactError as error:
        if "not finite" not in error.what:
            raise _other_base(error.what, base, config, folder) from None
        raise ArtefactError(
            error.code,
            f"{error.what.rstrip('.')}: it holds nan or inf, so this adapter has no answers.",
            where=error.where,
            mend="training diverged: take an earlier checkpoint, or train again with a smaller learning rate",
        ) from None


def _is_served(base: Base, lora: LoraSettings, labels: Labels, tokenizer: Tokenizer, tokenizer_from: Path) -> bool:
    """Whether serving's own functions take base and targets, and it is the base's tokenizer; labels of usual length.

    The files are mapped, not read a second time.
    """
    if max(map(len, labels.values)) > LONGEST_SERVED_LABEL:
        return False
    if tokenizer_from != base.folder and not tokenizer.is_like(tokens.from_base(base.folder)):
        return False
    try:
        config = json.loads((base.folder / "config.json").read_bytes())
        tensors = adapter.base_tensors(base)
        encoder.of_base(config, tensors)
        return bool(encoder.sites(config, tensors, lora.target_modules))
    except (ValueError, KeyError):  # NotSupported is one; a key that an old config leaves to its defaults
        return False


def _answers(logits: npt.NDArray[np.float32]) -> tuple[tuple[str, int, float], ...]:
    scores = softmax(logits)
    return tuple((text, int(row.argmax()), float(row.max())) for text, row in zip(PROBES, scores, strict=True))


def _card(labels: Labels, base: Base, lora: LoraSettings, max_length: int, parameters: Mapping[str, Any]) -> str:
    shown = "\n".join(f"- {i}: {labels.name(i)}" for i in range(len(labels)))
    return (
        f"# LoRA adapter for text classification\n\nTrained with peft, adopted by trimtab; how well it answers was not "
        f"measured here.\n\n- base: `{base.recorded_as}` (sha256 `{base.weights_sha256}`)\n- r {lora.r}, lora_alpha "
        f"{lora.lora_alpha}, {lora.variant}, {parameters['trainable']:,} trained parameters\n- texts are cut at "
        f"{max_length} tokens\n\nLabels:\n\n{shown}\n"
    )
