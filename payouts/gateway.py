"""The official SDK behind one small door: every call to Stripe is here.

Amounts are integers in minor units, currencies are upper case, as everywhere else in the project; no object of the SDK gets out.

What goes wrong is one of two things, and the rules for payouts rest on the difference:

- `StripeRefused`: Stripe answered 4xx, so **nothing happened**. An intent may be reversed, and tried again under a new key.
- `StripeUncertain`: a time-out, a lost connection, 5xx, 409 or 429; **it may have happened**. Nothing may be reversed.
  With `http_status` None, 409 or 429, call again with the same key while Stripe remembers it (23 h to be safe).
  With `is_key_spent`, the key will only repeat this answer: look the thing up (`find_transfer`) before using a new key.
  A key that was used with other parameters (400) counts as uncertain too: the call that used it may have succeeded.

The SDK does not retry by itself: its callers are tasks that come back, and they must see every answer.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import stripe
import urllib3
from django.conf import settings

from marketplace.errors import DomainError

TIMEOUT_SECONDS = 20.0  # below gunicorn's and Celery's own limits, so that a silent Stripe ends as StripeUncertain
SIGNATURE_TOLERANCE_SECONDS = 300
REFUND_MOVEMENTS = ["balance_transaction", "failure_balance_transaction"]

stripe.enable_telemetry = (
    False  # an identifier of this machine in a file of its home, and the last call's duration in each
)


class StripeRefused(Exception):
    """Stripe said no, and did nothing.

    Args:
        code: Stripe's error code, such as "balance_insufficient"; its error type where there is none.
    """

    def __init__(self, code: str, message: str, http_status: int) -> None:
        super().__init__(f"{code} ({http_status}): {message}")
        self.code = code
        self.message = message
        self.http_status = http_status


class StripeUncertain(Exception):
    """Nobody knows whether it happened.

    Args:
        http_status: None when no answer came.
        retry_after_seconds: how long Stripe asks to wait, where it says so.
        is_key_spent: the idempotency key would only repeat this answer.
        is_replayed: this was such a repetition; the answer is an earlier call's.
    """

    def __init__(
        self,
        message: str,
        *,
        http_status: int | None,
        retry_after_seconds: float | None,
        is_key_spent: bool,
        is_replayed: bool = False,
    ) -> None:
        super().__init__(f"{message} (status {http_status})")
        self.message = message
        self.http_status = http_status
        self.retry_after_seconds = retry_after_seconds
        self.is_key_spent = is_key_spent
        self.is_replayed = is_replayed


class BadSignature(DomainError):
    """The webhook's body was not signed with our endpoint's secret, or too long ago."""

    code = "bad_signature"
    status = 400


@dataclass(frozen=True)
class CheckoutLine:
    name: str
    amount_minor: int  # of one unit
    quantity: int = 1


@dataclass(frozen=True)
class CheckoutSession:
    id: str
    url: str


@dataclass(frozen=True)
class PaidCheckout:
    """A checkout session and, once it is paid, the charge behind it.

    Stripe books a charge shortly after it succeeds: until then `balance_transaction`, `fee_minor`, `net_minor`,
    `booked_currency` and `available_on` are None although `is_paid`; ask again on `charge.updated`, or later.
    """

    id: str
    status: str  # open, complete, expired
    payment_status: str  # unpaid, paid, no_payment_required
    amount_total_minor: int
    currency: str
    order_id: str
    public_reference: str
    metadata: dict[str, str]
    payment_intent: str | None
    charge: str | None
    balance_transaction: str | None
    fee_minor: int | None
    net_minor: int | None
    booked_currency: str | None  # of fee and net: a balance that Stripe settles in may be another than was charged
    available_on: datetime | None
    intent_status: str = ""  # processing: a bank is confirming a debit; requires_payment_method: nothing was taken
    failure: str = ""  # what Stripe says of the last attempt that failed

    @property
    def is_paid(self) -> bool:
        return self.payment_status == "paid"

    @property
    def awaits_bank(self) -> bool:
        """The page is done, and the buyer's bank says only in days whether the debit goes through."""
        return self.status == "complete" and not self.is_paid and not self.has_failed

    @property
    def has_failed(self) -> bool:
        """The page is done, and its bank has refused the debit: nothing was taken, and nothing will be."""
        return (
            self.status == "complete"
            and not self.is_paid
            and self.intent_status in ("requires_payment_method", "canceled")
        )


