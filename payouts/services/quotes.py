"""What a model would owe on a revenue, before anything of it is bought: no result says yet what each dataset will do for it.

So three figures: by the number of records, which is what a declared model pays, and the least and the most that any result can
make of it. A dataset's part is `revenue · share · rate` up to its cap, and shares sum to 1: the sum is concave in them, so that
the least lies where one dataset has all of it, and the most is found by giving share to the highest rate until its cap binds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attribution.models import PPQ
from marketplace.errors import InvalidInput
from marketplace.models import Offer, Party
from marketplace.money import Money
from payouts.services.royalties import check_revenue

MAX_OFFERS = 200


@dataclass(frozen=True)
class PlannedLine:
    """One dataset's part if shares were those of the records."""

    offer: Offer
    n_records: int
    share_ppq: int
    amount: Money
    is_capped: bool


@dataclass(frozen=True)
class Plan:
    revenue: Money
    lines: list[PlannedLine]
    by_count: Money
    least: Money
    most: Money
    price: Money | None  # of the licenses, where all are in one currency


def quote_plan(
    *, offers: Sequence[Offer], revenue: Money, records: Mapping[int, int] | None = None, party: Party | None = None
) -> Plan:
    """What a model trained on these offers' datasets would owe on a revenue.

    Args:
        records: offer id → how many of its version's records are to be used; all of them, by default.
        party: whose model it is; nobody owes themselves.

    Raises:
        InvalidInput: no offers, too many, one dataset twice, more records than there are, or a revenue that cannot be.
    """
    check_revenue(revenue)
    if not 1 <= len(offers) <= MAX_OFFERS:
        raise InvalidInput(f"Plan with 1 to {MAX_OFFERS} datasets.", pointers={"/offers": "wrong number"})
    counts: dict[int, int] = {}
    for index, offer in enumerate(offers):
        if any(offer.dataset_id == other.dataset_id for other in offers[:index]):
            raise InvalidInput(
                f"{offer.dataset.title} is named twice.", pointers={f"/offers/{index}": "the same dataset again"}
            )
        most = offer.version.n_records
        counts[offer.pk] = (records or {}).get(offer.pk, most)
        if not 1 <= counts[offer.pk] <= most:
            raise InvalidInput(
                f"{offer.dataset.title} has {most:,} records; use 1 to {most:,} of them.",
                pointers={f"/records/{index}": "more than there are"},
            )
    owed = [offer for offer in offers if party is None or offer.dataset.owner_id != party.pk]
    rated = [offer for offer in owed if offer.royalty_bps]
    whole = sum(counts[offer.pk] for offer in rated)  # by count, data without a rate dilutes nothing
    lines = []
    for offer in owed:
        share = counts[offer.pk] * PPQ // whole if offer.royalty_bps else 0
        micros, is_capped = _part(offer, revenue, share)
        lines.append(PlannedLine(offer, counts[offer.pk], share, Money(micros, revenue.currency), is_capped))
    ends = [_part(offer, revenue, PPQ)[0] for offer in owed]  # an unrated one may turn out to have done everything
    currencies = {offer.currency for offer in offers}
    return Plan(
        revenue=revenue,
        lines=lines,
        by_count=Money(sum(line.amount.micros for line in lines), revenue.currency).floor_to_minor(),
        least=Money(min(ends, default=0), revenue.currency).floor_to_minor(),
        most=Money(_most(rated, revenue), revenue.currency).floor_to_minor(),
        price=Money(sum(offer.price_micros for offer in offers), currencies.pop()) if len(currencies) == 1 else None,
    )


def _part(offer: Offer, revenue: Money, share_ppq: int) -> tuple[int, bool]:
    """`revenue · share · rate`, and whether the cap binds; a cap binds revenue in its own currency only."""
    micros = revenue.micros * share_ppq * offer.royalty_bps // (PPQ * 10_000)
    cap = offer.royalty_cap_micros
    if cap is not None and offer.currency == revenue.currency and micros > cap:
        return cap, True
    return micros, False


def _most(rated: Sequence[Offer], revenue: Money) -> int:
    left, total = PPQ, 0
    for offer in sorted(rated, key=lambda offer: (-offer.royalty_bps, offer.pk)):
        micros, is_capped = _part(offer, revenue, left)
        total += micros
        if not is_capped:
            break
        left -= micros * PPQ * 10_000 // (revenue.micros * offer.royalty_bps)
    return total
