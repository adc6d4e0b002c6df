"""How fast Stripe is asked: a token bucket in Redis that every worker draws from, and a pause that a 429 gives to all of them.

    tokens flow in at STRIPE_REQUESTS_PER_SECOND, at most a tenth of a second's worth of them stands ready

Redis only paces: where it does not answer, each process keeps the rate by itself, and a 429 says if that is too much.
"""

import logging
import threading
import time
from collections import deque

from django.conf import settings
from django.core.cache import cache
from redis import Redis
from redis.exceptions import RedisError

logger = logging.getLogger(__name__)

KEY = "stripe:pace"
LONGEST_PAUSE_SECONDS = 60.0
FIRST_PAUSE_SECONDS = 1.0
#: Whoever has many calls to make draws turns for so long at once, so that Redis is not asked for each of them.
DRAWN_SECONDS = 0.05

# KEYS[1]: a hash of `tokens` and `at`, seconds by Redis' own clock, so workers' clocks need not agree; `at` lies ahead while a 429
# makes everybody wait, and nothing flows in until then. Takes ARGV[3] tokens, and says for how long nothing flows in yet and what
# there was: a debt of tokens is a place in the queue.
_TAKE = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local rate, burst, wanted = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local held = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local tokens, at = tonumber(held[1] or burst), tonumber(held[2] or now)
if at > now + tonumber(ARGV[4]) then at = now end  -- the clock was put back
local from = math.max(now, at)
tokens = math.min(burst, tokens + (from - at) * rate)
redis.call('HSET', KEYS[1], 'tokens', tostring(tokens - wanted), 'at', tostring(from))
redis.call('EXPIRE', KEYS[1], 3600)
return {tostring(from - now), tostring(tokens)}
"""
# Puts the earliest next call off for everybody, and pours away what stood ready.
_BACK_OFF = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local at = tonumber(redis.call('HGET', KEYS[1], 'at') or 0)
if at > now + tonumber(ARGV[2]) then at = now end
redis.call('HSET', KEYS[1], 'tokens', '0', 'at', tostring(math.max(at, now + tonumber(ARGV[1]))))
redis.call('EXPIRE', KEYS[1], 3600)
return 1
"""


class _Local:
    """The same bucket, of this process alone; and until when a 429 makes this process wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 0.0  # monotonic seconds
        self.paused_until = 0.0

    def take(self, rate: float, n: int) -> float:
        with self._lock:
            now = time.monotonic()
            first = max(self._next, self.paused_until, now)
            self._next = first + n / rate
            return first - now

    def back_off(self, seconds: float) -> None:
        with self._lock:
            self.paused_until = max(self.paused_until, time.monotonic() + seconds)


_local = _Local()


class Turns:
    """So many calls of one batch, by however many threads. Turns are drawn when somebody is there to use them, a few at once."""

    def __init__(self, n: int) -> None:
        self._lock = threading.Lock()
        self._left = n
        self._drawn: deque[float] = deque()  # monotonic seconds

    def wait(self) -> float:
        """Sleep until Stripe may be asked once more; returns the seconds slept."""
        with self._lock:
            if not self._drawn:
                self._draw()
            turn = self._drawn.popleft()
        return _sleep_until(turn) + _sleep_until(_local.paused_until)  # a 429 may have come after it was drawn

    def _draw(self) -> None:
        rate = float(settings.STRIPE_REQUESTS_PER_SECOND)
        n = min(max(1, int(rate * DRAWN_SECONDS)), self._left)
        if n < 1:
            raise ValueError("More turns are waited for than were asked for")
        try:
            limits = (rate, max(1.0, rate / 10), n, LONGEST_PAUSE_SECONDS)
            pause, tokens = map(float, _redis().eval(_TAKE, 1, _key(), *limits))
        except RedisError as error:
            logger.warning("Redis does not pace error=%s", type(error).__name__)
            pause, tokens = _local.take(rate, n), 1.0
        now = time.monotonic()
        self._drawn.extend(now + pause + max(0.0, (number - tokens) / rate) for number in range(1, n + 1))
        self._left -= n


def wait_for_turn() -> float:
    """Sleep until Stripe may be asked once more; returns the seconds slept."""
    return Turns(1).wait()


def _sleep_until(moment: float) -> float:
    seconds = moment - time.monotonic()
    if seconds > 0:
        time.sleep(seconds)
    return max(seconds, 0.0)


def back_off(*, retry_after_seconds: float | None, number: int) -> float:
    """Stripe said that it was too much: every worker waits as long as it asked, or longer each time; returns how long."""
    asked = retry_after_seconds or FIRST_PAUSE_SECONDS * 2**number
    seconds = min(asked, LONGEST_PAUSE_SECONDS)
    logger.warning("Stripe is asked less: it answered 429 pause_seconds=%s", seconds)
    _local.back_off(seconds)
    try:
        _redis().eval(_BACK_OFF, 1, _key(), seconds, LONGEST_PAUSE_SECONDS)
    except RedisError as error:
        logger.warning("Redis does not pace error=%s", type(error).__name__)
    return seconds


def _redis() -> Redis:
    client: Redis = cache._cache.get_client(None, write=True)  # type: ignore[attr-defined] # Django's own connection
    return client


def _key() -> str:
    return str(cache.make_key(KEY))
