"""Orders: placed at the price that the buyer saw, paid once, and from then on licenses."""

import hashlib
import json
import logging
from collections.abc import Sequence
from datetime import datetime, timedelta

from django.db import IntegrityError, transaction

from marketplace import clock
from marketplace.errors import DomainError, InvalidInput, KeyReused
from marketplace.models import (
    ApiKey,
    Dataset,
    DatasetVersion,
    License,
    Offer,
    Order,
    OrderLine,
    Party,
    User,
)
from marketplace.money import MAX_MICROS, Money
from marketplace.services import audit
from marketplace.services.authority import require_authority

logger = logging.getLogger(__name__)

MAX_LINES = 200
#: How long an order waits for its payment.
PAYMENT_TERM = timedelta(hours=24)
#: What still carries Stripe's fee: five dollars, or about as much where nothing is exchanged.
MIN_TOTAL = {"USD": 5_000_000, "EUR": 5_000_000, "GBP": 5_000_000, "JPY": 750_000_000}


class OfferNotOpen(DomainError):
    """The offer was replaced, or its dataset is no longer for sale."""

    code = "offer_not_open"


class PriceChanged(DomainError):
    """The offers cost something else than the buyer expects."""

    code = "price_changed"


class SpendingLimitReached(DomainError):
    """The API key may not spend this much."""

    code = "spending_limit_reached"
    status = 403


class BuyerInArrears(DomainError):
    """A license of the buyer's is suspended for a royalty report or invoice that is long overdue."""

    code = "buyer_in_arrears"
    status = 403


class OrderNotPayable(DomainError):
    """The order was cancelled, or its deadline is over."""

    code = "order_not_payable"


def place_order(
    *,
    buyer: Party,
    key: str,
    offers: Sequence[Offer],
    expected_total: Money,
    accepted_name: str,
    user: User | None = None,
    api_key: ApiKey | None = None,
) -> Order:
    """Order a line per offer; the same key and request give the same order, however often and however fast.

    Args:
        key: the buyer's idempotency key.
        expected_total: what the buyer was shown; an order is never placed at another price.
        accepted_name: the name under which the buyer accepts every line's contract.
        user, api_key: who acts for the buyer: one of the two.

    Raises:
        KeyReused: the key stands for another request.
        NotAllowed: the user may not buy in the party's name.
        InvalidInput: no offers, one twice, the buyer's own, two currencies, no name, or too small a total.
        BuyerInArrears, OfferNotOpen, PriceChanged, SpendingLimitReached: see the classes.
    """
    if (user is None) == (api_key is None):
        raise ValueError("An order is placed by a user or by an API key")
    if api_key is not None and api_key.party_id != buyer.pk:
        raise ValueError(f"API key {api_key.pk} does not act for party {buyer.pk}")
    if user is not None:
        require_authority(user=user, party=buyer, to="buy in its name")

    accepted_name = accepted_name.strip()
    request_sha256 = _request_digest(offers, expected_total, accepted_name)
    if placed := _find_placed(buyer, key, request_sha256):
        return placed
    _check_request(buyer, offers, expected_total, accepted_name)
    _check_arrears(buyer)
    _check_open(offers, expected_total)
    now = clock.now()
    try:
        with transaction.atomic():
            if api_key is not None:
                _check_limit(api_key, expected_total)
            order = Order.objects.create(
                buyer=buyer,
                placed_by=user,
                api_key=api_key,
                total_micros=expected_total.micros,
                currency=expected_total.currency,
                key=key,
                request_sha256=request_sha256,
                accepted_name=accepted_name,
                placed_at=now,
                expires_at=now + PAYMENT_TERM,
            )
            OrderLine.objects.bulk_create(
                OrderLine(order=order, offer=offer, version_id=offer.version_id, price_micros=offer.price_micros)
                for offer in offers
            )
            audit.record(
                actor=user,
                party=buyer,
                action="order.placed",
                target=f"order:{order.pk}",
                offers=[offer.pk for offer in offers],
                total_micros=order.total_micros,
                currency=order.currency,
                api_key=api_key and api_key.pk,
            )
    except IntegrityError:
        # Another request with this key was first; anything else that the database refused is not ours to hide.
        if placed := _find_placed(buyer, key, request_sha256):
            return placed
        raise
    logger.info("Placed order=%s buyer=%s micros=%s %s", order.pk, buyer.pk, order.total_micros, order.currency)
    return order


