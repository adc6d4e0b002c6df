"""Payees whom Stripe does not reach: told so beforehand, they accrue, and staff send it over another rail.

    proposed   by one of the staff: what is due to each of them, nothing booked
    intended   another one approved: payable → in_transit_rail, out of what the platform's bank account holds
    sent       the bank's reference is confirmed: in_transit_rail → bank
    returned   it came back, or never left: booked back to payable

Bank details are not kept here: the file names each payee and their address for whoever holds them at the other rail.
"""

import logging
from collections.abc import Iterator

from django.conf import settings
from django.db import transaction
from django.db.models import QuerySet

from marketplace import clock
from marketplace.csv_cells import cell_text, written
from marketplace.errors import InvalidInput
from marketplace.models import Membership, Party, User
from marketplace.money import MINOR_DIGITS, Money
from marketplace.services import audit
from payouts import chart, gateway, ledger
from payouts.errors import AlreadyDecided, FourEyes, NothingOwed
from payouts.models import DivisionLine, JournalEntry, PayeeAccount, RailExport, RailPayout, ServedCountries
from payouts.services import recoveries, transfers

logger = logging.getLogger(__name__)

COLUMNS = ["export", "payout", "party", "name", "country", "email", "currency", "amount", "reference", "status"]


# --- whom Stripe reaches ----------------------------------------------------------------------------------------------
def ask_served_countries() -> ServedCountries:
    """Write down where Stripe says that it transfers to from the platform's country; a row only if it has changed.

    Raises:
        gateway.StripeRefused, gateway.StripeUncertain: ask again.
    """
    countries = sorted(gateway.transfer_countries(settings.STRIPE_PLATFORM_COUNTRY))
    latest = ServedCountries.objects.filter(platform_country=settings.STRIPE_PLATFORM_COUNTRY).first()
    if latest is not None and latest.countries == countries:
        return latest
    return ServedCountries.objects.create(platform_country=settings.STRIPE_PLATFORM_COUNTRY, countries=countries)


def is_served(country: str) -> bool | None:
    """Whether Stripe can pay to a country; None while nobody knows: no country, or Stripe was not asked yet."""
    latest = ServedCountries.objects.filter(platform_country=settings.STRIPE_PLATFORM_COUNTRY).first()
    if latest is None or not country:
        return None
    return country in latest.countries


def unserved_parties() -> QuerySet[Party]:
    """Parties with a country that Stripe does not reach, and no account at Stripe that it could pay."""
    latest = ServedCountries.objects.filter(platform_country=settings.STRIPE_PLATFORM_COUNTRY).first()
    if latest is None:
        return Party.objects.none()
    ready = PayeeAccount.objects.filter(transfers_active=True)
    return Party.objects.exclude(country="").exclude(country__in=latest.countries).exclude(pk__in=ready.values("party"))


# --- an export --------------------------------------------------------------------------------------------------------
@transaction.atomic
def propose_export(*, user: User, currency: str, key: str) -> RailExport:
    """Gather what is due to everybody whom Stripe does not reach, in one currency; the same key proposes once.

    Raises:
        FourEyes: the user is not of the staff.
        InvalidInput: a currency in which no balance is held.
        NothingOwed: nothing is due, or it is all in an open export.
    """
    _require_staff(user)
    if currency not in MINOR_DIGITS:
        raise InvalidInput(f"No balance is held in {currency!r}.", pointers={"/currency": "unknown"})
    if known := RailExport.objects.filter(key=key).first():
        return known
    now = clock.now()
    recoveries.lock(currency)  # nothing is promised or taken back meanwhile
    with_lines = DivisionLine.objects.filter(division__currency=currency, due_at__lte=now)
    open_ones = RailPayout.objects.filter(currency=currency, status__in=["proposed", "intended"])
    parties = unserved_parties().filter(pk__in=with_lines.values("party")).exclude(pk__in=open_ones.values("party"))
    dues = [(party, due) for party in parties.order_by("pk") if (due := _due(party, currency))]
    if not dues:
        raise NothingOwed(f"Nothing in {currency} is due to a payee whom Stripe does not reach.")
    export = RailExport.objects.create(key=key, currency=currency, proposed_by=user, proposed_at=now)
    RailPayout.objects.bulk_create(
        RailPayout(export=export, party=party, amount_micros=due.micros, currency=currency) for party, due in dues
    )
    total = sum(due.micros for _, due in dues)
    audit.record(
        actor=user,
        action="rail_export.proposed",
        target=f"rail_export:{export.pk}",
        after={"payouts": len(dues), "micros": total, "currency": currency},
    )
    logger.info("Proposed export=%s payouts=%s micros=%s", export.pk, len(dues), total)
    return export


