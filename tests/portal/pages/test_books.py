"""The books at the desk, as staff read and use them."""

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.test import Client
from django.utils import timezone

from marketplace import clock
from marketplace.models import AuditEvent, User
from payouts import ledger
from payouts.models import (
    BalanceCheck,
    BooksProof,
    ClosedPeriod,
    JournalEntry,
    ManualEntry,
    ProofFinding,
    RailConfirmation,
    RailExport,
    RailPayout,
    ReconciliationDifference,
    ReconciliationRun,
    ServedCountries,
    TaxRate,
)
from payouts.services import bank_details, manual_entries
from tests.factories.marketplace import OfferFactory, OrderFactory, PublishedVersionFactory, UserFactory
from tests.factories.payouts import sell
from tests.pages import assert_page, signed_in, with_second_factor


@pytest.fixture
def ann(db: Any) -> User:
    return UserFactory(is_staff=True)


@pytest.fixture
def desk(ann: User) -> Client:
    return with_second_factor(Client(), ann)


@pytest.fixture
def other_desk(db: Any) -> Client:
    return with_second_factor(Client(), UserFactory(is_staff=True))


@pytest.fixture
def spring(db: Any, alice: Any, bob: Any, carol: Any) -> None:
    """A sale in March 2028; it is the second of April."""
    clock.advance(datetime(2028, 3, 10, 12, tzinfo=UTC) - clock.now())
    sell(
        OrderFactory(
            buyer=carol, offers=[OfferFactory(version=PublishedVersionFactory(contributions={alice: 3, bob: 1}))]
        )
    )
    clock.advance(datetime(2028, 4, 2, 12, tzinfo=UTC) - clock.now())


def test_the_trial_balance_is_shown_as_of_a_day_and_exported(spring: None, desk: Client) -> None:
    text = assert_page(desk.get("/desk/trial-balance/"))
    assert "USD balances" in text and "held for others" in text and "$90.00" in text
    assert "Nothing was booked" in assert_page(desk.get("/desk/trial-balance/?as_of=2028-01-01"))
    assert "USD balances" in assert_page(desk.get("/desk/trial-balance/?as_of=nonsense"))
    assert b"open Assets:Cash:Pending:USD" in desk.get("/desk/trial-balance/residual.beancount").getvalue()
    rows = desk.get("/desk/payees/2028.csv").getvalue().decode().splitlines()
    assert len(rows) == 3 and ",22.50," in rows[1]
    assert desk.get("/desk/payees/99.csv").status_code == 404


def test_a_month_is_closed_on_the_page_with_a_reason_where_it_is_not_clean(spring: None, desk: Client) -> None:
    page = "/desk/trial-balance/"
    assert "never reconciled" in assert_page(desk.get(page))
    assert "say why it is closed nevertheless" in assert_page(desk.post(page, {"month": "2028-03-01"}), 422)
    assert "the next one is 2028-03" in assert_page(desk.post(page, {"month": "2028-04-01", "note": "x"}), 422)
    assert not ClosedPeriod.objects.exists()

    assert desk.post(page, {"month": "2028-03-01", "note": "A first look"}).url == page

    text = assert_page(desk.get(page))
    assert "March 2028 is closed" in text and "A first look" in text and "once it is over" in text


def test_journals_are_found_paged_and_downloaded(spring: None, desk: Client, alice: Any) -> None:
    code = f"payable:{alice.pk}:USD"
    assert code in assert_page(desk.get("/desk/journal/", {"q": "Alice"}))
    assert "cash:pending:USD" in assert_page(desk.get("/desk/journal/", {"q": "cash"}))
    text = assert_page(desk.get(f"/desk/journal/{code}/"))
    assert "upfront:line:" in text and "$22.50" in text
    assert_page(desk.get(f"/desk/journal/{code}/?since=2028-03-01"))
    assert desk.get(f"/desk/journal/{code}/?since=nonsense").status_code == 302
    assert desk.get("/desk/journal/payable:999999:USD/").status_code == 404
    assert desk.get(f"/desk/journal/{code}.csv").getvalue().decode().count("\r\n") == 2
    entry = JournalEntry.objects.get(kind="upfront")
    assert code in assert_page(desk.get(f"/desk/journal/entries/{entry.pk}/"))


