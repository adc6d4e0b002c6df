"""Every invariant of the books, derived again from the rows alone; nothing that a service computed is believed.

Sums over all payees are made by the database, and only what does not agree is fetched: memory does not grow with the books.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from django.db import connection, transaction
from django.db.models import Count, Max, Q, Sum

from marketplace.models import OrderLine
from marketplace.money import MINOR_DIGITS
from marketplace.selectors import MONEY_COUNTS
from marketplace.services.disclosures import canonical_json
from payouts import books, chart, ledger
from payouts.ledger import postings_of
from payouts.models import (
    Account,
    Clawback,
    ClosedBalance,
    ClosedPeriod,
    Dispute,
    Division,
    DivisionLine,
    Document,
    JournalEntry,
    Movement,
    PayeeCount,
    Payment,
    Payout,
    Posting,
    RailPayout,
    Reclaim,
    Refund,
    RoyaltyInvoice,
    RoyaltyPool,
    RoyaltyReport,
    UnappliedCharge,
)
from payouts.services.divisions import ENTRY_KINDS, allocated, pots_of, source_account
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
                "refunds": Refund.objects.count(),
                "disputes": Dispute.objects.count(),
            },
        )


Balances = dict[str, int]


def _balances() -> Balances:
    """Of the accounts that are no party's: there are as many as pools and lines, not as many as payees."""
    rows = Posting.objects.filter(account__party=None).values("account__code").annotate(sum=Sum("amount_micros"))
    return {row["account__code"]: int(row["sum"]) for row in rows.iterator()}


def _rows(statement: str, parameters: Mapping[str, Any] | None = None) -> Iterator[tuple[Any, ...]]:
    """What a statement finds, fetched a thousand at a time from a cursor of the server's."""
    name = f"proof_{next(_numbers)}"
    with connection.cursor() as cursor:
        cursor.execute(f"DECLARE {name} NO SCROLL CURSOR FOR {statement}", parameters or {})
        while rows := _fetched(cursor, name):
            yield from rows
        cursor.execute(f"CLOSE {name}")


def _fetched(cursor: Any, name: str) -> list[tuple[Any, ...]]:
    cursor.execute(f"FETCH 1000 FROM {name}")
    rows: list[tuple[Any, ...]] = cursor.fetchall()
    return rows


_numbers = count(1)


def _entries(balances: Balances) -> Iterator[Finding]:
    """As many legs as declared, zero sum, one currency, each on an account that its code describes."""
    for key, declared, legs, total, foreign in _rows(
        """
        SELECT e.key, e.n_legs, count(p.id), coalesce(sum(p.amount_micros), 0), min(a.code) FILTER (WHERE a.currency <> e.currency)
        FROM payouts_journalentry e LEFT JOIN payouts_posting p ON p.entry_id = e.id
        LEFT JOIN payouts_account a ON a.id = p.account_id
        GROUP BY e.id
        HAVING count(p.id) <> e.n_legs OR count(p.id) < 2 OR coalesce(sum(p.amount_micros), 0) <> 0
            OR bool_or(a.currency <> e.currency)
        ORDER BY e.id
        """
    ):
        if total:
            yield Finding("entry_unbalanced", f"{key} sums to {total}")
        if legs != declared or legs < 2:
            yield Finding("entry_incomplete", f"{key} declares {declared} legs and has {legs}")
        if foreign:
            yield Finding("entry_mixes_currencies", f"{key} has a leg on {foreign}")
    for posting, entry, account in _rows(
        """
        SELECT p.id, p.entry_id, p.account_id FROM payouts_posting p
        LEFT JOIN payouts_journalentry e ON e.id = p.entry_id LEFT JOIN payouts_account a ON a.id = p.account_id
        WHERE e.id IS NULL OR a.id IS NULL ORDER BY p.id
        """
    ):
        yield Finding("posting_of_nothing", f"posting {posting} names entry {entry} and account {account}")
    for account in Account.objects.order_by("pk").iterator():
        try:
            code = chart.parse(account.code)
        except ValueError:
            yield Finding("unknown_account", account.code)
            continue
        if (account.kind, account.currency, account.party_id) != (code.purpose.kind, code.currency, code.party):
            yield Finding("account_misdescribed", account.code)
    # Each reversal undoes one entry, leg by leg.
    reversals = JournalEntry.objects.filter(reverses__isnull=False).select_related("reverses").order_by("pk")
    for reversal in reversals.iterator():
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


