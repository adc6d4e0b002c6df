"""Who is owed what, and what has been paid."""

from payouts.models.ledger import Account, BalanceSnapshot, JournalEntry, Posting
from payouts.models.payees import PayeeAccount
from payouts.models.payments import EventSweep, Payment, StripeEvent
from payouts.models.pools import Division, DivisionLine, PayeeCount, RoyaltyPool
from payouts.models.refunds import (
    Clawback,
    ClawbackLine,
    ClawbackUndo,
    Dispute,
    DisputeAnswer,
    Movement,
    Reclaim,
    Refund,
    TransferReversal,
    WriteOff,
)
from payouts.models.royalties import RoyaltyInvoice, RoyaltyInvoiceLine, RoyaltyReport
from payouts.models.transfers import Payout, PayoutMinimum, PayoutRun, PayoutShard, PlannedPayout

__all__ = [
    "Account",
    "BalanceSnapshot",
    "Clawback",
    "ClawbackLine",
    "ClawbackUndo",
    "Dispute",
    "DisputeAnswer",
    "Division",
    "DivisionLine",
    "EventSweep",
    "JournalEntry",
    "Movement",
    "PayeeAccount",
    "PayeeCount",
    "Payment",
    "Payout",
    "PayoutMinimum",
    "PayoutRun",
    "PayoutShard",
    "PlannedPayout",
    "Posting",
    "Reclaim",
    "Refund",
    "RoyaltyInvoice",
    "RoyaltyInvoiceLine",
    "RoyaltyPool",
    "RoyaltyReport",
    "StripeEvent",
    "TransferReversal",
    "WriteOff",
]
