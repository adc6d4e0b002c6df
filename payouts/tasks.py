import logging
from collections.abc import Callable
from functools import partial

from celery import shared_task

from marketplace import clock, jobs
from marketplace.money import MINOR_DIGITS
from payouts import ledger
from payouts.models import (
    BankDetailsNotice,
    BooksProof,
    DebitRefusal,
    DisputeAnswer,
    PayoutRun,
    PayoutShard,
    ReconciliationRun,
    Refund,
    Reminder,
    StatementNotice,
    StatementRun,
    StripeEvent,
    TransferReversal,
)
from payouts.services import (
    balance_checks,
    bank_details,
    closing,
    debits,
    disputes,
    duties,
    events,
    issuing,
    proving,
    reach,
    reconciliation,
    recoveries,
    refunds,
    royalties,
    sales,
    settlements,
    transfers,
)

logger = logging.getLogger(__name__)


@shared_task(acks_late=True)
def apply_stripe_event(event_id: int) -> None:
    """Harmless to run twice, at once, or after a crash."""
    with jobs.claimed(StripeEvent, event_id) as event:
        if event:
            events.apply_event(event)


@shared_task(acks_late=True)
def execute_payout_run(run_id: int) -> None:
    """Harmless to run twice, at once, or after a crash."""
    with jobs.claimed(PayoutRun, run_id) as run:
        if run:
            transfers.execute_payout_run(run)


@shared_task(acks_late=True)
def execute_payout_shard(shard_id: int) -> None:
    """Harmless to run twice, at once, or after a crash."""
    with jobs.claimed(PayoutShard, shard_id) as shard:
        if shard:
            transfers.execute_payout_shard(shard)


@shared_task(acks_late=True)
def execute_refund(refund_id: int) -> None:
    """Harmless to run twice, at once, or after a crash."""
    with jobs.claimed(Refund, refund_id) as refund:
        if refund:
            refunds.execute_refund(refund)


@shared_task(acks_late=True)
def execute_reversal(reversal_id: int) -> None:
    """Harmless to run twice, at once, or after a crash."""
    with jobs.claimed(TransferReversal, reversal_id) as reversal:
        if reversal:
            recoveries.execute_reversal(reversal)


@shared_task(acks_late=True)
def send_dispute_answer(answer_id: int) -> None:
    """Harmless to run twice, at once, or after a crash."""
    with jobs.claimed(DisputeAnswer, answer_id) as answer:
        if answer:
            disputes.send_answer(answer)


@shared_task
def cancel_expired_orders() -> None:
    sales.cancel_expired_orders()


@shared_task
def divide_what_is_ready() -> None:
    royalties.divide_what_is_ready()


@shared_task(acks_late=True)
def send_reminder(reminder_id: int) -> None:
    """Harmless to run twice or at once: a mail that was sent and not noted before a crash is sent again."""
    with jobs.claimed(Reminder, reminder_id) as reminder:
        if reminder:
            duties.send_reminder(reminder)


@shared_task
def follow_up_royalties() -> None:
    duties.follow_up()


@shared_task
def settle_funds() -> None:
    if reconciliation.settle_funds():
        transfers.resume_when_funded()
    recoveries.net_what_became_payable()


@shared_task
def request_daily_payout_runs() -> None:
    """One run per currency and business day, however often beat calls; none while an earlier one waits or works."""
    for currency in MINOR_DIGITS:
        key = f"run:{currency}:{clock.today()}"
        if not transfers.open_runs(currency).exclude(key=key).exists():
            transfers.request_payout_run(currency=currency, key=key)


@shared_task
def take_snapshots() -> None:
    ledger.take_snapshots()


@shared_task
def reconcile() -> None:
    """A look of the clock's, kept like those that staff ask for; every difference is an error in the log, too."""
    run = reconciliation.request_by_the_clock()
    execute_reconciliation(run.pk)


@shared_task(acks_late=True)
def execute_reconciliation(run_id: int) -> None:
    """The sweeps first, for what they find need not be told. What fails before does not keep it from looking."""
    with jobs.claimed(ReconciliationRun, run_id) as run:
        if not run:
            return
        found: list[reconciliation.Difference] = []
        steps: dict[str, Callable[[], object]] = {
            "events": events.retry_failed_events,
            "missed": partial(events.sweep_events, failures=found),
            "unended": refunds.retry_unended,
            "refunds": partial(refunds.sweep_refunds, failures=found),
            "disputes": partial(disputes.sweep_disputes, failures=found),
        }
        for name, step in steps.items():
            try:
                step()
            except Exception as error:
                logger.exception("A sweep failed name=%s", name)
                found.append(reconciliation.Difference("sweep_failed", f"{name}: {error}", subject=name))
        settled = settlements.settled_objects()
        reconciliation.execute_reconciliation(run, also=[one for one in found if one.subject not in settled])


@shared_task(acks_late=True)
def execute_proof(proof_id: int) -> None:
    """Harmless to run twice, at once, or after a crash."""
    with jobs.claimed(BooksProof, proof_id) as proof:
        if proof:
            proving.execute_proof(proof)


@shared_task
def request_daily_proof() -> None:
    proving.request_daily_proof()


@shared_task(acks_late=True)
def send_bank_details_notice(notice_id: int) -> None:
    """Harmless to run twice, at once, or after a crash; a worker that dies right after the mail went out sends it again."""
    with jobs.claimed(BankDetailsNotice, notice_id) as notice:
        if notice:
            bank_details.send_notice(notice)


@shared_task(acks_late=True)
def send_debit_refusal(refusal_id: int) -> None:
    """Harmless to run twice, at once, or after a crash; a worker that dies right after the mail went out sends it again."""
    with jobs.claimed(DebitRefusal, refusal_id) as refusal:
        if refusal:
            debits.send_refusal(refusal)


@shared_task
def check_balances() -> None:
    balance_checks.check_balances()


@shared_task
def ask_served_countries() -> None:
    reach.ask_served_countries()


@shared_task
def close_what_is_over() -> None:
    closing.close_what_is_over()


@shared_task(acks_late=True)
def issue_statements(run_id: int) -> None:
    """Harmless to run twice, at once, or after a crash."""
    with jobs.claimed(StatementRun, run_id) as run:
        if run:
            issuing.issue_statements(run)


@shared_task(acks_late=True)
def send_statement_notice(notice_id: int) -> None:
    """Harmless to run twice, at once, or after a crash; a worker that dies right after the mail went out sends it again."""
    with jobs.claimed(StatementNotice, notice_id) as notice:
        if notice:
            issuing.send_notice(notice)
