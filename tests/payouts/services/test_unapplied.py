"""Money in our bank account that fits no invoice: held for its payer, applied exactly, or sent back; always seen by two."""

from datetime import timedelta
from typing import Any

import pytest
from django.db import DatabaseError, transaction

from marketplace import clock
from marketplace.errors import InvalidInput, NotAllowed
from marketplace.models import AuditEvent, License, Order, User
from marketplace.money import Money
from payouts import ledger
from payouts.errors import AlreadyPaid, FourEyes, ReceiptNotPossible, TransferNotPossible
from payouts.models import BankReceipt, Payment, ReceiptApplication, ReceiptUse
from payouts.services import billing, outgoing, receipts, refunds, sales, unapplied
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
def order(carol: Any, alice: Any) -> Order:
    """Invoiced to carol: 100 USD."""
    billing.set_billing_profile(party=carol, user=carol.user, **ADDRESS)
    offer = OfferFactory(version=PublishedVersionFactory(contributions={alice: 1}), price_micros=100 * DOLLAR)
    made: Order = OrderFactory(buyer=carol, offers=[offer])
    sales.invoice_order(order=made)
    return made


def arrived(amount: str, ann: User, ben: User, reference: str = "IN 1", **changes: Any) -> BankReceipt:
    """Money that fits no invoice, seen by two."""
    told = {"payer": "CAROL GMBH", "amount": usd(amount), "reference": reference, "received_on": clock.today()}
    receipt = unapplied.record_unapplied(by=ann, **told | changes)
    return receipts.decide_receipt(receipt=receipt, approved=True, by=ben)


def test_it_is_held_for_its_payer_once_two_have_seen_it(carol: Any, ann: User, ben: User) -> None:
    told = {"payer": " CAROL  GMBH ", "amount": usd("60"), "reference": "IN 1", "received_on": clock.today()}
    with pytest.raises(NotAllowed):
        unapplied.record_unapplied(by=carol.user, **told)
    receipt = unapplied.record_unapplied(by=ann, note="half of INV-1?", **told)
    assert unapplied.record_unapplied(by=ben, **told) == receipt
    assert ledger.balances() == {} and receipt.left == usd("0")
    with pytest.raises(FourEyes, match="Somebody else"):
        receipts.decide_receipt(receipt=receipt, approved=True, by=ann)

    for _ in range(2):
        receipts.decide_receipt(receipt=receipt, approved=True, by=ben)
    clock.advance(timedelta(days=12))

    assert ledger.balances() == {"bank:USD": 60 * DOLLAR, "unapplied:USD": -60 * DOLLAR}
    assert [(one.receipt.payer, one.left, one.days) for one in unapplied.with_age(unapplied.unapplied())] == [
        ("CAROL GMBH", usd("60"), 12)
    ]
    assert check_books().findings == []
    assert AuditEvent.objects.filter(target=f"receipt:{receipt.pk}").count() == 2


def test_a_partial_and_the_rest_pay_an_invoice_together_and_what_is_over_stays(
    order: Order, ann: User, ben: User
) -> None:
    payment = Payment.objects.get()
    first = arrived("60", ann, ben)
    with pytest.raises(InvalidInput, match=r"40\.00 USD is missing"):
        unapplied.propose_application(payment=payment, money=[first], by=ann)
    clock.advance(timedelta(days=1))
    second = arrived("55", ann, ben, "IN 2")

    proposed = unapplied.propose_application(payment=payment, money=[second, first], by=ann)

    assert unapplied.propose_application(payment=payment, money=[first, second], by=ben) == proposed
    assert sales.cancel_expired_orders() == 0 and License.objects.count() == 0
    with pytest.raises(FourEyes):
        unapplied.decide_application(application=proposed, approved=True, by=ann)
    for _ in range(2):
        unapplied.decide_application(application=proposed, approved=True, by=ben)
    order.refresh_from_db()
    assert (order.status, Payment.objects.get().method, License.objects.count()) == ("paid", "bank", 1)
    assert [(one.receipt, one.left) for one in unapplied.with_age(unapplied.unapplied())] == [(second, usd("15"))]
    assert ledger.balance("bank:USD") == 115 * DOLLAR and ledger.balance("unapplied:USD") == -15 * DOLLAR
    assert check_books().findings == []
    # And what it paid goes back like any other that was paid by transfer.
    refund = refunds.refund_of_right(order=order, user=order.buyer.memberships.get().user)
    transfer = outgoing.record_refund_sent(refund=refund, reference="OUT 1", sent_on=clock.today(), by=ann)
    outgoing.decide_transfer(transfer=transfer, approved=True, by=ben)
    assert ledger.balance("bank:USD") == 15 * DOLLAR and check_books().findings == []


