"""Adapters for the tests to serve: over small bases, with LoRA that matters, written as training writes them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab import adapter, tokens
from trimtab.classification import Labels
from trimtab.config import LoraSettings
from trimtab.forward import stock
from trimtab.hub import find_base
from trimtab.model import head_modules, inject, load_base, load_config, on_layers, resolve_targets, trainable

MAX_LENGTH = 48


def write_adapter(
    folder: Path,
    base_folder: Path,
    *,
    seed: int = 0,
    labels: tuple[str, ...] = ("neg", "pos"),
    targets: str | list[str] = "query-value",
    temperature: float = 1.0,
    **lora: Any,
) -> Any:
    """Writes an adapter with random A, B and head; returns peft's model, which answers as it should."""
    base = find_base(str(base_folder))
    tokenizer = tokens.from_base(base.folder)
    config = load_config(base.folder, num_labels=len(labels), dropout="config", pad_id=tokenizer.pad_id)
    torch.manual_seed(seed)
    loaded = load_base(base.folder, config)
    settings = LoraSettings(**lora)
    head = head_modules(loaded.model, loaded.new_parameters, settings.also_saved)
    names = on_layers(loaded.model, resolve_targets(loaded.model, targets, head), settings, head)
    model = inject(loaded.model, settings, names, head, base.recorded_as)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif "lora_" not in name:
                parameter.normal_(std=0.3)
    adapter.write(
        folder,
        model,
        stock(model, tokenizer.pad_id),
        labels=Labels(labels),
        max_length=MAX_LENGTH,
        keep="start",
        tokenizer=tokenizer,
        base=base,
        head=head,
        card="# A card\n",
        temperature=temperature,
    )
    return model.eval()


def answers(model: Any, texts: list[str], base_folder: Path) -> np.ndarray[Any, Any]:
    """What transformers and peft alone make of texts: logits float32[n, C]."""
    tokenizer = tokens.from_base(base_folder)
    encoded = tokens.encode(texts, tokenizer, MAX_LENGTH)
    with torch.inference_mode():
        found = [stock(model, tokenizer.pad_id)(encoded, np.array([i])).numpy()[0] for i in range(len(texts))]
    return np.stack(found)


def seal(folder: Path) -> None:
    """Makes the sums of a folder those of its files, as if training had written what stands there now."""
    meta = json.loads((folder / "trimtab.json").read_text("utf-8"))
    for key, name in (("tensors_sha256", "adapter_model.safetensors"), ("config_sha256", "adapter_config.json")):
        meta[key] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    meta.pop("sha256", None)
    meta["sha256"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    (folder / "trimtab.json").write_text(json.dumps(meta, ensure_ascii=False, indent=2) + "\n", "utf-8")
