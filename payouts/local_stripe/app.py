"""The HTTP side: who asks, in which version, for which account, under which idempotency key; and the answer's shape.

Beside Stripe's endpoints and pages there are some of the local Stripe's own, for the demo and the tests, behind the same key:

    GET  /_control/clock                            → {"now": …, "offset_seconds": …}
    POST /_control/clock  {"advance_seconds": n}    → the same, after everything due by then has happened
    GET  /_control/webhooks                         → {"pending": n, "delivered": n, "abandoned": n}
    POST /_control/disputes {"charge": id}          → the dispute; amount, reason and is_inquiry may be given
    POST /_control/disputes {"dispute": id, "verdict": won | lost | escalated}   → the dispute, decided
    POST /_control/accounts {"account": id, "currently_due": […]}   → the account, of which Stripe now asks this; disabled_reason,
                                                      payouts_enabled and transfers (active, inactive) may be given
    POST /_control/limits {"requests_per_second": n, "retry_after_seconds": m}   → the same: what is more is answered 429;
                                                      null: no limit. Kept in memory
"""

import hashlib
import hmac
import json
import logging
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound
from werkzeug.routing import Map, Rule
from werkzeug.wrappers import Request, Response

from payouts.local_stripe import endpoints, funds, objects, pages, schema, store
from payouts.local_stripe.delivery import Courier
from payouts.local_stripe.errors import StripeError
from payouts.local_stripe.store import PLATFORM, Body, Store
from payouts.local_stripe.world import World, new_id, public

logger = logging.getLogger(__name__)

MAX_BODY = 1 << 20
MAX_KEY = 255
FURTHEST_ADVANCE = 10 * 366 * 24 * 3600  # seconds


class StripeRequest(Request):
    max_content_length = MAX_BODY
    max_form_memory_size = MAX_BODY
    max_form_parts = 5000


