"""Parties come to be in two ways: someone signs up, or an upload names a contributor who may claim the party later."""

import hashlib
import secrets
from datetime import timedelta

from django.db import transaction
from django.db.models import QuerySet
from django.utils import timezone

from marketplace.errors import DomainError, NotAllowed
from marketplace.models import AuditEvent, Invitation, Membership, Party, User

INVITATION_LIFE = timedelta(days=30)


class InvitationNotValid(DomainError):
    """The link was used, has expired, or was sent to another address."""

    code = "invitation_not_valid"
    status = 410


@transaction.atomic
def create_party(*, user: User, name: str, kind: str = Party.Kind.PERSON, country: str = "") -> Party:
    """A party of one's own, with oneself as its owner."""
    party = Party.objects.create(name=name, kind=kind, country=country, claimed_at=timezone.now())
    Membership.objects.create(party=party, user=user, role=Membership.Role.OWNER)
    return party


def introduce_party(*, introducer: Party, external_ref: str) -> Party:
    """The contributor that `introducer`'s files call `external_ref`; always the same party for the same name."""
    party, _ = Party.objects.get_or_create(
        introduced_by=introducer, external_ref=external_ref, defaults={"name": external_ref[:120]}
    )
    return party


@transaction.atomic
def invite(*, party: Party, email: str, by: User) -> str:
    """Let the owner of `email` claim an introduced contributor; returns the token, which is kept only as a hash.

    Raises:
        NotAllowed: `by` cannot sign for the party that introduced the contributor, or it is claimed already.
    """
    introducer = party.introduced_by
    if introducer is None or party.is_claimed:
        raise NotAllowed(f"{party.name} has an owner already; ask them for membership.")
    if not Membership.objects.filter(party=introducer, user=by, role=Membership.Role.OWNER).exists():
        raise NotAllowed(f"Only an owner of {introducer.name} can invite its contributors.")
    token = secrets.token_urlsafe(32)
    Invitation.objects.filter(party=party, email=email, accepted_at=None).delete()
    Invitation.objects.create(
        party=party,
        email=email,
        token_hash=hashlib.sha256(token.encode()).hexdigest(),
        invited_by=by,
        expires_at=timezone.now() + INVITATION_LIFE,
    )
    return token


def get_invitation(*, token: str, user: User) -> Invitation:
    """What an invitation offers, before it is taken up.

    Raises:
        InvitationNotValid: see the class.
    """
    found = _invited(Invitation.objects.all(), token=token, user=user)
    if found.accepted_at is not None and found.accepted_by_id != user.pk:
        raise InvitationNotValid("This invitation has been used.")
    return found


def _invited(invitations: QuerySet[Invitation], *, token: str, user: User) -> Invitation:
    digest = hashlib.sha256(token.encode()).hexdigest()
    found = invitations.select_related("party__introduced_by").filter(token_hash=digest).first()
    if found is None or found.expires_at < timezone.now():
        raise InvitationNotValid("This invitation is unknown or has expired; ask for a new one.")
    if found.email.lower() != user.email.lower():
        raise InvitationNotValid("This invitation was sent to another address; sign in with that one.")
    return found


def set_country(*, party: Party, country: str) -> None:
    """Where the party has its bank account, which Stripe asks before it can pay anyone."""
    Party.objects.filter(pk=party.pk).update(country=country.upper())
    party.refresh_from_db(fields=["country"])


@transaction.atomic
def accept_invitation(*, token: str, user: User) -> Party:
    """Make the invited person the owner of the contributor's party; what it has accrued is theirs from now on.

    Raises:
        InvitationNotValid: see the class; the address must be the invited one.
    """
    found = _invited(Invitation.objects.select_for_update(of=("self",)), token=token, user=user)
    party = found.party
    if found.accepted_at is not None:
        if found.accepted_by_id == user.pk:
            return party
        raise InvitationNotValid("This invitation has been used.")
    now = timezone.now()
    if not Party.objects.filter(pk=party.pk, claimed_at=None).update(claimed_at=now):
        raise InvitationNotValid(f"{party.name} has been claimed already.")
    Membership.objects.create(party=party, user=user, role=Membership.Role.OWNER)
    Invitation.objects.filter(pk=found.pk).update(accepted_at=now, accepted_by=user)
    AuditEvent.objects.create(actor=user, party=party, action="party.claimed", target=f"party:{party.pk}")
    party.refresh_from_db()
    return party
