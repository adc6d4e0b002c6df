"""Licenses that end, pause and come back with the money that was paid for them; the payouts say when."""

import logging
from collections.abc import Collection
from datetime import datetime

from django.db import transaction
from django.db.models import QuerySet

from marketplace.models import License, Order, OrderLine, Party
from marketplace.services import audit

logger = logging.getLogger(__name__)


@transaction.atomic
def match_refunded(*, order: Order, refunded: Collection[int], at: datetime) -> None:
    """End the license of every line whose price has gone back, keep the others, and say so on the order.

    The order is refunded when every line is. Harmless to call twice; a refund that failed brings a license back.

    Args:
        refunded: the ids of the order lines that were refunded wholly.
    """
    lines = set(OrderLine.objects.filter(order=order).values_list("pk", flat=True))
    licenses = License.objects.filter(order_line__order=order)
    _note(licenses.filter(order_line__in=refunded, revoked_at=None), "license.revoked", revoked_at=at)
    _note(licenses.exclude(order_line__in=refunded).exclude(revoked_at=None), "license.restored", revoked_at=None)
    status = Order.Status.REFUNDED if lines <= set(refunded) else Order.Status.PAID
    paid = Order.objects.filter(pk=order.pk, status__in=[Order.Status.PAID, Order.Status.REFUNDED])
    if paid.exclude(status=status).update(status=status):
        audit.record(
            actor=None,
            party=order.buyer_id,
            action="order.refunded" if status == Order.Status.REFUNDED else "order.refund_undone",
            target=f"order:{order.pk}",
        )
        logger.info("Order is now order=%s status=%s", order.pk, status)
    order.refresh_from_db(fields=["status"])


@transaction.atomic
def suspend_licenses(*, order: Order, at: datetime) -> None:
    """Stop the downloads of an order whose payment is disputed."""
    _note(License.objects.filter(order_line__order=order, suspended_at=None), "license.suspended", suspended_at=at)


@transaction.atomic
def resume_licenses(*, order: Order) -> None:
    """The dispute is over."""
    suspended = License.objects.filter(order_line__order=order).exclude(suspended_at=None)
    _note(suspended, "license.resumed", suspended_at=None)


@transaction.atomic
def match_arrears(*, licensee: Party, overdue: Collection[int], at: datetime) -> bool:
    """Suspend the licenses whose royalty report or invoice is long overdue, and lift it from the licensee's others.

    Harmless to call twice. While one is suspended nothing is sold to the licensee.

    Args:
        overdue: the ids of the licenses that are in arrears now.

    Returns:
        Whether anything changed.
    """
    theirs = License.objects.filter(licensee=licensee)
    late = theirs.filter(pk__in=overdue, in_arrears_at=None)
    settled = theirs.exclude(pk__in=overdue).exclude(in_arrears_at=None)
    changed = late.exists() or settled.exists()
    _note(late, "license.in_arrears", in_arrears_at=at)
    _note(settled, "license.arrears_settled", in_arrears_at=None)
    return changed


def _note(licenses: "QuerySet[License]", action: str, **changes: datetime | None) -> None:
    for license in licenses.select_for_update(of=("self",)).order_by("pk"):
        License.objects.filter(pk=license.pk).update(**changes)
        audit.record(actor=None, party=license.licensee_id, action=action, target=f"license:{license.pk}")