class LocalStripe:
    """The WSGI application.

    Args:
        data: the folder of its state; made if it is not there.
        secret_key: the only key it accepts.
        validate: answer 500 when its own answer or event does not agree with Stripe's document.
        payout_days: days from a connected account's money to its bank; 0 pays at once.
    """

    def __init__(self, *, data: Path, secret_key: str, validate: bool = False, payout_days: int = 1) -> None:
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._store = Store(data / "stripe.sqlite3")
        self._secret_key = secret_key
        self._validate = validate
        self._payout_days = payout_days
        self._in_progress: set[tuple[str, str]] = set()
        self._in_progress_lock = threading.Lock()
        self._limit = _Limit()
        self.courier = Courier(self._store, settle=self._settle_quietly)
        rules = [
            Rule(path.replace("{", "<").replace("}", ">"), methods=[method], endpoint=("api", path))
            for method, path in endpoints.ENDPOINTS
        ]
        self._urls = Map(
            [
                *rules,
                Rule("/", methods=["GET"], endpoint=("front", "")),
                Rule("/c/pay/<session>", methods=["GET", "POST"], endpoint=("pay", "")),
                Rule("/setup/e/<account>/<token>", methods=["GET", "POST"], endpoint=("onboarding", "")),
                Rule("/_control/clock", methods=["GET", "POST"], endpoint=("clock", "")),
                Rule("/_control/webhooks", methods=["GET"], endpoint=("webhooks", "")),
                Rule("/_control/disputes", methods=["POST"], endpoint=("disputes", "")),
                Rule("/_control/accounts", methods=["POST"], endpoint=("accounts", "")),
                Rule("/_control/limits", methods=["POST"], endpoint=("limits", "")),
            ]
        )
        schema.operations()  # the document is read at the start, not inside the first request

    def start(self) -> None:
        self.courier.start()

    def stop(self) -> None:
        self.courier.stop()
        self._store.close()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        request = StripeRequest(environ)
        return self._answer(request)(environ, start_response)

    def _answer(self, request: Request) -> Response:
        try:
            (kind, path), values = self._urls.bind_to_environ(request.environ).match()
            if kind == "api" and request.method == "HEAD":
                raise MethodNotAllowed  # werkzeug allows it wherever GET is; Stripe does not
        except (NotFound, MethodNotAllowed):
            sentence = f"Unrecognized request URL ({request.method}: {request.path})."
            return self._sent(request, new_id("req", 14), *_refused(StripeError(sentence, status=404)))
        except HTTPException as redirect:  # a doubled slash, say
            return redirect.get_response(request.environ)
        if kind == "api":
            return self._api(request, path, values)
        if kind == "front":
            return pages.front()
        if kind in ("clock", "webhooks", "disputes", "accounts", "limits"):
            return self._control(request, kind)
        try:
            request.form  # noqa: B018 - read before the writer's turn: a slow client must not hold it
        except HTTPException as too_large:
            return too_large.get_response(request.environ)
        with self._store.transaction() as db:
            world = self._world(db, request)
            funds.settle(world)
            response = (pages.checkout if kind == "pay" else pages.onboarding)(world, request, **values)
        self._wake(world)
        return response

    def _world(self, db: Any, request: Request | None, **context: Any) -> World:
        return World(
            db=db,
            now=store.now(db),
            base_url=request.host_url.rstrip("/") if request else "",
            payout_days=self._payout_days,
            checked=self._validate,
            **context,
        )

    def _wake(self, world: World) -> None:
        if world.emitted:
            self.courier.poke()

    def _settle_quietly(self) -> None:
        with self._store.transaction() as db:
            funds.settle(self._world(db, None))

    # The API

    def _api(self, request: Request, path: str, values: Mapping[str, Any]) -> Response:
        request_id = new_id("req", 14)
        headers: dict[str, str] = {}
        try:
            status, body, headers = self._perform(request, request_id, path, values)
        except StripeError as error:
            (status, body), headers = _refused(error), error.headers
        except HTTPException as error:  # a body that is too large
            status, body = _refused(StripeError(error.description or error.name, status=error.code or 400))
        except Exception as error:
            logger.exception("Request failed request_id=%s", request_id)
            status, body = _refused(_internal(error, detailed=self._validate))
        return self._sent(request, request_id, status, body, headers)

    def _sent(
        self, request: Request, request_id: str, status: int, body: str, headers: dict[str, str] | None = None
    ) -> Response:
        response = Response(body, status=status, content_type="application/json")
        response.headers["Request-Id"] = request_id
        response.headers["Stripe-Version"] = schema.API_VERSION
        for name, value in (headers or {}).items():
            response.headers[name] = value
        return response

    def _authenticate(self, request: Request) -> None:
        given = request.authorization
        key = (given.token if given.type == "bearer" else given.username) if given else None
        if not key:
            raise StripeError(
                "You did not provide an API key. You need to provide your API key in the Authorization header, using "
                "Bearer auth (e.g. 'Authorization: Bearer YOUR_SECRET_KEY').",
                status=401,
                remembered=False,
            )
        if not hmac.compare_digest(key.encode(), self._secret_key.encode()):
            hidden = "*" * max(len(key) - 4, 0) + key[-4:] if len(key) > 12 else "*" * len(key)
            raise StripeError(f"Invalid API Key provided: {hidden}", status=401, remembered=False)

    def _perform(
        self, request: Request, request_id: str, path: str, values: Mapping[str, Any]
    ) -> tuple[int, str, dict[str, str]]:
        self._authenticate(request)
        self._limit.draw()
        version = request.headers.get("Stripe-Version", schema.API_VERSION)
        if version != schema.API_VERSION:
            raise StripeError(
                f"Invalid Stripe API version: {version}. The local Stripe speaks {schema.API_VERSION}.",
                remembered=False,
            )
        chosen = endpoints.ENDPOINTS[request.method, path]
        params = schema.validate_request(
            request.method,
            request.path,
            query=request.args.items(multi=True),
            form=request.form.items(multi=True),
        )
        endpoints.require_played(params, chosen.plays)
        endpoints.check_common(params)
        account = request.headers.get("Stripe-Account", PLATFORM)
        key = request.headers.get("Idempotency-Key") if request.method == "POST" else None
        if key is None:
            status, body = self._execute(request, request_id, chosen, params, values, account=account, key=None)
            return status, body, {}
        if not 1 <= len(key) <= MAX_KEY:
            raise StripeError(f"Idempotency keys have 1 to {MAX_KEY} characters.", remembered=False)
        return self._once(request, request_id, chosen, params, values, account=account, key=key)

    def _once(
        self,
        request: Request,
        request_id: str,
        chosen: endpoints.Endpoint,
        params: dict[str, Any],
        values: Mapping[str, Any],
        *,
        account: str,
        key: str,
    ) -> tuple[int, str, dict[str, str]]:
        """Execute under an idempotency key: at most one at a time, and at most once a day."""
        fingerprint = _fingerprint(request, params)
        with self._in_progress_lock:
            if (account, key) in self._in_progress:
                raise StripeError(
                    "There is currently another in-progress request using this Idempotent Key (that probably means you "
                    f"submitted twice, and the other request is still going through): {key}",
                    status=409,
                    kind="idempotency_error",
                    code="idempotency_key_in_use",
                    remembered=False,
                )
            self._in_progress.add((account, key))
        try:
            with self._store.transaction() as db:
                earlier = store.remembered(db, account=account, key=key)
            if earlier is None:
                status, body = self._execute(request, request_id, chosen, params, values, account=account, key=key)
                return status, body, {"Idempotency-Key": key, "Original-Request": request_id}
            first_fingerprint, status, body, first_request = earlier
            if first_fingerprint != fingerprint:
                raise StripeError(
                    "Keys for idempotent requests can only be used with the same parameters they were first used with. "
                    f"Try using a key other than '{key}' if you meant to execute a different request.",
                    kind="idempotency_error",
                    remembered=False,
                )
            return (
                status,
                body,
                {
                    "Idempotency-Key": key,
                    "Original-Request": first_request,
                    "Idempotent-Replayed": "true",
                },
            )
        finally:
            with self._in_progress_lock:
                self._in_progress.discard((account, key))

    def _execute(
        self,
        request: Request,
        request_id: str,
        chosen: endpoints.Endpoint,
        params: dict[str, Any],
        values: Mapping[str, Any],
        *,
        account: str,
        key: str | None,
    ) -> tuple[int, str]:
        """Do it, and keep the answer under the key, in one transaction; a refusal undoes all but the keeping."""
        with self._store.transaction() as db:
            world = self._world(db, request, account=account, request_id=request_id, idempotency_key=key)
            funds.settle(self._world(db, request))
            if account != PLATFORM:
                if store.find(db, "account", account, account=PLATFORM) is None:
                    raise endpoints.no_access(account)
                if chosen.platform_only:
                    raise StripeError("The local Stripe plays this endpoint for the platform only.", remembered=False)
            db.execute("SAVEPOINT effect")
            try:
                body = chosen.handler(world, params, **values)
                if body["object"] != "list":
                    body = world.shown(body, params.get("expand", []))
                if self._validate:
                    schema.validate_response(request.method, request.path, 200, body)
                status, text = 200, json.dumps(body, indent=2)
            except Exception as error:
                db.execute("ROLLBACK TO effect")
                world.emitted = 0
                if not isinstance(error, StripeError):
                    logger.exception("Request failed request_id=%s", request_id)
                    error = _internal(error, detailed=self._validate)
                if not error.remembered:
                    raise error from None
                status, text = _refused(error)
            if key is not None:
                store.remember(
                    db,
                    account=account,
                    key=key,
                    fingerprint=_fingerprint(request, params),
                    request_id=request_id,
                    status=status,
                    body=text,
                )
        self._wake(world)
        return status, text

    # The local Stripe's own

    def _control(self, request: Request, kind: str) -> Response:
        try:
            self._authenticate(request)
            with self._store.transaction() as db:
                if kind == "webhooks":
                    counts = {"pending": 0, "delivered": 0, "abandoned": 0}
                    counts |= dict(db.execute("SELECT state, COUNT(*) FROM deliveries GROUP BY state").fetchall())
                    return Response(json.dumps(counts), content_type="application/json")
                if kind == "limits":
                    self._limit = _Limit(**_limits(request))
                    return Response(json.dumps(_limits(request)), content_type="application/json")
                if kind == "clock" and request.method == "POST":
                    store.move_clock(db, _advance(request))
                world = self._world(db, request)
                funds.settle(world)
                if kind == "disputes":
                    state = _disputed(world, request)
                elif kind == "accounts":
                    state = _asked_of_account(world, request)
                else:
                    state = {"now": world.now, "offset_seconds": store.clock_offset(db)}
            self._wake(world)
            return Response(json.dumps(state), content_type="application/json")
        except StripeError as error:
            return self._sent(request, new_id("req", 14), *_refused(error))


