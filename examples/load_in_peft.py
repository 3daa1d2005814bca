"""An adapter of trimtab in plain peft: the same logits without trimtab. Prints the largest difference.

python examples/load_in_peft.py runs/latest
"""

import json
import sys
from pathlib import Path

import peft
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

import trimtab
from trimtab.config import RuntimeSettings
from trimtab.rundir import locate

TEXTS = [
    "A film to fall in love with.",
    "I left after half an hour.",
    "It begins well. " + "Then another hour goes by. " * 100 + "What a waste.",
]


def cut(ids: list[int], max_length: int, keep: str) -> list[int]:
    """What trimtab keeps of a long text between its special tokens, one at each end: its start, or both of its ends."""
    inner, room = ids[1:-1], max_length - 2
    if len(inner) <= room:
        return ids
    first = room if keep == "start" else room // 4
    return [ids[0], *inner[:first], *inner[len(inner) - (room - first) :], ids[-1]]


def main(run: str) -> None:
    logging.set_verbosity_error()  # of a head that is not trained, which the adapter brings, and of texts cut below
    adapter = locate(run) / "adapter"
    about = json.loads((adapter / "trimtab.json").read_text("utf-8"))
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    base = AutoModelForSequenceClassification.from_pretrained(
        config["base_model_name_or_path"], num_labels=len(about["labels"]), dtype=torch.float32
    )
    model = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(adapter))
    said = about["preprocessing"]
    # The tokenizer's own truncation would keep the start alone.
    whole = tokenizer(TEXTS, truncation=False)["input_ids"]
    ids = [cut(one, said["max_length"], said.get("keep", "start")) for one in whole]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    with torch.inference_mode():
        theirs = model(**batch).logits.numpy()
    classifier = trimtab.load(run, runtime=RuntimeSettings(dtype="float32"))  # as peft computes here
    ours = classifier.logits(classifier.encode(TEXTS))
    difference = float(abs(ours - theirs).max())
    print(f"largest difference of a logit: {difference:.1e} ({Path(adapter).name} of {len(about['labels'])} labels)")
    assert difference < 1e-4


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/latest")
