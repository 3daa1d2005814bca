"""The adapter folder: PEFT's two files, and what PEFT forgets: labels, base, preprocessing, tokenizer, probes.

Plain `peft.PeftModel.from_pretrained` loads it. Loading it here is strict both ways: a missing or an extra tensor,
another base or another tokenizer is an error with its name. The same recipe writes the same bytes: no times, no
unordered sets.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from trimtab import tokens
from trimtab.classification import LANGUAGES, Labels, compute_logits
from trimtab.config import LoraSettings, RuntimeSettings
from trimtab.errors import ArtefactError, BaseModelError, some
from trimtab.fast import encoder
from trimtab.forward import Engine, Forward, choose, fast, fast_dtype
from trimtab.hub import Base, find_base, find_recorded_base, weight_files
from trimtab.tokens import Tokenizer

SCHEMA_VERSION = 1

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
    tokenizer: Tokenizer
    base: dict[str, str]
    """name, hub_id, weights_sha256, tokenizer_sha256 of the base that it was trained on."""
    lora: LoraSettings
    head: tuple[str, ...]
    probes: tuple[tuple[str, tuple[float, ...]], ...]
    """Sentences and the logits that they had after training."""
    computed_in: str
    """The dtype of those logits."""
    tensors_sha256: str
    """Of adapter_model.safetensors; empty where an early version wrote it."""

    @property
    def tensors_are_as_written(self) -> bool:
        """Whether adapter_model.safetensors is, to the byte, what training wrote."""
        found = hashlib.sha256((self.folder / "adapter_model.safetensors").read_bytes()).hexdigest()
        return self.tensors_sha256 in ("", found)


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
    computed_in: str = "float32",
) -> None:
    """Writes the adapter of a trained peft model into a new folder, which appears whole or not at all.

    `forward` is what computes the model's logits, in the dtype `computed_in`; it answers the probe sentences.
    """
    import peft

    with _draft_of(folder) as draft:
        tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        # "format" tells transformers and peft which library's tensors these are.
        stored = save(
            {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}, metadata={"format": "pt"}
        )
        (draft / "adapter_model.safetensors").write_bytes(stored)
        config = model.peft_config["default"].to_dict() | {"inference_mode": True}
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        _write_json(draft / "adapter_config.json", dict(sorted(plain.items())))
        tokens.save(tokenizer, base.folder, draft)
        probe_logits = probe(forward, tokenizer, max_length)
        _write_json(
            draft / "trimtab.json",
            {
                "schema_version": SCHEMA_VERSION,
                "task": "text-classification",
                "labels": [
                    {
                        "label": value,
                        **({"names": {lang: labels.name(i, lang) for lang in LANGUAGES}} if labels.names else {}),
                    }
                    for i, value in enumerate(labels.values)
                ],
                "preprocessing": {
                    "max_length": max_length,
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
                "computed_in": computed_in,
                "probes": [
                    {"text": text, "logits": row.tolist()} for text, row in zip(PROBES, probe_logits, strict=True)
                ],
            },
        )
        (draft / "README.md").write_text(card, "utf-8")


@contextmanager
def _draft_of(folder: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `folder` at the end, or is gone where the writing fails."""
    draft = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)  # of a process that was stopped here, with the same number
    draft.mkdir()
    try:
        yield draft
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def probe(forward: Forward, tokenizer: Tokenizer, max_length: int) -> npt.NDArray[np.float32]:
    """The logits of the probe sentences: float32[len(PROBES), C]."""
    return compute_logits(forward, tokens.encode(PROBES, tokenizer, max_length))


