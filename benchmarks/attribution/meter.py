"""What does the in-run meter cost, and what is its log worth?

    ./run bench attribution/meter [--repetitions 5] [--every 64] [--threads 1] [--only cost|step|digits]

cost    A metered and a plain loop take turns, step by step, in one process; CPU time, so that other processes' turns do not
        count. A repetition is `every` steps, of which one is measured, as in any long run after its dense start; the whole-run
        column adds the dense start over the given number of steps. Queries: batch / 16.
step    One AdamW step after n others, every record of its batch left out of that one step in turn: the correlation of what that did
        with the meter's influence, with the plain preconditioner 1/(√v̂ + ε), and with the gradient product of SGD.
digits  The digits task's recipe (SGD with momentum; and AdamW): totals of the log against the exact metagradient of the whole run
        (Spearman over records), against retraining on random subsets (LDS of the mean measurement: Spearman over subsets), and as a
        division against `shares` (TV: the part of the pool that goes elsewhere).
"""

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "digits")]

from task import make_task  # noqa: E402

from attribution.engine import Meter, Task, TensorRecords, metagradients, replay_values  # noqa: E402
from attribution.engine.meter import EVERY, _strata  # noqa: E402
from attribution.engine.meter_log import totals  # noqa: E402
from attribution.engine.shares import merge_rounds, plan_shares, run_round  # noqa: E402

WHOLE_RUNS = (1_000, 10_000)
AFTER_STEPS = (1, 3, 10, 30, 100)
SUBSETS = 100
BUDGET = 200  # run equivalents, for the shares


