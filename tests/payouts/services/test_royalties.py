from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from django.db.models import Sum

from attribution.models import AttributionResult
from marketplace import clock, jobs
from marketplace.errors import InvalidInput, KeyReused
from marketplace.models import License, User
from marketplace.money import MAX_MICROS, Money
from payouts import chart, gateway, ledger
from payouts.errors import AlreadyPaid, NoResultYet, NotFound, PaymentUnderWay, PeriodOverlaps, ResultNotPublished
from payouts.models import (
    Dispute,
    Division,
    DivisionLine,
    JournalEntry,
    Payment,
    RoyaltyInvoice,
    RoyaltyPool,
    RoyaltyReport,
)
from payouts.services import disputes, refunds, royalties
from payouts.services.events import book_checkout
from payouts.services.proofs import check_books
from payouts.services.reconciliation import reconcile, settle_funds
from payouts.services.royalties import divide_what_is_ready, release_pool
from tests.factories.attribution import DisclosureFactory, ModelFactory, PublishedResultFactory
from tests.factories.marketplace import LicenseFactory, OfferFactory, PartyFactory, PublishedVersionFactory
from tests.factories.payouts import PoolFactory, collect
from tests.payouts.conftest import switch_off

Grade = AttributionResult.Grade
OCTOBER = {"period_start": date(2026, 10, 1), "period_end": date(2026, 10, 31)}


def usd(amount: str) -> Money:
    return Money.parse(amount, "USD")


def license_of(pool: RoyaltyPool) -> License:
    return License.objects.get(order_line=pool.order_line)


@pytest.fixture
def version(alice: Any, bob: Any) -> Any:
    return PublishedVersionFactory(contributions={alice: 4, bob: 4})


# --- pools ------------------------------------------------------------------------------------------------------------


def test_release_pool_splits_by_share_exactly_once(version: Any, alice: Any, bob: Any) -> None:
    pool = PoolFactory(amount=usd("20"), version=version)
    result = PublishedResultFactory(license=license_of(pool), shares={alice: 7, bob: 3})

    first = release_pool(pool=pool, result=result)
    again = release_pool(pool=pool, result=result)  # as a redelivered task would

    assert first == again
    assert ledger.balances(prefix="payable") == {
        chart.payable(alice, "USD"): -14_000_000,
        chart.payable(bob, "USD"): -6_000_000,
    }
    assert ledger.balances(prefix="pool") == {}
    assert check_books().findings == []


def test_a_released_pool_is_not_divided_again_by_another_result(version: Any, alice: Any, bob: Any) -> None:
    pool = PoolFactory(amount=usd("20"), version=version)
    release_pool(pool=pool, result=PublishedResultFactory(license=license_of(pool), shares={alice: 1}))

    release_pool(pool=pool, result=PublishedResultFactory(license=license_of(pool), shares={bob: 1}))

    assert ledger.balances(prefix="payable") == {chart.payable(alice, "USD"): -20_000_000}


def test_release_refuses_a_draft_and_a_model_that_does_not_cite_the_license(version: Any, alice: Any) -> None:
    pool = PoolFactory(version=version)
    draft = PublishedResultFactory(license=license_of(pool), shares={alice: 1})
    draft.status = AttributionResult.Status.DRAFT
    stranger = PublishedResultFactory(version=version, shares={alice: 1})

    with pytest.raises(ResultNotPublished):
        release_pool(pool=pool, result=draft)
    with pytest.raises(ValueError, match="does not cite"):
        release_pool(pool=pool, result=stranger)

    assert Division.objects.count() == 0
    assert ledger.balances(prefix="payable") == {}


def test_the_labellers_pot_follows_its_own_partition(version: Any, alice: Any, bob: Any) -> None:
    dan = PartyFactory()
    labelled = PublishedVersionFactory(contributions={alice: 4, bob: 4}, labellers={dan: 4})
    pool = PoolFactory(amount=usd("20"), version=labelled, labellers_bps=2_500)
    result = PublishedResultFactory(license=license_of(pool), shares={alice: 3, bob: 1}, labellers={dan: 1, bob: 4})

    release_pool(pool=pool, result=result)

    lines = {(line.party_id, line.role): line.amount_micros for line in DivisionLine.objects.all()}
    assert lines == {
        (alice.pk, "rights_holder"): 11_250_000,
        (bob.pk, "rights_holder"): 3_750_000,
        (dan.pk, "labeller"): 1_000_000,
        (bob.pk, "labeller"): 4_000_000,
    }
    assert check_books().findings == []


