"""What the books say, for staff and auditors: trial balance, journals, what is owed and how old it is, yearly totals.

Nothing here writes. Sums are made in PostgreSQL and long lists are streamed, so that memory does not grow with the books.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from django.db import connection, transaction
from django.db.models import Min, Q, QuerySet

from marketplace import clock
from marketplace.errors import InvalidInput
from marketplace.money import Money
from payouts import chart, ledger
from payouts.errors import NotFound
from payouts.models import Account, ClosedBalance, ClosedPeriod, JournalEntry, Posting

#: Kinds of entries that give a payee something for what their data did.
EARNING_KINDS = (JournalEntry.Kind.UPFRONT, JournalEntry.Kind.RELEASE, JournalEntry.Kind.ROYALTY_SPLIT)
#: Kinds that send it to them, or take back what was not sent after all.
PAYING_KINDS = (
    JournalEntry.Kind.PAYOUT_INTENT,
    JournalEntry.Kind.PAYOUT_REVERSAL,
    JournalEntry.Kind.RAIL_INTENT,
    JournalEntry.Kind.RAIL_REVERSAL,
)
AGES = ("not due yet", "0 to 30 days", "31 to 60 days", "61 to 90 days", "more than 90 days", "without a line")
CHUNK = 2_000
BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)


# --- trial balance ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TrialLine:
    """One purpose of the chart in one currency: everything booked to it, and what is left; debits positive."""

    purpose: str
    currency: str
    debit: Money
    credit: Money

    @property
    def balance(self) -> Money:
        return self.debit - self.credit

    @property
    def meaning(self) -> str:
        return chart.PURPOSES[self.purpose].meaning if self.purpose in chart.PURPOSES else ""

    @property
    def kind(self) -> str:
        return str(chart.PURPOSES[self.purpose].kind.value) if self.purpose in chart.PURPOSES else ""


@dataclass(frozen=True)
class TrialBalance:
    """One currency's lines as of a moment; debits equal credits, or the books are broken."""

    currency: str
    lines: list[TrialLine]

    @property
    def debit(self) -> Money:
        return Money(sum(line.debit.micros for line in self.lines), self.currency)

    @property
    def credit(self) -> Money:
        return Money(sum(line.credit.micros for line in self.lines), self.currency)

    @property
    def balances(self) -> bool:
        return self.debit == self.credit

    @property
    def for_others(self) -> Money:
        """What the platform holds and does not own: payables, pools, taxes and what is on its way."""
        return -self._sum_of(Account.Kind.LIABILITY)

    @property
    def own_revenue(self) -> Money:
        """Fees earned less what was spent and lost: the only money that is the platform's own."""
        return -self._sum_of(Account.Kind.REVENUE, Account.Kind.EXPENSE)

    @property
    def owners(self) -> Money:
        """What the owners put in, less what they took out."""
        return -self._sum_of(Account.Kind.EQUITY)

    @property
    def assets(self) -> Money:
        """What there is to pay it from: cash, the bank, and what is owed to us. Equal to the three above together."""
        return self._sum_of(Account.Kind.ASSET)

    def _sum_of(self, *kinds: Account.Kind) -> Money:
        return Money(sum(line.balance.micros for line in self.lines if line.kind in kinds), self.currency)


_TURNOVER = r"""
SELECT regexp_replace(a.code, '(:[0-9]+)?:[A-Z]{3}$', '') AS purpose, a.currency, sum(t.debit), sum(t.credit)
FROM (
    SELECT p.account_id,
        coalesce(sum(p.amount_micros) FILTER (WHERE p.amount_micros > 0), 0) AS debit,
        coalesce(-sum(p.amount_micros) FILTER (WHERE p.amount_micros < 0), 0) AS credit
    FROM payouts_posting p JOIN payouts_journalentry e ON e.id = p.entry_id
    WHERE e.booked_at >= %s AND e.booked_at < %s
    GROUP BY p.account_id
) t JOIN payouts_account a ON a.id = t.account_id
GROUP BY 1, 2
"""


def turnover(*, since: datetime, until: datetime) -> dict[tuple[str, str], tuple[int, int]]:
    """(currency, purpose) → debits and credits in micros of what was booked from one business time until another."""
    with connection.cursor() as cursor:
        cursor.execute(_TURNOVER, [since, until])
        return {
            (currency, purpose): (int(debit), int(credit)) for purpose, currency, debit, credit in cursor.fetchall()
        }


