"""Where the money is: fees, what is pending and what is available, transfers, and payouts to banks.

A balance is the sum of the nets of an account's balance transactions, by currency and status. Time moves money by an
agenda: each charge's funds become available, each connected account is paid out, each payout arrives, in the order of
their moments, and each happens *at* its moment however far the clock jumped.
"""

from typing import Any

from payouts.local_stripe import objects, store
from payouts.local_stripe.errors import StripeError
from payouts.local_stripe.objects import DAY
from payouts.local_stripe.store import PLATFORM, Body
from payouts.local_stripe.world import World

FEE_PER_MILLE = 29
FEE_FIXED = 30  # minor units of the charge's currency
CHARGE_PENDING_DAYS = 2


def processing_fee(amount: int) -> int:
    """2.9 % and 30 minor units, the percentage rounded half up to a whole minor unit."""
    return (amount * FEE_PER_MILLE + 500) // 1000 + FEE_FIXED


def book(world: World, source: Body, *, kind: str, amount: int, account: str, **given: Any) -> Body:
    """Write a balance transaction, point its source at it, and put its becoming available on the agenda."""
    given.setdefault("available_on", world.now)
    entry = objects.balance_transaction(
        kind=kind, source=source["id"], amount=amount, currency=source["currency"], now=world.now, **given
    )
    world.add(entry, account=account)
    if entry["status"] == "pending":
        store.schedule(world.db, due_at=entry["available_on"], task="available", target=entry["id"])
    source["balance_transaction"] = entry["id"]
    return entry


def balance(world: World) -> Body:
    """The balance object of the request's account."""
    held = store.funds(world.db, world.account)
    if not held:
        currency = "usd"
        if world.account != PLATFORM:
            currency = world.get("account", world.account, account=PLATFORM)["default_currency"]
        held = {currency: {"pending": 0, "available": 0}}

    def amounts(status: str) -> list[Body]:
        return [
            {"amount": held[currency][status], "currency": currency, "source_types": {"card": held[currency][status]}}
            for currency in sorted(held)
        ]

    return {
        "object": "balance",
        "available": amounts("available"),
        "livemode": False,
        "pending": amounts("pending"),
        "refund_and_dispute_prefunding": {"available": [], "pending": []},
    }


def require_available(world: World, *, amount: int, currency: str) -> None:
    """Refuse to spend what is not there, or only pending.

    Raises:
        StripeError: `balance_insufficient`.
    """
    if store.funds(world.db, world.account).get(currency, {}).get("available", 0) < amount:
        raise StripeError(
            f"You have insufficient available funds in your Stripe account: {amount} {currency} asked for. Funds of a "
            "charge become available some days after it; see `pending` and `available` of the balance.",
            code="balance_insufficient",
        )


def make_transfer(world: World, params: dict[str, Any]) -> Body:
    """Move available funds of the platform to a connected account, where they are available at once."""
    destination = store.find(world.db, "account", params["destination"], account=PLATFORM)
    if destination is None:
        raise StripeError(
            f"No such destination: '{params['destination']}'", code="resource_missing", param="destination"
        )
    if destination["capabilities"].get("transfers") != "active":
        raise StripeError(
            "Your destination account needs to have at least one of the following capabilities enabled: transfers, "
            "crypto_transfers, legacy_payments",
            code="insufficient_capabilities_for_transfer",
        )
    require_available(world, amount=params["amount"], currency=params["currency"])
    transfer = objects.transfer(params, now=world.now)
    payment = objects.destination_payment(transfer, now=world.now)
    transfer["destination_payment"] = payment["id"]
    book(world, transfer, kind="transfer", amount=-transfer["amount"], account=PLATFORM)
    book(world, payment, kind="payment", amount=transfer["amount"], account=destination["id"])
    world.add(transfer)
    world.add(payment, account=destination["id"])
    world.emit("transfer.created", transfer)
    plan_payout(world, destination)
    return transfer


def plan_payout(world: World, account: Body) -> None:
    """Put a connected account's next automatic payout on the agenda: the next midnight, or at once.

    An account that cannot be paid out yet is planned for when its onboarding is done.
    """
    daily = account["settings"]["payouts"]["schedule"]["interval"] != "manual"
    if daily and account["payouts_enabled"]:
        due_at = world.now if world.payout_days == 0 else (world.now // DAY + 1) * DAY
        store.schedule(world.db, due_at=due_at, task="payout", target=account["id"])


def make_payout(world: World, *, account: Body | None, amount: int, currency: str, **given: Any) -> Body:
    """Send money to the account's bank; it leaves the balance now and arrives `payout_days` later."""
    owner = account["id"] if account else PLATFORM
    destination = account["_bank"] if account else "ba_platform"
    payout = objects.payout(
        amount=amount,
        currency=currency,
        now=world.now,
        arrival=world.now + world.payout_days * DAY,
        destination=destination,
        **given,
    )
    entry = book(world, payout, kind="payout", amount=-amount, account=owner, description=payout["description"])
    world.add(payout, account=owner)
    if payout["automatic"]:
        # The payout settles everything that was available and unsettled, its own entry included.
        world.db.execute(
            """UPDATE objects SET body = json_set(body, '$._payout', ?)
               WHERE kind = 'balance_transaction' AND account = ? AND json_extract(body, '$.currency') = ?
               AND json_extract(body, '$.status') = 'available' AND json_extract(body, '$._payout') IS NULL""",
            (payout["id"], owner, currency),
        )
        assert store.find(world.db, "balance_transaction", entry["id"], account=owner)["_payout"]  # type: ignore[index]
    world.emit("payout.created", payout, account=owner)
    store.schedule(world.db, due_at=payout["arrival_date"], task="arrival", target=payout["id"])
    return payout


def settle(world: World) -> None:
    """Let everything happen that has fallen due by `world.now`, each at its own moment, in order."""
    until = world.now
    while (due := store.take_due(world.db, until=until)) is not None:
        moment, task, targets = due
        world.now = moment
        {
            "available": _become_available,
            "payout": _pay_out,
            "arrival": _arrive,
            "expiry": _expire,
        }[task](world, targets)
    world.now = until


def _become_available(world: World, targets: list[str]) -> None:
    accounts = []
    for target in targets:
        entry = store.find(world.db, "balance_transaction", target, account=None)
        assert entry is not None
        entry["status"] = "available"
        world.save(entry)
        accounts.append(store.owner(world.db, target))
    for account in dict.fromkeys(accounts):
        seen = World(db=world.db, now=world.now, account=account)
        world.emit("balance.available", balance(seen), account=account)
        if account != PLATFORM:
            plan_payout(world, world.get("account", account, account=PLATFORM))


def _pay_out(world: World, targets: list[str]) -> None:
    for target in targets:
        account = world.get("account", target, account=PLATFORM)
        for currency, held in sorted(store.funds(world.db, target).items()):
            if held["available"] > 0:
                make_payout(world, account=account, amount=held["available"], currency=currency, automatic=True)


def _arrive(world: World, targets: list[str]) -> None:
    for target in targets:
        payout = store.find(world.db, "payout", target, account=None)
        assert payout is not None
        payout["status"] = "paid"
        world.save(payout)
        world.emit("payout.paid", payout, account=store.owner(world.db, target))


def _expire(world: World, targets: list[str]) -> None:
    for target in targets:
        session = world.get("checkout.session", target, account=PLATFORM)
        if session["status"] == "open":
            expire_session(world, session)


def expire_session(world: World, session: Body) -> None:
    session["status"] = "expired"
    session["url"] = None
    world.save(session)
    world.emit("checkout.session.expired", session, account=PLATFORM)
