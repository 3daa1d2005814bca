"""Parameters by name -> encoder -> logits, for the BERT family.

An encoder is built from a mapping of names to tensors, so that it runs over the very parameters that peft and
transformers hold, and over files as well. A model is one of the family only if every name that the layout expects
is there and no other, each of the expected shape, and its config asks for nothing that is not computed here.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import dropout, embedding, gelu, layer_norm, linear

from trimtab.fast import blocked, cores
from trimtab.fast.blocked import Blocked
from trimtab.fast.dropout import Noise, can_quantise, keep_scale
from trimtab.fast.layer import (
    Adapters,
    Group,
    Layer,
    Linear,
    Lora,
    Norm,
    Saved,
    Scope,
    backward,
    blocks,
    forward,
    masked,
)
from trimtab.fast.workspace import Workspace

_T = TypeVar("_T")
_EMBEDDINGS_SITE = 1 << 16  # beyond the number of any layer


class NotSupported(ValueError):
    """The model is not computed here; the message says why, for `because ...`."""


@dataclass(frozen=True)
class Layout:
    """Where an architecture keeps what: names below `prefix`, and the keys of its config."""

    prefix: str
    blocks: str
    embeddings: str
    query: str
    key: str
    value: str
    attention_output: str
    attention_norm: str
    up: str
    down: str
    output_norm: str
    positions_after_pad: bool
    """RoBERTa's first token has position pad_id + 1; BERT's has 0."""
    has_types: bool
    head: tuple[str, ...]
    activation: str
    """Config keys: activation, dropout of states, of attention, of the head, number of heads."""
    hidden_dropout: str
    attention_dropout: str
    head_dropout: str
    heads: str
    width: str
    drops_attention_output: bool = True
    fixed_eps: float = 0.0


_BERT = Layout(
    prefix="bert.",
    blocks="encoder.layer.",
    embeddings="embeddings.",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    output_norm="output.LayerNorm",
    positions_after_pad=False,
    has_types=True,
    head=("bert.pooler.dense", "classifier"),
    activation="hidden_act",
    hidden_dropout="hidden_dropout_prob",
    attention_dropout="attention_probs_dropout_prob",
    head_dropout="classifier_dropout",
    heads="num_attention_heads",
    width="hidden_size",
)
_ROBERTA = replace(_BERT, prefix="roberta.", positions_after_pad=True, head=("classifier.dense", "classifier.out_proj"))
LAYOUTS: dict[str, Layout] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": replace(_BERT, prefix="electra.", head=("classifier.dense", "classifier.out_proj")),
    "distilbert": Layout(
        prefix="distilbert.",
        blocks="transformer.layer.",
        embeddings="embeddings.",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_output="attention.out_lin",
        attention_norm="sa_layer_norm",
        up="ffn.lin1",
        down="ffn.lin2",
        output_norm="output_layer_norm",
        positions_after_pad=False,
        has_types=False,
        head=("pre_classifier", "classifier"),
        activation="activation",
        hidden_dropout="dropout",
        attention_dropout="attention_dropout",
        head_dropout="seq_classif_dropout",
        heads="n_heads",
        width="dim",
        drops_attention_output=False,
        fixed_eps=1e-12,
    ),
}


@dataclass(frozen=True)
class Embeddings:
    """word [V, E], position [P, E], the type-0 row [E] or None, norm over E, and ELECTRA's projection to D or None."""

    word: Tensor
    position: Tensor
    type_: Tensor | None
    norm: Norm
    projection: Linear | None
    first_position: int
    """Position of the first token: 0, or pad_id + 1."""
    pad_id: int
    dropout: float


@dataclass(frozen=True)
class Head:
    """Two layers over the first token; what stands between them depends on the architecture."""

    kind: str
    dense: Linear
    out: Linear
    dropout: float


@dataclass(frozen=True)
class Encoder:
    """A whole classifier."""

    embeddings: Embeddings
    layers: tuple[Layer, ...]
    head: Head
    workspace: Workspace


class Packed(NamedTuple):
    """The tokens of a batch end to end, rows sorted by length."""

    ids: Tensor
    """int64[N]"""
    places: Tensor
    """int64[N]: the place of each token within its row, from 0."""
    first: Tensor
    """int64[B]: where each row begins."""
    groups: list[Group]
    order: Tensor
    """int64[B]: for each row as it was asked for, its place among the sorted."""
    source: list[tuple[int, int]]
    """Where each row begins and ends among the tokens of all texts."""


