"""Payout runs: who is paid, in which order, and what stops a run and lets it go on."""

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import httpx
import pytest
from django.db import IntegrityError, transaction
from django.test import override_settings
from django.utils import timezone

from marketplace import clock
from marketplace.errors import InvalidInput, NotAllowed
from marketplace.models import AuditEvent, Party, User
from marketplace.money import Money
from marketplace.services.invitations import accept_invitation, invite, token_of
from marketplace.services.parties import introduce_party
from payouts import gateway, ledger, tasks
from payouts.errors import FourEyes, PayoutRunNotStoppable
from payouts.models import JournalEntry, PayeeAccount, Payout, PayoutRun, PayoutShard
from payouts.services import attempts, events, pacing, plans, transfers
from payouts.services.proofs import check_books
from payouts.services.transfers import request_payout_run
from payouts.standing import Code, asked_in_words, standings_of
from tests.factories.marketplace import OfferFactory, OrderFactory, PartyFactory, PublishedVersionFactory
from tests.factories.payouts import PayeeAccountFactory, sell
from tests.payouts.conftest import BANK
from tests.payouts.services.test_transfers import Stripe, earn, execute, uncertain

DOLLAR = 1_000_000
State = PayoutRun.State


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Stripe:
    stripe = Stripe()
    monkeypatch.setattr(gateway, "create_transfer", stripe.create_transfer)
    monkeypatch.setattr(gateway, "find_transfer", stripe.find_transfer)
    monkeypatch.setattr(attempts.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(pacing.Turns, "wait", lambda self: 0.0)
    return stripe


@pytest.fixture
def staff(db: Any) -> User:
    return User.objects.create_user("finance@example.org", "correct horse battery staple", is_staff=True)


@pytest.fixture
def colleague(db: Any) -> User:
    return User.objects.create_user("colleague@example.org", "correct horse battery staple", is_staff=True)


def owed(*amounts: int) -> list[Party]:
    """Payees that are ready, and owed so many dollars each, due a day after one another from the first to the last."""
    parties = []
    for dollars in amounts:
        party = PartyFactory()
        PayeeAccountFactory(party=party)
        version = PublishedVersionFactory(contributions={party: 1})
        offer = OfferFactory(
            version=version, price_micros=dollars * DOLLAR * 2, upfront_bps=5_000, pool_bps=0, platform_fee_bps=5_000
        )
        payment = sell(OrderFactory(offers=[offer]))
        settle(payment)
        clock.advance(timedelta(days=1))
        parties.append(party)
    clock.advance(timedelta(days=31))
    return parties


def settle(payment: Any) -> None:
    net = payment.amount_micros - payment.fee_micros
    ledger.post(
        key=f"settle:payment:{payment.pk}",
        kind=JournalEntry.Kind.SETTLE,
        postings={"cash:available:USD": net, "cash:pending:USD": -net},
    )
    type(payment).objects.filter(pk=payment.pk).update(settled_at=clock.now())


def set_free(micros: int) -> Callable[[], int]:
    """Leave so much of Stripe's available funds free; gives back what lets the rest be free again."""
    taken = ledger.balance("cash:available:USD") - micros
    ledger.post(
        key=f"taken:{taken}",
        kind=JournalEntry.Kind.SETTLE,
        postings={"cash:available:USD": -taken, "cash:pending:USD": taken},
    )

    def give_back() -> int:
        legs = {"cash:available:USD": taken, "cash:pending:USD": -taken}
        ledger.post(key=f"again:{taken}", kind=JournalEntry.Kind.SETTLE, postings=legs)
        return transfers.resume_when_funded()

    return give_back


def sent() -> list[tuple[int, int]]:
    paid = Payout.objects.filter(status=Payout.Status.SENT).order_by("pk")
    return [(payout.party_id, payout.amount_micros // DOLLAR) for payout in paid]


# --- who is paid ------------------------------------------------------------------------------------------------------


def test_what_is_below_the_payees_minimum_waits_and_adds_up(told: Stripe, db: Any) -> None:
    ready, saving = owed(6, 20)
    plans.set_minimum(party=saving, amount=Money(25 * DOLLAR, "USD"), user=None)

    run = execute(request_payout_run(currency="USD", key="one"))

    assert sent() == [(ready.pk, 6)]
    assert (run.n_planned, run.skipped["below_minimum"]) == (1, {"n": 1, "micros": 20 * DOLLAR})
    (standing,) = standings_of(saving)
    assert standing.code == Code.BELOW_MINIMUM
    assert standing.sentence == "Below your threshold of $25.00: $20.00 waits until there is more."
    plans.set_minimum(party=saving, amount=Money(20 * DOLLAR, "USD"), user=None)
    execute(request_payout_run(currency="USD", key="two"))
    assert sent() == [(ready.pk, 6), (saving.pk, 20)]
    assert check_books().findings == []


@pytest.mark.parametrize("amount", ["0.99", "1000.01", "0"])
def test_a_minimum_has_bounds(alice: Any, amount: str) -> None:
    with pytest.raises(InvalidInput, match=r"from \$1\.00 to \$1,000\.00"):
        plans.set_minimum(party=alice, amount=Money.parse(amount, "USD"), user=None)

    assert plans.minimum_of(alice, "USD") == Money(DOLLAR, "USD")
    assert AuditEvent.objects.filter(action="payout_minimum.changed").count() == 0


def test_an_unclaimed_contributor_accrues_and_whoever_claims_is_paid(
    stripe: Any, db: Any, alice: Any, carol: Any, mailoutbox: Any
) -> None:
    ann = introduce_party(introducer=alice, external_ref="ann")
    earn({ann: 1}, price="20")
    run = request_payout_run(currency="USD", key="one")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gateway, "create_transfer", lambda **_: pytest.fail("nobody is to be paid"))
        execute(run)
    assert ledger.balance(f"payable:{ann.pk}:USD") == -18 * DOLLAR

    invitation = invite(party=ann, email=carol.user.email, by=alice.user)
    claimed = accept_invitation(token=token_of(invitation), user=carol.user)
    Party.objects.filter(pk=ann.pk).update(country="DE")
    claimed.refresh_from_db()
    stripe.onboard(claimed)

    told = Stripe()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gateway, "create_transfer", told.create_transfer)
        execute(request_payout_run(currency="USD", key="two"))
    assert sent() == [(ann.pk, 18)]


# --- funds ------------------------------------------------------------------------------------------------------------


def test_short_funds_pay_whoever_has_waited_longest_and_the_rest_when_more_arrive(told: Stripe, db: Any) -> None:
    first, second, third = owed(10, 30, 5)
    more = set_free(25 * DOLLAR)

    run = execute(request_payout_run(currency="USD", key="one"))

    assert sent() == [(first.pk, 10)]  # not the third, for whom it would do
    assert (run.status, run.state) == ("queued", State.SHORT_OF_FUNDS)
    assert [standing.code for standing in standings_of(third)] == [Code.AWAITING_FUNDS]
    assert more() == 1
    run.refresh_from_db()
    execute(run)
    assert sent() == [(first.pk, 10), (second.pk, 30), (third.pk, 5)]
    assert (run.status, run.state) == ("done", State.ENDED)


def test_what_stripe_has_no_funds_for_keeps_its_place_in_the_run(told: Stripe, db: Any) -> None:
    (party,) = owed(10)
    told.answers = [gateway.StripeRefused("balance_insufficient", "Insufficient funds.", 400)]

    run = execute(request_payout_run(currency="USD", key="one"))

    assert (run.status, run.state) == ("queued", State.SHORT_OF_FUNDS)
    assert ledger.balances(prefix="in_transit") == {}
    execute(run)
    assert list(Payout.objects.order_by("pk").values_list("run", "status")) == [(run.pk, "refused"), (run.pk, "sent")]
    assert (run.status, sent()) == ("done", [(party.pk, 10)])
    assert check_books().findings == []


# --- a person's word --------------------------------------------------------------------------------------------------


@override_settings(PAYOUT_RUN_APPROVAL_ABOVE={"USD": 14})
def test_a_run_above_the_limit_waits_for_a_second_person(told: Stripe, db: Any, staff: User, colleague: User) -> None:
    first, second = owed(10, 5)
    run = execute(request_payout_run(currency="USD", key="one", user=staff))
    assert (run.state, run.planned, told.keys) == (State.AWAITING_APPROVAL, Money(15 * DOLLAR, "USD"), [])
    assert [standing.code for standing in standings_of(first)] == [Code.AWAITING_APPROVAL]

    with pytest.raises(FourEyes, match="ask a colleague"):
        transfers.approve_payout_run(run=run, by=staff)
    with pytest.raises(NotAllowed, match="Only staff"):
        transfers.approve_payout_run(run=run, by=User.objects.create_user("eve@example.org", "x"))
    with pytest.raises(IntegrityError, match="awaiting_approval"), transaction.atomic():
        transfers._intend(run, [first.pk])
    execute(run)
    assert (run.state, told.keys) == (State.AWAITING_APPROVAL, [])

    transfers.approve_payout_run(run=run, by=colleague)
    with pytest.raises(PayoutRunNotStoppable):
        transfers.approve_payout_run(run=run, by=colleague)
    execute(run)

    assert (run.status, run.state, run.approved_by) == ("done", State.ENDED, colleague)
    assert sent() == [(first.pk, 10), (second.pk, 5)]
    actions = AuditEvent.objects.filter(target=f"payout_run:{run.pk}").order_by("pk").values_list("action", "actor")
    assert list(actions) == [("payout_run.requested", staff.pk), ("payout_run.approved", colleague.pk)]


@override_settings(PAYOUT_RUN_APPROVAL_ABOVE={"USD": 9})
def test_an_approved_run_pays_no_more_than_was_planned(told: Stripe, db: Any, colleague: User) -> None:
    (party,) = owed(10)
    run = execute(request_payout_run(currency="USD", key="one"))
    with pytest.raises(IntegrityError, match="has been planned"), transaction.atomic():
        run.planned_payouts.create(position=7, party=PartyFactory(), amount_micros=1, oldest_due_at=clock.now())
    with pytest.raises(IntegrityError, match="keeps what it is about"), transaction.atomic():
        run.planned_payouts.update(amount_micros=20 * DOLLAR)

    transfers.approve_payout_run(run=run, by=colleague)
    with pytest.raises(IntegrityError, match="plans"), transaction.atomic():
        Payout.objects.create(
            run=run, party=party, destination="acct", amount_micros=11 * DOLLAR, currency="USD", intended_at=clock.now()
        )


@override_settings(PAYOUT_RUN_APPROVAL_ABOVE={"USD": 9})
def test_a_rejected_run_sends_nothing_and_the_next_plans_anew(told: Stripe, db: Any, staff: User) -> None:
    (party,) = owed(10)
    run = execute(request_payout_run(currency="USD", key="one"))
    with pytest.raises(InvalidInput, match="Say why"):
        transfers.reject_payout_run(run=run, by=staff, reason=" ")

    transfers.reject_payout_run(run=run, by=staff, reason="The sale looks wrong.")
    execute(run)

    assert (run.status, run.state, sent()) == ("done", State.REJECTED, [])
    with override_settings(PAYOUT_RUN_APPROVAL_ABOVE={"USD": 100}):
        execute(request_payout_run(currency="USD", key="two"))
    assert sent() == [(party.pk, 10)]


def test_a_run_is_paused_for_two_days_and_goes_on_with_new_keys(
    told: Stripe, db: Any, staff: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = owed(10, 20, 30)
    run = request_payout_run(currency="USD", key="one")
    monkeypatch.setattr(transfers, "AT_ONCE", 1)
    told.answers = [None, *[uncertain(None, spent=False)] * 3]
    create = gateway.create_transfer

    def pause_with_the_second(**params: Any) -> gateway.Transfer:
        if len(told.keys) == 1:
            transfers.pause_payout_run(run=run, by=staff, reason="The bank called.")
        return create(**params)

    monkeypatch.setattr(gateway, "create_transfer", pause_with_the_second)
    execute(run)
    assert (run.status, run.state, run.note) == ("queued", State.PAUSED, "The bank called.")
    assert sent() == [(first.pk, 10)] and len(told.keys) == 4
    assert Payout.objects.filter(party=third).count() == 0
    execute(run)
    assert len(told.keys) == 4  # nothing is tried while it is paused

    monkeypatch.setattr(gateway, "create_transfer", create)
    Payout.objects.filter(status="intended").update(first_tried_at=timezone.now() - timedelta(days=2))
    transfers.resume_payout_run(run=run, by=staff)
    execute(run)

    assert (run.status, run.state) == ("done", State.ENDED)
    assert sent() == [(first.pk, 10), (second.pk, 20), (third.pk, 30)]
    assert told.keys[4:] == [
        f"payout:{Payout.objects.get(party=second).pk}:2",
        f"payout:{Payout.objects.get(party=third).pk}:1",
    ]
    assert check_books().findings == []


# --- many -------------------------------------------------------------------------------------------------------------


def test_a_large_run_is_cut_into_shards_and_the_last_one_ends_it(
    told: Stripe, db: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parties = owed(3, 4, 5, 6, 7)
    monkeypatch.setattr(transfers, "shard_size", lambda: 2)
    set_free(18 * DOLLAR)

    run = execute(request_payout_run(currency="USD", key="one"))

    shards = list(PayoutShard.objects.order_by("first"))
    assert [(shard.first, shard.end) for shard in shards] == [(0, 2), (2, 4)]  # the fifth is not funded
    assert (run.status, sent()) == ("queued", [])
    told.answers = [uncertain(None, spent=False)] * 6  # three tries of each
    with pytest.raises(transfers.StillUncertain):
        tasks.execute_payout_shard(shards[0].pk)  # a worker whose Stripe is silent
    tasks.execute_payout_shard(shards[1].pk)
    tasks.execute_payout_shard(shards[1].pk)  # delivered twice
    PayoutShard.objects.update(due_at=timezone.now())
    tasks.execute_payout_shard(shards[0].pk)
    run.refresh_from_db()
    assert run.due_at <= timezone.now()  # the last one woke it
    execute(run)
    assert (run.state, run.status) == (State.SHORT_OF_FUNDS, "queued")
    ledger.post(
        key="arrived",
        kind=JournalEntry.Kind.SETTLE,
        postings={"cash:available:USD": 7 * DOLLAR, "cash:pending:USD": -7 * DOLLAR},
    )
    execute(run)
    tasks.execute_payout_shard(PayoutShard.objects.get(first=4).pk)
    execute(run)

    assert sorted(sent()) == sorted((party.pk, number) for number, party in enumerate(parties, start=3))
    assert (run.status, run.state) == ("done", State.ENDED)
    assert len(told.made) == 5


def test_no_daily_run_while_an_earlier_one_waits(told: Stripe, db: Any) -> None:
    owed(10)
    set_free(0)
    tasks.request_daily_payout_runs()
    dollars = PayoutRun.objects.get(currency="USD")
    execute(dollars)
    clock.advance(timedelta(days=1))

    tasks.request_daily_payout_runs()

    assert list(PayoutRun.objects.filter(currency="USD")) == [dollars]


# --- pace -------------------------------------------------------------------------------------------------------------


def test_a_429_puts_everybody_off_and_counts_as_nobodys_failure(
    told: Stripe, db: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (party,) = owed(10)
    pauses: list[float | None] = []
    monkeypatch.setattr(pacing, "back_off", lambda *, retry_after_seconds, number: pauses.append(retry_after_seconds))
    busy = gateway.StripeUncertain("?", http_status=429, retry_after_seconds=7, is_key_spent=False)
    told.answers = [busy] * 3

    run = execute(request_payout_run(currency="USD", key="one"))

    assert (run.status, run.n_failures, pauses) == ("queued", 0, [7, 7, 7])
    assert run.due_at > timezone.now()
    execute(run)
    assert set(told.keys) == {f"payout:{Payout.objects.get().pk}:1"}
    assert (run.status, sent()) == ("done", [(party.pk, 10)])


@override_settings(STRIPE_REQUESTS_PER_SECOND=100)
def test_workers_draw_from_one_bucket_and_stay_below_the_rate() -> None:
    started = time.monotonic()
    workers = [threading.Thread(target=lambda: [pacing.wait_for_turn() for _ in range(15)]) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert time.monotonic() - started > (60 - 10) / 100 * 0.95  # a tenth of a second's worth may come at once


@override_settings(STRIPE_REQUESTS_PER_SECOND=100)
def test_a_batch_draws_its_turns_a_few_at_once_and_stays_below_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    take = pacing.Turns._draw
    monkeypatch.setattr(pacing.Turns, "_draw", lambda self: (take(self), drawn.append(len(self._drawn))))
    turns, started = pacing.Turns(38), time.monotonic()
    workers = [threading.Thread(target=lambda n=n: [turns.wait() for _ in range(n)]) for n in (10, 20, 8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert time.monotonic() - started > (38 - 10) / 100 * 0.95
    assert drawn == [5, 5, 5, 5, 5, 5, 5, 3]  # so Redis was asked eight times, and nothing is drawn that nobody uses
    with pytest.raises(ValueError, match="More turns"):
        turns.wait()


@override_settings(STRIPE_REQUESTS_PER_SECOND=100)
def test_a_back_off_holds_for_turns_that_were_drawn_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "_local", pacing._Local())
    turns = pacing.Turns(5)
    turns.wait()

    pacing.back_off(retry_after_seconds=0.4, number=0)
    started = time.monotonic()
    turns.wait()

    assert time.monotonic() - started > 0.35


@override_settings(STRIPE_REQUESTS_PER_SECOND=10)
def test_after_a_back_off_nothing_has_flowed_in_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "_local", pacing._Local())
    pacing.back_off(retry_after_seconds=0.3, number=0)
    started = time.monotonic()
    for _ in range(3):
        pacing.wait_for_turn()

    assert time.monotonic() - started > (0.3 + 3 / 10) * 0.95


@override_settings(STRIPE_REQUESTS_PER_SECOND=1_000)
def test_a_back_off_holds_for_the_next_of_any_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "_local", pacing._Local())
    slept: list[float] = []
    monkeypatch.setattr(pacing.time, "sleep", slept.append)

    pacing.back_off(retry_after_seconds=5, number=0)
    threading.Thread(target=pacing.wait_for_turn).run()

    assert 4 < slept[0] <= 5 + 2 / 1_000  # and a place in the queue


@override_settings(STRIPE_REQUESTS_PER_SECOND=100, REDIS_URL="redis://127.0.0.1:1/0")
def test_without_redis_a_process_keeps_the_pace_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> Any:
        raise pacing.RedisError("away")

    monkeypatch.setattr(pacing, "_redis", away)
    started = time.monotonic()
    for _ in range(11):
        pacing.wait_for_turn()

    assert time.monotonic() - started > 0.09


# --- at the local Stripe ----------------------------------------------------------------------------------------------


def test_the_local_stripe_answers_429_and_the_run_keeps_its_pace(
    stripe: Any, settings: Any, db: Any, carol: Any
) -> None:
    from payouts.services.reconciliation import settle_funds
    from payouts.services.sales import start_checkout

    parties = [PartyFactory() for _ in range(4)]
    for party in parties:
        stripe.onboard(party)
    version = PublishedVersionFactory(contributions=dict.fromkeys(parties, 1))
    order = OrderFactory(buyer=carol, offers=[OfferFactory(version=version, upfront_bps=9_000, pool_bps=0)])
    stripe.pay(start_checkout(order=order, success_url="http://a.test/", cancel_url="http://a.test/"))
    events.book_checkout(order.payment.checkout_id)
    stripe.advance(days=3)
    settle_funds()
    clock.advance(timedelta(days=31))
    stripe._control("POST", "limits", json={"requests_per_second": 2, "retry_after_seconds": 1})
    settings.STRIPE_REQUESTS_PER_SECOND = 1_000  # too much for it, so it must say so

    run = execute(request_payout_run(currency="USD", key="one"))
    while run.status == "queued":
        execute(run)

    assert (run.status, run.n_failures) == ("done", 0)
    assert len(stripe.objects("transfers")) == 4 == len(sent())


def test_a_bank_that_refuses_is_shown_to_the_payee_who_names_another(
    stripe: Any, db: Any, alice: Any, carol: Any
) -> None:
    from payouts.services import payees
    from payouts.services.reconciliation import settle_funds
    from payouts.services.sales import start_checkout

    def onboard(number: str) -> None:
        url = payees.start_onboarding(party=alice, return_url="http://shop.test/", refresh_url="http://shop.test/")
        assert httpx.post(url, data=BANK | {"account_number": number}).status_code == 303
        payees.refresh_payee(PayeeAccount.objects.get(party=alice).stripe_account_id)

    def hear(*kinds: str) -> None:
        account = PayeeAccount.objects.get(party=alice).stripe_account_id
        for told in reversed(stripe.objects("events?limit=100", **{"Stripe-Account": account})):
            if told["type"] in kinds:
                row = stripe.received(told, endpoint="connect")
                type(row).objects.filter(pk=row.pk).update(account=account)
                tasks.apply_stripe_event(row.pk)

    onboard("DE62370400440532013001")
    order = OrderFactory(
        buyer=carol,
        offers=[OfferFactory(version=PublishedVersionFactory(contributions={alice: 1}), upfront_bps=9_000, pool_bps=0)],
    )
    stripe.pay(start_checkout(order=order, success_url="http://a.test/", cancel_url="http://a.test/"))
    events.book_checkout(order.payment.checkout_id)
    stripe.advance(days=3)
    settle_funds()
    clock.advance(timedelta(days=31))
    execute(request_payout_run(currency="USD", key="one"))
    stripe.advance(days=3)
    hear("payout.failed", "account.updated")

    payout = Payout.objects.get()
    assert (payout.status, payout.bank_failure_code) == ("sent", "no_account")
    by_code = {standing.code: standing.sentence for standing in standings_of(alice)}
    assert by_code == {
        Code.DETAILS_SOON: "Stripe needs a bank account before it pays your bank.",
        Code.BANK_REFUSED: "Your bank refused the payout of $90.00: no such account exists. The money is at Stripe; name another "
        "account there and it is sent again.",
    }

    onboard(BANK["account_number"])
    stripe.advance(days=3)
    hear("payout.paid")

    payout.refresh_from_db()
    assert (payout.status, standings_of(alice)) == ("paid", [])
    assert check_books().findings == []


def test_what_stripe_asks_is_said_in_words(stripe: Any, db: Any, alice: Any) -> None:
    from payouts.services import payees

    earn({alice: 1}, price="20")
    account = stripe.onboard(alice).stripe_account_id
    asked = {
        "account": account,
        "currently_due": ["individual.id_number"],
        "transfers": "inactive",
        "payouts_enabled": False,
    }
    stripe._control("POST", "accounts", json=asked)
    payees.refresh_payee(account)

    (standing,) = standings_of(alice)

    assert (standing.code, standing.amount) == (Code.DETAILS_NEEDED, Money(18 * DOLLAR, "USD"))
    assert standing.sentence == "Stripe needs your tax form (your tax identification number) before it can pay you."
    run = execute(request_payout_run(currency="USD", key="one"))
    assert run.skipped == {"not_ready": {"n": 1, "micros": 18 * DOLLAR}}


def test_requirements_are_named_once_each_and_unknown_ones_as_they_are() -> None:
    names = [
        "individual.dob.day",
        "individual.dob.month",
        "external_account",
        "person_1a.verification.document",
        "new_thing.of_stripe",
    ]

    assert asked_in_words(names) == "your date of birth, a bank account, a photo of an ID and new thing, of stripe"


def test_a_hold_says_until_when_and_why(db: Any, alice: Any) -> None:
    sell(OrderFactory(offers=[OfferFactory(version=PublishedVersionFactory(contributions={alice: 1}))]))
    due_at = alice.division_lines.get().due_at

    by_code = {standing.code: standing for standing in standings_of(alice)}

    assert set(by_code) == {Code.NOT_SET_UP, Code.ON_HOLD}
    held = by_code[Code.ON_HOLD]
    assert held.until == due_at
    assert held.sentence.startswith(f"On hold until {due_at:%-d %B %Y} because ")
