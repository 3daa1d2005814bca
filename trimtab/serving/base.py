"""The one base that a server has in memory, and adapters as it needs them: read, checked and laid out beside it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab import adapter as adapter_folder
from trimtab import untrusted
from trimtab.adapter import Adapter
from trimtab.classification import LONGEST_SERVED_LABEL, Labels
from trimtab.config import Keep, RuntimeSettings
from trimtab.errors import ArtefactError, BaseModelError
from trimtab.fast import blocked, mixed
from trimtab.fast import encoder as encoders
from trimtab.fast.encoder import Encoder, NotSupported
from trimtab.fast.mixed import Beside, Costs, Layout
from trimtab.forward import fast_dtype
from trimtab.hub import Base
from trimtab.tokens import Tokenizer

_AGAIN = "copy the whole adapter folder again"
_WARM_UP = -(-blocked.LEAST_TOKENS // 32) * 32  # tokens, in rows of 32


@dataclass(frozen=True)
class ServedBase:
    """A base in memory, without any adapter."""

    base: Base
    tokenizer: Tokenizer
    """Of all its adapters: what makes tokens is program enough to hold up everybody, and comes from no adapter."""
    config: Mapping[str, Any]
    """Its config.json."""
    shapes: Mapping[str, Tensor]
    """Its tensors by the names of its files, without their numbers."""
    encoder: Encoder
    dtype: torch.dtype
    brings: tuple[str, ...]
    """The layers of the head that stand in its files."""
    costs: Costs

    @property
    def name(self) -> str:
        """What people call it; where it lies on this machine is nobody's business."""
        return self.base.hub_id or self.base.folder.name

    @property
    def width(self) -> int:
        """Numbers in the vector that the head reads."""
        return int(self.encoder.head.dense.weight.shape[0])

    @property
    def longest(self) -> int:
        """The most tokens that its positions take."""
        return len(self.encoder.embeddings.position) - self.encoder.embeddings.first_position

    @property
    def vocabulary(self) -> int:
        """Tokens that it has vectors for."""
        return len(self.encoder.embeddings.word)


@dataclass(frozen=True, eq=False)
class Described:
    """An adapter that fits its base by all that it says of itself, before its tensors are read."""

    adapter: Adapter
    layout: Layout
    modules: Mapping[tuple[int, int], str]
    shapes: Mapping[str, tuple[int, ...]]
    """Of its tensors, by peft's names."""

    def read_tensors(self) -> dict[str, Tensor]:
        """Its tensors by the names of the base's weights.

        Raises:
            ArtefactError: one is missing, extra, of another shape or not finite; the file is damaged.
        """
        file = self.adapter.folder / untrusted.TENSORS
        tensors = untrusted.read_tensors(file, self.shapes, self.adapter.tensors_sha256)
        return {name.removeprefix(encoders.PEFT): tensor for name, tensor in tensors.items()}


@dataclass(frozen=True, eq=False)
class Resident:
    """One version of an adapter in memory. What is computed with it stays valid until nobody holds it any more."""

    name: str
    generation: int
    """Counts the versions of this name since the server started, from 1; 0: not in use yet."""
    sha256: str
    """Of its description, the sums of its files among it."""
    labels: Labels
    max_length: int
    keep: Keep
    temperature: float
    rank: int
    variant: str
    targets: tuple[str, ...]
    """The weights that it stands beside."""
    beside: Beside
    memory: Tensor
    """uint8[n]: its piece."""

    @property
    def version(self) -> str:
        """Generation and sum, as answers name it."""
        return f"{self.generation}-{self.sha256[:12]}"

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return self.memory.numel()


def load_base(base: Base, tokenizer: Tokenizer, settings: RuntimeSettings) -> ServedBase:
    """Reads a base and measures what small products cost beside it.

    Args:
        base: The base.
        tokenizer: Its tokenizer, by `tokens.from_base`.
        settings: Its dtype.

    Raises:
        BaseModelError: it is not of the BERT family, which alone is served.
        RecipeError: a dtype that this processor is slow in.
    """
    dtype = fast_dtype(settings)
    try:
        config = json.loads((base.folder / "config.json").read_bytes())
        tensors = adapter_folder.base_tensors(base)
        encoder = encoders.of_base(config, tensors, dtype)
    except NotSupported as found:
        raise BaseModelError(
            "serve.base",
            f"This base cannot be served: {found}.",
            where=str(base.folder),
            mend=f"bases of these kinds can: {', '.join(encoders.LAYOUTS)}; others answer by trimtab predict",
        ) from None
    with torch.inference_mode():  # the first pass maps the weights and keeps them blocked where that pays
        offsets = np.arange(0, _WARM_UP + 1, 32)
        batch = encoders.pack(np.zeros(_WARM_UP, np.int32), offsets, np.arange(len(offsets) - 1))
        encoders.first_tokens(encoder, encoders.Batch([batch], batch.order))
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    width = encoder.head.dense.weight.shape[0]
    return ServedBase(
        base, tokenizer, config, shapes, encoder, dtype, encoders.brings(config, tensors), mixed.measure(width, dtype)
    )