def test_only_this_versions_records_count_and_without_any_weight_it_is_by_count(
    version: Any, alice: Any, bob: Any
) -> None:
    pool = PoolFactory(amount=usd("20"), version=version)
    other = PublishedVersionFactory()
    licenses = [license_of(pool), LicenseFactory(version=other, licensee=license_of(pool).licensee)]
    disclosure = DisclosureFactory(model=ModelFactory(owner=licenses[0].licensee), licenses=licenses)
    result = PublishedResultFactory(
        version=version, disclosure=disclosure, shares={version: {alice: 0, bob: 0}, other: {other.dataset.owner: 5}}
    )

    release_pool(pool=pool, result=result)

    assert ledger.balances(prefix="payable") == {
        chart.payable(alice, "USD"): -10_000_000,
        chart.payable(bob, "USD"): -10_000_000,
    }
    assert Division.objects.get(pool=pool).result is None  # nobody reads that a model divided it
    assert check_books().findings == []


def test_where_a_result_gives_the_labellers_nothing_only_their_pot_is_by_count(
    alice: Any, bob: Any, carol: Any
) -> None:
    dan = PartyFactory()
    version = PublishedVersionFactory(contributions={alice: 4, bob: 4}, labellers={dan: 6})
    other = PublishedVersionFactory()
    pool = PoolFactory(amount=usd("20"), version=version, labellers_bps=2_500, buyer=carol)
    licenses = [license_of(pool), LicenseFactory(version=other, licensee=carol)]
    disclosure = DisclosureFactory(model=ModelFactory(owner=carol), licenses=licenses)
    result = PublishedResultFactory(
        disclosure=disclosure,
        version=version,
        shares={version: {alice: 3, bob: 1}},
        labellers={version: {dan: 0, bob: 0}, other: {other.dataset.owner: 1}},
    )

    release_pool(pool=pool, result=result)

    division = Division.objects.get(pool=pool)
    assert (division.result, division.counted_role) == (result, "labeller")
    assert {(line.party_id, line.role): (line.amount_micros, line.divided_by) for line in division.lines.all()} == {
        (alice.pk, "rights_holder"): (11_250_000, result),
        (bob.pk, "rights_holder"): (3_750_000, result),
        (dan.pk, "labeller"): (3_750_000, None),
        (bob.pk, "labeller"): (1_250_000, None),
    }
    assert check_books().findings == []


def test_pools_wait_for_a_replayed_result_or_their_deadline(version: Any, alice: Any, bob: Any) -> None:
    pool = PoolFactory(amount=usd("20"), version=version)
    PublishedResultFactory(license=license_of(pool), shares={alice: 1}, grade=Grade.DECLARED)

    assert divide_what_is_ready() == 0

    disclosure = AttributionResult.objects.get().disclosure
    first = PublishedResultFactory(disclosure=disclosure, version=version, shares={bob: 1})
    PublishedResultFactory(disclosure=disclosure, version=version, shares={alice: 1})
    assert divide_what_is_ready() == 1
    assert divide_what_is_ready() == 0
    assert Division.objects.get().result == first


def test_at_its_deadline_the_best_result_there_is_releases_a_pool(version: Any, alice: Any, bob: Any) -> None:
    pool = PoolFactory(amount=usd("20"), version=version)
    estimated = PublishedResultFactory(license=license_of(pool), shares={bob: 1}, grade=Grade.ESTIMATED)
    PublishedResultFactory(disclosure=estimated.disclosure, version=version, shares={alice: 1}, grade=Grade.DECLARED)
    clock.advance(pool.deadline - clock.now() + timedelta(seconds=1))

    assert divide_what_is_ready() == 1

    assert Division.objects.get().result == estimated
    assert ledger.balances(prefix="payable") == {chart.payable(bob, "USD"): -20_000_000}


