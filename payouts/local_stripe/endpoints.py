"""What each endpoint does, once its parameters agree with Stripe's document.

A parameter that Stripe knows and the local Stripe does not play is refused by name; ignoring it would be a lie about money.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from payouts.local_stripe import funds, objects, store
from payouts.local_stripe.errors import StripeError, missing
from payouts.local_stripe.store import PLATFORM, Body
from payouts.local_stripe.world import World, line_items, new_id, public

Handler = Callable[..., Body]
PAGING = {"limit", "starting_after", "ending_before", "expand"}
#: The currencies in which the company settles, and the smallest charge in each, in minor units.
SMALLEST_CHARGE = {"usd": 50, "eur": 50, "gbp": 30, "jpy": 50}
LARGEST_CHARGE = 99_999_999
METADATA_KEYS, METADATA_NAME, METADATA_VALUE = 50, 40, 500


@dataclass(frozen=True)
class Endpoint:
    handler: Handler
    plays: frozenset[str]  # parameters, dotted, indices left out; a name covers everything below it
    platform_only: bool


ENDPOINTS: dict[tuple[str, str], Endpoint] = {}


def endpoint(method: str, path: str, *plays: str, platform_only: bool = False) -> Callable[[Handler], Handler]:
    def registered(handler: Handler) -> Handler:
        ENDPOINTS[method, path] = Endpoint(handler, frozenset({*plays, "expand"}), platform_only)
        return handler

    return registered


def require_played(params: dict[str, Any], plays: frozenset[str]) -> None:
    """Refuse what Stripe would understand and the local Stripe would have to ignore.

    Raises:
        StripeError: naming the parameter.
    """

    def walk(value: Any, dotted: str, name: str) -> None:
        if dotted in plays:
            return
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(inner, f"{dotted}.{key}" if dotted else key, f"{name}[{key}]" if name else key)
        elif isinstance(value, list) and value:
            for number, inner in enumerate(value):
                walk(inner, dotted, f"{name}[{number}]")
        elif name:
            raise StripeError(
                f"The local Stripe does not play the parameter {name}.",
                code="parameter_unknown",
                param=name,
                remembered=False,
            )

    walk(params, "", "")


def check_common(params: dict[str, Any]) -> None:
    """Rules that the document does not state: metadata's size, currencies, positive amounts, absolute URLs.

    Raises:
        StripeError: before anything was executed, so no key remembers it.
    """
    metadata = params.get("metadata") or {}
    if len(metadata) > METADATA_KEYS:
        raise StripeError(f"Metadata can have at most {METADATA_KEYS} keys.", param="metadata", remembered=False)
    for name, value in metadata.items():
        if len(name) > METADATA_NAME or len(value) > METADATA_VALUE:
            raise StripeError(
                f"Metadata names have at most {METADATA_NAME} characters, values {METADATA_VALUE}.",
                param=f"metadata[{name}]",
                remembered=False,
            )
    if "currency" in params:
        params["currency"] = known_currency(params["currency"], param="currency")
    if "amount" in params and params["amount"] < 1:
        raise StripeError(
            "This value must be greater than or equal to 1.",
            code="parameter_invalid_integer",
            param="amount",
            remembered=False,
        )
    for name in ("url", "success_url", "cancel_url", "return_url", "refresh_url"):
        if name in params and urlsplit(params[name]).scheme not in ("http", "https"):
            raise StripeError("Not a valid URL", code="url_invalid", param=name, remembered=False)


def known_currency(code: str, *, param: str) -> str:
    lowered = code.lower()
    if lowered not in SMALLEST_CHARGE:
        raise StripeError(
            f"Invalid currency: {code}. The local Stripe settles in {', '.join(sorted(SMALLEST_CHARGE))}.",
            param=param,
            remembered=False,
        )
    return lowered


def equal(params: dict[str, Any], *names: str) -> list[tuple[str, str, Any]]:
    return [(name, "=", params[name]) for name in names if name in params]


def merged(body: Body, params: dict[str, Any], *names: str) -> dict[str, Any]:
    """Change the named fields; metadata merges by key, an empty value removes one. Returns what was there before."""
    previous: dict[str, Any] = {}
    for name in names:
        if name not in params:
            continue
        wanted = params[name]
        if name == "metadata":
            wanted = {} if wanted == "" else {**body["metadata"], **wanted}
            wanted = {key: value for key, value in wanted.items() if value != ""}
        else:
            wanted = None if wanted == "" else wanted
        if body[name] != wanted:
            previous[name], body[name] = body[name], wanted
    return previous


# Customers


@endpoint("POST", "/v1/customers", "name", "email", "phone", "description", "metadata")
def create_customer(world: World, params: dict[str, Any]) -> Body:
    body = world.add(objects.customer(params, now=world.now))
    world.emit("customer.created", body)
    return body


@endpoint("GET", "/v1/customers", "email", "created", *PAGING)
def list_customers(world: World, params: dict[str, Any]) -> Body:
    return world.listed("customer", "/v1/customers", params, filters=equal(params, "email"))


@endpoint("GET", "/v1/customers/{customer}")
def get_customer(world: World, params: dict[str, Any], customer: str) -> Body:
    return world.get("customer", customer)


@endpoint("POST", "/v1/customers/{customer}", "name", "email", "phone", "description", "metadata")
def update_customer(world: World, params: dict[str, Any], customer: str) -> Body:
    body = world.get("customer", customer)
    previous = merged(body, params, "name", "email", "phone", "description", "metadata")
    if previous:
        world.save(body)
        world.emit("customer.updated", body, previous=previous)
    return body


@endpoint("DELETE", "/v1/customers/{customer}")
def delete_customer(world: World, params: dict[str, Any], customer: str) -> Body:
    body = world.get("customer", customer)
    store.delete(world.db, customer)
    world.emit("customer.deleted", body)
    return {"id": customer, "object": "customer", "deleted": True}


# Checkout


@endpoint(
    "POST",
    "/v1/checkout/sessions",
    "mode",
    "line_items.quantity",
    "line_items.metadata",
    "line_items.price_data.currency",
    "line_items.price_data.unit_amount",
    "line_items.price_data.product_data.name",
    "line_items.price_data.product_data.description",
    "line_items.price_data.product_data.metadata",
    "metadata",
    "client_reference_id",
    "currency",
    "customer",
    "customer_creation",
    "customer_email",
    "success_url",
    "cancel_url",
    "expires_at",
    "locale",
    "submit_type",
    "payment_method_types",
    "payment_intent_data.description",
    "payment_intent_data.metadata",
    "payment_intent_data.receipt_email",
    "payment_intent_data.statement_descriptor_suffix",
    "payment_intent_data.transfer_group",
    platform_only=True,
)
def create_session(world: World, params: dict[str, Any]) -> Body:
    if params.get("mode") != "payment":
        raise StripeError("The local Stripe plays only mode=payment.", param="mode")
    if not set(params.get("payment_method_types", ["card"])) <= {"card", "us_bank_account"}:
        raise StripeError("The local Stripe takes cards and US bank accounts.", param="payment_method_types")
    if "customer" in params:
        world.get("customer", params["customer"], param="customer")
    if "success_url" not in params:
        raise StripeError("Missing required param: success_url.", code="parameter_missing", param="success_url")
    if not params.get("line_items"):
        raise StripeError("Missing required param: line_items.", code="parameter_missing", param="line_items")
    lives = params.get("expires_at", world.now + objects.SESSION_LIVES) - world.now
    if not 30 * 60 <= lives <= objects.SESSION_LIVES:
        raise StripeError("expires_at must lie between 30 minutes and 24 hours from now.", param="expires_at")
    items = []
    for number, item in enumerate(params["line_items"]):
        price = item.get("price_data", {})
        for needed in ("unit_amount", "product_data"):
            if needed not in price:
                name = f"line_items[{number}][price_data][{needed}]"
                raise StripeError(f"Missing required param: {name}.", code="parameter_missing", param=name)
        name = f"line_items[{number}]"
        price["currency"] = known_currency(price["currency"], param=f"{name}[price_data][currency]")
        if price["unit_amount"] < 0 or item.get("quantity", 1) < 1:
            raise StripeError("Amounts cannot be negative, quantities are 1 or more.", param=name)
        items.append(objects.line_item(item, now=world.now))
    currencies = {item["currency"] for item in items} | ({params["currency"]} if "currency" in params else set())
    if len(currencies) != 1:
        raise StripeError("All line items of a session have one currency.", param="line_items")
    (currency,) = currencies
    if "us_bank_account" in params.get("payment_method_types", []) and currency != "usd":
        raise StripeError(
            f"The payment method `us_bank_account` is in usd, not in {currency}.", param="payment_method_types"
        )
    body = objects.checkout_session(params, now=world.now, base_url=world.base_url, currency=currency, items=items)
    if body["amount_total"] < SMALLEST_CHARGE[currency]:
        raise StripeError(
            f"The Checkout Session's total amount due must add up to at least {SMALLEST_CHARGE[currency]} {currency} "
            "in minor units.",
            code="amount_too_small",
        )
    if body["amount_total"] > LARGEST_CHARGE:
        raise StripeError(f"The total must be at most {LARGEST_CHARGE} in minor units.", code="amount_too_large")
    world.add(body)
    store.schedule(world.db, due_at=body["expires_at"], task="expiry", target=body["id"])
    return body


@endpoint(
    "GET", "/v1/checkout/sessions", "customer", "payment_intent", "status", "created", *PAGING, platform_only=True
)
def list_sessions(world: World, params: dict[str, Any]) -> Body:
    filters = equal(params, "customer", "payment_intent", "status")
    return world.listed("checkout.session", "/v1/checkout/sessions", params, filters=filters)


@endpoint("GET", "/v1/checkout/sessions/{session}", platform_only=True)
def get_session(world: World, params: dict[str, Any], session: str) -> Body:
    return world.get("checkout.session", session, param="session")


@endpoint("POST", "/v1/checkout/sessions/{session}/expire", platform_only=True)
def expire_session(world: World, params: dict[str, Any], session: str) -> Body:
    body = world.get("checkout.session", session, param="session")
    if body["status"] != "open":
        raise StripeError(
            f'Only Checkout Sessions with a status in ["open"] can be expired. This one is {body["status"]}.'
        )
    funds.expire_session(world, body)
    return body


@endpoint("GET", "/v1/checkout/sessions/{session}/line_items", *PAGING, platform_only=True)
def list_line_items(world: World, params: dict[str, Any], session: str) -> Body:
    body = line_items(world.get("checkout.session", session, param="session"))
    ids = [item["id"] for item in body["data"]]
    for name in ("starting_after", "ending_before"):
        if name in params and params[name] not in ids:
            raise missing("item", params[name], param=name)
    # A session's items read from first to last, unlike every other list.
    first = ids.index(params["starting_after"]) + 1 if "starting_after" in params else 0
    last = ids.index(params["ending_before"]) if "ending_before" in params else len(ids)
    limit = params.get("limit", 10)
    chosen = body["data"][first:last]
    return {**body, "data": chosen[:limit], "has_more": len(chosen) > limit}


# Payments, as they are seen afterwards


@endpoint("GET", "/v1/payment_intents", "customer", "created", *PAGING)
def list_intents(world: World, params: dict[str, Any]) -> Body:
    return world.listed("payment_intent", "/v1/payment_intents", params, filters=equal(params, "customer"))


@endpoint("GET", "/v1/payment_intents/{intent}")
def get_intent(world: World, params: dict[str, Any], intent: str) -> Body:
    return world.get("payment_intent", intent, param="intent")


@endpoint("GET", "/v1/charges", "customer", "payment_intent", "transfer_group", "created", *PAGING)
def list_charges(world: World, params: dict[str, Any]) -> Body:
    filters = equal(params, "customer", "payment_intent", "transfer_group")
    return world.listed("charge", "/v1/charges", params, filters=filters)


@endpoint("GET", "/v1/charges/{charge}")
def get_charge(world: World, params: dict[str, Any], charge: str) -> Body:
    return world.get("charge", charge)


@endpoint("GET", "/v1/balance")
def get_balance(world: World, params: dict[str, Any]) -> Body:
    return funds.balance(world)


@endpoint("GET", "/v1/balance_transactions", "type", "source", "currency", "payout", "created", *PAGING)
def list_balance_transactions(world: World, params: dict[str, Any]) -> Body:
    filters = equal(params, "type", "source", "currency")
    if "payout" in params:
        filters.append(("_payout", "=", world.get("payout", params["payout"], param="payout")["id"]))
    return world.listed("balance_transaction", "/v1/balance_transactions", params, filters=filters)


@endpoint("GET", "/v1/balance_transactions/{id}")
def get_balance_transaction(world: World, params: dict[str, Any], id: str) -> Body:
    return world.get("balance_transaction", id)


@endpoint("GET", "/v1/country_specs/{country}")
def get_country_spec(world: World, params: dict[str, Any], country: str) -> Body:
    if country not in objects.SERVED_COUNTRIES:
        raise missing("country", country)
    return objects.country_spec(country)


# Refunds and disputes


@endpoint("POST", "/v1/refunds", "charge", "payment_intent", "amount", "reason", "metadata", platform_only=True)
def create_refund(world: World, params: dict[str, Any]) -> Body:
    if ("charge" in params) == ("payment_intent" in params):
        raise StripeError("One of the following params should be provided: payment_intent or charge.", param="charge")
    if "payment_intent" in params:
        intent = world.get("payment_intent", params["payment_intent"], param="payment_intent")
        if intent["latest_charge"] is None:
            raise StripeError("This PaymentIntent does not have a successful charge to refund.", param="payment_intent")
        params["charge"] = intent["latest_charge"]
    charge = world.get("charge", params["charge"], param="charge")
    given = {name: params.get(name) for name in ("amount", "reason", "metadata")}
    return funds.make_refund(world, charge, **given)


@endpoint("GET", "/v1/refunds", "charge", "payment_intent", "created", *PAGING)
def list_refunds(world: World, params: dict[str, Any]) -> Body:
    return world.listed("refund", "/v1/refunds", params, filters=equal(params, "charge", "payment_intent"))


@endpoint("GET", "/v1/refunds/{refund}")
def get_refund(world: World, params: dict[str, Any], refund: str) -> Body:
    return world.get("refund", refund)


@endpoint("POST", "/v1/refunds/{refund}", "metadata", platform_only=True)
def update_refund(world: World, params: dict[str, Any], refund: str) -> Body:
    body = world.get("refund", refund)
    previous = merged(body, params, "metadata")
    if previous:
        world.save(body)
        world.emit("refund.updated", body, previous=previous)
    return body


@endpoint("GET", "/v1/disputes", "charge", "payment_intent", "created", *PAGING, platform_only=True)
def list_disputes(world: World, params: dict[str, Any]) -> Body:
    return world.listed("dispute", "/v1/disputes", params, filters=equal(params, "charge", "payment_intent"))


@endpoint("GET", "/v1/disputes/{dispute}", platform_only=True)
def get_dispute(world: World, params: dict[str, Any], dispute: str) -> Body:
    return world.get("dispute", dispute)


@endpoint(
    "POST",
    "/v1/disputes/{dispute}",
    *(f"evidence.{name}" for name in objects.EVIDENCE_TEXTS),
    "submit",
    "metadata",
    platform_only=True,
)
def update_dispute(world: World, params: dict[str, Any], dispute: str) -> Body:
    body = world.get("dispute", dispute)
    if merged(body, params, "metadata"):
        world.save(body)
    if "evidence" in params or params.get("submit"):
        funds.answer_dispute(world, body, params.get("evidence") or {}, submit=params.get("submit", True))
    return body


@endpoint("POST", "/v1/disputes/{dispute}/close", platform_only=True)
def close_dispute(world: World, params: dict[str, Any], dispute: str) -> Body:
    body = world.get("dispute", dispute)
    if funds.is_closed(body):
        raise StripeError("This dispute is already closed.", code="dispute_closed")
    funds.decide_dispute(world, body, "lost")
    return body


# Connected accounts

CONTROLLER_TYPES = {
    "standard": {},
    "express": {
        "fees": {"payer": "application"},
        "losses": {"payments": "application"},
        "stripe_dashboard": {"type": "express"},
    },
}


@endpoint(
    "POST",
    "/v1/accounts",
    "type",
    "controller",
    "country",
    "email",
    "business_type",
    "default_currency",
    "capabilities.transfers",
    "capabilities.card_payments",
    "business_profile.name",
    "business_profile.url",
    "business_profile.product_description",
    "settings.payouts.schedule.interval",
    "tos_acceptance.service_agreement",
    "metadata",
    platform_only=True,
)
def create_account(world: World, params: dict[str, Any]) -> Body:
    if (country := params.get("country", "US")) not in objects.SERVED_COUNTRIES:
        what = "is not currently supported by Stripe" if re.fullmatch("[A-Z]{2}", country) else "is unknown"
        raise StripeError(f"Country '{country}' {what}.", code="country_unsupported", param="country")
    if "type" in params:
        if "controller" in params:
            raise StripeError("You may not specify both `type` and `controller`.", param="type")
        if params["type"] not in CONTROLLER_TYPES:
            raise StripeError("The local Stripe onboards people on its own pages only.", param="type")
        params["controller"] = CONTROLLER_TYPES[params["type"]]
    if params.get("controller", {}).get("requirement_collection") == "application":
        name = "controller[requirement_collection]"
        raise StripeError("The local Stripe onboards people on its own pages only.", param=name)
    if params.get("settings", {}).get("payouts", {}).get("schedule", {}).get("interval", "daily") not in (
        "daily",
        "manual",
    ):
        name = "settings[payouts][schedule][interval]"
        raise StripeError("The local Stripe pays out daily or by hand.", param=name)
    if "default_currency" in params:
        params["default_currency"] = known_currency(params["default_currency"], param="default_currency")
    # An account is the platform's object, and has a balance of its own under its id.
    return world.add(objects.account(params, now=world.now), account=PLATFORM)


@endpoint("GET", "/v1/accounts", "created", *PAGING, platform_only=True)
def list_accounts(world: World, params: dict[str, Any]) -> Body:
    return world.listed("account", "/v1/accounts", params)


@endpoint("GET", "/v1/accounts/{account}")
def get_account(world: World, params: dict[str, Any], account: str) -> Body:
    body = store.find(world.db, "account", account, account=PLATFORM)
    if body is None or world.account not in (PLATFORM, account):
        raise no_access(account)
    return body


@endpoint("POST", "/v1/accounts/{account}", "email", "metadata", platform_only=True)
def update_account(world: World, params: dict[str, Any], account: str) -> Body:
    body = get_account(world, params, account)
    previous = merged(body, params, "email", "metadata")
    if previous:
        world.save(body)
        world.emit("account.updated", body, account=account, previous=previous)
    return body


def no_access(account: str) -> StripeError:
    return StripeError(
        f"The provided key does not have access to account '{account}' (or that account does not exist). Application "
        "access may have been revoked.",
        status=403,
        code="account_invalid",
        remembered=False,
    )


@endpoint(
    "POST",
    "/v1/account_links",
    "account",
    "type",
    "return_url",
    "refresh_url",
    "collect",
    "collection_options",
    platform_only=True,
)
def create_account_link(world: World, params: dict[str, Any]) -> Body:
    account = get_account(world, params, params["account"])
    if params["type"] != "account_onboarding":
        raise StripeError("The local Stripe plays only type=account_onboarding.", param="type")
    for name in ("return_url", "refresh_url"):
        if name not in params:
            raise StripeError(f"Missing required param: {name}.", code="parameter_missing", param=name)
    token = new_id("link", 32)
    link = {
        "id": token,
        "object": "account_link",
        "created": world.now,
        "expires_at": world.now + objects.LINK_LIVES,
        "url": f"{world.base_url}/setup/e/{account['id']}/{token}",
        "_account": account["id"],
        "_return_url": params["return_url"],
        "_refresh_url": params["refresh_url"],
        "_used": False,
    }
    world.add(link)
    shown = public(link)
    del shown["id"]  # Stripe's links have none
    return shown


# Money leaving


@endpoint(
    "POST",
    "/v1/transfers",
    "amount",
    "currency",
    "destination",
    "description",
    "metadata",
    "transfer_group",
    platform_only=True,
)
def create_transfer(world: World, params: dict[str, Any]) -> Body:
    if "amount" not in params:
        raise StripeError("Missing required param: amount.", code="parameter_missing", param="amount")
    return funds.make_transfer(world, params)


@endpoint("GET", "/v1/transfers", "destination", "transfer_group", "created", *PAGING, platform_only=True)
def list_transfers(world: World, params: dict[str, Any]) -> Body:
    filters = equal(params, "destination", "transfer_group")
    return world.listed("transfer", "/v1/transfers", params, filters=filters)


@endpoint("GET", "/v1/transfers/{transfer}", platform_only=True)
def get_transfer(world: World, params: dict[str, Any], transfer: str) -> Body:
    return world.get("transfer", transfer)


@endpoint("POST", "/v1/transfers/{transfer}", "description", "metadata", platform_only=True)
def update_transfer(world: World, params: dict[str, Any], transfer: str) -> Body:
    body = world.get("transfer", transfer)
    previous = merged(body, params, "description", "metadata")
    if previous:
        world.save(body)
        world.emit("transfer.updated", body, previous=previous)
    return body


@endpoint("POST", "/v1/transfers/{id}/reversals", "amount", "metadata", platform_only=True)
def create_reversal(world: World, params: dict[str, Any], id: str) -> Body:
    transfer = world.get("transfer", id)
    return funds.reverse_transfer(world, transfer, amount=params.get("amount"), metadata=params.get("metadata"))


@endpoint("GET", "/v1/transfers/{id}/reversals", *PAGING, platform_only=True)
def list_reversals(world: World, params: dict[str, Any], id: str) -> Body:
    transfer = world.get("transfer", id)
    url = f"/v1/transfers/{id}/reversals"
    return world.listed("transfer_reversal", url, params, filters=[("transfer", "=", transfer["id"])])


@endpoint("GET", "/v1/transfers/{transfer}/reversals/{id}", platform_only=True)
def get_reversal(world: World, params: dict[str, Any], transfer: str, id: str) -> Body:
    body = world.get("transfer_reversal", id)
    if body["transfer"] != transfer:
        raise missing("transfer_reversal", id)
    return body


@endpoint("POST", "/v1/payouts", "amount", "currency", "description", "metadata", "statement_descriptor")
def create_payout(world: World, params: dict[str, Any]) -> Body:
    account = None
    if world.account != PLATFORM:
        account = world.get("account", world.account, account=PLATFORM)
        if not account["payouts_enabled"]:
            raise StripeError("This account cannot be paid out yet.", code="payouts_not_allowed")
        if account["settings"]["payouts"]["schedule"]["interval"] != "manual":
            raise StripeError("The local Stripe pays this account out automatically.", code="payouts_not_allowed")
    funds.require_available(world, amount=params["amount"], currency=params["currency"])
    given = {name: params.get(name) for name in ("description", "metadata", "statement_descriptor")}
    return funds.make_payout(
        world, account=account, amount=params["amount"], currency=params["currency"], automatic=False, **given
    )


@endpoint("GET", "/v1/payouts", "status", "destination", "arrival_date", "created", *PAGING)
def list_payouts(world: World, params: dict[str, Any]) -> Body:
    return world.listed("payout", "/v1/payouts", params, filters=equal(params, "status", "destination"))


@endpoint("GET", "/v1/payouts/{payout}")
def get_payout(world: World, params: dict[str, Any], payout: str) -> Body:
    return world.get("payout", payout)


# Events and who hears of them


@endpoint("GET", "/v1/events", "type", "types", "created", *PAGING)
def list_events(world: World, params: dict[str, Any]) -> Body:
    if "type" in params and "types" in params:
        raise StripeError("You may only specify one of these parameters: type, types.", param="types")
    filters = equal(params, "type")
    if "types" in params:
        filters.append(("type", "in", params["types"]))
    return world.listed("event", "/v1/events", params, filters=filters)


@endpoint("GET", "/v1/events/{id}")
def get_event(world: World, params: dict[str, Any], id: str) -> Body:
    return world.get("event", id)


@endpoint(
    "POST", "/v1/webhook_endpoints", "url", "enabled_events", "connect", "description", "metadata", platform_only=True
)
def create_webhook_endpoint(world: World, params: dict[str, Any]) -> Body:
    if not params["enabled_events"]:
        raise StripeError("enabled_events names at least one event, or `*`.", param="enabled_events")
    body = world.add(objects.webhook_endpoint(params, now=world.now))
    return {**body, "secret": body["_secret"]}  # told once, here


@endpoint("GET", "/v1/webhook_endpoints", *PAGING, platform_only=True)
def list_webhook_endpoints(world: World, params: dict[str, Any]) -> Body:
    return world.listed("webhook_endpoint", "/v1/webhook_endpoints", params)


@endpoint("GET", "/v1/webhook_endpoints/{webhook_endpoint}", platform_only=True)
def get_webhook_endpoint(world: World, params: dict[str, Any], webhook_endpoint: str) -> Body:
    return world.get("webhook_endpoint", webhook_endpoint, param="webhook_endpoint")


@endpoint(
    "POST",
    "/v1/webhook_endpoints/{webhook_endpoint}",
    "url",
    "enabled_events",
    "disabled",
    "description",
    "metadata",
    platform_only=True,
)
def update_webhook_endpoint(world: World, params: dict[str, Any], webhook_endpoint: str) -> Body:
    body = world.get("webhook_endpoint", webhook_endpoint, param="webhook_endpoint")
    merged(body, params, "url", "enabled_events", "description", "metadata")
    if "disabled" in params:
        body["status"] = "disabled" if params["disabled"] else "enabled"
    return world.save(body)


@endpoint("DELETE", "/v1/webhook_endpoints/{webhook_endpoint}", platform_only=True)
def delete_webhook_endpoint(world: World, params: dict[str, Any], webhook_endpoint: str) -> Body:
    world.get("webhook_endpoint", webhook_endpoint, param="webhook_endpoint")
    store.delete(world.db, webhook_endpoint)
    world.db.execute(
        "UPDATE deliveries SET state = 'abandoned', last_error = 'endpoint deleted' "
        "WHERE endpoint = ? AND state = 'pending'",
        (webhook_endpoint,),
    )
    return {"id": webhook_endpoint, "object": "webhook_endpoint", "deleted": True}