@dataclass(frozen=True)
class PayeeAccountState:
    id: str
    details_submitted: bool
    payouts_enabled: bool
    transfers_active: bool
    requirements: list[str]
    disabled_reason: str | None

    @property
    def can_be_paid(self) -> bool:
        return self.transfers_active and self.payouts_enabled


@dataclass(frozen=True)
class Transfer:
    id: str
    amount_minor: int
    currency: str
    destination: str
    transfer_group: str
    destination_payment: str
    balance_transaction: str | None
    reversed_minor: int
    created_at: datetime
    metadata: dict[str, str]


@dataclass(frozen=True)
class BankPayout:
    """Money on its way from a connected account to its bank."""

    id: str
    status: str  # pending, in_transit, paid, failed, canceled
    failure_code: str  # account_closed, no_account, …; "" unless it failed


@dataclass(frozen=True)
class BalanceTransaction:
    """One movement of the platform's Stripe balance; `amount_minor` and `net_minor` are signed."""

    id: str
    kind: str  # charge, transfer, payout, stripe_fee, …
    source: str | None
    amount_minor: int
    fee_minor: int
    net_minor: int
    currency: str
    is_available: bool
    available_on: datetime
    created_at: datetime


@dataclass(frozen=True)
class Charge:
    """What was taken from a buyer, whatever for; `booked` is None until Stripe has written its balance transaction."""

    id: str
    amount_minor: int
    currency: str
    is_paid: bool
    is_disputed: bool
    payment_intent: str
    booked: BalanceTransaction | None
    metadata: dict[str, str]


@dataclass(frozen=True)
class Refund:
    """A refund and the movements that it caused; they are None until Stripe has booked it."""

    id: str
    charge: str
    amount_minor: int
    currency: str
    status: str  # pending, requires_action, succeeded, failed, canceled
    taken: BalanceTransaction | None  # from our balance
    returned: BalanceTransaction | None  # to our balance, after it failed
    failure_reason: str
    created_at: datetime
    metadata: dict[str, str]

    @property
    def has_failed(self) -> bool:
        return self.status in ("failed", "canceled")


@dataclass(frozen=True)
class Reversal:
    """A part of a transfer that came back from the payee's balance."""

    id: str
    transfer: str
    amount_minor: int
    currency: str
    taken: BalanceTransaction | None
    metadata: dict[str, str]


@dataclass(frozen=True)
class Dispute:
    """A cardholder's complaint, as Stripe sees it now."""

    id: str
    charge: str
    amount_minor: int
    currency: str
    reason: str
    status: str  # Stripe's: needs_response, under_review, won, lost, and warning_… for inquiries
    opened_at: datetime
    evidence_due_at: datetime | None
    movements: list[BalanceTransaction]  # withdrawn, reinstated


@dataclass(frozen=True)
class Event:
    """A verified webhook; `data` is the object it is about, as Stripe's JSON."""

    id: str
    type: str
    account: str | None  # the connected account that it comes from; None: our own
    created_at: datetime
    data: dict[str, Any]


def create_checkout(
    *,
    order_id: str,
    public_reference: str,
    lines: Sequence[CheckoutLine],
    currency: str,
    success_url: str,
    cancel_url: str,
    key: str,
    metadata: Mapping[str, str] | None = None,
    customer_email: str | None = None,
) -> CheckoutSession:
    """Open a hosted payment page for an order. `{CHECKOUT_SESSION_ID}` in `success_url` is filled in by Stripe.

    Raises:
        StripeRefused, StripeUncertain: see the module.
    """
    marks = {**(metadata or {}), "order": order_id, "reference": public_reference}
    params: dict[str, Any] = {
        "mode": "payment",
        "line_items": [
            {
                "quantity": line.quantity,
                "price_data": {
                    "currency": currency.lower(),
                    "unit_amount": line.amount_minor,
                    "product_data": {"name": line.name},
                },
            }
            for line in lines
        ],
        "client_reference_id": public_reference,
        "metadata": marks,
        # The charge carries the same marks: whoever reads it in Stripe's dashboard finds the order.
        "payment_intent_data": {"metadata": marks, "transfer_group": f"order:{order_id}"},
        "success_url": success_url,
        "cancel_url": cancel_url,
    }
    if customer_email:
        params["customer_email"] = customer_email
    with _translated():
        session = _client().v1.checkout.sessions.create(params, {"idempotency_key": key})  # type: ignore[arg-type]
    assert session.url is not None  # a hosted session that is open has one
    return CheckoutSession(id=session.id, url=session.url)