class Batch(NamedTuple):
    """Rows in parts, which cores compute side by side."""

    parts: list[Packed]
    order: Tensor
    """int64[B]: for each row as it was asked for, its place among those of all parts end to end."""


class Stored(NamedTuple):
    """What the first `depth` layers make of all texts, kept from an earlier pass.

    states bfloat16[N, D], a vector for each token of `Encoded`, in its order.
    """

    states: Tensor
    depth: int


def pack(ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> Packed:
    """Rows of `Encoded` end to end, sorted by length.

    Args:
        ids: int32[N], tokens of all texts.
        offsets: int64[n + 1], where each text begins.
        rows: int64[B], the rows wanted.
    """
    lengths = offsets[rows + 1] - offsets[rows]
    order = np.argsort(lengths, kind="stable")
    rows, lengths = rows[order], lengths[order]
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)[:-1]])
    starts = np.flatnonzero(np.diff(lengths, prepend=-1))
    counts = np.diff(starts, append=len(rows))
    return Packed(
        ids=torch.from_numpy(np.concatenate([ids[offsets[row] : offsets[row + 1]] for row in rows]).astype(np.int64)),
        places=torch.from_numpy(np.arange(int(lengths.sum())) - np.repeat(first, lengths)),
        first=torch.from_numpy(first),
        groups=[
            Group(int(row), int(first[row]), int(count), int(lengths[row]))
            for row, count in zip(starts, counts, strict=True)
        ],
        order=torch.from_numpy(np.argsort(order)),
        source=[(int(offsets[row]), int(offsets[row + 1])) for row in rows],
    )