def test_a_rejected_application_frees_the_money_and_the_invoice(order: Order, ann: User, ben: User) -> None:
    payment = Payment.objects.get()
    receipt = arrived("100", ann, ben)
    proposed = unapplied.propose_application(payment=payment, money=[receipt], by=ann)
    assert BankReceipt.objects.get().left == usd("0")
    told = {"payment": payment, "amount": usd("100"), "reference": "IN 2", "received_on": clock.today(), "by": ann}

    unapplied.decide_application(application=proposed, approved=False, by=ann)
    other = receipts.record_receipt(**told)
    with pytest.raises(ReceiptNotPossible, match="waits for a second person"):
        unapplied.propose_application(payment=payment, money=[receipt], by=ann)
    receipts.decide_receipt(receipt=other, approved=True, by=ben)
    with pytest.raises(AlreadyPaid):
        unapplied.propose_application(payment=payment, money=[receipt], by=ann)

    assert BankReceipt.objects.get(pk=receipt.pk).left == usd("100")
    assert check_books().findings == []


def test_it_goes_back_to_its_payer_in_part_and_a_return_that_fails_is_here_again(ann: User, ben: User) -> None:
    receipt = arrived("60", ann, ben)
    sent = {"receipt": receipt, "sent_on": clock.today(), "by": ann}
    with pytest.raises(TransferNotPossible, match="is left"):
        outgoing.record_money_returned(amount=usd("60.01"), reference="OUT 1", **sent)
    with pytest.raises(InvalidInput):
        outgoing.record_money_returned(amount=Money.parse("1", "EUR"), reference="OUT 1", **sent)
    one = outgoing.record_money_returned(amount=usd("45"), reference="OUT 1", **sent)
    assert outgoing.record_money_returned(amount=usd("45"), reference="OUT 1", **sent) == one
    with pytest.raises(FourEyes):
        outgoing.decide_transfer(transfer=one, approved=True, by=ann)

    outgoing.decide_transfer(transfer=one, approved=True, by=ben)

    assert ledger.balances() == {"bank:USD": 15 * DOLLAR, "unapplied:USD": -15 * DOLLAR}
    assert check_books().findings == []
    outgoing.note_returned(transfer=one, reference="IN 7", note="no such account", by=ben)
    assert BankReceipt.objects.get().left == usd("60")
    assert ledger.balances() == {"bank:USD": 60 * DOLLAR, "unapplied:USD": -60 * DOLLAR}
    assert check_books().findings == []


def test_one_line_of_the_statement_is_one_receipt_and_what_does_not_match_says_where_it_goes(
    order: Order, ann: User, ben: User
) -> None:
    payment = Payment.objects.get()
    told = {"payment": payment, "reference": "IN 1", "received_on": clock.today(), "by": ann}
    for amount in ("99.99", "100.01"):
        with pytest.raises(InvalidInput, match="fits no invoice"):
            receipts.record_receipt(amount=usd(amount), **told)
    arrived("100", ann, ben, payer="X")
    with pytest.raises(ReceiptNotPossible):
        receipts.record_receipt(amount=usd("100"), **told)
    for payer, amount in (("Y", "100"), ("X", "7")):
        with pytest.raises(ReceiptNotPossible):
            arrived(amount, ann, ben, payer=payer)
    for payer, amount, reference in ((" ", "5", "IN 5"), ("X", "0", "IN 5"), ("X", "5", "")):
        with pytest.raises(InvalidInput):
            arrived(amount, ann, ben, reference, payer=payer)

    assert BankReceipt.objects.count() == 1