def get_checkout(session_id: str) -> PaidCheckout:
    """Fetch a session with its charge and that charge's fee.

    Raises:
        StripeRefused, StripeUncertain: see the module.
    """
    path = "payment_intent.latest_charge.balance_transaction"
    with _translated():
        session = _client().v1.checkout.sessions.retrieve(session_id, {"expand": [path]})
    body = _plain(session)
    intent = body["payment_intent"] or {}
    charge = intent.get("latest_charge") or {}
    is_charged = charge.get("status") == "succeeded"  # the latest attempt may have been declined
    booked = (charge.get("balance_transaction") or {}) if is_charged else {}
    metadata = body["metadata"] or {}
    return PaidCheckout(
        id=body["id"],
        status=body["status"],
        payment_status=body["payment_status"],
        amount_total_minor=body["amount_total"],
        currency=body["currency"].upper(),
        order_id=metadata.get("order", ""),
        public_reference=body["client_reference_id"] or "",
        metadata=metadata,
        payment_intent=intent.get("id"),
        intent_status=intent.get("status") or "",
        failure=(intent.get("last_payment_error") or {}).get("message") or "",
        charge=charge["id"] if is_charged else None,
        balance_transaction=booked.get("id"),
        fee_minor=booked.get("fee"),
        net_minor=booked.get("net"),
        booked_currency=booked["currency"].upper() if booked else None,
        available_on=_moment(booked["available_on"]) if booked else None,
    )


def expire_checkout(session_id: str) -> None:
    """Close a page that is open, so that nobody pays there any more.

    Raises:
        StripeRefused: it is not open: paid a moment ago, or expired by itself.
        StripeUncertain: see the module.
    """
    with _translated():
        _client().v1.checkout.sessions.expire(session_id)


def create_payee_account(*, party_id: str, country: str, email: str, key: str) -> str:
    """Open a connected account that can only receive transfers; its owner completes it on Stripe's own pages.

    The platform bears fees and losses, Stripe collects what the law asks of the payee. Returns the account's id.

    Raises:
        StripeRefused: `country_unsupported` where Stripe does not reach the payee.
        StripeUncertain: see the module.
    """
    params: dict[str, Any] = {
        "country": country,
        "email": email,
        "controller": {
            "fees": {"payer": "application"},
            "losses": {"payments": "application"},
            "requirement_collection": "stripe",
            "stripe_dashboard": {"type": "express"},
        },
        "capabilities": {"transfers": {"requested": True}},
        "metadata": {"party": party_id},
    }
    if country != settings.STRIPE_PLATFORM_COUNTRY:
        # Across a border Stripe pays a payee only under its agreement for recipients, and at home only without it.
        params["tos_acceptance"] = {"service_agreement": "recipient"}
    with _translated():
        account = _client().v1.accounts.create(params, {"idempotency_key": key})  # type: ignore[arg-type]
    return account.id


def create_onboarding_link(*, account: str, return_url: str, refresh_url: str) -> str:
    """A link to Stripe's onboarding page, for the payee who just asked for it: it works once and for minutes.

    Raises:
        StripeRefused, StripeUncertain: see the module.
    """
    with _translated():
        link = _client().v1.account_links.create(
            {
                "account": account,
                "type": "account_onboarding",
                "return_url": return_url,
                "refresh_url": refresh_url,
                "collection_options": {"fields": "eventually_due"},
            }
        )
    return link.url


def transfer_countries(country: str) -> list[str]:
    """The countries whose payees a platform in `country` can transfer to, as Stripe says now.

    Raises:
        StripeRefused, StripeUncertain: see the module.
    """
    with _translated():
        return [str(code) for code in _client().v1.country_specs.retrieve(country).supported_transfer_countries]


def get_account(account: str) -> PayeeAccountState:
    """What Stripe knows and lacks of a payee.

    Raises:
        StripeRefused, StripeUncertain: see the module.
    """
    with _translated():
        body = _plain(_client().v1.accounts.retrieve(account))
    return account_state(body)


