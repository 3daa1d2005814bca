"""Tokens -> logits: the fast forward where the model is of the BERT family, transformers' own everywhere else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from trimtab.batching import collate
from trimtab.config import RuntimeSettings
from trimtab.errors import RecipeError
from trimtab.fast import encoder
from trimtab.fast.dropout import Noise
from trimtab.fast.encoder import Encoder, NotSupported, Stored
from trimtab.machine import has_bf16, is_faster_in_bf16, processor
from trimtab.tokens import Encoded


class Forward(Protocol):
    """Both forwards are replaceable by each other here."""

    def __call__(self, encoded: Encoded, rows: npt.NDArray[np.int64], dropout_seed: int | None = None) -> torch.Tensor:
        """Logits float32[B, C] of rows, in their order; `dropout_seed` None: no dropout."""


class Vectors(Protocol):
    """The base's own sentence vectors, as if nothing had been trained."""

    def __call__(self, encoded: Encoded, rows: npt.NDArray[np.int64], *, first_only: bool) -> torch.Tensor:
        """float32[B, D]: the state of each row's first token after the last layer, or the mean over its tokens."""


@dataclass(frozen=True)
class Engine:
    """What computes logits, and why it and not the other."""

    forward: Forward
    name: str
    """`fast` or `stock`."""
    reason: str
    dtype: str = "float32"
    """Of states and frozen weights."""
    vectors: Vectors | None = None
    """None where the adapter was merged into the weights."""
    encoder: Encoder | None = None
    """What the fast forward runs; None: it is stock."""

    @property
    def line(self) -> str:
        """A few words for people."""
        return f"{self.name} forward in {self.dtype} ({self.reason})"


def fast_dtype(settings: RuntimeSettings) -> torch.dtype:
    """The dtype of the fast forward; `auto` is bfloat16 where that was measured to be faster, by oneDNN.

    Raises:
        RecipeError: bfloat16 without instructions for it.
    """
    chip = processor()
    if settings.dtype == "auto":
        has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return torch.bfloat16 if has_onednn and is_faster_in_bf16(chip) else torch.float32
    if settings.dtype == "float32":
        return torch.float32
    if not has_bf16(chip):
        raise RecipeError(
            "runtime.dtype",
            "This processor has no bfloat16 instructions: its products would take 20 to 70 times as long as float32.",
            where="runtime.dtype",
            mend="--set runtime.dtype=auto",
        )
    return torch.bfloat16


def choose(model: Any, pad_id: int, device: torch.device, settings: RuntimeSettings) -> Engine:
    """The fast forward over a peft model's own parameters where it can be, else the model as it is.

    Raises:
        RecipeError: `runtime.fast = on`, and it cannot be; or a dtype that would be slow.
    """
    reason = "as the recipe says"
    if settings.fast != "off":
        try:
            if device.type != "cpu":
                raise NotSupported(f"the device is {device.type}")
            dtype = fast_dtype(settings)
            built = encoder.of_peft_model(model, dtype)
            name = str(dtype).removeprefix("torch.")
            return Engine(fast(built), "fast", f"{model.config.model_type} on a CPU", name, _fast_vectors(built), built)
        except NotSupported as found:
            reason = str(found)
            if settings.fast == "on":
                raise RecipeError(
                    "runtime.fast",
                    f"The fast forward cannot be had: {reason}.",
                    where="runtime.fast",
                    mend="--set runtime.fast=auto",
                ) from None
    if settings.dtype == "bfloat16":
        raise RecipeError(
            "runtime.dtype",
            f"Only the fast forward computes in bfloat16, and it cannot be had: {reason}.",
            where="runtime.dtype",
            mend="--set runtime.dtype=auto",
        )
    return Engine(stock(model, pad_id), "stock", reason, vectors=_stock_vectors(model, pad_id))


def fast(classifier: Encoder, kept: Sequence[tuple[Encoded, Stored]] = ()) -> Forward:
    """The forward of an encoder of ours; from stored states for the texts that `kept` holds, else from the tokens."""

    def forward(encoded: Encoded, rows: npt.NDArray[np.int64], dropout_seed: int | None = None) -> torch.Tensor:
        noise = None
        if dropout_seed is not None:
            noise = Noise(dropout_seed)
            torch.manual_seed(dropout_seed)  # for the head's
        stored = next((states for texts, states in kept if texts is encoded), None)
        return encoder.logits(classifier, encoder.cut(encoded.ids, encoded.offsets, rows), noise, stored)

    return forward


def stock(model: Any, pad_id: int) -> Forward:
    """The forward of a transformers model, with or without peft around it, over padded batches."""
    device = next(model.parameters()).device

    def forward(encoded: Encoded, rows: npt.NDArray[np.int64], dropout_seed: int | None = None) -> torch.Tensor:
        model.train(dropout_seed is not None)
        if dropout_seed is not None:
            torch.manual_seed(dropout_seed)
        batch = collate(encoded, rows, pad_id)
        output = model(
            input_ids=torch.from_numpy(batch.input_ids).to(device),
            attention_mask=torch.from_numpy(batch.attention_mask).to(device, torch.int64),
        )
        logits: torch.Tensor = output.logits.float()
        return logits

    return forward


def _fast_vectors(classifier: Encoder) -> Vectors:
    def vectors(encoded: Encoded, rows: npt.NDArray[np.int64], *, first_only: bool) -> torch.Tensor:
        batch = encoder.cut(encoded.ids, encoded.offsets, rows)
        return encoder.vectors(classifier, batch, first_only=first_only)

    return vectors


def _stock_vectors(model: Any, pad_id: int) -> Vectors:
    device = next(model.parameters()).device

    def vectors(encoded: Encoded, rows: npt.NDArray[np.int64], *, first_only: bool) -> torch.Tensor:
        model.eval()
        batch = collate(encoded, rows, pad_id)
        mask = torch.from_numpy(batch.attention_mask).to(device)
        with model.disable_adapter():
            inner = model.get_base_model().base_model  # transformers' name of the model below the head
            states = inner(input_ids=torch.from_numpy(batch.input_ids).to(device), attention_mask=mask.long())
        found: torch.Tensor = states.last_hidden_state.float()
        return found[:, 0] if first_only else (found * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)

    return vectors
