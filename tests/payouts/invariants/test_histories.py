"""Random histories of money, against a real PostgreSQL and the local Stripe, with every invariant looked at after each act.

What the office does in them (invoices, the bank, tax, corrections, held runs, other rails) is `office.py`'s.

Hypothesis interleaves sales, results, royalties, payouts, refunds, disputes, onboarding, write-offs, webhooks (late, twice, in any
order, or never), the two clocks, time-outs after success and deaths of workers in the middle of a call. After each act
`check_books` has to find nothing; whenever a history comes to rest, and at its end, the ledger has to be Stripe's to the cent.

`HISTORIES=1000 ./run test tests/payouts/invariants/test_histories.py -n0` makes it a night's work, with new histories each time.
"""

import logging
import os
from collections import Counter
from contextlib import ExitStack
from datetime import timedelta
from typing import Any, ClassVar

import httpx
import pytest
from django.db.models import F
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule, run_state_machine_as_test

from marketplace import clock
from marketplace.models import Citation, License, Order, Party, TrainedModel, User
from marketplace.money import Money
from marketplace.services.downloads import note_first_download
from payouts import ledger
from payouts.errors import AlreadyPaid, PaymentUnderWay
from payouts.models import (
    BankReceipt,
    Dispute,
    DivisionCorrection,
    Document,
    EventSettlement,
    IssuedStatement,
    JournalEntry,
    OutgoingTransfer,
    PayeeAccount,
    Payment,
    Payout,
    PayoutRun,
    RailConfirmation,
    RailPayout,
    ReceiptApplication,
    Refund,
    RoyaltyInvoice,
    StripeEvent,
    TransferReversal,
)
from payouts.services import disputes, payees, recoveries, refunds, royalties, sales, settlements, transfers
from payouts.services.events import APPLIED
from payouts.services.reconciliation import reconcile, settle_funds
from payouts.services.statement_proofs import verify_statement
from tests.factories.attribution import PublishedResultFactory
from tests.factories.marketplace import OfferFactory, OrderFactory, PartyFactory, PublishedVersionFactory
from tests.payouts.conftest import BANK, CARD
from tests.payouts.invariants.office import CURRENCIES, Office, picks, there_is
from tests.payouts.invariants.world import (
    FAULTS,
    World,
    act,
    faults_in_order,
    in_no_bank,
    nobody_was_paid_twice,
)

logger = logging.getLogger(__name__)
N_HISTORIES = int(os.environ.get("HISTORIES", "0"))
N_ACTS = int(os.environ.get("ACTS", "40"))
BACK = {"success_url": "http://shop.test/done", "cancel_url": "http://shop.test/order"}
#: Pays; is disputed; asks first; is refunded a day later; whose refund comes back; is declined; is available at once.
CARDS = [
    "4242424242424242",
    "4000000000000259",
    "4000000000001976",
    "4000000000007726",
    "4000000000005126",
    "4000000000000002",
    "4000000000000077",
]
#: Accounts that are debited: the bank confirms it in four days, or refuses it then.
DEBITS = ["000123456789", "000222222227"]
#: Takes what is sent; takes it and sends it back days later; sends it back at once.
BANKS = ["000123456789", "000888888883", "000123456789", "000111111113"]
DAYS = st.sampled_from([0.1, 1, 3, 8, 31, 200])


