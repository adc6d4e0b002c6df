"""Does the engine know what a command takes before it starts?

    ./run bench attribution/cost [--commands train score shares index evaluate] [--clock wall]

Each command is predicted and then run, at three sizes that `fixed` and `factor` are fitted to and at two that they are not. By processor
time on one thread, unless `--clock wall`, which on a busy machine says as much of the others. The fitted pairs belong into FITTED of attribution/engine/cost.py.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from attribution.engine import Recipe, Task, TensorRecords, epoch_order, initial_state_from_seed  # noqa: E402
from attribution.engine import cost as costs  # noqa: E402
from attribution.engine.__main__ import main as engine  # noqa: E402

SIZES = {  # width, records, epochs of batches of 64
    "fitted": [(32, 512, 4), (128, 1024, 6), (256, 2048, 4)],
    "other": [(64, 1500, 8), (192, 3000, 5)],
}
COMMANDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "train": ({}, []),
    "score": ({"method": "replay"}, ["--method", "replay"]),
    "shares": ({"budget": 100.0}, ["--budget", "100"]),
    "index": ({}, []),
    "evaluate": (
        {"method": ["graddot"], "subsets": 50, "leave_out": [0.1]},
        ["--method", "graddot", "--subsets", "50", "--leave-out", "0.1"],
    ),
}


def make_task() -> Task:
    """The size is in the environment: the command line calls this by itself."""
    width, n, epochs = (int(part) for part in os.environ["COST_SIZE"].split(","))

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10))

    def loss(model: nn.Module, records: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return cross_entropy(model(records[0]), records[1], reduction="none")

    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n + 64) % 10
    x = torch.randn(10, 64, generator=generator)[y] + 2 * torch.randn(n + 64, 64, generator=generator)
    recipe = Recipe(
        optimizer="sgd", options={"momentum": 0.9}, learning_rate=0.02, order=epoch_order(n, 64, epochs, 0),
        initial_state=initial_state_from_seed(build, 0),
    )  # fmt: skip
    records, queries = TensorRecords(x[:n], y[:n]), TensorRecords(x[n:], y[n:])
    return Task(
        model=build,
        loss=loss,
        measurement=loss,
        train=records,
        queries=queries,
        owner=torch.arange(n) % 10,
        recipe=recipe,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--clock", choices=["processor", "wall"], default="processor")
    given = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time if given.clock == "processor" else time.perf_counter
    for command in given.commands:
        costs.FITTED.pop(command, None)
        found = {name: [one(command, size, clock) for size in sizes] for name, sizes in SIZES.items()}
        fixed, factor = costs.fit(*zip(*found["fitted"], strict=True))
        print(f'    "{command}": ({fixed:.2g}, {factor:.3g}),', flush=True)
        for name, pairs in found.items():
            for size, (raw, took) in zip(SIZES[name], pairs, strict=True):
                said = fixed + factor * raw
                print(
                    f"{command}, {name}, {size}: {said:.2f} s predicted, {took:.2f} s measured, {said / took:.2f}",
                    flush=True,
                )


def one(command: str, size: tuple[int, int, int], clock: Any) -> tuple[float, float]:
    """(predicted without fit, measured) seconds."""
    os.environ["COST_SIZE"] = ",".join(map(str, size))
    options, arguments = COMMANDS[command]
    raw = costs.estimate(make_task(), command, options, clock=clock).seconds
    with tempfile.TemporaryDirectory() as folder:
        started = clock()
        status = engine([command, f"{__file__}:make_task", "--out", folder, "--quiet", "--device", "cpu", *arguments])
        took = clock() - started
    assert status == 0
    return raw, took


if __name__ == "__main__":
    main()