def cut(ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> Batch:
    """Rows of `Encoded`, as for `pack`, in parts."""
    found = cores.cut(offsets[rows + 1] - offsets[rows])
    parts = [pack(ids, offsets, rows[part]) for part in found]
    begins = np.cumsum([0, *(len(part) for part in found)])[:-1]
    places = np.concatenate([begin + one.order.numpy() for begin, one in zip(begins, parts, strict=True)])
    order = np.empty(len(rows), np.int64)
    order[np.concatenate(found)] = places
    return Batch(parts, torch.from_numpy(order))


def logits(encoder: Encoder, batch: Batch, noise: Noise | None = None, stored: Stored | None = None) -> Tensor:
    """Logits float32[B, C] of a batch, in the order in which its rows were asked for.

    The last layer is computed for the first token of each row alone: the head reads no other. Where a backward
    follows, or with dropout, its keys and values need every token.

    Args:
        encoder: The classifier.
        batch: Its tokens.
        noise: Randomness of dropout, of which each part has its own; None: no dropout. The head's dropout comes from
            torch's generator.
        stored: States to begin from; None: from the embeddings.

    Raises:
        ValueError: LoRA stands beside a layer that `stored` would skip.
    """
    if stored is not None and stored.depth > lowest_trained(encoder):
        raise ValueError(f"{stored.depth} layers are stored, and LoRA stands beside layer {lowest_trained(encoder)}")
    first = (learning_first_tokens if torch.is_grad_enabled() else first_tokens)(encoder, batch, noise, stored)
    return apply_head(encoder.head, first.float(), training=noise is not None)


def first_tokens(
    encoder: Encoder,
    batch: Batch,
    noise: Noise | None = None,
    stored: Stored | None = None,
    beside: Adapters | None = None,
) -> Tensor:
    """What the head reads, [B, D], in the order in which rows were asked for, without gradients.

    `beside` counts rows within a part: for batches of one.
    """

    def part(own: Encoder, packed: Packed, number: int) -> Tensor:
        first, _ = _forward(own, packed, _noise_of(noise, number), stored, keeps=False, beside=beside)
        return first

    with encoder.workspace.lock:
        return torch.cat(_in_parts(encoder, batch, part))[batch.order]


def lora_matrices(encoder: Encoder) -> list[Tensor]:
    """Every LoRA matrix, lowest layer first."""
    return [matrix for layer in encoder.layers for matrix in layer.trained()]


def learning_first_tokens(
    encoder: Encoder, batch: Batch, noise: Noise | None = None, stored: Stored | None = None
) -> Tensor:
    """As `first_tokens`, with gradients for every LoRA matrix."""
    first: Tensor = _Encoder.apply(encoder, batch, noise, stored, *lora_matrices(encoder))  # type: ignore[no-untyped-call]
    return first


def vectors(encoder: Encoder, batch: Batch, *, first_only: bool) -> Tensor:
    """What the base alone makes of each row: float32[B, D], in the order in which rows were asked for.

    Args:
        encoder: The classifier; its LoRA is left out.
        batch: Its tokens.
        first_only: The state of the first token; else the mean over the tokens.
    """
    bare = replace(encoder, layers=tuple(layer.without_lora() for layer in encoder.layers))

    def part(own: Encoder, packed: Packed, number: int) -> Tensor:
        x, _ = _forward(own, packed, None, None, keeps=False, first_only=first_only)
        if not first_only:
            spans = [x[g.token : g.token + g.rows * g.length].view(g.rows, g.length, -1) for g in packed.groups]
            x = torch.cat([span.float().mean(1) for span in spans])
        return x

    with encoder.workspace.lock:
        return torch.cat(_in_parts(bare, batch, part))[batch.order].float()


def trunk(encoder: Encoder, batch: Packed, depth: int) -> Tensor:
    """What the first `depth` layers, fewer than all, make of a batch: bfloat16[N, D], tokens as they are packed."""
    with torch.inference_mode(), encoder.workspace.lock:
        encoder.workspace.batches += 1
        x = _embed(encoder.embeddings, batch, None, encoder.workspace)
        x, _ = _layers(encoder, x, range(depth), batch, None, keeps=False)
        return x.to(torch.bfloat16, copy=True)


def lowest_trained(encoder: Encoder) -> int:
    """The number of the lowest layer with LoRA; of all layers where there is none."""
    return next((i for i, layer in enumerate(encoder.layers) if layer.trained()), len(encoder.layers))


def drops_below(encoder: Encoder, depth: int) -> bool:
    """Whether dropout in the embeddings or the first `depth` layers makes every pass another one."""
    rates = [encoder.embeddings.dropout]
    for layer in encoder.layers[:depth]:
        rates += [layer.attention_dropout, layer.attention_output_dropout, layer.output_dropout]
    return any(rates)


class _Encoder(torch.autograd.Function):
    """The states of the first tokens, in the order in which rows were asked for, as a function of every LoRA matrix."""

    @staticmethod
    def forward(
        ctx: Any, encoder: Encoder, batch: Batch, noise: Noise | None, stored: Stored | None, *trained: Tensor
    ) -> Tensor:
        def part(own: Encoder, packed: Packed, number: int) -> tuple[Tensor, dict[int, Saved]]:
            return _forward(own, packed, _noise_of(noise, number), stored, keeps=True)

        first, ctx.saved = zip(*_in_parts(encoder, batch, part), strict=True)
        ctx.encoder, ctx.batch, ctx.noise, ctx.number = encoder, batch, noise, encoder.workspace.batches
        return torch.cat(first)[batch.order]

    @staticmethod
    def backward(ctx: Any, *d_first: Tensor) -> Any:
        encoder, batch = ctx.encoder, ctx.batch
        if encoder.workspace.batches != ctx.number:
            raise RuntimeError("another batch ran between this one's forward and its backward")
        sorted_ = torch.empty_like(d_first[0]).index_copy_(0, batch.order, d_first[0])
        dy = torch.split(sorted_, [len(packed.first) for packed in batch.parts])

        def part(own: Encoder, packed: Packed, number: int) -> list[Tensor]:
            return _backward(own, packed, dy[number], ctx.saved[number], _noise_of(ctx.noise, number))

        first, *others = _in_parts(encoder, batch, part)
        for gradients in others:
            torch._foreach_add_(first, gradients)
        return None, None, None, None, *first


def _noise_of(noise: Noise | None, part: int) -> Noise | None:
    return None if noise is None else replace(noise, part=part)


def _in_parts(encoder: Encoder, batch: Batch, work: Callable[[Encoder, Packed, int], _T]) -> list[_T]:
    """What `work` makes of each part, side by side: of an encoder with memory for it, its tokens and its number."""
    return cores.run(
        [
            partial(work, replace(encoder, workspace=encoder.workspace.of_part(number)), packed, number)
            for number, packed in enumerate(batch.parts)
        ]
    )


def _forward(
    encoder: Encoder,
    batch: Packed,
    noise: Noise | None,
    stored: Stored | None,
    *,
    keeps: bool,
    first_only: bool = True,
    beside: Adapters | None = None,
) -> tuple[Tensor, dict[int, Saved]]:
    """The states of the first tokens, sorted by length: [B, D], or of all: [N, D]; and what the backward needs."""
    encoder.workspace.batches += 1
    begin = 0 if stored is None else stored.depth
    x = (
        _embed(encoder.embeddings, batch, noise, encoder.workspace)
        if stored is None
        else _read(stored, batch, encoder.embeddings.word.dtype, encoder.workspace)
    )
    lowest = max(begin, lowest_trained(encoder)) if keeps else len(encoder.layers)
    # The memory of the lower ones is shared.
    how: dict[str, Any] = {"first_only": first_only, "beside": beside}
    x, _ = _layers(encoder, x, range(begin, lowest), batch, noise, keeps=False, **how)
    return _layers(encoder, x, range(lowest, len(encoder.layers)), batch, noise, keeps=keeps, **how)


def _backward(
    encoder: Encoder, batch: Packed, d_first: Tensor, saved: Mapping[int, Saved], noise: Noise | None
) -> list[Tensor]:
    """The gradients of every LoRA matrix, from that of the first tokens' states [B, D], sorted by length."""
    dy: Tensor | None = d_first
    lowest = lowest_trained(encoder)
    gradients: list[Tensor] = []
    for number in range(len(encoder.layers) - 1, lowest - 1, -1):
        assert dy is not None
        scope = Scope(number, batch.groups, encoder.workspace, noise, keeps=True, dtype=dy.dtype)
        dy, found = backward(
            encoder.layers[number],
            dy,
            saved[number],
            scope,
            batch.first if number == len(encoder.layers) - 1 else None,
            needs_dx=number > lowest,
        )
        gradients = found + gradients
    return gradients


def _layers(
    encoder: Encoder,
    x: Tensor,
    numbers: range,
    batch: Packed,
    noise: Noise | None,
    *,
    keeps: bool,
    first_only: bool = True,
    beside: Adapters | None = None,
) -> tuple[Tensor, dict[int, Saved]]:
    """States through some layers, and what the backward needs of each; nothing where none will follow."""
    saved = {}
    for number in numbers:
        scope = Scope(number, batch.groups, encoder.workspace, noise, keeps, x.dtype, beside=beside)
        is_last = number == len(encoder.layers) - 1
        x, found = forward(encoder.layers[number], x, scope, batch.first if is_last and first_only else None)
        if keeps:
            saved[number] = found
        del found  # oneDNN's products have memory of their own: held, 28 MB a layer of MiniLM and 2,048 tokens
    return x, saved


def _read(stored: Stored, batch: Packed, dtype: torch.dtype, workspace: Workspace) -> Tensor:
    """The stored states of a batch, packed: [N, D]."""
    x = workspace.take("embedded", shape=(len(batch.ids), stored.states.shape[1]), dtype=dtype)
    done = 0
    for begin, end in batch.source:
        x[done : done + end - begin].copy_(stored.states[begin:end])
        done += end - begin
    return x


def _embed(e: Embeddings, batch: Packed, noise: Noise | None, workspace: Workspace) -> Tensor:
    places = batch.places
    if e.first_position:  # RoBERTa numbers the tokens that are not padding, wherever they stand
        is_pad = batch.ids == e.pad_id
        if bool(is_pad.any()):
            seen = torch.cumsum(~is_pad, 0)
            before = seen[batch.first] - (~is_pad[batch.first]).long()
            lengths = torch.diff(batch.first, append=torch.tensor([len(batch.ids)]))
            places = (seen - torch.repeat_interleave(before, lengths) - 1).masked_fill(is_pad, -1)
    x = workspace.take("embedded", shape=(len(batch.ids), e.word.shape[1]), dtype=e.word.dtype)
    for part, ids, at in blocks(x, batch.ids, places):
        t = embedding(ids, e.word)
        t += embedding(at + e.first_position, e.position)
        if e.type_ is not None:
            t += e.type_
        part.copy_(layer_norm(t, x.shape[1:], e.norm.weight, e.norm.bias, e.norm.eps))
    if noise is not None and e.dropout > 0:
        mask = workspace.take("mask", _EMBEDDINGS_SITE, shape=x.shape, dtype=torch.uint8)
        masked(x, noise.fill(mask, e.dropout, _EMBEDDINGS_SITE), x, workspace).mul_(keep_scale(e.dropout))
    return x if e.projection is None else linear(x, e.projection.weight, e.projection.bias)


def apply_head(head: Head, x: Tensor, *, training: bool) -> Tensor:
    """The head of each architecture as transformers has it: x [B, D] -> [B, C]."""
    return linear(before_out(head, x, training=training), head.out.weight, head.out.bias)


def before_out(head: Head, x: Tensor, *, training: bool) -> Tensor:
    """What the last layer of the head reads: x [B, D] -> [B, D]."""

    def drop(t: Tensor) -> Tensor:
        return dropout(t, head.dropout, training)

    def dense(t: Tensor) -> Tensor:
        return linear(t, head.dense.weight, head.dense.bias)

    if head.kind == "bert":
        return drop(torch.tanh(dense(x)))
    if head.kind == "distilbert":
        return drop(torch.relu(dense(x)))
    if head.kind == "electra":
        return drop(gelu(dense(drop(x))))
    return drop(torch.tanh(dense(drop(x))))


# -- building --------------------------------------------------------------------------------------------------


def build(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], loras: Mapping[str, Lora], num_labels: int
) -> Encoder:
    """Builds an encoder over tensors; nothing is copied.

    Args:
        config: The base's config.json as a mapping.
        tensors: Every parameter of the model by transformers' name, without LoRA.
        loras: LoRA by the name of the weight's module.
        num_labels: Classes.

    Raises:
        NotSupported: the model only looks like one of the family, or is none.
    """
    kind = str(config.get("model_type"))
    if kind not in LAYOUTS:
        raise NotSupported(f"{kind} is not of the BERT family")
    layout = LAYOUTS[kind]
    _check_config(config, layout)
    taken = _Taken(tensors, loras)
    width = int(config[layout.width])
    eps = layout.fixed_eps or float(config["layer_norm_eps"])
    hidden_dropout = float(config[layout.hidden_dropout])
    root = layout.prefix + layout.blocks
    numbers = sorted({int(m.group(1)) for name in tensors if (m := re.match(re.escape(root) + r"(\d+)\.", name))})
    if not numbers or numbers != list(range(len(numbers))):
        raise NotSupported("its layers are not numbered as expected")

    def block(number: int) -> Layer:
        at = f"{root}{number}."
        up = taken.linear(at + layout.up, columns=width)
        return Layer(
            query=taken.linear(at + layout.query, width, width),
            key=taken.linear(at + layout.key, width, width),
            value=taken.linear(at + layout.value, width, width),
            attention_output=taken.linear(at + layout.attention_output, width, width),
            attention_norm=taken.norm(at + layout.attention_norm, width, eps),
            up=up,
            down=taken.linear(at + layout.down, width, up.weight.shape[0]),
            output_norm=taken.norm(at + layout.output_norm, width, eps),
            heads=int(config[layout.heads]),
            attention_dropout=float(config[layout.attention_dropout]),
            attention_output_dropout=hidden_dropout if layout.drops_attention_output else 0.0,
            output_dropout=hidden_dropout,
        )

    at = layout.prefix + layout.embeddings
    word = taken.matrix(at + "word_embeddings.weight")
    projection = layout.prefix + "embeddings_project"
    pad_id = int(config.get("pad_token_id") or 0)
    embeddings = Embeddings(
        word=word,
        position=taken.matrix(at + "position_embeddings.weight", columns=word.shape[1]),
        type_=taken.matrix(at + "token_type_embeddings.weight", columns=word.shape[1])[0] if layout.has_types else None,
        norm=taken.norm(at + "LayerNorm", word.shape[1], eps),
        projection=taken.linear(projection, width, word.shape[1]) if projection + ".weight" in tensors else None,
        first_position=pad_id + 1 if layout.positions_after_pad else 0,
        pad_id=pad_id,
        dropout=hidden_dropout,
    )
    head_dropout = config.get(layout.head_dropout)
    head = Head(
        kind=kind,
        dense=taken.linear(layout.head[0], width, width),
        out=taken.linear(layout.head[1], num_labels, width),
        dropout=hidden_dropout if head_dropout is None else float(head_dropout),
    )
    blocks = tuple(block(number) for number in numbers)
    if left := taken.left():
        raise NotSupported(f"it has {left[0]}, which the fast forward does not know")
    beside = {id(item.lora) for one in blocks for item in one.linears}
    if stray := [name for name, lora in loras.items() if id(lora) not in beside]:
        raise NotSupported(f"LoRA stands beside {stray[0]}")
    if stray := [name for name, t in tensors.items() if t.requires_grad and name.rpartition(".")[0] not in layout.head]:
        raise NotSupported(f"{stray[0]} is trained in full")
    rates = {rate for one in blocks for rate in (one.attention_dropout, one.output_dropout)}
    if odd := [rate for rate in rates | {lora.dropout for lora in loras.values()} if not can_quantise(rate)]:
        raise NotSupported(f"a dropout of {odd[0]} is none in 256ths")
    return Encoder(embeddings, blocks, head, Workspace())