def _by_hand() -> dict[str, int]:
    """What manual entries moved, by account."""
    of_entries = Posting.objects.filter(entry__kind=JournalEntry.Kind.MANUAL).values("account__code")
    return {row["account__code"]: int(row["sum"]) for row in of_entries.annotate(sum=Sum("amount_micros"))}


def _balances_in_range(balances: Balances) -> Iterator[Finding]:
    """Nobody owes us what we owed them, and no heap of cash is below nothing."""
    by_hand = _by_hand()
    for code, micros in sorted(balances.items()):
        # A refund gives tax back that an office has been handed already: the office owes it then.
        is_ours = _is_known(code) and chart.parse(code).purpose.kind == Account.Kind.LIABILITY
        if is_ours and micros - by_hand.get(code, 0) > 0:
            yield Finding("liability_overdrawn", f"{code} stands at {micros}")
    for code, micros in _rows(
        """
        SELECT a.code, sum(p.amount_micros) FROM payouts_account a JOIN payouts_posting p ON p.account_id = a.id
        WHERE a.party_id IS NOT NULL GROUP BY a.id
        HAVING starts_with(a.code, 'payable:') AND sum(p.amount_micros) > 0
            OR starts_with(a.code, 'receivable:') AND sum(p.amount_micros) < 0
        ORDER BY a.code
        """
    ):
        is_payable = code.startswith("payable:")
        yield Finding("liability_overdrawn" if is_payable else "receivable_negative", f"{code} stands at {micros}")
    # Refunds and disputes take what they take, whatever there is; without any, no heap of cash falls below nothing.
    moved = set(Movement.objects.values_list("currency", flat=True).distinct())
    for code, micros in sorted(balances.items()):
        if code.startswith("cash:") and micros < 0 and chart.parse(code).currency not in moved:
            yield Finding("cash_negative", f"{code} stands at {micros}")


def _counts(balances: Balances) -> Iterator[Finding]:
    """What was kept of each version's records by payee is what its records say."""
    for version in PayeeCount.objects.values_list("version", flat=True).distinct().order_by("version"):
        for role, party, kept, counted in _rows(
            f"""
            SELECT role, party_id, kept.n_records, counted.n
            FROM (SELECT role, party_id, n_records FROM payouts_payeecount WHERE version_id = %(version)s) kept
            FULL JOIN ({MONEY_COUNTS}) counted (party_id, role, n) USING (role, party_id)
            WHERE kept.n_records IS DISTINCT FROM counted.n ORDER BY role, party_id
            """,  # noqa: S608
            {"version": version},
        ):
            yield Finding(
                "count_differs", f"version {version}, party {party} as {role}: kept {kept}, counted {counted}"
            )


def _divisions(balances: Balances) -> Iterator[Finding]:
    """Amount = lines = entries, to the micro; and the lines are what their weights give, computed anew."""
    divisions = Division.objects.select_related(
        "version", "result", "pool", "order_line", "invoice_line", "corrects__division"
    )
    summed = divisions.annotate(divided=Sum("lines__amount_micros", default=0))
    for division in summed.order_by("pk").iterator(chunk_size=100):
        if division.divided != division.amount_micros:
            yield Finding(
                "division_differs_from_lines", f"{division.key}: {division.amount_micros} and {division.divided}"
            )
        yield from _booked_as_divided(division)
        yield from _divided_as_weighed(division)


def _booked_as_divided(division: Division) -> Iterator[Finding]:
    found = _rows(
        """
        WITH owed AS (
            SELECT 'payable:' || party_id || ':' || %(currency)s AS code, -sum(amount_micros) AS micros
            FROM payouts_divisionline WHERE division_id = %(division)s GROUP BY party_id
            UNION ALL SELECT %(source)s, %(amount)s
        ), booked AS (
            SELECT a.code, sum(p.amount_micros) AS micros
            FROM payouts_journalentry e JOIN payouts_posting p ON p.entry_id = e.id JOIN payouts_account a ON a.id = p.account_id
            WHERE e.key LIKE %(keys)s AND e.kind = %(kind)s GROUP BY a.code
        )
        SELECT code FROM owed FULL JOIN booked USING (code) WHERE owed.micros IS DISTINCT FROM booked.micros LIMIT 1
        """,
        {
            "division": division.pk,
            "currency": division.currency,
            "source": source_account(division),
            "amount": division.amount_micros,
            "keys": f"{_escaped(division.key)}:%",
            "kind": ENTRY_KINDS[Division.Source(division.source)].value,
        },
    )
    if list(found):
        yield Finding("division_differs_from_entries", division.key)


