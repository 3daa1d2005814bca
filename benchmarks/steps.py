"""Single training steps: trimtab's fast forward against stock transformers and peft, in one process, interleaved.

    python benchmarks/steps.py [--rounds 3] [--parts roberta,short_texts]

roberta-base's shape (random weights; speed does not depend on them), 16 x 256 tokens: the step, and the share of the
rate of a plain matrix product of its dtype that it reaches. Short texts: one epoch of the 8,530 rotten_tomatoes
sentences on MiniLM in batches of 16. trimtab without base dropout, stock with it, as its configs say. Writes
benchmarks/results/steps-KIND.json, a part as soon as it is done. Needs the extra `demo`; takes about 20 minutes on two
AVX2 cores.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import torch
from record import commit, kind, read, write
from transformers import AutoModelForSequenceClassification, RobertaConfig

from trimtab import batching, data, demo, forward, tokens
from trimtab.classification import loss_sum
from trimtab.config import MINILM, RuntimeSettings
from trimtab.device import place
from trimtab.fast import encoder
from trimtab.hub import find_base
from trimtab.model import trainable
from trimtab.tokens import Encoded

ROWS, LENGTH = 16, 256


def with_lora(model: Any) -> Any:
    """LoRA as in the tutorial."""
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=32, lora_dropout=0.1, target_modules=["query", "value"])
    return peft.get_peft_model(model, lora)


def roberta(dropout: float) -> Any:
    config = RobertaConfig(
        vocab_size=50_265,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return with_lora(AutoModelForSequenceClassification.from_config(config))


def minilm(**settings: Any) -> Any:
    return with_lora(
        AutoModelForSequenceClassification.from_pretrained(str(find_base(MINILM).folder), num_labels=2, **settings)
    )


def step(run: forward.Forward, model: Any, optimizer: torch.optim.Optimizer, encoded: Encoded, rows: Any) -> None:
    """Forward, backward, clipping, update."""
    loss_sum(run(encoded, rows, 1), torch.from_numpy(encoded.labels[rows])).backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(trainable(model).values(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def needed_flops(layers: int, width: int, inner: int) -> float:
    """The products of a step of 16 x 256 tokens that trains LoRA on queries and values, without LoRA's own.

    Forward: all layers whole, but the last for keys and values only, and its first tokens. Backward: gradients of
    inputs alone, for the weights are frozen; the first layer needs none of its own input and none of its keys.
    """
    tokens_, linear, attention = ROWS * LENGTH, 2 * width * width, 2 * LENGTH * width
    whole = tokens_ * (4 * linear + 4 * width * inner + 2 * attention)
    whole_back = tokens_ * (4 * linear + 4 * width * inner + 4 * attention)
    first_back = whole_back - tokens_ * (3 * linear + attention)
    last = tokens_ * 2 * linear + ROWS * (2 * linear + 4 * width * inner + 2 * attention)
    last_back = tokens_ * 2 * linear + ROWS * (2 * linear + 4 * width * inner + 4 * attention)
    return float((layers - 1) * whole + last + (layers - 2) * whole_back + first_back + last_back)


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of one large product, over 20 of them: what the machine keeps up, not what it does at its best."""
    a, b, times = torch.randn(4_096, 768).to(dtype), torch.randn(768, 3_072).to(dtype), 20
    return 2 * 4_096 * 768 * 3_072 * times / seconds(lambda: [a @ b for _ in range(times)])


def against_stock(rounds: list[dict[str, float]]) -> float:
    """The median of the ratios within rounds."""
    return statistics.median(one["stock"] / one["ours"] for one in rounds)


def roberta_step(rounds: int) -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(5, 50_000, ROWS * LENGTH).astype(np.int32)
    offsets = np.arange(ROWS + 1, dtype=np.int64) * LENGTH
    labels = np.arange(ROWS, dtype=np.int64) % 2
    encoded, rows = Encoded(ids, offsets, labels, np.diff(offsets)), np.arange(ROWS)
    quick, slow, dtype = roberta(0.0), roberta(0.1), forward.fast_dtype(RuntimeSettings())
    sides = {
        "ours": (forward.fast(encoder.of_peft_model(quick, dtype)), quick),
        "stock": (forward.stock(slow, 1), slow),
    }
    optimizers = {name: torch.optim.AdamW(trainable(model).values()) for name, (_, model) in sides.items()}
    found: list[dict[str, float]] = []
    for _ in range(rounds + 1):  # the first warms up
        one, rates = {}, [product_rate(dtype)]
        for name, (run, model) in sides.items():
            one[name] = seconds(
                lambda run=run, model=model, name=name: step(run, model, optimizers[name], encoded, rows)
            )  # type: ignore[misc]
            rates.append(product_rate(dtype))
        one["flops_per_s"] = statistics.mean(rates[:2])  # before and after ours
        one["share"] = needed_flops(12, 768, 3_072) / one["ours"] / one["flops_per_s"]
        found.append(one)
    found = found[1:]
    return {
        "needed_flops": needed_flops(12, 768, 3_072),
        "rounds": found,
        "ratios": {
            "roberta-base's shape, 16 x 256, against stock": against_stock(found),
            "the same, share of the matrix-product rate": statistics.median(one["share"] for one in found),
        },
    }


def short_texts(rounds: int) -> dict[str, Any]:
    table = data.read_table(demo.reviews_csv()).columns
    chosen = [i for i, source in enumerate(table["source"]) if source == "rotten_tomatoes"]
    tokenizer = tokens.from_base(find_base(MINILM).folder)
    texts, labels = [table["text"][i] for i in chosen], [int(table["label"][i]) for i in chosen]
    encoded = tokens.encode(texts, tokenizer, 256, labels)
    quick, slow = minilm(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), minilm()
    sides = {
        "ours": (forward.fast(encoder.of_peft_model(quick, forward.fast_dtype(RuntimeSettings()))), quick, True),
        "stock": (forward.stock(slow, 0), slow, False),
    }
    found: list[dict[str, float]] = []
    for epoch in range(rounds):
        one: dict[str, float] = {}
        for name, (run, model, group) in sides.items():
            plan = batching.plan(encoded.lengths, 16, seed=0, epoch=epoch, group_by_length=group)
            optimizer = torch.optim.AdamW(trainable(model).values())
            began = time.perf_counter()
            for rows in plan:
                step(run, model, optimizer, encoded, rows)
            one[name] = time.perf_counter() - began
        found.append(one)
    ratios = {"short texts, one epoch, against stock": against_stock(found)}
    return {"rows": len(texts), "tokens": len(encoded.ids), "rounds": found, "ratios": ratios}


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {"roberta": roberta_step, "short_texts": short_texts}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default=",".join(PARTS))
    asked = parser.parse_args()
    placed = place(RuntimeSettings(device="cpu"))
    parts = read(f"steps-{kind()}").get("parts", {})
    for name in asked.parts.split(","):
        parts[name] = {"commit": commit(), **PARTS[name](asked.rounds)}
        ratios = {key: value for one in parts.values() for key, value in one["ratios"].items()}
        write(f"steps-{kind()}", {"threads": placed.threads, "parts": parts, "ratios": ratios})


if __name__ == "__main__":
    main()