def trial_balance(*, as_of: datetime) -> list[TrialBalance]:
    """Everything booked before a business time, by purpose and currency; the last closed month before it is the base."""
    base = ClosedPeriod.objects.filter(ends_at__lt=as_of).order_by("-ends_at").first()
    sums: dict[tuple[str, str], tuple[int, int]] = defaultdict(lambda: (0, 0))
    if base is not None:
        for kept in ClosedBalance.objects.filter(period=base):
            sums[kept.currency, kept.purpose] = int(kept.debit_micros), int(kept.credit_micros)
    for of, (debit, credit) in turnover(since=base.ends_at if base else BEGINNING, until=as_of).items():
        sums[of] = sums[of][0] + debit, sums[of][1] + credit
    order = {purpose: number for number, purpose in enumerate(chart.PURPOSES)}
    lines = [
        TrialLine(purpose, currency, Money(debit, currency), Money(credit, currency))
        for (currency, purpose), (debit, credit) in sums.items()
    ]
    lines.sort(key=lambda line: (line.currency, order.get(line.purpose, len(order)), line.purpose))
    return [
        TrialBalance(currency, [line for line in lines if line.currency == currency])
        for currency in sorted({line.currency for line in lines})
    ]


# --- journal ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class JournalRow:
    posting_id: int
    entry_id: int
    key: str
    kind: str
    booked_at: datetime
    amount: Money
    balance: Money  # after it


@dataclass(frozen=True)
class JournalPage:
    """Some postings of one account in the order in which they were written, each with the balance after it."""

    account: Account
    rows: list[JournalRow]
    opening: Money  # before the first row
    earlier: int | None  # `before` of the page with older postings
    later: int | None  # `after` of the page with newer ones


def find_account(code: str) -> Account:
    """
    Raises:
        NotFound: nothing was ever booked to it.
    """
    found = Account.objects.filter(code=code).select_related("party").first()
    if found is None:
        raise NotFound(f"There is no account {code}.")
    return found


def account_journal(
    *, code: str, after: int | None = None, before: int | None = None, since: date | None = None, size: int = 100
) -> JournalPage:
    """A page of an account's postings; the newest by default.

    The running balance begins at a snapshot, so a page costs the same wherever in ten million postings it is.

    Args:
        after, before: the id of a posting: the page that follows it, or ends before it.
        since: the page that begins with the first posting of that business day or later.

    Raises:
        NotFound: no such account.
    """
    account = find_account(code)
    postings = Posting.objects.filter(account=account).select_related("entry")
    if since is not None:
        starts_at = datetime(since.year, since.month, since.day, tzinfo=UTC)
        first = postings.filter(entry__booked_at__gte=starts_at).aggregate(first=Min("pk"))["first"]
        after, before = (first - 1, None) if first is not None else (None, None)
    if after is not None:
        found = list(postings.filter(pk__gt=after).order_by("pk")[:size])
    else:
        older = postings if before is None else postings.filter(pk__lt=before)
        found = list(older.order_by("-pk")[:size])[::-1]
    first_id = found[0].pk if found else 0
    running = balance_before(account, first_id) if found else 0
    opening, rows = Money(running, account.currency), []
    for posting in found:
        running += posting.amount_micros
        rows.append(
            JournalRow(
                posting_id=posting.pk,
                entry_id=posting.entry_id,
                key=posting.entry.key,
                kind=posting.entry.kind,
                booked_at=posting.entry.booked_at,
                amount=Money(posting.amount_micros, account.currency),
                balance=Money(running, account.currency),
            )
        )
    has_earlier = bool(found) and postings.filter(pk__lt=first_id).exists()
    has_later = bool(found) and postings.filter(pk__gt=found[-1].pk).exists()
    return JournalPage(
        account=account,
        rows=rows,
        opening=opening,
        earlier=first_id if has_earlier else None,
        later=found[-1].pk if has_later else None,
    )


def balance_before(account: Account, posting_id: int) -> int:
    """The sum of an account's postings before one of them, in micros."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            SELECT coalesce(s.balance_micros, 0) + coalesce((
                SELECT sum(amount_micros) FROM {ledger.postings_between("a.id", "coalesce(s.up_to, 0)", "%(before)s - 1")}
            ), 0)
            FROM payouts_account a
            LEFT JOIN LATERAL (
                SELECT up_to, balance_micros FROM payouts_balancesnapshot
                WHERE account_id = a.id AND up_to < %(before)s ORDER BY up_to DESC LIMIT 1
            ) s ON true
            WHERE a.id = %(account)s
            """,  # noqa: S608
            {"account": account.pk, "before": posting_id},
        )
        return int(cursor.fetchone()[0])


