from marketplace.errors import DomainError


class NotFound(DomainError):
    """It does not exist, or it is not the party's to see; the two are answered alike."""

    code = "not_found"
    status = 404


class ResultNotPublished(DomainError):
    """Its shares may still change."""

    code = "result_not_published"


class NoResultYet(DomainError):
    """Nothing says yet what the model owes to whom."""

    code = "no_result_yet"


class PeriodOverlaps(DomainError):
    """The model's revenue in part of the period has been reported already."""

    code = "period_overlaps"


class AlreadyPaid(DomainError):
    """There is nothing left to pay."""

    code = "already_paid"


class PaymentUnderWay(DomainError):
    """The buyer's bank is still confirming a debit; until it has answered nothing else can be paid for the same."""

    code = "payment_under_way"


class SettlementNotPossible(DomainError):
    """The event cannot be settled so, or not now; nothing was changed."""

    code = "settlement_not_possible"


class PaymentMismatch(DomainError):
    """Stripe took money that is not what was asked for; a person must look before anything is booked."""

    code = "payment_mismatch"


class TransferMismatch(DomainError):
    """Stripe made a transfer that is not what was intended; a person must look before anything more is booked of it."""

    code = "transfer_mismatch"


class PayeeNotServed(DomainError):
    """Stripe does not reach the payee's country; the money accrues."""

    code = "payee_not_served"
    status = 422


class StripeUnavailable(DomainError):
    """Stripe did not answer, or not clearly; nothing was charged, and trying again is safe."""

    code = "stripe_unavailable"
    status = 503


class StripeDeclined(DomainError):
    """Stripe refused what was asked of it."""

    code = "stripe_declined"
    status = 422


class NotRefundable(DomainError):
    """There is nothing left to give back, or the right to it has ended; nothing was refunded."""

    code = "not_refundable"


class NothingOwed(DomainError):
    """The party owes nothing, or less than that."""

    code = "nothing_owed"


class DisputeNotAnswerable(DomainError):
    """The bank takes no answer any more, or has ours."""

    code = "dispute_not_answerable"


class PayoutRunNotStoppable(DomainError):
    """The run is not in the state from which this can be done to it; nothing was changed."""

    code = "payout_run_state"


class CorrectionNotPossible(DomainError):
    """The division cannot be corrected as asked, or not now; nothing was booked."""

    code = "correction_not_possible"


class ReportNotCorrectable(DomainError):
    """The report was replaced, or its money is on its way; nothing was written."""

    code = "report_not_correctable"


class PayByBankTransfer(DomainError):
    """More than Stripe takes at once: it is paid by bank transfer, by invoice."""

    code = "pay_by_bank_transfer"
    status = 422


class ReceiptNotPossible(DomainError):
    """The transfer does not fit what is asked for, or was decided already; nothing was booked."""

    code = "receipt_not_possible"


class BankDetailsInUse(DomainError):
    """A transfer to the account is under way; nothing was erased."""

    code = "bank_details_in_use"


class PaidByStripe(DomainError):
    """Stripe reaches the payee; no bank account is kept here."""

    code = "paid_by_stripe"


class TransferNotPossible(DomainError):
    """It is not ours to send, or was sent, or less is left; nothing was written."""

    code = "transfer_not_possible"


class BankShort(DomainError):
    """Our bank account would not hold what is promised out of it any more; nothing was booked."""

    code = "bank_short"


class PeriodClosed(DomainError):
    """The month is closed; a correction is booked in an open one."""

    code = "period_closed"


class NotClosable(DomainError):
    """The month is not over, another one comes first, or something in it is still open."""

    code = "not_closable"


class FourEyes(DomainError):
    """Two people have to look at it: whoever proposed, recorded or started it cannot also approve it."""

    code = "four_eyes"
    status = 403


class AlreadyDecided(DomainError):
    """Another one of the staff was first."""

    code = "already_decided"


class EventNotFailed(DomainError):
    """Only what failed is tried again; nothing was changed."""

    code = "event_not_failed"