class History(Office):
    """One world, and what happens in it."""

    #: Makes a new world, on a database of its own; the test gives it.
    make: ClassVar[Any] = None
    #: What the histories so far were made of, so that a test of nothing does not pass.
    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.world: World = self.stack.enter_context(type(self).make())
        self.n = 0

    def teardown(self) -> None:
        try:
            if hasattr(self, "payees"):
                self.come_to_rest()
                self.statements_recompute()
                self.count_what_happened()
        finally:
            self.stack.close()

    def statements_recompute(self) -> None:
        for statement in IssuedStatement.objects.order_by("pk"):
            assert verify_statement(statement).mismatch is None, statement.number

    def count_what_happened(self) -> None:
        for kind in JournalEntry.objects.values_list("kind", flat=True):
            self.seen[kind] += 1
        for model, name in (
            (Refund, "state"),
            (Payout, "status"),
            (Dispute, "status"),
            (TransferReversal, "state"),
            (Document, "kind"),
            (BankReceipt, "status"),
            (DivisionCorrection, "status"),
            (OutgoingTransfer, "status"),
            (ReceiptApplication, "status"),
            (RailPayout, "status"),
            (RailConfirmation, "status"),
            (PayoutRun, "state"),
        ):
            for state in model.objects.values_list(name, flat=True):  # type: ignore[attr-defined]
                self.seen[f"{model.__name__} {state}"] += 1
        self.seen.update(self.world.network.happened)

    # --- who and what there is

    @initialize(cards=st.lists(st.sampled_from(CARDS), min_size=2, max_size=4), onboarded=st.integers(1, 4), days=DAYS)
    def open_the_market(self, cards: list[str], onboarded: int, days: float) -> None:
        """Some have been sold to and some can be paid, since hypothesis leaves out a part of the acts in each history."""
        self.staff = User.objects.create_user("finance@example.org", "correct horse battery staple", is_staff=True)
        self.second = User.objects.create_user("audit@example.org", "correct horse battery staple", is_staff=True)
        self.payees: list[Party] = [PartyFactory(name=name, country="US") for name in ("Ann", "Ben", "Cat", "Dan")]
        ann, ben, cat, dan = self.payees
        self.eve = eve = PartyFactory(name="Eve", country="NP")
        self.buyers: list[Party] = [PartyFactory(name=name) for name in ("Lab", "Firm")]
        contributions: list[dict[str, Any]] = [
            {"contributions": {ann: 5, ben: 3}, "labellers": {cat: 4, dan: 2}},
            {"contributions": {ben: 7}},
            {"contributions": {cat: 1, ann: 1, dan: 1, eve: 2}},
            {"contributions": {ann: 2, eve: 1}},
        ]
        terms: list[dict[str, Any]] = [
            {"labellers_bps": 2_500, "price_micros": 100_000_000},
            {"upfront_bps": 0, "pool_bps": 9_000, "price_micros": 33_330_000},
            {"upfront_bps": 8_500, "pool_bps": 0, "platform_fee_bps": 1_500, "price_micros": 7_010_000},
            {"upfront_bps": 4_000, "pool_bps": 5_000, "price_micros": 80_000_000, "currency": "EUR"},
        ]
        self.offers = [
            OfferFactory(version=PublishedVersionFactory(**given), **term)
            for given, term in zip(contributions, terms, strict=True)
        ]
        self.open_the_office()
        for number in range(onboarded):
            self.onboard(number, finishes=True)
        for number, card in enumerate(cards):
            self.buy({number % 3, (number + 1) % 3}, number % 2, card)
        self.pay_twice(0, 0)
        for account in DEBITS:
            self.buy({1}, 1, account)
        self.world.sweep()
        for model, pk in self.world.unfinished():
            self.world.work(model, pk)
        # Of a dozen acts that end in a royalty a short history rarely draws all.
        self.publish_a_result(0, 1, "replayed")
        self.report_revenue(0, 5_000)
        self.pay_an_invoice(0, "4242424242424242")
        self.buy_by_invoice(0, 0)
        self.a_transfer_arrives(-1, 0)  # for the newest, which is not paid yet
        self.the_second_looks_at_the_statement(0, True)
        self.world.advance(31)  # past the hold of whoever is new
        self.divide_and_settle()
        self.a_payout_run("USD")
        self.world.advance(days)
        self.divide_and_settle()

    def next_key(self) -> str:
        self.n += 1
        return f"key-{self.n}"

    # --- buyers

    @rule(
        which=st.one_of(st.sets(st.integers(0, 2), min_size=1), st.just({3})),
        buyer=st.integers(0, 1),
        card=st.sampled_from(CARDS + DEBITS),
    )
    def buy(self, which: set[int], buyer: int, card: str) -> None:
        offers = [self.offers[number] for number in sorted(which)]
        order = OrderFactory(buyer=self.buyers[buyer], offers=offers)
        url = act(lambda: sales.start_checkout(order=order, **BACK))
        if isinstance(url, str):
            self.pay(url, card)

    def pay(self, url: str, card: str) -> None:
        if card in DEBITS:
            self.world.stripe.debit(url, account=card)
        else:
            answer = httpx.post(url, data=CARD | {"card_number": card})
            assert answer.status_code in (303, 402), answer.text  # paid, or declined

    @there_is(Payment)
    @rule(pick=picks)
    def pay_what_is_open(self, pick: int) -> None:
        """Once more, on the same page or a new one: after a decline, a refused debit, a page that expired."""
        payment = self.one(Payment.objects.filter(status=Payment.Status.OPEN, order__status="placed"), pick)
        if payment is None:
            return
        url = act(lambda: sales.start_checkout(order=payment.order, **BACK))
        if isinstance(url, str):
            self.pay(url, (CARDS + DEBITS)[pick % len(CARDS + DEBITS)])

    @rule(pick=picks, buyer=st.integers(0, 1))
    def pay_twice(self, pick: int, buyer: int) -> None:
        """Two pages of one order, both paid: their numbers were lost between Stripe and us, so it may be cancelled meanwhile."""
        order = OrderFactory(buyer=self.buyers[buyer], offers=[self.offers[pick % len(self.offers)]])
        for _ in range(2):
            url = act(lambda: sales.start_checkout(order=order, **BACK))
            if isinstance(url, str):
                self.pay(url, CARDS[0])
            Payment.objects.filter(order=order, status=Payment.Status.OPEN).update(
                checkout_id=None, checkout_attempt=F("checkout_attempt") + 1
            )

    @rule(pick=picks)
    def ask_for_the_money_back(self, pick: int) -> None:
        order = self.one(Order.objects.filter(status=Order.Status.PAID), pick)
        if order:
            act(lambda: refunds.refund_of_right(order=order, user=None))

    @rule(pick=picks)
    def download(self, pick: int) -> None:
        license = self.one(License.objects.filter(first_downloaded_at=None), pick)
        if license:
            act(lambda: note_first_download(license=license))

    @rule(pick=picks, part=st.sampled_from([0.0, 0.25, 1.0]), inquiry=st.booleans())
    def dispute_a_charge(self, pick: int, part: float, inquiry: bool) -> None:
        payment = self.one(Payment.objects.filter(status=Payment.Status.PAID), pick)
        if payment:
            amount = {"amount": max(1, int(payment.amount.to_minor() * part))} if part else {}
            self.at_stripe(charge=payment.charge_id, is_inquiry=inquiry, **amount)

    @there_is(Dispute)
    @rule(pick=picks, verdict=st.sampled_from(["won", "lost", "escalated"]))
    def the_bank_decides(self, pick: int, verdict: str) -> None:
        dispute = self.one(Dispute.objects.all(), pick)
        if dispute:
            self.at_stripe(dispute=dispute.dispute_id, verdict=verdict)

    def at_stripe(self, **given: Any) -> None:
        """Stripe may say that it cannot be: disputed twice, decided before."""
        handle = self.world.stripe.handle
        httpx.post(f"{handle.url}/_control/disputes", auth=(handle.secret_key, ""), json=given, timeout=30)

    # --- trainers

    @there_is(License)
    @rule(pick=picks, weight=st.integers(0, 100), grade=st.sampled_from(["replayed", "declared"]))
    def publish_a_result(self, pick: int, weight: int, grade: str) -> None:
        license = self.one(License.objects.filter(revoked_at=None), pick)
        if license is None:
            return
        parties = [one.party for one in license.version.contributions.filter(role="rights_holder").order_by("number")]
        shares = {party: 1 + weight * number for number, party in enumerate(parties)}
        cited = Citation.objects.filter(license=license).first()
        disclosure = cited.disclosure if cited else None
        PublishedResultFactory(
            version=license.version, license=license, shares=shares, grade=grade, disclosure=disclosure
        )

    @there_is(TrainedModel)
    @rule(pick=picks, revenue=st.sampled_from([100, 5_000, 250_000]))
    def report_revenue(self, pick: int, revenue: int) -> None:
        model = self.one(TrainedModel.objects.all(), pick)
        if model is None:
            return
        number = model.royalty_reports.count()
        start = clock.today() - timedelta(days=3_000 - 30 * number)
        act(
            lambda: royalties.report_revenue(
                licensee=model.owner,
                model=model,
                period_start=start,
                period_end=start + timedelta(days=20),
                revenue=Money(revenue * 1_000_000, "USD"),
                key=self.next_key(),
            )
        )

    @there_is(RoyaltyInvoice)
    @rule(pick=picks, card=st.sampled_from(CARDS + DEBITS))
    def pay_an_invoice(self, pick: int, card: str) -> None:
        invoice = self.one(RoyaltyInvoice.objects.filter(status=RoyaltyInvoice.Status.OPEN), pick)
        if invoice is None:
            return
        url = act(lambda: royalties.start_invoice_checkout(invoice=invoice, **BACK))
        if isinstance(url, str):
            self.pay(url, card)
        else:
            assert url is None or isinstance(url, AlreadyPaid | PaymentUnderWay) or url.code.startswith("stripe"), url

    # --- payees

    @rule(pick=picks, finishes=st.booleans())
    def onboard(self, pick: int, finishes: bool) -> None:
        party = self.payees[pick % len(self.payees)]
        url = act(
            lambda: payees.start_onboarding(party=party, return_url="http://a.test/", refresh_url="http://a.test/")
        )
        if finishes and isinstance(url, str):
            number = BANKS[pick % len(BANKS)]
            httpx.post(url, data=BANK | {"country": "US", "account_number": number, "routing_number": "110000000"})

    # --- Stripe's words

    @rule(data=st.data())
    def webhooks_arrive(self, data: st.DataObject) -> None:
        """Some of what was told, in any order, some of it again; the rest comes later or never."""
        told = self.told()
        if not told:
            return
        some = data.draw(st.lists(st.integers(0, len(told) - 1), max_size=6))
        for number in some:
            event, endpoint = told[number]
            row = self.world.stripe.received(event, endpoint=endpoint)
            if event.get("account"):
                StripeEvent.objects.filter(pk=row.pk).update(account=event["account"])
            note(f"{event['type']} {event['data']['object']['id']}")
            self.world.work(StripeEvent, row.pk)

    def told(self) -> list[tuple[dict[str, Any], str]]:
        """Of our own account and of the payees' accounts, the latest ones."""
        found = []
        for account in ["", *PayeeAccount.objects.order_by("pk").values_list("stripe_account_id", flat=True)]:
            endpoint = StripeEvent.Endpoint.CONNECT if account else StripeEvent.Endpoint.PLATFORM
            kinds = "&".join(f"types[]={kind}" for kind in APPLIED[endpoint])
            of_account = {"Stripe-Account": account} if account else {}
            told = self.world.stripe.objects(f"events?{kinds}&limit=100", **of_account)
            found += [(event, endpoint.value) for event in told]
        return sorted(found, key=lambda pair: pair[0]["id"])

    # --- our own processes

    @rule(pick=picks)
    def a_worker_takes_a_job(self, pick: int) -> None:
        waiting = self.world.unfinished()
        if waiting:
            self.world.work(*waiting[pick % len(waiting)])

    @rule(currency=st.sampled_from(CURRENCIES))
    def a_payout_run(self, currency: str) -> None:
        run = act(lambda: transfers.request_payout_run(currency=currency, key=self.next_key()))
        assert isinstance(run, PayoutRun)
        self.world.work(PayoutRun, run.pk)

    @rule()
    def divide_and_settle(self) -> None:
        act(royalties.divide_what_is_ready)
        act(settle_funds)
        act(recoveries.net_what_became_payable)
        act(ledger.take_snapshots)

    @rule(faults=st.lists(st.sampled_from(FAULTS), min_size=1, max_size=3))
    def the_network_will_fail(self, faults: list[str]) -> None:
        self.world.network.faults.extend(faults)

    @rule(days=DAYS)
    def time_goes_by(self, days: float) -> None:
        self.world.advance(days)
        self.world.close_months(self.staff)

    # --- staff

    @rule(pick=picks, part=st.sampled_from([0.1, 0.5, 1.0]), line=st.booleans())
    def staff_refund(self, pick: int, part: float, line: bool) -> None:
        payment = self.one(Payment.objects.filter(status=Payment.Status.PAID), pick)
        if payment is None:
            return
        amount = Money(max(10_000, int(payment.amount_micros * part) // 10_000 * 10_000), payment.currency)
        first = payment.order.lines.order_by("pk").first() if line and payment.order else None
        refund = act(
            lambda: refunds.request_refund(
                payment=payment,
                amount=amount,
                reason=Refund.Reason.GOODWILL,
                note="as agreed",
                user=self.staff,
                key=self.next_key(),
                line=first.pk if first else None,
            )
        )
        if isinstance(refund, Refund) and pick % 2:
            self.world.work(Refund, refund.pk)

    @there_is(Dispute)
    @rule(pick=picks, gives_in=st.booleans())
    def staff_answer_a_dispute(self, pick: int, gives_in: bool) -> None:
        dispute = self.one(Dispute.objects.all(), pick)
        if dispute:
            evidence = {} if gives_in else {"uncategorized_text": "They downloaded it."}
            act(lambda: disputes.answer_dispute(dispute=dispute, user=self.staff, evidence=evidence, gives_in=gives_in))

    @precondition(lambda self: hasattr(self, "payees") and recoveries.owing())
    @rule(pick=picks, whole=st.booleans())
    def staff_write_off(self, pick: int, whole: bool) -> None:
        owed = sorted(recoveries.owing().items())
        if owed:
            (party, _), amount = owed[pick % len(owed)]
            part = amount if whole else Money(max(1, amount.micros // 3), amount.currency)
            debtor = Party.objects.get(pk=party)
            act(lambda: recoveries.write_off(party=debtor, amount=part, user=self.staff, reason="too old"))

    @there_is(Payout)
    @rule(pick=picks)
    def staff_ask_a_transfer_back(self, pick: int) -> None:
        payout = self.one(Payout.objects.filter(status__in=["sent", "paid"]), pick)
        if payout is None:
            return
        reversal = act(
            lambda: recoveries.request_reversal(
                payout=payout,
                amount=Money(10_000 * (1 + pick % 300), payout.currency),
                user=self.staff,
                note="went back",
            )
        )
        if isinstance(reversal, TransferReversal):
            self.world.work(TransferReversal, reversal.pk)

    @rule()
    def staff_settle_what_failed(self) -> None:
        """Each event that could not be applied by now is a surplus charge's; one proposes its refund, another confirms it."""
        for event in StripeEvent.unsettled().exclude(error_code="internal").order_by("pk"):
            proposal = event.settlements.filter(status=EventSettlement.Status.PROPOSED).first() or act(
                lambda event=event: settlements.propose(
                    event=event, act=EventSettlement.Act.REFUND, reason="Twice, or too late.", user=self.staff
                )
            )
            if isinstance(proposal, EventSettlement):
                act(lambda proposal=proposal: settlements.confirm(settlement=proposal, user=self.second))

    # --- what must hold

    @invariant()
    def the_books_prove_themselves(self) -> None:
        if hasattr(self, "payees"):
            assert faults_in_order() == []

    @precondition(lambda self: hasattr(self, "payees"))
    @rule()
    def come_to_rest(self) -> None:
        """Everything under way ends: then the ledger is Stripe's to the cent, and nobody got anything twice."""
        self.let_every_run_go()
        self.world.settle_up()
        self.staff_settle_what_failed()
        self.do_what_waits_at_the_bank()
        self.world.settle_up()
        assert faults_in_order() == []
        assert [str(difference) for difference in reconcile().differences] == []
        assert nobody_was_paid_twice(self.world.stripe) == []
        assert in_no_bank(self.world.stripe) == []
        assert not StripeEvent.objects.exclude(status="done").exists()
        for payment in Payment.objects.filter(status=Payment.Status.PAID):
            back = sum(one.amount_micros for one in payment.refunds.filter(state__in=Refund.STANDING))
            assert back <= payment.amount_micros


@pytest.mark.timeout(0 if N_HISTORIES else 600)  # a night's work takes its time
def test_whatever_happens_the_books_are_right_and_at_rest_they_are_stripes(makes_worlds: Any) -> None:
    class Here(History):
        make = staticmethod(makes_worlds)

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=N_HISTORIES or 5,
            stateful_step_count=N_ACTS,
            deadline=None,
            derandomize=not N_HISTORIES,
            database=None,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink] if N_HISTORIES else [Phase.generate],
            report_multiple_bugs=False,
        ),
    )
    logger.info("Histories were made of %s", dict(sorted(Here.seen.items())))
    assert {"surplus", "sale", "release", "royalty", "settle", "refund_sent", "dispute_freeze", "payout_sent"} <= set(
        Here.seen
    )
    assert Here.seen["BankReceipt booked"], "no bank transfer was booked"
