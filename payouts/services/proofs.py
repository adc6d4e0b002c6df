"""Every invariant of the books, derived again from the rows alone; nothing that a service computed is believed."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from django.db import connection, transaction
from django.db.models import Count, Q, Sum

from marketplace.money import Money
from payouts import chart
from payouts.allocation import allocate
from payouts.ledger import postings_of
from payouts.models import (
    Account,
    Division,
    DivisionLine,
    JournalEntry,
    Payment,
    Payout,
    Posting,
    RoyaltyInvoice,
    RoyaltyPool,
)
from payouts.services.divisions import ENTRY_KINDS, pots_of, source_account
from payouts.services.royalties import parts_of


@dataclass(frozen=True)
class Finding:
    code: str
    detail: str

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


@dataclass(frozen=True)
class Books:
    findings: list[Finding]
    checked: dict[str, int]


def check_books() -> Books:
    """Look at one moment of the books, whatever is being written meanwhile."""
    is_nested = connection.in_atomic_block  # an outer transaction has read already and has its own level
    with transaction.atomic():
        if not is_nested:
            with connection.cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        balances = _balances()
        findings = [finding for check in CHECKS for finding in check(balances)]
        return Books(
            findings,
            {
                "entries": JournalEntry.objects.count(),
                "postings": Posting.objects.count(),
                "divisions": Division.objects.count(),
                "lines": DivisionLine.objects.count(),
                "payouts": Payout.objects.count(),
            },
        )


Balances = dict[str, int]


def _balances() -> Balances:
    rows = Posting.objects.values("account__code").annotate(sum=Sum("amount_micros"))
    return {row["account__code"]: int(row["sum"]) for row in rows}


def _entries(balances: Balances) -> Iterator[Finding]:
    """As many legs as declared, zero sum, one currency, each on an account that its code describes."""
    sums = JournalEntry.objects.annotate(
        legs=Count("postings"),
        total=Sum("postings__amount_micros", default=0),
    )
    for entry in sums.exclude(Q(total=0)).order_by("pk"):
        yield Finding("entry_unbalanced", f"{entry.key} sums to {entry.total}")
    for entry in sums.order_by("pk").iterator():
        if entry.legs != entry.n_legs or entry.legs < 2:
            yield Finding("entry_incomplete", f"{entry.key} declares {entry.n_legs} legs and has {entry.legs}")
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT e.key, a.code FROM payouts_posting p JOIN payouts_journalentry e ON e.id = p.entry_id"
            " JOIN payouts_account a ON a.id = p.account_id WHERE a.currency <> e.currency ORDER BY p.id"
        )
        for key, code in cursor.fetchall():
            yield Finding("entry_mixes_currencies", f"{key} has a leg on {code}")
    for account in Account.objects.order_by("pk").iterator():
        try:
            code = chart.parse(account.code)
        except ValueError:
            yield Finding("unknown_account", account.code)
            continue
        party = code.id if code.name == "payable" else None
        if (account.kind, account.currency, account.party_id) != (code.purpose.kind, code.currency, party):
            yield Finding("account_misdescribed", account.code)
    # Each reversal undoes one entry, leg by leg.
    for reversal in JournalEntry.objects.filter(reverses__isnull=False).select_related("reverses").order_by("pk"):
        assert reversal.reverses is not None
        undone = {code: -micros for code, micros in postings_of(reversal.reverses).items()}
        if postings_of(reversal) != undone:
            yield Finding("reversal_differs", f"{reversal.key} does not undo {reversal.reverses.key}")


def _snapshots(balances: Balances) -> Iterator[Finding]:
    """Each snapshot is the one before it and the postings between them."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT a.code, s.up_to, s.balance_micros, s.before + coalesce(sum(p.amount_micros), 0)
            FROM (
                SELECT *, coalesce(lag(balance_micros) OVER earlier, 0) AS before, coalesce(lag(up_to) OVER earlier, 0) AS since
                FROM payouts_balancesnapshot WINDOW earlier AS (PARTITION BY account_id ORDER BY up_to)
            ) s
            JOIN payouts_account a ON a.id = s.account_id
            LEFT JOIN payouts_posting p ON p.account_id = s.account_id AND p.id > s.since AND p.id <= s.up_to
            GROUP BY a.code, s.up_to, s.balance_micros, s.before
            HAVING s.balance_micros <> s.before + coalesce(sum(p.amount_micros), 0)
            ORDER BY a.code, s.up_to
            """
        )
        for code, up_to, micros, summed in cursor.fetchall():
            yield Finding("snapshot_differs", f"{code} up to posting {up_to}: {micros}, its postings sum to {summed}")


def _balances_in_range(balances: Balances) -> Iterator[Finding]:
    """Nobody owes us what we owed them, and no heap of cash is below nothing."""
    for code, micros in sorted(balances.items()):
        name = chart.parse(code).name if _is_known(code) else ""
        if name in ("payable", "pool", "in_transit", "clearing:upfront", "clearing:royalty") and micros > 0:
            yield Finding("liability_overdrawn", f"{code} stands at {micros}")
        if name in ("cash:pending", "cash:available") and micros < 0:
            yield Finding("cash_negative", f"{code} stands at {micros}")


def _divisions(balances: Balances) -> Iterator[Finding]:
    """Amount = lines = entries, to the micro; and the lines are what their weights give, computed anew."""
    lines: dict[int, dict[tuple[str, int], DivisionLine]] = defaultdict(dict)
    for line in DivisionLine.objects.order_by("pk").iterator():
        lines[line.division_id][line.role, line.party_id] = line
    divisions = Division.objects.select_related("version", "result", "pool", "order_line", "invoice_line")
    for division in divisions.order_by("pk").iterator():
        mine = lines[division.pk]
        total = sum(line.amount_micros for line in mine.values())
        if total != division.amount_micros:
            yield Finding("division_differs_from_lines", f"{division.key}: {division.amount_micros} and {total}")
        yield from _booked_as_divided(division, mine)
        yield from _divided_as_weighed(division, mine)


def _booked_as_divided(division: Division, lines: dict[tuple[str, int], DivisionLine]) -> Iterator[Finding]:
    owed: dict[str, int] = defaultdict(int)
    for (_, party), line in lines.items():
        owed[chart.payable(party, division.currency)] -= line.amount_micros
    owed[source_account(division)] += division.amount_micros
    entries = JournalEntry.objects.filter(key__startswith=f"{division.key}:")
    booked = {
        row["account__code"]: int(row["sum"])
        for row in Posting.objects.filter(entry__in=entries, entry__kind=ENTRY_KINDS[Division.Source(division.source)])
        .values("account__code")
        .annotate(sum=Sum("amount_micros"))
    }
    if booked != {code: micros for code, micros in owed.items() if micros}:
        yield Finding("division_differs_from_entries", division.key)


def _divided_as_weighed(division: Division, lines: dict[tuple[str, int], DivisionLine]) -> Iterator[Finding]:
    """Results and counts of a published version never change, so the division must come out the same today."""
    pots = pots_of(
        version=division.version, amount=division.amount, labellers_bps=division.labellers_bps, result=division.result
    )
    anew = {
        (pot.role.value, party): (pot.weights[party], due.micros)
        for pot in pots
        for party, due in allocate(pot.amount, pot.weights).items()
        if due
    }
    stored = {key: (line.weight, line.amount_micros) for key, line in lines.items()}
    for role, party in sorted(anew.keys() | stored.keys()):
        if anew.get((role, party)) != stored.get((role, party)):
            yield Finding(
                "line_does_not_recompute",
                f"{division.key}, party {party} as {role}: stored {stored.get((role, party))}, "
                f"computed {anew.get((role, party))}",
            )


def _payables(balances: Balances) -> Iterator[Finding]:
    """What is owed to each party is their lines less their payouts, by currency."""
    owed: dict[tuple[int, str], int] = defaultdict(int)
    earned = DivisionLine.objects.values("party", "division__currency").annotate(sum=Sum("amount_micros"))
    for party, currency, micros in earned.values_list("party", "division__currency", "sum"):
        owed[party, currency] += int(micros)
    promised = Payout.objects.exclude(status=Payout.Status.REFUSED).values("party", "currency")
    for party, currency, micros in promised.annotate(sum=Sum("amount_micros")).values_list("party", "currency", "sum"):
        owed[party, currency] -= int(micros)
    codes = {chart.payable(party, currency): micros for (party, currency), micros in owed.items()}
    for code in sorted(codes.keys() | {code for code in balances if code.startswith("payable:")}):
        if codes.get(code, 0) != -balances.get(code, 0):
            yield Finding("payable_differs", f"{code}: {-balances.get(code, 0)} booked, {codes.get(code, 0)} by lines")


def _pools(balances: Balances) -> Iterator[Finding]:
    """An unreleased pool has its money; a released one has given it all to one division."""
    for pool in RoyaltyPool.objects.select_related("division").order_by("pk").iterator():
        division = getattr(pool, "division", None)
        left = -balances.get(chart.royalty_pool(pool), 0)
        if (pool.released_at is None) != (division is None):
            yield Finding("pool_half_released", f"pool {pool.pk}")
        if left != (pool.amount_micros if division is None else 0):
            yield Finding("pool_differs", f"pool {pool.pk} of {pool.amount_micros} has {left} left")
        if division is not None and division.amount_micros != pool.amount_micros:
            yield Finding("pool_differs_from_division", f"pool {pool.pk} of {pool.amount_micros}, {division.key}")


def _payments(balances: Balances) -> Iterator[Finding]:
    """Each paid payment is booked once, for its whole amount, and settled if it says so; clearing accounts end at zero."""
    paid = Payment.objects.filter(status=Payment.Status.PAID).select_related("order", "invoice")
    for payment in paid.order_by("pk").iterator():
        assert payment.fee_micros is not None
        net = payment.amount_micros - payment.fee_micros
        kind = "sale" if payment.order_id is not None else "royalty"
        booked = _postings(f"{kind}:payment:{payment.pk}")
        cash = booked.get(chart.cash_pending(payment.currency), 0)
        fee = booked.get(chart.stripe_fees(payment.currency), 0)
        if (cash, fee) != (net, payment.fee_micros):
            yield Finding(
                "payment_differs", f"payment {payment.pk}: {net} + {payment.fee_micros}, booked {cash} + {fee}"
            )
        settled = _postings(f"settle:payment:{payment.pk}").get(chart.cash_available(payment.currency), 0)
        if settled != (net if payment.settled_at else 0):
            yield Finding("settlement_differs", f"payment {payment.pk}: settled {settled} of {net}")
        thing = payment.order or payment.invoice
        if thing is None or thing.status != "paid" or thing.total_micros != payment.amount_micros:
            yield Finding("paid_thing_differs", f"payment {payment.pk} and what it is for")
    for code, micros in sorted(balances.items()):
        if code.startswith("clearing:") and micros:
            yield Finding("clearing_not_empty", f"{code} has {-micros} left")
    for invoice in RoyaltyInvoice.objects.filter(status=RoyaltyInvoice.Status.PAID).order_by("pk"):
        divided = {
            pk: amount
            for pk, amount in invoice.lines.values_list("pk", "division__amount_micros")
            if amount is not None
        }
        if divided != {pk: part.micros for pk, part in parts_of(invoice).items() if part}:
            yield Finding("royalty_differs", f"invoice {invoice.pk} and its divisions")
    for invoice in RoyaltyInvoice.objects.annotate(sum=Sum("lines__amount_micros", default=0)).order_by("pk"):
        if invoice.sum != invoice.total_micros:
            yield Finding("invoice_differs_from_lines", f"invoice {invoice.pk}: {invoice.total_micros}, {invoice.sum}")


def _payouts(balances: Balances) -> Iterator[Finding]:
    """in_transit is what is intended; each payout has the entries of its status, and only those."""
    intended: dict[str, int] = defaultdict(int)
    entries = dict(JournalEntry.objects.filter(key__startswith="payout:").values_list("key", "pk"))
    expected = set()
    for payout in Payout.objects.order_by("pk").iterator():
        if payout.status == Payout.Status.INTENDED:
            intended[chart.in_transit(payout.currency)] += payout.amount_micros
        stages = {
            Payout.Status.INTENDED: ["intent"],
            Payout.Status.SENT: ["intent", "sent"],
            Payout.Status.PAID: ["intent", "sent"],
            Payout.Status.REFUSED: ["intent", "refused"],
        }[Payout.Status(payout.status)]
        if payout.refusal_code and "sent" in stages:  # made at Stripe after all, and booked when it was found
            stages = ["intent", "refused", "intent-again", "sent"]
        expected |= {f"payout:{payout.pk}:{stage}" for stage in stages}
        moved = _postings(f"payout:{payout.pk}:intent").get(chart.payable(payout.party_id, payout.currency))
        if (
            moved != payout.amount_micros
            or payout.amount != Money(payout.amount_micros, payout.currency).floor_to_minor()
        ):
            yield Finding("payout_differs", f"payout {payout.pk} of {payout.amount_micros}, booked {moved}")
    for key in sorted(entries.keys() ^ expected):
        yield Finding("payout_stage_differs", f"{key} is {'missing' if key in expected else 'too many'}")
    for code in sorted(intended.keys() | {code for code in balances if code.startswith("in_transit:")}):
        if intended[code] != -balances.get(code, 0):
            yield Finding("in_transit_differs", f"{code}: {-balances.get(code, 0)} booked, {intended[code]} intended")


def _postings(key: str) -> dict[str, int]:
    return dict(Posting.objects.filter(entry__key=key).values_list("account__code", "amount_micros"))


def _is_known(code: str) -> bool:
    try:
        chart.parse(code)
    except ValueError:
        return False
    return True


CHECKS: list[Callable[[Balances], Iterator[Finding]]] = [
    _entries,
    _snapshots,
    _balances_in_range,
    _divisions,
    _payables,
    _pools,
    _payments,
    _payouts,
]