def _escaped(prefix: str) -> str:
    """For LIKE, in which an underscore is any letter."""
    return prefix.replace("\\", "\\\\").replace("_", "\\_").replace("%", "\\%")


def _divided_as_weighed(division: Division) -> Iterator[Finding]:
    """Results and counts of a published version never change, so the division must come out the same today."""
    if division.corrects is not None:
        gained = {
            (line.role, line.party_id): (line.weight, line.difference_micros)
            for line in division.corrects.lines.all()
            if line.difference_micros > 0
        }
        if gained != {(line.role, line.party_id): (line.weight, line.amount_micros) for line in division.lines.all()}:
            yield Finding("correction_differs", f"{division.key} and what it should give")
        return
    pots = pots_of(
        version=division.version, amount=division.amount, labellers_bps=division.labellers_bps, result=division.result
    )
    by_role = {pot.role: pot for pot in pots}
    for role in DivisionLine.Role:
        parameters: dict[str, Any]
        anew, parameters = "SELECT 0::bigint, 0::bigint, 0::bigint, 0::bigint WHERE false", {"role": role.value}
        if role in by_role:
            anew, parameters = allocated(by_role[role])
        for party, stored_weight, stored, weight, computed in _rows(
            f"""
            SELECT party_id, l.weight, l.amount_micros, anew.weight, anew.micros
            FROM (
                SELECT party_id, weight, amount_micros FROM payouts_divisionline
                WHERE division_id = %(division)s AND role = %(role)s
            ) l
            FULL JOIN (SELECT * FROM ({anew}) a (party_id, weight, n_records, micros) WHERE micros > 0) anew USING (party_id)
            WHERE (l.weight, l.amount_micros) IS DISTINCT FROM (anew.weight, anew.micros::bigint) ORDER BY party_id
            """,  # noqa: S608
            parameters | {"division": division.pk},
        ):
            yield Finding(
                "line_does_not_recompute",
                f"{division.key}, party {party} as {role.value}: stored {_pair(stored_weight, stored)}, "
                f"computed {_pair(weight, computed)}",
            )


def _pair(weight: int | None, micros: int | None) -> tuple[int, int] | None:
    return None if weight is None or micros is None else (int(weight), int(micros))


def _payables(balances: Balances) -> Iterator[Finding]:
    """What is owed to each party, less what it owes: lines − reclaims − payouts, over other rails too, + reversals + write-offs."""
    for party, currency, booked, owed in _rows(
        """
        WITH moved AS (
            SELECT l.party_id, d.currency, l.amount_micros AS micros
            FROM payouts_divisionline l JOIN payouts_division d ON d.id = l.division_id
            UNION ALL
            SELECT l.party_id, d.currency, -r.amount_micros FROM payouts_reclaim r
            JOIN payouts_clawbackline c ON c.id = r.clawback_line_id
            JOIN payouts_divisionline l ON l.id = r.division_line_id JOIN payouts_division d ON d.id = l.division_id
            WHERE NOT EXISTS (SELECT FROM payouts_clawbackundo u WHERE u.clawback_id = c.clawback_id)
            UNION ALL
            SELECT party_id, currency, -amount_micros FROM payouts_payout WHERE status <> 'refused'
            UNION ALL
            SELECT party_id, currency, -amount_micros FROM payouts_railpayout WHERE status IN ('intended', 'sent')
            UNION ALL
            SELECT o.party_id, r.currency, r.amount_micros FROM payouts_transferreversal r
            JOIN payouts_payout o ON o.id = r.payout_id WHERE r.state = 'sent'
            UNION ALL
            SELECT party_id, currency, amount_micros FROM payouts_writeoff
        ), owed AS (
            SELECT party_id, currency, sum(micros) AS micros FROM moved GROUP BY 1, 2
        ), booked AS (
            SELECT a.party_id, a.currency, -sum(p.amount_micros) AS micros
            FROM payouts_account a JOIN payouts_posting p ON p.account_id = a.id WHERE a.party_id IS NOT NULL GROUP BY 1, 2
        )
        SELECT party_id, currency, coalesce(booked.micros, 0), coalesce(owed.micros, 0)
        FROM owed FULL JOIN booked USING (party_id, currency)
        WHERE coalesce(booked.micros, 0) <> coalesce(owed.micros, 0) ORDER BY 1, 2
        """
    ):
        yield Finding("payable_differs", f"{chart.payable(party, currency)}: {booked} booked, {owed} by lines")