@transaction.atomic
def approve_export(*, export: RailExport, user: User) -> RailExport:
    """Book every payout of it as promised, as far as it is still due.

    Raises:
        FourEyes: the user proposed it, or is not of the staff.
        AlreadyDecided: another one was first.
        NothingOwed: the platform's bank account does not hold enough.
    """
    _require_staff(user)
    recoveries.lock(export.currency)
    export = _undecided(export, user)
    RailExport.objects.filter(pk=export.pk).update(
        status=RailExport.Status.APPROVED, decided_by=user, decided_at=clock.now()
    )
    promised = 0
    for payout in export.payouts.order_by("pk"):
        amount = min(payout.amount, _due(Party.objects.get(pk=payout.party_id), export.currency))
        if not amount:
            RailPayout.objects.filter(pk=payout.pk).update(status=RailPayout.Status.DROPPED)
            continue
        RailPayout.objects.filter(pk=payout.pk).update(
            status=RailPayout.Status.INTENDED, amount_micros=amount.micros, intended_at=clock.now()
        )
        ledger.post(
            key=f"rail:{payout.pk}:intent",
            kind=JournalEntry.Kind.RAIL_INTENT,
            postings={
                chart.payable(payout.party_id, export.currency): amount.micros,
                chart.in_transit_rail(export.currency): -amount.micros,
            },
        )
        promised += amount.micros
    held = ledger.balance(chart.bank(export.currency)) + ledger.balance(chart.in_transit_rail(export.currency))
    if held < 0:
        short = Money(-held, export.currency)
        raise NothingOwed(
            f"The bank account holds {short} too little for it. Withdraw that from Stripe, book it by a manual entry "
            f"(debit bank:{export.currency}), then approve."
        )
    audit.record(
        actor=user,
        action="rail_export.approved",
        target=f"rail_export:{export.pk}",
        before={"status": "awaiting"},
        after={"status": "approved", "micros": promised, "currency": export.currency},
    )
    logger.info("Approved export=%s micros=%s", export.pk, promised)
    export.refresh_from_db()
    return export


@transaction.atomic
def reject_export(*, export: RailExport, user: User) -> RailExport:
    """
    Raises:
        FourEyes, AlreadyDecided: see `approve_export`.
    """
    _require_staff(user)
    export = _undecided(export, user)
    RailExport.objects.filter(pk=export.pk).update(
        status=RailExport.Status.REJECTED, decided_by=user, decided_at=clock.now()
    )
    export.payouts.update(status=RailPayout.Status.DROPPED)
    audit.record(
        actor=user,
        action="rail_export.rejected",
        target=f"rail_export:{export.pk}",
        before={"status": "awaiting"},
        after={"status": "rejected"},
    )
    export.refresh_from_db()
    return export


@transaction.atomic
def confirm_sent(*, payout: RailPayout, user: User, reference: str) -> RailPayout:
    """The bank has sent it, under this reference; again, nothing happens.

    Raises:
        FourEyes: the user is not of the staff.
        InvalidInput: no reference, or it was not on its way.
    """
    return _end(payout, user, reference, to=RailPayout.Status.SENT)


@transaction.atomic
def confirm_returned(*, payout: RailPayout, user: User, reference: str) -> RailPayout:
    """The bank has sent it back, or never sent it: it is owed again; again, nothing happens.

    Raises:
        FourEyes, InvalidInput: see `confirm_sent`.
    """
    return _end(payout, user, reference, to=RailPayout.Status.RETURNED)


