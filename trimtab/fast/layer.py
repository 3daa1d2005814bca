"""One encoder layer over packed tokens: attention, then the feed-forward block, each with its residual and norm.

Tokens of all rows stand end to end, without padding, rows sorted by length; rows of equal length form a group, and
attention runs group by group: by torch's fused kernel, or with dropout, in short rows, in bfloat16 and backwards in
pieces that stay in the cache (12 heads x 256 x 256: 20 ms a batch where one product over the padded batch takes 44). An
answer needs neither keys nor values of the last layer (`_attention_of_first`). The backward is written by hand: frozen
weights need no input kept, and probabilities are computed again, so a layer keeps 10 numbers a token and unit of width
instead of 40.

The formulas are those of Vaswani et al. 2017 (arXiv 1706.03762) with the norm after each residual, as in BERT, and of
LoRA (Hu et al. 2021, arXiv 2106.09685): y = x W' + b + scaling * (dropout(x) A') B'.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from trimtab.fast.blocked import Blocked
from trimtab.fast.dropout import Noise, keep_scale
from trimtab.fast.workspace import Workspace

_PIECE = 1 << 20  # attention scores a piece: 4 MB of float32, which the caches of two cores hold
_BLOCK = 1 << 17
_LEAST_FUSED = 16  # tokens a row: torch's attention is 1.06 to 1.6 times as fast from there on, 0.6 at 8


@dataclass(frozen=True)
class Lora:
    """The two thin matrices beside a weight: a [r, in], b [out, r]."""

    a: Tensor
    b: Tensor
    scaling: float
    dropout: float


@dataclass(frozen=True)
class Linear:
    """The parts of a product: weight [out, in], bias [out], and LoRA beside it or not."""

    weight: Tensor
    bias: Tensor
    lora: Lora | None = None
    blocked: Blocked | None = None
    """The weight once more, for products of many tokens, where it never changes."""


@dataclass(frozen=True)
class Norm:
    """Layer normalisation: weight [D], bias [D]."""

    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True)
class Layer:
    """The weights of one encoder layer, and the rates of its dropout."""

    query: Linear
    key: Linear
    value: Linear
    attention_output: Linear
    attention_norm: Norm
    up: Linear
    down: Linear
    output_norm: Norm
    heads: int
    attention_dropout: float
    attention_output_dropout: float
    output_dropout: float

    @property
    def scale(self) -> float:
        """1 / sqrt(width of a head)."""
        return float((self.query.weight.shape[0] // self.heads) ** -0.5)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The six products, in the order of their dropout sites and of their gradients."""
        return self.query, self.key, self.value, self.attention_output, self.up, self.down

    def each(self, change: Callable[[Linear], Linear]) -> "Layer":
        """The layer with something changed in all six products."""
        query, key, value, attention_output, up, down = map(change, self.linears)
        return replace(self, query=query, key=key, value=value, attention_output=attention_output, up=up, down=down)

    def without_lora(self) -> "Layer":
        """The frozen weights alone."""
        return self.each(lambda item: replace(item, lora=None))

    def trained(self) -> list[Tensor]:
        """Every LoRA matrix of the layer, a before b."""
        return [matrix for item in self.linears if item.lora for matrix in (item.lora.a, item.lora.b)]


class Group(NamedTuple):
    """Rows of one length that stand end to end: first row, first token, rows, tokens a row."""

    row: int
    token: int
    rows: int
    length: int


class Adapters(Protocol):
    """What stands beside the weights where rows of one batch have LoRA of their own; forward only.

    `layer` is the number of the layer, `place` that of the product in `Layer.linears`.
    """

    def add(self, layer: int, place: int, x: Tensor, out: Tensor) -> None:
        """Adds to a product, x [N, in] -> out [N, out]."""

    def add_to_asked(self, layer: int, q: Tensor, asked: Tensor) -> None:
        """Before `q W` of the keys is added to asked [B, heads, D]: q [B, heads, D / heads], which may be scaled."""

    def add_to_answers(self, layer: int, means: Tensor, answers: Tensor) -> None:
        """Adds to the values of means [B, heads, D], answers [B, heads, D / heads], before their bias."""