def test_payables_and_pools_are_shown_by_age_and_deadline(spring: None, desk: Client) -> None:
    text = assert_page(desk.get("/desk/payables/"))
    assert "Alice" in text and "not due yet" in text and "$30.00" in text
    assert "$60.00" in assert_page(desk.get("/desk/pools/"))
    assert "None was released yet" in assert_page(desk.get("/desk/pools/?show=released"))


def proposal(**changes: str) -> dict[str, str]:
    return {
        "key": uuid.uuid4().hex,
        "currency": "USD",
        "booked_on": f"{clock.today()}",
        "reason": "Paper",
        "account_1": "expense:other",
        "debit_1": "3.00",
        "account_2": "equity:owners",
        "credit_2": "3.00",
    } | changes


def test_a_manual_entry_is_proposed_by_one_and_booked_by_another(desk: Client, other_desk: Client) -> None:
    form = proposal()
    for _ in range(2):
        page = desk.post("/desk/entries/", form).url
    assert ManualEntry.objects.count() == 1
    assert "another one of the staff must decide" in assert_page(desk.get(page))
    assert "another one of the staff must decide" in assert_page(desk.post(page, {"act": "approve"}), 422)
    assert ledger.balances() == {}

    assert "Approve and book" in assert_page(other_desk.get(page))
    assert other_desk.post(page, {"act": "approve"}).url == page

    assert ledger.balances() == {"equity:owners:USD": -3_000_000, "expense:other:USD": 3_000_000}
    assert "booked" in assert_page(desk.get("/desk/entries/"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"credit_2": "2.00"}, "Debits and credits differ by 1.00 USD"),
        ({"debit_1": "-3"}, "is negative"),
        ({"debit_1": "1e30"}, "more than the largest amount"),
        ({"credit_1": "1.00"}, "one of the two"),
        ({"account_1": "payable"}, "Select a valid choice"),
        ({"reason": ""}, "This field is required"),
        ({"booked_on": "2999-01-01"}, "lies in the future"),
        ({"account_1": "cash:available"}, "names the balance transaction"),
    ],
)
def test_a_bad_proposal_says_what_is_wrong_and_leaves_nothing(
    desk: Client, changes: dict[str, str], message: str
) -> None:
    assert message in assert_page(desk.post("/desk/entries/", proposal(**changes)), 422)
    assert not ManualEntry.objects.exists()


def test_reconciliation_shows_each_difference_with_its_cause_and_the_kept_balances(desk: Client) -> None:
    assert "Nothing was compared yet" in assert_page(desk.get("/desk/reconciliation/"))
    held = {"currency": "USD", "ledger": [5, 0], "stripe": [0, 0], "coming": [0, 0], "agrees": False}
    run = ReconciliationRun.objects.create(
        key="k", status="done", n_differences=1, n_transactions=7, compared_until=clock.now(), cash=[held]
    )
    ReconciliationDifference.objects.create(
        run=run, code="cash_differs", subject="USD", detail="<b>by five</b>", cause="A cause", first_seen_at=clock.now()
    )
    BalanceCheck.objects.create(after_account=0, up_to_account=0, n_checked=3, n_wrong=0)

    text = assert_page(desk.get("/desk/reconciliation/"))
    assert "1 difference" in text and "A cause" in text and "equal their postings" in text
    assert b"&lt;b&gt;by five" in desk.get(f"/desk/reconciliation/{run.pk}/").content


