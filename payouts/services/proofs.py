"""Every invariant of the books, derived again from the rows alone; nothing that a service computed is believed.

Sums over all payees are made by the database, and only what does not agree is fetched: memory does not grow with the books.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any

from django.db import connection, transaction
from django.db.models import Count, F, Max, Q, Sum

from marketplace.models import OrderLine
from marketplace.money import MINOR_DIGITS
from marketplace.selectors import MONEY_COUNTS
from marketplace.services.disclosures import canonical_json
from payouts import books, chart, ledger
from payouts.ledger import postings_of
from payouts.models import (
    Account,
    BankReceipt,
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
    PayoutRun,
    Posting,
    RailPayout,
    Reclaim,
    Refund,
    RoyaltyInvoice,
    RoyaltyPool,
    RoyaltyReport,
    SurplusCharge,
)
from payouts.services.divisions import ENTRY_KINDS, allocated, divided_by, pots_of, source_account
from payouts.services.royalties import parts_of


@dataclass(frozen=True)
class Finding:
    code: str
    detail: str

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


#: So many findings are told; the others are counted.
KEPT_FINDINGS = 1_000


@dataclass(frozen=True)
class Books:
    findings: list[Finding]  # the first of them
    n_findings: int
    checked: dict[str, int]


def check_books() -> Books:
    """Look at one moment of the books, whatever is being written meanwhile."""
    is_nested = connection.in_atomic_block  # an outer transaction has read already and has its own level
    with transaction.atomic():
        if not is_nested:
            with connection.cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        found = chain.from_iterable(check() for check in CHECKS)
        findings = list(islice(found, KEPT_FINDINGS))
        return Books(
            findings,
            len(findings) + sum(1 for _ in found),
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


def _sums(prefix: str) -> dict[str, int]:
    """Code → the sum of its postings, of the few accounts under a prefix."""
    rows = Posting.objects.filter(account__code__startswith=prefix).values("account__code")
    return {row["account__code"]: int(row["sum"]) for row in rows.annotate(sum=Sum("amount_micros")).order_by()}


def _sum_of(code: str) -> int:
    return int(Posting.objects.filter(account__code=code).aggregate(sum=Sum("amount_micros", default=0))["sum"])


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


def _entries() -> Iterator[Finding]:
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


def _snapshots() -> Iterator[Finding]:
    """Each snapshot is the one before it and the postings between them."""
    for code, up_to, micros, summed in _rows(
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
    ):
        yield Finding("snapshot_differs", f"{code} up to posting {up_to}: {micros}, its postings sum to {summed}")


def _by_hand(prefix: str) -> dict[str, int]:
    """What manual entries moved, by account."""
    of_entries = Posting.objects.filter(entry__kind=JournalEntry.Kind.MANUAL, account__code__startswith=prefix)
    summed = of_entries.values("account__code").annotate(sum=Sum("amount_micros"))
    return {row["account__code"]: int(row["sum"]) for row in summed}


def _balances_in_range() -> Iterator[Finding]:
    """Nobody owes us what we owed them, and no heap of cash is below nothing."""
    for code, micros in _rows(
        """
        SELECT held.code, held.micros FROM (
            SELECT a.id, a.code, a.party_id, sum(p.amount_micros) AS micros
            FROM payouts_account a JOIN payouts_posting p ON p.account_id = a.id
            WHERE a.kind = 'liability' GROUP BY a.id HAVING sum(p.amount_micros) > 0
        ) held
        -- A refund gives tax back that an office has been handed already: the office owes it then.
        WHERE NOT starts_with(held.code, 'tax:') OR held.micros > coalesce((
            SELECT sum(p.amount_micros) FROM payouts_journalentry e JOIN payouts_posting p ON p.entry_id = e.id
            WHERE e.kind = 'manual' AND p.account_id = held.id
        ), 0)
        ORDER BY held.code
        """
    ):
        yield Finding("liability_overdrawn", f"{code} stands at {micros}")
    for code, micros in _rows(
        """
        SELECT a.code, sum(p.amount_micros) FROM payouts_account a JOIN payouts_posting p ON p.account_id = a.id
        WHERE a.party_id IS NOT NULL AND starts_with(a.code, 'receivable:') GROUP BY a.id HAVING sum(p.amount_micros) < 0
        ORDER BY a.code
        """
    ):
        yield Finding("receivable_negative", f"{code} stands at {micros}")
    # Refunds and disputes take what they take, whatever there is; without any, no heap of cash falls below nothing.
    moved = set(Movement.objects.values_list("currency", flat=True).distinct())
    for code, micros in sorted(_sums("cash:").items()):
        if micros < 0 and chart.currency_of(code) not in moved:
            yield Finding("cash_negative", f"{code} stands at {micros}")


def _counts() -> Iterator[Finding]:
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


def _divisions() -> Iterator[Finding]:
    """Amount = lines = entries, to the micro; and the lines are what their weights give, computed anew."""
    divisions = Division.objects.select_related(
        "version", "result", "pool", "order_line", "invoice_line__result", "corrects__division"
    )
    summed = divisions.annotate(divided=Sum("lines__amount_micros", default=0))
    for division in summed.order_by("pk").iterator(chunk_size=100):
        if division.divided != division.amount_micros:
            yield Finding(
                "division_differs_from_lines", f"{division.key}: {division.amount_micros} and {division.divided}"
            )
        yield from _booked_as_divided(division)
        yield from _divided_as_weighed(division)
        yield from _divided_as_invoiced(division)


def _booked_as_divided(division: Division) -> Iterator[Finding]:
    found = _rows(
        """
        WITH owed AS (
            SELECT 'payable:' || party_id || ':' || %(currency)s AS code, -sum(amount_micros) AS micros
            FROM payouts_divisionline WHERE division_id = %(division)s GROUP BY party_id
            UNION ALL SELECT %(source)s, %(amount)s
        ), entries AS MATERIALIZED (
            SELECT id FROM payouts_journalentry WHERE key LIKE %(keys)s AND kind = %(kind)s
        ), legs AS MATERIALIZED (
            SELECT p.account_id, sum(p.amount_micros) AS micros
            FROM entries e JOIN payouts_posting p ON p.entry_id = e.id GROUP BY p.account_id
        ), booked AS (
            SELECT a.code, legs.micros FROM legs JOIN payouts_account a ON a.id = legs.account_id
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
        different = """
            SELECT FROM (
                SELECT party_id, role, weight, after_micros - before_micros FROM payouts_correctionline
                WHERE correction_id = %(correction)s AND after_micros > before_micros
            ) gained FULL JOIN (
                SELECT party_id, role, weight, amount_micros FROM payouts_divisionline WHERE division_id = %(division)s
            ) given ON gained::text = given::text
            WHERE gained IS NULL OR given IS NULL LIMIT 1"""
        if list(_rows(different, {"correction": division.corrects_id, "division": division.pk})):
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


def _divided_as_invoiced(division: Division) -> Iterator[Finding]:
    """A royalty is divided by the result of its invoice's line, or by count where that gave nobody a weight."""
    line = division.invoice_line
    if line is None or division.corrects is not None or division.corrections.filter(status="booked").exists():
        return
    pots = pots_of(
        version=division.version, amount=division.amount, labellers_bps=division.labellers_bps, result=line.result
    )
    if divided_by(pots, line.result) != (division.result, division.counted_role):
        yield Finding(
            "divided_by_another_result", f"{division.key}: by {division.result}, invoiced by result {line.result_id}"
        )


def _pair(weight: int | None, micros: int | None) -> tuple[int, int] | None:
    return None if weight is None or micros is None else (int(weight), int(micros))


def _payables() -> Iterator[Finding]:
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


def _pools() -> Iterator[Finding]:
    """Every pool is what went back to buyers, what was released to one division, and what is left: nothing once released."""
    for pk, is_half, amount, left, balance, is_divided, divided in _rows(
        """
        SELECT * FROM (
            SELECT r.id, (r.released_at IS NULL) <> (d.id IS NULL) AS is_half, r.amount_micros, r.amount_micros - coalesce((
                SELECT sum(l.pool_micros) FROM payouts_clawbackline l WHERE l.order_line_id = r.order_line_id
                    AND NOT EXISTS (SELECT FROM payouts_clawbackundo u WHERE u.clawback_id = l.clawback_id)
            ), 0) AS left_micros, coalesce((
                SELECT -sum(p.amount_micros) FROM payouts_account a JOIN payouts_posting p ON p.account_id = a.id
                WHERE a.code = 'pool:' || r.id || ':' || r.currency
            ), 0) AS balance, d.id IS NOT NULL AS is_divided, coalesce((
                SELECT sum(o.amount_micros) FROM payouts_division o
                WHERE o.order_line_id = r.order_line_id AND o.source = 'pool'
            ), 0) AS divided
            FROM payouts_royaltypool r LEFT JOIN payouts_division d ON d.pool_id = r.id
        ) pools
        WHERE is_half OR balance <> CASE WHEN is_divided THEN 0 ELSE left_micros END OR is_divided AND divided <> left_micros
        ORDER BY id
        """
    ):
        if is_half:
            yield Finding("pool_half_released", f"pool {pk}")
        if balance != (0 if is_divided else left):
            yield Finding("pool_differs", f"pool {pk} of {amount} has {balance} left")
        if is_divided and divided != left:
            yield Finding(
                "pool_differs_from_division", f"pool {pk} of {amount} less {amount - left}, {divided} divided"
            )


def _payments() -> Iterator[Finding]:
    """Each paid payment is booked once, for its whole amount, and settled if it says so; clearing accounts end at zero."""
    paid = Payment.objects.filter(status=Payment.Status.PAID).select_related("order", "invoice", "tax_rate")
    for payment in paid.order_by("pk").iterator():
        assert payment.fee_micros is not None
        net = payment.amount_micros - payment.fee_micros
        kind = "sale" if payment.order_id is not None else "royalty"
        booked = _postings(f"{kind}:payment:{payment.pk}")
        is_bank = payment.method == Payment.Method.BANK
        applied = payment.applications.filter(status="booked").first() if is_bank else None
        taken_from = chart.unapplied if applied else chart.bank if is_bank else chart.cash_pending
        cash = booked.get(taken_from(payment.currency), 0)
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
        arrived = payment.receipts.filter(status="booked", amount_micros=payment.amount_micros).exists()
        used = sum(applied.uses.values_list("amount_micros", flat=True)) if applied else 0
        if is_bank != (arrived or used == payment.amount_micros) or (arrived and applied):
            yield Finding("receipt_differs", f"payment {payment.pk} and the transfers that paid it")
    for code, micros in _rows(
        """
        SELECT a.code, sum(p.amount_micros) FROM payouts_account a JOIN payouts_posting p ON p.account_id = a.id
        WHERE starts_with(a.code, 'clearing:') GROUP BY a.id HAVING sum(p.amount_micros) <> 0 ORDER BY a.code
        """
    ):
        yield Finding("clearing_not_empty", f"{code} has {-micros} left")
    paid_invoices = [RoyaltyInvoice.Status.PAID, RoyaltyInvoice.Status.REFUNDED]
    for invoice in RoyaltyInvoice.objects.filter(status__in=paid_invoices).order_by("pk").iterator():
        divided = {
            pk: amount
            for pk, amount in invoice.lines.values_list("pk", "division__amount_micros")
            if amount is not None
        }
        if divided != {pk: part.micros for pk, part in parts_of(invoice).items() if part}:
            yield Finding("royalty_differs", f"invoice {invoice.pk} and its divisions")
    summed = RoyaltyInvoice.objects.annotate(sum=Sum("lines__amount_micros", default=0))
    for invoice in summed.exclude(sum=F("total_micros")).order_by("pk").iterator():
        yield Finding("invoice_differs_from_lines", f"invoice {invoice.pk}: {invoice.total_micros}, {invoice.sum}")


def _reports() -> Iterator[Finding]:
    """Reports that stand do not overlap, and together ask for no more of a license than its cap."""
    standing = RoyaltyReport.objects.filter(replaced_by=None).exclude(invoice__status=RoyaltyInvoice.Status.REFUNDED)
    last: RoyaltyReport | None = None
    for report in standing.order_by("model", "currency", "period_start", "pk").iterator():
        is_next = last and (last.model_id, last.currency) == (report.model_id, report.currency)
        if last and is_next and report.period_start <= last.period_end:
            yield Finding("reports_overlap", f"reports {last.pk} and {report.pk} of {report.model}")
        last = report


def _documents() -> Iterator[Finding]:
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


def _payouts() -> Iterator[Finding]:
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
    promised = _sums("in_transit:")
    for code in sorted(intended.keys() | promised.keys()):
        if intended.get(code, 0) != -promised.get(code, 0):
            yield Finding(
                "in_transit_differs", f"{code}: {-promised.get(code, 0)} booked, {intended.get(code, 0)} intended"
            )


def _runs() -> Iterator[Finding]:
    """What is above the limit that a run was planned under was approved by another person before anything was intended."""
    beyond = PayoutRun.objects.filter(planned_micros__gt=F("approval_above_micros")).exclude(
        state__in=[PayoutRun.State.AWAITING_APPROVAL, PayoutRun.State.REJECTED]
    )
    alone = Q(approved_by=None) | Q(approved_at=None) | Q(approved_by=F("started_by"))
    for run in beyond.filter(alone).order_by("pk").iterator():
        yield Finding("run_not_approved", f"payout run {run.pk} of {run.planned} is {run.state}")
    sums = PayoutRun.objects.filter(planned_at__isnull=False).annotate(
        sum=Sum("planned_payouts__amount_micros", default=0)
    )
    for run in sums.exclude(sum=F("planned_micros")).order_by("pk").iterator():
        yield Finding(
            "run_differs_from_plan", f"payout run {run.pk} of {run.planned_micros}, its plan sums to {run.sum}"
        )
    for pk, run_id, amount, planned in _rows(
        """
        SELECT o.id, o.run_id, o.amount_micros, n.amount_micros FROM payouts_payout o
        JOIN payouts_payoutrun r ON r.id = o.run_id AND r.planned_at IS NOT NULL
        LEFT JOIN payouts_plannedpayout n ON n.run_id = o.run_id AND n.party_id = o.party_id
        WHERE o.amount_micros > coalesce(n.amount_micros, 0) AND r.approval_above_micros IS NOT NULL
        ORDER BY o.id
        """
    ):
        yield Finding("payout_not_planned", f"payout {pk} of {amount} in run {run_id}, which plans {planned or 0}")


def _rails() -> Iterator[Finding]:
    """in_transit_rail is what is intended over other rails; each payout has the entries of its status, as two people confirmed it."""
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
    for payout, status, confirmed in _rows(
        """
        SELECT r.id, r.status, c.outcome FROM payouts_railpayout r JOIN LATERAL (
            SELECT outcome, reference, decided_by_id FROM payouts_railconfirmation
            WHERE payout_id = r.id AND status = 'booked' ORDER BY id DESC LIMIT 1
        ) c ON true
        WHERE (r.status, r.reference, r.confirmed_by_id) IS DISTINCT FROM (c.outcome, c.reference, c.decided_by_id) ORDER BY r.id
        """
    ):
        yield Finding(
            "rail_confirmation_differs", f"rail payout {payout} is {status}, two people have seen it {confirmed}"
        )
    sums = RailPayout.objects.filter(status=RailPayout.Status.INTENDED).values("currency")
    intended = {
        chart.in_transit_rail(currency): int(micros)
        for currency, micros in sums.annotate(sum=Sum("amount_micros")).values_list("currency", "sum")
    }
    promised = _sums("in_transit_rail:")
    for code in sorted(intended.keys() | promised.keys()):
        if intended.get(code, 0) != -promised.get(code, 0):
            yield Finding(
                "in_transit_differs", f"{code}: {-promised.get(code, 0)} booked, {intended.get(code, 0)} intended"
            )


def _closings() -> Iterator[Finding]:
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


def _statements() -> Iterator[Finding]:
    """What each issued statement closes with is what was booked to the party before the month's end, and the next opens with it."""
    for number, currency, stated, booked in _rows(
        """
        WITH moved AS (
            SELECT a.party_id, a.currency, c.ends_at, -sum(p.amount_micros) AS micros
            FROM payouts_account a JOIN payouts_posting p ON p.account_id = a.id JOIN payouts_journalentry e ON e.id = p.entry_id
            JOIN payouts_closedperiod c ON c.starts_on = date_trunc('month', e.booked_at AT TIME ZONE 'UTC')::date
            WHERE a.party_id IS NOT NULL GROUP BY 1, 2, 3
        ), stated AS (
            SELECT s.number, s.party_id, b.currency, c.ends_at, b.opening_micros, b.closing_micros,
                lag(b.closing_micros, 1, 0) OVER (PARTITION BY s.party_id, b.currency ORDER BY c.ends_at) AS before_micros
            FROM payouts_statementbalance b JOIN payouts_issuedstatement s ON s.id = b.statement_id
            JOIN payouts_closedperiod c ON c.id = s.period_id
        ), summed AS ( -- a month's movements and its statement are peers, so the sum holds both
            SELECT *, sum(micros) OVER (PARTITION BY party_id, currency ORDER BY ends_at) AS booked_micros FROM (
                SELECT party_id, currency, ends_at, NULL AS number, 0 AS opening_micros, 0 AS closing_micros, 0 AS before_micros, micros
                FROM moved
                UNION ALL
                SELECT party_id, currency, ends_at, number, opening_micros, closing_micros, before_micros, 0 FROM stated
            ) events
        )
        SELECT number, currency, ARRAY[opening_micros, closing_micros], ARRAY[before_micros, booked_micros::bigint] FROM summed
        WHERE number IS NOT NULL AND (closing_micros <> booked_micros OR opening_micros <> before_micros) ORDER BY number
        """
    ):
        yield Finding("statement_differs", f"{number} in {currency}: opens and closes with {stated}, booked {booked}")


def _refunds() -> Iterator[Finding]:
    """Refunded ≤ paid; what is refunding is what is intended; each cause has the movements of its state."""
    for payment, paid, back in _rows(
        """
        SELECT p.id, p.amount_micros, sum(r.amount_micros) FROM payouts_refund r JOIN payouts_payment p ON p.id = r.payment_id
        WHERE r.state = ANY(%(standing)s) AND r.surplus_id IS NULL GROUP BY p.id HAVING sum(r.amount_micros) > p.amount_micros OR p.status <> 'paid'
        ORDER BY p.id
        """,
        {"standing": [str(state) for state in Refund.STANDING]},
    ):
        yield Finding("refunded_more_than_paid", f"payment {payment} of {paid}: {back}")
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
            account = chart.refunding_bank if refund.is_by_bank else chart.refunding
            refunding[account(refund.currency)] += refund.amount_micros
        moved = sorted((movement.kind, movement.amount_micros) for movement in refund.movements.all())
        wanted = [
            (kind.value, refund.amount_micros * (-1 if kind == Movement.Kind.REFUND else 1))
            for kind in ([] if refund.is_by_bank else expected_movements[state])
        ]
        if moved != wanted:
            yield Finding("refund_movements_differ", f"{refund} is {state}: {moved}")
        if refund.payment is None:
            continue  # see `_surplus`
        clawback = refund.clawback
        is_undone = hasattr(clawback, "undo")
        if clawback.amount_micros != refund.amount_micros or is_undone == (state in Refund.STANDING):
            yield Finding(
                "refund_differs_from_clawback", f"{refund} is {state}, {clawback} of {clawback.amount_micros}"
            )
    promised = _sums("refunding:") | _sums("refunding_bank:")
    for code in sorted(refunding.keys() | promised.keys()):
        if refunding[code] != -promised.get(code, 0):
            yield Finding("refunding_differs", f"{code}: {-promised.get(code, 0)} booked, {refunding[code]} intended")


def _surplus() -> Iterator[Finding]:
    """A surplus charge has its movement, paid nothing, and what is left of all of them is what lies in `surplus`."""
    left: dict[str, int] = defaultdict(int)
    for charge in SurplusCharge.objects.prefetch_related("movements", "refunds").order_by("pk").iterator(1_000):
        moved = [(movement.kind, movement.amount_micros) for movement in charge.movements.all()]
        if moved != [(Movement.Kind.SURPLUS, charge.amount_micros)]:
            yield Finding("surplus_movements_differ", f"{charge}: {moved}")
        if Payment.objects.filter(charge_id=charge.charge_id).exists():
            yield Finding("surplus_paid_something", f"{charge}")
        back = 0
        for refund in charge.refunds.all():
            is_standing = refund.state in Refund.STANDING
            back += refund.amount_micros if is_standing else 0
            code = chart.surplus(charge.currency)
            booked = [_postings(f"surplus:refund:{refund.pk}:{stage}").get(code, 0) for stage in ("intent", "back")]
            if booked != [refund.amount_micros, 0 if is_standing else -refund.amount_micros]:
                yield Finding("refund_differs_from_surplus", f"{refund} is {refund.state}, booked {booked}")
        if back > charge.amount_micros:
            yield Finding("refunded_more_than_paid", f"{charge}: {back}")
        left[chart.surplus(charge.currency)] += charge.amount_micros - back
    by_hand, booked_now = _by_hand("surplus:"), _sums("surplus:")
    for code in sorted(left.keys() | booked_now.keys()):
        held = booked_now.get(code, 0)
        if left[code] != by_hand.get(code, 0) - held:
            yield Finding("surplus_differs", f"{code}: {-held} booked, {left[code]} left of its charges")


def _bank() -> Iterator[Finding]:
    """Each transfer out of the bank has the entries of its status and carries what it is for; what fits no invoice is what is left."""
    for key, is_expected in _rows(
        """
        WITH expected AS (
            SELECT 'outgoing:' || o.id || ':' || stage AS key, o.amount_micros * CASE stage WHEN 'sent' THEN -1 ELSE 1 END AS micros
            FROM payouts_outgoingtransfer o, LATERAL unnest(
                CASE o.status WHEN 'booked' THEN ARRAY['sent'] WHEN 'returned' THEN ARRAY['sent', 'returned'] END
            ) stage
            UNION ALL
            SELECT 'receipt:' || id, amount_micros FROM payouts_bankreceipt WHERE payment_id IS NULL AND status = 'booked'
        ), booked AS (
            SELECT e.key, sum(p.amount_micros) AS micros
            FROM payouts_journalentry e JOIN payouts_posting p ON p.entry_id = e.id JOIN payouts_account a ON a.id = p.account_id
            WHERE (starts_with(e.key, 'outgoing:') OR starts_with(e.key, 'receipt:')) AND a.code = 'bank:' || e.currency
            GROUP BY e.key
        )
        SELECT key, expected.key IS NOT NULL FROM expected FULL JOIN booked USING (key, micros)
        WHERE expected.key IS NULL OR booked.key IS NULL ORDER BY 1
        """
    ):
        yield Finding("bank_entry_differs", f"{key} is {'missing' if is_expected else 'too many'}")
    carried = {
        Refund.State.INTENDED: ("", "recorded"),
        Refund.State.SENT: ("booked",),
        Refund.State.FAILED: ("returned",),
        Refund.State.REFUSED: ("",),
    }
    for refund in Refund.objects.filter(method=Payment.Method.BANK).order_by("pk").iterator(chunk_size=1_000):
        transfer = refund.transfer
        if (transfer.status if transfer else "") not in carried.get(Refund.State(refund.state), ()):
            yield Finding("refund_differs_from_transfer", f"{refund} is {refund.state}, its transfer {transfer}")
    held: dict[str, int] = defaultdict(int)
    for receipt in BankReceipt.objects.filter(payment=None, status="booked").prefetch_related(
        "uses__application", "returns"
    ):
        used = sum(use.amount_micros for use in receipt.uses.all() if use.application.status == "booked")
        gone = sum(one.amount_micros for one in receipt.returns.all() if one.status == "booked")
        held[chart.unapplied(receipt.currency)] += receipt.amount_micros - used - gone
        if receipt.left.micros < 0:
            yield Finding("receipt_overdrawn", f"{receipt} has {receipt.left} left")
    # By the entries of these rows alone: whatever else the account may hold is proved where it is made.
    mine = dict(
        _rows(
            """
            SELECT a.code, -sum(p.amount_micros)::bigint FROM payouts_journalentry e JOIN payouts_posting p ON p.entry_id = e.id
            JOIN payouts_account a ON a.id = p.account_id
            WHERE a.code = 'unapplied:' || e.currency AND (
                starts_with(e.key, 'receipt:') OR starts_with(e.key, 'outgoing:') OR starts_with(e.key, 'sale:')
                OR starts_with(e.key, 'royalty:payment:')
            ) GROUP BY a.code
            """
        )
    )
    for code in sorted(held.keys() | mine.keys()):
        if held[code] != mine.get(code, 0):
            yield Finding("unapplied_differs", f"{code}: {mine.get(code, 0)} booked, {held[code]} by receipts")


def _clawbacks() -> Iterator[Finding]:
    """A clawback is its lines, a line its fee, pool and reclaims, and each entry what they say; the fee is in proportion."""
    for clawback, line, rest, reclaimed in _rows(
        """
        SELECT c.key, l.id, l.amount_micros - l.fee_micros - l.pool_micros - l.tax_micros, coalesce(sum(r.amount_micros), 0)
        FROM payouts_clawbackline l JOIN payouts_clawback c ON c.id = l.clawback_id
        LEFT JOIN payouts_reclaim r ON r.clawback_line_id = l.id GROUP BY c.id, l.id
        HAVING coalesce(sum(r.amount_micros), 0) <> l.amount_micros - l.fee_micros - l.pool_micros - l.tax_micros ORDER BY l.id
        """
    ):
        yield Finding("clawback_line_differs", f"{clawback}, line {line}: {rest} of its payees, {reclaimed}")
    for clawback, amount, summed in _rows(
        """
        SELECT c.key, c.amount_micros, coalesce(sum(l.amount_micros), 0) FROM payouts_clawback c
        LEFT JOIN payouts_clawbackline l ON l.clawback_id = c.id
        GROUP BY c.id HAVING c.amount_micros <> coalesce(sum(l.amount_micros), 0) ORDER BY c.id
        """
    ):
        yield Finding("clawback_differs_from_lines", f"{clawback} of {amount}: {summed}")
    for clawback in Clawback.objects.select_related("undo").order_by("pk").iterator(chunk_size=1_000):
        for prefix, sign in (("clawback", 1), ("unclawback", -1 if hasattr(clawback, "undo") else 0)):
            given = {"clawback": clawback.pk, "sign": sign, "keys": f"{_escaped(f'{prefix}:{clawback.key}')}:%"}
            for name, booked, wanted in _rows(_CLAWBACK_BOOKED, given):
                yield Finding(
                    "clawback_differs_from_entries", f"{prefix} {clawback}: of {name} {booked} booked, is {wanted}"
                )


#: What a clawback took from whom by its rows, and by its entries; the first that differs.
_CLAWBACK_BOOKED = """
WITH owed AS (
    SELECT 'party ' || d.party_id AS name, sum(r.amount_micros) AS micros FROM payouts_clawbackline l
    JOIN payouts_reclaim r ON r.clawback_line_id = l.id JOIN payouts_divisionline d ON d.id = r.division_line_id
    WHERE l.clawback_id = %(clawback)s GROUP BY 1
    UNION ALL
    SELECT x.name, sum(x.micros) FROM payouts_clawbackline l,
        LATERAL (VALUES ('fee', l.fee_micros), ('pool', l.pool_micros), ('tax', l.tax_micros)) x (name, micros)
    WHERE l.clawback_id = %(clawback)s GROUP BY 1
    UNION ALL
    SELECT 'loss', loss_micros FROM payouts_clawback WHERE id = %(clawback)s
), entries AS MATERIALIZED (
    SELECT id FROM payouts_journalentry WHERE key LIKE %(keys)s
), legs AS MATERIALIZED (
    SELECT p.account_id, sum(p.amount_micros) AS micros
    FROM entries e JOIN payouts_posting p ON p.entry_id = e.id GROUP BY p.account_id
), booked AS (
    SELECT CASE WHEN a.party_id IS NOT NULL THEN 'party ' || a.party_id WHEN starts_with(a.code, 'pool:') THEN 'pool'
            WHEN starts_with(a.code, 'tax:') THEN 'tax' WHEN starts_with(a.code, 'revenue:platform_fee:') THEN 'fee'
            WHEN starts_with(a.code, 'expense:losses:') THEN 'loss' END AS name, sum(legs.micros) AS micros
    FROM legs JOIN payouts_account a ON a.id = legs.account_id GROUP BY 1
)
SELECT name, coalesce(booked.micros, 0), coalesce(owed.micros * %(sign)s, 0) FROM owed FULL JOIN booked USING (name)
WHERE name IS NOT NULL AND coalesce(booked.micros, 0) <> coalesce(owed.micros * %(sign)s, 0) ORDER BY name LIMIT 1
"""


def _disputes() -> Iterator[Finding]:
    """A decided dispute's account is empty; an open one freezes, a lost one has taken back what it was about."""
    for dispute in Dispute.objects.order_by("pk").iterator():
        left = _sum_of(chart.dispute(dispute))
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


def _frozen() -> Iterator[Finding]:
    """While a dispute is open, its payment's pools are empty and no payee is owed anything of it that was not sent."""
    disputed = Payment.objects.filter(pk__in=Dispute.objects.filter(status__in=Dispute.OPEN).values("payment"))
    order_lines = OrderLine.objects.filter(order__payment__in=disputed)
    for pool in RoyaltyPool.objects.filter(order_line__in=order_lines, released_at=None).order_by("pk").iterator():
        if left := -_sum_of(chart.royalty_pool(pool)):
            yield Finding("disputed_not_frozen", f"pool {pool.pk} has {left} left while its payment is disputed")
    # A royalty names its license's order line too; it is disputed with its own payment only.
    is_disputed = Q(division__order_line__in=order_lines) & ~Q(division__source=Division.Source.ROYALTY)
    is_disputed &= ~Q(division__corrects__division__source=Division.Source.ROYALTY)
    for line in ("division__invoice_line", "division__corrects__division__invoice_line"):
        is_disputed |= Q(**{f"{line}__invoice__payment__in": disputed})
        is_disputed |= Q(**{f"{line}__invoice__carried_into__payment__in": disputed})
    lines = DivisionLine.objects.filter(is_disputed)
    parties = lines.order_by("party", "division__currency").values_list("party", "division__currency").distinct()
    for party, currency in parties.iterator():
        # What falls due first is sent first, so what a payee is still owed is at most what the undisputed lines give.
        free = DivisionLine.objects.filter(party=party, division__currency=currency).exclude(pk__in=lines)
        given = free.aggregate(sum=Sum("amount_micros", default=0))["sum"]
        back = Reclaim.objects.filter(division_line__in=free, clawback_line__clawback__undo=None)
        most = int(given) - int(back.aggregate(sum=Sum("amount_micros", default=0))["sum"])
        owed = -ledger.balance(chart.payable(party, currency))
        if owed > most:
            yield Finding("disputed_not_frozen", f"party {party} is owed {owed} {currency}, at most {most} undisputed")


def _movements() -> Iterator[Finding]:
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


CHECKS: list[Callable[[], Iterator[Finding]]] = [
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
    _runs,
    _rails,
    _closings,
    _statements,
    _refunds,
    _surplus,
    _bank,
    _clawbacks,
    _disputes,
    _frozen,
    _movements,
]
