"""Scores by kronfluence and dattri for a world, started by estimators.py and all.py with the peers' folder on PYTHONPATH.

    python -m benchmarks.attribution.peers MODULE:WORLD[:SEED] FOLDER CHECKPOINT...

MODULE is `worlds` or `estimators`. Reads the checkpoints, writes FOLDER/scores.safetensors, (n_train, n_query) for each method and
setting, and FOLDER/report.json: which belong to which method, and the wall seconds, processor seconds and FLOPs that one setting
took (factors included). What a method cannot do at all is printed as JSON, with its own words.

Settings: a sweep of dampings for each; kronfluence with its EK-FAC and K-FAC factors, dattri with TRAK (final and all checkpoints), conjugate
gradient, the explicit Hessian (up to MOST_EXPLICIT parameters) and TracIn. Layers that a peer does not treat (kronfluence: embeddings
and layer norms) are left out of its scores by the peer itself.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from attribution.engine import Batch
from attribution.engine import Task as EngineTask
from benchmarks.attribution import estimators, worlds

MOST_EXPLICIT = 3000
DAMPINGS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


def task_of(name: str) -> EngineTask:
    module, world, *seed = name.split(":")
    if module == "estimators":
        return estimators.make_world(world, int(seed[0]) if seed else 0)
    return worlds.make_task(worlds.WORLDS[world], seed=int(seed[0]) if seed else 0)


def main(world: str, folder: Path, checkpoints: list[Path]) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    task = task_of(world)
    train = TensorDataset(*task.train[torch.arange(task.n_train)])
    queries = TensorDataset(*task.queries[torch.arange(task.n_query)])
    states = [
        {name.removeprefix("model."): t for name, t in load_file(path).items() if name.startswith("model.")}
        for path in checkpoints
    ]
    scores: dict[str, Tensor] = {}
    report: dict[str, Any] = {}
    failed: dict[str, str] = {}

    def keep(
        method: str,
        of: Callable[[float], Tensor],
        dampings: tuple[float, ...],
        factors: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ) -> None:
        """`factors`: wall and processor seconds and FLOPs that all dampings share."""
        keys, spent = [], []
        for damping in dampings:
            try:
                found, cost = measured(lambda d=damping: of(d))  # type: ignore[misc]
            except (RuntimeError, ValueError, NotImplementedError) as error:
                failed[method] = f"{type(error).__name__}: {error}"
                continue
            spent.append(cost)
            keys.append(f"{method}:{damping}")
            scores[keys[-1]] = found.detach().float().nan_to_num().contiguous()
        if keys:
            middle = sorted(spent)[len(spent) // 2]
            costs = [x + y for x, y in zip(factors, middle, strict=True)]
            report[method] = {"scores": keys, "seconds": costs[0], "cpu": costs[1], "flops": costs[2]}

    for strategy in ("ekfac", "kfac"):
        try:
            kronfluence(task, states[-1], train, queries, keep, strategy)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            failed[f"kronfluence {strategy}"] = f"{type(error).__name__}: {error}"
    dattri(task, states, train, queries, keep)
    save_file(scores, folder / "scores.safetensors")
    (folder / "report.json").write_text(json.dumps(report))
    print(json.dumps({method: why for method, why in failed.items() if method not in report}))


def measured(work: Callable[[], Any]) -> tuple[Any, tuple[float, float, float]]:
    """What it gives; wall seconds, processor seconds, FLOPs."""
    wall, cpu = time.perf_counter(), time.process_time()
    with FlopCounterMode(display=False) as counter:
        found = work()
    return found, (time.perf_counter() - wall, time.process_time() - cpu, float(counter.get_total_flops()))


def drawn_loss(model: nn.Module, batch: Batch) -> Tensor:
    """(B,): the loss for labels, or next bytes, that the model itself draws; what a Fisher matrix is made of."""
    is_text = len(batch) == 1
    logits = model(batch[0][:, :-1]).transpose(1, 2) if is_text else model(batch[0])
    with torch.no_grad():
        chances = logits.softmax(1).movedim(1, -1)
        labels = torch.multinomial(chances.reshape(-1, chances.shape[-1]), 1).reshape(chances.shape[:-1])
    losses = cross_entropy(logits, labels, reduction="none")
    return losses.mean(1) if is_text else losses


def kronfluence(
    engine_task: EngineTask,
    state: dict[str, Tensor],
    train: TensorDataset,
    queries: TensorDataset,
    keep: Any,
    strategy: str,
) -> None:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class PerRecord(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            batch = tuple(batch)
            return (drawn_loss(model, batch) if sample else engine_task.loss(model, batch)).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return engine_task.measurement(model, tuple(batch)).sum()

    task, model = PerRecord(), engine_task.model()
    model.load_state_dict(state)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as output:
        analyzer = Analyzer(
            analysis_name="a",
            model=prepare_model(model, task),
            task=task,
            cpu=True,
            output_dir=output,
            disable_tqdm=True,
            disable_model_save=True,
        )
        arguments = FactorArguments(strategy=strategy)
        _, factors = measured(
            lambda: analyzer.fit_all_factors("f", train, per_device_batch_size=len(train), factor_args=arguments)
        )

        def scores(damping: float) -> Tensor:
            analyzer.compute_pairwise_scores(
                "s",
                "f",
                queries,
                train,
                per_device_query_batch_size=len(queries),
                per_device_train_batch_size=len(train),
                score_args=ScoreArguments(damping_factor=damping),
                overwrite_output_dir=True,
            )
            return analyzer.load_pairwise_scores("s")["all_modules"].T

        keep(f"kronfluence {strategy.upper()}", scores, DAMPINGS, factors)


def dattri(
    engine_task: EngineTask,
    states: list[dict[str, Tensor]],
    train: TensorDataset,
    queries: TensorDataset,
    keep: Any,
) -> None:
    from dattri.algorithm.influence_function import IFAttributorCG, IFAttributorExplicit
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask

    model = engine_task.model()
    model.load_state_dict(states[-1])
    model.eval()
    shapes = [tensor.ndim for tensor in train.tensors]
    n_parameter = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def loss(params: Any, record: Any) -> Tensor:
        """The mean over a batch, or of one record; dattri asks for both."""
        batch = tuple(t if t.ndim == ndim else t[None] for t, ndim in zip(record, shapes, strict=True))
        return engine_task.loss(lambda *x: torch.func.functional_call(model, params, x), batch).mean()  # type: ignore[arg-type]

    def probability(params: Any, record: Any) -> Tensor:
        return torch.exp(-loss(params, record))

    def margin(params: Any, record: Any) -> Tensor:
        p = probability(params, record)
        return torch.log(p) - torch.log1p(-p.clamp_max(1 - 1e-6))

    whole = DataLoader(train, batch_size=len(train)), DataLoader(queries, batch_size=len(queries))

    def trak(which: list[dict[str, Tensor]]) -> Callable[[float], Tensor]:
        def scores(damping: float) -> Tensor:
            task = AttributionTask(loss_func=margin, model=model, checkpoints=which)
            projector = {"proj_dim": 512, "proj_max_batch_size": 32, "proj_seed": 0, "device": "cpu"}
            attributor = TRAKAttributor(
                task=task,
                correct_probability_func=probability,
                projector_kwargs=projector,
                device="cpu",
                regularization=damping,
            )
            attributor.cache(whole[0])
            # TRAK's scores are of the margin; a higher margin is a lower loss.
            return attributor.attribute(whole[1])

        return scores

    def influence(kind: Any, **more: Any) -> Callable[[float], Tensor]:
        def scores(damping: float) -> Tensor:
            task = AttributionTask(loss_func=loss, model=model, checkpoints=states[-1:])
            attributor = kind(task=task, device="cpu", regularization=damping, **more)
            attributor.cache(whole[0])
            return attributor.attribute(whole[0], whole[1])

        return scores

    keep("dattri TRAK, final", trak(states[-1:]), DAMPINGS)
    keep("dattri TRAK, 10 checkpoints", trak(states), DAMPINGS)
    if n_parameter <= MOST_EXPLICIT:
        keep("dattri explicit Hessian", influence(IFAttributorExplicit), DAMPINGS[2:])
    keep("dattri conjugate gradient", influence(IFAttributorCG, max_iter=30), DAMPINGS[2:7])

    def tracin(damping: float) -> Tensor:
        task = AttributionTask(loss_func=loss, model=model, checkpoints=states)
        rates = torch.ones(len(states))
        attributor = TracInAttributor(task=task, weight_list=rates, normalized_grad=False, device="cpu")
        return attributor.attribute(*whole)

    keep("dattri TracIn, 10 checkpoints", tracin, (0.0,))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [Path(path) for path in sys.argv[3:]])