def test_the_proof_of_the_books_is_shown_and_asked_for_and_so_is_a_full_look(desk: Client) -> None:
    assert "They were not proved yet" in assert_page(desk.get("/desk/reconciliation/"))
    for _ in range(2):
        assert desk.post("/desk/reconciliation/", {"act": "prove"}).url == "/desk/reconciliation/"
    proof = BooksProof.objects.get()
    assert "A proof is queued" in assert_page(desk.get("/desk/reconciliation/"))
    BooksProof.objects.filter(pk=proof.pk).update(
        status="done", n_findings=1, checked={"entries": 7}, finished_at=clock.now()
    )
    ProofFinding.objects.create(proof=proof, code="pool_differs", detail="<b>pool 3</b>")

    text = assert_page(desk.get("/desk/reconciliation/"))
    assert "1 finding" in text and "7 entries" in text and "pool_differs" in text
    assert b"&lt;b&gt;pool 3" in desk.get("/desk/reconciliation/").content

    for act in ("", "full"):
        desk.post("/desk/reconciliation/", {"act": act})
    assert sorted(ReconciliationRun.objects.values_list("is_full", flat=True)) == [False, True]


def test_the_page_says_which_look_it_was_and_until_when_a_full_one_proved_it(desk: Client) -> None:
    ended = {"status": "done", "n_differences": 0, "n_transactions": 900, "compared_until": clock.now()}
    ReconciliationRun.objects.create(key="full", is_full=True, **ended)
    assert "A full look: 900 transactions compared, all that there are" in assert_page(
        desk.get("/desk/reconciliation/")
    )
    ReconciliationRun.objects.create(key="new", is_full=False, since=clock.now(), **ended)
    text = assert_page(desk.get("/desk/reconciliation/"))
    assert "A look at what is new: 900 transactions since" in text
    assert "The latest full look proved everything until" in text
    bad = ReconciliationRun.objects.create(key="bad", is_full=True, **ended | {"n_differences": 2})
    ReconciliationRun.objects.create(key="newer", is_full=False, since=clock.now(), **ended)
    text = assert_page(desk.get("/desk/reconciliation/"))
    assert "2 differences at the latest full look" in text and f"/desk/reconciliation/{bad.pk}/" in str(
        desk.get("/desk/reconciliation/").content
    )


def test_each_obstacle_to_closing_links_to_where_it_is_settled(spring: None, desk: Client, ann: User) -> None:
    RailExport.objects.create(key="k", currency="USD", proposed_by=ann, proposed_at=clock.now() - timedelta(days=3))
    page = desk.get("/desk/trial-balance/").content.decode()
    assert "1 export over another rail of it waits for a second person." in page
    assert '<a href="/desk/rails/">Other rails</a>' in page
    assert '<a href="/desk/reconciliation/">Proof of the books</a>' in page


def test_the_watcher_is_told_when_the_books_are_wrong_or_nobody_looked(db: Any, client: Client) -> None:
    assert client.get("/booksz").status_code == 200
    BalanceCheck.objects.create(after_account=0, up_to_account=0, n_checked=1, n_wrong=1)
    answer = client.get("/booksz")
    assert (answer.status_code, answer.json()["wrong"]) == (503, {"balances": "1 differ from their postings"})
    BalanceCheck.objects.create(after_account=0, up_to_account=0, n_checked=1, n_wrong=0)
    ReconciliationRun.objects.create(
        key="k", status="done", n_differences=0, finished_at=clock.now() - timedelta(days=2)
    )
    assert list(client.get("/booksz").json()["wrong"]) == ["reconciliation"]
    for is_full, n_differences in ((True, 2), (False, 0)):
        ReconciliationRun.objects.create(
            key=f"full {is_full}", status="done", n_differences=n_differences, is_full=is_full, finished_at=clock.now()
        )
    assert client.get("/booksz").json()["wrong"] == {"reconciliation": "2 differences at the latest full look"}
    ReconciliationRun.objects.create(key="clean", status="done", n_differences=0, finished_at=clock.now())
    proof = BooksProof.objects.create(key="p", status="done", n_findings=3, finished_at=clock.now())
    assert client.get("/booksz").json()["wrong"] == {"proof": "3 findings"}
    BooksProof.objects.filter(pk=proof.pk).update(n_findings=0)
    assert client.get("/booksz").status_code == 200
    BooksProof.objects.filter(pk=proof.pk).update(finished_at=clock.now() - timedelta(days=3))
    assert list(client.get("/booksz").json()["wrong"]) == ["proof"]


