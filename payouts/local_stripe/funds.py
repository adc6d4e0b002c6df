"""Where the money is: fees, what is pending and what is available, transfers, and payouts to banks.

A balance is the sum of the nets of an account's balance transactions, by currency and status. Time moves money by an
agenda: each charge's funds become available, each connected account is paid out, each payout arrives, in the order of
their moments, and each happens *at* its moment however far the clock jumped.
"""

from collections.abc import Callable
from typing import Any

from payouts.local_stripe import objects, store
from payouts.local_stripe.errors import StripeError
from payouts.local_stripe.objects import DAY
from payouts.local_stripe.store import PLATFORM, Body
from payouts.local_stripe.world import World, new_id, public

FEE_PER_MILLE = 29
FEE_FIXED = 30  # minor units of the charge's currency
DEBIT_FEE_PER_MILLE, MOST_DEBIT_FEE = 8, 500
DEBIT_TAKES_DAYS = 4  # until the buyer's bank says whether it goes through
DISPUTE_FEE = 1_500  # minor units; kept whatever the outcome
REFUND_TAKES_DAYS = 1  # of the test cards whose refund is decided later
CHARGE_PENDING_DAYS = 2
BANK_REGRETS_AFTER_DAYS = 4  # of a test account whose bank sends back what it had taken


def processing_fee(amount: int) -> int:
    """2.9 % and 30 minor units, the percentage rounded half up to a whole minor unit."""
    return (amount * FEE_PER_MILLE + 500) // 1000 + FEE_FIXED