def test_the_first_result_of_the_best_grade_releases_a_pool_and_none_that_came_after_the_deadline(
    version: Any, alice: Any, bob: Any
) -> None:
    pool = PoolFactory(amount=usd("20"), version=version)
    first = PublishedResultFactory(license=license_of(pool), shares={bob: 1}, grade=Grade.ESTIMATED)
    later = {"disclosure": first.disclosure, "version": version, "shares": {alice: 1}}
    PublishedResultFactory(**later, grade=Grade.ESTIMATED)
    PublishedResultFactory(**later, grade=Grade.REPLAYED, published_at=pool.deadline + timedelta(seconds=1))
    assert divide_what_is_ready() == 0
    clock.advance(pool.deadline - clock.now() + timedelta(days=1))  # nobody came to release it in time

    assert divide_what_is_ready() == 1

    assert Division.objects.get().result == first


def test_at_its_deadline_without_a_result_a_pool_is_divided_by_count(version: Any, alice: Any, bob: Any) -> None:
    pool = PoolFactory(amount=usd("20"), version=version)
    PublishedResultFactory(version=version, shares={alice: 1})  # of somebody else's model and license
    clock.advance(pool.deadline - clock.now() + timedelta(seconds=1))

    assert divide_what_is_ready() == 1

    assert Division.objects.get().result is None
    assert ledger.balances(prefix="payable") == {
        chart.payable(alice, "USD"): -10_000_000,
        chart.payable(bob, "USD"): -10_000_000,
    }


def test_splitting_one_holder_into_five_accounts_moves_no_sum_by_more_than_a_micro_per_account(
    db: Any, alice: Any, bob: Any
) -> None:
    parts = [PartyFactory() for _ in range(5)]
    whole = PublishedVersionFactory(contributions={alice: 10, bob: 7})
    split = PublishedVersionFactory(contributions=dict.fromkeys(parts, 2) | {bob: 7})
    sums = []
    for one, shares in (
        (whole, {alice: 13, bob: 18}),
        (split, dict(zip(parts, (1, 2, 3, 3, 4), strict=True)) | {bob: 18}),
    ):
        pool = PoolFactory(amount=usd("19.96"), version=one)
        release_pool(pool=pool, result=PublishedResultFactory(license=license_of(pool), shares=shares))
        lines = DivisionLine.objects.filter(division__pool=pool)
        sums.append(
            (
                lines.exclude(party=bob).aggregate(sum=Sum("amount_micros"))["sum"],
                lines.get(party=bob).amount_micros,
            )
        )

    assert abs(sums[0][0] - sums[1][0]) <= 5
    assert abs(sums[0][1] - sums[1][1]) <= 1


# --- reports and invoices ---------------------------------------------------------------------------------------------


def licensed(version: Any, carol: Any, **terms: Any) -> License:
    return LicenseFactory(licensee=carol, offer=OfferFactory(version=version, **terms))


@pytest.fixture
def measured(version: Any, carol: Any, alice: Any, bob: Any) -> AttributionResult:
    """Carol's model: three quarters of its value come from `version` at a rate of 5 %, a quarter from another at 2 %."""
    other = PublishedVersionFactory(contributions={bob: 3})
    licenses = [licensed(version, carol, royalty_bps=500), licensed(other, carol, royalty_bps=200)]
    disclosure = DisclosureFactory(model=ModelFactory(owner=carol), licenses=licenses)
    return PublishedResultFactory(
        version=version, disclosure=disclosure, shares={version: {alice: 2, bob: 1}, other: {bob: 1}}
    )


def report(result: AttributionResult, revenue: str | Money = "1000", **changes: Any) -> RoyaltyInvoice:
    asked = {"licensee": result.model.owner, "model": result.model, "key": "october"}
    asked["revenue"] = revenue if isinstance(revenue, Money) else usd(revenue)
    return royalties.report_revenue(**asked | OCTOBER | changes)


@pytest.fixture(autouse=True)
def november(db: Any) -> None:
    """The period of these tests is over, whatever the day."""
    if clock.today() < date(2026, 11, 2):
        clock.advance(timedelta(days=(date(2026, 11, 2) - clock.today()).days))


def test_an_invoice_is_revenue_times_share_times_rate(measured: AttributionResult) -> None:
    invoice = report(measured)

    lines = [
        (line.share_ppq, line.rate_bps, line.amount_micros, line.is_capped) for line in invoice.lines.order_by("pk")
    ]
    assert lines == [
        (750_000_000_000_000, 500, 37_500_000, False),
        (250_000_000_000_000, 200, 5_000_000, False),
    ]
    assert (invoice.total, invoice.status) == (usd("42.50"), "open")