def export_rows(export: RailExport) -> Iterator[str]:
    """The file for the other rail, as CSV, streamed; no cell acts as a formula."""
    yield written(COLUMNS)
    payouts = export.payouts.exclude(status=RailPayout.Status.DROPPED).select_related("party").order_by("pk")
    for payout in payouts.iterator(chunk_size=500):
        owner = (
            Membership.objects.filter(party=payout.party_id, role=Membership.Role.OWNER)
            .select_related("user")
            .order_by("pk")
            .first()
        )
        yield written(
            [
                export.pk,
                payout.pk,
                str(payout.party.public_id),
                cell_text(payout.party.name),
                payout.party.country,
                cell_text(owner.user.email if owner else ""),
                payout.currency,
                payout.amount.amount_text(),
                f"RESIDUAL {payout.pk}",
                payout.status,
            ]
        )


def _end(payout: RailPayout, user: User, reference: str, *, to: RailPayout.Status) -> RailPayout:
    _require_staff(user)
    if not reference.strip():
        raise InvalidInput("Give the bank's reference.", pointers={"/reference": "missing"})
    recoveries.lock(payout.currency)
    payout = RailPayout.objects.select_for_update().get(pk=payout.pk)
    if payout.status == to:
        return payout
    was = payout.status
    if was not in RailPayout.STANDING or (to == RailPayout.Status.SENT and was != RailPayout.Status.INTENDED):
        raise InvalidInput(f"Rail payout {payout.pk} is {was}; it cannot be {to} now.")
    payout.status, payout.reference = to, reference.strip()[:80]
    payout.confirmed_by, payout.confirmed_at = user, clock.now()
    payout.save(update_fields=["status", "reference", "confirmed_by", "confirmed_at"])
    payable, promised = chart.payable(payout.party_id, payout.currency), chart.in_transit_rail(payout.currency)
    bank = chart.bank(payout.currency)
    if to == RailPayout.Status.SENT:
        kind, debit, credit = JournalEntry.Kind.RAIL_SENT, promised, bank
    elif was == RailPayout.Status.SENT:
        kind, debit, credit = JournalEntry.Kind.RAIL_REVERSAL, bank, payable
    else:
        kind, debit, credit = JournalEntry.Kind.RAIL_REVERSAL, promised, payable
    ledger.post(
        key=f"rail:{payout.pk}:{to.value}",
        kind=kind,
        postings={debit: payout.amount_micros, credit: -payout.amount_micros},
        booked_at=payout.confirmed_at,
    )
    audit.record(
        actor=user,
        action=f"rail_payout.{to.value}",
        target=f"rail_payout:{payout.pk}",
        party=payout.party,
        before={"status": was},
        after={"status": to.value, "reference": payout.reference},
    )
    if to == RailPayout.Status.RETURNED:
        recoveries.net(parties=[payout.party_id], currency=payout.currency)
    logger.info("Ended rail payout=%s status=%s", payout.pk, to)
    return payout


def _due(party: Party, currency: str) -> Money:
    """What may be promised to a party now: due, payable, and in whole minor units."""
    due = transfers.due_micros(party_id=party.pk, currency=currency, until=clock.now())
    payable = -ledger.balance(chart.payable(party.pk, currency))
    return Money(max(0, min(due, payable)), currency).floor_to_minor()


def _undecided(export: RailExport, user: User) -> RailExport:
    export = RailExport.objects.select_for_update().get(pk=export.pk)
    if export.proposed_by_id == user.pk:
        raise FourEyes("You proposed it; another one of the staff must decide.")
    if export.status != RailExport.Status.AWAITING:
        raise AlreadyDecided(f"Export {export.pk} is {export.status} already.")
    return export


def _require_staff(user: User) -> None:
    if not (user.is_active and user.is_staff):
        raise FourEyes("Only staff send money over another rail.")
