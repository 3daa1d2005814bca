"""Rows of many adapters through one base, in one pass: each row gets the answer of its own adapter.

Every product of the frozen weights is computed once for all rows. What an adapter adds to it, (x A') B', is computed
for its rows alone, in one of two ways: a *segment* is a run of tokens of one adapter, two small products; *gathered*
rows are of one length and of many adapters, whose matrices are copied side by side for two batched products. Many
small products cost calls, gathering costs memory traffic (Chen et al. 2023, "Punica", arXiv 2310.18547; Sheng et al.
2023, "S-LoRA", arXiv 2311.03285, both on GPUs); which is cheaper is told by `Costs`, measured on the machine at hand.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import linear

from trimtab.fast import encoder as encoders
from trimtab.fast.encoder import Encoder, Head, Packed
from trimtab.fast.layer import Linear


class Site(NamedTuple):
    """A weight that adapters of one form stand beside: its layer, its place in `Layer.linears`, [out, in]."""

    layer: int
    place: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Form:
    """What LoRA of one rank beside the same weights has in common: where its numbers stand in one flat piece.

    For each site A [rank, in], then B transposed [rank, out], with the scaling in it, then with DoRA (Liu et al. 2024,
    arXiv 2402.09353) the factor of each output.
    """

    rank: int
    sites: tuple[Site, ...]
    dora: bool = False

    def offsets(self) -> tuple[dict[tuple[int, int], tuple[int, Site]], int]:
        """Where the numbers of each (layer, place) begin, and how many there are in all."""
        found, end = {}, 0
        for site in self.sites:
            found[site.layer, site.place] = (end, site)
            end += self.rank * (site.rows + site.columns) + (site.rows if self.dora else 0)
        return found, end


@dataclass(frozen=True)
class Beside:
    """One adapter as rows need it: its form, its numbers in one flat piece, and its head."""

    form: Form
    numbers: Tensor
    """[the form's size], in the dtype of the base."""
    head: Head


@dataclass(frozen=True)
class Costs:
    """What small products cost here: seconds a call, multiplications and additions a second, bytes copied a second."""

    call_s: float
    flops: float
    batched_call_s: float
    batched_flops: float
    bytes_per_s: float

    def segments_s(self, segments: int, tokens: int, form: Form) -> float:
        """Seconds for the two products of every site, one segment after another."""
        work = sum(2 * tokens * form.rank * (site.rows + site.columns) for site in form.sites)
        return 2 * len(form.sites) * segments * self.call_s + work / self.flops

    def gathered_s(self, rows: int, tokens: int, form: Form, bytes_each: int) -> float:
        """Seconds for the two batched products of every site, and for copying the matrices together."""
        work = sum(2 * tokens * form.rank * (site.rows + site.columns) for site in form.sites)
        copied = rows * bytes_each / self.bytes_per_s
        return 2 * len(form.sites) * self.batched_call_s + work / self.batched_flops + copied


class _Block(NamedTuple):
    """Rows that stand together and share their products: first row and token, rows, tokens in all, and the numbers.

    numbers [size] of one adapter, for rows of any length, or [rows, size], for rows of one length.
    """

    row: int
    token: int
    rows: int
    tokens: int
    numbers: Tensor
    places: Mapping[tuple[int, int], tuple[int, Site]]
    form: Form

    @property
    def all_rows(self) -> slice:
        """Its rows in the batch."""
        return slice(self.row, self.row + self.rows)

    @property
    def all_tokens(self) -> slice:
        """Its tokens in the batch."""
        return slice(self.token, self.token + self.tokens)

    @property
    def each(self) -> str:
        """The axis of its matrices over rows, as einsum spells it: none where all rows have the same."""
        return "b" if self.numbers.ndim == 2 else ""


def logits(
    encoder: Encoder,
    ids: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    adapters: Sequence[Beside],
    costs: Costs,
) -> list[Tensor]:
    """Logits float32[C of the row's adapter] of each row, in their order.

    Args:
        encoder: The base (`encoder.of_base`).
        ids: int32[N], tokens of all rows.
        offsets: int64[B + 1], where each row begins.
        adapters: The adapter of each row; rows of one adapter name the same object.
        costs: What small products cost here.
    """
    with torch.inference_mode(), encoder.workspace.lock:
        rows = _by_adapter(adapters)
        batch = encoders.pack(ids, offsets, rows)
        standing = [adapters[int(row)] for row in rows[torch.argsort(batch.order).numpy()]]
        blocks = _blocks(encoder, batch, standing, costs)
        first = encoders.first_tokens(
            encoder, encoders.Batch([batch], batch.order), beside=_Adapters(encoder, batch, blocks)
        ).float()
        # Of all rows at once: 28 adapters one after another took 2 ms of a batch's 180.
        is_shared = any(adapter.head.dense is encoder.head.dense for adapter in adapters)
        shared = encoders.before_out(encoder.head, first, training=False) if is_shared else first
        found: list[Tensor] = [first] * len(rows)
        begin = 0
        for end in range(1, len(rows) + 1):
            if end == len(rows) or adapters[int(rows[end])] is not adapters[int(rows[begin])]:
                head = adapters[int(rows[begin])].head
                if head.dense is encoder.head.dense:
                    answers = linear(shared[begin:end], head.out.weight, head.out.bias)
                else:
                    answers = encoders.apply_head(head, first[begin:end], training=False)
                for row, answer in zip(rows[begin:end], answers, strict=True):
                    found[int(row)] = answer
                begin = end
        return found


def _by_adapter(adapters: Sequence[Beside]) -> npt.NDArray[np.int64]:
    """Row numbers with those of one form together, and within them those of one adapter."""
    forms: dict[Form, int] = {}
    numbers: dict[int, tuple[int, int]] = {}
    for adapter in adapters:
        if id(adapter) not in numbers:
            numbers[id(adapter)] = (forms.setdefault(adapter.form, len(forms)), len(numbers))
    keys = [numbers[id(adapter)] for adapter in adapters]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


def _blocks(encoder: Encoder, batch: Packed, adapters: Sequence[Beside], costs: Costs) -> list[_Block]:
    """Rows as they stand in the batch, cut into blocks; the adapter of each row comes in that order."""
    places = {adapter.form: adapter.form.offsets()[0] for adapter in adapters}
    blocks: list[_Block] = []

    def segment(row: int, token: int, rows: int, tokens: int) -> None:
        adapter = adapters[row]
        last = blocks[-1] if blocks else None
        if last and last.numbers is adapter.numbers and last.token + last.tokens == token:  # of another length
            blocks[-1] = last._replace(rows=last.rows + rows, tokens=last.tokens + tokens)
        elif adapter.form.sites:
            blocks.append(_Block(row, token, rows, tokens, adapter.numbers, places[adapter.form], adapter.form))

    for group in batch.groups:
        for row, rows in _runs([adapters[group.row + i].form for i in range(group.rows)], group.row):
            form, token = adapters[row].form, group.token + (row - group.row) * group.length
            each = list(_runs([id(adapters[row + i]) for i in range(rows)], row))
            tokens = rows * group.length
            size = adapters[row].numbers.numel() * adapters[row].numbers.element_size()
            if len(each) > 1 and costs.gathered_s(rows, tokens, form, size) < costs.segments_s(len(each), tokens, form):
                numbers = encoder.workspace.take(
                    "beside",
                    sum(block.numbers.ndim == 2 for block in blocks),
                    shape=(rows, adapters[row].numbers.numel()),
                    dtype=adapters[row].numbers.dtype,
                )
                torch.stack([adapters[row + i].numbers for i in range(rows)], out=numbers)
                blocks.append(_Block(row, token, rows, tokens, numbers, places[form], form))
            else:
                for first, count in each:
                    segment(first, token + (first - row) * group.length, count, count * group.length)
    return blocks


def _runs(keys: Sequence[object], begin: int) -> list[tuple[int, int]]:
    """Where runs of equal keys begin, counted from `begin`, and how long each is."""
    starts = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]]
    ends = [*starts[1:], len(keys)]
    return [(begin + start, end - start) for start, end in zip(starts, ends, strict=True)]


