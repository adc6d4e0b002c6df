import pytest
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction

from marketplace.models import Party, User
from marketplace.services.parties import create_party, introduce_party


def test_who_makes_a_party_owns_it(alice):
    made = create_party(user=alice.user, name="Lab", kind=Party.Kind.ORGANISATION, country="FR")

    membership = made.memberships.get()
    assert (membership.user, membership.has_authority, made.is_claimed) == (alice.user, True, True)


def test_a_name_in_a_file_is_always_the_same_party(alice, bob):
    first = introduce_party(introducer=alice, external_ref="ann")
    again = introduce_party(introducer=alice, external_ref="ann")
    bobs = introduce_party(introducer=bob, external_ref="ann")

    assert first == again != bobs
    assert (first.name, first.is_claimed, first.memberships.count()) == ("ann", False, 0)


def test_an_address_is_one_user_whatever_its_case(alice):
    with pytest.raises(IntegrityError), transaction.atomic():
        User.objects.create_user("ALICE@example.org", "correct horse battery staple")
    with pytest.raises(ValidationError):
        User(email="not an address").full_clean()
