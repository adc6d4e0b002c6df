"""Who may act in a party's name, or at the desk; every service that writes for a party or for staff asks here."""

from marketplace.errors import NotAllowed
from marketplace.models import Membership, Party, User


def require_authority(*, user: User, party: Party, to: str) -> Membership:
    """The membership by which `user` may sign for `party`.

    Raises:
        NotAllowed: not a member, or without the authority; `to` completes the sentence.
    """
    membership = Membership.objects.filter(party=party, user=user).first()
    if membership is None or not membership.has_authority:
        raise NotAllowed(f"Only an owner of {party.name} can {to}; ask one of them.")
    return membership


def require_editor(*, user: User, party: Party, to: str) -> Membership:
    """The membership by which `user` may upload and describe for `party`.

    Raises:
        NotAllowed: not a member, or one who only reads.
    """
    roles = (Membership.Role.OWNER, Membership.Role.EDITOR)
    membership = Membership.objects.filter(party=party, user=user, role__in=roles).first()
    if membership is None:
        raise NotAllowed(f"Only an owner or editor of {party.name} can {to}; ask one of them.")
    return membership


def owners_emails(party: Party) -> list[str]:
    """Of everybody who owns the party and may sign in, those first that joined first: whom its mails are for."""
    owners = Membership.objects.filter(party=party, role=Membership.Role.OWNER, user__is_active=True)
    return list(owners.order_by("pk").values_list("user__email", flat=True))


def require_staff(*, user: User | None, to: str) -> None:
    """Let only active staff go on; that two of them take part is for the service to ask (`payouts.errors.FourEyes`).

    Raises:
        NotAllowed: nobody, or somebody else; `to` completes the sentence.
    """
    if user is None or not (user.is_staff and user.is_active):
        raise NotAllowed(f"Only staff can {to}.")
