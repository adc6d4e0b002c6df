"""The only writer of money: balanced entries, each exactly once.

PostgreSQL refuses what must not be (migration `0002_ledger_rules`); what is checked here as well is checked for a better
message. Debits are positive, credits negative.
"""

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from itertools import islice
from typing import TypeVar

from django.db import transaction
from django.db.models import Sum

from marketplace import clock
from marketplace.errors import DomainError
from payouts import chart
from payouts.models import Account, JournalEntry, Posting
from payouts.models.ledger import MAX_LEGS

__all__ = ["MAX_LEGS", "EntryKeyReused", "balance", "balances", "batches", "post", "reverse"]

T = TypeVar("T")


class EntryKeyReused(DomainError):
    """The key names an entry with other contents; nothing was booked."""

    code = "entry_key_reused"


@transaction.atomic
def post(
    *,
    key: str,
    kind: JournalEntry.Kind,
    postings: Mapping[str, int],
    booked_at: datetime | None = None,
    reverses: JournalEntry | None = None,
) -> JournalEntry:
    """Write one balanced entry, exactly once per key; the second call finds the first one's.

    Args:
        postings: account code → micros, debits positive. Zero amounts are left out; accounts are opened as needed.
        booked_at: business time; now, by default.

    Raises:
        EntryKeyReused: the key was used before for something else.
        ValueError: the postings do not sum to zero, mix currencies, or are fewer than two or more than `MAX_LEGS`.
    """
    legs = {code: micros for code, micros in postings.items() if micros != 0}
    total = sum(legs.values())
    currencies = {chart.parse(code).currency for code in legs}
    if len(currencies) != 1 or total != 0 or not 2 <= len(legs) <= MAX_LEGS:
        raise ValueError(f"{key}: {len(legs)} legs in {sorted(currencies)} that sum to {total}")

    entry, is_new = JournalEntry.objects.get_or_create(
        key=key,
        defaults={
            "kind": kind,
            "currency": currencies.pop(),
            "n_legs": len(legs),
            "booked_at": booked_at or clock.now(),
            "reverses": reverses,
        },
    )
    if not is_new:
        if entry.kind != kind or entry.reverses_id != (reverses and reverses.pk) or postings_of(entry) != legs:
            raise EntryKeyReused(f"The key {key} was used before, for another entry of kind {entry.kind}.")
        return entry

    accounts = _open_accounts(legs)
    Posting.objects.bulk_create(
        Posting(entry=entry, leg=leg, account_id=accounts[code], amount_micros=micros)
        for leg, (code, micros) in enumerate(legs.items())
    )
    return entry


def reverse(
    entry: JournalEntry,
    *,
    key: str,
    kind: JournalEntry.Kind = JournalEntry.Kind.REVERSAL,
    booked_at: datetime | None = None,
) -> JournalEntry:
    """Book an entry back, once; the entry itself stays.

    Raises:
        EntryKeyReused: see `post`.
    """
    postings = {code: -micros for code, micros in postings_of(entry).items()}
    return post(key=key, kind=kind, postings=postings, booked_at=booked_at, reverses=entry)


def postings_of(entry: JournalEntry) -> dict[str, int]:
    return dict(entry.postings.order_by("leg").values_list("account__code", "amount_micros"))


def balance(code: str, *, before: datetime | None = None) -> int:
    """The sum of an account's postings in micros, of those booked before a business time if one is given.

    Raises:
        ValueError: no such account can exist.
    """
    chart.parse(code)
    postings = Posting.objects.filter(account__code=code)
    if before is not None:
        postings = postings.filter(entry__booked_at__lt=before)
    return int(postings.aggregate(sum=Sum("amount_micros"))["sum"] or 0)


def balances(*, prefix: str = "") -> dict[str, int]:
    """Micros by code, in order of codes, of every account under a prefix ("payable", "cash:pending") that is not at zero."""
    postings = Posting.objects.filter(account__code__startswith=f"{prefix}:") if prefix else Posting.objects.all()
    sums = postings.values("account__code").annotate(sum=Sum("amount_micros")).exclude(sum=0)
    return {row["account__code"]: int(row["sum"]) for row in sums.order_by("account__code")}


def batches(dues: Mapping[int, T], *, size: int) -> Iterator[dict[int, T]]:
    """Cut a division into parts that fit an entry, in order of keys, so that every re-run cuts it alike."""
    items = iter(sorted(dues.items()))
    while batch := dict(islice(items, size)):
        yield batch


def _open_accounts(codes: Iterable[str]) -> dict[str, int]:
    """The accounts' ids by code; those that are missing are made, in order of codes so that two writers wait, not deadlock."""
    wanted = sorted(codes)
    known = dict(Account.objects.filter(code__in=wanted).values_list("code", "pk"))
    missing = [code for code in wanted if code not in known]
    if not missing:
        return known
    parsed = {code: chart.parse(code) for code in missing}
    Account.objects.bulk_create(
        [
            Account(
                code=code,
                kind=of.purpose.kind,
                currency=of.currency,
                party_id=of.id if of.name == "payable" else None,
            )
            for code, of in parsed.items()
        ],
        ignore_conflicts=True,  # another writer may have opened it meanwhile
    )
    return dict(Account.objects.filter(code__in=wanted).values_list("code", "pk"))
