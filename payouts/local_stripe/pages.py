"""The pages that Stripe hosts: paying for a checkout session, and onboarding a connected account.

Plain forms without scripts, so that a browser and an HTTP client use them alike:

    POST /c/pay/{session}             email, card_number, expiry (MM/YY), cvc, name
                                      or: method=us_bank_account, bank_email, account_number, routing_number, bank_name
    POST /setup/e/{account}/{token}   name, country (two letters), account_number (an IBAN or a number), routing_number
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup
from werkzeug.utils import redirect
from werkzeug.wrappers import Request, Response

from payouts.local_stripe import funds, objects, store
from payouts.local_stripe.objects import DAY
from payouts.local_stripe.store import PLATFORM, Body
from payouts.local_stripe.world import World

ZERO_DECIMAL = {"jpy"}


@dataclass(frozen=True)
class TestCard:
    """What a card number of Stripe's test mode does."""

    brand: str
    decline: str | None = None  # the decline code
    code: str = "card_declined"
    message: str = ""
    at_once: bool = False  # funds skip the pending balance
    dispute: str = ""  # the reason for which it is disputed as soon as it is charged
    is_inquiry: bool = False  # the bank only asks, for now
    refund_later: str = ""  # how a refund ends a day later: succeeded or failed


CARDS = {
    "4242424242424242": TestCard("visa"),
    "5555555555554444": TestCard("mastercard"),
    "378282246310005": TestCard("amex"),
    "4000000000000077": TestCard("visa", at_once=True),
    "4000000000000002": TestCard("visa", decline="generic_decline", message="Your card was declined."),
    "4000000000009995": TestCard("visa", decline="insufficient_funds", message="Your card has insufficient funds."),
    "4000000000009987": TestCard("visa", decline="lost_card", message="Your card was declined."),
    "4000000000009979": TestCard("visa", decline="stolen_card", message="Your card was declined."),
    "4000000000006975": TestCard(
        "visa",
        decline="card_velocity_exceeded",
        message="Your card was declined for making repeated attempts too frequently.",
    ),
    "4000000000000069": TestCard("visa", decline="expired_card", code="expired_card", message="Your card has expired."),
    "4000000000000127": TestCard(
        "visa", decline="incorrect_cvc", code="incorrect_cvc", message="Your card's security code is incorrect."
    ),
    "4000000000000119": TestCard(
        "visa",
        decline="processing_error",
        code="processing_error",
        message="An error occurred while processing your card. Try again in a little bit.",
    ),
    "4000000000000259": TestCard("visa", dispute="fraudulent"),
    "4000000000002685": TestCard("visa", dispute="product_not_received"),
    "4000000000001976": TestCard("visa", dispute="fraudulent", is_inquiry=True),
    "4000000000007726": TestCard("visa", refund_later="succeeded"),
    "4000000000005126": TestCard("visa", refund_later="failed"),
}

STYLE = Markup("""
:root { color-scheme: light dark; --ink: #1a1f36; --soft: #586074; --paper: #fff; --back: #f3f5f9; --line: #b9c0cf;
  --act: #4b3fd1; --on-act: #fff; --bad: #b3122a; --note: #fff4d6; --on-note: #5c4300; }
@media (prefers-color-scheme: dark) { :root { --ink: #eef0f6; --soft: #b3bacb; --paper: #1b2030; --back: #11141f;
  --line: #59617a; --act: #a69dff; --on-act: #14122e; --bad: #ff9aa8; --note: #3d3210; --on-note: #ffe49a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
.note { background: var(--note); color: var(--on-note); padding: .6rem 1rem; text-align: center; }
main { max-width: 27rem; margin: 1.5rem auto; padding: 1.5rem; background: var(--paper); border-radius: .75rem; }
h1 { font-size: 1.1rem; margin: 0; font-weight: 600; color: var(--soft); }
.amount { font-size: 2.2rem; font-weight: 700; margin: .2rem 0 1rem; font-variant-numeric: tabular-nums; }
ul { list-style: none; margin: 0 0 1.25rem; padding: 0; }
li { display: flex; justify-content: space-between; gap: 1rem; padding: .35rem 0; border-top: 1px solid var(--line); }
li span:last-child { white-space: nowrap; font-variant-numeric: tabular-nums; }
label { display: block; margin: .9rem 0 .25rem; font-weight: 600; }
input, select { width: 100%; padding: .65rem; font: inherit; color: inherit; background: var(--back);
  border: 1px solid var(--line); border-radius: .45rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.hint { color: var(--soft); font-size: .875rem; margin: .25rem 0 0; }
.wrong { color: var(--bad); font-weight: 600; margin: .5rem 0; }
summary { margin-top: 1.25rem; padding: .5rem 0; cursor: pointer; font-weight: 600; }
button { width: 100%; margin-top: 1.4rem; padding: .8rem; font: inherit; font-weight: 700; color: var(--on-act);
  background: var(--act); border: 0; border-radius: .45rem; cursor: pointer; }
:focus-visible { outline: 3px solid var(--act); outline-offset: 2px; }
a { color: var(--act); }
""")