def test_the_total_is_rounded_down_to_whole_cents_and_the_lines_still_sum_to_it(measured: AttributionResult) -> None:
    invoice = report(measured, "33.33")

    amounts = list(invoice.lines.order_by("pk").values_list("amount_micros", flat=True))
    exact = [33_330_000 * 3 * 500 // 40_000, 33_330_000 * 200 // 40_000]
    assert invoice.total == usd("1.41")  # of 1.416525
    assert sum(amounts) == 1_410_000
    assert all(0 <= of - amount <= 10_000 for amount, of in zip(amounts, exact, strict=True))


def test_a_cap_binds_over_the_life_of_a_license(version: Any, carol: Any, alice: Any) -> None:
    license = licensed(version, carol, royalty_bps=1_000, royalty_cap_micros=30_000_000)
    result = PublishedResultFactory(license=license, shares={alice: 1})

    amounts = [
        [(line.amount_micros, line.is_capped) for line in report(result, "200", key=str(month), **period).lines.all()]
        for month, period in enumerate(
            {"period_start": date(2026, month, 1), "period_end": date(2026, month, 28)} for month in (6, 7, 8)
        )
    ]

    assert amounts == [[(20_000_000, False)], [(10_000_000, True)], [(0, True)]]
    assert list(RoyaltyInvoice.objects.order_by("pk").values_list("status", flat=True)) == [
        "open",
        "open",
        "nothing_due",
    ]


def test_below_stripes_smallest_charge_an_invoice_is_carried_to_the_next(measured: AttributionResult) -> None:
    small = report(measured, "11.70")  # 49.725 cents
    enough = report(measured, "11.80", key="september", period_start=date(2026, 9, 1), period_end=date(2026, 9, 30))

    small.refresh_from_db()
    assert (small.status, small.carried_into, enough.status) == ("carried", enough, "open")
    with pytest.raises(AlreadyPaid, match="too small to be charged"):
        royalties.start_invoice_checkout(invoice=small, success_url="http://a.test/", cancel_url="http://a.test/")


def test_unrated_data_dilutes_only_when_replayed_and_the_trainers_own_never(
    version: Any, carol: Any, alice: Any
) -> None:
    free = PublishedVersionFactory()
    own = PublishedVersionFactory(dataset__owner=carol)
    licenses = [
        licensed(version, carol, royalty_bps=1_000),
        licensed(free, carol, royalty_bps=0),
        licensed(own, carol, royalty_bps=1_000),
    ]
    disclosure = DisclosureFactory(model=ModelFactory(owner=carol), licenses=licenses)
    shares = {version: {alice: 2}, free: {free.dataset.owner: 2}, own: {carol: 4}}

    totals = {}
    for grade in (Grade.DECLARED, Grade.REPLAYED):
        PublishedResultFactory(version=version, disclosure=disclosure, shares=shares, grade=grade)
        totals[grade] = royalties.quote_royalty(model=disclosure.model, revenue=usd("100")).total

    assert totals == {Grade.REPLAYED: usd("5"), Grade.DECLARED: usd("10")}


def test_a_repeated_report_is_the_same_invoice_and_another_under_its_key_is_refused(
    measured: AttributionResult,
) -> None:
    first = report(measured)

    assert report(measured) == first
    with pytest.raises(KeyReused):
        report(measured, "1001")

    assert RoyaltyReport.objects.count() == 1


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (date(2026, 10, 31), date(2026, 11, 1)),
        (date(2026, 9, 1), date(2026, 10, 1)),
        (date(2026, 10, 5), date(2026, 10, 6)),
    ],
)
def test_an_overlapping_period_is_refused(measured: AttributionResult, start: date, end: date) -> None:
    clock.advance(timedelta(days=30))
    report(measured)

    with pytest.raises(PeriodOverlaps):
        report(measured, key="again", period_start=start, period_end=end)
    other = report(measured, Money.parse("10", "EUR"), key="euro")  # one report per currency

    assert (RoyaltyReport.objects.count(), other.currency) == (2, "EUR")


