"""What Stripe refuses, in words for the person who asked; what is our own fault is said to be."""

import logging

from payouts.errors import StripeDeclined, StripeUnavailable
from payouts.gateway import StripeRefused

logger = logging.getLogger(__name__)

#: Our key is wrong, revoked, or may not do this: nothing that the person who asked could mend, and not theirs to read.
OUR_FAULT = (401, 403)


def declined(error: StripeRefused, what: str) -> StripeDeclined | StripeUnavailable:
    """The refusal to raise; `what` begins the sentence that Stripe's own reason ends."""
    if error.http_status in OUR_FAULT:
        logger.error("Stripe refused us code=%s status=%s", error.code, error.http_status)
        return StripeUnavailable(
            "Stripe does not let us do this at the moment. The fault is ours and nothing happened."
        )
    return StripeDeclined(f"{what}: {error.message}")
