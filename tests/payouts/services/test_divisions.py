"""Division inside the database: the same as the method written down in Python, and counted once per version."""

from typing import Any

import pytest
from django.db import connection
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marketplace.money import Money
from payouts import ledger
from payouts.allocation import allocate
from payouts.models import DivisionLine, JournalEntry, PayeeCount, Posting
from payouts.services import divisions
from payouts.services.divisions import ALLOCATED
from payouts.services.proofs import check_books
from tests.factories.marketplace import OfferFactory, OrderFactory, PartyFactory, PublishedVersionFactory
from tests.factories.payouts import sell

weights = st.dictionaries(st.integers(1, 10**6), st.integers(1, 10**15), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(micros=st.integers(1, 10**15), weights=weights)
def test_the_database_allocates_as_the_method_says(db: Any, micros: int, weights: dict[int, int]) -> None:
    given = "SELECT * FROM unnest(%(parties)s::bigint[], %(weights)s::bigint[], %(weights)s::bigint[]) AS w (party_id, weight, n_records)"
    with connection.cursor() as cursor:
        cursor.execute(
            ALLOCATED.format(weights=given),
            {
                "parties": list(weights),
                "weights": list(weights.values()),
                "micros": micros,
                "total": sum(weights.values()),
            },
        )
        split = {party: int(due) for party, _, _, due in cursor.fetchall()}

    assert split == {party: due.micros for party, due in allocate(Money(micros, "USD"), weights).items()}


def test_a_versions_records_are_counted_once(db: Any, alice: Any, bob: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    version = PublishedVersionFactory(contributions={alice: 2, bob: 1})
    sell(OrderFactory(offers=[OfferFactory(version=version)]))
    kept = list(PayeeCount.objects.order_by("role", "party").values_list("role", "party", "n_records"))
    monkeypatch.setattr(divisions, "MONEY_COUNTS", "SELECT no_such_column")

    sell(OrderFactory(offers=[OfferFactory(version=version)]))

    assert kept == [
        ("labeller", alice.pk, 2),
        ("labeller", bob.pk, 1),
        ("rights_holder", alice.pk, 2),
        ("rights_holder", bob.pk, 1),
    ]
    assert DivisionLine.objects.count() == 4
    assert check_books().findings == []


def test_a_division_of_more_payees_than_an_entry_holds_is_cut_into_entries(db: Any) -> None:
    payees = {PartyFactory(): 1 for _ in range(7)}
    version = PublishedVersionFactory(contributions=payees)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ledger, "MAX_LEGS", 6)  # five payees and the source in each
        sell(OrderFactory(offers=[OfferFactory(version=version)]))

    entries = JournalEntry.objects.filter(kind="upfront").order_by("pk")
    assert [entry.key.rpartition(":")[2] for entry in entries] == ["0", "1"]
    assert [entry.n_legs for entry in entries] == [6, 3]
    legs = Posting.objects.filter(entry__in=entries).order_by("entry", "leg").values_list("leg", "account__party")
    in_order = sorted(party.pk for party in payees)
    assert list(legs) == [
        *enumerate([None, *in_order[:5]]),
        *enumerate([None, *in_order[5:]]),
    ]
    assert check_books().findings == []
    with pytest.raises(ledger.EntryKeyReused):
        ledger.post_split(
            key=entries[0].key.rpartition(":")[0],
            kind=JournalEntry.Kind.UPFRONT,
            source="cash:pending:USD",
            currency="USD",
            booked_at=entries[0].booked_at,
            dues="SELECT 1, 1",
            parameters={},
        )
