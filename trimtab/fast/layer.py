"""One encoder layer over packed tokens: attention, then the feed-forward block, each with its residual and norm.

Tokens of all rows stand end to end, without padding, rows sorted by length; rows of equal length form a group, and
attention runs group by group in pieces that stay in the cache (12 heads x 256 x 256: 20 ms a batch where one product
over the padded batch takes 44). The backward is written by hand: frozen weights need no input kept, masks are drawn
again, probabilities are computed again, so a layer keeps 10 numbers a token and unit of width instead of 40.

The formulas are those of Vaswani et al. 2017 (arXiv 1706.03762) with the norm after each residual, as in BERT, and of
LoRA (Hu et al. 2021, arXiv 2106.09685): y = x W' + b + scaling * (dropout(x) A') B'.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from trimtab.fast.dropout import Masks, Noise, keep_scale

_PIECE = 1 << 20  # attention scores a piece: 4 MB of float32, which the caches of two cores hold


@dataclass(frozen=True)
class Lora:
    """The two thin matrices beside a weight: a [r, in], b [out, r]."""

    a: Tensor
    b: Tensor
    scaling: float
    dropout: float


@dataclass(frozen=True)
class Linear:
    """weight [out, in], bias [out], and LoRA beside it or not."""

    weight: Tensor
    bias: Tensor
    lora: Lora | None = None


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
        """The six products, in the order of their dropout sites."""
        return self.query, self.key, self.value, self.attention_output, self.up, self.down

    def trained(self) -> list[Tensor]:
        """Every LoRA matrix of the layer, a before b."""
        return [matrix for item in self.linears if item.lora for matrix in (item.lora.a, item.lora.b)]


class Group(NamedTuple):
    """Rows of one length that stand end to end: first row, first token, rows, tokens a row."""

    row: int
    token: int
    rows: int
    length: int


# Sites of dropout within a layer; LoRA's are 10 + the product's place in `Layer.linears`.
_ATTENTION, _ATTENTION_OUTPUT, _OUTPUT, _LORA = 0, 1, 2, 10


def run(
    layer: Layer, x: Tensor, groups: list[Group], noise: Noise | None, number: int, first_only: Tensor | None = None
) -> Tensor:
    """One layer: x [N, D] -> [N, D], or [B, D] where only the first token of each row is wanted.

    Args:
        layer: Its weights.
        x: Packed tokens.
        groups: How rows lie in x.
        noise: Randomness of dropout; None: no dropout.
        number: Which layer this is, for its masks.
        first_only: int64[B], the first token of each row: queries, and all that follows, are computed for these alone.
    """
    return _Layer.apply(x, layer, groups, noise, number, first_only, *layer.trained())  # type: ignore[no-any-return,no-untyped-call]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: Layer,
        groups: list[Group],
        noise: Noise | None,
        number: int,
        first_only: Tensor | None,
        *trained: Tensor,
    ) -> Tensor:
        site = _Sites(layer, noise, number)
        queried = x if first_only is None else x[first_only]
        q, q_thin = _product(layer.query, queried, site.lora(0))
        q *= layer.scale  # once here, instead of on every score
        k, k_thin = _product(layer.key, x, site.lora(1))
        v, v_thin = _product(layer.value, x, site.lora(2))
        context = _attention(layer, q, k, v, groups, site.attention())

        before_norm, o_thin = _product(layer.attention_output, context, site.lora(3))
        _drop(
            before_norm, layer.attention_output_dropout, site.masks(_ATTENTION_OUTPUT, layer.attention_output_dropout)
        )
        before_norm += queried
        attended, mean, inverse = _norm(layer.attention_norm, before_norm)

        raised, up_thin = _product(layer.up, attended, site.lora(4))
        activated = gelu(raised)
        before_output, down_thin = _product(layer.down, activated, site.lora(5))
        _drop(before_output, layer.output_dropout, site.masks(_OUTPUT, layer.output_dropout))
        before_output += attended
        y, output_mean, output_inverse = _norm(layer.output_norm, before_output)

        ctx.layer, ctx.groups, ctx.site, ctx.first_only = layer, groups, site, first_only
        ctx.save_for_backward(
            *(x, q, k, v, before_norm, mean, inverse, raised, before_output, output_mean, output_inverse),
            context if layer.attention_output.lora else None,
            *(q_thin, k_thin, v_thin, o_thin, up_thin, down_thin),
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        layer, groups, site, first_only = ctx.layer, ctx.groups, ctx.site, ctx.first_only
        (x, q, k, v, before_norm, mean, inverse, raised, before_output, output_mean, output_inverse) = (
            ctx.saved_tensors[:11]
        )
        context, q_thin, k_thin, v_thin, o_thin, up_thin, down_thin = ctx.saved_tensors[11:]
        queried = x if first_only is None else x[first_only]
        needs_dx = ctx.needs_input_grad[0]
        gradients = []

        # Feed-forward block. `d...` is the gradient of the loss with respect to what follows the d.
        d_attended = _norm_backward(layer.output_norm, dy, before_output, output_mean, output_inverse)
        d_product = _dropped(d_attended, layer.output_dropout, site.masks(_OUTPUT, layer.output_dropout))
        activated = gelu(raised) if layer.down.lora else None
        d_activated, down_gradients = _product_backward(layer.down, d_product, activated, down_thin, site.lora(5))
        assert d_activated is not None
        d_raised = torch.ops.aten.gelu_backward(d_activated, raised)
        del d_product, d_activated, activated
        attended = _norm(layer.attention_norm, before_norm)[0] if layer.up.lora else None
        _, up_gradients = _product_backward(layer.up, d_raised, attended, up_thin, site.lora(4), into=d_attended)
        del d_raised, attended

        # Attention block.
        d_queried = _norm_backward(layer.attention_norm, d_attended, before_norm, mean, inverse)
        d_product = _dropped(
            d_queried, layer.attention_output_dropout, site.masks(_ATTENTION_OUTPUT, layer.attention_output_dropout)
        )
        d_context, o_gradients = _product_backward(layer.attention_output, d_product, context, o_thin, site.lora(3))
        assert d_context is not None
        del d_product, d_attended
        dq, dk, dv = _attention_backward(
            layer, d_context, q, k, v, groups, site.attention(), needs_dk=needs_dx or layer.key.lora is not None
        )
        dx = None
        if needs_dx:
            dx = d_queried if first_only is None else torch.zeros_like(x)
        into = dx if first_only is None else d_queried
        _, q_gradients = _product_backward(layer.query, dq, queried, q_thin, site.lora(0), into=into, wanted=needs_dx)
        _, k_gradients = _product_backward(layer.key, dk, x, k_thin, site.lora(1), into=dx, wanted=needs_dx)
        _, v_gradients = _product_backward(layer.value, dv, x, v_thin, site.lora(2), into=dx, wanted=needs_dx)
        if dx is not None and first_only is not None:
            dx.index_add_(0, first_only, d_queried)
        for pair in (q_gradients, k_gradients, v_gradients, o_gradients, up_gradients, down_gradients):
            gradients += pair
        return dx, None, None, None, None, None, *gradients


@dataclass(frozen=True)
class _Sites:
    """The streams of masks of one layer in one batch; None where nothing is dropped."""

    layer: Layer
    noise: Noise | None
    number: int

    def masks(self, site: int, rate: float) -> Masks | None:
        return self.noise.masks(self.number, site) if self.noise is not None and rate > 0 else None

    def attention(self) -> Masks | None:
        return self.masks(_ATTENTION, self.layer.attention_dropout)

    def lora(self, place: int) -> Masks | None:
        lora = self.layer.linears[place].lora
        return self.masks(_LORA + place, lora.dropout) if lora else None


# -- the pieces: each forward with its backward ----------------------------------------------------------------


def _product(item: Linear, x: Tensor, masks: Masks | None) -> tuple[Tensor, Tensor | None]:
    """From x [N, in], y [N, out], and LoRA's thin product [N, r], which the backward needs."""
    y = linear(x, item.weight, item.bias)
    if item.lora is None:
        return y, None
    lora = item.lora
    x, scaling = (x, lora.scaling) if masks is None else (x * masks.draw(lora.dropout, *x.shape), _scaled(lora))
    thin = x @ lora.a.to(x.dtype).t()
    y.addmm_(thin, lora.b.to(x.dtype).t(), alpha=scaling)
    return y, thin


