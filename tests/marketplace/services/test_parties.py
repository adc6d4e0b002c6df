import hashlib
from datetime import timedelta

import pytest
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction
from django.utils import timezone

from marketplace.errors import NotAllowed
from marketplace.models import AuditEvent, Invitation, Membership, Party, User
from marketplace.services.parties import (
    INVITATION_LIFE,
    InvitationNotValid,
    accept_invitation,
    create_party,
    introduce_party,
    invite,
)
from tests.factories.marketplace import UserFactory


@pytest.fixture
def annotator(alice):
    """Whom alice's files call ann."""
    return introduce_party(introducer=alice, external_ref="ann")


@pytest.fixture
def ann(db):
    return UserFactory(email="ann@example.org")


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


def test_the_invited_person_claims_the_party(alice, annotator, ann):
    token = invite(party=annotator, email="Ann@Example.org", by=alice.user)

    claimed = accept_invitation(token=token, user=ann)

    assert claimed == annotator and claimed.is_claimed
    assert Membership.objects.get(party=annotator).user == ann
    assert Invitation.objects.get().accepted_by == ann
    assert AuditEvent.objects.get(action="party.claimed").actor == ann


def test_only_a_hash_of_the_token_is_kept(alice, annotator):
    token = invite(party=annotator, email="ann@example.org", by=alice.user)

    assert Invitation.objects.get().token_hash == hashlib.sha256(token.encode()).hexdigest()


def test_accepting_twice_is_accepting_once(alice, annotator, ann):
    token = invite(party=annotator, email="ann@example.org", by=alice.user)

    assert accept_invitation(token=token, user=ann) == accept_invitation(token=token, user=ann)
    assert Membership.objects.filter(party=annotator).count() == 1


def test_an_invitation_is_for_one_address(alice, annotator, mallory):
    token = invite(party=annotator, email="ann@example.org", by=alice.user)

    with pytest.raises(InvitationNotValid, match="another address"):
        accept_invitation(token=token, user=mallory.user)

    annotator.refresh_from_db()
    assert not annotator.is_claimed and not annotator.memberships.exists()


def test_an_invitation_ends(alice, annotator, ann):
    token = invite(party=annotator, email="ann@example.org", by=alice.user)
    Invitation.objects.update(expires_at=timezone.now() - timedelta(seconds=1))

    with pytest.raises(InvitationNotValid, match="expired"):
        accept_invitation(token=token, user=ann)
    assert timedelta(days=7) < INVITATION_LIFE <= timedelta(days=90)


def test_a_token_that_nobody_sent_claims_nothing(annotator, ann):
    with pytest.raises(InvitationNotValid):
        accept_invitation(token="guess", user=ann)


def test_a_new_invitation_replaces_the_open_one(alice, annotator, ann):
    old = invite(party=annotator, email="ann@example.org", by=alice.user)
    new = invite(party=annotator, email="ann@example.org", by=alice.user)

    with pytest.raises(InvitationNotValid):
        accept_invitation(token=old, user=ann)
    assert accept_invitation(token=new, user=ann) == annotator


def test_only_the_introducers_owners_invite(alice, annotator, mallory):
    viewer = UserFactory()
    Membership.objects.create(party=alice, user=viewer, role=Membership.Role.VIEWER)

    for user in (viewer, mallory.user):
        with pytest.raises(NotAllowed):
            invite(party=annotator, email="mallory@example.org", by=user)
    with pytest.raises(NotAllowed):
        invite(party=alice, email="mallory@example.org", by=alice.user)  # was never introduced
    assert not Invitation.objects.exists()


def test_a_claimed_party_invites_nobody_else(alice, annotator, ann):
    accept_invitation(token=invite(party=annotator, email="ann@example.org", by=alice.user), user=ann)

    with pytest.raises(NotAllowed, match="owner already"):
        invite(party=Party.objects.get(pk=annotator.pk), email="bob@example.org", by=alice.user)


def test_of_two_invited_the_first_claims(alice, annotator, ann, bob):
    tokens = [invite(party=annotator, email=f"{name}@example.org", by=alice.user) for name in ("ann", "bob")]
    accept_invitation(token=tokens[0], user=ann)

    with pytest.raises(InvitationNotValid, match="claimed already"):
        accept_invitation(token=tokens[1], user=bob.user)
    assert [one.user for one in Membership.objects.filter(party=annotator)] == [ann]


def test_an_address_is_one_user_whatever_its_case(alice):
    with pytest.raises(IntegrityError), transaction.atomic():
        User.objects.create_user("ALICE@example.org", "correct horse battery staple")
    with pytest.raises(ValidationError):
        User(email="not an address").full_clean()
