"""How a contributor whom a file named comes to their party: an invitation by mail, bound to the address, with a way out.

An owner invites once the version is published, so many a day; the row is the work, a task sends its mail. Whoever opts
out is never written to again, by anyone.
"""

import base64
import hashlib
import hmac
import logging
import secrets
from dataclasses import dataclass
from datetime import timedelta

from allauth.account.models import EmailAddress
from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.signing import BadSignature, Signer
from django.core.validators import validate_email
from django.db import transaction
from django.db.models import QuerySet
from django.urls import reverse
from django.utils import timezone

from marketplace import jobs
from marketplace.errors import DomainError, InvalidInput, NotAllowed
from marketplace.mail import send_mail
from marketplace.models import (
    Contribution,
    DatasetVersion,
    Invitation,
    MailOptOut,
    Membership,
    Offer,
    Party,
    User,
)
from marketplace.services import audit
from marketplace.services.authority import require_editor

logger = logging.getLogger(__name__)

INVITATION_LIFE = timedelta(days=30)
#: A second click within it sends no second mail.
AGAIN_AFTER = timedelta(days=1)
DAY = timedelta(days=1)


class InvitationNotValid(DomainError):
    """The link was used, has expired, or was sent to another address."""

    code = "invitation_not_valid"
    status = 410


class AddressNotConfirmed(DomainError):
    """The person has not shown yet that the invited address is theirs."""

    code = "address_not_confirmed"
    status = 403


class NotPublishedYet(DomainError):
    """Nothing with the contributor in it has been published."""

    code = "not_published_yet"


class OptedOut(DomainError):
    """The address wants no invitations."""

    code = "opted_out"


class InvitationLimitReached(DomainError):
    """The owner has invited as many as it may in a day."""

    code = "invitation_limit_reached"
    status = 429


@dataclass(frozen=True)
class LabelledPart:
    """What labellers get of one dataset on sale that the invited labelled."""

    offer: Offer
    n_records: int


# --- inviting ---------------------------------------------------------------------------------------------------------
@transaction.atomic
def invite(*, party: Party, email: str, by: User | None) -> Invitation:
    """Let the owner of `email` claim an introduced contributor; the mail goes out once this is committed.

    To the same address within a day it is the same invitation, and no second mail; later, a new one in its place.

    Args:
        by: who invites; None where a key of the introducer's does, whose scope has been checked.

    Raises:
        NotAllowed: `by` does not edit for the party that introduced the contributor, or it is claimed already.
        InvalidInput: the address is none.
        NotPublishedYet, OptedOut, InvitationLimitReached: see the classes.
    """
    introducer = party.introduced_by
    if introducer is None or party.is_claimed:
        raise NotAllowed(f"{party.name} has an owner already; ask them for membership.")
    if by is not None:
        require_editor(user=by, party=introducer, to="invite its contributors")
    email = email.strip()
    try:
        validate_email(email)
    except ValidationError:
        raise InvalidInput(
            f"{email!r} is no e-mail address.", pointers={"/email": "Give an address such as ann@example.org."}
        ) from None
    Party.objects.select_for_update().get(pk=introducer.pk)  # one at a time, or the day's limit would be none
    published = Contribution.objects.filter(party=party, version__status=DatasetVersion.Status.PUBLISHED)
    if not published.exists():
        raise NotPublishedYet("Publish the version first: people are invited to what has been reviewed and signed for.")
    if has_opted_out(email):
        raise OptedOut(
            "This address has asked us not to send invitations. Reach the person another way.",
            pointers={"/email": "Wants no invitations."},
        )
    now = timezone.now()
    open_ones = Invitation.objects.filter(party=party, email__iexact=email, accepted_at=None, revoked_at=None)
    known = open_ones.filter(created_at__gt=now - AGAIN_AFTER).first()
    if known is not None:
        return known
    sent_today = Invitation.objects.filter(party__introduced_by=introducer, created_at__gt=now - DAY).count()
    if sent_today >= settings.INVITATIONS_PER_DAY:
        raise InvitationLimitReached(
            f"{introducer.name} has sent {sent_today} invitations within a day, which is the limit. Go on tomorrow."
        )
    open_ones.update(revoked_at=now)
    nonce = secrets.token_hex(16)
    invitation = Invitation.objects.create(
        party=party,
        email=email,
        nonce=nonce,
        token_hash=_hash(_token(nonce)),
        invited_by=by,
        created_at=now,
        expires_at=now + INVITATION_LIFE,
    )
    audit.record(
        actor=by,
        party=introducer,
        action="contributor.invited",
        target=f"party:{party.pk}",
        invitation=invitation.pk,
    )
    jobs.wake(invitation)
    logger.info("Invited party=%s invitation=%s", party.pk, invitation.pk)
    return invitation


