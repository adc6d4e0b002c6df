"""Where payees whom Stripe does not reach are paid: entered by an owner, held for 72 hours, mailed about, shown only masked, erased."""

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass, fields

from cryptography.fernet import InvalidToken
from django.conf import settings
from django.db import transaction
from django.db.models import QuerySet
from django.urls import reverse
from stdnum import bic as stdnum_bic
from stdnum import exceptions as stdnum_errors
from stdnum import iban as stdnum_iban

from marketplace import clock, jobs
from marketplace.errors import InvalidInput
from marketplace.mail import send_mail
from marketplace.models import Party, User
from marketplace.money import MINOR_DIGITS
from marketplace.services import audit
from marketplace.services.authority import owners_emails, require_authority, require_staff
from payouts import sealing
from payouts.errors import BankDetailsInUse, PaidByStripe
from payouts.models import BankDetails, BankDetailsErasure, BankDetailsNotice, RailPayout
from payouts.models.bank_details import HOLD
from payouts.services import recoveries
from payouts.services.reach import is_unserved

logger = logging.getLogger(__name__)

LOOKS_LIKE_IBAN = re.compile(r"[A-Z]{2}[0-9]{2}")
ACCOUNT_NUMBER = re.compile(r"[A-Z0-9]{4,34}")
MAX_NAME, MAX_ADDRESS, MAX_REASON = 140, 500, 500


@dataclass(frozen=True)
class Details:
    """An account in plain, for whoever makes the transfer."""

    account_holder: str
    iban: str
    account_number: str
    bic: str
    bank: str
    address: str

    @property
    def account(self) -> str:
        return self.iban or self.account_number


NONE = Details("", "", "", "", "", "")


def set_details(
    *, party: Party, user: User, account_holder: str, account: str, address: str, bic: str = "", bank: str = ""
) -> BankDetails:
    """Say where the party is paid; from 72 hours on it is, until then nothing is. The same details again are the same row.

    Args:
        account: an IBAN, or an account number with the bank's BIC, or with its name and place.

    Raises:
        NotAllowed: the user may not act for the party.
        PaidByStripe: Stripe reaches it, and asks for its account on its own pages.
        InvalidInput: a name, account, BIC or address that cannot be; the pointer names it.
    """
    require_authority(user=user, party=party, to="say where it is paid")
    if not is_unserved(party):
        raise PaidByStripe(f"Stripe pays {party.name}, and asks for its bank account on its own pages.")
    given = _checked(account_holder, account, bic, bank, address)
    with transaction.atomic():
        Party.objects.select_for_update(of=("self",), no_key=True).get(pk=party.pk)  # one change after the other
        latest = latest_of(party)
        if latest is not None and _says(latest, given):
            return latest
        now = clock.now()
        details = BankDetails.objects.create(
            party=party,
            sealed=sealing.seal({one.name: getattr(given, one.name) for one in fields(given)}, party=party.pk),
            last_four=given.account[-4:],
            entered_by=user,
            entered_at=now,
            usable_from=now + HOLD,
        )
        audit.record(
            actor=user,
            action="bank_details.changed",
            target=f"party:{party.pk}",
            party=party,
            before={"details": latest and latest.pk},
            after={"details": details.pk, "usable_from": details.usable_from.isoformat()},
        )
        jobs.wake(BankDetailsNotice.objects.create(details=details))
    logger.info("Changed bank details party=%s details=%s", party.pk, details.pk)
    return details


def erase_details(*, party: Party, user: User) -> int:
    """Forget where the party is paid, whatever it ever entered: what is due waits until it enters an account; how many were erased.

    Harmless to call twice: nothing is left to erase.

    Raises:
        NotAllowed: the user may not act for the party.
        BankDetailsInUse: a transfer to one of the accounts is under way.
    """
    require_authority(user=user, party=party, to="erase where it is paid")
    return _erase(party, user, "")


def erase_on_request(*, party: Party, by: User, reason: str) -> int:
    """The same by the staff, where the payee asked for it otherwise.

    Args:
        reason: in words; an auditor reads it.

    Raises:
        NotAllowed: not staff.
        InvalidInput: no reason.
        BankDetailsInUse: see `erase_details`.
    """
    require_staff(user=by, to="erase a payee’s bank details")
    if not 1 <= len(reason.strip()) <= MAX_REASON:
        raise InvalidInput(
            f"Say who asked for it and how, in at most {MAX_REASON} characters.",
            pointers={"/reason": "too long" if reason.strip() else "missing"},
        )
    return _erase(party, by, reason.strip())


