"""The adapter folder: PEFT's two files, and what PEFT forgets: labels, base, preprocessing, tokenizer, probes.

Plain `peft.PeftModel.from_pretrained` loads it. Loading it here is strict both ways: a missing or an extra tensor,
another base or another tokenizer is an error with its name. The same recipe writes the same bytes: no times, no
unordered sets.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save

from trimtab import durable, tokens, untrusted
from trimtab.classification import NAME_LANGUAGES, Labels, compute_logits
from trimtab.config import Keep, LoraSettings, RuntimeSettings
from trimtab.errors import ArtefactError, BaseModelError, some
from trimtab.fast import encoder
from trimtab.forward import Engine, Forward, choose, fast, fast_dtype
from trimtab.hub import Base, find_base, find_recorded_base, joint_sha256, weight_files
from trimtab.tokens import Tokenizer

SCHEMA_VERSION = 1
_MODULE = re.compile(r"\w+(\.\w+)*")
# What would change the answers of peft's LoRA, and the value at which it does not.
_PLAIN: dict[str, object] = {
    "peft_type": "LORA",
    "task_type": "SEQ_CLS",
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "exclude_modules": None,
    "layers_to_transform": None,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}

# Fixed sentences whose logits travel with the adapter, so that anyone can see that it still answers the same.
PROBES = (
    "An unforgettable film: warm, funny and beautifully acted.",
    "The parcel came three weeks late and nobody answered my calls.",
    "It is fine, I suppose.",
    "味道不错，就是送得太慢了。",
)


@dataclass(frozen=True)
class Adapter:
    """An adapter folder, read and checked as far as that goes without its base."""

    folder: Path
    labels: Labels
    max_length: int
    keep: Keep
    """What is left of a text that is longer, see `tokens.encode`."""
    tokenizer: Tokenizer
    base: dict[str, str]
    """name, hub_id, weights_sha256, tokenizer_sha256 of the base that it was trained on."""
    lora: LoraSettings
    head: tuple[str, ...]
    probes: tuple[tuple[str, tuple[float, ...]], ...]
    """Sentences and the logits that they had after training."""
    computed_in: str
    """The dtype of those logits."""
    temperature: float
    """What logits are divided by before they become probabilities."""
    tensors_sha256: str
    """Of adapter_model.safetensors."""
    description_sha256: str
    """Of what trimtab.json says, the sums of the other files among it."""

    @property
    def sha256(self) -> str:
        """Of the adapter as a whole: its tensors and both of its descriptions."""
        names = (untrusted.TENSORS, "adapter_config.json", "trimtab.json")
        return joint_sha256(*(self.folder / name for name in names))


def write(
    folder: Path,
    model: Any,
    forward: Forward,
    *,
    labels: Labels,
    max_length: int,
    tokenizer: Tokenizer,
    base: Base,
    head: list[str],
    card: str,
    keep: Keep,
    computed_in: str = "float32",
    temperature: float = 1.0,
) -> None:
    """Writes the adapter of a trained peft model into a new folder, which appears whole or not at all.

    `forward` is what computes the model's logits, in the dtype `computed_in`; it answers the probe sentences.
    `temperature` is what those who use the adapter divide logits by.
    """
    import peft

    with durable.new_folder(folder, folder.with_name(f".{folder.name}-{os.getpid()}")) as draft:
        tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        # "format" tells transformers and peft which library's tensors these are.
        stored = save(
            {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}, metadata={"format": "pt"}
        )
        durable.write_bytes(draft / "adapter_model.safetensors", stored)
        config = model.peft_config["default"].to_dict() | {"inference_mode": True}
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        described = _as_json(dict(sorted(plain.items())))
        durable.write_bytes(draft / "adapter_config.json", described)
        tokens.save(tokenizer, base.folder, draft)
        probe_logits = probe(forward, tokenizer, max_length, keep)
        meta = {
            "schema_version": SCHEMA_VERSION,
            "task": "text-classification",
            "labels": [
                {
                    "label": value,
                    **({"names": {lang: labels.name(i, lang) for lang in NAME_LANGUAGES}} if labels.names else {}),
                }
                for i, value in enumerate(labels.values)
            ],
            "preprocessing": {
                "max_length": max_length,
                "keep": keep,
                "pad_id": tokenizer.pad_id,
                "tokenizer_sha256": tokenizer.sha256,
            },
            "base": {
                "name": base.recorded_as,
                "hub_id": base.hub_id,
                "weights_sha256": base.weights_sha256,
                "tokenizer_sha256": base.tokenizer_sha256,
            },
            "head": head,
            "tensors_sha256": hashlib.sha256(stored).hexdigest(),
            "config_sha256": hashlib.sha256(described).hexdigest(),
            "computed_in": computed_in,
            "temperature": temperature,
            "probes": [{"text": text, "logits": row.tolist()} for text, row in zip(PROBES, probe_logits, strict=True)],
        }
        durable.write_bytes(draft / "trimtab.json", _as_json(meta | {"sha256": _digest(meta)}))
        durable.write_bytes(draft / "README.md", card.encode())


def probe(forward: Forward, tokenizer: Tokenizer, max_length: int, keep: Keep) -> npt.NDArray[np.float32]:
    """The logits of the probe sentences, cut like any text: float32[len(PROBES), C]."""
    return compute_logits(forward, tokens.encode(PROBES, tokenizer, max_length, keep=keep))


def read(folder: Path, shared: Tokenizer | None = None) -> Adapter:
    """Reads an adapter folder.

    Args:
        folder: Where it is.
        shared: A tokenizer that is in memory already: taken, and the adapter's own left unread, where the adapter says
            that it was trained with the very same.

    Raises:
        ArtefactError: it is not one of ours, is incomplete, or has a newer schema.
    """
    untrusted.check_files(folder)
    meta = _read_json(folder, "trimtab.json")
    if meta.get("schema_version") != SCHEMA_VERSION:
        raise ArtefactError(
            "adapter.schema",
            f"This adapter has schema version {meta.get('schema_version')}; this trimtab reads {SCHEMA_VERSION}.",
            where=str(folder / "trimtab.json"),
            mend="a newer trimtab: git pull, and install it as the README says",
        )
    config = _read_json(folder, "adapter_config.json")
    try:
        values = tuple(item["label"] for item in meta["labels"])
        # A name that is the same in every language was given once.
        names = tuple(
            "/".join(dict.fromkeys(item["names"][lang] for lang in NAME_LANGUAGES))
            for item in meta["labels"]
            if "names" in item
        )
        if names and len(names) != len(values):
            raise ValueError("some labels have names and some have none")
        if len(set(values)) != len(values) or not values or not all(isinstance(v, str) and v.encode() for v in values):
            raise ValueError("labels are different strings")
        preprocessing = meta["preprocessing"]
        if not 2 <= int(preprocessing["max_length"]) <= 1 << 20:
            raise ValueError(f"max_length {preprocessing['max_length']} cannot be")
        if not 0 <= int(preprocessing["pad_id"]) < 1 << 31:
            raise ValueError(f"pad_id {preprocessing['pad_id']} cannot be")
        pad_id, trained_with = int(preprocessing["pad_id"]), str(preprocessing["tokenizer_sha256"])
        is_shared = shared is not None and (shared.sha256, shared.pad_id) == (trained_with, pad_id)
        adapter = Adapter(
            folder=folder,
            labels=Labels(values, names),
            max_length=int(preprocessing["max_length"]),
            keep=_keep(preprocessing.get("keep", "start")),  # the first adapters were all cut at their end
            tokenizer=shared if shared and is_shared else tokens.load(folder, pad_id, trained_with, shared),
            base={key: str(meta["base"][key]) for key in ("name", "hub_id", "weights_sha256", "tokenizer_sha256")},
            lora=described_lora(config),
            head=_modules("head", meta["head"]),
            probes=_probes(meta["probes"], len(values)),
            computed_in=str(meta.get("computed_in", "float32")),
            temperature=_temperature(meta.get("temperature", 1.0)),  # the first adapters had none
            tensors_sha256=str(meta["tensors_sha256"]),
            description_sha256=_digest(meta),
        )
        _check_descriptions(folder, meta)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(
            "adapter.damaged",
            f"A description in this adapter is damaged: {type(error).__name__}: {error}",
            where=str(folder),
            mend="copy the whole adapter folder again",
        ) from None
    return adapter


def _probes(said: list[dict[str, Any]], classes: int) -> tuple[tuple[str, tuple[float, ...]], ...]:
    """Sentences and their logits; a ValueError or TypeError where they are anything else."""
    probes = tuple((item["text"], tuple(float(logit) for logit in item["logits"])) for item in said)
    if not probes or not all(len(logits) == classes and all(map(math.isfinite, logits)) for _, logits in probes):
        raise ValueError("probes are sentences with a logit for each label")
    for text, _ in probes:
        str.encode(text)  # a TypeError where it is no string, a ValueError where it holds half a character
    return probes


def _temperature(said: object) -> float:
    """A number that logits can be divided by."""
    if not isinstance(said, int | float) or not 1e-6 <= said <= 1e6:
        raise ValueError(f"temperature {said} cannot be")
    return float(said)


def _keep(said: object) -> Keep:
    if said == "start" or said == "ends":
        return said
    raise ValueError(f"keep {said} is neither start nor ends")


def _modules(what: str, said: object) -> tuple[str, ...]:
    """Names of modules and nothing else: peft takes them for regular expressions, which could fail or never end."""
    if not isinstance(said, list) or not all(isinstance(name, str) and _MODULE.fullmatch(name) for name in said):
        raise ValueError(f"{what} is a list of module names")
    return tuple(said)


def described_lora(config: dict[str, Any]) -> LoraSettings:
    """What an adapter_config.json says of LoRA; a ValueError, KeyError or TypeError where it asks for anything else."""
    if strange := [f"{key} = {config[key]!r}" for key, plain in _PLAIN.items() if config.get(key, plain) != plain]:
        raise ValueError(f"adapter_config.json asks for what is not read here: {some(strange)}")
    variant = "dora" if config["use_dora"] else "rslora" if config["use_rslora"] else "lora"
    return LoraSettings(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=config["lora_dropout"],
        target_modules=_modules("target_modules", config["target_modules"]),
        variant=variant,
    )


def locate_base(adapter: Adapter, given: str | None = None, *, ask_hub: bool = True) -> Base:
    """The very base that the adapter was trained on, proved by sha256: as given, else wherever it is.

    Without `ask_hub` that is this machine alone, where a stranger wrote the name.

    Raises:
        ArtefactError: the given base is another one.
        BaseModelError: it is nowhere; the message names all that was tried.
    """
    wanted = adapter.base
    if given is not None:
        base = find_base(given)
        for part, found in (("weights", base.weights_sha256), ("tokenizer", base.tokenizer_sha256)):
            if found not in ("", wanted[f"{part}_sha256"]):
                raise ArtefactError(
                    "adapter.other_base",
                    f"This adapter was trained on {wanted['name']}; the {part} of {given} are not the same: "
                    f"sha256 {found[:12]}, expected {wanted[f'{part}_sha256'][:12]}.",
                    where=str(base.folder),
                    mend="leave --base out: the adapter knows its base; or train on this one",
                )
        return base
    found_base, tried = find_recorded_base(
        wanted["name"], wanted["hub_id"], wanted["weights_sha256"], wanted["tokenizer_sha256"], ask_hub=ask_hub
    )
    if found_base is None:
        raise BaseModelError(
            "adapter.base_missing",
            f"The base of this adapter, {wanted['hub_id'] or wanted['name']}, was not found.",
            where="tried: " + "; ".join(tried),
            mend="--base FOLDER with the base it was trained on (the same files, by sha256)",
        )
    return found_base


def load_engine(adapter: Adapter, base: Base, device: torch.device, settings: RuntimeSettings) -> Engine:
    """Base + adapter, ready to answer: merged weights in the fast forward where it can be, else peft's model.

    The fast way imports neither transformers nor peft, which take seconds. It takes only what fits to the last tensor;
    everything else goes the other way, where `load_model` says what is wrong.

    Raises:
        ArtefactError: a tensor is missing, extra, of another shape or not finite.
        RecipeError: `runtime.fast = on`, and it cannot be; or a dtype that would be slow.
    """
    if device.type == "cpu" and settings.fast != "off" and adapter.lora.variant != "dora":
        dtype = fast_dtype(settings)
        try:
            config = json.loads((base.folder / "config.json").read_bytes())
            stored, fit = base_tensors(base), described_shape(adapter)
            tensors = _read_tensors(adapter, encoder.adapter_shapes(config, stored, **fit))
            classifier = encoder.of_files(config, stored, tensors, scaling=adapter.lora.scaling, dtype=dtype, **fit)
            name = str(dtype).removeprefix("torch.")
            return Engine(fast(classifier), "fast", "on a CPU, from files", name, encoder=classifier)
        except (OSError, ValueError, ArtefactError):  # NotSupported too; what is wrong is said on the long way
            pass
    model = load_model(adapter, base).to(device)
    return choose(model, adapter.tokenizer.pad_id, device, settings)


def described_shape(adapter: Adapter) -> dict[str, Any]:
    """What an adapter's own description says of the shapes of its tensors, for `fast.encoder`."""
    return {
        "targets": adapter.lora.target_modules,
        "rank": adapter.lora.r,
        "head": adapter.head,
        "num_labels": len(adapter.labels),
    }


