"""Who is owed what, and what has been paid."""

from payouts.models.bank import OutgoingTransfer, ReceiptApplication, ReceiptUse
from payouts.models.bank_details import BankDetails, BankDetailsErasure, BankDetailsNotice
from payouts.models.billing import BillingProfile, Document, DocumentSeries, TaxRate
from payouts.models.closing import BalanceCheck, ClosedBalance, ClosedPeriod, ManualDecision, ManualEntry, ManualLeg
from payouts.models.corrections import CorrectionLine, DivisionCorrection
from payouts.models.duties import Reminder, ReportDuty, ReportSchedule
from payouts.models.ledger import Account, BalanceSnapshot, JournalEntry, Posting
from payouts.models.payees import PayeeAccount
from payouts.models.payments import (
    BankReceipt,
    DebitRefusal,
    EventSettlement,
    EventSweep,
    Payment,
    StripeEvent,
    SurplusCharge,
)
from payouts.models.pools import Division, DivisionLine, PayeeCount, RoyaltyPool
from payouts.models.rails import RailConfirmation, RailExport, RailPayout, ServedCountries
from payouts.models.reconciliation import BooksProof, ProofFinding, ReconciliationDifference, ReconciliationRun
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
from payouts.models.statements import (
    IssuedStatement,
    StatementBalance,
    StatementNotice,
    StatementRun,
    StatementTotal,
)
from payouts.models.transfers import ApprovalLimit, Payout, PayoutMinimum, PayoutRun, PayoutShard, PlannedPayout

__all__ = [
    "Account",
    "ApprovalLimit",
    "BalanceCheck",
    "BalanceSnapshot",
    "BankDetails",
    "BankDetailsErasure",
    "BankDetailsNotice",
    "BankReceipt",
    "BillingProfile",
    "BooksProof",
    "Clawback",
    "ClawbackLine",
    "ClawbackUndo",
    "ClosedBalance",
    "ClosedPeriod",
    "CorrectionLine",
    "DebitRefusal",
    "Dispute",
    "DisputeAnswer",
    "Division",
    "DivisionCorrection",
    "DivisionLine",
    "Document",
    "DocumentSeries",
    "EventSettlement",
    "EventSweep",
    "IssuedStatement",
    "JournalEntry",
    "ManualDecision",
    "ManualEntry",
    "ManualLeg",
    "Movement",
    "OutgoingTransfer",
    "PayeeAccount",
    "PayeeCount",
    "Payment",
    "Payout",
    "PayoutMinimum",
    "PayoutRun",
    "PayoutShard",
    "PlannedPayout",
    "Posting",
    "ProofFinding",
    "RailConfirmation",
    "RailExport",
    "RailPayout",
    "ReceiptApplication",
    "ReceiptUse",
    "Reclaim",
    "ReconciliationDifference",
    "ReconciliationRun",
    "Refund",
    "Reminder",
    "ReportDuty",
    "ReportSchedule",
    "RoyaltyInvoice",
    "RoyaltyInvoiceLine",
    "RoyaltyPool",
    "RoyaltyReport",
    "ServedCountries",
    "StatementBalance",
    "StatementNotice",
    "StatementRun",
    "StatementTotal",
    "StripeEvent",
    "SurplusCharge",
    "TaxRate",
    "TransferReversal",
    "WriteOff",
]
