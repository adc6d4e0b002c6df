"""Whom an invoice names, and the tax that is added to it: a rate per jurisdiction and day, none by default.

Tax never reaches fee, upfront share or pool: it stands on its rate's own account until it is handed to its office.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date

from django.db import IntegrityError, transaction
from django.db.models import Q
from stdnum import exceptions as stdnum_errors
from stdnum.ch import vat as swiss_vat
from stdnum.eu import vat as eu_vat
from stdnum.gb import vat as british_vat
from stdnum.no import mva as norwegian_vat

from marketplace import clock
from marketplace.errors import InvalidInput
from marketplace.models import Party, User
from marketplace.money import Money
from marketplace.services import audit
from marketplace.services.authority import require_authority, require_staff
from payouts import chart, gateway
from payouts.models import BillingProfile, Payment, RoyaltyInvoice, TaxRate
from payouts.services import documents

logger = logging.getLogger(__name__)

MAX_ADDRESS = 500
MAX_PURCHASE_ORDER = 60
#: Countries outside the EU whose numbers are checked too; Northern Ireland's begin with XI.
VAT_CHECKS: dict[str, Callable[[str], str]] = {
    "GB": british_vat.validate,
    "XI": eu_vat.validate,
    "CH": swiss_vat.validate,
    "NO": norwegian_vat.validate,
}


@dataclass(frozen=True)
class Tax:
    """What is added to an amount; the rate is None where nothing is."""

    amount: Money
    rate: TaxRate | None


def tax_on(net: Money, *, party: Party, on: date | None = None) -> Tax:
    """The tax on a sale to a party on a business day, rounded half up to the minor unit.

    The jurisdiction is the billing profile's country and region, or the party's country; a region's own rate comes before its
    country's. Where a buyer with a VAT id owes it itself, the rate is named and the amount is zero.
    """
    profile = BillingProfile.objects.filter(party=party).first()
    country = profile.country if profile else party.country
    places = [country]
    if profile and profile.region:
        places.insert(0, f"{country}-{profile.region}")
    day = on or clock.today()
    valid = TaxRate.objects.filter(jurisdiction__in=places, valid_from__lte=day)
    rates = {rate.jurisdiction: rate for rate in valid.filter(Q(valid_until=None) | Q(valid_until__gte=day))}
    rate = next((rates[place] for place in places if place in rates), None)
    if rate is None:
        return Tax(Money(0, net.currency), None)
    if rate.is_reversed and profile and profile.vat_id:
        return Tax(Money(0, net.currency), rate)
    unit = Money.micros_per_minor(net.currency) * 10_000
    minor = (net.micros * rate.rate_bps + unit // 2) // unit
    return Tax(Money.from_minor(minor, net.currency), rate)


def tax_line(payment: Payment) -> list[gateway.CheckoutLine]:
    """What Stripe's page lists it as, if there is any."""
    if not payment.tax_micros:
        return []
    return [gateway.CheckoutLine(str(payment.tax_rate), payment.tax.to_minor())]


def tax_legs(taken: Payment) -> dict[str, int]:
    if not taken.tax_micros:
        return {}
    assert taken.tax_rate is not None  # a database check
    return {chart.tax(taken.tax_rate, taken.currency): -taken.tax_micros}


def ask_for_royalty(invoice: RoyaltyInvoice) -> Payment:
    """Inside the transaction that makes an open royalty invoice: what is asked for it, tax included, and its document."""
    party, net = invoice.report.licensee, invoice.demand
    tax = tax_on(net, party=party)
    payment, _ = Payment.objects.get_or_create(
        invoice=invoice,
        defaults={
            "currency": invoice.currency,
            "amount_micros": net.micros + tax.amount.micros,
            "tax_micros": tax.amount.micros,
            "tax_rate": tax.rate,
            "purchase_order": checked_purchase_order(invoice.purchase_order),
            "due_on": invoice.due_on,
        },
    )
    documents.issue_invoice(payment)
    return payment


def checked_purchase_order(text: str) -> str:
    """A purchase-order number as it is printed.

    Raises:
        InvalidInput: too long, or of several lines.
    """
    text = text.strip()
    if len(text) > MAX_PURCHASE_ORDER or not text.isprintable():
        raise InvalidInput(
            f"A purchase-order number is one line of at most {MAX_PURCHASE_ORDER} characters.",
            pointers={"/purchase_order": "cannot be printed"},
        )
    return text


def checked_vat_id(text: str, *, country: str) -> str:
    """A VAT id with its country's prefix and right check digits, without blanks; empty stays empty.

    Of countries whose numbers are not known here, the length and the letters are checked.

    Raises:
        InvalidInput: it cannot be one.
    """
    given = "".join(text.split()).upper().replace("-", "").replace(".", "")
    if not given:
        return ""
    prefix = {"GR": "EL"}.get(country, country)
    is_eu = country.lower() in eu_vat.MEMBER_STATES
    check = VAT_CHECKS.get(country)
    bare = given.removeprefix(prefix)
    try:
        if is_eu:
            return str(eu_vat.validate(prefix + bare))
        if check is not None:
            check(given if country == "CH" else bare)
            return given if country == "CH" else prefix + bare
    except stdnum_errors.ValidationError as error:
        raise InvalidInput(
            f"{text.strip()} is no VAT id of {country}: {str(error).rstrip('.').lower()}. Look at it again; it begins with "
            f"{'CHE' if country == 'CH' else prefix}.",
            pointers={"/vat_id": "not valid"},
        ) from None
    if not (given.isascii() and given.isalnum() and 4 <= len(given) <= 20):
        raise InvalidInput("A tax number has 4 to 20 letters and digits.", pointers={"/vat_id": "not valid"})
    return given


