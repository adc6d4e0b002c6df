"""What does each way of cheating pay, against what the cheat would honestly have been paid?

    ./run bench attribution/attacks [--worlds 5] [--budget 200] [--only NAME ...]

A world is 240 of scikit-learn's digits (8 × 8) with ten owners of 24 records, an MLP (64-32-10, GELU), 80 steps of SGD with
momentum and 360 queries; each world draws owners, queries, initial weights and order anew. Owner 0 cheats, owner 1 is the victim.
The honest and the dishonest disclosure go through `shares` with the same budget and seed. A row is the mean over the worlds, with
the standard error of the gain: raw is the measured share, paid what money follows, λ the reliability. Where the attack adds records,
the honest world is the one without them, unless the row says otherwise.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from attribution.engine import (  # noqa: E402
    Batch,
    Recipe,
    Task,
    TensorRecords,
    epoch_order,
    initial_state_from_seed,
    train,
    without_copies,
)
from attribution.engine.coalitions import Plan  # noqa: E402
from attribution.engine.shares import RoundResult, SharesResult, merge_rounds, plan_shares, run_round  # noqa: E402
from benchmarks.attribution.all import kept_row, source_of  # noqa: E402

N_OWNER, N_EACH, N_QUERY = 10, 24, 360
BATCH, EPOCHS, RATE = 24, 8, 0.05
CHEAT, VICTIM, FRIEND, PUPPET = 0, 1, 2, 10  # owners; from PUPPET on they are the cheat's further accounts
FLOAT = NDArray[np.float32]
INT = NDArray[np.int64]


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))


def per_record_loss(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


@dataclass(frozen=True)
class World:
    """What is disclosed: records, their owners and copies as the platform knows them, and the order of training."""

    seed: int
    images: FLOAT  # (n, 64), 0..1
    labels: INT
    owner: INT
    queries: FLOAT
    query_labels: INT
    copy_of: INT = field(default_factory=lambda: np.empty(0, np.int64))
    order: Tensor | None = None
    order_seed: int = 0
    clip_norm: float | None = None

    @classmethod
    def honest(cls, seed: int) -> "World":
        images, labels = load_digits(return_X_y=True)
        rng = np.random.Generator(np.random.PCG64(seed))
        drawn = rng.permutation(len(labels))
        images, labels = (images[drawn] / 16).astype(np.float32), labels[drawn].astype(np.int64)
        n = N_OWNER * N_EACH
        owner = np.repeat(np.arange(N_OWNER), N_EACH)
        return cls(seed, images[:n], labels[:n], owner, images[n : n + N_QUERY], labels[n : n + N_QUERY])

    def of(self, owner: int) -> INT:
        return np.flatnonzero(self.owner == owner)

    def plus(self, images: FLOAT, labels: INT, *, owner: int = CHEAT, copies_of: INT | None = None) -> "World":
        """With further records; `copies_of` names what the platform knows them to be copies of."""
        n = len(self.owner)
        before = self.copy_of if len(self.copy_of) else np.arange(n)
        new = np.arange(n, n + len(labels)) if copies_of is None else copies_of
        return replace(
            self,
            images=np.concatenate([self.images, images.astype(np.float32)]),
            labels=np.concatenate([self.labels, labels]),
            owner=np.concatenate([self.owner, np.full(len(labels), owner)]),
            copy_of=np.concatenate([before, new]),
        )

    def without(self, records: INT) -> "World":
        keep = np.setdiff1d(np.arange(len(self.owner)), records)
        return replace(self, images=self.images[keep], labels=self.labels[keep], owner=self.owner[keep])

    def task(self) -> Task:
        n = len(self.owner)
        order = (
            self.order if self.order is not None else epoch_order(n, BATCH, EPOCHS, 1000 * self.order_seed + self.seed)
        )
        return Task(
            model=build,
            loss=per_record_loss,
            measurement=per_record_loss,
            train=TensorRecords(torch.from_numpy(self.images), torch.from_numpy(self.labels)),
            queries=TensorRecords(torch.from_numpy(self.queries), torch.from_numpy(self.query_labels)),
            owner=torch.from_numpy(self.owner),
            copy_of=torch.from_numpy(self.copy_of) if len(self.copy_of) else None,
            recipe=Recipe(
                optimizer="sgd",
                options={"momentum": 0.9},
                learning_rate=RATE,
                order=order,
                initial_state=initial_state_from_seed(build, self.seed),
                clip_norm=self.clip_norm,
            ),
        )

    def generator(self) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, 1]))


def noisy(images: FLOAT, rng: np.random.Generator, scale: float) -> FLOAT:
    return np.clip(images + scale * rng.standard_normal(images.shape), 0, 1).astype(np.float32)


def shifted(images: FLOAT) -> FLOAT:
    """One pixel to the right, the left column empty: what a crop gives."""
    moved = np.roll(images.reshape(-1, 8, 8), 1, axis=2)
    moved[:, :, 0] = 0
    return moved.reshape(-1, 64)


# --- the attacks: the honest world -> (what is disclosed honestly, what the cheat discloses)

Pair = tuple[World, World]


def copies_found(world: World) -> Pair:
    v = world.of(VICTIM)
    return world, world.plus(world.images[v], world.labels[v], copies_of=v)


def copies_not_found(world: World) -> Pair:
    v = world.of(VICTIM)
    return world, world.plus(world.images[v], world.labels[v])


def copies_with_noise(world: World) -> Pair:
    v = world.of(VICTIM)
    return world, world.plus(noisy(world.images[v], world.generator(), 0.1), world.labels[v])


def copies_shifted(world: World) -> Pair:
    v = world.of(VICTIM)
    return world, world.plus(shifted(world.images[v]), world.labels[v])


def puppets_found(world: World) -> Pair:
    own = world.of(CHEAT)
    return world, world.plus(world.images[own], world.labels[own], owner=PUPPET, copies_of=own)


def puppets_not_trained_on(world: World) -> Pair:
    """As before, but training skips the slots of copies: the order names each class once."""
    honest, copied = puppets_found(world)
    order = epoch_order(len(copied.owner), BATCH, EPOCHS, world.seed)
    return honest, replace(copied, order=without_copies(order, torch.from_numpy(copied.copy_of)))


def puppets_with_noise(world: World) -> Pair:
    own = world.of(CHEAT)
    return world, world.plus(noisy(world.images[own], world.generator(), 0.1), world.labels[own], owner=PUPPET)


def split(world: World) -> Pair:
    owner = world.owner.copy()
    owner[world.of(CHEAT)] = np.repeat([CHEAT, PUPPET, PUPPET + 1, PUPPET + 2], N_EACH // 4)
    return world, replace(world, owner=owner)


def merge(world: World) -> Pair:
    """The cheat and a friend under one name; both rows are the sum of the two."""
    apart = world.owner.copy()
    apart[world.of(FRIEND)] = PUPPET
    return replace(world, owner=apart), replace(world, owner=np.where(apart == PUPPET, CHEAT, apart))


def segregate(world: World) -> Pair:
    """Honestly, 24 good records and 24 with wrong labels in one account; then the wrong ones in an account of their own."""
    rng = world.generator()
    own = world.of(CHEAT)
    images = noisy(world.images[own], rng, 0.1)
    wrong = (world.labels[own] + rng.integers(1, 10, len(own))) % 10
    return world.plus(images, wrong), world.plus(images, wrong, owner=PUPPET)


def chunk(world: World) -> Pair:
    """Each of the cheat's images as four records, one quarter of it each."""
    own = world.of(CHEAT)
    square = world.images[own].reshape(-1, 2, 4, 2, 4)
    parts = []
    for a in range(2):
        for b in range(2):
            part = np.zeros_like(square)
            part[:, a, :, b] = square[:, a, :, b]
            parts.append(part.reshape(-1, 64))
    return world, world.without(own).plus(np.concatenate(parts), np.tile(world.labels[own], 4))


