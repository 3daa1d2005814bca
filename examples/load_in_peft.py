"""An adapter of trimtab in plain peft: the same logits without trimtab. Prints the largest difference.

python examples/load_in_peft.py runs/latest
"""

import json
import sys
from pathlib import Path

import peft
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import trimtab
from trimtab.rundir import locate

TEXTS = ["A film to fall in love with.", "I left after half an hour."]


def main(run: str) -> None:
    adapter = locate(run) / "adapter"
    about = json.loads((adapter / "trimtab.json").read_text("utf-8"))
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    base = AutoModelForSequenceClassification.from_pretrained(
        config["base_model_name_or_path"], num_labels=len(about["labels"]), dtype=torch.float32
    )
    model = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(adapter))
    batch = tokenizer(
        TEXTS, padding=True, truncation=True, max_length=about["preprocessing"]["max_length"], return_tensors="pt"
    )
    with torch.inference_mode():
        theirs = model(**batch).logits.numpy()
    classifier = trimtab.load(run)
    ours = classifier.logits(classifier.encode(TEXTS))
    difference = float(abs(ours - theirs).max())
    print(f"largest difference of a logit: {difference:.1e} ({Path(adapter).name} of {len(about['labels'])} labels)")
    assert difference < 1e-4


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/latest")