class _Matrices(NamedTuple):
    """A [r, in], B transposed [r, out], and DoRA's factor [out] or None; of each row where rows differ: [rows, ...]."""

    a: Tensor
    b: Tensor
    factor: Tensor | None


def _matrices(block: _Block, begin: int, site: Site) -> _Matrices:
    """The matrices of a site, whose numbers begin at `begin`."""
    rank = block.form.rank
    middle = begin + rank * site.columns
    end = middle + rank * site.rows
    return _Matrices(
        _split(block.numbers[..., begin:middle], (rank, site.columns)),
        _split(block.numbers[..., middle:end], (rank, site.rows)),
        block.numbers[..., end : end + site.rows] if block.form.dora else None,
    )


@dataclass(frozen=True)
class _Adapters:
    """What the adapters of each block say of a product (`layer.Adapters`)."""

    encoder: Encoder
    batch: Packed
    blocks: Sequence[_Block]

    def add(self, layer: int, place: int, x: Tensor, out: Tensor) -> None:
        """Out [n, out] += (x A') B', x [n, in], of all tokens or of the first of each row; DoRA scales the sum."""
        is_all = len(x) == len(self.batch.ids)
        for block, matrices in self._at(layer, place):
            part = block.all_tokens if is_all else block.all_rows
            bias = self.encoder.layers[layer].linears[place].bias
            _add(block, matrices, x[part], out[part], bias)

    def add_to_asked(self, layer: int, q: Tensor, asked: Tensor) -> None:
        """Asked [B, heads, in] += (q B) A, q [B, heads, out / heads]; DoRA scales q."""
        for block, (a, b, factor) in self._at(layer, 1):
            q_, each = q[block.all_rows], block.each
            if factor is not None:
                q_.mul_(_split(factor, q.shape[1:]))
            thin = torch.einsum(f"bhd,{each}rhd->bhr", q_, _split(b, q.shape[1:]))
            asked[block.all_rows].add_(torch.einsum(f"bhr,{each}rc->bhc", thin, a))

    def add_to_answers(self, layer: int, means: Tensor, answers: Tensor) -> None:
        """Answers [B, heads, out / heads] += (means A') B', means [B, heads, in]; DoRA scales the sum."""
        for block, (a, b, factor) in self._at(layer, 2):
            out, each = answers[block.all_rows], block.each
            thin = torch.einsum(f"bhc,{each}rc->bhr", means[block.all_rows], a)
            out.add_(torch.einsum(f"bhr,{each}rhd->bhd", thin, _split(b, answers.shape[1:])))
            if factor is not None:
                out.mul_(_split(factor, answers.shape[1:]))

    def _at(self, layer: int, place: int) -> Iterator[tuple[_Block, _Matrices]]:
        """The blocks with something beside a weight, and what it is."""
        for block in self.blocks:
            if (found := block.places.get((layer, place))) is not None:
                yield block, _matrices(block, *found)