def test_money_that_came_too_late_is_set_apart_and_sent_back(order: Order, ann: User, ben: User) -> None:
    payment = Payment.objects.get()
    receipt = arrived("100", ann, ben)
    clock.advance(timedelta(days=60))
    assert sales.cancel_expired_orders() == 1

    with pytest.raises(ReceiptNotPossible, match="nobody owes it"):
        unapplied.propose_application(payment=payment, money=[receipt], by=ann)
    transfer = outgoing.record_money_returned(
        receipt=receipt, amount=usd("100"), reference="OUT 1", sent_on=clock.today(), by=ann
    )
    outgoing.decide_transfer(transfer=transfer, approved=True, by=ben)

    assert ledger.balances() == {} and list(unapplied.unapplied()) == []
    assert check_books().findings == []


def test_the_database_refuses_more_than_there_is(order: Order, carol: Any, alice: Any, ann: User, ben: User) -> None:
    payment = Payment.objects.get()
    receipt = arrived("60", ann, ben)
    waiting = unapplied.record_unapplied(
        payer="X", amount=usd("100"), reference="IN 2", received_on=clock.today(), by=ann
    )
    given = {"payment": payment, "amount_micros": 100 * DOLLAR, "currency": "USD", "proposed_by": ann}

    def apply(of: BankReceipt, micros: int) -> None:
        made = ReceiptApplication.objects.create(proposed_at=clock.now(), **given)
        ReceiptUse.objects.create(application=made, receipt=of, amount_micros=micros)
        transaction.set_rollback(False)
        with transaction.get_connection().cursor() as cursor:
            cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")

    attempts: list[Any] = [
        lambda: apply(receipt, 61 * DOLLAR),
        lambda: apply(receipt, 60 * DOLLAR),  # not exact
        lambda: apply(waiting, 100 * DOLLAR),  # nobody confirmed it
        lambda: outgoing.OutgoingTransfer.objects.create(
            receipt=receipt,
            amount_micros=61 * DOLLAR,
            currency="USD",
            reference="x",
            sent_on=clock.today(),
            recorded_by=ann,
            recorded_at=clock.now(),
        ),
    ]
    for attempt in attempts:
        with pytest.raises(DatabaseError), transaction.atomic():
            attempt()
    assert not ReceiptApplication.objects.exists()


def test_old_money_is_named_and_pays_no_payee(order: Order, ann: User, ben: User, stripe: Any) -> None:
    arrived("60", ann, ben)
    assert reconcile().differences == []
    clock.advance(timedelta(days=31))

    assert [(one.code, one.amount) for one in reconcile().differences] == [("unapplied_too_long", usd("60"))]


def test_two_who_apply_the_same_money_at_once_do_it_once(committed_db: str) -> None:
    from tests.factories.marketplace import PartyFactory
    from tests.marketplace.services.test_orders import at_once

    ann, ben = UserFactory(is_staff=True), UserFactory(is_staff=True)
    payments = []
    for _ in range(3):
        buyer = PartyFactory()
        billing.set_billing_profile(party=buyer, user=None, **ADDRESS)
        made = OrderFactory(buyer=buyer, offers=[OfferFactory(price_micros=100 * DOLLAR)])
        sales.invoice_order(order=made)
        payments.append(Payment.objects.get(order=made))
    receipt = arrived("150", ann, ben)

    def propose(n: int) -> object:
        try:
            return unapplied.propose_application(payment=payments[n], money=[receipt], by=ann).pk
        except InvalidInput:
            return None

    made_ones = [one for one in at_once(3, propose) if one is not None]

    assert len(made_ones) == ReceiptApplication.objects.count() == 1
    assert BankReceipt.objects.get().left == usd("50")