def stuff(world: World) -> Pair:
    """48 nearly equal versions of the four of their records that the model finds easiest."""
    own = world.of(CHEAT)
    model = build()
    model.load_state_dict(train(world.task()).model_state())
    with torch.no_grad():
        losses = per_record_loss(model, (torch.from_numpy(world.images[own]), torch.from_numpy(world.labels[own])))
    easy = np.repeat(own[losses.numpy().argsort()[:4]], 12)
    return world, world.plus(noisy(world.images[easy], world.generator(), 0.02), world.labels[easy])


def poison(world: World) -> Pair:
    """The victim's images again with wrong labels, so that the victim's own contradict the rest."""
    rng, v = world.generator(), world.of(VICTIM)
    return world, world.plus(noisy(world.images[v], rng, 0.02), (world.labels[v] + rng.integers(1, 10, len(v))) % 10)


def huge(world: World) -> Pair:
    own = world.of(CHEAT)
    images = world.images.copy()
    images[own] *= 5
    return world, replace(world, images=images)


def huge_clipped(world: World) -> Pair:
    """The same where the recipe clips the gradient of a batch, for the honest and the dishonest."""
    clipped = replace(world, clip_norm=0.5)
    return clipped, huge(clipped)[1]


def match_queries(world: World) -> Pair:
    """The cheat knew 24 queries, and brings them with their true labels in place of their own records."""
    own = world.of(CHEAT)
    images, labels = world.images.copy(), world.labels.copy()
    images[own], labels[own] = world.queries[: len(own)], world.query_labels[: len(own)]
    return world, replace(world, images=images, labels=labels)