def send_invitation(invitation: Invitation) -> None:
    """The mail; nothing where the address opted out, or the invitation ended, since it was asked for."""
    party = invitation.party
    is_over = invitation.revoked_at or invitation.accepted_at or invitation.expires_at < timezone.now()
    if is_over or party.is_claimed or has_opted_out(invitation.email):
        logger.info("Did not send invitation=%s", invitation.pk)
        return
    introducer = party.introduced_by
    assert introducer is not None, "only introduced parties are invited"
    opt_out = settings.BASE_URL + reverse("opt-out", args=[opt_out_mark(invitation.email)])
    send_mail(
        "invitation",
        to=invitation.email,
        subject=f"{introducer.name} lists records of yours",
        context={
            "introducer": introducer,
            "party": party,
            "link": settings.BASE_URL + reverse("invitation", args=[token_of(invitation)]),
            "opt_out": opt_out,
            "expires_at": invitation.expires_at,
        },
        headers={"List-Unsubscribe": f"<{opt_out}>", "List-Unsubscribe-Post": "List-Unsubscribe=One-Click"},
    )
    logger.info("Sent invitation=%s", invitation.pk)


def token_of(invitation: Invitation) -> str:
    """What the mail's link holds. The database alone does not give it: it takes the server's secret too."""
    return _token(invitation.nonce)


def _token(nonce: str) -> str:
    made = hmac.digest(settings.SECRET_KEY.encode(), f"invitation:{nonce}".encode(), "sha256")
    return base64.urlsafe_b64encode(made).rstrip(b"=").decode()


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


# --- opting out -------------------------------------------------------------------------------------------------------
def opt_out_mark(email: str) -> str:
    """Stands for an address in the link by which its owner opts out, which never ends."""
    return Signer(salt="opt-out").sign(_address_hash(email))


@transaction.atomic
def opt_out(*, mark: str) -> None:
    """Never write to the address again. Twice is once.

    Raises:
        InvitationNotValid: the mark is none that we made.
    """
    address = read_opt_out_mark(mark)
    MailOptOut.objects.get_or_create(address_sha256=address)
    logger.info("Opted out address=%s", address[:12])


def read_opt_out_mark(mark: str) -> str:
    """The hash of the address that it stands for.

    Raises:
        InvitationNotValid: see `opt_out`.
    """
    try:
        return Signer(salt="opt-out").unsign(mark)
    except BadSignature:
        raise InvitationNotValid("This link is incomplete; open it from the mail again.") from None


def has_opted_out(email: str) -> bool:
    return MailOptOut.objects.filter(address_sha256=_address_hash(email)).exists()


def _address_hash(email: str) -> str:
    return hashlib.sha256(email.strip().lower().encode()).hexdigest()


# --- taking it up -----------------------------------------------------------------------------------------------------
def get_invitation(*, token: str, user: User) -> Invitation:
    """What an invitation offers, before it is taken up.

    Raises:
        InvitationNotValid, AddressNotConfirmed: see the classes.
    """
    found = _invited(Invitation.objects.all(), token=token, user=user)
    if found.accepted_at is not None and found.accepted_by_id != user.pk:
        raise InvitationNotValid("This invitation has been used.")
    return found


@transaction.atomic
def accept_invitation(*, token: str, user: User) -> Party:
    """Make the invited person the owner of the contributor's party; what it has accrued is theirs from now on.

    With it they accept the labellers' parts that `labelled_parts` names; the audit log keeps which.

    Raises:
        InvitationNotValid, AddressNotConfirmed: see the classes; the address must be the invited one.
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
    audit.record(
        actor=user,
        party=party,
        action="party.claimed",
        target=f"party:{party.pk}",
        invitation=found.pk,
        labellers_bps={str(part.offer.pk): part.offer.labellers_bps for part in labelled_parts(party)},
    )
    party.refresh_from_db()
    return party


def labelled_parts(party: Party) -> list[LabelledPart]:
    """Of every dataset on sale that the party labelled: its newest terms, and how many records it labelled."""
    labelled = Contribution.objects.filter(
        party=party, role=Contribution.Role.LABELLER, version__status=DatasetVersion.Status.PUBLISHED
    )
    counts = dict(labelled.order_by("version_id").values_list("version_id", "n_records"))
    offers = (
        Offer.objects.filter(dataset__versions__in=list(counts))
        .select_related("dataset", "version")
        .order_by("dataset_id", "-number")
        .distinct("dataset_id")
    )
    return [LabelledPart(offer, counts[offer.version_id]) for offer in offers if offer.version_id in counts]


def _invited(invitations: QuerySet[Invitation], *, token: str, user: User) -> Invitation:
    found = invitations.select_related("party__introduced_by").filter(token_hash=_hash(token)).first()
    if found is None or found.revoked_at is not None or found.expires_at < timezone.now():
        raise InvitationNotValid("This invitation is unknown or has expired; ask for a new one.")
    mine = EmailAddress.objects.filter(user=user, email__iexact=found.email)
    if not mine.exists() and found.email.lower() != user.email.lower():
        raise InvitationNotValid("This invitation was sent to another address; sign in with that one.")
    if not mine.filter(verified=True).exists():
        raise AddressNotConfirmed(
            f"Confirm that {found.email} is yours first: open the link that we sent to it when you signed up, then this "
            "one again. Under “E-mail and password” in your menu you can have it sent once more."
        )
    return found