def _product_backward(
    item: Linear,
    dy: Tensor,
    x: Tensor | None,
    thin: Tensor | None,
    masks: Masks | None,
    *,
    into: Tensor | None = None,
    wanted: bool = True,
) -> tuple[Tensor | None, list[Tensor]]:
    """From dy [N, out], dx [N, in], added to `into` where it is given, and the gradients of a and b."""
    dx = None
    if wanted:
        dx = dy @ item.weight if into is None else into.addmm_(dy, item.weight)
    if item.lora is None:
        return dx, []
    assert x is not None
    assert thin is not None
    lora = item.lora
    mask = None if masks is None else masks.draw(lora.dropout, *x.shape)
    scaling = lora.scaling if masks is None else _scaled(lora)
    # Shapes as MKL likes them: dy @ b takes 1.0 ms where linear(dy, b') takes 0.45, dy' @ thin 2.3 against 0.4.
    d_thin = linear(dy, lora.b.to(dy.dtype).t().contiguous()).mul_(scaling)
    da = d_thin.t() @ (x if mask is None else x * mask)
    db = (thin.t() @ dy).t().mul(scaling)
    if dx is not None:
        if mask is None:
            dx.addmm_(d_thin, lora.a.to(dy.dtype))
        else:
            dx.addcmul_(d_thin @ lora.a.to(dy.dtype), mask.to(dy.dtype))
    return dx, [da.to(lora.a.dtype), db.to(lora.b.dtype)]


