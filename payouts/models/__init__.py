"""Who is owed what, and what has been paid."""

from payouts.models.billing import BillingProfile, Document, DocumentSeries, TaxRate
from payouts.models.corrections import CorrectionLine, DivisionCorrection
from payouts.models.duties import Reminder, ReportDuty, ReportSchedule
from payouts.models.ledger import Account, BalanceSnapshot, JournalEntry, Posting
from payouts.models.payees import PayeeAccount
from payouts.models.payments import BankReceipt, EventSweep, Payment, StripeEvent
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
    "BankReceipt",
    "BillingProfile",
    "Clawback",
    "ClawbackLine",
    "ClawbackUndo",
    "CorrectionLine",
    "Dispute",
    "DisputeAnswer",
    "Division",
    "DivisionCorrection",
    "DivisionLine",
    "Document",
    "DocumentSeries",
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
    "Reminder",
    "ReportDuty",
    "ReportSchedule",
    "RoyaltyInvoice",
    "RoyaltyInvoiceLine",
    "RoyaltyPool",
    "RoyaltyReport",
    "StripeEvent",
    "TaxRate",
    "TransferReversal",
    "WriteOff",
]