def account_journal_rows(account: Account) -> Iterator[JournalRow]:
    """Every posting of an account with its running balance, streamed."""
    running = 0
    postings = Posting.objects.filter(account=account).select_related("entry").order_by("pk")
    for posting in postings.iterator(chunk_size=CHUNK):
        running += posting.amount_micros
        yield JournalRow(
            posting_id=posting.pk,
            entry_id=posting.entry_id,
            key=posting.entry.key,
            kind=posting.entry.kind,
            booked_at=posting.entry.booked_at,
            amount=Money(posting.amount_micros, account.currency),
            balance=Money(running, account.currency),
        )


def accounts_found(query: str) -> QuerySet[Account]:
    """Accounts by the beginning of their code, or by the name of the party; in order of codes."""
    found = Account.objects.select_related("party").order_by("code")
    return found.filter(Q(code__startswith=query) | Q(party__name__icontains=query)) if query else found


# --- what is owed -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class AgedPayable:
    """What is owed to one party in one currency, by how long it has been due (`AGES`)."""

    party_id: int
    party_name: str
    country: str
    can_be_paid: bool
    currency: str
    by_age: tuple[Money, ...]
    n_days: int  # since the oldest of it fell due; 0: nothing is due

    @property
    def code(self) -> str:
        return chart.payable(self.party_id, self.currency)

    @property
    def total(self) -> Money:
        return Money(sum(amount.micros for amount in self.by_age), self.currency)


# Payouts pay what fell due first, so what is left of a balance are the lines that fell due last.
_AGED = f"""
WITH owed AS (
    SELECT party_id, currency, -micros AS micros FROM {ledger.ACCOUNTS} WHERE starts_with(code, 'payable:')
), positive AS (
    SELECT * FROM owed WHERE micros > 0
), lines AS (
    SELECT l.party_id, d.currency, l.due_at, l.id,
        l.amount_micros - coalesce((
            SELECT sum(r.amount_micros) FROM payouts_reclaim r
            JOIN payouts_clawbackline cl ON cl.id = r.clawback_line_id
            LEFT JOIN payouts_clawbackundo u ON u.clawback_id = cl.clawback_id
            WHERE r.division_line_id = l.id AND u.id IS NULL
        ), 0) AS micros
    FROM payouts_divisionline l JOIN payouts_division d ON d.id = l.division_id
    WHERE l.party_id IN (SELECT party_id FROM positive)
), stacked AS (
    SELECT *, sum(micros) OVER (PARTITION BY party_id, currency ORDER BY due_at DESC, id DESC) AS upto FROM lines
), remaining AS (
    SELECT s.party_id, s.currency, s.due_at, least(s.micros, o.micros - (s.upto - s.micros)) AS micros
    FROM stacked s JOIN positive o USING (party_id, currency)
    WHERE o.micros > s.upto - s.micros
), aged AS (
    SELECT party_id, currency,
        coalesce(sum(micros) FILTER (WHERE due_at > %(now)s), 0) AS a0,
        coalesce(sum(micros) FILTER (WHERE due_at <= %(now)s AND due_at > %(now)s - interval '31 days'), 0) AS a1,
        coalesce(sum(micros) FILTER (WHERE due_at <= %(now)s - interval '31 days' AND due_at > %(now)s - interval '61 days'), 0) AS a2,
        coalesce(sum(micros) FILTER (WHERE due_at <= %(now)s - interval '61 days' AND due_at > %(now)s - interval '91 days'), 0) AS a3,
        coalesce(sum(micros) FILTER (WHERE due_at <= %(now)s - interval '91 days'), 0) AS a4,
        coalesce(sum(micros), 0) AS of_lines,
        min(due_at) FILTER (WHERE due_at <= %(now)s) AS oldest
    FROM remaining GROUP BY party_id, currency
)
SELECT p.id, p.name, p.country, coalesce(y.transfers_active, false), o.currency,
    coalesce(g.a0, 0), coalesce(g.a1, 0), coalesce(g.a2, 0), coalesce(g.a3, 0), coalesce(g.a4, 0),
    o.micros - coalesce(g.of_lines, 0), coalesce(extract(day FROM %(now)s - g.oldest), 0)
FROM positive o
JOIN marketplace_party p ON p.id = o.party_id
LEFT JOIN payouts_payeeaccount y ON y.party_id = o.party_id
LEFT JOIN aged g ON g.party_id = o.party_id AND g.currency = o.currency
"""  # noqa: S608