def _check_config(config: Mapping[str, Any], layout: Layout) -> None:
    needed = [layout.activation, layout.hidden_dropout, layout.attention_dropout, layout.heads, layout.width]
    needed += [] if layout.fixed_eps else ["layer_norm_eps"]
    needed += ["pad_token_id"] if layout.positions_after_pad else []
    if missing := [key for key in needed if key not in config]:
        raise NotSupported(f"its config does not state {missing[0]}")
    if config[layout.activation] != "gelu":
        raise NotSupported(f"its activation is {config[layout.activation]}")
    if int(config[layout.width]) % int(config[layout.heads]):
        raise NotSupported("its width is no multiple of its heads")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise NotSupported(f"its positions are {config['position_embedding_type']}")
    for key in ("is_decoder", "add_cross_attention", "pruned_heads"):
        if config.get(key):
            raise NotSupported(f"its config says {key}")


class _Taken:
    """Hands out tensors by name, checks their shapes, and knows which nobody asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], loras: Mapping[str, Lora]) -> None:
        self.tensors, self.loras = tensors, loras
        self.names: set[str] = set()

    def matrix(self, name: str, rows: int = 0, columns: int = 0) -> Tensor:
        tensor = self._take(name)
        if tensor.ndim != 2 or any(a and a != b for a, b in zip((rows, columns), tensor.shape, strict=True)):
            raise NotSupported(f"{name} has shape {tuple(tensor.shape)}")
        return tensor

    def vector(self, name: str, size: int) -> Tensor:
        tensor = self._take(name)
        if tuple(tensor.shape) != (size,):
            raise NotSupported(f"{name} has shape {tuple(tensor.shape)}")
        return tensor

    def linear(self, name: str, rows: int = 0, columns: int = 0) -> Linear:
        weight = self.matrix(name + ".weight", rows, columns)
        return Linear(weight, self.vector(name + ".bias", weight.shape[0]), self.loras.get(name))

    def norm(self, name: str, size: int, eps: float) -> Norm:
        return Norm(self.vector(name + ".weight", size), self.vector(name + ".bias", size), eps)

    def left(self) -> list[str]:
        return sorted(set(self.tensors) - self.names)

    def _take(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise NotSupported(f"it has no {name}")
        self.names.add(name)
        return self.tensors[name]


# -- over a peft model, and over files -------------------------------------------------------------------------


def of_peft_model(model: Any, dtype: torch.dtype = torch.float32) -> Encoder:
    """An encoder over the parameters of a peft model around a transformers classifier; in float32 nothing is copied.

    Args:
        model: The peft model.
        dtype: Of the frozen weights, whose parameters get converted data; what is trained stays float32.

    Raises:
        NotSupported: it is not one of the family, or its LoRA is of a variant that is not computed here.
    """
    inner = model.get_base_model()
    built = _of_module(inner)
    if dtype != torch.float32:
        head = LAYOUTS[inner.config.model_type].head
        for name, parameter in inner.named_parameters():
            stays = parameter.requires_grad or ".original_module." in name or name.startswith(head)
            # A copy of what stays: one tensor that is still the base's file keeps all of its pages in memory.
            parameter.data = parameter.data.clone() if stays else parameter.data.to(dtype)
        built = _of_module(inner)  # the row of the token types is a view of what was there before
    return built


def _of_module(inner: Any) -> Encoder:
    if not type(inner).__module__.startswith("transformers.models."):
        raise NotSupported(f"{type(inner).__name__} is no class of transformers")
    tensors: dict[str, Tensor] = {}
    matrices: dict[str, dict[str, Tensor]] = {}
    for full, parameter in inner.named_parameters():
        if ".original_module." in full:
            continue
        name = full.replace(".modules_to_save.default", "").replace(".base_layer", "")
        if match := re.fullmatch(r"(.+)\.lora_(\w+)\.default(?:\.weight)?", name):
            matrices.setdefault(match.group(1), {})[match.group(2)] = parameter
        else:
            tensors[name] = parameter
    loras: dict[str, Lora] = {}
    for name, pair in matrices.items():
        module = inner.get_submodule(name)
        if set(pair) != {"A", "B"}:
            raise NotSupported("its LoRA is of another variant than lora or rslora")
        rate = float(getattr(module.lora_dropout["default"], "p", 0.0))
        loras[name] = Lora(pair["A"], pair["B"], float(module.scaling["default"]), rate)
    return build(inner.config.to_dict(), tensors, loras, int(inner.config.num_labels))


def adapter_shapes(
    config: Mapping[str, Any],
    base: Mapping[str, Tensor],
    *,
    targets: Sequence[str],
    rank: int,
    head: Sequence[str],
    num_labels: int,
    dora: bool = False,
) -> dict[str, tuple[int, ...]]:
    """The names and shapes that peft's file has for this base, so that a file can be refused by its header alone.

    Takes what `of_files` takes; `dora`: with a magnitude for each row of an adapted weight.

    Raises:
        NotSupported: it is not one of the family.
    """
    layout, tensors = _named(config, base)
    width = int(config[layout.width])
    found: dict[str, tuple[int, ...]] = {}
    for module in _adapted(tensors, targets):
        rows, columns = tensors[module + ".weight"].shape
        found |= {module + ".lora_A.weight": (rank, columns), module + ".lora_B.weight": (rows, rank)}
        found |= {module + ".lora_magnitude_vector": (rows,)} if dora else {}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for module, rows in zip(layout.head, (width, num_labels), strict=True):
        shapes |= {module + ".weight": (rows, width), module + ".bias": (rows,)}
    found |= {name: shape for name, shape in shapes.items() if any(name.startswith(part + ".") for part in head)}
    return {PEFT + name: shape for name, shape in found.items()}


def of_files(
    config: Mapping[str, Any],
    base: Mapping[str, Tensor],
    adapter: Mapping[str, Tensor],
    *,
    targets: Sequence[str],
    rank: int,
    scaling: float,
    head: Sequence[str],
    num_labels: int,
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """An encoder over the tensors of two files, for answers.

    In float32 LoRA is added into the weights, W + scaling * B A. In bfloat16, whose 8 bits would round most of so
    small a sum away, it stays beside them.

    Args:
        config: The base's config.json.
        base: The tensors of its file.
        adapter: The tensors of peft's file.
        targets: `target_modules` of peft's config.
        rank: The rows of every A.
        scaling: lora_alpha / r, or what the variant makes of it.
        head: The modules that were trained in full; the adapter must hold them, and no other.
        num_labels: Classes.
        dtype: Of the base's weights.

    Raises:
        NotSupported: it is not one of the family, or the files do not fit each other to the last tensor.
    """
    layout, stored = _named(config, base)
    tensors = {
        name: tensor.float() if name.rpartition(".")[0] in layout.head else tensor.to(dtype)
        for name, tensor in stored.items()
    }
    own = {name.removeprefix(PEFT): tensor for name, tensor in adapter.items()}
    loras: dict[str, Lora] = {}
    for module in _adapted(tensors, targets):
        a, b = own.pop(module + ".lora_A.weight", None), own.pop(module + ".lora_B.weight", None)
        weight = tensors[module + ".weight"]
        if a is None or b is None or (*b.shape, *a.shape) != (len(weight), rank, rank, weight.shape[1]):
            raise NotSupported(f"its adapter does not fit {module}")
        if dtype == torch.float32:
            tensors[module + ".weight"] = torch.addmm(weight, b.float(), a.float(), alpha=scaling)
        else:
            loras[module] = Lora(a.float(), b.float(), scaling, 0.0)
    homes = {name: [module for module in head if name.startswith(module + ".")] for name in own}
    if {module for found in homes.values() for module in found} != set(head) or not all(homes.values()):
        raise NotSupported("its adapter does not hold just the head that it names")
    tensors |= {name: tensor.float() for name, tensor in own.items()}
    return _for_good(build(config, tensors, loras, num_labels))


def of_base(config: Mapping[str, Any], base: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Encoder:
    """An encoder over a base's file alone, for rows that bring LoRA and heads of their own (see `mixed`).

    Its head's second layer is empty, and so is the first where the base brings none.

    Args:
        config: The base's config.json.
        base: The tensors of its file.
        dtype: Of the base's weights; the head's stay float32.

    Raises:
        NotSupported: it is not one of the family.
    """
    layout, stored = _named(config, base)
    width = int(config[layout.width])
    dense, out = layout.head
    tensors = {
        name: tensor.float() if name.rpartition(".")[0] in layout.head else tensor.to(dtype)
        for name, tensor in stored.items()
        if name.rpartition(".")[0] != out
    }
    tensors.setdefault(dense + ".weight", torch.zeros(width, width))
    tensors.setdefault(dense + ".bias", torch.zeros(width))
    tensors |= {out + ".weight": torch.zeros(1, width), out + ".bias": torch.zeros(1)}
    return _for_good(build(config, tensors, {}, 1))


def _for_good(encoder: Encoder) -> Encoder:
    """The encoder with weights that may be kept a second time, for they never change."""
    if not blocked.pays(encoder.embeddings.word.dtype):
        return encoder
    return replace(encoder, layers=tuple(layer.each(_blocked) for layer in encoder.layers))


def _blocked(item: Linear) -> Linear:
    return replace(item, blocked=Blocked(item.weight))


def brings(config: Mapping[str, Any], base: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The layers of the head, by transformers' names, that a base's file holds: at most the two of its layout."""
    layout, stored = _named(config, base)
    return tuple(module for module in layout.head if module + ".weight" in stored)