def _pools(balances: Balances) -> Iterator[Finding]:
    """Every pool is what went back to buyers, what was released to one division, and what is left: nothing once released."""
    for pool in RoyaltyPool.objects.with_left().select_related("division").order_by("pk").iterator():
        division = getattr(pool, "division", None)
        left = -balances.get(chart.royalty_pool(pool), 0)
        if (pool.released_at is None) != (division is None):
            yield Finding("pool_half_released", f"pool {pool.pk}")
        if left != (pool.left_micros if division is None else 0):
            yield Finding("pool_differs", f"pool {pool.pk} of {pool.amount_micros} has {left} left")
        released = Division.objects.filter(order_line=pool.order_line_id, source=Division.Source.POOL)
        divided = released.aggregate(sum=Sum("amount_micros", default=0))["sum"]
        if division is not None and divided != pool.left_micros:
            yield Finding(
                "pool_differs_from_division",
                f"pool {pool.pk} of {pool.amount_micros} less {pool.amount_micros - pool.left_micros}, {divided} divided",
            )


def _payments(balances: Balances) -> Iterator[Finding]:
    """Each paid payment is booked once, for its whole amount, and settled if it says so; clearing accounts end at zero."""
    paid = Payment.objects.filter(status=Payment.Status.PAID).select_related("order", "invoice", "tax_rate")
    for payment in paid.order_by("pk").iterator():
        assert payment.fee_micros is not None
        net = payment.amount_micros - payment.fee_micros
        kind = "sale" if payment.order_id is not None else "royalty"
        booked = _postings(f"{kind}:payment:{payment.pk}")
        is_bank = payment.method == Payment.Method.BANK
        cash = booked.get((chart.bank if is_bank else chart.cash_pending)(payment.currency), 0)
        fee = booked.get(chart.stripe_fees(payment.currency), 0)
        if (cash, fee) != (net, payment.fee_micros):
            yield Finding(
                "payment_differs", f"payment {payment.pk}: {net} + {payment.fee_micros}, booked {cash} + {fee}"
            )
        settled = _postings(f"settle:payment:{payment.pk}").get(chart.cash_available(payment.currency), 0)
        if settled != (net if payment.settled_at and not is_bank else 0):
            yield Finding("settlement_differs", f"payment {payment.pk}: settled {settled} of {net}")
        taxed = -booked.get(chart.tax(payment.tax_rate, payment.currency), 0) if payment.tax_rate else 0
        if taxed != payment.tax_micros:
            yield Finding("tax_differs", f"payment {payment.pk}: {payment.tax_micros}, booked {taxed}")
        asked = payment.order.total_micros if payment.order else payment.invoice.demand.micros  # type: ignore[union-attr]
        status = (payment.order or payment.invoice).status  # type: ignore[union-attr]
        if status not in ("paid", "refunded") or asked != payment.net.micros:
            yield Finding("paid_thing_differs", f"payment {payment.pk} and what it is for")
        if is_bank != payment.receipts.filter(status="booked", amount_micros=payment.amount_micros).exists():
            yield Finding("receipt_differs", f"payment {payment.pk} and the transfer that paid it")
    for code, micros in sorted(balances.items()):
        if code.startswith("clearing:") and micros:
            yield Finding("clearing_not_empty", f"{code} has {-micros} left")
    paid_invoices = [RoyaltyInvoice.Status.PAID, RoyaltyInvoice.Status.REFUNDED]
    for invoice in RoyaltyInvoice.objects.filter(status__in=paid_invoices).order_by("pk"):
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


def _reports(balances: Balances) -> Iterator[Finding]:
    """Reports that stand do not overlap, and together ask for no more of a license than its cap."""
    standing = RoyaltyReport.objects.filter(replaced_by=None).exclude(invoice__status=RoyaltyInvoice.Status.REFUNDED)
    last: RoyaltyReport | None = None
    for report in standing.order_by("model", "currency", "period_start", "pk"):
        is_next = last and (last.model_id, last.currency) == (report.model_id, report.currency)
        if last and is_next and report.period_start <= last.period_end:
            yield Finding("reports_overlap", f"reports {last.pk} and {report.pk} of {report.model}")
        last = report


