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
    Payment,
    PayoutRun,
    RailExport,
    RailPayout,
    RoyaltyReport,
    TaxRate,
)
from payouts.services import (
    billing,
    corrections,
    manual_entries,
    other_rails,
    reach,
    receipts,
    report_corrections,
    sales,
    transfers,
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

    def one(self, queryset: Any, pick: int) -> Any:
        found = list(queryset.order_by("pk"))
        return found[pick % len(found)] if found else None

    def next_key(self) -> str:
        raise NotImplementedError

    def open_the_office(self) -> None:
        reach.ask_served_countries()
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
        end = other_rails.confirm_returned if returned else other_rails.confirm_sent
        act(lambda: end(payout=payout, user=self.staff, reference="B-1"))
