"""Where payees whom Stripe does not reach are paid: checked, sealed, held and told about."""

import json
from datetime import timedelta
from typing import Any

import pytest
from cryptography.fernet import InvalidToken
from django.core import mail
from django.db import DatabaseError, connection, transaction

from marketplace import clock, jobs
from marketplace.errors import InvalidInput, NotAllowed
from marketplace.models import AuditEvent
from payouts import sealing
from payouts.errors import PaidByStripe
from payouts.models import BankDetails, BankDetailsErasure, BankDetailsNotice, ServedCountries
from payouts.services import bank_details
from payouts.services.bank_details import (
    Details,
    erase_details,
    erase_on_request,
    latest_of,
    opened,
    set_details,
    usable_of,
)
from tests.factories.marketplace import UserFactory
from tests.factories.payouts import PayeeAccountFactory

IBAN = "DE89 3704 0044 0532 0130 00"
ACCOUNT = {"account_holder": "Alice  Example", "account": IBAN, "address": " 1 Road \n\n10115 Berlin"}


@pytest.fixture(autouse=True)
def nobody_is_served(db: Any) -> None:
    ServedCountries.objects.create(platform_country="US", countries=["US"])


def test_an_account_is_sealed_and_used_after_72_hours(alice: Any) -> None:
    details = set_details(party=alice, user=alice.user, bic="deutdeff", **ACCOUNT)

    assert opened(details) == Details(
        "Alice Example", "DE89370400440532013000", "", "DEUTDEFF", "", "1 Road\n10115 Berlin"
    )
    with connection.cursor() as cursor:
        cursor.execute("SELECT to_jsonb(d)::text FROM payouts_bankdetails d")
        (kept,) = cursor.fetchone()
    assert not any(plain in kept for plain in ("DE89", "0532013000", "Example", "Berlin", "DEUT"))
    assert json.loads(kept)["last_four"] == "3000"
    assert usable_of([alice.pk]) == {}
    clock.advance(timedelta(hours=71, minutes=59))
    assert usable_of([alice.pk]) == {}
    clock.advance(timedelta(minutes=1))
    assert usable_of([alice.pk]) == {alice.pk: details}


def test_a_change_is_another_row_begins_the_wait_anew_and_the_same_again_does_not(alice: Any) -> None:
    first = set_details(party=alice, user=alice.user, **ACCOUNT)
    clock.advance(timedelta(hours=80))
    assert set_details(party=alice, user=alice.user, **ACCOUNT | {"account": IBAN.replace(" ", "")}) == first
    assert usable_of([alice.pk]) == {alice.pk: first}

    second = set_details(party=alice, user=alice.user, **ACCOUNT | {"address": "2 Road, Berlin"})

    assert second != first and usable_of([alice.pk]) == {}  # not the old ones either: perhaps they are closed
    clock.advance(timedelta(hours=72))
    assert usable_of([alice.pk]) == {alice.pk: second}
    events = AuditEvent.objects.filter(action="bank_details.changed")
    assert events.count() == 2 and not any("DE89" in json.dumps(one.detail) for one in events)


