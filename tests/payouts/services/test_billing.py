"""Taxes, numbered documents, and orders that are paid by invoice."""

from datetime import timedelta
from typing import Any

import pytest
from django.db import IntegrityError, connection, transaction

from marketplace import clock, jobs
from marketplace.errors import InvalidInput, NotAllowed
from marketplace.models import License, Order, User
from marketplace.money import MAX_CHARGE_MINOR, Money
from marketplace.services.orders import OrderNotPayable
from payouts import books, ledger
from payouts.errors import AlreadyPaid, FourEyes, PayByBankTransfer, ReceiptNotPossible
from payouts.models import BankReceipt, Document, DocumentSeries, Payment, Refund, TaxRate
from payouts.services import billing, documents, manual_entries, receipts, refunds, sales
from payouts.services.events import apply_event, book_checkout
from payouts.services.proofs import check_books
from payouts.services.reconciliation import reconcile
from tests.factories.marketplace import OfferFactory, OrderFactory, PublishedVersionFactory
from tests.factories.payouts import sell

DOLLAR = 1_000_000
URLS = {"success_url": "http://a.test/", "cancel_url": "http://a.test/"}
ADDRESS = {"legal_name": "Carol GmbH", "address": "1 Road\n10115 Berlin", "country": "DE"}


def usd(amount: str) -> Money:
    return Money.parse(amount, "USD")


@pytest.fixture
def people(db: Any) -> tuple[User, User]:
    one, two = (
        User.objects.create_user(f"{name}@example.org", "correct horse battery staple", is_staff=True)
        for name in ("fay", "gil")
    )
    return one, two


@pytest.fixture
def vat(people: Any) -> TaxRate:
    return billing.add_tax_rate(
        jurisdiction="DE", name="VAT", rate_bps=1_900, valid_from=clock.today(), is_reversed=True, user=people[0]
    )


def order_of(carol: Any, alice: Any, *prices: int) -> Order:
    """10 % fee, 30 % upfront and 60 % pooled."""
    offers = [
        OfferFactory(
            version=PublishedVersionFactory(contributions={alice: 4}),
            price_micros=price * DOLLAR,
            platform_fee_bps=1_000,
            upfront_bps=3_000,
            pool_bps=6_000,
        )
        for price in prices
    ]
    made: Order = OrderFactory(buyer=carol, offers=offers)
    return made


def finish(refund: Refund) -> None:
    with jobs.claimed(Refund, refund.pk) as held:
        assert held
        refunds.execute_refund(held)


# --- tax --------------------------------------------------------------------------------------------------------------