def _documents(balances: Balances) -> Iterator[Finding]:
    """Each series is numbered from 1 without a gap; each document says what its payment or refund does."""
    series = Document.objects.values("kind", "year").annotate(n=Count("pk"), last=Max("number"))
    for row in series.order_by("kind", "year"):
        if row["n"] != row["last"]:
            yield Finding("document_numbers_differ", f"{row['kind']}-{row['year']} has {row['n']}, up to {row['last']}")
    for document in Document.objects.filter(cancels=None).select_related("payment", "refund").order_by("pk").iterator():
        of = document.refund or document.payment
        if document.total.micros != of.amount_micros:
            yield Finding("document_differs", f"{document} of {document.total}: {of.amount_micros}")
        if hashlib.sha256(canonical_json(document.content)).hexdigest() != document.sha256:
            yield Finding("document_changed", f"{document} is not what was issued")


def _payouts(balances: Balances) -> Iterator[Finding]:
    """in_transit is what is intended; each payout has the entries of its status, and only those."""
    for pk, amount, moved in _rows(
        """
        SELECT o.id, o.amount_micros, (
            SELECT sum(p.amount_micros) FROM payouts_journalentry e JOIN payouts_posting p ON p.entry_id = e.id
            JOIN payouts_account a ON a.id = p.account_id
            WHERE e.key = 'payout:' || o.id || ':intent' AND a.code = 'payable:' || o.party_id || ':' || o.currency
        ) AS moved
        FROM payouts_payout o ORDER BY o.id
        """
    ):
        if moved != amount:
            yield Finding("payout_differs", f"payout {pk} of {amount}, booked {moved}")
    for currency, digits in MINOR_DIGITS.items():
        unit = 10 ** (6 - digits)
        for pk, amount in _rows(
            "SELECT id, amount_micros FROM payouts_payout WHERE currency = %(currency)s AND amount_micros %% %(unit)s <> 0",
            {"currency": currency, "unit": unit},
        ):
            yield Finding("payout_differs", f"payout {pk} of {amount} is no whole number of minor units")
    # One that was refused and made at Stripe after all was booked when it was found.
    for key, is_expected in _rows(
        """
        WITH expected AS (
            SELECT 'payout:' || o.id || ':' || stage AS key FROM payouts_payout o, LATERAL unnest(
                CASE WHEN o.status = 'intended' THEN ARRAY['intent'] WHEN o.status = 'refused' THEN ARRAY['intent', 'refused']
                WHEN o.refusal_code <> '' THEN ARRAY['intent', 'refused', 'intent-again', 'sent']
                ELSE ARRAY['intent', 'sent'] END
            ) stage
        ), booked AS (SELECT key FROM payouts_journalentry WHERE starts_with(key, 'payout:'))
        SELECT key, expected.key IS NOT NULL FROM expected FULL JOIN booked USING (key)
        WHERE expected.key IS NULL OR booked.key IS NULL ORDER BY 1
        """
    ):
        yield Finding("payout_stage_differs", f"{key} is {'missing' if is_expected else 'too many'}")
    sums = Payout.objects.filter(status=Payout.Status.INTENDED).values("currency").annotate(sum=Sum("amount_micros"))
    intended = {chart.in_transit(row["currency"]): int(row["sum"]) for row in sums}
    for code in sorted(intended.keys() | {code for code in balances if code.startswith("in_transit:")}):
        if intended.get(code, 0) != -balances.get(code, 0):
            yield Finding(
                "in_transit_differs", f"{code}: {-balances.get(code, 0)} booked, {intended.get(code, 0)} intended"
            )


