"""What is due to whom, set-wise: each payee's due money, their minimum, and the plan of a payout run.

    due = payable − receivable − what falls due later

The first two are the ledger's balances, so what it costs does not grow with how long somebody has been earning; `check_ledger`
proves that they are the sums of all lines, reclaims, payouts, reversals and write-offs.
"""

import logging
from collections.abc import Collection
from datetime import datetime

from django.conf import settings
from django.db import connection, transaction

from marketplace import clock
from marketplace.errors import InvalidInput
from marketplace.models import Party, User
from marketplace.money import MICROS, MINOR_DIGITS, Money
from marketplace.services import audit
from marketplace.templatetags.residual import exact_money, money
from payouts import chart, ledger
from payouts.models import ApprovalLimit, PayoutMinimum, PayoutRun, PlannedPayout

logger = logging.getLogger(__name__)

#: One whole unit is the least that Stripe hands to most banks; a payee may ask for up to a thousand times as much.
LEAST = {currency: MICROS * (1 if digits else 100) for currency, digits in MINOR_DIGITS.items()}
MOST_TIMES = 1_000


def minimum_of(party: Party | int, currency: str) -> Money:
    """The least the party is sent at once."""
    chosen = PayoutMinimum.objects.filter(party=party, currency=currency).first()
    return chosen.amount if chosen else Money(LEAST[currency], currency)


def set_minimum(*, party: Party, amount: Money, user: User | None) -> PayoutMinimum:
    """Change the least the party is sent at once; what is due and below it waits and adds up.

    Raises:
        InvalidInput: below what Stripe pays out, above a thousand times that, or not in whole minor units.
    """
    least, most = (
        Money(LEAST[amount.currency], amount.currency),
        Money(LEAST[amount.currency] * MOST_TIMES, amount.currency),
    )
    if not least.micros <= amount.micros <= most.micros or amount.floor_to_minor() != amount:
        raise InvalidInput(
            f"Choose a minimum from {money(least)} to {money(most)}, in whole cents; {exact_money(amount)} is not.",
            pointers={"/minimum": "out of bounds"},
        )
    with transaction.atomic():
        row, _ = PayoutMinimum.objects.update_or_create(
            party=party, currency=amount.currency, defaults={"amount_micros": amount.micros}
        )
        audit.record(
            actor=user,
            party=party,
            action="payout_minimum.changed",
            target=f"party:{party.pk}",
            amount_micros=amount.micros,
            currency=amount.currency,
        )
    return row


def minimums(parties: Collection[int], currency: str) -> dict[int, int]:
    """Party → the least it is sent at once, in micros."""
    chosen = PayoutMinimum.objects.filter(party__in=parties, currency=currency).values_list("party", "amount_micros")
    return dict.fromkeys(parties, LEAST[currency]) | dict(chosen)


def due_micros(*, party_id: int, currency: str, until: datetime) -> int:
    """What has fallen due to a party and was neither sent nor intended, in micros; before rounding.

    Below zero where more went back to buyers than the party was still owed; what it earns next pays that first.
    """
    return due_of([party_id], currency=currency, until=until)[party_id]


def due_of(parties: Collection[int], *, currency: str, until: datetime) -> dict[int, int]:
    """`due_micros` of each of many parties, in three statements."""
    payables = {chart.payable(party, currency): party for party in parties}
    receivables = {chart.receivable(party, currency): party for party in parties}
    due = dict.fromkeys(parties, 0)
    for code, micros in ledger.balances_of([*payables, *receivables]).items():
        due[payables[code] if code in payables else receivables[code]] -= micros
    with connection.cursor() as cursor:
        cursor.execute(
            f"{_HELD} AND l.party_id = ANY(%(parties)s) GROUP BY l.party_id",
            {"currency": currency, "until": until, "parties": list(parties)},
        )
        for party, micros in cursor.fetchall():
            due[party] -= int(micros)
    return due


_HELD = """
SELECT l.party_id, sum(l.amount_micros - coalesce((
    SELECT sum(r.amount_micros) FROM payouts_reclaim r JOIN payouts_clawbackline c ON c.id = r.clawback_line_id
    WHERE r.division_line_id = l.id
        AND NOT EXISTS (SELECT FROM payouts_clawbackundo u WHERE u.clawback_id = c.clawback_id)
), 0)) AS micros
FROM payouts_divisionline l JOIN payouts_division d ON d.id = l.division_id
WHERE l.due_at > %(until)s AND d.currency = %(currency)s
"""


def approval_above_micros(currency: str) -> int:
    """Above it a run waits for a second person: the setting, or the limit that PostgreSQL holds it against if that is lower.

    `migrate` makes the two equal, as the owner of the tables.
    """
    held = ApprovalLimit.of(currency)
    return min(settings.PAYOUT_RUN_APPROVAL_ABOVE[currency] * MICROS, held.above_micros if held else 0)


