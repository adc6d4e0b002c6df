"""An effect at Stripe after its intent was committed: tried until its outcome is known, and done once (DESIGN §5).

A worker may die anywhere. The next one finds the intent, asks Stripe whether it was done, and repeats the call with the same
idempotency key while Stripe remembers it; the attempt in the key rises only when the key would say nothing new.
"""

import logging
import time
from datetime import datetime, timedelta
from typing import Protocol, TypeVar

from django.utils import timezone

from payouts import gateway
from payouts.services.refusals import OUR_FAULT

logger = logging.getLogger(__name__)

#: Stripe forgets an idempotency key after a day; an hour is kept clear of it.
KEY_LIFE = timedelta(hours=23)
TRIES = 3
LONGEST_WAIT_SECONDS = 5.0
A = TypeVar("A")


class StillUncertain(Exception):
    """Stripe gave no clear answer; the job comes back for it."""

    is_busy = False  # every answer was a 429: nobody's failure, only too early


class Effect(Protocol[A]):
    """One thing to be done at Stripe, and how its intent's row remembers it."""

    @property
    def first_tried_at(self) -> datetime | None:
        """Wall time; from then on it may have been done."""

    def note_try(self) -> None:
        """Commit that it is about to be tried for the first time."""

    def next_attempt(self) -> None:
        """Commit a new attempt, and with it a new key."""

    def find(self) -> A | None:
        """What was done, if it was.

        Raises:
            gateway.StripeRefused, gateway.StripeUncertain: ask again.
        """

    def call(self) -> A:
        """Do it, under the attempt's key.

        Raises:
            gateway.StripeRefused: nothing was done.
            gateway.StripeUncertain: it may have been.
        """

    def book(self, answer: A) -> None:
        """It is done."""

    def refuse(self, error: gateway.StripeRefused) -> None:
        """It will not be: put the intent back."""


def pursue(effect: Effect[A], *, answered: gateway.StripeUncertain | None = None) -> None:
    """Bring an intent to its end.

    Args:
        answered: what the first call said, where somebody has noted the try and made it already.

    Raises:
        StillUncertain: it may have been done, and nobody knows yet; nothing was put back.
        gateway.StripeRefused: Stripe refused us rather than this (the key is wrong, say); the intent stays.
    """
    statuses: list[int | None] = []
    try:
        if answered is not None:
            statuses.append(answered.http_status)
            if _found_after(effect, answered, wait_seconds=0.5):
                return None
        elif effect.first_tried_at is not None:
            # Somebody tried before us and did not live to book the answer.
            found = effect.find()
            if found is not None:
                return effect.book(found)
            if timezone.now() - effect.first_tried_at > KEY_LIFE:
                effect.next_attempt()
        else:
            effect.note_try()
        while len(statuses) < TRIES:
            error = _called(effect)
            if error is None:
                return None
            statuses.append(error.http_status)
            if _found_after(effect, error, wait_seconds=0.25 * 2 ** len(statuses)):
                return None
    except gateway.StripeUncertain as error:  # of a look-up
        raise StillUncertain(f"{effect}: {error}") from error
    uncertain = StillUncertain(f"{effect}: {TRIES} tries")
    uncertain.is_busy = all(status == 429 for status in statuses)
    raise uncertain


def _called(effect: Effect[A]) -> gateway.StripeUncertain | None:
    """One call; what it said, unless that ended it one way or the other."""
    try:
        answer = effect.call()
    except gateway.StripeRefused as error:
        if error.http_status in OUR_FAULT:
            raise  # we were refused, not this; nothing was done and the intent stays
        effect.refuse(error)
    except gateway.StripeUncertain as error:
        return error
    else:
        effect.book(answer)
    return None


def _found_after(effect: Effect[A], error: gateway.StripeUncertain, *, wait_seconds: float) -> bool:
    """After an uncertain answer: whether it was done all the same; otherwise ready to be called again, a little later.

    Raises:
        gateway.StripeUncertain: of the look-up.
    """
    logger.warning("Stripe's answer is uncertain effect=%s error=%s", effect, error)
    if error.is_key_spent:
        # The key would only repeat this answer, which does not say whether it was done.
        found = effect.find()
        if found is not None:
            effect.book(found)
            return True
        effect.next_attempt()
    time.sleep(min(error.retry_after_seconds or wait_seconds, LONGEST_WAIT_SECONDS))
    return False
