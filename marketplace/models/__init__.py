"""What is offered, by whom, to whom, and what became of it."""

from marketplace.models.audit import AuditEvent
from marketplace.models.clock import ClockOffset
from marketplace.models.contributions import Contribution, RecordCopy, RecordFingerprint
from marketplace.models.datasets import Attestation, Dataset, DatasetVersion, Upload
from marketplace.models.disclosures import Citation, Disclosure, TrainedModel
from marketplace.models.keys import ApiKey, StaffAct, StaffKey
from marketplace.models.offers import Offer
from marketplace.models.orders import License, Order, OrderLine
from marketplace.models.parties import Invitation, MailOptOut, Membership, Party, User

__all__ = [
    "ApiKey",
    "Attestation",
    "AuditEvent",
    "Citation",
    "ClockOffset",
    "Contribution",
    "Dataset",
    "DatasetVersion",
    "Disclosure",
    "Invitation",
    "License",
    "MailOptOut",
    "Membership",
    "Offer",
    "Order",
    "OrderLine",
    "Party",
    "RecordCopy",
    "RecordFingerprint",
    "StaffAct",
    "StaffKey",
    "TrainedModel",
    "Upload",
    "User",
]