def near_queries(world: World) -> Pair:
    """The same with five copies of each, a little noise on every one."""
    honest, same = match_queries(world)
    own = same.of(CHEAT)
    again = np.repeat(own, 4)
    return honest, same.plus(noisy(same.images[again], world.generator(), 0.05), same.labels[again])


def junk(world: World) -> Pair:
    """72 images of noise with labels at random: by count alone they would earn three times an honest owner's share."""
    rng = world.generator()
    return world, world.plus(rng.random((72, 64)).astype(np.float32), rng.integers(0, 10, 72))


def scheduled(world: World, *, first: bool) -> World:
    """In every epoch the favoured owner's records come first, or last; else the order is the rule's."""
    order = epoch_order(len(world.owner), BATCH, EPOCHS, world.seed).reshape(EPOCHS, -1)
    favoured = torch.from_numpy(world.owner == CHEAT)[order]
    moved = order.gather(1, torch.argsort(favoured.int(), dim=1, descending=first, stable=True))
    return replace(world, order=moved.reshape(-1, BATCH))


def early(world: World) -> Pair:
    return world, scheduled(world, first=True)


def late(world: World) -> Pair:
    return world, scheduled(world, first=False)


def only_early(world: World) -> Pair:
    """The favoured owner's records fill the first steps of the training, all epochs of them, and never come again."""
    order = epoch_order(len(world.owner), BATCH, EPOCHS, world.seed).flatten()
    favoured = torch.from_numpy(world.owner == CHEAT)[order]
    moved = torch.cat([order[favoured], order[~favoured]])
    return world, replace(world, order=moved.reshape(-1, BATCH))


def grind(world: World) -> Pair:
    """The order follows the rule, but its seed is the one of eight that pays the favoured owner best, by a first measurement."""
    seeds = [replace(world, order_seed=s) for s in range(8)]
    paid = [measured(candidate, 100, 1000 + world.seed).raw for candidate in seeds]
    return world, seeds[int(np.argmax(paid))]