@transaction.atomic
def _erase(party: Party, user: User, reason: str) -> int:
    # The party first, as whoever gives money back to a buyer holds it first, and not against what merely refers to it.
    Party.objects.select_for_update(of=("self",), no_key=True).get(pk=party.pk)
    for currency in sorted(MINOR_DIGITS):
        recoveries.lock(currency)  # no export is approved meanwhile
    kept = list(kept_of([party.pk]).order_by("pk"))
    under_way = RailPayout.objects.filter(details__in=kept, status=RailPayout.Status.INTENDED).order_by("pk").first()
    if under_way is not None:
        raise BankDetailsInUse(
            f"Transfer {under_way.pk} of {under_way.amount} to this account is under way. Erase it once that is confirmed as sent, "
            "or as returned."
        )
    now = clock.now()
    for details in kept:
        BankDetailsErasure.objects.create(details=details, erased_by=user, erased_at=now, reason=reason)
    if kept:
        audit.record(
            actor=user,
            action="bank_details.erased",
            target=f"party:{party.pk}",
            party=party,
            before={"details": [details.pk for details in kept]},
            reason=reason,
        )
        logger.info("Erased bank details party=%s n=%s", party.pk, len(kept))
    return len(kept)


def kept_of(parties: Collection[int]) -> QuerySet[BankDetails]:
    """Whatever these parties entered and was not erased, newest first."""
    return BankDetails.objects.filter(party__in=parties, erasure=None)


def latest_of(party: Party) -> BankDetails | None:
    return kept_of([party.pk]).first()


def usable_of(parties: Collection[int]) -> dict[int, BankDetails]:
    """Party → where it is paid now; not those without details, nor those whose latest change is still held."""
    latest = kept_of(parties).order_by("party", "-pk").distinct("party")
    now = clock.now()
    return {details.party_id: details for details in latest if details.usable_from <= now}


def opened(details: BankDetails) -> Details:
    return Details(**sealing.unseal(details.sealed, party=details.party_id))


def _says(details: BankDetails, given: Details) -> bool:
    """Whether they are the same; what was sealed under another key is not."""
    try:
        return opened(details) == given
    except InvalidToken:
        return False


def send_notice(notice: BankDetailsNotice) -> None:
    """Tell every owner of the party."""
    details = notice.details
    if not details.sealed:  # erased before anybody was told: there is nothing to warn of
        return
    context = {
        "party": details.party,
        "details": details,
        "link": f"{settings.BASE_URL}{reverse('payee-bank')}",
    }
    for email in owners_emails(details.party):
        send_mail(
            "bank_details_changed",
            to=email,
            subject=f"The bank account of {details.party.name} was changed",
            context=context,
        )


def _checked(account_holder: str, account: str, bic: str, bank: str, address: str) -> Details:
    holder, bank = " ".join(account_holder.split()), " ".join(bank.split())
    address = "\n".join(line for part in address.splitlines() if (line := " ".join(part.split())))
    number = re.sub(r"[\s.-]", "", account).upper()
    if not 2 <= len(holder) <= MAX_NAME:
        raise InvalidInput("Name the account’s holder, as the bank does.", pointers={"/account_holder": "missing"})
    if not 5 <= len(address) <= MAX_ADDRESS:
        raise InvalidInput(
            f"Give the holder’s address, in at most {MAX_ADDRESS} characters: banks ask for it.",
            pointers={"/address": "missing" if len(address) < 5 else "too long"},
        )
    if len(bank) > MAX_NAME:
        raise InvalidInput(f"Name the bank in at most {MAX_NAME} characters.", pointers={"/bank": "too long"})
    is_iban = LOOKS_LIKE_IBAN.match(number) is not None
    if is_iban:
        try:
            number = stdnum_iban.validate(number)
        except stdnum_errors.ValidationError as error:
            raise InvalidInput(
                "This IBAN cannot be: a digit is wrong, missing or too many. Copy it from the bank’s own page.",
                pointers={"/account": "no such IBAN"},
            ) from error
    elif not ACCOUNT_NUMBER.fullmatch(number):
        raise InvalidInput(
            "Give an IBAN, or an account number of 4 to 34 letters and digits.",
            pointers={"/account": "no account number"},
        )
    if bic.strip():
        try:
            bic = stdnum_bic.validate(bic)
        except stdnum_errors.ValidationError as error:
            raise InvalidInput(
                "This BIC cannot be: it has 8 or 11 characters, the fifth and sixth of which name a country.",
                pointers={"/bic": "no such BIC"},
            ) from error
    elif not is_iban and len(bank) < 5:
        raise InvalidInput(
            "An account number alone does not say which bank: give its BIC, or its name and place.",
            pointers={"/bic": "missing"},
        )
    return Details(
        account_holder=holder,
        iban=number if is_iban else "",
        account_number="" if is_iban else number,
        bic=bic.strip(),
        bank=bank,
        address=address,
    )
