"""Where the time of a step goes on one core, and what a step could gain at most, by torch's profiler.

    python benchmarks/limits.py [--batches 12] [--rounds 3]

One core is left to the process, and MiniLM learns as in the tutorial: from reviews, with and without dropout in the
base, and from short texts; a merged adapter labels reviews. Each round times our batches between plain matrix products
of the dtype that we compute in, and then stock transformers and peft, as their configs say, on the same batches; last
ours are profiled. `most` is how many times faster our batches would be, were their products as fast as the plain ones
and everything else free. What torch does not see (the interpreter, masks from numpy, the tokenizer, the profiler
itself) is `outside torch`. Writes benchmarks/results/limits-KIND.json. Needs the extra `demo`.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from few_rows import trained_on_a_few_rows
from record import kind, write
from steps import minilm, seconds, step
from torch.profiler import ProfilerActivity, profile

import trimtab
from trimtab import batching, data, demo, forward, tokens
from trimtab.config import MINILM, RuntimeSettings
from trimtab.device import place
from trimtab.fast import encoder
from trimtab.hub import find_base
from trimtab.model import trainable
from trimtab.tokens import Encoded

OPERATIONS = {
    "products": {"mm", "addmm", "bmm", "baddbmm", "_linear_pointwise", "_scaled_dot_product_flash_attention_for_cpu"},
    "softmax": {"_softmax", "_softmax_backward_data"},
    "GELU": {"gelu", "gelu_backward"},
    "norms": {"native_layer_norm", "native_layer_norm_backward"},
    "copies": {"copy_", "cat", "index", "index_select", "index_put_"},
    "sums, products by element": {"add", "add_", "sub", "mul", "mul_", "div", "div_", "sum"},
}
Pass = Callable[[], object]


def flops(name: str, shapes: list[list[int]]) -> float:
    """What a product of these arguments needs; attention's two products are those of its four axes."""
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        rows, heads, length, width = shapes[0]
        return 4.0 * rows * heads * length * length * width
    if name == "_linear_pointwise":
        return 2.0 * math.prod(shapes[0]) * shapes[1][0]
    left, right = shapes[1:3] if name in ("addmm", "baddbmm") else shapes[:2]
    return 2.0 * math.prod(left) * right[-1]


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large product on this core, over a second: what it keeps up, not what it does at its best."""
    a, b, done = torch.randn(4_096, 384).to(dtype), torch.randn(384, 1_536).to(dtype), 0
    began = time.perf_counter()
    while time.perf_counter() - began < 1:
        a @ b
        done += 1
    return 2 * 4_096 * 384 * 1_536 * done / (time.perf_counter() - began)


def profiled(work: Pass) -> tuple[dict[str, float], float]:
    """Shares of the time by kind of operation, and the FLOPs of the products."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        began = time.perf_counter()
        work()
        took = time.perf_counter() - began
    found, needed = dict.fromkeys([*OPERATIONS, "other operations"], 0.0), 0.0
    for event in seen.key_averages(group_by_input_shape=True):
        name = event.key.rpartition("::")[2]
        name = name.removesuffix("_") if "mm_" in name else name  # addmm_ is addmm in place
        of = next((what for what, names in OPERATIONS.items() if name in names), "other operations")
        found[of] += event.self_cpu_time_total / 1e6 / took
        if of == "products":
            needed += event.count * flops(name, event.input_shapes)
    return {**found, "outside torch": 1 - sum(found.values())}, needed


def measured(ours: Pass, stock: Pass | None, rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    for side in filter(None, (ours, stock)):
        side()  # code for its shapes is made
    found = []
    for _ in range(rounds):
        rates = [product_rate(dtype)]
        one = {"ours": seconds(ours)}
        rates.append(product_rate(dtype))
        if stock is not None:
            one["stock"] = seconds(stock)
        found.append({**one, "flops_per_s": statistics.mean(rates)})
    shares, needed = profiled(ours)
    return {
        "rounds": found,
        "shares": shares,
        "product_flops": needed,
        "most": statistics.median(one["ours"] * one["flops_per_s"] / needed for one in found),
        **({"against_stock": statistics.median(one["stock"] / one["ours"] for one in found)} if stock else {}),
    }


def training(model: Any, run: forward.Forward, encoded: Encoded, batches: Iterable[Any]) -> Pass:
    optimizer = torch.optim.AdamW(trainable(model).values())
    return lambda: [step(run, model, optimizer, encoded, rows) for rows in batches]


def texts(of: str, rows: int) -> tuple[list[str], Encoded]:
    """Reviews, or the sentences of rotten_tomatoes."""
    table = data.read_table(demo.reviews_csv()).columns
    chosen = [i for i, source in enumerate(table["source"]) if (source == "rotten_tomatoes") == (of == "short texts")]
    chosen = [chosen[i] for i in np.random.default_rng(0).permutation(len(chosen))[:rows]]
    found = [table["text"][i] for i in chosen]
    tokenizer = tokens.from_base(find_base(MINILM).folder)
    return found, tokens.encode(found, tokenizer, 256, [int(table["label"][i]) for i in chosen])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    place(RuntimeSettings(device="cpu"))
    dtype, parts = forward.fast_dtype(RuntimeSettings()), {}
    slow = minilm()
    for name, of, drops in (
        ("tutorial", "reviews", True),
        ("tutorial, no base dropout", "reviews", False),
        ("short texts, no base dropout", "short texts", False),
    ):
        _, encoded = texts(of, 16 * 16 * asked.batches)
        plan = batching.plan(encoded.lengths, 16, seed=0, epoch=0, group_by_length=True)[: asked.batches]
        quick = minilm() if drops else minilm(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        ours = training(quick, forward.fast(encoder.of_peft_model(quick, dtype)), encoded, plan)
        stock = training(slow, forward.stock(slow, 0), encoded, plan)
        parts[name] = measured(ours, stock, asked.rounds, dtype)
    with tempfile.TemporaryDirectory() as folder:
        run, _ = trained_on_a_few_rows(Path(folder))
        classifier, (reviews, _) = trimtab.load(run.adapter), texts("reviews", 500)
        parts["prediction of reviews"] = measured(lambda: classifier.predict(reviews), None, asked.rounds, dtype)
    ratios = {f"{name}: at most": one["most"] for name, one in parts.items()}
    write(f"limits-{kind()}", {"dtype": str(dtype).removeprefix("torch."), "parts": parts, "ratios": ratios})


if __name__ == "__main__":
    main()
