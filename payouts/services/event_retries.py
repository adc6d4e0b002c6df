"""A failed event of Stripe's, applied once more on a person's word: the cause has passed, or somebody has mended it."""

import logging

from django.db import transaction
from django.utils import timezone

from marketplace import jobs
from marketplace.models import User
from marketplace.services import audit
from payouts.errors import FourEyes
from payouts.models import StripeEvent

logger = logging.getLogger(__name__)


@transaction.atomic
def retry(*, event: StripeEvent, user: User) -> bool:
    """Apply a failed event once more, whatever it failed by; False if it is not failed. Stripe is asked, so it is harmless.

    Raises:
        FourEyes: the user is not of the staff.
    """
    if not (user.is_active and user.is_staff):
        raise FourEyes("Only staff have Stripe's events applied again.")
    wall, before = timezone.now(), {"status": event.status, "error_code": event.error_code}
    reopened = StripeEvent.objects.filter(pk=event.pk, status=jobs.Job.Status.FAILED).update(
        status=jobs.Job.Status.QUEUED,
        n_failures=0,
        due_at=wall,
        sent_at=wall,
        finished_at=None,
        error_code="",
        error_message="",
    )
    if not reopened:
        return False
    audit.record(actor=user, action="stripe_event.retried", target=f"stripe_event:{event.pk}", before=before)
    jobs.wake(event)
    logger.info("Tries again event=%s by=%s", event.event_id, user.pk)
    return True