def _read_tensors(adapter: Adapter, expected: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, whole by name, shape, number and sum."""
    return untrusted.read_tensors(adapter.folder / untrusted.TENSORS, expected, adapter.tensors_sha256)


def base_tensors(base: Base) -> dict[str, torch.Tensor]:
    """The tensors of a base's files, mapped."""
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(base.folder):
        tensors |= load_file(file)
    return tensors


def load_model(adapter: Adapter, base: Base) -> Any:
    """Base + adapter as a peft model in evaluation mode, every LoRA and head tensor read from the file.

    Raises:
        ArtefactError: a tensor is missing, extra, of another shape or not finite.
    """
    import peft

    from trimtab.model import inject, load_base, load_config

    tensors = read_tensors(adapter, base)
    config = load_config(base.folder, num_labels=len(adapter.labels), dropout="config", pad_id=adapter.tokenizer.pad_id)
    fit = (adapter.lora, adapter.lora.target_modules, adapter.head, base.recorded_as)
    model = inject(load_base(base.folder, config).model, *fit)
    peft.set_peft_model_state_dict(model, tensors)
    model.eval()
    return model


def start_from(model: Any, adapter: Adapter, base: Base, *, factor: float, with_head: bool) -> None:
    """Gives a peft model the A and B of an adapter over the same base, and its head where asked for.

    B is multiplied by `factor`, so that another scaling of B A starts at the same answers.

    Raises:
        ArtefactError: a tensor is missing, extra, of another shape or not finite.
    """
    import peft

    tensors = read_tensors(adapter, base)
    taken = {name: tensor for name, tensor in tensors.items() if with_head or ".lora_" in name}
    scaled = {name: tensor * factor for name, tensor in taken.items() if ".lora_B." in name}
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    peft.set_peft_model_state_dict(model, own | taken | scaled)


def read_tensors(adapter: Adapter, base: Base) -> dict[str, torch.Tensor]:
    """The tensors of an adapter by peft's names, checked against its base and its own description.

    Raises:
        ArtefactError: a tensor is missing, extra, of another shape or not finite, or the description fits no base.
    """
    import peft

    from trimtab.model import empty_model, inject, load_config, longest_input

    config = load_config(base.folder, num_labels=len(adapter.labels), dropout="config", pad_id=adapter.tokenizer.pad_id)
    fit = (adapter.lora, adapter.lora.target_modules, adapter.head, base.recorded_as)
    try:
        skeleton = inject(empty_model(config), *fit)  # without memory, whatever rank the adapter claims
    except (ValueError, AssertionError) as error:  # peft's, our RecipeError, torch's of a pad id beyond the table
        raise ArtefactError(
            "adapter.damaged",
            f"The target modules {some(adapter.lora.target_modules)} or the head {some(adapter.head)} do not fit the "
            f"base: {str(error).splitlines()[0]}",
            where=str(adapter.folder),
            mend="copy the whole adapter folder again",
        ) from None
    if 0 < (longest := longest_input(skeleton)) < adapter.max_length:
        raise ArtefactError(
            "adapter.damaged",
            f"Texts are cut at {adapter.max_length:,} tokens, and the base has no vectors for more than {longest:,}.",
            where=str(adapter.folder),
            mend="copy the whole adapter folder again",
        )
    expected = peft.get_peft_model_state_dict(skeleton, save_embedding_layers=False)
    return _read_tensors(adapter, {name: tuple(tensor.shape) for name, tensor in expected.items()})


def _as_json(value: object) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


def _digest(meta: Mapping[str, Any]) -> str:
    """Of what trimtab.json says, but for this sum itself."""
    said = {key: value for key, value in meta.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _check_descriptions(folder: Path, meta: Mapping[str, Any]) -> None:
    """A label, a length or an alpha that was edited would change answers without a word."""
    if "sha256" not in meta and "config_sha256" not in meta:  # the first adapters had neither
        return
    config = hashlib.sha256((folder / "adapter_config.json").read_bytes()).hexdigest()
    found = {
        "trimtab.json": _digest(meta) == meta.get("sha256"),
        "adapter_config.json": config == meta.get("config_sha256"),
    }
    if changed := [name for name, same in found.items() if not same]:
        raise ArtefactError(
            "adapter.changed",
            f"{changed[0]} is not what training wrote: its sha256 differs.",
            where=str(folder),
            mend="copy the whole adapter folder again; for other labels train again, for display names: --names",
        )


def _no_adapter(folder: Path, lacks: str) -> ArtefactError:
    """What a folder is instead, and how an adapter comes of it; where it lies is not for those who ask by HTTP."""
    if lacks == "trimtab.json" and (folder / "adapter_config.json").is_file():
        what = "Plain peft wrote this adapter: it does not know its labels or its base."
        mend = "trimtab adopt FOLDER --base BASE --names LABEL,LABEL (in the order of its logits) --out adapters/NAME"
    elif (folder / "adapter").is_dir() or (folder / "recipe.toml").is_file():
        what = "This is a run directory; its adapter is the folder called adapter in it."
        mend = "cp -r RUN/adapter adapters/NAME; or trimtab serve NAME=RUN"
        if not (folder / "adapter").is_dir():
            what = "This is a run directory, and it has no adapter yet."
            mend = f"when the run has come to its end: {mend}"
    else:
        what = f"This is not an adapter: it has no {lacks}."
        mend = "a run directory such as runs/latest, or the adapter folder in it"
        if inside := [found.parent.name for one in ("trimtab.json", "adapter") for found in folder.glob(f"*/{one}")]:
            mend = f"one of the folders in it, such as {max(inside)}"  # of ./runs that is `latest`
    return ArtefactError("adapter.incomplete", what, where=str(folder), mend=mend)


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / name).read_bytes())
    except FileNotFoundError:
        raise _no_adapter(folder, name) from None
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise ArtefactError(
            "adapter.damaged",
            f"{name} is not JSON: {error}",
            where=str(folder),
            mend="copy the whole adapter folder again",
        ) from None
    if not isinstance(value, dict):
        raise ArtefactError(
            "adapter.damaged",
            f"{name} does not hold an object.",
            where=str(folder),
            mend="copy the whole adapter folder again",
        )
    return value
