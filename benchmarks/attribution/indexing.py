"""What an index of all records' gradients costs over a plain forward and backward pass: this engine's, and the peers'.

    ./run bench attribution/indexing [--quick]

Per model, records a second of one thread's processor time, the best of three rounds: a plain pass (the floor); the engine's projection to 1,024
numbers; dattri's TRAK cache (per-record gradients, its random projection to 1,024 numbers, its kernel matrix); kronfluence's EK-FAC factors, which
are what it keeps in place of an index (it goes over the records again for every query). The peers come from var/peers and are
given batches of all records, or 64 where that fails for memory's sake.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from attribution.engine import Task, TensorRecords
from attribution.engine.projection import Projector
from benchmarks.attribution.estimators import PEERS, install_peers
from benchmarks.attribution.search import SmallGPT, cnn, mlp, next_token, per_record_loss

WIDTH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two models, one round")
    given = parser.parse_args()
    torch.set_num_threads(1)
    install_peers()
    sys.path.append(str(PEERS))
    g = torch.Generator().manual_seed(0)

    def images(n: int, d: int) -> TensorRecords:
        return TensorRecords(torch.rand(n, d, generator=g), torch.randint(10, (n,), generator=g))

    text = TensorRecords(torch.randint(256, (32, 65), generator=g))
    models: list[tuple[str, Callable[[], nn.Module], Any, TensorRecords]] = [
        ("MLP 64-256-128-10", mlp(64, 256, 128, 10), per_record_loss, images(256, 64)),
        ("MLP 64-1024-512-10", mlp(64, 1024, 512, 10), per_record_loss, images(256, 64)),
        ("CNN 16-32, 28 x 28", cnn, per_record_loss, images(128, 784)),
        ("GPT 128 wide, 2 layers, 64 tokens", lambda: SmallGPT(128, 2, 64), next_token, text),
    ]
    print(f"{'model':36}{'weights':>10}{'floor/s':>10}{'engine':>16}{'dattri TRAK':>16}{'kronfluence':>16}")
    for name, build, loss, records in models[:2] if given.quick else models:
        task = Task(model=build, loss=loss, measurement=loss, train=records, queries=records)
        rounds = 1 if given.quick else 3
        floor = best(plain(task), rounds)
        cells = []
        for work in (engine(task), dattri(task), kronfluence(task)):
            try:
                spent = best(work, rounds)
                cells.append(f"{len(records) / spent:,.0f}/s {floor / spent:.2f}")
            except (RuntimeError, ValueError, NotImplementedError) as error:
                cells.append(f"fails: {type(error).__name__}")
        n_weight = sum(p.numel() for p in build().parameters())
        print(f"{name:36}{n_weight:10,}{len(records) / floor:10,.0f}" + "".join(f"{c:>16}" for c in cells), flush=True)


def best(work: Callable[[], None], rounds: int) -> float:
    """Processor seconds."""
    work()
    spent = []
    for _ in range(rounds):
        begun = time.process_time()
        work()
        spent.append(time.process_time() - begun)
    return min(spent)


def plain(task: Task) -> Callable[[], None]:
    model = task.model()
    batches = torch.arange(task.n_train).split(256)

    def work() -> None:
        for index in batches:
            model.zero_grad()
            task.loss(model, task.train[index]).mean().backward()

    return work


def engine(task: Task) -> Callable[[], None]:
    projector = Projector(task, task.model().state_dict())
    batches = torch.arange(task.n_train).split(projector.rows(of_loss=True))

    def work() -> None:
        for index in batches:
            projector.of_batch(task.train[index], index, of_loss=True)

    return work


def dattri(task: Task) -> Callable[[], None]:
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask

    model = task.model()
    records = task.train[torch.arange(task.n_train)]
    loader = DataLoader(TensorDataset(*records), batch_size=64)

    def loss(params: Any, record: Any) -> Tensor:
        batch = tuple(t if t.ndim == whole.ndim else t[None] for t, whole in zip(record, records, strict=True))
        return task.loss(lambda *x: torch.func.functional_call(model, params, x), batch).mean()  # type: ignore[arg-type]

    def work() -> None:
        attributor = TRAKAttributor(
            task=AttributionTask(loss_func=loss, model=model, checkpoints=[model.state_dict()]),
            correct_probability_func=lambda params, record: torch.exp(-loss(params, record)),
            projector_kwargs={"proj_dim": WIDTH, "proj_max_batch_size": 32, "proj_seed": 0, "device": "cpu"},
            device="cpu",
            regularization=1e-3,
        )
        attributor.cache(loader)

    return work


def kronfluence(task: Task) -> Callable[[], None]:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task as KronfluenceTask

    from benchmarks.attribution.peers import drawn_loss

    class PerRecord(KronfluenceTask):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            batch = tuple(batch)
            return (drawn_loss(model, batch) if sample else task.loss(model, batch)).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    records = TensorDataset(*task.train[torch.arange(task.n_train)])
    judge = PerRecord()
    model = prepare_model(task.model(), judge)

    def work() -> None:
        with tempfile.TemporaryDirectory() as output:
            analyzer = Analyzer(
                "a", model, judge, cpu=True, output_dir=output, disable_tqdm=True, disable_model_save=True
            )
            arguments = FactorArguments(strategy="ekfac")
            analyzer.fit_all_factors("f", records, per_device_batch_size=64, factor_args=arguments)

    return work


if __name__ == "__main__":
    main()