_AGED_TOTALS = f"""
SELECT currency, count(*), sum(a0), sum(a1), sum(a2), sum(a3), sum(a4), sum(rest)
FROM ({_AGED}) AS every (party, name, country, ready, currency, a0, a1, a2, a3, a4, rest, days)
GROUP BY currency ORDER BY currency
"""  # noqa: S608


def aged_payables(*, offset: int = 0, limit: int = 100) -> list[AgedPayable]:
    """What is owed now, whoever has waited longest first."""
    now = clock.now()
    with connection.cursor() as cursor:
        cursor.execute(
            f"{_AGED} ORDER BY 12 DESC, o.micros DESC, p.id LIMIT %(limit)s OFFSET %(offset)s",
            {"now": now, "limit": limit, "offset": offset},
        )
        return [
            AgedPayable(
                party_id=row[0],
                party_name=row[1],
                country=row[2],
                can_be_paid=row[3],
                currency=row[4],
                by_age=tuple(Money(int(micros), row[4]) for micros in row[5:11]),
                n_days=int(row[11]),
            )
            for row in cursor.fetchall()
        ]


def aged_totals() -> dict[str, tuple[int, tuple[Money, ...]]]:
    """Per currency: how many parties are owed something, and how much by age."""
    with connection.cursor() as cursor:
        cursor.execute(_AGED_TOTALS, {"now": clock.now()})
        return {row[0]: (row[1], tuple(Money(int(sum), row[0]) for sum in row[2:])) for row in cursor.fetchall()}


# --- a year, for tax forms --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class YearlyTotal:
    """What one party was credited and sent in one calendar year (UTC) and currency, as forms such as 1099 and DAC7 ask."""

    party: str  # public id
    name: str
    kind: str
    country: str
    stripe_account: str
    currency: str
    credited_by_quarter: tuple[Money, Money, Money, Money]
    n_credits: int
    adjusted: Money  # refunds, disputes, write-offs; below zero where it was taken back
    paid_out: Money

    @property
    def credited(self) -> Money:
        return Money(sum(quarter.micros for quarter in self.credited_by_quarter), self.currency)


_YEARLY = """
SELECT p.public_id::text, p.name, p.kind, p.country, coalesce(y.stripe_account_id, ''), t.currency,
    t.q1, t.q2, t.q3, t.q4, t.n_credits, t.adjusted, t.paid
FROM (
    SELECT a.party_id, a.currency,
        coalesce(-sum(q.amount_micros) FILTER (WHERE e.kind = ANY(%(earning)s) AND extract(quarter FROM e.booked_at AT TIME ZONE 'UTC') = 1), 0) AS q1,
        coalesce(-sum(q.amount_micros) FILTER (WHERE e.kind = ANY(%(earning)s) AND extract(quarter FROM e.booked_at AT TIME ZONE 'UTC') = 2), 0) AS q2,
        coalesce(-sum(q.amount_micros) FILTER (WHERE e.kind = ANY(%(earning)s) AND extract(quarter FROM e.booked_at AT TIME ZONE 'UTC') = 3), 0) AS q3,
        coalesce(-sum(q.amount_micros) FILTER (WHERE e.kind = ANY(%(earning)s) AND extract(quarter FROM e.booked_at AT TIME ZONE 'UTC') = 4), 0) AS q4,
        count(*) FILTER (WHERE e.kind = ANY(%(earning)s)) AS n_credits,
        coalesce(-sum(q.amount_micros) FILTER (WHERE NOT e.kind = ANY(%(earning)s) AND NOT e.kind = ANY(%(paying)s)), 0) AS adjusted,
        coalesce(sum(q.amount_micros) FILTER (WHERE e.kind = ANY(%(paying)s)), 0) AS paid
    FROM payouts_posting q
    JOIN payouts_journalentry e ON e.id = q.entry_id
    JOIN payouts_account a ON a.id = q.account_id
    WHERE a.party_id IS NOT NULL AND e.booked_at >= %(starts)s AND e.booked_at < %(ends)s
    GROUP BY a.party_id, a.currency
) t
JOIN marketplace_party p ON p.id = t.party_id
LEFT JOIN payouts_payeeaccount y ON y.party_id = t.party_id
ORDER BY p.id, t.currency
"""


