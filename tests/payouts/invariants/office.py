"""What the office does in a random history: two of the staff, invoices and the bank, corrections, other rails, closing."""

from datetime import timedelta
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from attribution.models import AttributionResult
from marketplace import clock
from marketplace.models import Party, User
from marketplace.money import Money
from payouts.models import (
    BankReceipt,
    Division,
    DivisionCorrection,
    Document,
    ManualEntry,
    OutgoingTransfer,
    Payment,
    PayoutRun,
    RailConfirmation,
    RailExport,
    RailPayout,
    ReceiptApplication,
    RoyaltyReport,
    TaxRate,
)
from payouts.services import (
    bank_details,
    billing,
    corrections,
    manual_entries,
    other_rails,
    outgoing,
    reach,
    receipts,
    report_corrections,
    sales,
    transfers,
    unapplied,
)
from tests.factories.marketplace import OrderFactory
from tests.payouts.invariants.world import World, act

picks = st.integers(0, 10**6)  # of whatever there is at that moment, by remainder
CURRENCIES = ["USD", "EUR"]


def there_is(*models: Any) -> Any:
    """An act on what is not there would be a wasted one."""
    return precondition(lambda self: hasattr(self, "payees") and all(model.objects.exists() for model in models))


class Office(RuleBasedStateMachine):
    """The acts of staff and of buyers who pay by bank; `History` has the market that they happen in."""

    world: World
    staff: User
    second: User
    buyers: list[Party]
    offers: list[Any]
    eve: Party  # whom Stripe does not reach

    def one(self, queryset: Any, pick: int) -> Any:
        found = list(queryset.order_by("pk"))
        return found[pick % len(found)] if found else None

    def next_key(self) -> str:
        raise NotImplementedError

    def open_the_office(self) -> None:
        reach.ask_served_countries()
        bank_details.set_details(
            party=self.eve,
            user=self.eve.user,
            account_holder="Eve",
            account="GB33 BUKB 2020 1555 5555 55",
            address="1 Hill Road\nKathmandu",
        )
        for buyer in self.buyers:
            billing.set_billing_profile(
                party=buyer,
                user=None,
                legal_name=f"{buyer.name} Ltd",
                address="1 Main Street\n10115 Berlin",
                country="DE",
            )

    # --- tax

    @precondition(lambda self: hasattr(self, "payees") and TaxRate.objects.count() < 3)
    @rule(bps=st.sampled_from([700, 1_900]), days=st.integers(0, 40))
    def a_tax_begins_or_ends(self, bps: int, days: int) -> None:
        open_ended = TaxRate.objects.filter(valid_until=None).first()
        if open_ended is not None:
            last_day = clock.today() + timedelta(days=days)
            act(lambda: billing.end_tax_rate(rate=open_ended, last_day=last_day, user=self.staff))
            return
        act(
            lambda: billing.add_tax_rate(
                jurisdiction="DE",
                name="VAT",
                rate_bps=bps,
                valid_from=clock.today() + timedelta(days=days),
                user=self.staff,
            )
        )

    # --- invoices, and the bank

    @rule(which=st.integers(0, 3), buyer=st.integers(0, 1))
    def buy_by_invoice(self, which: int, buyer: int) -> None:
        order = OrderFactory(buyer=self.buyers[buyer], offers=[self.offers[which]])
        act(lambda: sales.invoice_order(order=order, purchase_order="PO-7"))

    @there_is(Document)
    @rule(pick=picks, off=st.sampled_from([0, 0, 0, 10_000]))
    def a_transfer_arrives(self, pick: int, off: int) -> None:
        payment = self.one(Payment.objects.filter(documents__isnull=False).distinct(), pick)
        if payment is None:
            return
        amount = Money(payment.amount_micros + off, payment.currency)
        act(
            lambda: receipts.record_receipt(
                payment=payment,
                amount=amount,
                reference=self.next_key(),
                received_on=clock.today(),
                by=self.staff,
            )
        )

    @there_is(BankReceipt)
    @rule(pick=picks, approved=st.sampled_from([True, True, False]))
    def the_second_looks_at_the_statement(self, pick: int, approved: bool) -> None:
        receipt = self.one(BankReceipt.objects.filter(status=BankReceipt.Status.RECORDED), pick)
        if receipt is not None:
            act(lambda: receipts.decide_receipt(receipt=receipt, approved=approved, by=self.second))

    @rule(units=st.sampled_from([50, 5_000]), currency=st.sampled_from(CURRENCIES))
    def the_owners_put_money_in(self, units: int, currency: str) -> None:
        micros = units * 1_000_000
        act(
            lambda: manual_entries.propose(
                user=self.staff,
                key=self.next_key(),
                legs={f"bank:{currency}": micros, f"equity:owners:{currency}": -micros},
                reason="Working capital",
            )
        )

    @there_is(ManualEntry)
    @rule(pick=picks, approved=st.sampled_from([True, True, False]))
    def the_second_decides_an_entry(self, pick: int, approved: bool) -> None:
        manual = self.one(ManualEntry.objects.filter(decision=None), pick)
        if manual is None:
            return
        decide = manual_entries.approve if approved else manual_entries.reject
        act(lambda: decide(manual=manual, user=self.second, note="seen"))

    @rule(units=st.sampled_from([7, 100, 119]), currency=st.sampled_from(CURRENCIES))
    def money_arrives_that_fits_no_invoice(self, units: int, currency: str) -> None:
        act(
            lambda: unapplied.record_unapplied(
                payer="Lab", amount=Money(units * 1_000_000, currency), reference=self.next_key(),
                received_on=clock.today(), by=self.staff,
            )
        )  # fmt: skip

    @there_is(BankReceipt, Document)
    @rule(pick=picks, some=st.integers(1, 3))
    def it_pays_one_after_all(self, pick: int, some: int) -> None:
        payment = self.one(Payment.objects.filter(status="open", documents__isnull=False).distinct(), pick)
        if payment is not None:
            money = list(unapplied.unapplied().filter(currency=payment.currency)[:some])
            act(lambda: unapplied.propose_application(payment=payment, money=money, by=self.staff))

    @there_is(ReceiptApplication)
    @rule(pick=picks, approved=st.sampled_from([True, True, False]))
    def the_second_decides_what_it_pays(self, pick: int, approved: bool) -> None:
        application = self.one(ReceiptApplication.objects.filter(status="proposed"), pick)
        if application is not None:
            act(lambda: unapplied.decide_application(application=application, approved=approved, by=self.second))

    @there_is(BankReceipt)
    @rule(pick=picks, part=st.sampled_from([0.3, 1.0]))
    def it_goes_back_to_its_payer(self, pick: int, part: float) -> None:
        left = unapplied.with_age(unapplied.unapplied())
        if left:
            one = left[pick % len(left)]
            amount = Money(max(10_000, int(one.left.micros * part) // 10_000 * 10_000), one.left.currency)
            act(
                lambda: outgoing.record_money_returned(
                    receipt=one.receipt, amount=amount, reference=self.next_key(), sent_on=clock.today(), by=self.staff
                )
            )

    @precondition(lambda self: hasattr(self, "payees") and outgoing.refunds_to_send().exists())
    @rule(pick=picks, cannot=st.sampled_from([False, False, True]))
    def a_refund_is_transferred(self, pick: int, cannot: bool) -> None:
        refund = self.one(outgoing.refunds_to_send(), pick)
        if cannot:
            act(lambda: outgoing.refuse_refund(refund=refund, note="The account is closed.", by=self.staff))
        else:
            act(
                lambda: outgoing.record_refund_sent(
                    refund=refund, reference=self.next_key(), sent_on=clock.today(), by=self.staff
                )
            )

    @there_is(OutgoingTransfer)
    @rule(pick=picks, what=st.sampled_from(["booked", "booked", "rejected", "came back"]))
    def the_second_looks_for_a_transfer(self, pick: int, what: str) -> None:
        transfer = self.one(OutgoingTransfer.objects.exclude(status="rejected"), pick)
        if transfer is None:
            return
        if what == "came back":
            act(
                lambda: outgoing.note_returned(
                    transfer=transfer, reference=self.next_key(), note="Account closed", by=self.second
                )
            )
        else:
            act(lambda: outgoing.decide_transfer(transfer=transfer, approved=what == "booked", by=self.second))

    # --- what was wrong

    @there_is(RoyaltyReport)
    @rule(pick=picks, part=st.sampled_from([0.0, 0.4, 0.9, 1.5, 3.0]), days=st.integers(0, 2))
    def correct_a_report(self, pick: int, part: float, days: int) -> None:
        report = self.one(RoyaltyReport.objects.all(), pick)
        if report is None:
            return
        revenue = Money(int(report.revenue.micros * part) // 10_000 * 10_000, report.currency)
        act(
            lambda: report_corrections.correct_report(
                licensee=report.licensee,
                report=report,
                revenue=revenue,
                note="counted wrongly",
                key=self.next_key(),
                period_end=report.period_end + timedelta(days=days),
            )
        )

    @there_is(Division)
    @rule(pick=picks, by_count=st.booleans(), other=picks)
    def propose_a_correction(self, pick: int, by_count: bool, other: int) -> None:
        division = self.one(Division.objects.exclude(source=Division.Source.CORRECTION), pick)
        if division is None:
            return
        measured = AttributionResult.objects.filter(status="published", shares__version=division.version_id).distinct()
        result = None if by_count else self.one(measured, other)
        act(
            lambda: corrections.propose_correction(
                division=division, result=result, reason="It was the wrong result.", by=self.staff
            )
        )

    @there_is(DivisionCorrection)
    @rule(pick=picks, approved=st.sampled_from([True, True, False]))
    def the_second_decides_a_correction(self, pick: int, approved: bool) -> None:
        correction = self.one(DivisionCorrection.objects.filter(status="proposed"), pick)
        if correction is not None:
            act(lambda: corrections.decide_correction(correction=correction, approved=approved, by=self.second))

    # --- payees: runs that wait for a person, and other rails

    @there_is(PayoutRun)
    @rule(pick=picks, what=st.sampled_from(["pause", "resume", "resume", "approve", "approve", "reject"]))
    def a_run_is_held_or_let_go(self, pick: int, what: str) -> None:
        run = self.one(PayoutRun.objects.all(), pick)
        if run is None:
            return
        acts = {
            "pause": lambda: transfers.pause_payout_run(run=run, by=self.staff, reason="looks odd"),
            "resume": lambda: transfers.resume_payout_run(run=run, by=self.staff),
            "approve": lambda: transfers.approve_payout_run(run=run, by=self.second),
            "reject": lambda: transfers.reject_payout_run(run=run, by=self.second, reason="looks odd"),
        }
        act(acts[what])

    def let_every_run_go(self) -> None:
        """What only waits for a person would wait for ever."""
        for run in PayoutRun.objects.order_by("pk"):
            act(lambda run=run: transfers.resume_payout_run(run=run, by=self.staff))  # type: ignore[misc]
            act(lambda run=run: transfers.approve_payout_run(run=run, by=self.second))  # type: ignore[misc]

    def do_what_waits_at_the_bank(self) -> None:
        """The same for what people send, and see on the bank's statement."""
        for receipt in BankReceipt.objects.filter(status=BankReceipt.Status.RECORDED).order_by("pk"):
            act(lambda receipt=receipt: receipts.decide_receipt(receipt=receipt, approved=True, by=self.second))
            act(lambda receipt=receipt: receipts.decide_receipt(receipt=receipt, approved=False, by=self.second))
        for application in ReceiptApplication.objects.filter(status="proposed").order_by("pk"):
            act(lambda one=application: unapplied.decide_application(application=one, approved=True, by=self.second))
        for one in unapplied.with_age(unapplied.unapplied()):
            back = {"receipt": one.receipt, "amount": one.left, "reference": self.next_key(), "sent_on": clock.today()}
            act(lambda back=back: outgoing.record_money_returned(**back, by=self.staff))
        for refund in outgoing.refunds_to_send():
            sent = {"refund": refund, "reference": self.next_key(), "sent_on": clock.today()}
            act(lambda sent=sent: outgoing.record_refund_sent(**sent, by=self.staff))
        for transfer in outgoing.transfers_waiting():
            act(lambda one=transfer: outgoing.decide_transfer(transfer=one, approved=True, by=self.second))
        for payout in RailPayout.objects.filter(status=RailPayout.Status.INTENDED).order_by("pk"):
            act(
                lambda one=payout: other_rails.record_sent(payout=one, user=self.staff, reference=f"B-{one.pk}-{False}")
            )
        for confirmation in other_rails.confirmations_waiting():
            act(
                lambda one=confirmation: other_rails.decide_confirmation(
                    confirmation=one, approved=True, user=self.second
                )
            )

    @rule(currency=st.sampled_from(CURRENCIES))
    def gather_what_another_rail_pays(self, currency: str) -> None:
        act(lambda: other_rails.propose_export(user=self.staff, currency=currency, key=self.next_key()))

    @there_is(RailExport)
    @rule(pick=picks, approved=st.sampled_from([True, True, False]))
    def the_second_decides_an_export(self, pick: int, approved: bool) -> None:
        export = self.one(RailExport.objects.filter(status=RailExport.Status.AWAITING), pick)
        if export is None:
            return
        decide = other_rails.approve_export if approved else other_rails.reject_export
        act(lambda: decide(export=export, user=self.second))

    @there_is(RailPayout)
    @rule(pick=picks, returned=st.booleans())
    def the_other_rail_answers(self, pick: int, returned: bool) -> None:
        payout = self.one(RailPayout.objects.filter(status__in=["intended", "sent"]), pick)
        if payout is None:
            return
        record = other_rails.record_returned if returned else other_rails.record_sent
        act(lambda: record(payout=payout, user=self.staff, reference=f"B-{payout.pk}-{returned}"))

    @there_is(RailConfirmation)
    @rule(pick=picks, approved=st.sampled_from([True, True, False]))
    def the_second_has_seen_what_the_other_rail_did(self, pick: int, approved: bool) -> None:
        confirmation = self.one(other_rails.confirmations_waiting(), pick)
        if confirmation is None:
            return
        act(lambda: other_rails.decide_confirmation(confirmation=confirmation, approved=approved, user=self.second))
