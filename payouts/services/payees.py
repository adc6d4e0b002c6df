"""Whom Stripe can pay: a connected account per party, onboarded on Stripe's own pages."""

import hashlib
import logging

from django.db import transaction

from marketplace.errors import InvalidInput
from marketplace.models import Membership, Party
from marketplace.services import audit
from payouts import gateway
from payouts.errors import PayeeNotServed, StripeUnavailable
from payouts.models import PayeeAccount
from payouts.services.refusals import declined

logger = logging.getLogger(__name__)

COUNTRY_UNSUPPORTED = "country_unsupported"
MAX_SPENT_KEYS = 50  # calls of one day that ended in a 5xx, each a click of a person's


def start_onboarding(*, party: Party, return_url: str, refresh_url: str) -> str:
    """A link to Stripe's onboarding page, good for minutes and once; the connected account is made the first time.

    Raises:
        InvalidInput: the party has no country, or nobody who owns it.
        PayeeNotServed: Stripe does not reach the country; what the party earns accrues.
        StripeUnavailable, StripeDeclined: see the classes.
    """
    try:
        account = _account_of(party)
        return gateway.create_onboarding_link(account=account, return_url=return_url, refresh_url=refresh_url)
    except gateway.StripeRefused as error:
        raise declined(error, f"Stripe does not open its page for {party.name}") from error
    except gateway.StripeUncertain as error:
        raise StripeUnavailable("Stripe did not answer; try again in a minute.") from error


def refresh_payee(account_id: str) -> PayeeAccount | None:
    """Write down what Stripe says of an account now; events may come late or out of order, so none is believed.

    Returns None for an account that is not one of our payees'.

    Raises:
        gateway.StripeRefused, gateway.StripeUncertain: ask again.
    """
    if not PayeeAccount.objects.filter(stripe_account_id=account_id).exists():
        return None
    state = gateway.get_account(account_id)
    with transaction.atomic():
        payee = PayeeAccount.objects.select_for_update().get(stripe_account_id=account_id)
        was_ready = payee.is_ready
        payee.details_submitted = state.details_submitted
        payee.transfers_active = state.transfers_active
        payee.payouts_enabled = state.payouts_enabled
        payee.requirements = state.requirements
        payee.save()
        if payee.is_ready != was_ready:
            audit.record(
                actor=None,
                party=payee.party_id,
                action="payee.ready" if payee.is_ready else "payee.not_ready",
                target=f"payee_account:{payee.pk}",
            )
    logger.info("Refreshed payee party=%s ready=%s", payee.party_id, payee.is_ready)
    return payee


def _account_of(party: Party) -> str:
    known = PayeeAccount.objects.filter(party=party).first()
    if known is not None:
        return known.stripe_account_id
    owner = (
        Membership.objects.select_related("user").filter(party=party, role=Membership.Role.OWNER).order_by("pk").first()
    )
    if owner is None:
        raise InvalidInput(f"{party.name} has no owner yet; it must be claimed before it can be paid.")
    if not party.country:
        raise InvalidInput(
            f"Say in which country {party.name} has its bank account first.", pointers={"/country": "missing"}
        )
    # The same request has the same key, so two clicks make one account; a corrected country makes a new request.
    asked = hashlib.sha256(f"{party.country}:{owner.user.email}".encode()).hexdigest()[:16]
    try:
        account = _create_account(party, owner.user.email, f"payee:{party.public_id}:{asked}")
    except gateway.StripeRefused as error:
        if error.code != COUNTRY_UNSUPPORTED:
            raise declined(error, f"Stripe does not open an account for {party.name}") from error
        raise PayeeNotServed(
            f"Stripe cannot pay to {party.country} yet ({error.message}). What {party.name} earns accrues and is kept.",
            pointers={"/country": error.code},
        ) from error
    payee, _ = PayeeAccount.objects.get_or_create(party=party, defaults={"stripe_account_id": account})
    return payee.stripe_account_id


def _create_account(party: Party, email: str, key: str) -> str:
    """Ask under the key; where Stripe only repeats an old 5xx of its own, which it does for a day, under the next one.

    An account of the earlier call, if there is one, was never shown to anybody and can receive nothing.
    """
    for attempt in range(1, MAX_SPENT_KEYS + 1):
        try:
            return gateway.create_payee_account(
                party_id=str(party.public_id),
                country=party.country,
                email=email,
                key=key if attempt == 1 else f"{key}:{attempt}",
            )
        except gateway.StripeUncertain as error:
            if not error.is_replayed or attempt == MAX_SPENT_KEYS:
                raise
    raise AssertionError("the last attempt returns or raises")