def account_state(body: Mapping[str, Any]) -> PayeeAccountState:
    """The same, from the `data` of an `account.updated` event."""
    requirements = body.get("requirements") or {}
    return PayeeAccountState(
        id=body["id"],
        details_submitted=bool(body.get("details_submitted")),
        payouts_enabled=bool(body.get("payouts_enabled")),
        transfers_active=(body.get("capabilities") or {}).get("transfers") == "active",
        requirements=list(requirements.get("currently_due") or []),
        disabled_reason=requirements.get("disabled_reason"),
    )


def create_transfer(
    *,
    amount_minor: int,
    currency: str,
    destination: str,
    transfer_group: str,
    key: str,
    metadata: Mapping[str, str] | None = None,
) -> Transfer:
    """Send available funds to a payee's account.

    Raises:
        StripeRefused: nothing was sent; `balance_insufficient` when the platform's available funds do not suffice.
        StripeUncertain: it may have been sent; see the module.
    """
    params: dict[str, Any] = {
        "amount": amount_minor,
        "currency": currency.lower(),
        "destination": destination,
        "transfer_group": transfer_group,
        "metadata": dict(metadata or {}),
    }
    with _translated():
        # The SDK's raw form: what its objects cost would be a third of a call, and a run of payouts makes very many.
        answer = _client().raw_request("post", "/v1/transfers", idempotency_key=key, **params)
    return _transfer(answer.data)


def find_transfer(transfer_group: str) -> Transfer | None:
    """The one transfer of a group, if it was made.

    Raises:
        StripeRefused, StripeUncertain: see the module.
    """
    with _translated():
        found = _client().v1.transfers.list({"transfer_group": transfer_group, "limit": 2}).data
    # Two would mean that somebody was paid twice; no code path may go on from there.
    assert len(found) <= 1, f"{len(found)} transfers in group {transfer_group}"
    return _transfer(_plain(found[0])) if found else None


def create_refund(
    *, charge: str, amount_minor: int, reason: str, key: str, metadata: Mapping[str, str] | None = None
) -> Refund:
    """Give part or all of a charge back to the card.

    Args:
        reason: Stripe's: duplicate, fraudulent or requested_by_customer.

    Raises:
        StripeRefused: nothing was refunded; `charge_already_refunded`, `charge_disputed`, `balance_insufficient`, …
        StripeUncertain: it may have been; see the module.
    """
    params: dict[str, Any] = {
        "charge": charge,
        "amount": amount_minor,
        "reason": reason,
        "metadata": dict(metadata or {}),
        "expand": ["balance_transaction"],
    }
    with _translated():
        body = _plain(_client().v1.refunds.create(params, {"idempotency_key": key}))  # type: ignore[arg-type]
    return _refund(body)


def get_refund(refund: str) -> Refund:
    """A refund as it stands now.

    Raises:
        StripeRefused, StripeUncertain: see the module.
    """
    with _translated():
        body = _plain(_client().v1.refunds.retrieve(refund, {"expand": REFUND_MOVEMENTS}))
    return _refund(body)


def find_refund(*, charge: str, mark: str) -> Refund | None:
    """The refund of a charge whose metadata says `refund: mark`, if it was made.

    Raises:
        StripeRefused, StripeUncertain: see the module.
    """
    marked = [refund for refund in refunds_of(charge) if refund.metadata.get("refund") == mark]
    assert len(marked) <= 1, f"{len(marked)} refunds of {charge} are marked {mark}"
    return marked[0] if marked else None


def refunds_of(charge: str) -> Iterator[Refund]:
    """Every refund of a charge, newest first.

    Raises:
        StripeRefused, StripeUncertain: see the module; also in the middle of the iteration.
    """
    expand = [f"data.{name}" for name in REFUND_MOVEMENTS]
    with _translated():
        listed = _client().v1.refunds.list({"charge": charge, "limit": 100, "expand": expand})
        for refund in listed.auto_paging_iter():
            yield _refund(_plain(refund))


def refunds_since(moment: datetime) -> Iterator[Refund]:
    """Every refund of our charges made after a moment, newest first.

    Raises:
        StripeRefused, StripeUncertain: see the module; also in the middle of the iteration.
    """
    expand = [f"data.{name}" for name in REFUND_MOVEMENTS]
    with _translated():
        listed = _client().v1.refunds.list(
            {"created": {"gte": int(moment.timestamp())}, "limit": 100, "expand": expand}
        )
        for refund in listed.auto_paging_iter():
            yield _refund(_plain(refund))


