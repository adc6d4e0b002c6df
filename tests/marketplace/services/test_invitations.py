import hashlib
import re
from datetime import timedelta

import pytest
from allauth.account.models import EmailAddress
from django.core import mail
from django.utils import timezone

from marketplace.errors import InvalidInput, NotAllowed
from marketplace.models import AuditEvent, Invitation, MailOptOut, Membership, Party
from marketplace.services.invitations import (
    INVITATION_LIFE,
    AddressNotConfirmed,
    InvitationLimitReached,
    InvitationNotValid,
    NotPublishedYet,
    OptedOut,
    accept_invitation,
    invite,
    labelled_parts,
    opt_out,
    opt_out_mark,
    token_of,
)
from marketplace.services.parties import introduce_party
from marketplace.tasks import send_invitation
from tests.factories.marketplace import DatasetFactory, OfferFactory, PublishedVersionFactory, UserFactory

ANN = "ann@example.org"


@pytest.fixture
def sent(monkeypatch):
    """Ids of the invitations whose task was sent."""
    woken = []
    monkeypatch.setattr("marketplace.jobs._send", lambda name, pk: woken.append(pk))
    return woken


@pytest.fixture
def annotator(alice, sent):
    """Whom alice's published files call ann."""
    party = introduce_party(introducer=alice, external_ref="ann")
    version = PublishedVersionFactory(
        dataset=DatasetFactory(owner=alice), contributions={alice: 8}, labellers={party: 6}
    )
    OfferFactory(version=version, labellers_bps=2_500)
    return party


@pytest.fixture
def ann(db):
    user = UserFactory(email=ANN)
    EmailAddress.objects.create(user=user, email=ANN, verified=True, primary=True)
    return user


def test_an_invitation_is_mailed_once_with_its_link_and_a_way_out(
    alice, annotator, sent, django_capture_on_commit_callbacks
):
    with django_capture_on_commit_callbacks(execute=True):
        invitation = invite(party=annotator, email=ANN, by=alice.user)
    assert sent == [invitation.pk] and mail.outbox == []

    send_invitation(invitation.pk)
    send_invitation(invitation.pk)  # a second delivery of the message

    (message,) = mail.outbox
    html = message.alternatives[0][0]
    assert (message.to, message.subject) == ([ANN], "Alice lists records of yours")
    for body in (message.body, html):
        assert f"http://127.0.0.1:8000/invitations/{token_of(invitation)}/" in body
        assert "named as “ann”" in body
        assert f"/invitations/opt-out/{opt_out_mark(ANN)}/" in body
    assert (
        message.extra_headers["List-Unsubscribe"] == f"<http://127.0.0.1:8000/invitations/opt-out/{opt_out_mark(ANN)}/>"
    )
    assert ANN not in re.sub(r"^To:.*$", "", message.body, flags=re.MULTILINE)
    invitation.refresh_from_db()
    assert invitation.status == Invitation.Status.DONE


def test_nobody_is_invited_to_what_is_not_published(alice, sent):
    named = introduce_party(introducer=alice, external_ref="early")

    with pytest.raises(NotPublishedYet):
        invite(party=named, email=ANN, by=alice.user)

    assert not Invitation.objects.exists()


def test_the_invited_person_claims_the_party_and_accepts_the_labellers_part(alice, annotator, ann):
    invitation = invite(party=annotator, email="Ann@Example.org", by=alice.user)
    (part,) = labelled_parts(annotator)

    claimed = accept_invitation(token=token_of(invitation), user=ann)

    assert claimed == annotator and claimed.is_claimed
    assert Membership.objects.get(party=annotator).user == ann
    assert Invitation.objects.get().accepted_by == ann
    event = AuditEvent.objects.get(action="party.claimed")
    assert (part.offer.labellers_bps, part.n_records) == (2_500, 6)
    assert (event.actor, event.detail) == (
        ann,
        {"invitation": invitation.pk, "labellers_bps": {str(part.offer.pk): 2_500}},
    )


def test_an_address_that_is_not_confirmed_claims_nothing(alice, annotator, ann):
    token = token_of(invite(party=annotator, email=ANN, by=alice.user))
    EmailAddress.objects.update(verified=False)

    with pytest.raises(AddressNotConfirmed, match="is yours first"):
        accept_invitation(token=token, user=ann)

    annotator.refresh_from_db()
    assert not annotator.is_claimed


def test_only_a_hash_of_the_token_is_kept(alice, annotator, settings):
    invitation = invite(party=annotator, email=ANN, by=alice.user)
    token = token_of(invitation)

    assert invitation.token_hash == hashlib.sha256(token.encode()).hexdigest()
    assert token not in str(vars(invitation))
    settings.SECRET_KEY = "another"
    assert token_of(invitation) != token