# Sites of dropout within a layer; LoRA's are 10 + the product's place in `Layer.linears`.
ATTENTION, ATTENTION_OUTPUT, OUTPUT, LORA = 0, 1, 2, 10


@dataclass(frozen=True)
class Scope:
    """Where a layer runs: its number, the batch's groups of rows, its memory, its randomness."""

    number: int
    groups: Sequence[Group]
    workspace: Workspace
    noise: Noise | None
    """None: no dropout."""
    keeps: bool
    """Whether a backward will follow; without one, all layers share their memory."""
    dtype: torch.dtype
    """Of states and frozen weights; adapters stay float32."""
    drawn: bool = False
    """Whether the masks have been drawn already: the backward reads those of the forward."""
    beside: Adapters | None = None

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Memory that lives until the backward of this layer."""
        return self.workspace.take(name, self.number if self.keeps else self.number % 2, shape=shape, dtype=self.dtype)

    def scratch(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Memory that lives until the next layer runs."""
        return self.workspace.take(name, shape=shape, dtype=self.dtype)

    def mask(self, site: int, rate: float, shape: tuple[int, ...]) -> Tensor | None:
        """The mask of a site, uint8[shape]; None where nothing is dropped."""
        if self.noise is None or rate == 0:
            return None
        mask = self.workspace.take("mask", self.number, site, shape=shape, dtype=torch.uint8)
        return mask if self.drawn else self.noise.fill(mask, rate, self.number, site)


class Saved(NamedTuple):
    """What the backward of a layer needs of its forward: N tokens, Q of them queried (all, or the first of each row).

    x [N, D], queried, q (scaled), before_norm, before_output [Q, D], k, v [N, D], raised [Q, F]; the means and inverse
    deviations of both norms; context [Q, D]; LoRA's thin products [N or Q, r] in the order of `Layer.linears`.
    """

    x: Tensor
    queried: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    context: Tensor
    before_norm: Tensor
    statistics: tuple[Tensor, Tensor]
    raised: Tensor
    before_output: Tensor
    output_statistics: tuple[Tensor, Tensor]
    thin: tuple[Tensor | None, ...]


def forward(layer: Layer, x: Tensor, scope: Scope, first_only: Tensor | None = None) -> tuple[Tensor, Saved]:
    """One layer: x [N, D] -> y [N, D], or [B, D] where only the first token of each row is wanted.

    Args:
        layer: Its weights.
        x: Packed tokens.
        scope: Where it runs.
        first_only: int64[B], the first token of each row: queries, and all that follows, are computed for these alone.
    """
    queried = x if first_only is None else x[first_only]
    q, q_thin = _product(layer, 0, queried, scope.take("q", queried.shape), scope)
    q *= layer.scale  # once here, instead of on every score
    # Kept only where LoRA beside the output needs its input again.
    keep_context = layer.attention_output.lora is not None
    context = (scope.take if keep_context else scope.scratch)("context", queried.shape)
    if first_only is not None and not scope.keeps and scope.noise is None:
        k, v, k_thin, v_thin = x, x, None, None  # no backward will read them
        _attention_of_first(layer, q, x, context, scope)
    else:
        k, k_thin = _product(layer, 1, x, scope.take("k", x.shape), scope)
        v, v_thin = _product(layer, 2, x, scope.take("v", x.shape), scope)
        _attention(layer, q, k, v, context, scope)

    before_norm, o_thin = _product(layer, 3, context, scope.take("before_norm", queried.shape), scope)
    _drop(before_norm, layer.attention_output_dropout, ATTENTION_OUTPUT, scope)
    before_norm += queried
    attended, *statistics = norm(layer.attention_norm, before_norm, scope.scratch("attended", queried.shape))

    inner = (len(queried), len(layer.up.weight))
    raised, up_thin = _product(layer, 4, attended, scope.take("raised", inner), scope)
    activated = torch.ops.aten.gelu.out(raised, out=scope.scratch("activated", inner))
    before_output, down_thin = _product(layer, 5, activated, scope.take("before_output", queried.shape), scope)
    _drop(before_output, layer.output_dropout, OUTPUT, scope)
    before_output += attended
    y, *output_statistics = norm(layer.output_norm, before_output, scope.take("y", queried.shape))
    return y, Saved(
        *(x, queried, q, k, v, context, before_norm, (statistics[0], statistics[1]), raised, before_output),
        (output_statistics[0], output_statistics[1]),
        (q_thin, k_thin, v_thin, o_thin, up_thin, down_thin),
    )


