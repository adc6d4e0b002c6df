"""What the demo must show, looked up again in the stored rows and printed with its figures."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from django.db.models import Sum

from attribution.artifacts import local_path
from attribution.documents import TrainingRecords, build_task, checkpoint_paths, read_records
from attribution.engine import Task, TensorRecords, epoch_order
from attribution.engine.architectures import load_state
from attribution.engine.shares import RoundResult, SharesResult, merge_rounds
from attribution.engine.training import save_state
from attribution.engine.verification import VerificationReport, verify
from attribution.models import PPQ, AttributionResult, AttributionRun, Share, Verification
from attribution.services.runs import read_plan
from attribution.services.shares import to_ppq
from marketplace import clock
from marketplace.models import Contribution, Disclosure, Party, RecordCopy
from marketplace.money import Money
from payouts import chart, ledger
from payouts.allocation import allocate
from payouts.models import Division, DivisionLine, Payout
from payouts.services.proofs import check_books
from payouts.services.reconciliation import reconcile
from portal.demo import cast
from portal.demo.trainer import MODEL_SLUG

N_PARTS = 5
SPLIT = cast.HOLDERS[2]


@dataclass(frozen=True)
class Check:
    """One claim, whether it holds, and the figures it was judged by."""

    claim: str
    holds: bool
    figures: str


def all_checks() -> Iterator[Check]:
    yield _divisions()
    yield _books()
    yield from _cash()
    yield _payouts()
    yield _copies()
    yield _careless_labeller()
    yield _splitting()
    yield from _lies()


def _divisions() -> Check:
    wrong = [
        division.key
        for division in Division.objects.annotate(sum=Sum("lines__amount_micros"))
        if division.sum != division.amount_micros
    ]
    n_line = DivisionLine.objects.count()
    total = Money(Division.objects.aggregate(sum=Sum("amount_micros"))["sum"], "USD")
    figures = f"{Division.objects.count()} divisions, {n_line} lines, {total}" + (f"; wrong: {wrong}" if wrong else "")
    return Check("Every pool equals the sum of its lines, to the micro", not wrong and n_line > 0, figures)


def _books() -> Check:
    books = check_books()
    counted = ", ".join(f"{count:,} {name}" for name, count in books.checked.items())
    return Check(
        "Every entry balances; check_ledger finds nothing",
        not books.findings,
        "; ".join(map(str, books.findings)) or counted,
    )


def _cash() -> Iterator[Check]:
    found = reconcile()
    for cash in found.cash:
        yield Check(
            "The ledger's cash agrees with Stripe's balance, fees included",
            cash.agrees,
            f"pending {cash.ledger_pending} and {cash.stripe_pending}, available {cash.ledger_available} and "
            f"{cash.stripe_available}",
        )
    yield Check(
        "Each of Stripe's balance transactions is in the ledger, and the other way round",
        found.agrees,
        "; ".join(map(str, found.differences)) or f"{found.n_transactions} transactions compared",
    )


def _payouts() -> Check:
    """What each payee's division lines owe by now, against what their bank has and what the ledger still keeps for them."""
    lines = DivisionLine.objects.order_by().values_list("party", "division__currency")
    earned = {(party, currency): micros for party, currency, micros in lines.annotate(sum=Sum("amount_micros"))}
    matured = lines.filter(due_at__lte=clock.now()).annotate(sum=Sum("amount_micros"))
    due = {(party, currency): Money(micros, currency).floor_to_minor().micros for party, currency, micros in matured}
    payouts = Payout.objects.order_by().values_list("party", "currency")
    paid = {
        (party, currency): micros
        for party, currency, micros in payouts.filter(status=Payout.Status.PAID).annotate(sum=Sum("amount_micros"))
    }
    wrong = [
        f"{Party.objects.get(pk=party).name}: due {Money(due.get((party, currency), 0), currency)}, "
        f"in the bank {Money(paid.get((party, currency), 0), currency)}"
        for party, currency in sorted({*earned, *paid})
        if due.get((party, currency), 0) != paid.get((party, currency), 0)
        or -ledger.balance(chart.payable(party, currency))
        != earned.get((party, currency), 0) - paid.get((party, currency), 0)
    ]
    twice = payouts.count() - payouts.distinct().count()
    n_due = sum(micros > 0 for micros in due.values())
    total = Money(sum(paid.values()), "USD")
    return Check(
        "Everyone due was paid once, and their bank has it",
        not wrong and twice == 0 and n_due > 0,
        "; ".join(wrong) or f"{len(paid)} of {n_due} payees, {total}",
    )