def write_plan(run: PayoutRun) -> None:
    """Inside the transaction that holds the run: everybody who is to be paid, whose money has waited longest first.

    Who is owed something and is not to be paid is counted on the run, by reason.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            _WRITE_PLAN,
            {
                "run": run.pk,
                "currency": run.currency,
                "until": run.due_until,
                "minor": 10 ** (6 - MINOR_DIGITS[run.currency]),
                "least": LEAST[run.currency],
            },
        )
        counted = {outcome: (n, int(micros)) for outcome, n, micros in cursor.fetchall()}
    n_planned, micros = counted.pop("planned", (0, 0))
    is_above = micros > approval_above_micros(run.currency)
    run.write(
        planned_at=clock.now(),
        n_planned=n_planned,
        planned_micros=micros,
        skipped={outcome: {"n": n, "micros": skipped} for outcome, (n, skipped) in sorted(counted.items())},
        state=PayoutRun.State.AWAITING_APPROVAL if is_above else PayoutRun.State.SENDING,
        progress_total=n_planned,
    )
    logger.info("Planned payout run=%s payees=%s micros=%s state=%s", run.pk, n_planned, micros, run.state)


# A payee's oldest due line is the first after what their last payout covered; the rest of a cent that it left does not count.
_WRITE_PLAN = f"""
WITH held AS MATERIALIZED ({_HELD} GROUP BY l.party_id),
owed AS MATERIALIZED (
    SELECT party_id, -sum(micros) AS micros FROM {ledger.ACCOUNTS}
    WHERE party_id IS NOT NULL AND currency = %(currency)s GROUP BY party_id
), due AS MATERIALIZED (
    SELECT o.party_id, div(o.micros - coalesce(h.micros, 0), %(minor)s) * %(minor)s AS micros
    FROM owed o LEFT JOIN held h ON h.party_id = o.party_id
), sorted AS MATERIALIZED (
    SELECT d.party_id, d.micros::bigint AS micros,
        CASE WHEN p.transfers_active IS NOT TRUE THEN 'not_ready'
            WHEN d.micros < coalesce(m.amount_micros, %(least)s) THEN 'below_minimum'
            ELSE 'planned' END AS outcome
    FROM due d
    LEFT JOIN payouts_payeeaccount p ON p.party_id = d.party_id
    LEFT JOIN payouts_payoutminimum m ON m.party_id = d.party_id AND m.currency = %(currency)s
    WHERE d.micros > 0
), written AS (
    INSERT INTO payouts_plannedpayout (run_id, position, party_id, amount_micros, oldest_due_at, outcome)
    SELECT %(run)s, row_number() OVER (ORDER BY oldest.due_at, party_id) - 1, party_id, micros, oldest.due_at, 'waiting'
    FROM sorted, LATERAL (
        SELECT coalesce(min(l.due_at), %(until)s) AS due_at
        FROM payouts_divisionline l JOIN payouts_division d ON d.id = l.division_id
        WHERE l.party_id = sorted.party_id AND d.currency = %(currency)s AND l.due_at <= %(until)s
            AND l.due_at > coalesce((
                SELECT max(r.due_until) FROM payouts_payout o JOIN payouts_payoutrun r ON r.id = o.run_id
                WHERE o.party_id = sorted.party_id AND o.currency = %(currency)s AND o.status <> 'refused'
            ), '-infinity')
    ) oldest
    WHERE outcome = 'planned'
)
SELECT outcome, count(*), sum(micros) FROM sorted GROUP BY outcome
"""  # noqa: S608


def free_micros(currency: str) -> int:
    """Available at Stripe by the ledger, and promised to nobody."""
    # in_transit and refunding are liabilities, so adding them takes off what is promised already.
    codes = [of(currency) for of in (chart.cash_available, chart.in_transit, chart.refunding)]
    return sum(ledger.balances_of(codes).values())


def bank_micros(currency: str) -> tuple[int, int]:
    """What our own bank account holds by the ledger, and what of it is another's: promised to payees and buyers, or held for payers."""
    promised_to = [of(currency) for of in (chart.in_transit_rail, chart.refunding_bank, chart.unapplied)]
    balances = ledger.balances_of([chart.bank(currency), *promised_to])
    held = balances.pop(chart.bank(currency), 0)
    return held, -sum(balances.values())  # liabilities stand below zero


def funded_until(run: PayoutRun) -> int:
    """The position up to which the free funds reach, those that waited longest first: nobody later overtakes them."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT min(position) FROM (
                SELECT position, sum(amount_micros) OVER (ORDER BY position) AS until_here
                FROM payouts_plannedpayout WHERE run_id = %s AND outcome = %s
            ) waiting WHERE until_here > %s
            """,
            [run.pk, PlannedPayout.Outcome.WAITING, free_micros(run.currency)],
        )
        (first_unfunded,) = cursor.fetchone()
    return run.n_planned if first_unfunded is None else int(first_unfunded)