ATTACKS: dict[str, tuple[Callable[[World], Pair], str]] = {
    "split": (split, "one account into four"),
    "merge": (merge, "two accounts into one"),
    "copies-found": (copies_found, "exact copies of another's records, found"),
    "puppets-found": (puppets_found, "exact copies of one's own in a second account, found"),
    "puppets-skipped": (puppets_not_trained_on, "the same, and not trained on"),
    "copies": (copies_not_found, "exact copies of another's records, not found"),
    "copies-noise": (copies_with_noise, "the same with noise"),
    "copies-shift": (copies_shifted, "the same, cropped and shifted"),
    "puppets-noise": (puppets_with_noise, "noisy copies of one's own in a second account"),
    "segregate": (segregate, "24 wrong labels moved to a second account"),
    "chunk": (chunk, "each record cut into four"),
    "stuff": (stuff, "48 easy near-duplicates added"),
    "poison": (poison, "the victim's records with wrong labels added"),
    "huge": (huge, "inputs scaled by five"),
    "huge-clipped": (huge_clipped, "the same, where the recipe clips gradients"),
    "queries": (match_queries, "24 known queries in place of one's own"),
    "queries-many": (near_queries, "the same, five noisy copies of each"),
    "junk": (junk, "72 records of noise added"),
    "early": (early, "first in every epoch"),
    "late": (late, "last in every epoch"),
    "only-early": (only_early, "all their epochs at the start, none later"),
    "grind": (grind, "the best of eight seeds of the order"),
}


@dataclass(frozen=True)
class Outcome:
    raw: float
    paid: float
    count: float
    victim: float  # paid
    reliability: float


_MEASURED: dict[tuple[str, float, int], tuple[Plan, list[RoundResult]]] = {}


def measured(world: World, budget: float, seed: int) -> Outcome:
    """Who owns a record changes no measurement, so disclosures that differ in owners alone share their rounds.

    An outcome is kept in var/bench/all until the engine changes, so an interrupted command goes on.
    """
    task = world.task()
    key = task.digest, budget, seed

    def measure() -> dict[str, float]:
        if key not in _MEASURED:
            plan = plan_shares(task, budget=budget, seed=seed)
            _MEASURED[key] = plan, [run_round(task, plan, r) for r in range(len(plan.rounds))]
        return asdict(outcome(merge_rounds(task, *_MEASURED[key])))

    owners = hashlib.sha256(world.owner.tobytes()).hexdigest()
    return Outcome(**kept_row(("attack", *key, owners, source_of("attribution/engine")), measure))


def outcome(result: SharesResult) -> Outcome:
    cheats = [o for o in result.owners if o.owner == CHEAT or o.owner >= PUPPET]
    victim = next(o for o in result.owners if o.owner == VICTIM)
    return Outcome(
        raw=sum(o.share for o in cheats),
        paid=sum(o.paid_share for o in cheats),
        count=sum(o.count_share for o in cheats),
        victim=victim.paid_share,
        reliability=result.reliability,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=200)
    parser.add_argument("--only", nargs="+", choices=sorted(ATTACKS), metavar="NAME", default=list(ATTACKS))
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    started = time.perf_counter()
    print("cheat's share in %, mean over worlds; gain in points of the pool with its standard error")
    print(
        f"{'attack':52} {'count':>12} {'raw':>14} {'paid':>14} {'gain, paid':>14} {'gain, raw':>14} {'victim':>12} {'λ':>12}",
        flush=True,
    )
    for name in given.only:
        attack, words = ATTACKS[name]
        before, after = [], []
        for seed in range(given.worlds):
            world = World.honest(seed)
            honest, disclosed = attack(world)
            before.append(measured(honest, given.budget, seed))
            after.append(measured(disclosed, given.budget, seed))

        def pair(of: str, before: list[Outcome] = before, after: list[Outcome] = after) -> str:
            a, b = (100 * np.mean([getattr(o, of) for o in side]) for side in (before, after))
            return f"{a:.1f} → {b:.1f}"

        def gain(of: str, before: list[Outcome] = before, after: list[Outcome] = after) -> str:
            gains = 100 * np.array([getattr(b, of) - getattr(a, of) for a, b in zip(before, after, strict=True)])
            error = gains.std(ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else float("nan")
            return f"{gains.mean():+.1f} ± {error:.1f}"

        trust = [np.mean([o.reliability for o in side]) for side in (before, after)]
        print(
            f"{words:52} {pair('count'):>12} {pair('raw'):>14} {pair('paid'):>14} {gain('paid'):>14} {gain('raw'):>14} "
            f"{pair('victim'):>12} {trust[0]:5.2f} → {trust[1]:4.2f}",
            flush=True,
        )
    print(f"{given.worlds} worlds, budget {given.budget:g} run equivalents, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
