"""What was paid by bank transfer goes back by bank transfer: taken back as a card's refund is, sent and seen by two people."""

from datetime import timedelta
from typing import Any

import pytest
from django.db import DatabaseError, connection, transaction

from marketplace import clock
from marketplace.errors import InvalidInput, NotAllowed
from marketplace.models import AuditEvent, License, Order, User
from marketplace.money import Money
from payouts import ledger
from payouts.errors import AlreadyDecided, FourEyes, NotRefundable
from payouts.models import Document, Payment, Refund
from payouts.selectors import earnings_of, refundable_of_right
from payouts.services import billing, outgoing, receipts, refunds, sales
from payouts.services.plans import free_micros
from payouts.services.proofs import check_books
from payouts.services.reconciliation import reconcile
from tests.factories.marketplace import OfferFactory, OrderFactory, PublishedVersionFactory, UserFactory

DOLLAR = 1_000_000
ADDRESS = {"legal_name": "Carol GmbH", "address": "1 Road\n10115 Berlin", "country": "DE"}


def usd(amount: str) -> Money:
    return Money.parse(amount, "USD")


@pytest.fixture
def ann(db: Any) -> User:
    return UserFactory(is_staff=True)


@pytest.fixture
def ben(db: Any) -> User:
    return UserFactory(is_staff=True)


@pytest.fixture
def order(carol: Any, alice: Any, ann: User, ben: User) -> Order:
    """Carol paid 119 USD by transfer, 19 of it tax: 10 are the platform's, 30 alice's at once, 60 pooled."""
    billing.add_tax_rate(jurisdiction="DE", name="VAT", rate_bps=1_900, valid_from=clock.today(), user=ann)
    billing.set_billing_profile(party=carol, user=carol.user, **ADDRESS)
    version = PublishedVersionFactory(contributions={alice: 4})
    terms = {"platform_fee_bps": 1_000, "upfront_bps": 3_000, "pool_bps": 6_000}
    made: Order = OrderFactory(buyer=carol, offers=[OfferFactory(version=version, price_micros=100 * DOLLAR, **terms)])
    sales.invoice_order(order=made)
    payment = Payment.objects.get()
    told = {"payment": payment, "amount": payment.amount, "reference": "IN 1", "received_on": clock.today()}
    receipts.decide_receipt(receipt=receipts.record_receipt(by=ann, **told), approved=True, by=ben)
    made.refresh_from_db()
    return made


def sent(refund: Refund, by: User, reference: str = "OUT 1") -> Any:
    return outgoing.record_refund_sent(refund=refund, reference=reference, sent_on=clock.today(), by=by)


def balances(*names: str) -> dict[str, int]:
    return {code: micros for name in names for code, micros in ledger.balances(prefix=name).items()}


def test_what_was_paid_by_transfer_goes_back_by_transfer_and_is_seen_by_two(
    order: Order, carol: Any, alice: Any, ann: User, ben: User
) -> None:
    free = free_micros("USD")
    assert refundable_of_right(order) == usd("119")

    refund = refunds.refund_of_right(order=order, user=carol.user)

    assert refunds.refund_of_right(order=order, user=carol.user) == refund
    assert (refund.method, refund.state, refund.status) == ("bank", "intended", "done")
    assert balances("refunding", "refunding_bank", "pool", "payable", "revenue", "tax") == {
        "refunding_bank:USD": -119 * DOLLAR
    }
    assert free_micros("USD") == free  # nothing of it is promised out of what is at Stripe
    assert not License.objects.get().is_live(clock.now())
    assert "Our staff send it by hand" in refund.sentence
    assert check_books().findings == []
    transfer = sent(refund, ann)
    assert sent(refund, ben) == transfer
    assert "a second person" in refund.sentence
    with pytest.raises(FourEyes):
        outgoing.decide_transfer(transfer=transfer, approved=True, by=ann)
    assert not Document.objects.filter(kind="CN").exists() and balances("bank") == {"bank:USD": 119 * DOLLAR}

    for _ in range(2):
        outgoing.decide_transfer(transfer=transfer, approved=True, by=ben)

    refund.refresh_from_db()
    assert refund.state == "sent" and "OUT 1" in refund.sentence
    assert balances("refunding_bank", "bank", "pool", "payable", "revenue", "tax", "clearing") == {}
    note = Document.objects.get(kind="CN")
    assert (note.total, note.tax) == (usd("119"), usd("19"))
    assert any("bank transfer" in line and "OUT 1" in line for line in note.content["notes"])
    order.refresh_from_db()
    assert order.status == "refunded" and refundable_of_right(order) is None
    assert earnings_of(alice)[0].kept.micros == 0
    assert check_books().findings == []
    assert set(AuditEvent.objects.filter(action__contains="transfer").values_list("action", flat=True)) == {
        "transfer.recorded",
        "transfer.booked",
    }


def test_a_transfer_that_came_back_leaves_everything_as_it_was(order: Order, carol: Any, ann: User, ben: User) -> None:
    before = ledger.balances()
    refund = refunds.refund_of_right(order=order, user=carol.user)
    transfer = outgoing.decide_transfer(transfer=sent(refund, ann), approved=True, by=ben)
    with pytest.raises(InvalidInput, match="Say why"):
        outgoing.note_returned(transfer=transfer, reference="IN 9", note=" ", by=ann)

    for _ in range(2):
        outgoing.note_returned(transfer=transfer, reference="IN 9", note="account closed", by=ann)

    refund.refresh_from_db()
    assert refund.state == "failed" and "account closed" in refund.sentence and "Write to us" in refund.sentence
    assert ledger.balances() == before
    assert License.objects.get().is_live(clock.now())
    assert Document.objects.filter(cancels__refund=refund).count() == 1
    assert check_books().findings == []
    again = refunds.refund_of_right(order=order, user=carol.user)  # to another account
    assert again != refund
    outgoing.decide_transfer(transfer=sent(again, ben, "OUT 2"), approved=True, by=ann)
    assert balances("bank") == {} and check_books().findings == []


