"""One request's hold on the company's state: objects made, changed and shown, and the events that this causes."""

import secrets
import sqlite3
import string
import time
from dataclasses import dataclass, field
from typing import Any

from payouts.local_stripe import schema, store
from payouts.local_stripe.errors import StripeError, missing
from payouts.local_stripe.store import PLATFORM, Body

_ALPHABET = string.ascii_letters + string.digits
_EXPAND_DEPTH = 4  # Stripe's own limit


def new_id(prefix: str, length: int = 24) -> str:
    return f"{prefix}_{''.join(secrets.choice(_ALPHABET) for _ in range(length))}"


def public(body: Body) -> Body:
    """An object without the fields that are the company's own business; their names begin with an underscore."""
    return {name: value for name, value in body.items() if not name.startswith("_")}


@dataclass
class World:
    """Inside one transaction.

    Args:
        db: the open transaction.
        now: the moment at which things happen, which during settling may lie in the past.
        account: whose objects the request is about; "" is the platform.
        base_url: where a browser reaches this server, for links in answers.
        payout_days: days from a connected account's money to its bank; 0 pays at once.
    """

    db: sqlite3.Connection
    now: int
    account: str = PLATFORM
    base_url: str = ""
    payout_days: int = 1
    request_id: str | None = None
    idempotency_key: str | None = None
    checked: bool = False  # whether every event is held against Stripe's document
    emitted: int = field(default=0, init=False)

    def add(self, body: Body, *, account: str | None = None) -> Body:
        store.insert(self.db, body["object"], body, account=self.account if account is None else account)
        return body

    def save(self, body: Body) -> Body:
        store.update(self.db, body)
        return body

    def get(self, kind: str, identifier: str, *, account: str | None = None, param: str = "id") -> Body:
        """One object of the request's account.

        Raises:
            StripeError: 404 `resource_missing`.
        """
        body = store.find(self.db, kind, identifier, account=self.account if account is None else account)
        if body is None:
            raise missing(kind, identifier, param=param)
        return body

    def emit(
        self, kind: str, body: Body, *, account: str | None = None, previous: dict[str, Any] | None = None
    ) -> None:
        """Record an event and queue it for every endpoint that asked for it, in the transaction of its cause."""
        account = self.account if account is None else account
        data: dict[str, Any] = {"object": public(body)}
        if previous is not None:
            data["previous_attributes"] = previous
        takers = [endpoint for endpoint in self._endpoints() if _wants(endpoint, kind, account)]
        event: Body = {
            "id": new_id("evt"),
            "object": "event",
            "api_version": schema.API_VERSION,
            "created": self.now,
            "data": data,
            "livemode": False,
            "pending_webhooks": len(takers),
            "request": {"id": self.request_id, "idempotency_key": self.idempotency_key},
            "type": kind,
        }
        if account != PLATFORM:
            event["account"] = account
        if self.checked:
            schema.validate_event(event)
        self.add(event, account=account)
        self.db.executemany(
            "INSERT INTO deliveries (event, endpoint, first_at, next_at) VALUES (?, ?, ?, ?)",
            [(event["id"], endpoint["id"], time.time(), time.time()) for endpoint in takers],
        )
        self.emitted += 1

    def _endpoints(self) -> list[Body]:
        return store.listed(self.db, "webhook_endpoint", account=PLATFORM, where=[], limit=100)

    def shown(self, body: Body, expand: list[str], *, prefix: str = "expand") -> Body:
        """An object as a client sees it, with the asked-for ids replaced by their objects.

        Raises:
            StripeError: a path leads nowhere, or deeper than Stripe goes.
        """
        result = self._pending_webhooks(public(body))
        for number, path in enumerate(expand):
            steps = path.split(".")
            if len(steps) > _EXPAND_DEPTH:
                raise StripeError(
                    f"You cannot expand more than {_EXPAND_DEPTH} levels of a property. Property: {path}",
                    param=f"{prefix}[{number}]",
                )
            self._expand(result, body, steps, path=path, param=f"{prefix}[{number}]")
        return result

    def _expand(self, result: Body, stored: Body, steps: list[str], *, path: str, param: str) -> None:
        head, *rest = steps
        kind = stored["object"]
        if kind == "checkout.session" and head == "line_items" and not rest:
            result["line_items"] = line_items(stored)
            return
        if head not in schema.expandable(kind):
            raise StripeError(f"This property cannot be expanded ({path}).", param=param)
        value = result.get(head)
        if value is None:
            return
        if isinstance(value, str):
            row = self.db.execute("SELECT kind FROM objects WHERE id = ?", (value,)).fetchone()
            inner = store.find(self.db, row[0], value, account=None) if row else None
            if inner is None:
                raise StripeError(f"The local Stripe keeps no object behind this property ({path}).", param=param)
            value = result[head] = public(inner)
        if rest:
            inner = store.find(self.db, value["object"], value["id"], account=None)
            assert inner is not None
            self._expand(value, inner, rest, path=path, param=param)

    def _pending_webhooks(self, body: Body) -> Body:
        if body["object"] == "event":
            (body["pending_webhooks"],) = self.db.execute(
                "SELECT COUNT(*) FROM deliveries WHERE event = ? AND state = 'pending'", (body["id"],)
            ).fetchone()
        return body

    def listed(
        self,
        kind: str,
        url: str,
        params: dict[str, Any],
        *,
        filters: list[tuple[str, str, Any]] | None = None,
        account: str | None = None,
    ) -> Body:
        """A page of a list, newest first, as Stripe pages: by the id of an object at its edge.

        Raises:
            StripeError: an unknown cursor, both cursors at once, or a limit outside 1 to 100.
        """
        account = self.account if account is None else account
        limit = params.get("limit", 10)
        if not 1 <= limit <= 100:
            raise StripeError("Invalid limit: must be between 1 and 100", param="limit")
        cursors: dict[str, int | None] = {"starting_after": None, "ending_before": None}
        for name in cursors:
            if name in params:
                cursors[name] = store.position(self.db, kind, params[name], account=account)
                if cursors[name] is None:
                    raise missing(kind, params[name], param=name)
        if None not in cursors.values():
            raise StripeError("Received both starting_after and ending_before parameters.", param="ending_before")
        where = list(filters or [])
        for name in ("created", "arrival_date"):
            asked = params.get(name)
            if isinstance(asked, int):
                where.append((name, "=", asked))
            elif asked:
                signs = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
                where.extend((name, signs[relation], moment) for relation, moment in asked.items())
        page = store.listed(
            self.db,
            kind,
            account=account,
            where=where,
            limit=limit + 1,  # one more tells whether there is more
            before=cursors["starting_after"],
            after=cursors["ending_before"],
        )
        has_more = len(page) > limit
        if has_more:
            page = page[1:] if cursors["ending_before"] is not None else page[:limit]
        expand = params.get("expand", [])
        for path in expand:
            if not path.startswith("data."):
                raise StripeError(f"This property cannot be expanded ({path}).", param="expand[0]")
        inner = [path.removeprefix("data.") for path in expand]
        return {
            "object": "list",
            "data": [self.shown(body, inner) for body in page],
            "has_more": has_more,
            "url": url,
        }


def line_items(session: Body) -> Body:
    """A session's line items as the list that Stripe makes of them."""
    return {
        "object": "list",
        "data": session["_line_items"],
        "has_more": False,
        "url": f"/v1/checkout/sessions/{session['id']}/line_items",
    }


def _wants(endpoint: Body, kind: str, account: str) -> bool:
    """Connect endpoints hear of the connected accounts, the others of the platform."""
    return (
        endpoint["status"] == "enabled"
        and endpoint["_connect"] == (account != PLATFORM)
        and ("*" in endpoint["enabled_events"] or kind in endpoint["enabled_events"])
    )