def _copies() -> Check:
    earned = _earned(cast.COPIER)
    first = DivisionLine.objects.filter(party__name=cast.COPIED).aggregate(sum=Sum("amount_micros"))["sum"] or 0
    n_copy = RecordCopy.objects.filter(payee__name=cast.COPIED).count()
    return Check(
        "The account with copies earns nothing for them; the first registrant does",
        earned == 0 and n_copy == _records(cast.COPIER) > 0 and first > 0,
        f"{cast.COPIER}: {_records(cast.COPIER)} records, {n_copy} of them {cast.COPIED}'s, {Money(earned, 'USD')}; "
        f"{cast.COPIED}: {Money(first, 'USD')}",
    )


def _careless_labeller() -> Check:
    """Value per record, summed over both datasets; the intervals of a sum are not wider than the sum of the intervals."""
    per_record = {name: _value_per_record(name) for name in cast.LABELLERS}
    _, careless_high, _ = per_record.pop(cast.CARELESS)
    lowest = min(per_record, key=lambda name: per_record[name][0])
    low = per_record[lowest][0]
    return Check(
        "The labeller with wrong labels earns less per record than every other, beyond the intervals",
        careless_high < low,
        f"{cast.CARELESS} at most {careless_high:.2f}, {lowest} at least {low:.2f}, where 1.00 is the mean record",
    )


def _value_per_record(name: str) -> tuple[float, float, float]:
    """(low, high, point) of the share per record, relative to the mean record's."""
    result = _result()
    shares = list(result.shares.filter(partition=Share.Partition.LABELLER, party__name=name))
    n_all = result.shares.filter(partition=Share.Partition.LABELLER).aggregate(sum=Sum("n_records"))["sum"]
    scale = n_all / sum(share.n_records for share in shares)
    return (
        sum(share.low or 0 for share in shares) * scale,
        sum(share.high or 0 for share in shares) * scale,
        sum(share.raw or 0 for share in shares) * scale,
    )


def _splitting() -> Check:
    """The rounds as they are stored, merged again with one rights holder's records in five accounts."""
    result = _result()
    records = read_records(result.disclosure)
    task = build_task(result.disclosure, records)
    whole = _measured(result, task)
    owner = next(number for number, payee in enumerate(records.owners) if _name(records, number) == SPLIT)
    assert task.owner is not None
    split = task.owner.clone()
    mine = torch.nonzero(split == owner).flatten()
    split[mine] = len(records.owners) + torch.arange(len(mine)) % N_PARTS
    parts = _measured(result, replace(task, owner=split))

    pool = Money(360_000_000, "USD")
    before = _divided(whole, pool)
    after = _divided(parts, pool)
    of_parts = sum(micros for key, micros in after.items() if key >= len(records.owners))
    moved = {key: after[key] - micros for key, micros in before.items() if key != owner}
    off = of_parts - before[owner]
    least = min(share.share for share in parts.owners if share.owner >= len(records.owners))
    return Check(
        "Splitting one account into five changes no sum by more than a micro per account",
        abs(off) <= N_PARTS and all(abs(micros) <= 1 for micros in moved.values()) and least > 0,
        f"{SPLIT}: {Money(before[owner], 'USD')} as one, {Money(of_parts, 'USD')} as five; the others moved by "
        f"{max(map(abs, moved.values()))} micros at most",
    )


def _measured(result: AttributionResult, task: Task) -> SharesResult:
    run = AttributionRun.objects.get(result=result)
    with ExitStack() as stack:
        outputs = [shard.output for shard in run.shards.select_related("output").order_by("number") if shard.output]
        rounds = [RoundResult.load(stack.enter_context(local_path(output))) for output in outputs]
        return merge_rounds(task, read_plan(run), rounds)


