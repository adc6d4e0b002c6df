"""The engine on a model of GPT-2 small's size: training, replay, metagradient, gradient store and scores, on a GPU where there is one.

    ./run bench attribution/gpt2_small [--device auto] [--scale 1.0] [--steps 20] [--records 256] [--precision auto]

A byte-level GPT of 12 layers, 768 wide, 12 heads and GPT-2's vocabulary size (124 M parameters with tied embeddings) is trained with AdamW and dropout on this
repository's own text, cut into windows. Per stage: seconds, records or steps a second, and the most memory of the device (or of the process). `--scale`
shrinks depth, width, vocabulary and window together: on a CPU the whole size is refused, and 0.1 or so shows that every stage runs.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from attribution.engine import (  # noqa: E402
    Recipe,
    Task,
    TensorRecords,
    epoch_order,
    initial_state_from_seed,
    metagradients,
    replay_values,
    train,
)
from attribution.engine.cost import estimate, in_bytes, in_time  # noqa: E402
from attribution.engine.devices import resolve, resolve_precision  # noqa: E402
from attribution.engine.estimators import graddot  # noqa: E402
from attribution.engine.store import build_store  # noqa: E402
from attribution.engine.training import Program, cost, plan_reverse  # noqa: E402

LAYERS, WIDTH, HEADS, VOCABULARY, WINDOW = 12, 768, 12, 50_257, 256
CPU_SCALE = 0.25  # the most that a CPU is asked for


class GPT(nn.Module):
    """Pre-norm transformer with tied embeddings."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, window: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(window, width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.1, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        mask = torch.full((window, window), float("-inf")).triu(1)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("place", torch.arange(window), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        x = self.tokens(tokens) + self.positions(self.place[:n])
        for block in self.blocks:
            x = block(x, src_mask=self.mask[:n, :n])
        return self.norm(x) @ self.tokens.weight.T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--records", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    given = parser.parse_args()
    (device,) = resolve(given.device)
    if device.type == "cpu" and given.scale > CPU_SCALE:
        parser.error(
            f"no GPU here; the whole size takes hours and {in_bytes(124e6 * 12 * 4)} on a CPU: --scale {CPU_SCALE} at most"
        )
    task = make_task(given, device)
    count = sum(p.numel() for p in task.model().parameters())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{count / 1e6:.1f} M parameters, {given.steps} steps of {given.batch} windows, {name}, gradients in {task.precision}",
        flush=True,
    )

    said = estimate(task, "train")
    print(f"predicted for the training: {said.in_words()}", flush=True)
    program = Program(task)
    stage("train", given.steps, "steps", lambda: train(task), device)
    ones = torch.ones(2, task.n_train)
    stage("two replays", 2 * given.steps, "steps", lambda: replay_values(task, ones, program=program), device)
    plan = plan_reverse(task, 1, 1, program=program)
    print(
        f"  metagradient as planned: {plan.snapshots} states of {in_bytes(cost(task).state_bytes)}, {plan.run_equivalents:.2f} runs",
        flush=True,
    )
    stage("metagradient", given.steps, "steps", lambda: metagradients(task, ones[:1], program=program), device)
    with tempfile.TemporaryDirectory() as folder:
        stage("index", task.n_train, "records", lambda: build_store(task, Path(folder)), device)
    stage("graddot", task.n_train, "records", lambda: graddot.score(task), device)


def make_task(given: argparse.Namespace, device: torch.device) -> Task:
    heads = max(1, round(HEADS * given.scale))
    shape = (max(1, round(LAYERS * given.scale)), 64 * heads if given.scale == 1 else 16 * heads, heads)
    vocabulary, window = max(256, round(VOCABULARY * given.scale)), max(16, round(WINDOW * given.scale))

    def build() -> nn.Module:
        return GPT(*shape, vocabulary, window)

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        (tokens,) = batch
        logits = model(tokens[:, :-1])
        return cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)

    text = b"".join(path.read_bytes() for path in sorted(ROOT.rglob("attribution/**/*.py")))
    n, n_query = given.records, 8
    wanted = (n + n_query) * (window + 1)
    tokens = torch.frombuffer(bytearray((text * (1 + wanted // len(text)))[:wanted]), dtype=torch.uint8).long()
    windows = tokens.reshape(n + n_query, window + 1)[:, :window]
    order = epoch_order(n, given.batch, -(-given.steps * given.batch // n), 0)[: given.steps]
    recipe = Recipe(
        optimizer="adamw",
        learning_rate=torch.linspace(3e-4, 3e-5, given.steps, dtype=torch.float64),
        order=order,
        initial_state=initial_state_from_seed(build, 0),
        clip_norm=1.0,
    )
    return Task(
        model=build,
        loss=loss,
        measurement=loss,
        train=TensorRecords(windows[:n]),
        queries=TensorRecords(windows[n:]),
        recipe=recipe,
        device=device,
        precision=resolve_precision(given.precision, device),
    )


def stage(name: str, count: int, unit: str, work: Callable[[], object], device: torch.device) -> None:
    on_card = device.type == "cuda"
    if on_card:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if on_card:
        torch.cuda.synchronize(device)
    took = time.perf_counter() - started
    held = (
        torch.cuda.max_memory_allocated(device)
        if on_card
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    print(f"{name}: {in_time(took)}, {count / took:,.1f} {unit}/s, {in_bytes(held)} at most", flush=True)


if __name__ == "__main__":
    main()