def _rails(balances: Balances) -> Iterator[Finding]:
    """in_transit_rail is what is intended over other rails; each payout has the entries of its status, and only those."""
    for key, is_expected in _rows(
        """
        WITH expected AS (
            SELECT 'rail:' || id || ':' || stage AS key, amount_micros FROM payouts_railpayout, LATERAL unnest(
                CASE WHEN status = 'intended' THEN ARRAY['intent'] WHEN status = 'sent' THEN ARRAY['intent', 'sent']
                WHEN status = 'returned' THEN ARRAY['intent', 'returned'] END
            ) stage
        ), booked AS (
            SELECT e.key, max(p.amount_micros) AS amount_micros
            FROM payouts_journalentry e JOIN payouts_posting p ON p.entry_id = e.id
            WHERE starts_with(e.key, 'rail:') AND NOT EXISTS ( -- what was sent before it came back
                SELECT FROM payouts_railpayout r WHERE r.status = 'returned' AND e.key = 'rail:' || r.id || ':sent'
            ) GROUP BY e.key
        )
        SELECT key, expected.key IS NOT NULL FROM expected FULL JOIN booked USING (key, amount_micros)
        WHERE expected.key IS NULL OR booked.key IS NULL ORDER BY 1
        """
    ):
        yield Finding("rail_stage_differs", f"{key} is {'missing' if is_expected else 'too many'}")
    sums = RailPayout.objects.filter(status=RailPayout.Status.INTENDED).values("currency")
    intended = {
        chart.in_transit_rail(currency): int(micros)
        for currency, micros in sums.annotate(sum=Sum("amount_micros")).values_list("currency", "sum")
    }
    for code in sorted(intended.keys() | {code for code in balances if code.startswith("in_transit_rail:")}):
        if intended.get(code, 0) != -balances.get(code, 0):
            yield Finding(
                "in_transit_differs", f"{code}: {-balances.get(code, 0)} booked, {intended.get(code, 0)} intended"
            )


def _closings(balances: Balances) -> Iterator[Finding]:
    """Each closed month's trial balance is the one before it and what was booked in the month."""
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    since = books.BEGINNING
    for period in ClosedPeriod.objects.order_by("starts_on"):
        for of, (debit, credit) in books.turnover(since=since, until=period.ends_at).items():
            before = sums.get(of, (0, 0))
            sums[of] = before[0] + debit, before[1] + credit
        kept = {
            (one.currency, one.purpose): (int(one.debit_micros), int(one.credit_micros))
            for one in ClosedBalance.objects.filter(period=period)
        }
        for of in sorted(kept.keys() | sums.keys()):
            if kept.get(of) != sums.get(of):
                yield Finding("closed_month_differs", f"{period}, {of}: kept {kept.get(of)}, booked {sums.get(of)}")
        since = period.ends_at


def _refunds(balances: Balances) -> Iterator[Finding]:
    """Refunded ≤ paid; what is refunding is what is intended; each cause has the movements of its state."""
    standing = (
        Refund.objects.filter(state__in=Refund.STANDING, unapplied=None)
        .values("payment")
        .annotate(sum=Sum("amount_micros", default=0))
    )
    back = dict(standing.values_list("payment", "sum"))
    for payment in Payment.objects.filter(pk__in=back).order_by("pk"):
        if back[payment.pk] > payment.amount_micros or payment.status != Payment.Status.PAID:
            yield Finding(
                "refunded_more_than_paid", f"payment {payment.pk} of {payment.amount_micros}: {back[payment.pk]}"
            )
    refunding: dict[str, int] = defaultdict(int)
    expected_movements = {
        Refund.State.INTENDED: [],
        Refund.State.REFUSED: [],
        Refund.State.PENDING: [Movement.Kind.REFUND],
        Refund.State.SENT: [Movement.Kind.REFUND],
        Refund.State.FAILED: [Movement.Kind.REFUND, Movement.Kind.REFUND_FAILURE],
    }
    refunds = Refund.objects.select_related("clawback__undo", "payment").prefetch_related("movements")
    for refund in refunds.order_by("pk").iterator(chunk_size=1_000):
        state = Refund.State(refund.state)
        if state == Refund.State.INTENDED:
            refunding[chart.refunding(refund.currency)] += refund.amount_micros
        moved = sorted((movement.kind, movement.amount_micros) for movement in refund.movements.all())
        wanted = [
            (kind.value, refund.amount_micros * (-1 if kind == Movement.Kind.REFUND else 1))
            for kind in expected_movements[state]
        ]
        if moved != wanted:
            yield Finding("refund_movements_differ", f"{refund} is {state}: {moved}")
        if refund.payment is None:
            continue  # see `_unapplied`
        clawback = refund.clawback
        is_undone = hasattr(clawback, "undo")
        if clawback.amount_micros != refund.amount_micros or is_undone == (state in Refund.STANDING):
            yield Finding(
                "refund_differs_from_clawback", f"{refund} is {state}, {clawback} of {clawback.amount_micros}"
            )
    for code in sorted(refunding.keys() | {code for code in balances if code.startswith("refunding:")}):
        if refunding[code] != -balances.get(code, 0):
            yield Finding("refunding_differs", f"{code}: {-balances.get(code, 0)} booked, {refunding[code]} intended")


