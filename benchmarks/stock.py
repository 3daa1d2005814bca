"""The baseline: the tutorial's recipe on transformers' Trainer and peft. Prints one JSON object.

    python benchmarks/stock.py TRAIN.parquet EVAL.parquet [--tuned] [--seed 42] [--out ADAPTER]

As it is: the article's code, brought to today's names of arguments, every other setting the libraries' default; texts
are padded to 256 tokens by the tokenizer, as the article does. Tuned, as someone who knows the libraries would: no
dropout in the base, batches of similar length, padding to the longest of a batch, evaluation in batches of 32, the
faster of eager and sdpa attention, and bf16 where the processor has instructions for it.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import peft
import pyarrow.parquet as pq
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from trimtab.config import MINILM
from trimtab.hub import find_base
from trimtab.machine import has_bf16, processor

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def build(folder: str, attention: str, *, tuned: bool) -> Any:
    """The base with LoRA of the tutorial."""
    settings: dict[str, Any] = {"attn_implementation": attention, **NO_DROPOUT} if tuned else {}
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, **settings)
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=32, lora_dropout=0.1, target_modules=["query", "value"])
    return peft.get_peft_model(model, lora)


def faster_attention(folder: str) -> str:
    """The faster of transformers' two ways on this machine, by the best of three steps of 16 x 256 tokens."""
    ids = torch.randint(1_000, 20_000, (16, 256))
    seconds = {}
    for attention in ("sdpa", "eager"):
        model = build(folder, attention, tuned=True).train()
        times = []
        for _ in range(3):
            began = time.perf_counter()
            model(
                input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.zeros(16, dtype=torch.long)
            ).loss.backward()
            times.append(time.perf_counter() - began)
        seconds[attention] = min(times)
    return min(seconds, key=seconds.__getitem__)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("train")
    parser.add_argument("eval")
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", help="where the adapter of the best epoch is kept")
    asked = parser.parse_args()

    folder = str(find_base(MINILM).folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def rows(file: str, count: int) -> list[dict[str, Any]]:
        table = pq.read_table(file)
        chosen = table.take(np.random.default_rng(42).permutation(len(table))[:count])
        padding = False if asked.tuned else "max_length"
        encoded = tokenizer(chosen["text"].to_pylist(), truncation=True, max_length=256, padding=padding)
        return [
            {"input_ids": ids, "attention_mask": mask, "labels": label}
            for ids, mask, label in zip(
                encoded["input_ids"], encoded["attention_mask"], chosen["label"].to_pylist(), strict=True
            )
        ]

    training, evaluation = rows(asked.train, 1_000), rows(asked.eval, 500)
    attention = faster_attention(folder) if asked.tuned else "sdpa"
    in_bf16 = has_bf16(processor())
    torch.manual_seed(asked.seed)
    model = build(folder, attention, tuned=asked.tuned)
    with tempfile.TemporaryDirectory() as out:
        tuned: dict[str, Any] = (
            {"train_sampling_strategy": "group_by_length", "per_device_eval_batch_size": 32, "bf16": in_bf16}
            if asked.tuned
            else {}
        )
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=out,
                learning_rate=1e-3,
                per_device_train_batch_size=16,
                num_train_epochs=3,
                weight_decay=0.01,
                eval_strategy="epoch",
                save_strategy="epoch",
                load_best_model_at_end=True,
                logging_steps=10,
                report_to="none",
                disable_tqdm=True,
                seed=asked.seed,
                use_cpu=True,
                **tuned,
            ),
            train_dataset=training,  # type: ignore[arg-type]
            eval_dataset=evaluation,  # type: ignore[arg-type]
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())},
        )
        began = time.time()
        trainer.train()
        seconds = time.time() - began
        scores = trainer.evaluate()
        if asked.out:
            model.save_pretrained(asked.out)
    print(
        json.dumps(
            {
                "began": began,
                "train_seconds": seconds,
                "accuracy": scores["eval_accuracy"],
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "attention": attention,
                "bf16": asked.tuned and in_bf16,
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()