def test_tax_is_a_posting_of_its_own_and_goes_back_in_proportion(
    carol: Any, alice: Any, vat: TaxRate, people: Any, stripe: Any
) -> None:
    order = order_of(carol, alice, 70, 30)
    stripe.pay(sales.start_checkout(order=order, purchase_order=" PO-7 ", **URLS))
    payment = book_checkout(Payment.objects.get().checkout_id)
    assert payment is not None
    assert (payment.amount, payment.tax, payment.net) == (usd("119"), usd("19"), usd("100"))
    tax = f"tax:{vat.pk}:USD"
    assert {code: ledger.balance(code) for code in (tax, "revenue:platform_fee:USD")} == {
        tax: -19 * DOLLAR,
        "revenue:platform_fee:USD": -10 * DOLLAR,
    }
    assert -sum(ledger.balances(prefix="pool").values()) == 60 * DOLLAR
    asked = {"payment": payment, "reason": Refund.Reason.GOODWILL, "note": "asked", "user": people[0]}

    finish(refunds.request_refund(**asked, amount=usd("39.67"), key="one"))

    note = Document.objects.get(kind="CN")
    assert (note.total, note.net + note.tax) == (usd("39.67"), usd("39.67"))
    assert abs(note.tax_micros - 39_670_000 * 19 // 119) <= 2
    assert ledger.balance(tax) == note.tax_micros - 19 * DOLLAR
    legs = {tax: 10 * DOLLAR, "bank:USD": -10 * DOLLAR}
    handed = manual_entries.propose(user=people[0], key="tax", legs=legs, reason="Handed to its office.")
    manual_entries.approve(manual=handed, user=people[1])
    finish(refunds.request_refund(**asked, amount=usd("79.33"), key="two"))
    assert ledger.balances(prefix="tax") == {tax: 10 * DOLLAR}  # the office's to give back
    assert ledger.balances(prefix="pool") == ledger.balances(prefix="payable") == {}
    (trial,) = books.trial_balance(as_of=clock.now() + timedelta(days=1))
    assert trial.assets == trial.for_others + trial.own_revenue + trial.owners
    assert Order.objects.get().status == "refunded"
    assert check_books().findings == []
    assert reconcile().differences == []


def test_no_tax_without_a_rate_and_none_for_a_buyer_who_owes_it_itself(carol: Any, alice: Any, people: Any) -> None:
    assert billing.tax_on(usd("10.01"), party=carol) == billing.Tax(usd("0"), None)
    rate = billing.add_tax_rate(
        jurisdiction="DE", name="VAT", rate_bps=1_900, valid_from=clock.today(), is_reversed=True, user=people[0]
    )
    assert billing.tax_on(usd("10.01"), party=carol) == billing.Tax(usd("1.90"), rate)
    assert billing.tax_on(Money.parse("500", "JPY"), party=carol).amount == Money.parse("95", "JPY")
    billing.set_billing_profile(party=carol, user=carol.user, vat_id="de 136 695 976", **ADDRESS)

    payment = sell_asked(order_of(carol, alice, 50))

    document = Document.objects.get()
    assert (payment.tax_micros, document.vat_id, document.tax_micros) == (0, "DE136695976", 0)
    assert "Reverse charge: VAT is owed by the recipient." in document.content["notes"]


def sell_asked(order: Order) -> Payment:
    """Paid as it was asked for, tax and number included."""
    sales._ask_for(order, purchase_order="PO-9")
    return sell(order)


def test_rates_are_valid_on_their_days_and_never_overlap(carol: Any, people: Any) -> None:
    today = clock.today()
    first = billing.add_tax_rate(
        jurisdiction="DE",
        name="VAT",
        rate_bps=1_900,
        valid_from=today,
        valid_until=today + timedelta(days=9),
        user=people[0],
    )
    later = billing.add_tax_rate(
        jurisdiction="DE", name="VAT", rate_bps=700, valid_from=today + timedelta(days=10), user=people[0]
    )
    for changes in (
        {"valid_from": today + timedelta(days=9)},
        {"rate_bps": 0, "jurisdiction": "FR"},
        {"jurisdiction": "Germany"},
        {"jurisdiction": "FR", "valid_from": today - timedelta(days=1)},
    ):
        asked = {"jurisdiction": "DE", "name": "VAT", "rate_bps": 500, "valid_from": today} | changes
        with pytest.raises(InvalidInput):
            billing.add_tax_rate(user=people[0], **asked)
    with pytest.raises(NotAllowed):
        billing.add_tax_rate(jurisdiction="FR", name="VAT", rate_bps=1, valid_from=today, user=carol.user)
    with pytest.raises(IntegrityError, match="kept as it is"), transaction.atomic():
        TaxRate.objects.filter(pk=first.pk).update(rate_bps=1)

    rates = [
        billing.tax_on(usd("100"), party=carol, on=today + timedelta(days=days)).rate for days in (-1, 0, 9, 10, 999)
    ]
    assert rates == [None, first, first, later, later]


def test_a_regions_rate_comes_before_its_countrys(carol: Any, people: Any) -> None:
    for place, rate in (("US", 100), ("US-CA", 725)):
        billing.add_tax_rate(
            jurisdiction=place, name="Sales tax", rate_bps=rate, valid_from=clock.today(), user=people[0]
        )
    billing.set_billing_profile(party=carol, user=carol.user, **ADDRESS | {"country": "US", "region": "us-ca"[3:]})

    assert billing.tax_on(usd("100"), party=carol).amount == usd("7.25")


@pytest.mark.parametrize(
    ("country", "given", "kept"),
    [
        ("DE", "DE136695976", "DE136695976"),
        ("DE", "136 695 976", "DE136695976"),
        ("GR", "EL094259216", "EL094259216"),
        ("GB", "GB 980 7806 84", "GB980780684"),
        ("CH", "CHE-107.787.577 MWST", "CHE107787577MWST"),
        ("US", "12-3456789", "123456789"),
        ("DE", " ", ""),
    ],
)
def test_vat_ids_are_kept_in_one_form(country: str, given: str, kept: str) -> None:
    assert billing.checked_vat_id(given, country=country) == kept


@pytest.mark.parametrize(
    ("country", "given"), [("DE", "DE136695978"), ("DE", "FR40303265045"), ("GB", "GB1"), ("US", "?")]
)
def test_what_is_no_vat_id_of_the_country_is_refused(country: str, given: str, carol: Any) -> None:
    with pytest.raises(InvalidInput) as refused:
        billing.set_billing_profile(party=carol, user=carol.user, vat_id=given, **ADDRESS | {"country": country})

    assert list(refused.value.pointers) == ["/vat_id"]
    assert not hasattr(carol, "billing_profile")


# --- documents --------------------------------------------------------------------------------------------------------


@pytest.mark.as_owner
def test_a_paid_order_has_one_invoice_that_nobody_can_change(carol: Any, alice: Any) -> None:
    payment = sell_asked(order_of(carol, alice, 50))

    document = documents.issue_invoice(payment)  # again

    assert Document.objects.get() == document
    assert (document.reference, document.purchase_order, document.total) == (
        f"INV-{clock.today().year}-000001",
        "PO-9",
        usd("50"),
    )
    for change in ("UPDATE payouts_document SET purchase_order = 'X'", "DELETE FROM payouts_document"):
        with pytest.raises(IntegrityError, match="append-only"), transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(change)
    with pytest.raises(IntegrityError, match="goes on by one"), transaction.atomic():
        DocumentSeries.objects.update(last_number=7)
    with pytest.raises(IntegrityError, match="has no document 2"), transaction.atomic():
        DocumentSeries.objects.update(last_number=2)
        with connection.cursor() as cursor:
            cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
    assert check_books().findings == []


def test_numbers_have_no_gaps_whatever_fails_and_begin_anew_each_year(carol: Any, alice: Any) -> None:
    year = clock.today().year
    sell(order_of(carol, alice, 50))
    with pytest.raises(RuntimeError), transaction.atomic():
        sell(order_of(carol, alice, 50))
        raise RuntimeError
    sell(order_of(carol, alice, 50))
    clock.advance(timedelta(days=370))
    sell(order_of(carol, alice, 50))

    assert list(Document.objects.order_by("pk").values_list("year", "number")) == [
        (year, 1),
        (year, 2),
        (clock.today().year, 1),
    ]


def test_two_sales_at_once_get_consecutive_numbers(committed_db: str) -> None:
    from tests.factories.marketplace import PartyFactory
    from tests.marketplace.services.test_orders import at_once

    orders = [order_of(PartyFactory(), PartyFactory(), 50) for _ in range(4)]

    at_once(4, lambda n: sell(orders[n]).pk)

    assert sorted(Document.objects.values_list("number", flat=True)) == [1, 2, 3, 4]


def test_the_pdf_says_what_was_issued_and_reads_no_markup(carol: Any, alice: Any) -> None:
    billing.set_billing_profile(party=carol, user=carol.user, **ADDRESS | {"legal_name": '#panic("no") & *Söhne*'})
    document = documents.issue_invoice(sell_asked(order_of(carol, alice, 50)))

    first, second = documents.render_pdf(document), documents.render_pdf(document)

    assert first.startswith(b"%PDF-") and first == second


# --- orders by invoice ------------------------------------------------------------------------------------------------


def test_an_order_is_invoiced_and_paid_by_a_transfer_that_two_people_saw(carol: Any, alice: Any, people: Any) -> None:
    order = order_of(carol, alice, 1_000_001)  # above what a card pays at once
    with pytest.raises(PayByBankTransfer):
        sales.start_checkout(order=order, **URLS)
    with pytest.raises(InvalidInput, match="billing address"):
        sales.invoice_order(order=order)
    billing.set_billing_profile(party=carol, user=carol.user, **ADDRESS)

    document = sales.invoice_order(order=order, purchase_order="PO-1")
    assert sales.invoice_order(order=order) == document
    clock.advance(timedelta(days=20))  # a day would have cancelled what is paid by card
    assert sales.cancel_expired_orders() == 0
    payment = Payment.objects.get()
    told = {"payment": payment, "reference": "2026-11 / 4711", "received_on": clock.today()}
    with pytest.raises(InvalidInput, match="arrived"):
        receipts.record_receipt(amount=usd("1000000.99"), by=people[0], **told)
    receipt = receipts.record_receipt(amount=payment.amount, by=people[0], **told)
    assert receipts.record_receipt(amount=payment.amount, by=people[1], **told) == receipt
    assert License.objects.count() == 0
    with pytest.raises(FourEyes, match="Somebody else"):
        receipts.decide_receipt(receipt=receipt, approved=True, by=people[0])
    with pytest.raises(IntegrityError, match="receipt_needs_a_second_person"), transaction.atomic():
        BankReceipt.objects.update(status="booked", decided_by=people[0], decided_at=clock.now())

    for _ in range(2):
        receipts.decide_receipt(receipt=receipt, approved=True, by=people[1])

    order.refresh_from_db()
    assert (order.status, License.objects.count(), Document.objects.count()) == ("paid", 1, 1)
    assert ledger.balances(prefix="bank") == {"bank:USD": 1_000_001 * DOLLAR} and not ledger.balances(prefix="cash")
    assert check_books().findings == []
    assert refunds.refund_of_right(order=order, user=carol.user).method == "bank"
    assert check_books().findings == []


def test_an_invoiced_order_keeps_its_terms_and_may_still_be_paid_by_card(
    carol: Any, alice: Any, stripe: Any, people: Any
) -> None:
    order = order_of(carol, alice, 50)
    billing.set_billing_profile(party=carol, user=carol.user, **ADDRESS)
    sales.invoice_order(order=order)
    OfferFactory(version=order.lines.get().version, price_micros=99 * DOLLAR)  # its price rises meanwhile

    stripe.pay(sales.start_checkout(order=order, **URLS))
    book_checkout(Payment.objects.get().checkout_id)

    assert Order.objects.get().status == "paid"
    with pytest.raises(AlreadyPaid):
        receipts.record_receipt(
            payment=Payment.objects.get(), amount=usd("50"), reference="1", received_on=clock.today(), by=people[0]
        )
    assert check_books().findings == []
    assert reconcile().differences == []


def test_stripes_event_of_a_bank_transfer_marks_an_invoice_paid(carol: Any, alice: Any, stripe: Any) -> None:
    order = order_of(carol, alice, 50)
    billing.set_billing_profile(party=carol, user=carol.user, **ADDRESS)
    sales.invoice_order(order=order)
    stripe.pay(sales.start_checkout(order=order, **URLS))
    told = {
        "id": "evt_async",
        "type": "checkout.session.async_payment_succeeded",
        "data": {"object": {"id": Payment.objects.get().checkout_id}},
    }

    for _ in range(2):
        apply_event(stripe.received(told))

    assert (Order.objects.get().status, License.objects.count(), Document.objects.count()) == ("paid", 1, 1)
    assert check_books().findings == []


def test_an_invoice_nobody_paid_is_credited_and_its_money_comes_too_late(carol: Any, alice: Any, people: Any) -> None:
    order = order_of(carol, alice, 50)
    billing.set_billing_profile(party=carol, user=carol.user, **ADDRESS)
    sales.invoice_order(order=order)
    clock.advance(timedelta(days=46))

    assert sales.cancel_expired_orders() == 1

    assert [document.kind for document in Document.objects.order_by("pk")] == ["INV", "CN"]
    assert Document.objects.get(kind="CN").content["notes"][0].endswith("It was not paid in time.")
    late = receipts.record_receipt(
        payment=Payment.objects.get(), amount=usd("50"), reference="1", received_on=clock.today(), by=people[0]
    )
    with pytest.raises(OrderNotPayable):
        receipts.decide_receipt(receipt=late, approved=True, by=people[1])
    receipts.decide_receipt(receipt=late, approved=False, by=people[1])
    with pytest.raises(ReceiptNotPossible, match="rejected already"):
        receipts.decide_receipt(receipt=late, approved=True, by=people[1])
    assert ledger.balances() == {}


def test_the_most_that_a_card_pays_is_a_figure_of_its_currency() -> None:
    assert set(MAX_CHARGE_MINOR) == {"USD", "EUR", "GBP", "JPY"}
    assert Money.from_minor(MAX_CHARGE_MINOR["JPY"], "JPY") == Money.parse("99999999", "JPY")


def test_a_changed_tax_opens_another_page_at_stripe(carol: Any, alice: Any, stripe: Any, vat: TaxRate) -> None:
    order = order_of(carol, alice, 50)
    first = sales.start_checkout(order=order, **URLS)
    billing.set_billing_profile(party=carol, user=carol.user, vat_id="DE136695976", **ADDRESS)

    second = sales.start_checkout(order=order, **URLS)

    assert first != second
    assert Payment.objects.get().amount == usd("50")
    stripe.pay(second)
    book_checkout(Payment.objects.get().checkout_id)
    assert check_books().findings == []
