"""Offers: a dataset's terms, in versions; a change adds a row and so makes the public price history."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from django.conf import settings
from django.db import transaction

from marketplace.errors import DomainError, InvalidInput
from marketplace.export.odrl import ALLOWED_USES, Terms, contract_text, offer_policy, policy_sha256
from marketplace.models import Dataset, DatasetVersion, Offer, User
from marketplace.models.offers import MIN_ORDER_MICROS
from marketplace.money import MAX_MICROS, Money
from marketplace.services import audit
from marketplace.services.authority import require_authority

logger = logging.getLogger(__name__)

RANGES = {
    "upfront_bps": (0, 10_000),
    "pool_bps": (0, 10_000),
    "royalty_bps": (0, 10_000),
    "labellers_bps": (0, 10_000),
    "term_days": (1, 36_500),
    "seats": (1, 1_000_000),
    "disclosure_due_days": (1, 3_650),
}
#: Terms that an offer's row keeps under the same name.
PLAIN_TERMS = ("platform_fee_bps", *RANGES)


class NothingToOffer(DomainError):
    """The dataset has no published version, or was withdrawn."""

    code = "nothing_to_offer"


@transaction.atomic
def publish_offer(
    *,
    dataset: Dataset,
    user: User,
    price: Money,
    upfront_bps: int,
    pool_bps: int,
    royalty_bps: int,
    royalty_cap: Money | None,
    labellers_bps: int,
    term_days: int,
    seats: int,
    allowed_uses: Sequence[str],
    disclosure_due_days: int,
) -> Offer:
    """Put the newest published version on sale at these terms; the same terms again change nothing.

    Raises:
        NotAllowed: the user cannot sign for the dataset's owner.
        NothingToOffer: see the class.
        InvalidInput: a term is out of range; the pointers name it.
    """
    # Held until the end, so that two offers made at once get consecutive numbers.
    dataset = Dataset.objects.select_for_update(of=("self",)).select_related("owner").get(pk=dataset.pk)
    require_authority(user=user, party=dataset.owner, to="change its terms")
    version = dataset.versions.filter(status=DatasetVersion.Status.PUBLISHED).order_by("-number").first()
    if version is None:
        raise NothingToOffer(f"{dataset.title} has no published version yet; publish one first.")
    if dataset.status == Dataset.Status.WITHDRAWN:
        raise NothingToOffer(f"{dataset.title} was withdrawn; nothing of it is for sale.")

    newest = dataset.offers.order_by("-number").first()
    number = newest.number + 1 if newest else 1
    terms = Terms(
        uid=f"urn:residual:offer:{dataset.public_id}:{number}",
        assigner=f"urn:uuid:{dataset.owner.public_id}",
        assigner_name=dataset.owner.name,
        title=dataset.title,
        version_number=version.number,
        merkle_root=version.merkle_root,
        n_records=version.n_records,
        price=price,
        platform_fee_bps=settings.PLATFORM_FEE_BPS,
        upfront_bps=upfront_bps,
        pool_bps=pool_bps,
        royalty_bps=royalty_bps,
        royalty_cap=royalty_cap,
        labellers_bps=labellers_bps,
        term_days=term_days,
        seats=seats,
        allowed_uses=tuple(allowed_uses),
        disclosure_due_days=disclosure_due_days,
    )
    _check(terms)
    terms = replace(terms, allowed_uses=tuple(use for use in ALLOWED_USES if use in allowed_uses))
    fields = {name: getattr(terms, name) for name in PLAIN_TERMS} | {
        "price_micros": price.micros,
        "currency": price.currency,
        "royalty_cap_micros": None if royalty_cap is None else royalty_cap.micros,
        "allowed_uses": list(terms.allowed_uses),
    }
    if newest and newest.version_id == version.pk and all(getattr(newest, name) == fields[name] for name in fields):
        return newest
    policy = offer_policy(terms)
    offer = Offer.objects.create(
        dataset=dataset,
        version=version,
        number=number,
        policy=policy,
        policy_sha256=policy_sha256(policy),
        contract_text=contract_text(terms),
        created_by=user,
        **fields,
    )
    Dataset.objects.filter(pk=dataset.pk).update(status=Dataset.Status.LISTED)
    audit.record(
        actor=user,
        party=dataset.owner,
        action="offer.published",
        target=f"offer:{offer.pk}",
        dataset=dataset.pk,
        number=number,
        price=str(price),
        policy_sha256=offer.policy_sha256,
    )
    logger.info("Published offer=%s dataset=%s number=%s micros=%s", offer.pk, dataset.pk, number, price.micros)
    return offer


def _check(terms: Terms) -> None:
    wrong: dict[str, str] = {}
    price, cap = terms.price, terms.royalty_cap
    least, most = Money(MIN_ORDER_MICROS, price.currency), Money(MAX_MICROS, price.currency)
    if price < least:
        wrong["price"] = (
            f"The price is {price}; the least is {least}, which still carries what the payment itself costs."
        )
    elif most < price:
        wrong["price"] = f"The price is {price}; the most is {most}."
    elif price != price.floor_to_minor():
        wrong["price"] = f"The price is finer than the smallest unit of {price.currency}."
    if cap is not None:
        if cap.currency != price.currency:
            wrong["royalty_cap"] = f"The cap is in {cap.currency} and the price in {price.currency}; use one currency."
        elif not 0 < cap.micros <= MAX_MICROS:
            wrong["royalty_cap"] = "A cap is more than nothing; leave it empty for none."
        elif not terms.royalty_bps:
            wrong["royalty_cap"] = "Without a royalty there is nothing to cap; leave it empty."
    for name, (low, high) in RANGES.items():
        value = getattr(terms, name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            wrong[name] = f"Give a whole number from {low:,} to {high:,}."
    rest = 10_000 - terms.platform_fee_bps
    if not {"upfront_bps", "pool_bps"} & set(wrong) and terms.upfront_bps + terms.pool_bps != rest:
        wrong["pool_bps"] = (
            f"Paid at once and royalty pool make {(terms.upfront_bps + terms.pool_bps) / 100:g} % of the price; with the "
            f"platform's {terms.platform_fee_bps / 100:g} % they must make {rest / 100:g} %."
        )
    if unknown := sorted(set(terms.allowed_uses) - set(ALLOWED_USES)):
        wrong["allowed_uses"] = f"{unknown[0]!r} is no use; choose from {', '.join(ALLOWED_USES)}."
    elif not terms.allowed_uses:
        wrong["allowed_uses"] = f"Allow at least one of {', '.join(ALLOWED_USES)}."
    if wrong:
        raise InvalidInput(next(iter(wrong.values())), pointers=wrong)