def create_reversal(
    *, transfer: str, amount_minor: int, key: str, metadata: Mapping[str, str] | None = None
) -> Reversal:
    """Take part of a transfer back out of the payee's balance at Stripe.

    Raises:
        StripeRefused: nothing came back; `balance_insufficient` when the payee no longer has it there.
        StripeUncertain: it may have; see the module.
    """
    params: dict[str, Any] = {
        "amount": amount_minor,
        "metadata": dict(metadata or {}),
        "expand": ["balance_transaction"],
    }
    with _translated():
        made = _client().v1.transfers.reversals.create(transfer, params, {"idempotency_key": key})  # type: ignore[arg-type]
    return _reversal(_plain(made))


def find_reversal(*, transfer: str, mark: str) -> Reversal | None:
    """The reversal of a transfer whose metadata says `reversal: mark`, if it was made.

    Raises:
        StripeRefused, StripeUncertain: see the module.
    """
    with _translated():
        listed = _client().v1.transfers.reversals.list(transfer, {"limit": 100, "expand": ["data.balance_transaction"]})
        found = [_plain(reversal) for reversal in listed.auto_paging_iter()]
    marked = [body for body in found if (body["metadata"] or {}).get("reversal") == mark]
    assert len(marked) <= 1, f"{len(marked)} reversals of {transfer} are marked {mark}"
    return _reversal(marked[0]) if marked else None


def get_dispute(dispute: str) -> Dispute:
    """A dispute as it stands now, with the movements that it has caused so far.

    Raises:
        StripeRefused, StripeUncertain: see the module.
    """
    with _translated():
        body = _plain(_client().v1.disputes.retrieve(dispute))
    return _dispute(body)


def disputes_since(moment: datetime) -> Iterator[Dispute]:
    """Every dispute of our charges opened after a moment, newest first.

    Raises:
        StripeRefused, StripeUncertain: see the module; also in the middle of the iteration.
    """
    with _translated():
        listed = _client().v1.disputes.list({"created": {"gte": int(moment.timestamp())}, "limit": 100})
        for dispute in listed.auto_paging_iter():
            yield _dispute(_plain(dispute))


def submit_evidence(*, dispute: str, evidence: Mapping[str, str], key: str) -> Dispute:
    """Hand the evidence to the cardholder's bank; it is taken once.

    Raises:
        StripeRefused: the dispute takes none any more.
        StripeUncertain: it may have been handed over; see the module.
    """
    params: dict[str, Any] = {"evidence": dict(evidence), "submit": True}
    with _translated():
        body = _plain(_client().v1.disputes.update(dispute, params, {"idempotency_key": key}))  # type: ignore[arg-type]
    return _dispute(body)


def accept_dispute(*, dispute: str, key: str) -> Dispute:
    """Give in: the dispute is lost at once.

    Raises:
        StripeRefused: it is closed already.
        StripeUncertain: see the module.
    """
    with _translated():
        body = _plain(_client().v1.disputes.close(dispute, {}, {"idempotency_key": key}))
    return _dispute(body)


def get_charge(charge: str) -> Charge:
    """A charge as it stands now, with the movement that it caused.

    Raises:
        StripeRefused, StripeUncertain: see the module.
    """
    with _translated():
        body = _plain(_client().v1.charges.retrieve(charge, {"expand": ["balance_transaction"]}))
    return Charge(
        id=body["id"],
        amount_minor=body["amount"],
        currency=body["currency"].upper(),
        is_paid=body["status"] == "succeeded",
        is_disputed=bool(body["disputed"]),
        payment_intent=body["payment_intent"] or body["id"],
        booked=_expanded(body["balance_transaction"]),
        metadata=dict(body["metadata"] or {}),
    )


def charge_marks(charge: str) -> dict[str, str]:
    """The metadata of a charge: `payment` names what it is for.

    Raises:
        StripeRefused, StripeUncertain: see the module.
    """
    with _translated():
        body = _plain(_client().v1.charges.retrieve(charge))
    return dict(body["metadata"] or {})


