"""Webhooks: signed as Stripe signs them, tried again until they are taken, remembered over a restart."""

import hashlib
import hmac
import http.client
import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

from payouts.local_stripe import store
from payouts.local_stripe.store import PLATFORM, Store
from payouts.local_stripe.world import public

logger = logging.getLogger(__name__)

FIRST_RETRY_SECONDS = 0.5
LONGEST_RETRY_SECONDS = 300.0
ABANDONED_AFTER_SECONDS = 3 * 24 * 3600.0  # Stripe tries for three days
TIMEOUT_SECONDS = 10.0
SENDERS = 4
TICK_SECONDS = 0.25  # how often the clock is looked at when nothing wakes the loop


@dataclass(frozen=True)
class Delivery:
    seq: int
    endpoint: str
    attempts: int
    first_at: float
    url: str
    secret: str
    payload: bytes


def signature(payload: bytes, *, secret: str, moment: int) -> str:
    """The `Stripe-Signature` header: HMAC-SHA256 over the moment and the exact bytes."""
    digest = hmac.new(secret.encode(), f"{moment}.".encode() + payload, hashlib.sha256).hexdigest()
    return f"t={moment},v1={digest}"


def send(delivery: Delivery) -> str:
    """Try once; an empty string means that it was taken, otherwise what went wrong."""
    parts = urlsplit(delivery.url)
    secure = parts.scheme == "https"
    connection_class = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = connection_class(parts.hostname or "", parts.port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request(
            "POST",
            (parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
            body=delivery.payload,
            headers={
                "Content-Type": "application/json; charset=utf-8",
                "User-Agent": "Stripe/1.0 (+https://stripe.com/docs/webhooks)",
                "Stripe-Signature": signature(delivery.payload, secret=delivery.secret, moment=int(time.time())),
            },
        )
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    return "" if 200 <= answer.status < 300 else f"answered {answer.status}"  # a redirect is a failure, as at Stripe


class Courier:
    """A thread that lets time pass and delivers what is due: one at a time for each endpoint, so mostly in order.

    Args:
        settle: called on every tick, to let the agenda of the clock happen.
    """

    def __init__(self, file: Store, *, settle: Callable[[], None]) -> None:
        self._store = file
        self._settle = settle
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._busy: set[str] = set()  # endpoints with a delivery on its way
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(SENDERS, thread_name_prefix="webhook")
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def poke(self) -> None:
        self._wake.set()

    def stop(self) -> None:
        self._stopped.set()
        self._wake.set()
        self._thread.join(TIMEOUT_SECONDS)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._wake.wait(TICK_SECONDS)
            self._wake.clear()
            try:
                self._settle()
                for delivery in self._due():
                    self._pool.submit(send, delivery).add_done_callback(partial(self._done, delivery))
            except Exception:
                logger.exception("Courier stumbled")

    def _due(self) -> list[Delivery]:
        """The oldest due delivery of every endpoint that is not busy; those endpoints are busy from now on."""
        chosen = []
        with self._store.transaction() as db, self._lock:
            rows = db.execute(
                """SELECT seq, event, endpoint, attempts, first_at, MIN(seq) FROM deliveries
                   WHERE state = 'pending' AND next_at <= ? GROUP BY endpoint""",
                (time.time(),),
            ).fetchall()
            for seq, event_id, endpoint_id, attempts, first_at, _ in rows:
                endpoint = store.find(db, "webhook_endpoint", endpoint_id, account=PLATFORM)
                event = store.find(db, "event", event_id, account=None)
                if endpoint_id in self._busy or endpoint is None or event is None or endpoint["status"] != "enabled":
                    continue
                self._busy.add(endpoint_id)
                payload = json.dumps(public(event), indent=2).encode()
                chosen.append(
                    Delivery(seq, endpoint_id, attempts, first_at, endpoint["url"], endpoint["_secret"], payload)
                )
        return chosen

    def _done(self, delivery: Delivery, done: "Future[str]") -> None:
        if done.cancelled():
            return  # stopping; the row is still pending and the next start sends it
        error = done.result() if done.exception() is None else repr(done.exception())
        state, wait = "delivered", 0.0
        if error:
            wait = min(FIRST_RETRY_SECONDS * 2**delivery.attempts, LONGEST_RETRY_SECONDS)
            abandoned = time.time() - delivery.first_at > ABANDONED_AFTER_SECONDS
            state = "abandoned" if abandoned else "pending"
            logger.warning("Webhook failed seq=%s attempts=%s error=%s", delivery.seq, delivery.attempts + 1, error)
        with self._store.transaction() as db:
            db.execute(
                """UPDATE deliveries SET state = ?, attempts = attempts + 1, next_at = ?, last_error = ?
                   WHERE seq = ? AND state = 'pending'""",
                (state, time.time() + wait, error, delivery.seq),
            )
        with self._lock:
            self._busy.discard(delivery.endpoint)
        self.poke()
