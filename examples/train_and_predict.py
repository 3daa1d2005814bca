"""Train on a labelled file, load the adapter, label a text. Prints the answer and its probability.

python examples/train_and_predict.py
"""

import csv
import tempfile
from pathlib import Path

import trimtab

DISHES = ("soup", "rice", "fish", "cake", "tea", "bread", "salad", "noodles")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "dishes.csv"
        with data.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for dish in DISHES:
                for praise in ("delicious", "excellent", "lovely", "perfect"):
                    writer.writerow([f"The {dish} was {praise}.", "praise"])
                for complaint in ("cold", "awful", "disgusting", "burnt"):
                    writer.writerow([f"The {dish} was {complaint}.", "complaint"])
        run = trimtab.train(data, settings={"train.num_epochs": 6}, out=Path(folder) / "run")
        classifier = trimtab.load(run.path)
        answer = classifier.predict(["The pancakes were excellent."])[0]
        print(f"{answer.label} {answer.score:.2f}, {run.metrics['eval_rows']} rows held back")
        assert answer.label == "praise"


if __name__ == "__main__":
    main()
