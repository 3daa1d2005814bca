"""trimtab fine-tunes, judges and uses LoRA adapters for text classification, on the computer you already have.

    import trimtab

    run = trimtab.train("reviews.csv")
    classifier = trimtab.load(run.path)
    classifier.predict(["What a wonderful film."])[0].label

Names are imported on first use: `import trimtab` alone takes milliseconds and does not import torch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.api import compare, evaluate, load, train
    from trimtab.config import Recipe
    from trimtab.errors import TrimtabError
    from trimtab.predict import Classifier, Prediction
    from trimtab.training import Run

__version__ = "0.1.0"

# Threads wait for each other after every product, and OpenMP lets them spin for milliseconds: where other programs are
# at work, on the core that the other thread waits for. After 2,000 rounds they sleep (docs/performance.md). It is read
# when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

__all__ = [
    "Classifier",
    "Prediction",
    "Recipe",
    "Run",
    "TrimtabError",
    "__version__",
    "compare",
    "evaluate",
    "load",
    "train",
]

_HOMES = {
    "Classifier": "predict",
    "Prediction": "predict",
    "Recipe": "config",
    "Run": "training",
    "TrimtabError": "errors",
    "compare": "api",
    "evaluate": "api",
    "load": "api",
    "train": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    return getattr(import_module(f"trimtab.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
