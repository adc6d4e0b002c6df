"""How fast Stripe is asked: a token bucket in Redis that every worker draws from, and a pause that a 429 gives to all of them.

    tokens flow in at STRIPE_REQUESTS_PER_SECOND, at most a tenth of a second's worth of them stands ready

Redis only paces: where it does not answer, each process keeps the rate by itself, and a 429 says if that is too much.
"""

import logging
import threading
import time

from django.conf import settings
from django.core.cache import cache
from redis import Redis
from redis.exceptions import RedisError

logger = logging.getLogger(__name__)

KEY = "stripe:pace"
LONGEST_PAUSE_SECONDS = 60.0
FIRST_PAUSE_SECONDS = 1.0

# KEYS[1]: a hash of `tokens`, `at` and `not_before` (seconds by Redis' own clock, so workers' clocks need not agree).
# Takes one token and returns how long to wait before using it: a debt of tokens is a place in the queue.
_TAKE = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local rate, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local held = redis.call('HMGET', KEYS[1], 'tokens', 'at', 'not_before')
local tokens, at, not_before = tonumber(held[1] or burst), tonumber(held[2] or now), tonumber(held[3] or 0)
tokens = math.min(burst, tokens + math.max(0, now - at) * rate) - 1
redis.call('HSET', KEYS[1], 'tokens', tostring(tokens), 'at', tostring(now))
redis.call('EXPIRE', KEYS[1], 3600)
return tostring(math.max(0, -tokens / rate, not_before - now))
"""
# Puts the earliest next call off for everybody, and pours away what stood ready.
_BACK_OFF = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local held = tonumber(redis.call('HGET', KEYS[1], 'not_before') or 0)
redis.call('HSET', KEYS[1], 'not_before', tostring(math.max(held, now + tonumber(ARGV[1]))), 'tokens', '0', 'at', tostring(now))
redis.call('EXPIRE', KEYS[1], 3600)
return 1
"""


class _Local:
    """The same bucket, of this process alone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 0.0  # monotonic seconds

    def take(self, rate: float) -> float:
        with self._lock:
            now = time.monotonic()
            self._next = max(self._next, now) + 1 / rate
            return self._next - 1 / rate - now

    def back_off(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


_local = _Local()


def wait_for_turn() -> float:
    """Sleep until Stripe may be asked once more; returns the seconds slept."""
    rate = float(settings.STRIPE_REQUESTS_PER_SECOND)
    try:
        seconds = float(_redis().eval(_TAKE, 1, _key(), rate, max(1.0, rate / 10)))
    except RedisError as error:
        logger.warning("Redis does not pace error=%s", type(error).__name__)
        seconds = _local.take(rate)
    if seconds > 0:
        time.sleep(seconds)
    return seconds


def back_off(*, retry_after_seconds: float | None, number: int) -> float:
    """Stripe said that it was too much: every worker waits as long as it asked, or longer each time; returns how long."""
    asked = retry_after_seconds or FIRST_PAUSE_SECONDS * 2**number
    seconds = min(asked, LONGEST_PAUSE_SECONDS)
    logger.warning("Stripe is asked less: it answered 429 pause_seconds=%s", seconds)
    try:
        _redis().eval(_BACK_OFF, 1, _key(), seconds)
    except RedisError as error:
        logger.warning("Redis does not pace error=%s", type(error).__name__)
        _local.back_off(seconds)
    return seconds


def _redis() -> Redis:
    client: Redis = cache._cache.get_client(None, write=True)  # type: ignore[attr-defined] # Django's own connection
    return client


def _key() -> str:
    return str(cache.make_key(KEY))