def _split(x: Tensor, axes: Sequence[int]) -> Tensor:
    """X [..., product of axes] -> [..., *axes], a view."""
    return x.view(*x.shape[:-1], *axes)


def _add(block: _Block, matrices: _Matrices, x: Tensor, out: Tensor, bias: Tensor) -> None:
    """`_Adapters.add` for the rows of one block."""
    a, b, factor = matrices
    if a.ndim == 2:
        out.addmm_(x @ a.t(), b)
    else:
        out = out.view(block.rows, -1, b.shape[-1])
        out.baddbmm_(torch.bmm(x.view(block.rows, -1, a.shape[-1]), a.transpose(1, 2)), b)
    if factor is not None:
        out.sub_(bias).mul_(factor if factor.ndim == 1 else factor[:, None]).add_(bias)


# -- an adapter's numbers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How one adapter lies in memory: LoRA, then its own layers of the head in float32."""

    form: Form
    dtype: torch.dtype
    """Of LoRA: that of the base."""
    width: int
    labels: int
    own_dense: bool
    """Whether the first layer of the head is the adapter's own; else it is the base's."""

    @property
    def lora_bytes(self) -> int:
        """Of the LoRA part, up to where the head begins."""
        return _aligned(self.form.offsets()[1] * self.dtype.itemsize)

    @property
    def bytes(self) -> int:
        """In all."""
        dense = self.width * (self.width + 1) if self.own_dense else 0
        return self.lora_bytes + _aligned(4 * (dense + self.labels * (self.width + 1)))


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


def form_of(encoder: Encoder, modules: Mapping[tuple[int, int], str], rank: int, *, dora: bool) -> Form:
    """The form of adapters beside some weights.

    Args:
        encoder: The base.
        modules: The adapted weights as (layer, place), with their names.
        rank: The rows of every A.
        dora: Whether each output has a magnitude.
    """
    sites = []
    for layer, place in sorted(modules):
        rows, columns = encoder.layers[layer].linears[place].weight.shape
        sites.append(Site(layer, place, rows, columns))
    return Form(rank, tuple(sites), dora)