@transaction.atomic
def set_billing_profile(
    *, party: Party, user: User | None, legal_name: str, address: str, country: str, region: str = "", vat_id: str = ""
) -> BillingProfile:
    """How the party's next invoices name it; those that were issued stay as they are.

    Args:
        user: who says so in the party's name; None: a key of the party's.

    Raises:
        NotAllowed: the user may not act for the party.
        InvalidInput: a field is missing, too long, or no VAT id of that country.
    """
    if user is not None:
        require_authority(user=user, party=party, to="say how it is billed")
    wrong = {}
    if not 2 <= len(legal_name.strip()) <= 200:
        wrong["/legal_name"] = "Give the name as it is registered, in 2 to 200 characters."
    if not 5 <= len(address.strip()) <= MAX_ADDRESS:
        wrong["/address"] = f"Give street, postcode and town, in at most {MAX_ADDRESS} characters."
    if not (len(country) == 2 and country.isascii() and country.isalpha() and country.isupper()):
        wrong["/country"] = "Give the country's two letters (ISO 3166)."
    region = region.strip().upper().removeprefix(f"{country}-")
    if region and not (len(region) <= 3 and region.isascii() and region.isalnum()):
        wrong["/region"] = "Give the region's code (ISO 3166-2), such as CA."
    if wrong:
        raise InvalidInput(next(iter(wrong.values())), pointers=wrong)
    profile, _ = BillingProfile.objects.update_or_create(
        party=party,
        defaults={
            "legal_name": " ".join(legal_name.split()),
            "address": "\n".join(" ".join(line.split()) for line in address.strip().splitlines() if line.strip()),
            "country": country,
            "region": region,
            "vat_id": checked_vat_id(vat_id, country=country),
        },
    )
    audit.record(actor=user, party=party, action="billing.changed", target=f"party:{party.pk}")
    return profile


def require_profile(party: Party) -> BillingProfile:
    """Raise if nobody said yet how the party is billed.

    Raises:
        InvalidInput: see above.
    """
    profile = BillingProfile.objects.filter(party=party).first()
    if profile is None:
        raise InvalidInput(
            f"An invoice names the buyer: fill in {party.name}'s billing address first.",
            pointers={"/billing": "missing"},
        )
    return profile


@transaction.atomic
def add_tax_rate(
    *,
    jurisdiction: str,
    name: str,
    rate_bps: int,
    valid_from: date,
    valid_until: date | None = None,
    is_reversed: bool = False,
    user: User,
) -> TaxRate:
    """Tax what is sold in a jurisdiction from a day on; what was asked for before stays as it is.

    Raises:
        NotAllowed: the user is not staff.
        InvalidInput: it overlaps another of the jurisdiction, begins in the past, or is no rate.
    """
    require_staff(user=user, to="set tax rates")
    if not re.fullmatch(r"[A-Z]{2}(-[A-Z0-9]{1,3})?", jurisdiction):
        raise InvalidInput(
            f"{jurisdiction} is no place; write DE, or US-CA (ISO 3166).", pointers={"/jurisdiction": "no place"}
        )
    if valid_from < clock.today():
        raise InvalidInput("A rate begins today or later.", pointers={"/valid_from": "in the past"})
    try:
        with transaction.atomic():
            rate = TaxRate.objects.create(
                jurisdiction=jurisdiction,
                name=name,
                rate_bps=rate_bps,
                valid_from=valid_from,
                valid_until=valid_until,
                is_reversed=is_reversed,
                created_by=user,
            )
    except IntegrityError as error:
        raise InvalidInput(
            f"{jurisdiction} cannot have this rate from {valid_from}: it is no rate from 0.01 to 100 %, no place such as DE or "
            "US-CA, or another one is valid then. End that one first.",
            pointers={"/jurisdiction": "overlaps, or is no rate"},
        ) from error
    audit.record(actor=user, action="tax_rate.added", target=f"tax_rate:{rate.pk}", rate_bps=rate_bps)
    return rate


@transaction.atomic
def end_tax_rate(*, rate: TaxRate, last_day: date, user: User) -> TaxRate:
    """Give an open-ended rate its last day, once; the same day again changes nothing.

    Raises:
        NotAllowed: the user is not staff.
        InvalidInput: a day that has passed or comes before its first, or it has another last day.
    """
    require_staff(user=user, to="set tax rates")
    rate = TaxRate.objects.select_for_update(of=("self",)).get(pk=rate.pk)
    if rate.valid_until == last_day:
        return rate
    if rate.valid_until is not None:
        raise InvalidInput(f"{rate} ends on {rate.valid_until} already.", pointers={"/valid_until": "ends already"})
    if last_day < max(rate.valid_from, clock.today()):
        raise InvalidInput(
            f"{rate} cannot end on {last_day}: it is valid from {rate.valid_from}, and what was asked for stays as it is.",
            pointers={"/valid_until": "too early"},
        )
    rate.valid_until = last_day
    rate.save(update_fields=["valid_until"])
    audit.record(actor=user, action="tax_rate.ended", target=f"tax_rate:{rate.pk}", last_day=f"{last_day}")
    return rate