def read(folder: Path) -> Adapter:
    """Reads an adapter folder.

    Raises:
        ArtefactError: it is not one of ours, is incomplete, or has a newer schema.
    """
    meta = _read_json(folder, "trimtab.json")
    if meta.get("schema_version") != SCHEMA_VERSION:
        raise ArtefactError(
            "adapter.schema",
            f"This adapter has schema version {meta.get('schema_version')}; this trimtab reads {SCHEMA_VERSION}.",
            where=str(folder / "trimtab.json"),
            mend="pip install --upgrade trimtab",
        )
    config = _read_json(folder, "adapter_config.json")
    try:
        values = tuple(item["label"] for item in meta["labels"])
        # A name that is the same in every language was given once.
        names = tuple(
            "/".join(dict.fromkeys(item["names"][lang] for lang in LANGUAGES))
            for item in meta["labels"]
            if "names" in item
        )
        if names and len(names) != len(values):
            raise ValueError("some labels have names and some have none")
        if len(set(values)) != len(values) or not values or not all(isinstance(v, str) and v for v in values):
            raise ValueError("labels are different strings")
        if not all(isinstance(module, str) for module in meta["head"]) or isinstance(meta["head"], str):
            raise ValueError("head is a list of module names")
        if len({len(item["logits"]) for item in meta["probes"]}) != 1:
            raise ValueError("probes are sentences with a logit for each label")
        preprocessing = meta["preprocessing"]
        if not 2 <= int(preprocessing["max_length"]) <= 1 << 20:
            raise ValueError(f"max_length {preprocessing['max_length']} cannot be")
        return Adapter(
            folder=folder,
            labels=Labels(values, names),
            max_length=int(preprocessing["max_length"]),
            tokenizer=tokens.load(folder, int(preprocessing["pad_id"]), preprocessing["tokenizer_sha256"]),
            base={key: str(meta["base"][key]) for key in ("name", "hub_id", "weights_sha256", "tokenizer_sha256")},
            lora=_lora_settings(config),
            head=tuple(meta["head"]),
            probes=tuple((item["text"], tuple(item["logits"])) for item in meta["probes"]),
            computed_in=str(meta.get("computed_in", "float32")),
            tensors_sha256=str(meta.get("tensors_sha256", "")),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(
            "adapter.damaged",
            f"A description in this adapter is damaged: {type(error).__name__}: {error}",
            where=str(folder),
            mend="copy the whole adapter folder again",
        ) from None


def _lora_settings(config: dict[str, Any]) -> LoraSettings:
    variant = "dora" if config["use_dora"] else "rslora" if config["use_rslora"] else "lora"
    return LoraSettings(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=config["lora_dropout"],
        target_modules=tuple(config["target_modules"]),
        variant=variant,
    )


def locate_base(adapter: Adapter, given: str | None = None) -> Base:
    """The very base that the adapter was trained on, proved by sha256: as given, else wherever it is.

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
        wanted["name"], wanted["hub_id"], wanted["weights_sha256"], wanted["tokenizer_sha256"]
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
            if not adapter.tensors_are_as_written:
                raise encoder.NotSupported("its adapter is damaged")
            classifier = encoder.of_files(
                json.loads((base.folder / "config.json").read_bytes()),
                _base_tensors(base),
                _read_tensors(adapter.folder / "adapter_model.safetensors"),
                targets=adapter.lora.target_modules,
                rank=adapter.lora.r,
                scaling=adapter.lora.scaling,
                head=adapter.head,
                num_labels=len(adapter.labels),
                dtype=dtype,
            )
            return Engine(fast(classifier), "fast", "on a CPU, from files", str(dtype).removeprefix("torch."))
        except (OSError, ValueError):  # NotSupported too; what is wrong is said, or mended, on the long way
            pass
    model = load_model(adapter, base).to(device)
    return choose(model, adapter.tokenizer.pad_id, device, settings)


def _base_tensors(base: Base) -> dict[str, torch.Tensor]:
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

    config = load_config(base.folder, num_labels=len(adapter.labels), dropout="config", pad_id=adapter.tokenizer.pad_id)
    path = adapter.folder / "adapter_model.safetensors"
    loaded, targets = load_base(base.folder, config).model, adapter.lora.target_modules
    try:
        model = inject(loaded, adapter.lora, targets, adapter.head, base.recorded_as)
    except ValueError as error:  # peft's, and our RecipeError
        raise ArtefactError(
            "adapter.damaged",
            f"The target modules {some(targets)} or the head {some(adapter.head)} do not fit the base: "
            f"{str(error).splitlines()[0]}",
            where=str(adapter.folder),
            mend="copy the whole adapter folder again",
        ) from None
    tensors = _read_tensors(path)
    expected = {
        name: tuple(t.shape) for name, t in peft.get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} does not belong here" for name in tensors if name not in expected]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    problems += [f"{name} is not finite" for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if problems:
        raise ArtefactError(
            "adapter.tensors",
            f"{some(problems)}.",
            where=str(path),
            mend="copy the whole adapter folder again",
        )
    if not adapter.tensors_are_as_written:  # whole by name, shape and number, and yet not the same
        raise ArtefactError(
            "adapter.tensors_changed",
            "adapter_model.safetensors is not what training wrote: its sha256 differs.",
            where=str(path),
            mend="copy the whole adapter folder again",
        )
    peft.set_peft_model_state_dict(model, tensors)
    model.eval()
    return model


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise ArtefactError(
            "adapter.damaged",
            f"The adapter's tensors cannot be read: {error}",
            where=str(path),
            mend="copy the whole adapter folder again",
        ) from None


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", "utf-8")


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / name).read_bytes())
    except FileNotFoundError:
        if name == "trimtab.json" and (folder / "adapter_config.json").is_file():
            what, mend = (
                "plain peft wrote this adapter: it does not know its labels or its base",
                "train it with trimtab",
            )
        else:
            what, mend = (
                f"this is not an adapter: it has no {name}",
                "a run directory such as runs/latest, or the adapter folder in it",
            )
        raise ArtefactError(
            "adapter.incomplete", f"{what[0].upper()}{what[1:]}.", where=str(folder), mend=mend
        ) from None
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
