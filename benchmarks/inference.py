"""Prediction: trimtab against stock transformers and peft, onnxruntime and OpenVINO. 15 minutes on two AVX2 cores.

    pip install onnx onnxscript onnxruntime openvino
    python benchmarks/inference.py [--rounds 3] [--parts reviews,fresh]

An adapter is trained first on a few rows: speed does not depend on what it learned. Then, every side once a round:
2,000 IMDB reviews cut at 256 tokens, texts to labels; and a fresh process to five answers. Stock runs unmerged in
batches of 32 in the order of the file; onnxruntime (float32 and dynamic int8) and OpenVINO run the merged model over
the same length-sorted batches as trimtab. Writes benchmarks/results/inference-KIND.json, a part as soon as it is done.
Needs the extra `demo`.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import pyarrow.parquet as pq
import torch
from few_rows import trained_on_a_few_rows
from onnxruntime.quantization import quantize_dynamic
from peft import PeftModel
from record import commit, kind, read, write
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import trimtab
from trimtab import batching, demo

HERE = Path(__file__).parent
Side = Callable[[list[str]], Any]


def stock(adapter: Path, base: str) -> Side:
    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, num_labels=2), adapter)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(base)

    def run(texts: list[str]) -> Any:
        answers = []
        for start in range(0, len(texts), 32):
            batch = tokenizer(
                texts[start : start + 32], truncation=True, max_length=256, padding=True, return_tensors="pt"
            )
            with torch.no_grad():
                answers.append(model(**batch).logits.argmax(-1).numpy())
        return np.concatenate(answers)

    return run


def over_batches(classifier: trimtab.Classifier, logits: Callable[[Any, Any], Any]) -> Side:
    """A runtime over our tokens and our length-sorted batches."""

    def run(texts: list[str]) -> Any:
        encoded = classifier.encode(texts)
        answers = np.zeros(len(texts), np.int64)
        for rows in batching.evaluation_plan(encoded.lengths):
            batch = batching.collate(encoded, rows, classifier.adapter.tokenizer.pad_id)
            answers[rows] = logits(batch.input_ids, batch.attention_mask.astype(np.int64)).argmax(-1)
        return answers

    return run


def runtimes(folder: Path, adapter: Path, base: str, classifier: trimtab.Classifier) -> dict[str, Side]:
    """Onnxruntime in float32 and dynamic int8, and OpenVINO, over the merged model."""
    model = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, attn_implementation="eager"), adapter
    ).merge_and_unload()
    model.eval()

    class Logits(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return model(input_ids=input_ids, attention_mask=attention_mask).logits

    file, small = folder / "model.onnx", folder / "int8.onnx"
    example = (torch.ones(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long))
    axes = {"input_ids": {0: "rows", 1: "tokens"}, "attention_mask": {0: "rows", 1: "tokens"}}
    names = list(axes)
    torch.onnx.export(
        Logits().eval(),
        example,
        str(file),
        input_names=names,
        output_names=["logits"],
        dynamic_axes=axes,
        dynamo=False,
        opset_version=17,
    )
    quantize_dynamic(str(file), str(small))

    def onnx(path: Path) -> Side:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return over_batches(
            classifier, lambda ids, mask: session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]
        )

    core = openvino.Core()
    hints: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if kind() == "bf16":
        hints["INFERENCE_PRECISION_HINT"] = "bf16"
    compiled = core.compile_model(core.read_model(str(file)), "CPU", hints)
    return {
        "onnxruntime float32": onnx(file),
        "onnxruntime int8": onnx(small),
        "openvino": over_batches(classifier, lambda ids, mask: compiled([ids, mask])[0]),
    }


def reviews(run: trimtab.Run, evaluation: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """2,000 reviews, texts to labels."""
    classifier = trimtab.load(run.path)
    base = str(classifier.base.folder)
    texts = pq.read_table(evaluation)["text"].to_pylist()[:2_000]
    sides: dict[str, Side] = {
        "ours": classifier.predict,
        "stock": stock(run.adapter, base),
        **runtimes(folder, run.adapter, base, classifier),
    }
    index = classifier.labels.index()
    expected = np.array([index[answer.label] for answer in classifier.predict(texts[:200])])
    agreement = {name: float(np.mean(side(texts[:200]) == expected)) for name, side in sides.items() if name != "ours"}
    found = [
        {name: seconds(lambda side=side: side(texts)) for name, side in sides.items()}  # type: ignore[misc]
        for _ in range(rounds)
    ]
    others = [name for name in sides if name not in ("ours", "stock")]
    return {
        "ratios": {
            "2,000 reviews, texts to labels, against stock": median(found, "stock"),
            **{f"the same against {name}": median(found, name) for name in others},
        },
        "threads": torch.get_num_threads(),
        "versions_of_runtimes": {"onnxruntime": onnxruntime.__version__, "openvino": openvino.__version__},
        "same_label_as_ours_on_200_rows": agreement,
        "rounds": found,
    }


def fresh(run: trimtab.Run, evaluation: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """A process of its own to five answers, four times a round."""
    five = [str(run.adapter), *demo.SENTENCES.values()]
    commands = {
        "ours": [sys.executable, "-m", "trimtab", "predict", *five],
        "stock": [sys.executable, str(HERE / "stock_predict.py"), *five],
    }
    found = []
    for _ in range(4 * rounds):
        found.append(
            {
                name: seconds(lambda command=command: subprocess.run(command, check=True, capture_output=True))  # type: ignore[misc]
                for name, command in commands.items()
            }
        )
    return {"ratios": {"a fresh process to five answers, against stock": median(found, "stock")}, "rounds": found}


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def median(rounds: list[dict[str, float]], slow: str) -> float:
    """Of the ratios within rounds."""
    return statistics.median(one[slow] / one["ours"] for one in rounds)


PARTS = {"reviews": reviews, "fresh": fresh}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default=",".join(PARTS))
    asked = parser.parse_args()
    name = f"inference-{kind()}"
    parts = read(name).get("parts", {})
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run, evaluation = trained_on_a_few_rows(folder)
        for part in asked.parts.split(","):
            parts[part] = {"commit": commit(), **PARTS[part](run, evaluation, folder, asked.rounds)}
            ratios = {key: value for one in parts.values() for key, value in one["ratios"].items()}
            write(name, {"parts": parts, "ratios": ratios})


if __name__ == "__main__":
    main()