def debit_fee(amount: int) -> int:
    """0.8 % of a bank debit, rounded half up, and at most 5.00."""
    return min((amount * DEBIT_FEE_PER_MILLE + 500) // 1000, MOST_DEBIT_FEE)


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


def available_beside(world: World, charge: Body) -> int:
    """When a movement that takes a charge back counts: with the charge's own funds while they are pending, or now.

    So a refund on the day of the sale shrinks the pending balance and needs nothing of the available one.
    """
    booked = store.find(world.db, "balance_transaction", charge["balance_transaction"] or "", account=None)
    return max(world.now, booked["available_on"]) if booked else world.now


def make_refund(world: World, charge: Body, *, amount: int | None, reason: str | None, metadata: Body | None) -> Body:
    """Give a charge back, in whole or in part; its fee is not returned.

    Raises:
        StripeError: it is not paid, disputed, refunded already, smaller than asked, or the funds do not suffice.
    """
    if charge["status"] != "succeeded":
        raise StripeError("This charge did not succeed, so there is nothing to refund.", code="charge_not_refundable")
    if any(not dispute["is_charge_refundable"] for dispute in disputes_of(world, charge)):
        raise StripeError(
            f"Charge {charge['id']} has been charged back; cannot issue a refund.", code="charge_disputed"
        )
    left = charge["amount"] - charge["amount_refunded"]
    if left == 0:
        raise StripeError(f"Charge {charge['id']} has already been refunded.", code="charge_already_refunded")
    amount = left if amount is None else amount
    if amount > left:
        raise StripeError(
            f"Refund amount ({amount} {charge['currency']}) is greater than unrefunded amount on charge "
            f"({left} {charge['currency']})",
            code="amount_too_large",
            param="amount",
        )
    available_on = available_beside(world, charge)
    if available_on <= world.now:
        require_available(world, amount=amount, currency=charge["currency"])
    refund = objects.refund(charge, amount=amount, now=world.now, reason=reason, metadata=metadata)
    later = charge.get("_refund_later")
    if later == "succeeded":
        refund["status"], refund["pending_reason"] = "pending", "processing"
    book(
        world,
        refund,
        kind="refund",
        amount=-amount,
        account=PLATFORM,
        available_on=available_on,
        description=f"REFUND FOR CHARGE ({charge['description'] or charge['id']})",
    )
    world.add(refund, account=PLATFORM)
    if later:
        due_at = world.now + REFUND_TAKES_DAYS * DAY
        store.schedule(world.db, due_at=due_at, task=f"refund_{later}", target=refund["id"])
    previous = {"amount_refunded": charge["amount_refunded"], "refunded": charge["refunded"]}
    charge["amount_refunded"] += amount
    charge["refunded"] = charge["amount_refunded"] == charge["amount"]
    world.save(charge)
    world.emit("refund.created", refund, account=PLATFORM)
    world.emit("charge.refunded", charge, account=PLATFORM, previous=previous)
    return refund


def _refund_succeeds(world: World, targets: list[str]) -> None:
    for target in targets:
        refund = world.get("refund", target, account=PLATFORM)
        refund["status"] = "succeeded"
        del refund["pending_reason"]
        world.save(refund)
        for kind in ("refund.updated", "charge.refund.updated"):
            world.emit(kind, refund, account=PLATFORM, previous={"status": "pending"})


def _refund_fails(world: World, targets: list[str]) -> None:
    """The customer's bank sends it back: the money returns to the balance and the charge counts as not refunded."""
    for target in targets:
        refund = world.get("refund", target, account=PLATFORM)
        charge = world.get("charge", refund["charge"], account=PLATFORM)
        taken = refund["balance_transaction"]
        returned = book(world, refund, kind="refund_failure", amount=refund["amount"], account=PLATFORM)
        refund |= {
            "status": "failed",
            "balance_transaction": taken,
            "failure_balance_transaction": returned["id"],
            "failure_reason": "expired_or_canceled_card",
        }
        world.save(refund)
        charge["amount_refunded"] -= refund["amount"]
        charge["refunded"] = False
        world.save(charge)
        for kind in ("refund.updated", "refund.failed", "charge.refund.updated"):
            world.emit(kind, refund, account=PLATFORM, previous={"status": "succeeded"})


#: The words of a bank that refuses a debit.
DEBIT_WORDS = {
    "account_closed": "The customer's bank account has been closed.",
    "no_account": "The customer's bank account could not be located.",
    "insufficient_funds": "The customer's account has insufficient funds to cover this payment.",
    "debit_not_authorized": "The customer has notified their bank that this payment was unauthorized.",
}


def _debit_succeeds(world: World, targets: list[str]) -> None:
    """The bank has confirmed it: only now is there money, and its balance transaction."""
    for target in targets:
        charge, intent, session = _debited(world, target)
        charge |= {
            "status": "succeeded",
            "paid": True,
            "outcome": objects.outcome(kind="authorized", message="Payment complete."),
        }
        world.save(charge)
        intent |= {"status": "succeeded", "amount_received": intent["amount"]}
        world.save(intent)
        session["payment_status"] = "paid"
        world.save(session)
        world.emit("charge.succeeded", charge, account=PLATFORM)
        world.emit("payment_intent.succeeded", intent, account=PLATFORM)
        world.emit("checkout.session.async_payment_succeeded", session, account=PLATFORM)
        given = {"fee": debit_fee(charge["amount"]), "description": charge["description"]}
        book(world, charge, kind="payment", amount=charge["amount"], account=PLATFORM, **given)
        world.save(charge)
        world.emit("charge.updated", charge, account=PLATFORM, previous={"balance_transaction": None})


def _debit_fails(world: World, targets: list[str]) -> None:
    """The bank refuses: nothing was taken. The session stays complete, and unpaid, for ever."""
    for target in targets:
        charge, intent, session = _debited(world, target)
        code = charge["_refuses"]
        charge |= {"status": "failed", "failure_code": code, "failure_message": DEBIT_WORDS[code]}
        world.save(charge)
        intent |= {
            "status": "requires_payment_method",
            "payment_method": None,
            "last_payment_error": {
                "type": "invalid_request_error",
                "code": code,
                "charge": charge["id"],
                "message": DEBIT_WORDS[code],
            },
        }
        world.save(intent)
        world.emit("charge.failed", charge, account=PLATFORM)
        world.emit("payment_intent.payment_failed", intent, account=PLATFORM)
        world.emit("checkout.session.async_payment_failed", session, account=PLATFORM)


def _debited(world: World, target: str) -> tuple[Body, Body, Body]:
    charge = world.get("charge", target, account=PLATFORM)
    intent = world.get("payment_intent", charge["payment_intent"], account=PLATFORM)
    return charge, intent, world.get("checkout.session", intent["_session"], account=PLATFORM)


def reverse_transfer(world: World, transfer: Body, *, amount: int | None, metadata: Body | None) -> Body:
    """Take a transfer back, as far as the connected account still has the money.

    Raises:
        StripeError: more than is left of the transfer, or more than the account has.
    """
    left = transfer["amount"] - transfer["amount_reversed"]
    amount = left if amount is None else amount
    if amount > left or left == 0:
        raise StripeError(
            f"Reversal amount ({amount} {transfer['currency']}) is greater than unreversed amount on transfer "
            f"({left} {transfer['currency']})",
            code="amount_too_large",
            param="amount",
        )
    owner = World(db=world.db, now=world.now, account=transfer["destination"])
    require_available(owner, amount=amount, currency=transfer["currency"])
    reversal = objects.transfer_reversal(transfer, amount=amount, now=world.now, metadata=metadata)
    payment = world.get("charge", transfer["destination_payment"], account=transfer["destination"])
    returned = objects.refund(payment, amount=amount, now=world.now)
    del returned["destination_details"]
    returned |= {"id": new_id("pyr"), "source_transfer_reversal": reversal["id"]}
    reversal["destination_payment_refund"] = returned["id"]
    book(world, reversal, kind="transfer_refund", amount=amount, account=PLATFORM)
    book(world, returned, kind="payment_refund", amount=-amount, account=transfer["destination"])
    world.add(reversal, account=PLATFORM)
    world.add(returned, account=transfer["destination"])
    payment["amount_refunded"] += amount
    payment["refunded"] = payment["amount_refunded"] == payment["amount"]
    world.save(payment)
    previous = {"amount_reversed": transfer["amount_reversed"], "reversed": transfer["reversed"]}
    transfer["amount_reversed"] += amount
    transfer["reversed"] = transfer["amount_reversed"] == transfer["amount"]
    world.save(transfer)
    world.emit("transfer.reversed", transfer, account=PLATFORM, previous=previous)
    return reversal


# Disputes


def disputes_of(world: World, charge: Body) -> list[Body]:
    return store.listed(world.db, "dispute", account=PLATFORM, where=[("charge", "=", charge["id"])], limit=100)


def open_dispute(world: World, charge: Body, *, amount: int | None, reason: str, is_inquiry: bool) -> Body:
    """The cardholder complains: a dispute takes the money and a fee at once, whatever the balance; an inquiry nothing yet.

    Raises:
        StripeError: the charge did not succeed, is disputed already, or is smaller.
    """
    if charge["status"] != "succeeded":
        raise StripeError("Only a charge that succeeded can be disputed.", param="charge")
    if charge["payment_method_details"]["type"] != "card":
        raise StripeError("The local Stripe plays disputes of cards only.", param="charge")
    if any(not is_closed(dispute) for dispute in disputes_of(world, charge)):
        raise StripeError(f"Charge {charge['id']} is disputed already.", code="charge_disputed", param="charge")
    amount = charge["amount"] if amount is None else amount
    if not 1 <= amount <= charge["amount"]:
        raise StripeError("A dispute is about the charge's amount or less.", param="amount")
    dispute = objects.dispute(charge, amount=amount, reason=reason, is_inquiry=is_inquiry, now=world.now)
    world.add(dispute, account=PLATFORM)
    store.schedule(world.db, due_at=dispute["evidence_details"]["due_by"], task="evidence_due", target=dispute["id"])
    charge["disputed"] = True
    world.save(charge)
    world.emit("charge.dispute.created", dispute, account=PLATFORM)
    if not is_inquiry:
        _withdraw(world, dispute, charge)
    return dispute


def is_closed(dispute: Body) -> bool:
    return dispute["status"] in ("won", "lost", "warning_closed")


def answer_dispute(world: World, dispute: Body, evidence: Body, *, submit: bool) -> None:
    """Keep the evidence and, once it is submitted, hand it to the bank. Stripe's own test texts decide the outcome.

    Raises:
        StripeError: the dispute is closed, or evidence has been submitted.
    """
    if dispute["status"] not in ("needs_response", "warning_needs_response"):
        raise StripeError("This dispute takes no evidence any more.", code="dispute_evidence_not_accepted")
    previous = {"status": dispute["status"]}
    dispute["evidence"] |= {name: text or None for name, text in evidence.items()}
    details = dispute["evidence_details"]
    details["has_evidence"] = any(
        text
        for name, text in dispute["evidence"].items()
        if name not in ("enhanced_evidence", "customer_email_address", "customer_name")
    )
    if submit:
        details["submission_count"] += 1
        dispute["status"] = dispute["status"].replace("needs_response", "under_review")
        verdict = VERDICTS.get(dispute["evidence"]["uncategorized_text"] or "")
        if verdict:
            store.schedule(world.db, due_at=world.now, task=f"dispute_{verdict}", target=dispute["id"])
    world.save(dispute)
    world.emit("charge.dispute.updated", dispute, account=PLATFORM, previous=previous)


#: What Stripe's test mode takes for proof: the text of `uncategorized_text` → how the bank decides.
VERDICTS = {
    "winning_evidence": "won",
    "losing_evidence": "lost",
    "escalate_inquiry_evidence": "escalated",
}


def decide_dispute(world: World, dispute: Body, verdict: str) -> None:
    """The bank's word: won, lost, or an inquiry that becomes a dispute; a closed dispute stays as it is."""
    if is_closed(dispute):
        return
    is_inquiry = dispute["status"].startswith("warning_")
    charge = world.get("charge", dispute["charge"], account=PLATFORM)
    previous = {"status": dispute["status"]}
    if verdict == "escalated":
        if is_inquiry:
            dispute["status"], dispute["is_charge_refundable"] = "needs_response", False
            dispute["payment_method_details"]["card"]["case_type"] = "chargeback"
            world.save(dispute)
            world.emit("charge.dispute.updated", dispute, account=PLATFORM, previous=previous)
            _withdraw(world, dispute, charge)
        return
    dispute["status"] = "warning_closed" if is_inquiry else verdict
    world.save(dispute)
    if verdict == "won" and not is_inquiry:
        _reinstate(world, dispute, charge)
    world.emit("charge.dispute.closed", dispute, account=PLATFORM, previous=previous)


def _withdraw(world: World, dispute: Body, charge: Body) -> None:
    given = {
        "available_on": available_beside(world, charge),
        "fee": DISPUTE_FEE,
        "fee_name": "Dispute fee",
        "category": "dispute",
        "description": f"Chargeback withdrawal for {charge['id']}",
    }
    _move(world, dispute, amount=-dispute["amount"], **given)
    world.emit("charge.dispute.funds_withdrawn", dispute, account=PLATFORM)


def _reinstate(world: World, dispute: Body, charge: Body) -> None:
    given = {
        "available_on": available_beside(world, charge),
        "category": "dispute_reversal",
        "description": f"Chargeback reversal for {charge['id']}",
    }
    _move(world, dispute, amount=dispute["amount"], **given)
    world.emit("charge.dispute.funds_reinstated", dispute, account=PLATFORM)


def _move(world: World, dispute: Body, **given: Any) -> None:
    entry = book(world, dict(dispute), kind="adjustment", account=PLATFORM, **given)
    dispute["balance_transactions"].append(public(entry))
    world.save(dispute)


def _evidence_is_due(world: World, targets: list[str]) -> None:
    """Without an answer by the last day the bank decides for its customer; an inquiry is dropped."""
    for target in targets:
        dispute = world.get("dispute", target, account=PLATFORM)
        dispute["evidence_details"]["past_due"] = True
        world.save(dispute)
        if dispute["status"] in ("needs_response", "warning_needs_response"):
            decide_dispute(world, dispute, "lost")


def _decided(verdict: str) -> Callable[[World, list[str]], None]:
    def decide(world: World, targets: list[str]) -> None:
        for target in targets:
            decide_dispute(world, world.get("dispute", target, account=PLATFORM), verdict)

    return decide


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
            "bank_regrets": _bank_regrets,
            "expiry": _expire,
            "debit_succeeded": _debit_succeeds,
            "debit_failed": _debit_fails,
            "refund_succeeded": _refund_succeeds,
            "refund_failed": _refund_fails,
            "evidence_due": _evidence_is_due,
            "dispute_won": _decided("won"),
            "dispute_lost": _decided("lost"),
            "dispute_escalated": _decided("escalated"),
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
        owner = store.owner(world.db, target)
        account = store.find(world.db, "account", owner, account=PLATFORM) if owner != PLATFORM else None
        if account is not None and (code := account.get("_bank_refuses")):
            _send_back(world, payout, account, code)
            continue
        payout["status"] = "paid"
        world.save(payout)
        world.emit("payout.paid", payout, account=owner)
        if account is not None and account.get("_bank_regrets"):
            due_at = world.now + BANK_REGRETS_AFTER_DAYS * DAY
            store.schedule(world.db, due_at=due_at, task="bank_regrets", target=payout["id"])


def _bank_regrets(world: World, targets: list[str]) -> None:
    for target in targets:
        owner = store.owner(world.db, target)
        account = world.get("account", owner, account=PLATFORM)
        _send_back(world, world.get("payout", target, account=owner), account, account["_bank_regrets"])


BANKS_WORDS = {
    "no_account": "The bank account details on file are probably incorrect. No bank account exists with those details.",
    "account_closed": "The bank account has been closed.",
    "insufficient_funds": "Your Stripe account has insufficient funds to cover the payout.",
}


def _send_back(world: World, payout: Body, account: Body, code: str) -> None:
    """The bank takes no money for the account: it is in the balance again, and no more goes there before a new account is named."""
    sent, before_status = payout["balance_transaction"], payout["status"]
    entry = book(world, payout, kind="payout_failure", amount=payout["amount"], account=account["id"])
    payout |= {
        "status": "failed",
        "balance_transaction": sent,
        "failure_balance_transaction": entry["id"],
        "failure_code": code,
        "failure_message": BANKS_WORDS[code],
    }
    world.save(payout)
    world.emit("payout.failed", payout, account=account["id"], previous={"status": before_status})
    before = {name: account[name] for name in ("payouts_enabled", "requirements")}
    account["payouts_enabled"] = False
    account["requirements"] = objects.requirements(["external_account"])
    world.save(account)
    world.emit("account.updated", account, account=account["id"], previous=before)


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