def test_old_books_that_nobody_ever_looked_at_are_told(spring: None, client: Client, monkeypatch: Any) -> None:
    assert client.get("/booksz").status_code == 200
    monkeypatch.setattr(timezone, "now", lambda now=timezone.now: now() + timedelta(days=3))
    assert client.get("/booksz").json()["wrong"] == {
        "balances": "never looked at",
        "reconciliation": "never looked at",
        "proof": "never proved",
    }


def test_an_export_over_another_rail_goes_through_the_pages(
    spring: None, desk: Client, other_desk: Client, alice: Any
) -> None:
    ServedCountries.objects.create(platform_country="US", countries=["US"])
    clock.advance(timedelta(days=40))
    assert "Waits for their bank details" in assert_page(desk.get("/desk/rails/"))
    assert "waits for their bank details" in assert_page(
        desk.post("/desk/rails/", {"currency": "USD", "key": "k"}), 422
    )
    account = {"account_holder": "Alice", "account": "DE89370400440532013000", "address": "1 Road, Berlin"}
    bank_details.set_details(party=alice, user=alice.user, **account)
    clock.advance(timedelta(hours=72))
    page = desk.post("/desk/rails/", {"currency": "USD", "key": "k"}).url
    assert RailExport.objects.get().payouts.count() == 1
    assert "Account ending in 3000" in assert_page(desk.get(page))
    assert "too little" in assert_page(other_desk.post(page, {"act": "approve"}), 422)
    assert desk.post(f"{page[:-1]}.csv").status_code == 404  # nobody approved it
    other_desk.post(page, {"act": "reject"})
    assert "rejected" in assert_page(desk.get(page))
    assert "Nothing in EUR is due" in assert_page(desk.post("/desk/rails/", {"currency": "EUR", "key": "e"}), 422)


def test_what_the_bank_did_is_recorded_by_one_and_confirmed_by_another(
    spring: None, desk: Client, other_desk: Client, ann: User, alice: Any
) -> None:
    ServedCountries.objects.create(platform_country="US", countries=["US"])
    account = {"account_holder": "Alice", "account": "DE89370400440532013000", "address": "1 Road, Berlin"}
    bank_details.set_details(party=alice, user=alice.user, **account)
    clock.advance(timedelta(days=40))
    page = desk.post("/desk/rails/", {"currency": "USD", "key": "k"}).url
    payout = RailPayout.objects.get()
    manual = manual_entries.propose(
        user=ann,
        key="fund",
        legs={"bank:USD": payout.amount_micros, "equity:owners:USD": -payout.amount_micros},
        reason="Paid in",
    )
    manual_entries.approve(manual=manual, user=UserFactory(is_staff=True))
    assert other_desk.post(page, {"act": "approve"}).url == page
    assert "Bank’s reference" in assert_page(desk.get(page))
    act = f"/desk/rails/payouts/{payout.pk}/"
    assert "statement" in assert_page(desk.post(act, {"act": "sent", "reference": " "}, follow=True))
    assert "Somebody else confirms it" in assert_page(desk.post(act, {"act": "sent", "reference": "S 1"}, follow=True))

    mistaken = f"/desk/rails/confirmations/{RailConfirmation.objects.get().pk}/"
    assert "Withdraw" in assert_page(desk.get(page)) and "Reject" in assert_page(other_desk.get(page))
    assert "Withdrawn; nothing was booked" in assert_page(desk.post(mistaken, {"act": "reject"}, follow=True))
    desk.post(act, {"act": "sent", "reference": "S 1"})

    decide = f"/desk/rails/confirmations/{RailConfirmation.objects.get(status='recorded').pk}/"
    for shown in ("/desk/rails/", page):
        assert "somebody else confirms" in assert_page(desk.get(shown))
        assert "Confirm" in assert_page(other_desk.get(shown)) and "S 1" in assert_page(other_desk.get(shown))
    assert "1 transfer over another rail to confirm" in assert_page(desk.get("/desk/"))
    assert "another one of the staff" in assert_page(desk.post(decide, {"act": "approve"}, follow=True))
    assert RailPayout.objects.get().status == "intended"
    assert other_desk.post(decide, {"act": "approve"}).url == page

    assert RailPayout.objects.get().status == "sent"
    text = assert_page(desk.get(page))
    assert "S 1" in text and "Recorded, for" not in assert_page(desk.get("/desk/rails/"))