def hold_payable(order: Order, *, is_invoiced: bool = False) -> Order:
    """Inside a transaction: hold the order's row while a payment for it is opened; it may still be paid.

    Args:
        is_invoiced: its invoice was issued, which binds us to the terms that were on sale then.

    Raises:
        OrderNotPayable: it was cancelled or paid, or its deadline is over.
        OfferNotOpen: what it orders is no longer for sale on those terms.
        BuyerInArrears: see the class.
    """
    order = Order.objects.select_for_update(of=("self",)).get(pk=order.pk)
    if order.status != Order.Status.PLACED:
        raise OrderNotPayable(f"Order {order.public_id} is {order.status}; place a new one.")
    if order.expires_at <= clock.now():
        raise OrderNotPayable(
            f"Order {order.public_id} was to be paid by {order.expires_at:%d %B %Y, %H:%M} UTC; place a new one."
        )
    _check_arrears(order.buyer)
    if is_invoiced:
        return order
    lines = list(order.lines.select_related("offer").order_by("pk"))
    try:
        _check_open([line.offer for line in lines], order.total)
    except PriceChanged as error:
        raise OfferNotOpen(f"{error.message} Place a new order.") from error
    return order


def extend_payment(*, order: Order, until: datetime) -> None:
    """Inside the transaction that holds the order's row: it waits for its payment until then, as its invoice says."""
    Order.objects.filter(pk=order.pk, status=Order.Status.PLACED).update(expires_at=until)


@transaction.atomic
def cancel_order(*, order: Order) -> bool:
    """Cancel what was not paid in time; whether it was still unpaid. The caller has closed its page at Stripe."""
    cancelled = Order.objects.filter(pk=order.pk, status=Order.Status.PLACED).update(status=Order.Status.CANCELLED)
    if cancelled:
        audit.record(actor=None, party=order.buyer_id, action="order.cancelled", target=f"order:{order.pk}")
        logger.info("Cancelled order=%s micros=%s %s", order.pk, order.total_micros, order.currency)
    return bool(cancelled)


@transaction.atomic
def mark_paid(*, order: Order, paid_at: datetime) -> list[License]:
    """Turn a placed order into licenses, once; again, it answers with the same licenses.

    Raises:
        OrderNotPayable: it was cancelled.
    """
    # The update waits for a second one that is on its way, and then finds nothing left to do.
    first = Order.objects.filter(pk=order.pk, status=Order.Status.PLACED).update(
        status=Order.Status.PAID, paid_at=paid_at
    )
    if first:
        now = clock.now()
        License.objects.bulk_create(
            License(
                order_line=line,
                licensee_id=order.buyer_id,
                version_id=line.version_id,
                offer=line.offer,
                policy_sha256=line.offer.policy_sha256,
                granted_at=now,
                expires_at=now + timedelta(days=line.offer.term_days),
                disclosure_due_at=now + timedelta(days=line.offer.disclosure_due_days),
            )
            for line in order.lines.select_related("offer").order_by("pk")
        )
        audit.record(
            actor=None,
            party=order.buyer_id,
            action="order.paid",
            target=f"order:{order.pk}",
            paid_at=f"{paid_at:%FT%TZ}",
        )
        logger.info("Paid order=%s micros=%s %s", order.pk, order.total_micros, order.currency)
    order.refresh_from_db(fields=["status", "paid_at"])
    if order.status not in (Order.Status.PAID, Order.Status.REFUNDED):
        raise OrderNotPayable(f"Order {order.public_id} is {order.status}; its payment has to be returned.")
    return list(License.objects.filter(order_line__order=order).order_by("order_line"))


def _request_digest(offers: Sequence[Offer], total: Money, accepted_name: str) -> str:
    asked = [sorted(offer.pk for offer in offers), total.micros, total.currency, accepted_name]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _find_placed(buyer: Party, key: str, request_sha256: str) -> Order | None:
    placed = Order.objects.filter(buyer=buyer, key=key).first()
    if placed is not None and placed.request_sha256 != request_sha256:
        raise KeyReused(
            "This Idempotency-Key was used for another order; send a new key for a new order.",
            pointers={"Idempotency-Key": f"belongs to order {placed.public_id}"},
        )
    return placed


