"""The baseline of a fresh process: base and adapter through transformers and peft, five texts, five answers.

python benchmarks/stock_predict.py ADAPTER TEXT...
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def main() -> None:
    adapter, *texts = sys.argv[1:]
    base = json.loads((Path(adapter) / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"]
    model = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=2), adapter
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    batch = tokenizer(texts, truncation=True, max_length=256, padding=True, return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**batch).logits.softmax(-1)
    for text, row in zip(texts, probabilities, strict=True):
        print(int(row.argmax()), round(float(row.max()), 3), text)


if __name__ == "__main__":
    main()