def lay_out(
    encoder: Encoder,
    layout: Layout,
    modules: Mapping[tuple[int, int], str],
    tensors: Mapping[str, Tensor],
    scaling: float,
    memory: Tensor,
) -> Beside:
    """Writes an adapter's tensors into memory that is kept for it.

    Args:
        encoder: The base.
        layout: How it will lie there.
        modules: The adapted weights as (layer, place), with their names.
        tensors: The adapter's, by transformers' names with peft's endings.
        scaling: lora_alpha / r, or what the variant makes of it.
        memory: uint8[layout.bytes].
    """
    places, size = layout.form.offsets()
    numbers = memory[: size * layout.dtype.itemsize].view(layout.dtype)
    for key, name in modules.items():
        begin, site = places[key]
        a, b = tensors[name + ".lora_A.weight"].float(), tensors[name + ".lora_B.weight"].float() * scaling
        middle = begin + layout.form.rank * site.columns
        end = middle + layout.form.rank * site.rows
        numbers[begin:middle].copy_(a.reshape(-1))
        numbers[middle:end].copy_(b.t().reshape(-1))
        if layout.form.dora:
            weight = encoder.layers[key[0]].linears[key[1]].weight.float()
            length = torch.linalg.vector_norm(weight + b @ a, dim=1)
            numbers[end : end + site.rows].copy_(tensors[name + ".lora_magnitude_vector"].float() / length)
    rest = memory[layout.lora_bytes :].view(torch.float32)
    head = encoder.head
    dense_name, out_name = encoders.LAYOUTS[head.kind].head
    if layout.own_dense:
        head = replace(head, dense=_take(rest, 0, tensors, dense_name, layout.width, layout.width))
        rest = rest[layout.width * (layout.width + 1) :]
    return Beside(
        layout.form, numbers, replace(head, out=_take(rest, 0, tensors, out_name, layout.labels, layout.width))
    )


def _take(memory: Tensor, begin: int, tensors: Mapping[str, Tensor], name: str, rows: int, columns: int) -> Linear:
    """Copies a layer of the head into memory."""
    weight = memory[begin : begin + rows * columns].view(rows, columns)
    bias = memory[begin + rows * columns : begin + rows * columns + rows]
    weight.copy_(tensors[name + ".weight"])
    bias.copy_(tensors[name + ".bias"])
    return Linear(weight, bias)


# -- what small products cost ----------------------------------------------------------------------------------------


def measure(width: int, dtype: torch.dtype, rank: int = 8) -> Costs:
    """Times small products of the base's width on one core, as they will be computed, for about 0.2 s.

    Each cost is a line through two sizes: a call is what is left where there is nothing to compute.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(width, dtype, rank)
    finally:
        torch.set_num_threads(threads)


def _measure(width: int, dtype: torch.dtype, rank: int) -> Costs:
    with torch.inference_mode():
        short, long = 16, 512
        x, a = torch.randn(long, width).to(dtype), torch.randn(rank, width).to(dtype)
        one = [_seconds(lambda n=n: x[:n] @ a.t()) for n in (short, long)]  # type: ignore[misc]
        rows = 16
        xs, as_ = torch.randn(rows, 64, width).to(dtype), torch.randn(rows, rank, width).to(dtype)
        many = [_seconds(lambda n=n: torch.bmm(xs[:, :n].contiguous(), as_.transpose(1, 2))) for n in (4, 64)]  # type: ignore[misc]
        pieces = [torch.randn(64 * 1024) for _ in range(16)]
        into = torch.empty(16, 64 * 1024)
        copied = _seconds(lambda: torch.stack(pieces, out=into))
    call, flops = _line(one, [2 * n * rank * width for n in (short, long)])
    batched_call, batched_flops = _line(many, [2 * n * rows * rank * width for n in (4, 64)])
    return Costs(call, flops, batched_call, batched_flops, into.numel() * 4 / copied)


def _seconds(work: Callable[[], object]) -> float:
    """The median of several timings; a disturbance is no property of the machine."""
    times = []
    for _ in range(15):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def _line(seconds: Sequence[float], flops: Sequence[int]) -> tuple[float, float]:
    """Seconds a call and operations a second, from two timings."""
    each = max(seconds[1] - seconds[0], 1e-7) / (flops[1] - flops[0])
    return max(seconds[0] - each * flops[0], 1e-7), 1 / each