class Block(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        B, T, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, d)
        x = x + self.out(mixed)
        return x + self.down(gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, vocabulary: int = 256, context: int = 64, d: int = 128, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, d), nn.Embedding(context, d)
        self.blocks = nn.Sequential(*[Block(d, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def per_record(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def per_text(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    ids = batch[0]
    return cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
}
COSTS = {  # the numbers do not matter to the cost: they are random
    "MLP 784-512-512-10, batch 128": (mlp, per_record, (torch.randn(1024, 784), torch.randint(10, (1024,))), 128),
    "transformer 2 × 128, 64 tokens, batch 32": (Transformer, per_text, (torch.randint(256, (512, 65)),), 32),
}


def cost(repetitions: int, every: int, folder: Path) -> None:
    print(
        f"CPU time of the metered loop over the plain one's, every = {every}, {repetitions} repetitions of {every} steps"
    )
    print(
        f"{'':41}{'':14}{'plain step':>11}{'measured':>10}{'passed':>8}{'ratio, median (least, most)':>30}"
        + "".join(f"{f'in {n:,} steps':>17}" for n in WHOLE_RUNS)
    )
    for name, (build, loss, tensors, batch) in COSTS.items():
        for optimizer, make in OPTIMIZERS.items():
            n = len(tensors[0]) // 2
            data = TensorRecords(*tensors)
            queries = TensorRecords(*(t[n : n + batch // 16] for t in tensors))
            torch.manual_seed(0)
            plain = build()
            metered = copy.deepcopy(plain)
            optims = make(plain.parameters()), make(metered.parameters())
            log = folder / f"{len(list(folder.iterdir()))}.meter"
            meter = Meter(metered, optims[1], measurement=loss, queries=queries, n_train=n, log=log, every=every)

            def plain_step(index: Tensor) -> None:
                loss(plain, data[index]).mean().backward()  # noqa: B023 (called within its iteration)
                optims[0].step()  # noqa: B023
                optims[0].zero_grad()  # noqa: B023

            def metered_step(index: Tensor) -> None:
                with meter.batch(index):  # noqa: B023
                    loss(metered, data[index]).mean().backward()  # noqa: B023
                optims[1].step()  # noqa: B023
                optims[1].zero_grad()  # noqa: B023

            def turn(at: int) -> tuple[float, float, bool]:
                """CPU seconds of both; they take turns at going first, for the second finds the batch in the cache."""
                index, before = torch.randperm(n)[:batch], meter.last  # noqa: B023
                seconds = {}
                for run in (plain_step, metered_step) if at % 2 else (metered_step, plain_step):
                    began = time.process_time()
                    run(index)
                    seconds[run] = time.process_time() - began
                return seconds[plain_step], seconds[metered_step], meter.last is not before  # noqa: B023

            for at in range(4):
                turn(at)
            meter._strata = iter(
                [(at, every) for at in range(4, 4 + every * repetitions, every)]
            )  # past the dense start
            meter._begin_stratum(next(meter._strata))
            ratios, steps = [], []
            for _ in range(repetitions):
                found = [turn(at) for at in range(every)]
                ratios.append(sum(m for _, m, _ in found) / sum(p for p, _, _ in found))
                steps += found
            assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), metered.parameters(), strict=True))
            meter.close()
            base = float(np.median([p for p, _, _ in steps]))
            measured = float(np.median([m for _, m, on in steps if on])) / base
            passed = float(np.median([m for _, m, on in steps if not on])) / base
            whole = []
            for n_step in WHOLE_RUNS:
                n_measured = len(strata_of(n_step, every))
                whole.append((n_measured * measured + (n_step - n_measured) * passed) / n_step)
            print(
                f"{name:41}{optimizer:14}{1e3 * base:8.1f} ms{measured:9.2f}×{passed:7.3f}×"
                f"{f'{np.median(ratios):.3f} ({min(ratios):.3f}, {max(ratios):.3f})':>30}"
                + "".join(f"{ratio:>17.3f}" for ratio in whole),
                flush=True,
            )
    print("The trained weights of both loops were equal to the bit in each of them.")


def strata_of(n_step: int, every: int) -> list[tuple[int, int]]:
    """The strata of a run of so many steps."""
    found = []
    for span in _strata(every):
        if span[0] >= n_step:
            return found
        found.append(span)
    return found


def step(folder: Path) -> None:
    print(
        "\nCorrelation over the 32 records of one AdamW step with what leaving each out of it did (MLP 20-30-3, float64)"
    )
    print(f"{'after steps':>12}{'the meter':>12}{'1/(√v̂ + ε)':>13}{'SGD proxy':>11}")
    for n_before in AFTER_STEPS:
        torch.manual_seed(0)
        inputs = torch.randn(400, 20).double()
        labels = (inputs[:, :3] + 0.5 * torch.randn(400, 3).double()).argmax(1)
        data, queries = TensorRecords(inputs, labels), (inputs[320:], labels[320:])
        model = nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.LayerNorm(30), nn.Linear(30, 3)).double()
        optim = torch.optim.AdamW(model.parameters())
        log = folder / f"step-{n_before}.meter"
        meter = Meter(
            model, optim, measurement=per_record, queries=TensorRecords(*queries), n_train=320, log=log, every=1
        )
        for at in range(n_before + 1):
            index = torch.randperm(320)[:32]
            if at == n_before:
                before = copy.deepcopy((model.state_dict(), optim.state_dict()))
            with meter.batch(index):
                per_record(model, data[index]).mean().backward()
            optim.step()
            optim.zero_grad()
        meter.close()
        assert meter.last is not None
        with_all = float(per_record(model, queries).mean().detach())
        scores: dict[str, list[float]] = {"effect": [], "fixed": [], "sgd": []}
        for slot in range(32):
            model.load_state_dict(before[0])
            optim.load_state_dict(copy.deepcopy(before[1]))
            asked = torch.autograd.grad(per_record(model, queries).mean(), list(model.parameters()))
            mine = torch.autograd.grad(per_record(model, data[index[slot : slot + 1]])[0], list(model.parameters()))
            batch = torch.autograd.grad(per_record(model, data[index]).mean(), list(model.parameters()))
            scores["sgd"].append(sum(float((a * b).sum()) for a, b in zip(asked, mine, strict=True)))
            fixed = 0.0
            for p, a, b, G in zip(model.parameters(), asked, mine, batch, strict=True):
                t, v = int(optim.state[p]["step"]) + 1, optim.state[p]["exp_avg_sq"]
                fixed += float((a * b / (((0.999 * v + 0.001 * G * G) / (1 - 0.999**t)).sqrt() + 1e-8)).sum())
            scores["fixed"].append(fixed)
            weights = torch.ones(32).double()
            weights[slot] = 0
            optim.zero_grad()
            (weights * per_record(model, data[index])).mean().backward()
            optim.step()
            optim.zero_grad()
            scores["effect"].append(float(per_record(model, queries).mean().detach()) - with_all)
        against = [
            np.corrcoef(s, scores["effect"])[0, 1] for s in (meter.last.influence, scores["fixed"], scores["sgd"])
        ]
        print(f"{n_before:12d}{against[0]:12.3f}{against[1]:13.3f}{against[2]:11.3f}", flush=True)


def metered_run(task: Task, log: Path, every: int, seed: int = 0) -> float:
    """The recipe in a plain loop with the meter on; seconds of CPU time."""
    recipe = task.require_recipe()
    model = task.model()
    model.load_state_dict(dict(recipe.initial_state))
    options, rates = recipe.options_for("")
    make = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[recipe.optimizer]
    optim = make(model.parameters(), lr=rates[0], **options)
    began = time.process_time()
    with Meter(
        model,
        optim,
        measurement=task.measurement,
        queries=task.queries,
        n_train=task.n_train,
        log=log,
        every=every,
        seed=seed,
    ) as meter:
        for row in recipe.order:
            index = row[row >= 0]
            with meter.batch(index):
                (task.loss(model, task.train[index]).sum() / recipe.batch).backward()
            optim.step()
            optim.zero_grad()
    return time.process_time() - began


def digits(folder: Path) -> None:
    plain = make_task()
    recipe = plain.require_recipe()
    adamw = replace(plain, recipe=replace(recipe, optimizer="adamw", options={}, learning_rate=2e-3))
    for name, task in (("SGD, momentum 0.9", plain), ("AdamW", adamw)):
        generator = torch.Generator().manual_seed(1)
        _, gradient = metagradients(task, torch.ones(1, task.n_train))
        truth = gradient[0, 0].double()
        masks = {
            f"{100 * dropped:.0f} %": (torch.rand(SUBSETS, task.n_train, generator=generator) >= dropped).float()
            for dropped in (0.5, 0.05)
        }
        values = {label: replay_values(task, mask).double() for label, mask in masks.items()}
        f_all, f_none = replay_values(task, torch.tensor([[1.0], [0.0]]).expand(2, task.n_train)).tolist()
        plan = plan_shares(task, budget=BUDGET)
        shares = merge_rounds(task, plan, [run_round(task, plan, number) for number in range(len(plan.rounds))])
        partitions = {
            "holders": (task.owners, shares.owners),
            "labellers": (task.groups["labeller"], shares.groups["labeller"]),
        }
        print(f"\ndigits, {name}: {recipe.n_step} steps; f(all) − f(none) = {f_all - f_none:.3f}")
        print(
            f"{'':42}{'':8}{'':10}{'LDS, dropped':>16}{'TV of shares with the measured ones':>38}\n{'':42}{'sum':>8}{'Spearman':>10}"
            + "".join(f"{label:>8}" for label in masks)
            + "".join(f"{label:>19}" for label in partitions)
        )
        by_count = torch.zeros(task.n_train).double()
        by_count[task.representative.unique()] = 1.0
        lines = {"by count": by_count, "metagradient of the whole run": truth}
        for every in (1, 8, 32):
            log = folder / f"{name}-{every}.meter"
            metered_run(task, log, every)
            lines[f"meter, every {every}, momentum followed"] = totals(log)
            if every == 1:
                lines["meter, every 1, each step's own effect"] = totals(log, carry=False)
        for label, found in lines.items():
            found = (
                torch.zeros(task.n_train).double().index_add_(0, task.representative, found)
            )  # copies are one player
            cells = [f"{found.sum():8.3f}", f"{spearmanr(found, truth).statistic:10.3f}"]
            cells += [f"{spearmanr(masks[k].double() @ found, values[k]).statistic:8.3f}" for k in masks]
            for ids, members in partitions.values():
                sums = torch.zeros(int(ids.max()) + 1).double().index_add_(0, ids, found)
                raw = (sums / sums.sum()).tolist()
                cells.append(f"{sum(abs(raw[m.owner] - m.share) for m in members) / 2:19.3f}")
            print(f"{label:42}" + "".join(cells), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--every", type=int, default=EVERY)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["cost", "step", "digits"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory(prefix="residual-meter-") as name:
        folder = Path(name)
        if given.only in (None, "cost"):
            cost(given.repetitions, given.every, folder)
        if given.only in (None, "step"):
            step(folder)
        if given.only in (None, "digits"):
            digits(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