def _advance(request: Request) -> int:
    """The seconds by which to move the clock; it never goes back.

    Raises:
        StripeError: not a whole number of seconds forward.
    """
    given = request.get_json(silent=True) if request.is_json else request.form.to_dict()
    seconds = given.get("advance_seconds") if isinstance(given, dict) else None
    if isinstance(seconds, str) and seconds.isdecimal():
        seconds = int(seconds)
    if not isinstance(seconds, int) or isinstance(seconds, bool) or not 0 <= seconds <= FURTHEST_ADVANCE:
        sentence = f"advance_seconds is a whole number from 0 to {FURTHEST_ADVANCE}."
        raise StripeError(sentence, param="advance_seconds", remembered=False)
    return seconds


def _disputed(world: World, request: Request) -> Body:
    """Play the cardholder, who disputes a charge, or their bank, which decides.

    Raises:
        StripeError: no such charge or dispute, or it cannot be disputed.
    """
    given = request.get_json(silent=True) or {}
    if "dispute" in given:
        dispute = world.get("dispute", given["dispute"], account=PLATFORM, param="dispute")
        if given.get("verdict") not in set(funds.VERDICTS.values()):
            raise StripeError("The verdict is won, lost or escalated.", param="verdict")
        funds.decide_dispute(world, dispute, given["verdict"])
    else:
        charge = world.get("charge", str(given.get("charge")), account=PLATFORM, param="charge")
        dispute = funds.open_dispute(
            world,
            charge,
            amount=given.get("amount"),
            reason=given.get("reason", "fraudulent"),
            is_inquiry=given.get("is_inquiry", False),
        )
    return public(dispute)