def yearly_totals(year: int) -> Iterator[YearlyTotal]:
    """One row per payee and currency, streamed; payables and debts together, as a statement counts them.

    Raises:
        InvalidInput: there is no such year.
    """
    if not 2000 <= year <= 9998:
        raise InvalidInput(f"{year} is no year of these books; write it as 2026.", pointers={"/year": "no year"})
    given = {
        "earning": [kind.value for kind in EARNING_KINDS],
        "paying": [kind.value for kind in PAYING_KINDS],
        "starts": datetime(year, 1, 1, tzinfo=UTC),
        "ends": datetime(year + 1, 1, 1, tzinfo=UTC),
    }
    for row in _streamed(_YEARLY, given):
        money = [Money(int(micros), row[5]) for micros in (*row[6:10], row[11], row[12])]
        yield YearlyTotal(
            party=row[0],
            name=row[1],
            kind=row[2],
            country=row[3],
            stripe_account=row[4],
            currency=row[5],
            credited_by_quarter=(money[0], money[1], money[2], money[3]),
            n_credits=row[10],
            adjusted=money[4],
            paid_out=money[5],
        )


# --- beancount --------------------------------------------------------------------------------------------------------
ROOTS = {
    Account.Kind.ASSET: "Assets",
    Account.Kind.LIABILITY: "Liabilities",
    Account.Kind.REVENUE: "Income",
    Account.Kind.EXPENSE: "Expenses",
    Account.Kind.EQUITY: "Equity",
}


def beancount_account(code: str) -> str:
    """ "payable:17:USD" → "Liabilities:Payable:USD:N17": the currency before the id, so that a parent sums one currency."""
    parsed = chart.parse(code)
    name = beancount_parent(parsed.name, parsed.currency)
    return name if parsed.id is None else f"{name}:N{parsed.id}"


def beancount_parent(purpose: str, currency: str) -> str:
    kind = chart.PURPOSES[purpose].kind
    parts = purpose.split(":")
    if len(parts) > 1 and parts[0] in (kind.value, "cash"):
        parts = parts if parts[0] == "cash" else parts[1:]
    return ":".join([ROOTS[kind], *("-".join(part.split("_")).capitalize() for part in parts), currency])


def beancount_lines(*, until: datetime | None = None) -> Iterator[str]:
    """The whole journal as a beancount file, streamed; each closed month's trial balance becomes assertions in it.

    Entries stand in the order of their business days, as beancount sorts them anyway. Amounts are exact to the micro.
    """
    until = until or datetime(9999, 1, 1, tzinfo=UTC)
    first = JournalEntry.objects.filter(booked_at__lt=until).aggregate(first=Min("booked_at"))["first"]
    yield 'option "title" "Residual"\n'
    yield 'option "inferred_tolerance_default" "*:0"\n'
    if first is None:
        return
    opened_on = first.astimezone(UTC).date()
    parents = set()
    accounts = Account.objects.filter(postings__entry__booked_at__lt=until).distinct().order_by("pk")
    for account in accounts.iterator(chunk_size=CHUNK):
        parsed = chart.parse(account.code)
        parent = beancount_parent(parsed.name, parsed.currency)
        if parsed.id is not None and parent not in parents:
            yield f"{opened_on} open {parent} {account.currency}\n"
        parents.add(parent)
        yield f"{opened_on} open {beancount_account(account.code)} {account.currency}\n"
    for period in ClosedPeriod.objects.filter(ends_at__lte=until).order_by("starts_on"):
        for kept in period.balances.order_by("pk"):
            parent = beancount_parent(kept.purpose, kept.currency)
            if parent in parents:
                net = Money(int(kept.debit_micros - kept.credit_micros), kept.currency)
                yield f"{period.ends_at.astimezone(UTC).date()} balance {parent} {net.decimal:.6f} ~ 0 {kept.currency}\n"
    rows = _streamed(
        """
        SELECT e.id, (e.booked_at AT TIME ZONE 'UTC')::date, e.kind, e.key, a.code, p.amount_micros, e.currency
        FROM payouts_journalentry e
        JOIN payouts_posting p ON p.entry_id = e.id
        JOIN payouts_account a ON a.id = p.account_id
        WHERE e.booked_at < %(until)s
        ORDER BY e.booked_at, e.id, p.leg
        """,
        {"until": until},
    )
    last = None
    for entry, booked_on, kind, key, code, micros, currency in rows:
        if entry != last:
            quoted = key.replace("\\", "\\\\").replace('"', '\\"')
            yield f'\n{booked_on} * "{kind}" "{quoted}"\n'
            last = entry
        yield f"  {beancount_account(code)}  {Money(micros, currency).decimal:.6f} {currency}\n"


def _streamed(sql: str, given: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Rows of a query through a cursor on the server, a few thousand at a time."""
    with transaction.atomic(), connection.chunked_cursor() as cursor:
        cursor.execute(sql, given)
        while rows := cursor.fetchmany(CHUNK):
            yield from rows