def test_reports_that_cannot_be_are_refused_and_leave_nothing(measured: AttributionResult, mallory: Any) -> None:
    tomorrow = clock.today() + timedelta(days=1)
    for refusal, changes in (
        (NotFound, {"licensee": mallory}),
        (InvalidInput, {"revenue": Money(-1, "USD")}),
        (InvalidInput, {"revenue": Money(MAX_MICROS + 1, "USD")}),
        (InvalidInput, {"period_start": date(2026, 10, 2), "period_end": date(2026, 10, 1)}),
        (InvalidInput, {"period_end": tomorrow}),
        (NoResultYet, {"model": ModelFactory(owner=measured.model.owner)}),
    ):
        with pytest.raises(refusal):
            report(measured, **changes)

    assert (RoyaltyReport.objects.count(), RoyaltyInvoice.objects.count()) == (0, 0)


# --- payment and division ---------------------------------------------------------------------------------------------


def test_a_paid_invoice_gives_the_platform_its_tenth_and_divides_each_datasets_part(
    measured: AttributionResult, alice: Any, bob: Any
) -> None:
    invoice = report(measured)

    collect(invoice)

    invoice.refresh_from_db()
    assert (invoice.status, invoice.paid_at is not None) == ("paid", True)
    assert ledger.balances() == {  # of 42.50: 4.25 fee; 33.75 at 2:1 and 4.50 to bob
        "cash:pending:USD": 40_970_000,
        "expense:stripe_fees:USD": 1_530_000,
        chart.payable(alice, "USD"): -22_500_000,
        chart.payable(bob, "USD"): -15_750_000,
        "revenue:platform_fee:USD": -4_250_000,
    }
    assert check_books().findings == []
    assert divide_what_is_ready() == 0


def test_collecting_again_changes_nothing(measured: AttributionResult) -> None:
    invoice = report(measured)
    payment = collect(invoice)
    before = ledger.balances()

    collect(invoice, charge=payment.charge_id)
    royalties.divide_royalty(invoice=invoice)

    assert ledger.balances() == before
    assert JournalEntry.objects.filter(kind=JournalEntry.Kind.ROYALTY).count() == 1


def test_a_royalty_is_divided_by_the_result_that_its_invoice_was_made_by(
    measured: AttributionResult, version: Any, alice: Any, bob: Any
) -> None:
    """What is published between invoice and payment, here of one dataset only, divides later periods."""
    invoice = report(measured)
    PublishedResultFactory(disclosure=measured.disclosure, version=version, shares={version: {bob: 1}})

    collect(invoice)

    assert {division.result for division in Division.objects.all()} == {measured}
    assert ledger.balances(prefix="payable") == {
        chart.payable(alice, "USD"): -22_500_000,
        chart.payable(bob, "USD"): -15_750_000,
    }
    assert check_books().findings == []


@pytest.mark.as_owner
def test_a_royalty_that_another_result_divided_is_found(measured: AttributionResult, version: Any, alice: Any) -> None:
    """Only the owner of the tables could write it."""
    invoice = report(measured)
    collect(invoice)
    other = PublishedResultFactory(disclosure=measured.disclosure, version=version, shares={version: {alice: 1}})
    switch_off("append_only", table="payouts_division")

    division = invoice.lines.get(version=version).division
    Division.objects.filter(pk=division.pk).update(result=other)

    found = {finding.code: finding.detail for finding in check_books().findings}
    assert found["divided_by_another_result"] == f"{division.key}: by {other}, invoiced by result {measured.pk}"


# --- which result holds -----------------------------------------------------------------------------------------------


def noon(month: int, day: int) -> datetime:
    return datetime(2026, month, day, 12, tzinfo=UTC)


def billed(invoice: RoyaltyInvoice) -> tuple[set[AttributionResult], list[int]]:
    lines = invoice.lines.select_related("result").order_by("pk")
    return {line.result for line in lines}, [line.amount_micros for line in lines]


def test_a_weaker_disclosure_with_fewer_datasets_changes_no_report(
    measured: AttributionResult, version: Any, alice: Any
) -> None:
    """The owner of a replayed model discloses it anew, as declared and without the other dataset."""
    kept = measured.disclosure.citations.get(version=version).license
    again = DisclosureFactory(model=measured.model, licenses=[kept])
    PublishedResultFactory(disclosure=again, version=version, shares={alice: 1}, grade=Grade.DECLARED)
    clock.advance(timedelta(days=40))

    late = report(measured)
    later = report(measured, key="november", period_start=date(2026, 11, 1), period_end=date(2026, 11, 30))

    assert billed(late) == billed(later) == ({measured}, [37_500_000, 5_000_000])