def transfers_in_payout(*, account: str, payout: str) -> list[str]:
    """The transfers that one automatic payout of a connected account carried to its bank, by id.

    Of a payout that a bank has sent back, the money goes out again with a later one: it counts there.

    Raises:
        StripeRefused, StripeUncertain: see the module.
    """
    carried: list[str] = []
    looked_at: set[str] = set()
    to_look_at = [payout]
    while to_look_at:
        identifier = to_look_at.pop()
        if identifier in looked_at:
            continue
        looked_at.add(identifier)
        for kind in ("payment", "payout_failure"):
            with _translated():
                movements = _client().v1.balance_transactions.list(
                    {"payout": identifier, "type": kind, "limit": 100, "expand": ["data.source"]},
                    {"stripe_account": account},
                )
                sources = [_plain(movement)["source"] for movement in movements.auto_paging_iter()]
            if kind == "payment":
                carried += [source["source_transfer"] for source in sources if source["source_transfer"]]
            else:
                to_look_at += [source["id"] for source in sources]
    return carried


def get_bank_payout(*, account: str, payout: str) -> BankPayout:
    """How one payout of a connected account to its bank stands now.

    Raises:
        StripeRefused, StripeUncertain: see the module.
    """
    with _translated():
        body = _plain(_client().v1.payouts.retrieve(payout, {}, {"stripe_account": account}))
    return BankPayout(id=body["id"], status=body["status"], failure_code=body["failure_code"] or "")


def balance() -> dict[str, tuple[int, int]]:
    """The platform's Stripe balance: currency → (pending, available), minor units.

    Raises:
        StripeRefused, StripeUncertain: see the module.
    """
    with _translated():
        body = _plain(_client().v1.balance.retrieve())
    held: dict[str, tuple[int, int]] = {}
    for entry in body["pending"]:
        held[entry["currency"].upper()] = (entry["amount"], 0)
    for entry in body["available"]:
        currency = entry["currency"].upper()
        held[currency] = (held.get(currency, (0, 0))[0], entry["amount"])
    return held


def newest_balance_transactions(since: datetime | None = None) -> Iterator[BalanceTransaction]:
    """Every movement of the platform's balance, newest first, a page of a hundred in memory at a time.

    What is made while it is being read comes before the first and is not in it.

    Args:
        since: by Stripe's clock; what it made earlier is left out.

    Raises:
        StripeRefused, StripeUncertain: see the module; also in the middle of the iteration.
    """
    with _translated():
        newer: dict[str, Any] = {} if since is None else {"created": {"gte": int(since.timestamp())}}
        for entry in _client().v1.balance_transactions.list({"limit": 100} | newer).auto_paging_iter():  # type: ignore[arg-type]
            yield _balance_transaction(_plain(entry))


def find_balance_transaction(identifier: str) -> BalanceTransaction | None:
    """One movement of the platform's balance; None where Stripe has none under this id.

    Raises:
        StripeRefused, StripeUncertain: see the module.
    """
    try:
        return get_balance_transaction(identifier)
    except StripeRefused as error:
        if error.http_status == 404:
            return None
        raise


def get_transfer(identifier: str) -> Transfer | None:
    """One transfer; None where Stripe has none under this id.

    Raises:
        StripeRefused, StripeUncertain: see the module.
    """
    try:
        with _translated():
            return _transfer(_plain(_client().v1.transfers.retrieve(identifier)))
    except StripeRefused as error:
        if error.http_status == 404:
            return None
        raise


def balance_transactions(since: str | None = None) -> Iterator[BalanceTransaction]:
    """Every movement of the platform's balance after the one with this id, oldest first; None: from the beginning.

    Raises:
        StripeRefused, StripeUncertain: see the module; also in the middle of the iteration.
    """
    with _translated():
        transactions = _client().v1.balance_transactions
        if since is not None:
            # Paging backwards from a cursor, the SDK yields from old to new.
            for entry in transactions.list({"ending_before": since, "limit": 100}).auto_paging_iter():
                yield _balance_transaction(_plain(entry))
        else:
            # Stripe's lists begin with the newest and know no other order, so the first reading holds them all.
            everything = list(transactions.list({"limit": 100}).auto_paging_iter())
            for entry in reversed(everything):
                yield _balance_transaction(_plain(entry))