def test_what_cannot_be_sent_is_refused_with_the_reason(order: Order, carol: Any, ann: User, ben: User) -> None:
    before = ledger.balances()
    refund = refunds.refund_of_right(order=order, user=carol.user)
    transfer = sent(refund, ann)
    with pytest.raises(outgoing.TransferNotPossible, match="reject that record first"):
        outgoing.refuse_refund(refund=refund, note="no account", by=ben)
    outgoing.decide_transfer(
        transfer=transfer, approved=False, by=ann
    )  # nothing left: one's own record may be withdrawn
    with pytest.raises(AlreadyDecided):
        outgoing.decide_transfer(transfer=transfer, approved=True, by=ben)
    with pytest.raises(NotAllowed):
        outgoing.refuse_refund(refund=refund, note="no account", by=carol.user)

    for _ in range(2):
        outgoing.refuse_refund(refund=refund, note="the account that paid is closed", by=ben)

    refund.refresh_from_db()
    assert refund.state == "refused" and "the account that paid is closed" in refund.sentence
    assert ledger.balances() == before and License.objects.get().is_live(clock.now())
    assert check_books().findings == []
    with pytest.raises(outgoing.TransferNotPossible, match="is refused already"):
        sent(refund, ann, "OUT 2")


def test_a_part_of_it_goes_back_from_whom_it_went_to(order: Order, alice: Any, ann: User, ben: User) -> None:
    payment = Payment.objects.get()
    asked = {"payment": payment, "reason": Refund.Reason.GOODWILL, "note": "asked by mail", "user": ann}
    with pytest.raises(NotRefundable, match="is left"):
        refunds.request_refund(**asked, amount=usd("119.01"), key="much")

    one = refunds.request_refund(
        **asked, amount=usd("107.10"), key="one"
    )  # the pool and more than half of what alice got

    assert balances("refunding_bank", "pool") == {"refunding_bank:USD": -107_100_000}
    assert ledger.balance(f"payable:{alice.pk}:USD") == -9 * DOLLAR
    outgoing.decide_transfer(transfer=sent(one, ben), approved=True, by=ann)
    assert balances("bank") == {"bank:USD": 11_900_000}
    assert License.objects.get().is_live(clock.now())  # a price reduction ends nothing
    assert check_books().findings == []


def test_strangers_wrong_days_and_reused_references_are_refused(order: Order, carol: Any, ann: User, ben: User) -> None:
    refund = refunds.refund_of_right(order=order, user=carol.user)

    with pytest.raises(NotAllowed):
        sent(refund, carol.user)
    with pytest.raises(InvalidInput, match="still to come"):
        tomorrow = clock.today() + timedelta(days=1)
        outgoing.record_refund_sent(refund=refund, reference="OUT 1", sent_on=tomorrow, by=ann)
    with pytest.raises(InvalidInput, match="number"):
        sent(refund, ann, " ")
    sent(refund, ann)
    with pytest.raises(outgoing.TransferNotPossible):
        sent(refund, ann, "OUT 2")

    assert refund.transfers.count() == 1 and balances("bank") == {"bank:USD": 119 * DOLLAR}


@pytest.mark.as_owner
def test_the_database_refuses_shortcuts(order: Order, carol: Any, ann: User, ben: User) -> None:
    refund = refunds.refund_of_right(order=order, user=carol.user)
    transfer = sent(refund, ann)
    on = type(transfer).objects.filter(pk=transfer.pk)
    shortcuts: list[Any] = [
        lambda: Refund.objects.filter(pk=refund.pk).update(state="sent"),
        lambda: Refund.objects.filter(pk=refund.pk).update(state="refused"),
        lambda: Refund.objects.filter(pk=refund.pk).update(method="stripe"),
        lambda: on.update(status="booked", decided_by=ann, decided_at=clock.now()),  # their own record
        lambda: on.update(amount_micros=1),
        lambda: on.update(status="returned"),
        lambda: on.delete(),
    ]
    for attempt in shortcuts:
        with pytest.raises(DatabaseError), transaction.atomic():
            attempt()
    outgoing.decide_transfer(transfer=transfer, approved=True, by=ben)
    with pytest.raises(DatabaseError), transaction.atomic():
        on.update(decided_by=ann)
    with connection.cursor() as cursor:  # somebody with the owner's rights
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
        cursor.execute("ALTER TABLE payouts_outgoingtransfer DISABLE TRIGGER USER")
        cursor.execute(
            "UPDATE payouts_outgoingtransfer SET status = 'recorded', decided_by_id = NULL, decided_at = NULL"
        )
    assert {one.code for one in check_books().findings} == {"bank_entry_differs", "refund_differs_from_transfer"}


def test_reconciliation_misses_nothing_at_stripe_and_names_what_people_left(
    order: Order, carol: Any, ann: User, ben: User, stripe: Any
) -> None:
    refund = refunds.refund_of_right(order=order, user=carol.user)
    clock.advance(timedelta(hours=1))
    assert reconcile().differences == []  # it takes longer than Stripe's answer
    clock.advance(timedelta(days=8))
    assert [one.code for one in reconcile().differences] == ["bank_refund_too_long"]

    transfer = sent(refund, ann)
    outgoing.decide_transfer(transfer=transfer, approved=True, by=ben)

    assert reconcile().differences == []