def backward(
    layer: Layer, dy: Tensor, saved: Saved, scope: Scope, first_only: Tensor | None = None, *, needs_dx: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradients of a layer, `d...` being that of the loss with respect to what follows the d.

    Returns:
        dx [N, D], None unless it is needed, and the gradients of `layer.trained()`.
    """
    scope = replace(scope, drawn=True)
    gradients: list[list[Tensor]] = [[]] * 6

    # Feed-forward block.
    d_attended = scope.scratch("d_attended", dy.shape)
    _norm_backward(layer.output_norm, dy, saved.before_output, saved.output_statistics, d_attended)
    d_product = _dropped(d_attended, layer.output_dropout, OUTPUT, scope)
    activated = scope.scratch("activated", saved.raised.shape)
    if layer.down.lora is not None:
        torch.ops.aten.gelu.out(saved.raised, out=activated)
        d_raised = scope.scratch("d_raised", saved.raised.shape)
    else:
        d_raised = activated
    torch.mm(d_product, layer.down.weight, out=d_raised)
    gradients[5] = _lora_backward(layer, 5, d_product, activated, saved, scope, into=d_raised)
    torch.ops.aten.gelu_backward.grad_input(d_raised, saved.raised, grad_input=d_raised)
    d_attended.addmm_(d_raised, layer.up.weight)
    if layer.up.lora is not None:
        attended, *_ = norm(layer.attention_norm, saved.before_norm, scope.scratch("attended", saved.queried.shape))
        gradients[4] = _lora_backward(layer, 4, d_raised, attended, saved, scope, into=d_attended)

    # Attention block.
    d_queried = scope.scratch("d_queried", dy.shape)
    _norm_backward(layer.attention_norm, d_attended, saved.before_norm, saved.statistics, d_queried)
    d_product = _dropped(d_queried, layer.attention_output_dropout, ATTENTION_OUTPUT, scope)
    d_context = torch.mm(d_product, layer.attention_output.weight, out=scope.scratch("d_context", d_product.shape))
    gradients[3] = _lora_backward(layer, 3, d_product, saved.context, saved, scope, into=d_context)
    needs_dk = needs_dx or layer.key.lora is not None
    dq, dk, dv = _attention_backward(layer, d_context, saved, scope, needs_dk=needs_dk)
    dx = None
    if needs_dx:
        dx = d_queried if first_only is None else scope.scratch("dx", saved.x.shape).zero_()
    for place, d_out, source, into in (
        (0, dq, saved.queried, d_queried if needs_dx else None),
        (1, dk, saved.x, dx),
        (2, dv, saved.x, dx),
    ):
        if into is not None:
            into.addmm_(d_out, layer.linears[place].weight)
        gradients[place] = _lora_backward(layer, place, d_out, source, saved, scope, into=into)
    if dx is not None and first_only is not None:
        dx.index_add_(0, first_only, d_queried)
    return dx, [gradient for pair in gradients for gradient in pair]


# -- the pieces ------------------------------------------------------------------------------------------------


def _product(layer: Layer, place: int, x: Tensor, out: Tensor, scope: Scope) -> tuple[Tensor, Tensor | None]:
    """The product at `place` of `Layer.linears`: x [N, in] -> [N, out], in `out` or not, and LoRA's thin one [N, r]."""
    item = layer.linears[place]
    if item.blocked is not None and item.blocked.takes(len(x)):
        out = item.blocked.product(x, item.bias)
    else:
        torch.addmm(item.bias, x, item.weight.t(), out=out)
    if scope.beside is not None:
        scope.beside.add(scope.number, place, x, out)
    if item.lora is None:
        return out, None
    lora, mask = item.lora, scope.mask(LORA + place, item.lora.dropout, x.shape)
    thin = (x if mask is None else masked(x, mask, scope.scratch("lora_x", x.shape), scope.workspace)) @ lora.a.to(
        x.dtype
    ).t()
    out.addmm_(thin, lora.b.to(x.dtype).t(), alpha=_scaling(lora, mask))
    return out, thin


def _lora_backward(
    layer: Layer, place: int, dy: Tensor, x: Tensor, saved: Saved, scope: Scope, *, into: Tensor | None
) -> list[Tensor]:
    """The gradients of a and b, from dy [N, out] and x [N, in]; LoRA's share of dx is added to `into`."""
    lora, thin = layer.linears[place].lora, saved.thin[place]
    if lora is None or thin is None:
        return []
    mask = scope.mask(LORA + place, lora.dropout, x.shape)
    scaling = _scaling(lora, mask)
    # Shapes as MKL likes them: dy @ b takes 1.0 ms where linear(dy, b') takes 0.45, dy' @ thin 2.3 against 0.4.
    d_thin = linear(dy, lora.b.to(dy.dtype).t().contiguous()).mul_(scaling)
    da = d_thin.t() @ (x if mask is None else masked(x, mask, scope.scratch("lora_x", x.shape), scope.workspace))
    db = (thin.t() @ dy).t().mul(scaling)
    if into is not None:
        if mask is None:
            into.addmm_(d_thin, lora.a.to(dy.dtype))
        else:
            share = torch.mm(d_thin, lora.a.to(dy.dtype), out=scope.scratch("lora_x", x.shape))
            into += masked(share, mask, share, scope.workspace)
    return [da.to(lora.a.dtype), db.to(lora.b.dtype)]


def _scaling(lora: Lora, mask: Tensor | None) -> float:
    return lora.scaling * (1.0 if mask is None else keep_scale(lora.dropout))


def _drop(x: Tensor, rate: float, site: int, scope: Scope) -> None:
    """Dropout in place."""
    if (mask := scope.mask(site, rate, x.shape)) is not None:
        masked(x, mask, x, scope.workspace).mul_(keep_scale(rate))


def _dropped(x: Tensor, rate: float, site: int, scope: Scope) -> Tensor:
    """Dropout beside x: the backward of `_drop`, for the mask is the same."""
    mask = scope.mask(site, rate, x.shape)
    return (
        x
        if mask is None
        else masked(x, mask, scope.scratch("d_product", x.shape), scope.workspace).mul_(keep_scale(rate))
    )


def norm(weights: Norm, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised x in `out`, and the mean and inverse deviation of each token."""
    means, inverses = [], []
    for part, to in blocks(x, out):
        y, mean, inverse = torch.native_layer_norm(part, x.shape[1:], weights.weight, weights.bias, weights.eps)
        to.copy_(y)
        means.append(mean)
        inverses.append(inverse)
    return out, torch.cat(means), torch.cat(inverses)


def _norm_backward(weights: Norm, dy: Tensor, x: Tensor, statistics: tuple[Tensor, Tensor], out: Tensor) -> None:
    for to, *parts in blocks(out, dy, x, *statistics):
        d_part, part, mean, inverse = parts
        to.copy_(
            torch.ops.aten.native_layer_norm_backward(
                d_part, part, x.shape[1:], mean, inverse, weights.weight, weights.bias, [True, False, False]
            )[0]
        )


def masked(x: Tensor, mask: Tensor, out: Tensor, workspace: Workspace) -> Tensor:
    """Into `out`, x times a mask of its shape.

    torch would turn the mask into numbers too, but in memory of malloc: 8 % of a step went there.
    """
    numbers = workspace.take("keep", shape=(min(_PIECE, x.numel()),), dtype=x.dtype)
    for part, keep, to in zip(*(torch.split(t.view(-1), _PIECE) for t in (x, mask, out)), strict=True):
        torch.mul(part, numbers[: len(part)].copy_(keep), out=to)
    return out


def blocks(first: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one length, cut alike along it, so that a part of the first holds at most `_BLOCK` numbers.

    Work that torch cannot do in place makes its temporaries of this size: they stay in the cache, where temporaries of
    a whole batch left the heap 300 MB larger (glibc does not use a hole again for an aligned piece of its very size).
    """
    step = max(1, _BLOCK // max(1, first[:1].numel()))
    return zip(*(torch.split(tensor, step) for tensor in (first, *others)), strict=True)


# -- attention -------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A few rows of one length, as slices of queries, of tokens, and of all scores laid flat."""

    queries: slice
    tokens: slice
    rows: int
    scores: slice


def pieces(groups: Sequence[Group], heads: int, *, first_only: bool, least: int = 1) -> Iterator[Piece]:
    """Cuts groups into pieces of at most `_PIECE` scores, or of one row; a query counts as `least` scores or more."""
    flat = 0
    for group in groups:
        scores = heads * group.length * (1 if first_only else group.length)
        step = max(1, _PIECE // (heads * max(least, scores // heads)))
        for done in range(0, group.rows, step):
            rows = min(step, group.rows - done)
            token, row = group.token + done * group.length, group.row + done
            tokens = slice(token, token + rows * group.length)
            queries = slice(row, row + rows) if first_only else tokens
            yield Piece(queries, tokens, rows, slice(flat, flat + rows * scores))
            flat += rows * scores


def _scores(groups: Sequence[Group], heads: int, *, first_only: bool) -> int:
    return sum(heads * group.rows * group.length * (1 if first_only else group.length) for group in groups)


def _attention_mask(layer: Layer, scope: Scope, *, first_only: bool) -> Tensor | None:
    return scope.mask(ATTENTION, layer.attention_dropout, (_scores(scope.groups, layer.heads, first_only=first_only),))


def _by_head(x: Tensor, rows: int, heads: int) -> Tensor:
    """[rows * tokens, D] -> [rows * heads, tokens, D / heads]; a view where it is one row."""
    width = x.shape[1] // heads
    if rows == 1:
        return x.view(-1, heads, width).transpose(0, 1)
    return x.view(rows, -1, heads, width).transpose(1, 2).reshape(rows * heads, -1, width)


def _write(x: Tensor, by_head: Tensor, rows: int, heads: int) -> None:
    """The inverse of `_by_head`, into x."""
    width = x.shape[1] // heads
    x.view(rows, -1, heads, width).copy_(by_head.view(rows, heads, -1, width).transpose(1, 2))


def _probabilities(q: Tensor, k: Tensor, scope: Scope) -> Tensor:
    """softmax(q k'), q [n, queries, width], scaled, k [n, tokens, width] -> [n, queries, tokens]."""
    scores = scope.scratch("p", (len(q), q.shape[1], k.shape[1]))
    torch.bmm(q, k.transpose(1, 2), out=scores)
    return torch.softmax(scores, -1, out=scores)


def _attention(layer: Layer, q: Tensor, k: Tensor, v: Tensor, context: Tensor, scope: Scope) -> None:
    """Writes the context, shaped like q, of q [N or B, D], which comes scaled, and k and v [N, D]."""
    heads, first_only = layer.heads, len(q) != len(k)
    mask = _attention_mask(layer, scope, first_only=first_only)
    may_fuse = mask is None and q.dtype == torch.float32  # in bfloat16 it was further from float32 than ours
    by_hand = []
    for group in scope.groups:
        if may_fuse and group.length >= _LEAST_FUSED:
            _fused_attention(layer, q, k, v, context, group)
        else:
            by_hand.append(group)
    for piece in pieces(by_hand, heads, first_only=first_only):
        q_, k_ = _by_head(q[piece.queries], piece.rows, heads), _by_head(k[piece.tokens], piece.rows, heads)
        p = _probabilities(q_, k_, scope)
        if mask is not None:
            masked(p, mask[piece.scores].view(p.shape), p, scope.workspace)
        _write(context[piece.queries], torch.bmm(p, _by_head(v[piece.tokens], piece.rows, heads)), piece.rows, heads)
    if mask is not None:
        context.mul_(keep_scale(layer.attention_dropout))


def _fused_attention(layer: Layer, q: Tensor, k: Tensor, v: Tensor, context: Tensor, group: Group) -> None:
    """`_attention` of one group by torch's own, which reads heads where they lie; dropout would not be ours to draw."""
    tokens = slice(group.token, group.token + group.rows * group.length)
    queries = tokens if len(q) == len(k) else slice(group.row, group.row + group.rows)
    q_, k_, v_, to = (
        part.view(group.rows, -1, layer.heads, part.shape[1] // layer.heads).transpose(1, 2)
        for part in (q[queries], k[tokens], v[tokens], context[queries])
    )
    to.copy_(scaled_dot_product_attention(q_, k_, v_, scale=1.0))


def _attention_of_first(layer: Layer, q: Tensor, x: Tensor, context: Tensor, scope: Scope) -> None:
    """`_attention` of the first token of each row, q [B, D], over the states x [N, D], without keys and values.

    q' (W x) = (q' W) x, so a query can ask the states themselves; a key's bias adds the same to every score of a row,
    which softmax leaves out. Probabilities add up to one, so the mean of values is the value of the mean. Two products
    of D x D for each row stand where there were two for each token, 3 % of a forward of six layers.
    """
    heads, key, value = layer.heads, layer.key, layer.value
    shape = (heads, len(q), x.shape[1])
    q_ = q.view(len(q), heads, -1).transpose(0, 1)
    asked, means = scope.scratch("asked", shape).zero_(), scope.scratch("means", shape)
    if scope.beside is not None:
        scope.beside.add_to_asked(scope.number, q_.transpose(0, 1), asked.transpose(0, 1))
    asked.baddbmm_(q_, key.weight.view(heads, -1, x.shape[1]))
    if key.lora is not None:
        thin = torch.bmm(q_, key.lora.b.to(x.dtype).view(heads, -1, len(key.lora.a)))
        asked.add_(thin @ key.lora.a.to(x.dtype), alpha=key.lora.scaling)

    for piece in pieces(scope.groups, heads, first_only=True, least=x.shape[1]):
        tokens = x[piece.tokens].view(piece.rows, -1, x.shape[1])
        p = _probabilities(asked[:, piece.queries].transpose(0, 1), tokens, scope)
        means[:, piece.queries].transpose(0, 1).copy_(torch.bmm(p, tokens))

    answers = torch.bmm(means, value.weight.view(heads, -1, x.shape[1]).transpose(1, 2))
    if value.lora is not None:
        thin = means @ value.lora.a.to(x.dtype).t()
        b = value.lora.b.to(x.dtype).view(heads, -1, len(value.lora.a))
        answers.baddbmm_(thin, b.transpose(1, 2), alpha=value.lora.scaling)
    if scope.beside is not None:
        scope.beside.add_to_answers(scope.number, means.transpose(0, 1), answers.transpose(0, 1))
    context.view(len(q), heads, -1).copy_(answers.transpose(0, 1))
    context += value.bias


def _attention_backward(
    layer: Layer, d_context: Tensor, saved: Saved, scope: Scope, *, needs_dk: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q before its scaling, k and v; that of k is left unwritten where nobody needs it."""
    q, k, v = saved.q, saved.k, saved.v
    heads, first_only = layer.heads, len(q) != len(k)
    dq, dk, dv = (scope.scratch(name, t.shape) for name, t in (("dq", q), ("dk", k), ("dv", v)))
    mask = _attention_mask(layer, scope, first_only=first_only)
    if mask is not None:
        d_context.mul_(keep_scale(layer.attention_dropout))
    for piece in pieces(scope.groups, heads, first_only=first_only):
        rows = piece.rows
        q_ = _by_head(q[piece.queries], rows, heads)
        k_ = _by_head(k[piece.tokens], rows, heads)
        d_out = _by_head(d_context[piece.queries], rows, heads)
        p = _probabilities(q_, k_, scope)
        dp, ds = scope.scratch("dp", p.shape), scope.scratch("ds", p.shape)
        torch.bmm(d_out, _by_head(v[piece.tokens], rows, heads).transpose(1, 2), out=dp)
        kept = p
        if mask is not None:
            keep = mask[piece.scores].view(p.shape)
            kept = masked(p, keep, scope.scratch("kept", p.shape), scope.workspace)
            masked(dp, keep, dp, scope.workspace)
        _write(dv[piece.tokens], torch.bmm(kept.transpose(1, 2), d_out), rows, heads)
        torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=ds)
        _write(dq[piece.queries], torch.bmm(ds, k_), rows, heads)
        if needs_dk:
            _write(dk[piece.tokens], torch.bmm(ds.transpose(1, 2), q_), rows, heads)
    return dq.mul_(layer.scale), dk, dv
