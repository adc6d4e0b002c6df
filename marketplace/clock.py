"""Business time: what holds, deadlines and due dates are read from. The demo can move it; production cannot.

Leases, signed URLs and webhook signatures use wall time (`django.utils.timezone.now`) and never this.
"""

from datetime import date, datetime, timedelta

from django.conf import settings
from django.db.models import F
from django.utils import timezone


def now() -> datetime:
    """The business time, aware, in UTC."""
    wall = timezone.now()
    if settings.RESIDUAL_MODE != "demo":
        return wall
    return wall + timedelta(seconds=_offset_seconds())


def today() -> date:
    return now().date()


def advance(by: timedelta) -> datetime:
    """Move the demo's clock forward.

    Raises:
        RuntimeError: outside demo mode.
        ValueError: `by` is negative; time that has passed has been acted upon.
    """
    if settings.RESIDUAL_MODE != "demo":
        raise RuntimeError("The business clock can only be moved in demo mode")
    if by < timedelta(0):
        raise ValueError(f"The clock cannot go back by {by}")
    from marketplace.models import ClockOffset

    ClockOffset.objects.get_or_create(pk=1)
    ClockOffset.objects.filter(pk=1).update(seconds=F("seconds") + int(by.total_seconds()))
    return now()


def _offset_seconds() -> int:
    from marketplace.models import ClockOffset

    found: int | None = ClockOffset.objects.filter(pk=1).values_list("seconds", flat=True).first()
    return found or 0
