"""An adapter that plain peft trained -> one of ours: with labels, the sums of its base, its tokenizer and probes.

What peft writes knows neither its labels nor which files its base had; both are told here, once, and from then on
checked. Nothing is guessed: an answer layer that was not saved, or a tensor that does not fit, is an error.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from trimtab import adapter, hub, tokens, untrusted
from trimtab.adapter import described_lora, probe
from trimtab.classification import Labels, make_labels
from trimtab.config import RuntimeSettings, read_names
from trimtab.device import place
from trimtab.errors import ArtefactError, RecipeError, ResourceError, some
from trimtab.forward import choose, stock
from trimtab.hub import Base
from trimtab.tokens import Tokenizer

_ENDINGS = ("classifier.weight", "classifier.out_proj.weight", "score.weight")
"""Where transformers' classifiers keep their last layer: [labels, width]."""


@dataclass(frozen=True)
class Adopted:
    """What came of it."""

    folder: Path
    base: Base
    labels: Labels
    max_length: int
    difference: float
    """The largest, between the logits of the probe sentences under peft and transformers and those that are stored."""


def adopt(
    source: str | Path,
    out: str | Path,
    *,
    names: str,
    base: str | None = None,
    max_length: int | None = None,
    runtime: RuntimeSettings | None = None,
) -> Adopted:
    """Writes an adapter folder of ours beside one of peft's, which stays as it is.

    Args:
        source: The folder that `save_pretrained` of a peft model wrote.
        out: The folder to write.
        names: The labels in the order of the logits: `negative,positive`; or the number of each with the names to show,
            `0=差评/negative,1=好评/positive`.
        base: Its base; None: the one that its config names.
        max_length: Tokens at which texts are cut, as in training; None: as many as the base takes.
        runtime: Device and threads.

    Raises:
        ArtefactError: the folder holds no such adapter, lost its answer layer, or does not fit the base.
        RecipeError: the labels are not as many as the adapter's.
        ResourceError: the folder to write is there already, or cannot be written.
    """
    import peft

    from trimtab.model import count, head_modules, inject, load_base, load_config, longest_input

    folder, target = Path(source), Path(out)
    if target.exists():
        raise ResourceError("adopt.out", "This folder is there already.", where=str(target), mend="--out ANOTHER")
    config = _config(folder)
    labels = _labels(names, _classes(folder))
    found_base = hub.find_base(base or str(config.get("base_model_name_or_path") or ""))
    tokenizer = _tokenizer(folder, found_base)
    settings = runtime or RuntimeSettings()
    placement = place(settings)
    try:
        lora = described_lora(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(
            "adapter.damaged",
            f"{error}",
            where=str(folder / "adapter_config.json"),
            mend="a plain LoRA, rsLoRA or DoRA adapter of peft with task_type=SEQ_CLS",
        ) from None

    model_config = load_config(found_base.folder, num_labels=len(labels), dropout="config", pad_id=tokenizer.pad_id)
    loaded = load_base(found_base.folder, model_config)
    head = head_modules(loaded.model, loaded.new_parameters)
    parameters = count(loaded.model, lora, lora.target_modules, head).as_dict()
    limit = min(filter(None, (tokenizer.limit, longest_input(loaded.model))), default=512)
    if max_length is not None and not 2 <= max_length <= limit:
        raise RecipeError(
            "adopt.max_length",
            f"This base takes 2 to {limit:,} tokens.",
            where="--max-length",
            mend=f"--max-length {limit}",
        )
    model = inject(loaded.model, lora, lora.target_modules, head, found_base.recorded_as)
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = _tensors(folder, {name: tuple(tensor.shape) for name, tensor in expected.items()}, head)
    peft.set_peft_model_state_dict(model, tensors)
    model = model.to(placement.device).eval()

    length = max_length or limit
    alone = probe(stock(model, tokenizer.pad_id), tokenizer, length)
    engine = choose(model, tokenizer.pad_id, placement.device, settings)
    difference = float(np.abs(probe(engine.forward, tokenizer, length) - alone).max())
    adapter.write(
        target,
        model,
        engine.forward,
        labels=labels,
        max_length=length,
        tokenizer=tokenizer,
        base=found_base,
        head=head,
        card=_card(labels, found_base, lora, length, parameters),
        computed_in=engine.dtype,
    )
    return Adopted(target, found_base, labels, length, difference)


def _config(folder: Path) -> dict[str, Any]:
    """What peft says of the adapter."""
    if not folder.is_dir():
        raise ArtefactError(
            "adopt.source", "There is no such folder.", where=str(folder), mend="the folder that peft wrote"
        )
    untrusted.check_files(folder)
    if (folder / "trimtab.json").exists():
        raise ArtefactError(
            "adopt.ours",
            "This adapter knows its labels and its base already.",
            where=str(folder),
            mend="use it as it is",
        )
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(
            "adopt.source",
            f"adapter_config.json cannot be read: {error}",
            where=str(folder),
            mend="the folder that save_pretrained of a peft model wrote",
        ) from None
    if not isinstance(config, dict):
        raise ArtefactError(
            "adopt.source", "adapter_config.json holds no object.", where=str(folder), mend="save it again"
        )
    return config


def _classes(folder: Path) -> int:
    """How many labels the adapter's answer layer has, by the header of its tensors."""
    file = folder / untrusted.TENSORS
    try:
        with safe_open(file, "np") as header:
            rows = [
                header.get_slice(name).get_shape()[0]
                for name in header.keys()  # noqa: SIM118
                if name.endswith(_ENDINGS) and ".lora_" not in name
            ]
    except (OSError, SafetensorError) as error:
        raise ArtefactError(
            "adapter.damaged", f"The adapter's tensors cannot be read: {error}", where=str(file), mend="save it again"
        ) from None
    if not rows:
        raise ArtefactError(
            "adopt.no_head",
            "This adapter has no answer layer: peft saved LoRA alone, and the layer that makes labels of it is lost.",
            where=str(file),
            mend='train it again with task_type="SEQ_CLS", or with modules_to_save=["classifier"]',
        )
    return int(rows[0])


def _labels(said: str, classes: int) -> Labels:
    """The labels in the order of the logits."""
    if "=" in said:
        try:
            names = read_names(said)
        except ValueError as error:
            raise RecipeError("adopt.names", f"{error}.", where="--names", mend="--names negative,positive") from None
        labels, given = make_labels([str(i) for i in range(classes)], names), len(names)
    else:
        values = tuple(part.strip() for part in said.split(",") if part.strip())
        labels, given = Labels(values), len(values)
        if len(set(values)) != given:
            raise RecipeError("adopt.names", "Two labels are the same.", where="--names", mend="a name for each")
    if given != classes:
        raise RecipeError(
            "adopt.names",
            f"This adapter has {classes} labels, and {given} names were given.",
            where="--names",
            mend="--names " + ",".join(f"label{i}" for i in range(classes)) + " in the order of the logits (id2label)",
        )
    return labels


def _tokenizer(folder: Path, base: Base) -> Tokenizer:
    """The tokenizer beside the adapter, where its training saved one, else the base's."""
    return tokens.from_base(folder if (folder / "tokenizer.json").is_file() else base.folder)


def _tensors(folder: Path, expected: Mapping[str, tuple[int, ...]], head: Sequence[str]) -> dict[str, Any]:
    """The adapter's tensors, if they are just what peft has for this base."""
    file = folder / untrusted.TENSORS
    with safe_open(file, "np") as header:
        there = set(header.keys())
    if lost := sorted(name for name in expected if ".lora_" not in name and name not in there):
        raise ArtefactError(
            "adopt.no_head",
            f"This adapter has lost part of its answer layer: {some(lost)}. The base does not bring it either, so it "
            "was drawn at random in training and not saved.",
            where=str(file),
            mend=f"train it again with modules_to_save={list(head)}",
        )
    return untrusted.read_tensors(file, expected, hashlib.sha256(file.read_bytes()).hexdigest())


def _card(labels: Labels, base: Base, lora: Any, max_length: int, parameters: Mapping[str, Any]) -> str:
    shown = "\n".join(f"- {i}: {labels.name(i)}" for i in range(len(labels)))
    return (
        f"# LoRA adapter for text classification\n\nTrained with peft, adopted by trimtab; how well it answers was not "
        f"measured here.\n\n- base: `{base.recorded_as}` (sha256 `{base.weights_sha256}`)\n- r {lora.r}, lora_alpha "
        f"{lora.lora_alpha}, {lora.variant}, {parameters['trainable']:,} trained parameters\n- texts are cut at "
        f"{max_length} tokens\n\nLabels:\n\n{shown}\n"
    )
