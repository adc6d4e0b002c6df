"""Parties come to be in two ways: someone signs up, or an upload names a contributor who may claim the party later."""

from django.db import transaction
from django.utils import timezone

from marketplace.models import Membership, Party, User


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


def set_country(*, party: Party, country: str) -> None:
    """Where the party has its bank account, which Stripe asks before it can pay anyone."""
    Party.objects.filter(pk=party.pk).update(country=country.upper())
    party.refresh_from_db(fields=["country"])