def test_accepting_twice_is_accepting_once(alice, annotator, ann):
    token = token_of(invite(party=annotator, email=ANN, by=alice.user))

    assert accept_invitation(token=token, user=ann) == accept_invitation(token=token, user=ann)
    assert Membership.objects.filter(party=annotator).count() == 1


def test_an_invitation_is_for_one_address(alice, annotator, mallory):
    token = token_of(invite(party=annotator, email=ANN, by=alice.user))

    with pytest.raises(InvitationNotValid, match="another address"):
        accept_invitation(token=token, user=mallory.user)

    annotator.refresh_from_db()
    assert not annotator.is_claimed and not annotator.memberships.exists()


def test_an_invitation_ends(alice, annotator, ann):
    token = token_of(invite(party=annotator, email=ANN, by=alice.user))
    Invitation.objects.update(expires_at=timezone.now() - timedelta(seconds=1))

    with pytest.raises(InvitationNotValid, match="expired"):
        accept_invitation(token=token, user=ann)
    assert timedelta(days=7) < INVITATION_LIFE <= timedelta(days=90)


def test_a_token_that_nobody_sent_claims_nothing(annotator, ann):
    with pytest.raises(InvitationNotValid):
        accept_invitation(token="guess", user=ann)


def test_asking_again_within_a_day_sends_no_second_mail(alice, annotator, sent, django_capture_on_commit_callbacks):
    with django_capture_on_commit_callbacks(execute=True):
        first = invite(party=annotator, email=ANN, by=alice.user)
        again = invite(party=annotator, email=ANN.upper(), by=alice.user)

    assert first == again
    assert sent == [first.pk]


def test_a_later_invitation_takes_the_place_of_the_open_one(alice, annotator, ann):
    old = invite(party=annotator, email=ANN, by=alice.user)
    Invitation.objects.update(created_at=timezone.now() - timedelta(days=2))
    new = invite(party=annotator, email=ANN, by=alice.user)

    with pytest.raises(InvitationNotValid):
        accept_invitation(token=token_of(old), user=ann)
    assert accept_invitation(token=token_of(new), user=ann) == annotator


def test_an_owner_invites_so_many_a_day(alice, annotator, settings):
    settings.INVITATIONS_PER_DAY = 2
    for name in ("a", "b"):
        invite(party=annotator, email=f"{name}@example.org", by=alice.user)

    with pytest.raises(InvitationLimitReached, match="Alice has sent 2 invitations within a day"):
        invite(party=annotator, email="c@example.org", by=alice.user)
    assert Invitation.objects.count() == 2

    Invitation.objects.update(created_at=timezone.now() - timedelta(days=1, seconds=1))
    invite(party=annotator, email="c@example.org", by=alice.user)


def test_who_opted_out_is_never_written_to_again(alice, bob, annotator, sent):
    waiting = invite(party=annotator, email=ANN, by=alice.user)
    opt_out(mark=opt_out_mark("Ann@example.org"))
    opt_out(mark=opt_out_mark(ANN))

    send_invitation(waiting.pk)
    with pytest.raises(OptedOut):
        invite(party=annotator, email=ANN, by=alice.user)

    assert mail.outbox == []
    assert ANN not in str(MailOptOut.objects.values_list().get())
    with pytest.raises(InvitationNotValid):
        opt_out(mark=f"{'0' * 64}:forged")


def test_only_the_introducers_owners_and_editors_invite(alice, annotator, mallory):
    viewer, editor = UserFactory(), UserFactory()
    Membership.objects.create(party=alice, user=viewer, role=Membership.Role.VIEWER)
    Membership.objects.create(party=alice, user=editor, role=Membership.Role.EDITOR)

    for user in (viewer, mallory.user):
        with pytest.raises(NotAllowed):
            invite(party=annotator, email="mallory@example.org", by=user)
    with pytest.raises(NotAllowed):
        invite(party=alice, email="mallory@example.org", by=alice.user)  # was never introduced
    with pytest.raises(InvalidInput):
        invite(party=annotator, email="no address", by=alice.user)
    assert not Invitation.objects.exists()
    assert invite(party=annotator, email=ANN, by=editor).invited_by == editor


def test_a_claimed_party_invites_nobody_else(alice, annotator, ann):
    accept_invitation(token=token_of(invite(party=annotator, email=ANN, by=alice.user)), user=ann)

    with pytest.raises(NotAllowed, match="owner already"):
        invite(party=Party.objects.get(pk=annotator.pk), email="bob@example.org", by=alice.user)


def test_of_two_invited_the_first_claims(alice, annotator, ann, bob):
    tokens = [token_of(invite(party=annotator, email=f"{name}@example.org", by=alice.user)) for name in ("ann", "bob")]
    accept_invitation(token=tokens[0], user=ann)

    with pytest.raises(InvitationNotValid, match="claimed already"):
        accept_invitation(token=tokens[1], user=bob.user)
    assert [one.user for one in Membership.objects.filter(party=annotator)] == [ann]
