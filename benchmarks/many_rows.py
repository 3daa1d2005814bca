"""Peak memory of predicting 1,000,000 short rows from parquet to parquet, against 100,000.

    python benchmarks/many_rows.py

An adapter on MiniLM is trained first on a few rows. Half an hour on two AVX2 cores; a busy machine changes the time
and not the figure. Writes benchmarks/results/many_rows-KIND.json. Needs the extra `demo`.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from few_rows import trained_on_a_few_rows
from record import kind, write


def peak_of(adapter: Path, folder: Path, rows: int) -> int:
    """Peak memory in bytes of predicting `rows` short texts from parquet to parquet."""
    words = ["good film", "bad plot", "so slow", "loved it"]
    pq.write_table(pa.table({"text": [f"{words[i % 4]} {i % 97}" for i in range(rows)]}), folder / "in.parquet")
    program = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    )
    command = [sys.executable, "-m", "trimtab", "predict", str(adapter), "--file", str(folder / "in.parquet")]
    done = subprocess.run(
        [sys.executable, "-c", program, *command, "--out", str(folder / "out.parquet")],
        check=True,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    assert pq.read_metadata(folder / "out.parquet").num_rows == rows
    return int(done.stdout.split()[-1])


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run, _ = trained_on_a_few_rows(folder)
        few, many = (peak_of(run.adapter, folder, rows) for rows in (100_000, 1_000_000))
    write(
        f"many_rows-{kind()}",
        {
            "ratios": {"peak memory of 1,000,000 rows against 100,000": many / few},
            "peak_bytes": {"100,000 rows": few, "1,000,000 rows": many},
        },
    )


if __name__ == "__main__":
    main()