def _scaled(lora: Lora) -> float:
    return lora.scaling * keep_scale(lora.dropout)


def _drop(x: Tensor, rate: float, masks: Masks | None) -> None:
    """Dropout in place."""
    if masks is not None:
        x.mul_(masks.draw(rate, *x.shape)).mul_(keep_scale(rate))


def _dropped(x: Tensor, rate: float, masks: Masks | None) -> Tensor:
    """Dropout as a new tensor; its backward too, for the mask is the same."""
    return x if masks is None else (x * masks.draw(rate, *x.shape)).mul_(keep_scale(rate))


def _norm(norm: Norm, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised x, and the mean and inverse deviation of each token."""
    return torch.native_layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps)


def _norm_backward(norm: Norm, dy: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    dx: Tensor = torch.ops.aten.native_layer_norm_backward(
        dy, x, (x.shape[-1],), mean, inverse, norm.weight, norm.bias, [True, False, False]
    )[0]
    return dx


class _Piece(NamedTuple):
    """A few rows of one length, as slices of queries and of tokens."""

    queries: slice
    tokens: slice
    rows: int


def _pieces(groups: list[Group], heads: int, *, first_only: bool) -> Iterator[_Piece]:
    for group in groups:
        scores = heads * group.length * (1 if first_only else group.length)
        step = max(1, _PIECE // scores)
        for done in range(0, group.rows, step):
            rows = min(step, group.rows - done)
            token = group.token + done * group.length
            tokens = slice(token, token + rows * group.length)
            row = group.row + done
            yield _Piece(slice(row, row + rows) if first_only else tokens, tokens, rows)


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


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k'), as [rows * heads, queries, tokens]; q comes scaled."""
    scores = torch.bmm(q, k.transpose(1, 2))
    return torch.softmax(scores, -1, out=scores)


def _attention(layer: Layer, q: Tensor, k: Tensor, v: Tensor, groups: list[Group], masks: Masks | None) -> Tensor:
    """The context, shaped like q, of q [N or B, D], which comes scaled, and k and v [N, D]."""
    heads, rate = layer.heads, layer.attention_dropout
    context = torch.empty_like(q)
    for piece in _pieces(groups, heads, first_only=len(q) != len(k)):
        p = _probabilities(_by_head(q[piece.queries], piece.rows, heads), _by_head(k[piece.tokens], piece.rows, heads))
        if masks is not None:
            p.mul_(masks.draw(rate, *p.shape))
        out = torch.bmm(p, _by_head(v[piece.tokens], piece.rows, heads))
        _write(context[piece.queries], out, piece.rows, heads)
    return context if masks is None else context.mul_(keep_scale(rate))


def _attention_backward(
    layer: Layer,
    d_context: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: list[Group],
    masks: Masks | None,
    *,
    needs_dk: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q before its scaling, k and v; that of k is left empty where nobody needs it."""
    heads, rate = layer.heads, layer.attention_dropout
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if masks is not None:
        d_context.mul_(keep_scale(rate))
    for piece in _pieces(groups, heads, first_only=len(q) != len(k)):
        rows = piece.rows
        q_, k_, v_ = (
            _by_head(t[s], rows, heads) for t, s in ((q, piece.queries), (k, piece.tokens), (v, piece.tokens))
        )
        d_out = _by_head(d_context[piece.queries], rows, heads)
        p = _probabilities(q_, k_)
        dp = torch.bmm(d_out, v_.transpose(1, 2))
        kept = p
        if masks is not None:
            mask = masks.draw(rate, *p.shape)
            kept = p * mask
            dp.mul_(mask)
        _write(dv[piece.tokens], torch.bmm(kept.transpose(1, 2), d_out), rows, heads)
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        _write(dq[piece.queries], torch.bmm(ds, k_), rows, heads)
        if needs_dk:
            _write(dk[piece.tokens], torch.bmm(ds.transpose(1, 2), q_), rows, heads)
    return dq.mul_(layer.scale), dk, dv
