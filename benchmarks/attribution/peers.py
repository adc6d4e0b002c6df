"""Scores by kronfluence and dattri for a world of estimators.py, which starts this with the peers' folder on PYTHONPATH.

    python -m benchmarks.attribution.peers WORLD FOLDER CHECKPOINT...

Reads FOLDER/records.safetensors and the checkpoints, writes FOLDER/scores.safetensors, (n_train, n_query) for each method and
damping, and FOLDER/report.json: which belong to which method, and the seconds that one damping took (factors included).
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

from benchmarks.attribution.estimators import WORLDS

DAMPINGS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


def main(world: str, folder: Path, checkpoints: list[Path]) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    build = WORLDS[world][0]
    data = load_file(folder / "records.safetensors")
    train = TensorDataset(data["images"], data["labels"])
    queries = TensorDataset(data["query_images"], data["query_labels"])
    states = [
        {name.removeprefix("model."): t for name, t in load_file(path).items() if name.startswith("model.")}
        for path in checkpoints
    ]
    scores: dict[str, Tensor] = {}
    report: dict[str, Any] = {}

    def keep(method: str, of: Callable[[float], Tensor], dampings: tuple[float, ...], factors: float = 0.0) -> None:
        keys, seconds = [], []
        for damping in dampings:
            started = time.perf_counter()
            try:
                found = of(damping)
            except (RuntimeError, ValueError) as error:
                print(f"{method} at {damping}: {error}", file=sys.stderr)
                continue
            seconds.append(time.perf_counter() - started)
            keys.append(f"{method}:{damping}")
            scores[keys[-1]] = found.detach().float().nan_to_num().contiguous()
        if keys:
            report[method] = {"scores": keys, "seconds": factors + sorted(seconds)[len(seconds) // 2]}

    kronfluence(build, states[-1], train, queries, keep)
    dattri(build, states, train, queries, keep)
    save_file(scores, folder / "scores.safetensors")
    (folder / "report.json").write_text(json.dumps(report))


def kronfluence(
    build: Callable[[], nn.Module], state: dict[str, Tensor], train: TensorDataset, queries: TensorDataset, keep: Any
) -> None:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            images, labels = batch
            logits = model(images)
            if sample:
                with torch.no_grad():
                    labels = torch.multinomial(logits.softmax(-1), 1).flatten()
            return cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    task, model = Classification(), build()
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
        started = time.perf_counter()
        arguments = FactorArguments(strategy="ekfac")
        analyzer.fit_all_factors("f", train, per_device_batch_size=len(train), factor_args=arguments)
        factors = time.perf_counter() - started

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

        keep("kronfluence EK-FAC", scores, DAMPINGS, factors)


def dattri(
    build: Callable[[], nn.Module],
    states: list[dict[str, Tensor]],
    train: TensorDataset,
    queries: TensorDataset,
    keep: Any,
) -> None:
    from dattri.algorithm.influence_function import IFAttributorCG, IFAttributorExplicit
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask

    model = build()
    model.load_state_dict(states[-1])
    model.eval()

    def loss(params: Any, record: Any) -> Tensor:
        """The mean over a batch, or of one record; dattri asks for both."""
        image, label = record
        if image.ndim == 1:
            image, label = image[None], label[None]
        return cross_entropy(torch.func.functional_call(model, params, image), label.reshape(len(image)))

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
    keep("dattri explicit Hessian", influence(IFAttributorExplicit), DAMPINGS[2:])
    keep("dattri conjugate gradient", influence(IFAttributorCG, max_iter=30), DAMPINGS[2:7])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [Path(path) for path in sys.argv[3:]])