def describe(served: ServedBase, folder: Path) -> Described:
    """Reads what an adapter folder says of itself, and proves that it fits the base. Its tensors are not read.

    Raises:
        ArtefactError: it is damaged, not one of ours, or for another base; it stands beside weights outside the layers;
            it was trained with another tokenizer than the base's.
    """
    adapter = adapter_folder.read(folder, served.tokenizer)
    if adapter.base["weights_sha256"] != served.base.weights_sha256:
        raise ArtefactError(
            "adapter.other_base",
            f"This adapter was trained on {adapter.base['name']}, whose weights are not the base's here: sha256 "
            f"{adapter.base['weights_sha256'][:12]}, expected {served.base.weights_sha256[:12]}.",
            where=str(folder),
            mend="serve it on its own base: one server for each base",
        )
    if not adapter.tokenizer.is_like(served.tokenizer):
        raise ArtefactError(
            "adapter.other_tokenizer",
            "This adapter was trained with another tokenizer than the base's.",
            where=str(folder),
            mend="trimtab predict answers with it; to serve it, put its tokenizer files into a copy of the base's "
            "folder, and serve that: --base FOLDER",
        )
    shape = adapter_folder.described_shape(adapter)
    dora = adapter.lora.variant == "dora"
    try:
        modules = encoders.sites(served.config, served.shapes, adapter.lora.target_modules)
        shapes = encoders.adapter_shapes(served.config, served.shapes, dora=dora, **shape)
    except (NotSupported, ValueError) as found:
        raise ArtefactError("serve.adapter", f"This adapter cannot be served: {found}.", where=str(folder)) from None
    _check(served, adapter, modules, folder)
    form = mixed.form_of(served.encoder, modules, adapter.lora.r, dora=dora)
    dense, _ = encoders.LAYOUTS[served.encoder.head.kind].head
    own_dense = f"{encoders.PEFT}{dense}.weight" in shapes
    layout = Layout(form, served.dtype, served.width, len(adapter.labels), own_dense=own_dense)
    return Described(adapter, layout, modules, shapes)


def _check(served: ServedBase, adapter: Adapter, modules: Mapping[tuple[int, int], str], folder: Path) -> None:
    """What a description claims, against what the base has, before a tensor is read."""
    if (longest := max(map(len, adapter.labels.values))) > LONGEST_SERVED_LABEL:
        raise ArtefactError(
            "serve.label",
            f"A label has {longest:,} characters; at most {LONGEST_SERVED_LABEL} are served.",
            where=str(folder),
            mend="shorter labels; --names gives them longer names for people",
        )
    dense, out = encoders.LAYOUTS[served.encoder.head.kind].head
    for layer in (dense, out):
        is_own = any(layer == part or layer.startswith(part + ".") for part in adapter.head)
        if not is_own and not (layer == dense and dense in served.brings):
            raise ArtefactError(
                "adapter.no_head",
                f"This adapter has lost its answer layer: it does not hold {layer}, and the base brings none.",
                where=str(folder),
                mend="train it again with trimtab, or with peft and task_type=SEQ_CLS",
            )
    if not modules:
        raise ArtefactError(
            "adapter.damaged", "Its target modules are none of the base's.", where=str(folder), mend=_AGAIN
        )
    if adapter.max_length > served.longest:
        raise ArtefactError(
            "adapter.damaged",
            f"Texts are cut at {adapter.max_length:,} tokens, and the base has no vectors for more than "
            f"{served.longest:,}.",
            where=str(folder),
            mend=_AGAIN,
        )


def place(served: ServedBase, found: Described, tensors: Mapping[str, Tensor], name: str, memory: Tensor) -> Resident:
    """Copies an adapter into its piece of memory.

    Args:
        served: The base.
        found: The adapter.
        tensors: What `found.read_tensors` gave.
        name: What requests call it.
        memory: uint8[found.layout.bytes].
    """
    adapter = found.adapter
    beside = mixed.lay_out(served.encoder, found.layout, found.modules, tensors, adapter.lora.scaling, memory)
    return Resident(
        name=name,
        generation=0,
        sha256=adapter.description_sha256,
        labels=adapter.labels,
        max_length=adapter.max_length,
        keep=adapter.keep,
        temperature=adapter.temperature,
        rank=adapter.lora.r,
        variant=adapter.lora.variant,
        targets=tuple(found.modules.values()),
        beside=beside,
        memory=memory,
    )