class _Limit:
    """How many requests of the API a second are answered; Stripe's is a token bucket too."""

    def __init__(self, requests_per_second: float | None = None, retry_after_seconds: int | None = None) -> None:
        self._rate, self._retry_after = requests_per_second, retry_after_seconds
        self._tokens = requests_per_second or 0.0
        self._at = time.monotonic()
        self._lock = threading.Lock()

    def draw(self) -> None:
        """
        Raises:
            StripeError: 429; nothing was done, and no key remembers it.
        """
        if self._rate is None:
            return
        with self._lock:
            now = time.monotonic()
            self._tokens = min(self._rate, self._tokens + (now - self._at) * self._rate)
            self._at = now
            if self._tokens >= 1:
                self._tokens -= 1
                return
        raise StripeError(
            "Request rate limit exceeded. You can learn more about rate limits here https://stripe.com/docs/rate-limits.",
            status=429,
            code="rate_limit",
            remembered=False,
            headers={"Stripe-Rate-Limited-Reason": "global-rate"}
            | ({"Retry-After": str(self._retry_after)} if self._retry_after else {}),
        )


def _limits(request: Request) -> dict[str, Any]:
    given = request.get_json(silent=True) or {}
    rate, retry_after = given.get("requests_per_second"), given.get("retry_after_seconds")
    if rate is not None and not (isinstance(rate, int | float) and rate > 0):
        raise StripeError("requests_per_second is a number above 0, or null.", param="requests_per_second")
    if retry_after is not None and not (isinstance(retry_after, int) and retry_after > 0):
        raise StripeError("retry_after_seconds is a whole number above 0, or null.", param="retry_after_seconds")
    return {"requests_per_second": rate, "retry_after_seconds": retry_after}


def _asked_of_account(world: World, request: Request) -> Body:
    """Play Stripe's risk or tax team, which wants to know something of a payee; an empty list: it has all it wants.

    Raises:
        StripeError: no such account, or not a list of names.
    """
    given = request.get_json(silent=True) or {}
    account = world.get("account", str(given.get("account")), account=PLATFORM, param="account")
    due = given.get("currently_due", [])
    if not isinstance(due, list) or not all(isinstance(name, str) for name in due):
        raise StripeError(
            "currently_due is a list of Stripe's names, such as individual.id_number.", param="currently_due"
        )
    before = {name: account[name] for name in ("requirements", "payouts_enabled", "capabilities")}
    reason = given.get("disabled_reason")
    account["requirements"] = objects.requirements(due) | {"disabled_reason": reason, "past_due": due if reason else []}
    account["payouts_enabled"] = bool(given.get("payouts_enabled", account["payouts_enabled"]))
    account["capabilities"] = account["capabilities"] | (
        {"transfers": given["transfers"]} if given.get("transfers") in ("active", "inactive") else {}
    )
    world.save(account)
    previous = {name: value for name, value in before.items() if account[name] != value}
    world.emit("account.updated", account, account=account["id"], previous=previous)
    if account["payouts_enabled"]:
        funds.plan_payout(world, account)
    return public(account)


def _fingerprint(request: Request, params: dict[str, Any]) -> str:
    """Two requests under one idempotency key are the same if this is."""
    return hashlib.sha256(json.dumps([request.method, request.path, params], sort_keys=True).encode()).hexdigest()


def _refused(error: StripeError) -> tuple[int, str]:
    return error.status, json.dumps(error.body(), indent=2)


def _internal(error: Exception, *, detailed: bool) -> StripeError:
    """A fault of the local Stripe's own; a key remembers it, as Stripe's do."""
    sentence = "An error occurred with our server."
    return StripeError(f"{sentence} {error}" if detailed else sentence, status=500, kind="api_error")