FRAME = Markup("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · Local Stripe</title>
<style>{style}</style>
</head>
<body>
<header class="note">Local Stripe — play money. No card is charged and no bank is reached.</header>
<main>
{content}
</main>
</body>
</html>
""")


def page(title: str, content: Markup, *, status: int = 200) -> Response:
    response = Response(
        FRAME.format(title=title, style=STYLE, content=content), status=status, content_type="text/html; charset=utf-8"
    )
    # The style is the page's own; forms may lead back to the merchant, wherever that is.
    response.headers["Content-Security-Policy"] = (
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
    )
    response.headers["Referrer-Policy"] = "no-referrer"  # the address is the secret
    response.headers["Cache-Control"] = "no-store"
    return response


def notice(title: str, sentence: str, *, status: int, back: str | None = None) -> Response:
    link = Markup('<p><a href="{}">Back to the shop</a></p>').format(back) if back else ""
    return page(title, Markup("<h1>{}</h1><p>{}</p>{}").format(title, sentence, link), status=status)


def money(amount: int, currency: str) -> str:
    """Minor units as people write them: "USD 12.50"."""
    if currency in ZERO_DECIMAL:
        return f"{currency.upper()} {amount:,}"
    return f"{currency.upper()} {amount // 100:,}.{amount % 100:02d}"


def front() -> Response:
    return page(
        "Local Stripe",
        Markup(
            "<h1>Local Stripe</h1><p>A small server that speaks Stripe’s HTTP API on this machine, with play money. "
            "Checkout and onboarding links from the marketplace lead to pages here.</p>"
        ),
    )


# Paying


def checkout(world: World, request: Request, session: str) -> Response:
    """Show the pay page, or take the payment."""
    found = store.find(world.db, "checkout.session", session, account=PLATFORM)
    if found is None:
        return notice(
            "Nothing to pay here", "This payment link is unknown. Go back to the shop and try again.", status=404
        )
    if found["status"] == "complete":
        return redirect(_success_url(found), code=303)  # a second click pays nothing
    if found["status"] == "expired":
        sentence = "This payment link has expired. Go back to the shop to get a new one."
        return notice("Link expired", sentence, status=410, back=found["cancel_url"])
    if request.method == "GET":
        return _pay_form(found, {"email": found["customer_email"] or ""}, {})
    if request.form.get("method") == "us_bank_account":
        return _take_debit(world, request, found)
    given = {name: request.form.get(name, "").strip() for name in ("email", "card_number", "expiry", "cvc", "name")}
    number = re.sub(r"[\s-]", "", given["card_number"])
    wrong, exp_month, exp_year = _check_card(given, number, now=world.now)
    if wrong:
        return _pay_form(found, given, wrong, status=400)
    card = CARDS[number]
    details = objects.card_details(brand=card.brand, last4=number[-4:], exp_month=exp_month, exp_year=exp_year)
    if card.decline:
        decline(world, found, card=card, details=details, given=given)
        remedy = f"{card.message} Nothing was paid. Try another card."
        return _pay_form(found, given, {"card_number": remedy}, status=402)
    pay(world, found, card=card, details=details, given=given)
    return redirect(_success_url(found), code=303)


def _success_url(session: Body) -> str:
    return str(session["success_url"]).replace("{CHECKOUT_SESSION_ID}", session["id"])


def _luhn(number: str) -> bool:
    digits = [int(digit) for digit in reversed(number)]
    return sum(digits[0::2]) % 10 == -sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2]) % 10


def _check_card(given: dict[str, str], number: str, *, now: int) -> tuple[dict[str, str], int, int]:
    """What is wrong, by field, and the card's month and year."""
    wrong = {}
    if not re.fullmatch(r"[^@\s]+@[^@\s]+", given["email"]):
        wrong["email"] = "Give an e-mail address for the receipt."
    if not re.fullmatch(r"\d{13,19}", number) or not _luhn(number):
        wrong["card_number"] = "This card number is not valid. For play money use 4242 4242 4242 4242."
    elif number not in CARDS:
        wrong["card_number"] = "This is not a test card. For play money use 4242 4242 4242 4242."
    match = re.fullmatch(r"(\d{1,2})\s*/?\s*(\d{2}|\d{4})", given["expiry"])
    month, year = (int(match[1]), int(match[2]) % 100 + 2000) if match else (0, 0)
    today = datetime.fromtimestamp(now, tz=UTC)
    if not 1 <= month <= 12:
        wrong["expiry"] = "Write the expiry as month and year: 12/34."
    elif (year, month) < (today.year, today.month):
        wrong["expiry"] = "This card has expired."
    if not re.fullmatch(r"\d{3,4}", given["cvc"]):
        wrong["cvc"] = "The security code has 3 digits, 4 on American Express."
    if not given["name"]:
        wrong["name"] = "Give the name on the card."
    return wrong, month, year


def _intent(world: World, session: Body) -> Body:
    """The session's payment intent, made at the first attempt to pay."""
    if session["payment_intent"]:
        return world.get("payment_intent", session["payment_intent"], account=PLATFORM)
    intent = world.add(objects.payment_intent(session, now=world.now), account=PLATFORM)
    session["payment_intent"] = intent["id"]
    world.save(session)
    world.emit("payment_intent.created", intent, account=PLATFORM)
    return intent


def pay(world: World, session: Body, *, card: TestCard, details: Body, given: dict[str, str]) -> None:
    """Charge the card: intent, charge and balance transaction, and the events in the order Stripe sends them.

    As with Stripe's asynchronous capture, `charge.succeeded` does not know its balance transaction yet; `charge.updated` does.
    A card that disputes does so right after.
    """
    intent = _intent(world, session)
    charge = objects.charge(intent, now=world.now, email=given["email"], name=given["name"], card=details)
    charge |= {
        "status": "succeeded",
        "paid": True,
        "captured": True,
        "amount_captured": charge["amount"],
        "outcome": objects.outcome(kind="authorized", message="Payment complete."),
        "_refund_later": card.refund_later,
    }
    world.add(charge, account=PLATFORM)
    intent |= {
        "status": "succeeded",
        "amount_received": intent["amount"],
        "latest_charge": charge["id"],
        "payment_method": charge["payment_method"],
        "last_payment_error": None,
    }
    world.save(intent)
    session |= {
        "status": "complete",
        "payment_status": "paid",
        "url": None,
        "customer_details": _customer_details(given),
    }
    if session["customer"] is None and session["customer_creation"] == "always":
        customer = world.add(objects.customer({"email": given["email"], "name": given["name"]}, now=world.now))
        world.emit("customer.created", customer, account=PLATFORM)
        for body in (charge, intent, session):
            body["customer"] = customer["id"]
        world.save(charge)
        world.save(intent)
    world.save(session)
    world.emit("charge.succeeded", charge, account=PLATFORM)
    world.emit("payment_intent.succeeded", intent, account=PLATFORM)
    world.emit("checkout.session.completed", session, account=PLATFORM)
    funds.book(
        world,
        charge,
        kind="charge",
        amount=charge["amount"],
        account=PLATFORM,
        fee=funds.processing_fee(charge["amount"]),
        available_on=world.now if card.at_once else world.now + funds.CHARGE_PENDING_DAYS * DAY,
        description=charge["description"],
    )
    world.save(charge)
    world.emit("charge.updated", charge, account=PLATFORM, previous={"balance_transaction": None})
    if card.dispute:
        funds.open_dispute(world, charge, amount=None, reason=card.dispute, is_inquiry=card.is_inquiry)


#: Stripe's own test accounts that are debited, and why their bank refuses days later; "" where it does not.
DEBITED_BANKS = {
    "000123456789": "",
    "000111111113": "account_closed",
    "000111111116": "no_account",
    "000222222227": "insufficient_funds",
    "000333333335": "debit_not_authorized",
}


def _take_debit(world: World, request: Request, session: Body) -> Response:
    """Take a mandate to debit a US bank account: the session is done, and the bank says in days whether it goes through."""
    names = ("bank_email", "account_number", "routing_number", "bank_name")
    given = {name: request.form.get(name, "").strip() for name in names}
    if "us_bank_account" not in session["payment_method_types"]:
        return _pay_form(session, given, {"email": "This payment takes cards only."}, status=400)
    wrong = {}
    if not re.fullmatch(r"[^@\s]+@[^@\s]+", given["bank_email"]):
        wrong["bank_email"] = "Give an e-mail address for the receipt."
    if given["account_number"] not in DEBITED_BANKS:
        wrong["account_number"] = "This is not a test account. For play money use 000123456789."
    if given["routing_number"] != "110000000":
        wrong["routing_number"] = "The test bank's routing number is 110000000."
    if not given["bank_name"]:
        wrong["bank_name"] = "Give the name of the account's owner."
    if wrong:
        return _pay_form(session, given, wrong, status=400)
    debit(world, session, given=given | {"email": given["bank_email"], "name": given["bank_name"]})
    return redirect(_success_url(session), code=303)


def debit(world: World, session: Body, *, given: dict[str, str]) -> None:
    """What Stripe does at once: a charge that is pending, and events that say that nothing is paid yet."""
    intent = _intent(world, session)
    details = objects.us_bank_account_details(number=given["account_number"], routing=given["routing_number"])
    charge = objects.charge(intent, now=world.now, email=given["email"], name=given["name"], us_bank_account=details)
    refuses = DEBITED_BANKS[given["account_number"]]
    charge |= {"captured": True, "amount_captured": charge["amount"], "_refuses": refuses}
    world.add(charge, account=PLATFORM)
    intent |= {
        "status": "processing",
        "latest_charge": charge["id"],
        "payment_method": charge["payment_method"],
        "last_payment_error": None,
    }
    world.save(intent)
    session |= {
        "status": "complete",
        "url": None,
        "customer_details": _customer_details(given),
    }
    world.save(session)
    world.emit("charge.pending", charge, account=PLATFORM)
    world.emit("payment_intent.processing", intent, account=PLATFORM)
    world.emit("checkout.session.completed", session, account=PLATFORM)
    task = "debit_failed" if refuses else "debit_succeeded"
    store.schedule(world.db, due_at=world.now + funds.DEBIT_TAKES_DAYS * DAY, task=task, target=charge["id"])


def _customer_details(given: dict[str, str]) -> Body:
    return {
        "address": dict(objects.NO_ADDRESS),
        "business_name": None,
        "email": given["email"],
        "individual_name": None,
        "name": given["name"],
        "phone": None,
        "tax_exempt": "none",
        "tax_ids": [],
    }


def decline(world: World, session: Body, *, card: TestCard, details: Body, given: dict[str, str]) -> None:
    """Record the refused charge; the session stays open for another card."""
    intent = _intent(world, session)
    charge = objects.charge(intent, now=world.now, email=given["email"], name=given["name"], card=details)
    charge |= {
        "status": "failed",
        "failure_code": card.code,
        "failure_message": card.message,
        "outcome": objects.outcome(
            kind="issuer_declined",
            message="The bank returned a decline.",
            reason=card.decline,
            status="declined_by_network",
        ),
    }
    world.add(charge, account=PLATFORM)
    intent |= {
        "latest_charge": charge["id"],
        "last_payment_error": {
            "type": "card_error",
            "code": card.code,
            "decline_code": card.decline,
            "charge": charge["id"],
            "message": card.message,
        },
    }
    world.save(intent)
    world.emit("charge.failed", charge, account=PLATFORM)
    world.emit("payment_intent.payment_failed", intent, account=PLATFORM)


def _field(
    name: str,
    label: str,
    given: dict[str, str],
    wrong: dict[str, str],
    *,
    hint: str = "",
    **attributes: str,
) -> Markup:
    described = [f"{name}-hint"] if hint else []
    described += [f"{name}-wrong"] if name in wrong else []
    extra = {key.replace("_", "-"): value for key, value in attributes.items()}
    if described:
        extra["aria-describedby"] = " ".join(described)
    if name in wrong:
        extra["aria-invalid"] = "true"
    rendered = Markup(" ").join(Markup('{}="{}"').format(key, value) for key, value in extra.items())
    return Markup(
        '<div><label for="{n}">{l}</label><input id="{n}" name="{n}" value="{v}" {e} required>{h}{w}</div>'
    ).format(
        n=name,
        l=label,
        v=given.get(name, ""),
        e=rendered,
        h=Markup('<p class="hint" id="{}-hint">{}</p>').format(name, hint) if hint else "",
        w=Markup('<p class="wrong" role="alert" id="{}-wrong">{}</p>').format(name, wrong[name])
        if name in wrong
        else "",
    )


def _pay_form(session: Body, given: dict[str, str], wrong: dict[str, str], *, status: int = 200) -> Response:
    total = money(session["amount_total"], session["currency"])
    items = Markup("").join(
        Markup("<li><span>{} × {}</span><span>{}</span></li>").format(
            item["quantity"], item["description"], money(item["amount_total"], item["currency"])
        )
        for item in session["_line_items"]
    )
    kept = {name: value for name, value in given.items() if name not in ("cvc",)}
    content = Markup(
        """<h1>Pay Residual</h1>
<p class="amount">{total}</p>
<ul>{items}</ul>
<form method="post">
{email}{card}
<div class="pair">{expiry}{cvc}</div>
{name}
<button type="submit">Pay {total}</button>
</form>
{debit}{cancel}"""
    ).format(
        debit=_debit_form(total, kept, wrong) if "us_bank_account" in session["payment_method_types"] else "",
        total=total,
        items=items,
        email=_field("email", "E-mail", kept, wrong, type="email", autocomplete="email"),
        card=_field(
            "card_number",
            "Card number",
            kept,
            wrong,
            hint="4242 4242 4242 4242 pays, 4000 0000 0000 0002 is declined.",
            inputmode="numeric",
            autocomplete="cc-number",
        ),
        expiry=_field("expiry", "Expiry", kept, wrong, placeholder="MM/YY", autocomplete="cc-exp"),
        cvc=_field("cvc", "Security code", {}, wrong, inputmode="numeric", autocomplete="cc-csc"),
        name=_field("name", "Name on card", kept, wrong, autocomplete="cc-name"),
        cancel=Markup('<p><a href="{}">Cancel and go back</a></p>').format(session["cancel_url"])
        if session["cancel_url"]
        else "",
    )
    return page(f"Pay {total}", content, status=status)


def _debit_form(total: str, given: dict[str, str], wrong: dict[str, str]) -> Markup:
    """The other way to pay; open where something in it is to be corrected."""
    is_open = Markup(" open") if {"bank_email", "account_number", "routing_number", "bank_name"} & wrong.keys() else ""
    return Markup(
        """<details{open}><summary>Pay from a US bank account instead</summary>
<p class="hint">The bank takes some days to say whether the debit goes through.</p>
<form method="post"><input type="hidden" name="method" value="us_bank_account">
{email}{number}{routing}{name}
<button>Debit {total}</button>
</form></details>"""
    ).format(
        open=is_open,
        total=total,
        email=_field("bank_email", "E-mail", given, wrong, type="email", autocomplete="email"),
        number=_field(
            "account_number",
            "Account number",
            given,
            wrong,
            hint="000123456789 pays after some days, 000222222227 is refused after some days.",
            inputmode="numeric",
            autocomplete="off",
        ),
        routing=_field("routing_number", "Routing number", given, wrong, hint="110000000", inputmode="numeric"),
        name=_field("bank_name", "Name of the account’s owner", given, wrong, autocomplete="name"),
    )


# Onboarding


def onboarding(world: World, request: Request, account: str, token: str) -> Response:
    """Show the form that makes a connected account payable, or take it."""
    link = store.find(world.db, "account_link", token, account=PLATFORM)
    if link is None or link["_account"] != account:
        return notice("Unknown link", "This onboarding link is unknown. Ask the marketplace for a new one.", status=404)
    if link["_used"] or link["expires_at"] <= world.now:
        return redirect(link["_refresh_url"], code=303)  # the platform makes a new link there, as with Stripe
    body = world.get("account", account, account=PLATFORM)
    if request.method == "GET":
        return _onboarding_form(body, {"country": body["country"]}, {})
    given = {
        name: request.form.get(name, "").strip() for name in ("name", "country", "account_number", "routing_number")
    }
    number = re.sub(r"\s", "", given["account_number"]).upper()
    wrong = _check_bank(given, number, country=body["country"])
    if wrong:
        return _onboarding_form(body, given, wrong, status=400)
    complete_onboarding(world, body, name=given["name"], number=number, routing=given["routing_number"] or None)
    link["_used"] = True
    world.save(link)
    return redirect(link["_return_url"], code=303)


def _iban(number: str) -> bool:
    """ISO 13616: the rearranged number is 1 modulo 97."""
    moved = number[4:] + number[:4]
    return int("".join(str(int(character, 36)) for character in moved)) % 97 == 1


def _check_bank(given: dict[str, str], number: str, *, country: str) -> dict[str, str]:
    wrong = {}
    if not given["name"]:
        wrong["name"] = "Give the name of the account's owner."
    if given["country"].upper() != country:
        wrong["country"] = f"This account was opened for {country}; the country cannot be changed."
    if re.fullmatch(r"[A-Z]{2}\d{2}[A-Z0-9]{11,30}", number):
        if not _iban(number):
            wrong["account_number"] = (
                "This IBAN has a wrong check number. For play money use DE89 3704 0044 0532 0130 00."
            )
    elif not re.fullmatch(r"\d{4,17}", number):
        wrong["account_number"] = "Give an IBAN, or an account number of 4 to 17 digits such as 000123456789."
    if given["routing_number"] and not re.fullmatch(r"\d{6,9}", given["routing_number"]):
        wrong["routing_number"] = "The routing number has 6 to 9 digits, such as 110000000."
    return wrong


#: Stripe's own test accounts whose bank sends a payout back, and with which code.
REFUSING_BANKS = {
    "000111111116": "no_account",
    "000111111113": "account_closed",
    "000222222227": "insufficient_funds",
    "DE62370400440532013001": "no_account",
}
#: Not one of Stripe's: the payout is paid, and days later the bank sends it back all the same.
REGRETTING_BANKS = {"000888888883": "account_closed"}


def complete_onboarding(world: World, account: Body, *, name: str, number: str, routing: str | None) -> None:
    """Everything Stripe asks for is there: the account can receive transfers and is paid out."""
    before = {
        field: account[field]
        for field in ("details_submitted", "payouts_enabled", "charges_enabled", "capabilities", "requirements")
    }
    bank = objects.bank_account(
        account_id=account["id"],
        holder=name,
        country=account["country"],
        currency=account["default_currency"],
        number=number,
        routing=routing,
    )
    world.add(bank, account=account["id"])
    account |= {
        "details_submitted": True,
        "payouts_enabled": True,
        "charges_enabled": "card_payments" in account["capabilities"],
        "capabilities": dict.fromkeys(account["capabilities"], "active"),
        "requirements": objects.requirements([]),
        "external_accounts": {**account["external_accounts"], "data": [bank]},
        "tos_acceptance": {**account["tos_acceptance"], "date": world.now},
        "_bank": bank["id"],
        "_holder": name,
        "_bank_refuses": REFUSING_BANKS.get(number, ""),
        "_bank_regrets": REGRETTING_BANKS.get(number, ""),
    }
    if account["business_profile"]["name"] is None:
        account["business_profile"]["name"] = name
    world.save(account)
    previous: dict[str, Any] = {field: value for field, value in before.items() if account[field] != value}
    world.emit("account.external_account.created", bank, account=account["id"])
    world.emit("account.updated", account, account=account["id"], previous=previous)
    if any(held["available"] > 0 for held in store.funds(world.db, account["id"]).values()):
        funds.plan_payout(world, account)


def _onboarding_form(account: Body, given: dict[str, str], wrong: dict[str, str], *, status: int = 200) -> Response:
    content = Markup(
        """<h1>Get paid by Residual</h1>
<p>Tell us who you are and which bank account your money goes to.</p>
<form method="post">
{name}{country}{number}{routing}
<button type="submit">Agree and finish</button>
</form>"""
    ).format(
        name=_field("name", "Full name", given, wrong, autocomplete="name"),
        country=_field(
            "country",
            "Country",
            given,
            wrong,
            hint="Fixed when the account was opened.",
            maxlength="2",
            readonly="readonly",
        ),
        number=_field(
            "account_number",
            "IBAN or account number",
            given,
            wrong,
            hint="For play money: DE89 3704 0044 0532 0130 00, or 000123456789 in the United States.",
            autocomplete="off",
        ),
        routing=_field(
            "routing_number",
            "Routing number, if your bank has one",
            given,
            wrong,
            hint="110000000 in the United States; leave empty with an IBAN.",
            inputmode="numeric",
        ).replace(Markup(" required"), Markup("")),
    )
    return page("Get paid", content, status=status)