def test_a_period_goes_by_the_result_that_held_at_its_end_however_late_its_report(
    version: Any, carol: Any, alice: Any, bob: Any
) -> None:
    other = PublishedVersionFactory(contributions={bob: 3})
    licenses = [licensed(version, carol, royalty_bps=500), licensed(other, carol, royalty_bps=200)]
    disclosure = DisclosureFactory(model=ModelFactory(owner=carol), licenses=licenses)
    results = [
        PublishedResultFactory(
            version=version, disclosure=disclosure, shares={version: {alice: 1}, other: {bob: weight}}, published_at=at
        )
        for weight, at in ((1, noon(9, 10)), (3, noon(10, 31)), (0, noon(11, 1)))
    ]
    clock.advance(timedelta(days=60))

    asked = {
        key: billed(report(results[0], key=key, period_start=date(2026, month, 1), period_end=date(2026, month, last)))
        for key, month, last in (("november", 11, 30), ("october", 10, 31), ("september", 9, 30), ("august", 8, 31))
    }

    assert asked == {
        "august": ({results[0]}, [25_000_000, 10_000_000]),  # before any was published: the first
        "september": ({results[0]}, [25_000_000, 10_000_000]),
        "october": ({results[1]}, [12_500_000, 15_000_000]),
        "november": ({results[2]}, [50_000_000, 0]),
    }
    assert royalties.quote_royalty(model=disclosure.model, revenue=usd("1000")).result == results[2]


@pytest.mark.parametrize("verdict", ["won", "lost"])
def test_a_paid_royalty_is_disputed_as_a_sale_is(
    measured: AttributionResult, stripe: Any, alice: Any, bob: Any, verdict: str
) -> None:
    url = royalties.start_invoice_checkout(
        invoice=report(measured), success_url="http://a.test/", cancel_url="http://a.test/"
    )
    stripe.pay(url, card="4000000000000259")
    book_checkout(Payment.objects.get().checkout_id)
    owed = ledger.balances(prefix="payable")
    assert owed == {chart.payable(alice, "USD"): -22_500_000, chart.payable(bob, "USD"): -15_750_000}

    assert disputes.sweep_disputes() == 1
    assert ledger.balances(prefix="payable") == {}
    stripe.dispute(dispute=Dispute.objects.get().dispute_id, verdict=verdict)
    assert disputes.sweep_disputes() == 1

    assert ledger.balances(prefix="payable") == (owed if verdict == "won" else {})
    assert ledger.balances(prefix="revenue") == ({"revenue:platform_fee:USD": -4_250_000} if verdict == "won" else {})
    assert check_books().findings == []
    assert reconcile().differences == []


def test_a_paid_royalty_is_refunded_line_by_line(
    measured: AttributionResult, stripe: Any, alice: Any, bob: Any
) -> None:
    invoice = report(measured)
    url = royalties.start_invoice_checkout(invoice=invoice, success_url="http://a.test/", cancel_url="http://a.test/")
    stripe.pay(url)
    payment = book_checkout(Payment.objects.get().checkout_id)
    assert payment is not None
    staff = User.objects.create_user("finance@example.org", "correct horse battery staple", is_staff=True)

    refund = refunds.request_refund(
        payment=payment,
        amount=usd("37.50"),
        reason=refunds.Refund.Reason.FAULTY_DATA,
        note="October was reported for the wrong model.",
        user=staff,
        key="one",
        line=invoice.lines.earliest("pk").pk,
    )
    with jobs.claimed(refunds.Refund, refund.pk) as held:
        assert held
        refunds.execute_refund(held)

    assert ledger.balances(prefix="payable") == {chart.payable(bob, "USD"): -4_500_000}
    assert ledger.balances(prefix="revenue") == {"revenue:platform_fee:USD": -500_000}
    assert check_books().findings == []
    assert reconcile().differences == []


