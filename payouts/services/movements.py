"""Stripe's balance transactions of refunds, disputes, reversals and surplus charges: each booked once, and settled when its funds count."""

import logging
from collections.abc import Mapping
from datetime import datetime

from django.db import transaction

from marketplace import clock
from marketplace.money import Money
from payouts import chart, gateway, ledger
from payouts.models import Dispute, JournalEntry, Movement, Refund, SurplusCharge, TransferReversal

logger = logging.getLogger(__name__)


def record(
    theirs: gateway.BalanceTransaction,
    *,
    kind: Movement.Kind,
    entry_kind: JournalEntry.Kind,
    against: str,
    fees_to: str,
    refund: Refund | None = None,
    dispute: Dispute | None = None,
    reversal: TransferReversal | None = None,
    surplus: SurplusCharge | None = None,
) -> bool:
    """Inside the transaction that holds its cause: book one of Stripe's movements, once.

    Args:
        against: the account that the amount is for; cash takes the amount less the fee.
        fees_to: the account of what Stripe keeps.

    Returns:
        Whether it was new.
    """
    if Movement.objects.filter(balance_transaction_id=theirs.id).exists():
        return False
    amount = Money.from_minor(theirs.amount_minor, theirs.currency).micros
    fee = Money.from_minor(theirs.fee_minor, theirs.currency).micros
    now = clock.now()
    Movement.objects.create(
        kind=kind,
        balance_transaction_id=theirs.id,
        refund=refund,
        dispute=dispute,
        reversal=reversal,
        surplus=surplus,
        amount_micros=amount,
        fee_micros=fee,
        currency=theirs.currency,
        available_on=theirs.available_on,
        is_booked_available=theirs.is_available,
        booked_at=now,
        settled_at=now if theirs.is_available else None,
    )
    cash = chart.cash_available if theirs.is_available else chart.cash_pending
    legs: Mapping[str, int] = {cash(theirs.currency): amount - fee, fees_to: fee, against: -amount}
    ledger.post(key=f"movement:{theirs.id}", kind=entry_kind, postings=legs, booked_at=now)
    logger.info("Booked movement=%s kind=%s net=%s %s", theirs.id, kind, amount - fee, theirs.currency)
    return True


def settle(movement: Movement, *, at: datetime) -> bool:
    """Book that a movement's funds count as available now, once."""
    with transaction.atomic():
        held = Movement.objects.select_for_update().get(pk=movement.pk)
        if held.settled_at is not None:
            return False
        held.settled_at = at
        held.save(update_fields=["settled_at"])
        ledger.post(
            key=f"settle:movement:{held.balance_transaction_id}",
            kind=JournalEntry.Kind.SETTLE,
            postings={
                chart.cash_available(held.currency): held.net_micros,
                chart.cash_pending(held.currency): -held.net_micros,
            },
            booked_at=at,
        )
    logger.info("Settled movement=%s net=%s", held.balance_transaction_id, held.net_micros)
    return True