def test_the_audit_log_is_filtered_and_paged_and_cannot_be_changed(desk: Client, ann: User, mallory: Any) -> None:
    for number in range(60):
        AuditEvent.objects.create(actor=ann if number % 2 else None, action="thing.done", target=f"thing:{number}")

    text = assert_page(desk.get("/desk/audit/"))
    assert "thing 59 " in text and "thing 0 " not in text
    assert "thing 59 " in assert_page(desk.get("/desk/audit/", {"who": ann.email, "staff": "on"}))
    assert "thing 58 " not in assert_page(desk.get("/desk/audit/", {"staff": "on"}))
    assert "Nothing is found" in assert_page(desk.get("/desk/audit/", {"action": "nothing"}))
    for target in ("thing:7", "thing 7"):  # as it is kept, and as the page writes it
        text = assert_page(desk.get("/desk/audit/", {"target": target, "action": "thing done"}))
        assert "thing 7 " in text and "thing 57 " not in text
    older = AuditEvent.objects.get(target="thing:10").pk + 1
    assert "thing 10 " in assert_page(desk.get("/desk/audit/", {"before": older}))
    assert_page(desk.get("/desk/audit/", {"since": "2020-01-01", "until": "nonsense"}))


def test_a_payee_sees_three_figures_the_lines_behind_them_and_where_stripe_does_not_pay(
    spring: None, alice: Any
) -> None:
    ServedCountries.objects.create(platform_country="US", countries=["US"])
    browser = signed_in(alice)

    text = assert_page(browser.get("/earnings/"))

    assert "Earned $22.50" in text and "Still to come $22.50 Held until 9 Apr 2028" in text and "Paid out $0.00" in text
    assert "Stripe does not pay to DE" in text and "Enter your bank details" in text
    assert "the lines that wait" in assert_page(browser.get("/earnings/?show=pending"))
    assert "Sale, upfront" not in assert_page(browser.get("/earnings/?show=due"))
    clock.advance(timedelta(days=10))
    due = assert_page(browser.get("/earnings/"))
    assert "$22.50 · Waits for your bank details" in due
    assert "Set up payouts with Stripe to be paid" not in due  # it would not help
    assert "None waits." in assert_page(browser.get("/earnings/?show=pending"))


def test_tax_is_handed_to_its_office_from_its_rates_own_account(desk: Client, other_desk: Client) -> None:
    rate = TaxRate.objects.create(jurisdiction="DE", name="VAT", rate_bps=1_900, valid_from=clock.today())
    page = desk.post("/desk/entries/", proposal(account_1=f"tax:{rate.pk}", account_2="bank")).url

    assert other_desk.post(page, {"act": "approve"}).url == page

    assert ledger.balances() == {f"tax:{rate.pk}:USD": 3_000_000, "bank:USD": -3_000_000}