def test_every_owner_is_told_by_mail_without_the_account(alice: Any) -> None:
    details = set_details(party=alice, user=alice.user, **ACCOUNT)
    set_details(party=alice, user=alice.user, **ACCOUNT)
    (notice,) = BankDetailsNotice.objects.all()
    for _ in range(2):
        with jobs.claimed(BankDetailsNotice, notice.pk) as held:
            if held:
                bank_details.send_notice(held)

    (sent,) = mail.outbox
    assert sent.to == [alice.user.email] and "was changed" in sent.subject
    assert "ends in 3000" in sent.body and f"{details.usable_from:%-d %B %Y}" in sent.body and "0532" not in sent.body


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"account": "DE88 3704 0044 0532 0130 00"}, "/account", "This IBAN cannot be"),
        ({"account": "DE89"}, "/account", "This IBAN cannot be"),
        ({"account": "ZZ89370400440532013000"}, "/account", "This IBAN cannot be"),
        ({"account": "12"}, "/account", "4 to 34"),
        ({"account": "=1+1"}, "/account", "4 to 34"),
        ({"account": "12345678"}, "/bic", "does not say which bank"),
        ({"account": "12345678", "bic": "DEUT"}, "/bic", "BIC cannot be"),
        ({"account_holder": " "}, "/account_holder", "holder"),
        ({"address": " "}, "/address", "address"),
        ({"address": "x" * 501}, "/address", "500"),
        ({"bank": "x" * 141, "account": "12345678"}, "/bank", "140"),
    ],
)
def test_what_cannot_be_is_refused_with_its_field(alice: Any, changes: dict[str, str], field: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as refused:
        set_details(party=alice, user=alice.user, **ACCOUNT | changes)

    assert list(refused.value.pointers) == [field]
    assert not BankDetails.objects.exists()


def test_an_account_number_goes_with_a_bic_or_the_banks_name(alice: Any) -> None:
    by_bic = set_details(party=alice, user=alice.user, **ACCOUNT | {"account": "12-3456 78", "bic": "BCCUCUHH"})
    by_name = set_details(
        party=alice, user=alice.user, **ACCOUNT | {"account": "12345678", "bank": "Banco Central, La Habana"}
    )

    assert (opened(by_bic).account_number, opened(by_bic).bic) == ("12345678", "BCCUCUHH")
    assert (opened(by_name).bank, opened(by_name).iban) == ("Banco Central, La Habana", "")


def test_only_owners_of_payees_that_stripe_does_not_reach_enter_them(alice: Any, mallory: Any, bob: Any) -> None:
    with pytest.raises(NotAllowed):
        set_details(party=alice, user=mallory.user, **ACCOUNT)
    PayeeAccountFactory(party=bob)
    with pytest.raises(PaidByStripe):
        set_details(party=bob, user=bob.user, **ACCOUNT)
    ServedCountries.objects.create(platform_country="US", countries=["DE", "US"])
    with pytest.raises(PaidByStripe):
        set_details(party=alice, user=alice.user, **ACCOUNT)

    assert not BankDetails.objects.exists()


def test_what_was_sealed_opens_for_its_party_under_its_key_alone(alice: Any, bob: Any, settings: Any) -> None:
    sealed = sealing.seal({"iban": "X"}, party=alice.pk)
    assert sealing.unseal(sealed, party=alice.pk) == {"iban": "X"}
    with pytest.raises(ValueError, match="not for"):
        sealing.unseal(sealed, party=bob.pk)
    settings.BANK_DETAILS_KEY = "another"
    with pytest.raises(InvalidToken):
        sealing.unseal(sealed, party=alice.pk)


def test_who_enters_them_again_after_the_key_was_lost_has_a_new_row(alice: Any, settings: Any) -> None:
    first = set_details(party=alice, user=alice.user, **ACCOUNT)
    settings.BANK_DETAILS_KEY = "another"

    second = set_details(party=alice, user=alice.user, **ACCOUNT)

    assert second.pk > first.pk and set_details(party=alice, user=alice.user, **ACCOUNT) == second
    settings.BANK_DETAILS_KEY = ""
    with pytest.raises(AssertionError, match="only the web process"):
        opened(second)


def test_the_database_keeps_them_and_their_hold(alice: Any) -> None:
    details = set_details(party=alice, user=alice.user, **ACCOUNT)
    attempts: list[Any] = [
        lambda: BankDetails.objects.update(sealed="x"),
        lambda: BankDetails.objects.update(usable_from=clock.now()),
        lambda: BankDetails.objects.filter(pk=details.pk).delete(),
        lambda: BankDetails.objects.create(
            party=alice,
            sealed="x",
            last_four="x",
            entered_by=alice.user,
            entered_at=clock.now(),
            usable_from=clock.now() + timedelta(hours=71),
        ),
    ]
    for attempt in attempts:
        with pytest.raises(DatabaseError), transaction.atomic():
            attempt()
    assert BankDetails.objects.get() == details


def test_an_owner_erases_every_account_and_only_that_it_happened_stays(alice: Any, bob: Any) -> None:
    other = set_details(party=bob, user=bob.user, **ACCOUNT)
    rows = [set_details(party=alice, user=alice.user, **ACCOUNT | {"address": f"{n} Road, Berlin"}) for n in (1, 2)]
    clock.advance(timedelta(hours=72))

    assert [erase_details(party=alice, user=alice.user) for _ in range(2)] == [2, 0]

    kept = BankDetails.objects.filter(party=alice).values_list("sealed", "last_four", "erasure__erased_by")
    assert list(kept) == [("", "", alice.user.pk)] * 2
    assert latest_of(alice) is None and usable_of([alice.pk, bob.pk]) == {bob.pk: other}
    (event,) = AuditEvent.objects.filter(action="bank_details.erased", actor=alice.user, party=alice)
    assert event.detail == {"before": {"details": [row.pk for row in rows]}, "reason": ""}
    again = set_details(party=alice, user=alice.user, **ACCOUNT)
    assert usable_of([alice.pk]) == {} and latest_of(alice) == again  # held anew


def test_the_staff_erase_on_request_and_strangers_never(alice: Any, mallory: Any) -> None:
    details = set_details(party=alice, user=alice.user, **ACCOUNT)
    staff = UserFactory(is_staff=True)
    with pytest.raises(NotAllowed, match="Only an owner"):
        erase_details(party=alice, user=staff)
    with pytest.raises(NotAllowed, match="Only staff"):
        erase_on_request(party=alice, by=mallory.user, reason="Please.")
    for reason, wrong in ((" ", "missing"), ("x" * 501, "too long")):
        with pytest.raises(InvalidInput) as refused:
            erase_on_request(party=alice, by=staff, reason=reason)
        assert refused.value.pointers == {"/reason": wrong}
    assert latest_of(alice) == details and not BankDetailsErasure.objects.exists()

    assert erase_on_request(party=alice, by=staff, reason=" By mail, ticket 7. ") == 1

    erasure = BankDetailsErasure.objects.get()
    assert (erasure.details, erasure.erased_by, erasure.reason) == (details, staff, "By mail, ticket 7.")


@pytest.mark.as_owner
def test_the_database_empties_them_by_an_erasure_alone_and_keeps_it(alice: Any) -> None:
    details = set_details(party=alice, user=alice.user, **ACCOUNT)
    row = BankDetails.objects.filter(pk=details.pk)
    with pytest.raises(DatabaseError, match="never changed"), transaction.atomic():
        row.update(sealed="", last_four="")
    with transaction.atomic(), connection.cursor() as cursor:  # the application may write the erasure, not the details
        cursor.execute("SET LOCAL ROLE residual_app")
        with pytest.raises(DatabaseError, match="permission denied"), transaction.atomic():
            row.update(sealed="", last_four="")
        BankDetailsErasure.objects.create(details=details, erased_by=alice.user, erased_at=clock.now())

    assert row.values_list("sealed", "last_four").get() == ("", "")
    attempts: list[Any] = [
        lambda: row.update(sealed="x"),
        lambda: row.update(sealed="", entered_at=clock.now()),
        lambda: row.delete(),
        lambda: BankDetailsErasure.objects.update(reason="x"),
        lambda: BankDetailsErasure.objects.all().delete(),
    ]
    for attempt in attempts:
        with pytest.raises(DatabaseError), transaction.atomic():
            attempt()