def _unapplied(balances: Balances) -> Iterator[Finding]:
    """A surplus charge has its movement, paid nothing, and what is left of all of them is what lies in `unapplied`."""
    left: dict[str, int] = defaultdict(int)
    for charge in UnappliedCharge.objects.prefetch_related("movements", "refunds").order_by("pk").iterator(1_000):
        moved = [(movement.kind, movement.amount_micros) for movement in charge.movements.all()]
        if moved != [(Movement.Kind.SURPLUS, charge.amount_micros)]:
            yield Finding("unapplied_movements_differ", f"{charge}: {moved}")
        if Payment.objects.filter(charge_id=charge.charge_id).exists():
            yield Finding("unapplied_paid_something", f"{charge}")
        back = 0
        for refund in charge.refunds.all():
            is_standing = refund.state in Refund.STANDING
            back += refund.amount_micros if is_standing else 0
            code = chart.unapplied(charge.currency)
            booked = [_postings(f"surplus:refund:{refund.pk}:{stage}").get(code, 0) for stage in ("intent", "back")]
            if booked != [refund.amount_micros, 0 if is_standing else -refund.amount_micros]:
                yield Finding("refund_differs_from_surplus", f"{refund} is {refund.state}, booked {booked}")
        if back > charge.amount_micros:
            yield Finding("refunded_more_than_paid", f"{charge}: {back}")
        left[chart.unapplied(charge.currency)] += charge.amount_micros - back
    by_hand = _by_hand()
    for code in sorted(left.keys() | {code for code in balances if code.startswith("unapplied:")}):
        if left[code] != -(balances.get(code, 0) - by_hand.get(code, 0)):
            yield Finding(
                "unapplied_differs", f"{code}: {-balances.get(code, 0)} booked, {left[code]} left of its charges"
            )


def _clawbacks(balances: Balances) -> Iterator[Finding]:
    """A clawback is its lines, a line its fee, pool and reclaims, and each entry what they say; the fee is in proportion."""
    clawbacks = Clawback.objects.select_related("payment", "undo").prefetch_related("lines")
    for clawback in clawbacks.order_by("pk").iterator(chunk_size=1_000):
        owed: dict[str, int] = defaultdict(int)
        for line in clawback.lines.all():
            reclaims = list(
                Reclaim.objects.filter(clawback_line=line).values_list("division_line__party", "amount_micros")
            )
            rest = line.amount_micros - line.fee_micros - line.pool_micros - line.tax_micros
            if sum(micros for _, micros in reclaims) != rest:
                yield Finding("clawback_line_differs", f"{clawback}, line {line.pk}: {rest} of its payees, {reclaims}")
            owed["fee"] += line.fee_micros
            owed["pool"] += line.pool_micros
            owed["tax"] += line.tax_micros
            for party, micros in reclaims:
                owed[f"party {party}"] += micros
        owed["loss"] += clawback.loss_micros
        if sum(owed.values()) != clawback.amount_micros + clawback.loss_micros:
            yield Finding(
                "clawback_differs_from_lines", f"{clawback} of {clawback.amount_micros}: {sum(owed.values())}"
            )
        for prefix, sign in (("clawback", 1), ("unclawback", -1)):
            wanted = {name: sign * micros for name, micros in owed.items() if micros}
            if prefix == "unclawback" and not hasattr(clawback, "undo"):
                wanted = {}
            booked = _booked_by_source(f"{prefix}:{clawback.key}:")
            if booked != wanted:
                yield Finding("clawback_differs_from_entries", f"{prefix} {clawback}: booked {booked}, is {wanted}")


def _booked_by_source(prefix: str) -> dict[str, int]:
    """What the entries under a prefix took from whom, by the names that `_clawbacks` uses."""
    found: dict[str, int] = defaultdict(int)
    names = {"pool": "pool", "tax": "tax", "revenue:platform_fee": "fee", "expense:losses": "loss"}
    postings = Posting.objects.filter(entry__key__startswith=prefix).values_list("account__code", "amount_micros")
    for account, micros in postings:
        code = chart.parse(account)
        if code.party is not None:
            found[f"party {code.party}"] += micros
        elif code.name in names:
            found[names[code.name]] += micros
    return {name: micros for name, micros in found.items() if micros}