def _divided(measured: SharesResult, pool: Money) -> dict[int, int]:
    weights = to_ppq({share.owner: share.paid_share for share in measured.owners})
    return {key: due.micros for key, due in allocate(pool, weights).items()}


def _lies() -> Iterator[Check]:
    """What the worker found of the true disclosure, and the same verification of three that are not."""
    disclosure = Disclosure.objects.get(model__slug=MODEL_SLUG)
    task = build_task(disclosure)
    with checkpoint_paths(disclosure) as paths, tempfile.TemporaryDirectory() as folder:
        (step, path) = paths[-1]
        altered = load_state(path)
        altered["model.0.weight"][0, 0] += 1e-3
        lie = save_state(altered, Path(folder) / "altered.safetensors")
        lies = {
            "one record left out of the citation": verify(_without_last(task), checkpoints=[(step, path)]),
            "one label changed": verify(_relabelled(task), checkpoints=[(step, path)]),
            "one checkpoint altered by 0.001 in one weight": verify(task, checkpoints=[(step, lie)]),
        }
    honest = Verification.objects.get(disclosure=disclosure).report
    yield Check("The true disclosure is reproduced to the bit", bool(honest["is_bit_equal"]), str(honest["summary"]))
    for what, report in lies.items():
        yield Check(f"A disclosure that lies is caught: {what}", not report.matches, _drift(report))


def _drift(report: VerificationReport) -> str:
    worst = max(max(c.weights_drift, c.moments_drift) for c in report.checkpoints)
    return f"{worst:.1e} of the way off, {report.tolerance.drift:.1e} allowed"


def _without_last(task: Task) -> Task:
    """The document cites one record fewer than the model saw, so its order is another too."""
    n = task.n_train - 1
    recipe = task.require_recipe()
    spec = Disclosure.objects.get(model__slug=MODEL_SLUG).document["recipe"]["order"]
    order = epoch_order(n, spec["batch"], spec["epochs"], spec["seed"])
    return Task(
        model=task.model,
        loss=task.loss,
        measurement=task.measurement,
        train=TensorRecords(*task.train[torch.arange(n)]),
        queries=task.queries,
        owner=None,
        recipe=replace(recipe, order=order),
    )


def _relabelled(task: Task) -> Task:
    features, labels = task.train[torch.arange(task.n_train)]
    labels = labels.clone()
    labels[0] = (labels[0] + 1) % 10
    return replace(task, train=TensorRecords(features, labels))


def _result() -> AttributionResult:
    return AttributionResult.objects.get(model__slug=MODEL_SLUG)


def _earned(name: str) -> int:
    return DivisionLine.objects.filter(party__name=name).aggregate(sum=Sum("amount_micros"))["sum"] or 0


def _records(name: str) -> int:
    return Contribution.objects.filter(party__name=name).aggregate(sum=Sum("n_records"))["sum"] or 0


def _name(records: TrainingRecords, number: int) -> str:
    return Party.objects.get(pk=records.owners[number].party_id).name


def table_rows(role: str) -> list[list[str]]:
    """Contributor, records, share by count, measured share ± half its interval, paid share, earned, paid."""
    rows = []
    result = _result()
    for name in cast.HOLDERS if role == Share.Partition.RIGHTS_HOLDER else cast.LABELLERS:
        shares = list(result.shares.filter(partition=role, party__name=name))
        count = sum(share.count_ppq for share in shares)
        raw = sum(share.raw or 0 for share in shares)
        half = sum((share.high or 0) - (share.low or 0) for share in shares) / 2
        lines = DivisionLine.objects.filter(party__name=name)
        payouts = Payout.objects.filter(party__name=name, status=Payout.Status.PAID)
        earned = Money(lines.aggregate(sum=Sum("amount_micros"))["sum"] or 0, "USD")
        paid = Money(payouts.aggregate(sum=Sum("amount_micros"))["sum"] or 0, "USD")
        rows.append(
            [
                name,
                f"{_records(name):,}",
                f"{100 * count / PPQ:.2f} %",
                f"{100 * raw:.2f} ± {100 * half:.2f} %" if shares else "none",
                f"{100 * sum(share.paid_ppq for share in shares) / PPQ:.2f} %",
                f"{earned.amount_text()}",
                f"{paid.amount_text()}",
            ]
        )
    return rows
