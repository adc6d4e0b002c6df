"""The `evaluate` command on the digits task: every method against the same retrains, wrong labels and copies included.

    ./run bench attribution/evaluation [--out DIR] [further options of evaluate]

1,437 distinct records and 60 exact copies of scikit-learn's digits, an MLP with ReLU, 240 steps; one labeller of five is wrong
40 % of the time (examples/digits). Subsets keep 50, 95 and 99 % of the records, 100 of each.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "digits")]

from assignment import assign  # noqa: E402

from attribution.engine.__main__ import main as engine  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "var" / "bench" / "evaluation")
    given, further = parser.parse_known_args()
    given.out.mkdir(parents=True, exist_ok=True)
    data = assign(0)
    np.save(given.out / "wrong.npy", (data.given_label != data.true_label)[~data.is_query])
    command = ["evaluate", f"{ROOT}/examples/digits/task.py:make_task", "--out", str(given.out), "--threads", "1"]
    command += ["--kept", "0.5", "0.95", "0.99", "--copies"]
    command += ["--mislabelled", str(given.out / "wrong.npy"), "--self-influence"]
    return engine([*command, *further])


if __name__ == "__main__":
    sys.exit(main())