def _disputes(balances: Balances) -> Iterator[Finding]:
    """A decided dispute's account is empty; an open one freezes, a lost one has taken back what it was about."""
    for dispute in Dispute.objects.order_by("pk"):
        left = balances.get(chart.dispute(dispute), 0)
        frozen = dispute.clawbacks.filter(kind=Clawback.Kind.FREEZE, undo=None)
        taken = dispute.clawbacks.filter(kind=Clawback.Kind.DISPUTE).first()
        moved = sum(movement.amount_micros for movement in dispute.movements.all())
        wanted = -moved - sum(clawback.amount_micros for clawback in frozen)
        if taken is not None:
            wanted -= taken.amount_micros + taken.loss_micros
        if left != wanted or (not dispute.is_open and left):
            yield Finding("dispute_differs", f"{dispute} has {left} on its account, its rows say {wanted}")
        if dispute.is_open != frozen.exists():
            yield Finding("dispute_not_frozen", f"{dispute} has {frozen.count()} freezes")
        if (dispute.status == "lost") != (taken is not None):
            yield Finding("dispute_not_taken_back", f"{dispute}")


def _frozen(balances: Balances) -> Iterator[Finding]:
    """While a dispute is open, its payment's pools are empty and no payee is owed anything of it that was not sent."""
    disputed = Payment.objects.filter(pk__in=Dispute.objects.filter(status__in=Dispute.OPEN).values("payment"))
    order_lines = OrderLine.objects.filter(order__payment__in=disputed)
    for pool in RoyaltyPool.objects.filter(order_line__in=order_lines, released_at=None).order_by("pk"):
        if left := -balances.get(chart.royalty_pool(pool), 0):
            yield Finding("disputed_not_frozen", f"pool {pool.pk} has {left} left while its payment is disputed")
    # A royalty names its license's order line too; it is disputed with its own payment only.
    is_disputed = Q(division__order_line__in=order_lines) & ~Q(division__source=Division.Source.ROYALTY)
    is_disputed &= ~Q(division__corrects__division__source=Division.Source.ROYALTY)
    for line in ("division__invoice_line", "division__corrects__division__invoice_line"):
        is_disputed |= Q(**{f"{line}__invoice__payment__in": disputed})
        is_disputed |= Q(**{f"{line}__invoice__carried_into__payment__in": disputed})
    lines = DivisionLine.objects.filter(is_disputed)
    parties = set(lines.values_list("party", "division__currency"))
    for party, currency in sorted(parties):
        # What falls due first is sent first, so what a payee is still owed is at most what the undisputed lines give.
        free = DivisionLine.objects.filter(party=party, division__currency=currency).exclude(pk__in=lines)
        given = free.aggregate(sum=Sum("amount_micros", default=0))["sum"]
        back = Reclaim.objects.filter(division_line__in=free, clawback_line__clawback__undo=None)
        most = int(given) - int(back.aggregate(sum=Sum("amount_micros", default=0))["sum"])
        owed = -ledger.balance(chart.payable(party, currency))
        if owed > most:
            yield Finding("disputed_not_frozen", f"party {party} is owed {owed} {currency}, at most {most} undisputed")


def _movements(balances: Balances) -> Iterator[Finding]:
    """Each of Stripe's movements is booked once, for its net, and settled if it says so."""
    for movement in Movement.objects.order_by("pk").iterator():
        cash = (
            chart.cash_available(movement.currency)
            if movement.is_booked_available
            else chart.cash_pending(movement.currency)
        )
        booked = _postings(f"movement:{movement.balance_transaction_id}").get(cash, 0)
        if booked != movement.net_micros:
            yield Finding("movement_differs", f"{movement}: {movement.net_micros}, booked {booked}")
        key = f"settle:movement:{movement.balance_transaction_id}"
        settled = _postings(key).get(chart.cash_available(movement.currency), 0)
        is_settled_later = movement.settled_at is not None and not movement.is_booked_available
        if settled != (movement.net_micros if is_settled_later else 0):
            yield Finding("settlement_differs", f"{movement}: settled {settled} of {movement.net_micros}")


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
    _counts,
    _divisions,
    _payables,
    _pools,
    _payments,
    _reports,
    _documents,
    _payouts,
    _rails,
    _closings,
    _refunds,
    _unapplied,
    _clawbacks,
    _disputes,
    _frozen,
    _movements,
]