def sites(config: Mapping[str, Any], base: Mapping[str, Tensor], targets: Sequence[str]) -> dict[tuple[int, int], str]:
    """The weights that targets stand for: (layer, place in `Layer.linears`) -> the module's name.

    Raises:
        NotSupported: one of them is outside the layers.
    """
    layout, tensors = _named(config, base)
    inside = (layout.query, layout.key, layout.value, layout.attention_output, layout.up, layout.down)
    found = {}
    for module in _adapted(tensors, targets):
        number, _, suffix = module.removeprefix(layout.prefix + layout.blocks).partition(".")
        if not number.isdigit() or suffix not in inside:
            raise NotSupported(f"LoRA stands beside {module}")
        found[int(number), inside.index(suffix)] = module
    return found


PEFT = "base_model.model."  # what peft puts before the names of the model that it wraps


def _named(config: Mapping[str, Any], base: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
    """The tensors of a base's file that the encoder takes, by transformers' names of today."""
    kind = str(config.get("model_type"))
    if kind not in LAYOUTS:
        raise NotSupported(f"{kind} is not of the BERT family")
    layout, tensors = LAYOUTS[kind], {}
    for found, tensor in base.items():
        name = found.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if name.startswith((layout.blocks, "embeddings", "pooler.")):  # saved from the base proper, without a head
            name = layout.prefix + name
        inside = name.startswith((layout.prefix + layout.blocks, layout.prefix + "embeddings"))
        if (inside or name.rpartition(".")[0] in layout.head) and not name.endswith("_ids"):
            tensors[name] = tensor
    return layout, tensors


def _adapted(tensors: Mapping[str, Tensor], targets: Sequence[str]) -> list[str]:
    """The modules whose weights get LoRA: those whose names end so, as peft matches them."""
    modules = (
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.ndim == 2
    )
    return sorted(
        module for module in modules if any(module == target or module.endswith("." + target) for target in targets)
    )