def test_an_invoice_is_paid_at_stripe(measured: AttributionResult, stripe: Any) -> None:
    invoice = report(measured)

    url = royalties.start_invoice_checkout(invoice=invoice, success_url="http://a.test/", cancel_url="http://a.test/")
    stripe.pay(url)
    book_checkout(Payment.objects.get(invoice=invoice).checkout_id)

    invoice.refresh_from_db()
    assert invoice.status == RoyaltyInvoice.Status.PAID
    assert gateway.balance() == {"USD": (ledger.balance("cash:pending:USD") // 10_000, 0)}
    with pytest.raises(AlreadyPaid):
        royalties.start_invoice_checkout(invoice=invoice, success_url="http://a.test/", cancel_url="http://a.test/")


def test_an_invoice_whose_debit_the_bank_refused_is_paid_by_another(measured: AttributionResult, stripe: Any) -> None:
    invoice = report(measured)

    def page() -> str:
        return royalties.start_invoice_checkout(
            invoice=invoice, success_url="http://a.test/", cancel_url="http://a.test/"
        )

    stripe.debit(page(), account="000222222227")
    with pytest.raises(PaymentUnderWay):
        page()
    payment = Payment.objects.get(invoice=invoice)
    assert payment.awaits_bank_since is not None  # written down, though the page was refused
    stripe.advance(days=4.1)
    assert book_checkout(payment.checkout_id) is None
    payment.refresh_from_db()
    assert (payment.awaits_bank_since, payment.bank_refused_at is not None) == (None, True)

    stripe.debit(page())
    stripe.advance(days=4.1)
    with pytest.raises(AlreadyPaid):
        page()
    book_checkout(Payment.objects.get(invoice=invoice).checkout_id)

    invoice.refresh_from_db()
    assert invoice.status == RoyaltyInvoice.Status.PAID
    settle_funds()
    assert reconcile().differences == [] and check_books().findings == []


@pytest.mark.parametrize("strongest", range(4))
def test_at_its_deadline_the_strongest_of_four_grades_releases_a_pool_whatever_came_last(
    version: Any, alice: Any, bob: Any, strongest: int
) -> None:
    """declared < metered < estimated < replayed, the order of DESIGN §4."""
    pool = PoolFactory(amount=usd("20"), version=version)
    weakest_first = [Grade.DECLARED, Grade.METERED, Grade.ESTIMATED, Grade.REPLAYED]
    best = PublishedResultFactory(license=license_of(pool), shares={bob: 1}, grade=weakest_first[strongest])
    for grade in weakest_first[:strongest]:
        PublishedResultFactory(disclosure=best.disclosure, version=version, shares={alice: 1}, grade=grade)
    clock.advance(pool.deadline - clock.now() + timedelta(seconds=1))

    assert divide_what_is_ready() == 1

    assert Division.objects.get().result == best
    assert ledger.balances(prefix="payable") == {chart.payable(bob, "USD"): -20_000_000}


@pytest.mark.parametrize("grade", [Grade.METERED, Grade.ESTIMATED])
def test_a_metered_or_estimated_result_waits_for_the_deadline(version: Any, alice: Any, grade: str) -> None:
    pool = PoolFactory(amount=usd("20"), version=version)
    PublishedResultFactory(license=license_of(pool), shares={alice: 1}, grade=grade)

    assert divide_what_is_ready() == 0


def test_a_result_that_comes_after_the_deadline_is_too_late_for_the_pool_however_strong(
    version: Any, alice: Any, bob: Any
) -> None:
    """The division is the same, whether it runs a second or a week after the deadline."""
    pool = PoolFactory(amount=usd("20"), version=version)
    metered = PublishedResultFactory(license=license_of(pool), shares={bob: 1}, grade=Grade.METERED)
    clock.advance(pool.deadline - clock.now() + timedelta(seconds=1))
    PublishedResultFactory(disclosure=metered.disclosure, version=version, shares={alice: 1}, grade=Grade.REPLAYED)

    assert divide_what_is_ready() == 1

    assert Division.objects.get().result == metered


def test_a_released_pool_stays_as_it_was_when_a_stronger_result_comes(version: Any, alice: Any, bob: Any) -> None:
    pool = PoolFactory(amount=usd("20"), version=version)
    metered = PublishedResultFactory(license=license_of(pool), shares={bob: 1}, grade=Grade.METERED)
    clock.advance(pool.deadline - clock.now() + timedelta(seconds=1))
    divide_what_is_ready()
    for grade in (Grade.ESTIMATED, Grade.REPLAYED):
        PublishedResultFactory(disclosure=metered.disclosure, version=version, shares={alice: 1}, grade=grade)

    assert divide_what_is_ready() == 0

    assert Division.objects.get().result == metered
    assert ledger.balances(prefix="payable") == {chart.payable(bob, "USD"): -20_000_000}