def get_balance_transaction(identifier: str) -> BalanceTransaction:
    """One movement of the platform's balance, as it stands now.

    Raises:
        StripeRefused, StripeUncertain: see the module.
    """
    with _translated():
        body = _plain(_client().v1.balance_transactions.retrieve(identifier))
    return _balance_transaction(body)


def parse_event(payload: bytes, signature: str, secret: str) -> Event:
    """Read a webhook whose signature is right and recent.

    Raises:
        BadSignature: it is neither, or the body is not an event.
    """
    if not secret:
        raise ValueError("A webhook secret is missing; an empty one would accept what anybody signs")
    try:
        stripe.WebhookSignature.verify_header(
            payload.decode("utf-8"), signature, secret, tolerance=SIGNATURE_TOLERANCE_SECONDS
        )
        return _event(json.loads(payload))
    except stripe.SignatureVerificationError as error:
        raise BadSignature(f"The webhook's signature is wrong or too old: {error.user_message or error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise BadSignature("The webhook's body is not an event of Stripe.") from error


def events_since(moment: datetime, *, types: Sequence[str], account: str | None = None) -> Iterator[tuple[Event, str]]:
    """Every event of some types since a moment, newest first, each with its JSON. Stripe keeps events for thirty days.

    Args:
        types: at most twenty names.
        account: a connected account, which has events of its own; None: the platform's.

    Raises:
        StripeRefused, StripeUncertain: see the module; also in the middle of the iteration.
    """
    options: Any = {"stripe_account": account} if account else {}
    with _translated():
        listed = _client().v1.events.list(
            {"created": {"gte": int(moment.timestamp())}, "types": list(types), "limit": 100}, options
        )
        for event in listed.auto_paging_iter():
            body = _plain(event) | ({"account": account} if account else {})
            yield _event(body), json.dumps(body, default=str)


class _Transport(stripe.HTTPClient):
    """The SDK's HTTP over urllib3, which its own `RequestsClient` uses beneath `requests`, at less than half of the CPU time.

    A connection stays open from call to call, also from one thread's to another's. The environment's proxies are looked up
    once per host, not at every call. Nothing is repeated, and no redirect is followed.
    """

    name = "urllib3"

    def __init__(self, *, timeout_seconds: float) -> None:
        super().__init__()
        self._timeout = urllib3.Timeout(connect=timeout_seconds, read=timeout_seconds)
        self._pools = lru_cache(maxsize=8)(self._pool_for)  # by host

    def request(  # type: ignore[override] # bytes, as the SDK's own clients give
        self, method: str, url: str, headers: Mapping[str, str] | None, post_data: Any = None, **_: Any
    ) -> tuple[bytes, int, Mapping[str, str]]:
        parts = urlsplit(url)
        try:
            answer = self._pools(parts.scheme, parts.netloc).request(
                method.upper(), url, body=post_data, headers={"Accept-Encoding": "gzip", **(headers or {})}
            )
        except urllib3.exceptions.HTTPError as error:
            raise stripe.APIConnectionError(f"No answer from Stripe: {type(error).__name__}: {error}") from error
        return answer.data, answer.status, answer.headers

    def close(self) -> None:
        self._pools.cache_clear()  # what nobody holds any more closes its connections

    def _pool_for(self, scheme: str, host: str) -> urllib3.PoolManager:
        given: dict[str, Any] = {
            "maxsize": max(settings.STRIPE_CONNECTIONS, 32),  # also a web process, by its threads
            "timeout": self._timeout,
            "retries": False,
            "ca_certs": stripe.ca_bundle_path,
            "cert_reqs": "CERT_REQUIRED",
        }
        proxy = None if proxy_bypass(host) else getproxies().get(scheme)
        if not proxy:
            return urllib3.PoolManager(**given)
        login = urllib3.util.parse_url(proxy).auth
        return urllib3.ProxyManager(
            proxy, proxy_headers=urllib3.make_headers(proxy_basic_auth=login) if login else None, **given
        )


@lru_cache(maxsize=4)
def _client_for(api_key: str, api_base: str | None) -> stripe.StripeClient:
    return stripe.StripeClient(
        api_key,
        base_addresses={"api": api_base} if api_base else {},
        http_client=_Transport(timeout_seconds=TIMEOUT_SECONDS),
        max_network_retries=0,
    )


def _client() -> stripe.StripeClient:
    return _client_for(settings.STRIPE_API_KEY, settings.STRIPE_API_BASE)


@contextmanager
def _translated() -> Iterator[None]:
    """The SDK's errors as the two that matter."""
    try:
        yield
    except stripe.StripeError as error:
        status = error.http_status
        message = error.user_message or str(error)
        is_reused_key = isinstance(error, stripe.IdempotencyError) and status != 409
        if status is not None and 400 <= status < 500 and status not in (409, 429) and not is_reused_key:
            raise StripeRefused(_code(error), message, status) from error
        raise StripeUncertain(
            message,
            http_status=status,
            retry_after_seconds=_retry_after(error),
            is_key_spent=is_reused_key or (status is not None and status not in (409, 429)),
            is_replayed=_headers(error).get("idempotent-replayed") == "true",
        ) from error


def _code(error: stripe.StripeError) -> str:
    # Some of the SDK's classes keep the code only inside the error object.
    inner = error.error
    return error.code or (inner and (inner.code or inner.type)) or "unknown"


def _headers(error: stripe.StripeError) -> dict[str, str]:
    return {name.lower(): value for name, value in (error.headers or {}).items()}


def _retry_after(error: stripe.StripeError) -> float | None:
    try:
        return float(_headers(error)["retry-after"])
    except (KeyError, ValueError):  # absent, or a date, which Stripe does not send
        return None


def _plain(thing: stripe.StripeObject) -> dict[str, Any]:
    """An SDK object as plain dictionaries and lists."""
    plain: dict[str, Any] = thing.to_dict()
    return plain


def _moment(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, tz=UTC)


def _event(body: Mapping[str, Any]) -> Event:
    return Event(
        id=body["id"],
        type=body["type"],
        account=body.get("account"),
        created_at=_moment(body["created"]),
        data=body["data"]["object"],
    )


def _transfer(body: Mapping[str, Any]) -> Transfer:
    return Transfer(
        id=body["id"],
        amount_minor=body["amount"],
        currency=body["currency"].upper(),
        destination=body["destination"],
        transfer_group=body["transfer_group"] or "",
        destination_payment=body["destination_payment"],
        balance_transaction=body["balance_transaction"],
        reversed_minor=body["amount_reversed"],
        created_at=_moment(body["created"]),
        metadata=dict(body["metadata"]),
    )


def _refund(body: Mapping[str, Any]) -> Refund:
    return Refund(
        id=body["id"],
        charge=body["charge"],
        amount_minor=body["amount"],
        currency=body["currency"].upper(),
        status=body["status"] or "",
        taken=_expanded(body.get("balance_transaction")),
        returned=_expanded(body.get("failure_balance_transaction")),
        failure_reason=body.get("failure_reason") or "",
        created_at=_moment(body["created"]),
        metadata=dict(body["metadata"] or {}),
    )


def _reversal(body: Mapping[str, Any]) -> Reversal:
    return Reversal(
        id=body["id"],
        transfer=body["transfer"],
        amount_minor=body["amount"],
        currency=body["currency"].upper(),
        taken=_expanded(body["balance_transaction"]),
        metadata=dict(body["metadata"] or {}),
    )


def _dispute(body: Mapping[str, Any]) -> Dispute:
    due_by = body["evidence_details"]["due_by"]
    return Dispute(
        id=body["id"],
        charge=body["charge"],
        amount_minor=body["amount"],
        currency=body["currency"].upper(),
        reason=body["reason"],
        status=body["status"],
        opened_at=_moment(body["created"]),
        evidence_due_at=_moment(due_by) if due_by else None,
        movements=[_balance_transaction(entry) for entry in body["balance_transactions"]],
    )


def _expanded(entry: Mapping[str, Any] | str | None) -> BalanceTransaction | None:
    """A movement that was asked for with its object; only where it was not, its id."""
    if entry is None:
        return None
    return get_balance_transaction(entry) if isinstance(entry, str) else _balance_transaction(entry)


def _balance_transaction(body: Mapping[str, Any]) -> BalanceTransaction:
    return BalanceTransaction(
        id=body["id"],
        kind=body["type"],
        source=body["source"],
        amount_minor=body["amount"],
        fee_minor=body["fee"],
        net_minor=body["net"],
        currency=body["currency"].upper(),
        is_available=body["status"] == "available",
        available_on=_moment(body["available_on"]),
        created_at=_moment(body["created"]),
    )