def _check_request(buyer: Party, offers: Sequence[Offer], total: Money, accepted_name: str) -> None:
    if not 0 < len(offers) <= MAX_LINES:
        raise InvalidInput(
            f"An order has 1 to {MAX_LINES} offers; this one has {len(offers)}.", pointers={"/offers": "wrong number"}
        )
    seen: set[int] = set()
    for index, offer in enumerate(offers):
        if offer.dataset_id in seen:
            raise InvalidInput(
                "An order has one line per dataset; raise nothing but the seats of an offer to license it more widely.",
                pointers={f"/offers/{index}": "the same dataset again"},
            )
        seen.add(offer.dataset_id)
        if offer.dataset.owner_id == buyer.pk:
            raise InvalidInput(
                f"{offer.dataset.title} is {buyer.name}'s own: nobody pays themselves. Act for the party that buys.",
                pointers={f"/offers/{index}": "the buyer's own dataset"},
            )
        if offer.currency != total.currency:
            raise InvalidInput(
                f"One order has one currency: this offer is in {offer.currency}, the expected total in "
                f"{total.currency}. Place an order per currency.",
                pointers={f"/offers/{index}": f"is in {offer.currency}"},
            )
    if not 2 <= len(accepted_name) <= 120:
        raise InvalidInput(
            "Accept the contract by typing your full name (2 to 120 characters).",
            pointers={"/accepted_name": "missing" if not accepted_name else "wrong length"},
        )


def _check_arrears(buyer: Party) -> None:
    suspended = License.objects.filter(licensee=buyer, revoked_at=None).exclude(in_arrears_at=None)
    license = suspended.select_related("version__dataset").order_by("in_arrears_at").first()
    if license is not None:
        raise BuyerInArrears(
            f"{buyer.name}'s license of {license.version.dataset.title} is suspended since {license.in_arrears_at:%d %B %Y}: a "
            "royalty report or invoice is long overdue. Settle it under Royalties; then you can buy again."
        )


def _check_open(offers: Sequence[Offer], expected_total: Money) -> None:
    current = {
        offer.dataset_id: offer
        for offer in Offer.objects.filter(dataset__in={offer.dataset_id for offer in offers})
        .select_related("dataset", "version")
        .order_by("dataset_id", "-number")
        .distinct("dataset_id")
    }
    for index, offer in enumerate(offers):
        newest = current[offer.dataset_id]
        if newest.dataset.status != Dataset.Status.LISTED or newest.version.status != DatasetVersion.Status.PUBLISHED:
            raise OfferNotOpen(
                f"{newest.dataset.title} is not for sale.", pointers={f"/offers/{index}": "its dataset is not listed"}
            )
    costs = Money(sum(current[offer.dataset_id].price_micros for offer in offers), expected_total.currency)
    if costs != expected_total and all(newest.currency == costs.currency for newest in current.values()):
        raise PriceChanged(
            f"The price has changed: the order costs {costs}, not {expected_total}. "
            "Look at the offers again and confirm the new total.",
            pointers={"/expected_total": f"is {expected_total}, should be {costs}"},
        )
    for index, offer in enumerate(offers):
        newest = current[offer.dataset_id]
        if newest.pk != offer.pk:
            raise OfferNotOpen(
                f"The terms of {newest.dataset.title} have changed; read offer {newest.number} and order that one.",
                pointers={f"/offers/{index}": f"replaced by offer {newest.pk}"},
            )
    if costs.micros < MIN_TOTAL[costs.currency]:
        raise InvalidInput(
            f"An order is at least {Money(MIN_TOTAL[costs.currency], costs.currency)}; this one is {costs}.",
            pointers={"/expected_total": "too small"},
        )
    if costs.micros > MAX_MICROS:
        raise InvalidInput(
            f"An order is at most {Money(MAX_MICROS, costs.currency)}; this one is {costs}. Place several.",
            pointers={"/expected_total": "too large"},
        )


def _check_limit(api_key: ApiKey, total: Money) -> None:
    """Inside the transaction: the key's row is locked, so that two orders at once cannot both take what is left."""
    limit = ApiKey.objects.select_for_update().get(pk=api_key.pk).spending_limit_micros
    if limit is None:
        return
    spent = sum(
        Order.objects.filter(api_key=api_key, currency=total.currency)
        .exclude(status__in=[Order.Status.CANCELLED, Order.Status.REFUNDED])
        .values_list("total_micros", flat=True)
    )
    if spent + total.micros > limit:
        raise SpendingLimitReached(
            f"This key may spend {Money(limit, total.currency)} in all and has spent {Money(spent, total.currency)}; "
            f"the order is {total}. Ask an owner of {api_key.party.name} for a key with a higher limit.",
            pointers={"/expected_total": "above the key's spending limit"},
        )
