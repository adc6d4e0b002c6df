"""What a buyer paid behind a division, what of it the platform kept, and what was to be divided: a line's way from the top.

    a sale       price of the license → the platform's fee, the upfront share, the royalty pool
    a royalty    revenue × share × rate → the platform's fee, the payees' part

Told twice: by orders, offers and invoices, as a statement prints it; and by the stored shares and the ledger, as its proof does.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from django.db.models import Sum

from attribution.models import PPQ
from marketplace.money import Money
from payouts import chart
from payouts.allocation import allocate
from payouts.models import Division, JournalEntry, Posting, RoyaltyInvoiceLine, RoyaltyPool
from payouts.services import royalties

PRICE = "price of the license"
ROYALTY = "revenue × share × rate"
CAPPED = "revenue × share × rate, up to the license's cap"
DIFFERENCE = "difference to an earlier report"


@dataclass(frozen=True)
class Gross:
    """One line's way from what the buyer paid to what was to be divided; `pool` less what went back before is divided.

    `amount · fee_bps` is `fee` and `amount · pool_bps` is `pool`, to the micro or two that rounding leaves.
    """

    of: str
    amount: Money
    fee_bps: int
    fee: Money
    pool_bps: int
    pool: Money
    # Of a royalty: amount = revenue · share · rate, less what rounding the invoice to whole minor units took.
    revenue: Money | None = None
    share_ppq: int | None = None  # the dataset's part of what the model owes royalties on
    rate_bps: int | None = None

    @property
    def is_capped(self) -> bool:
        return self.of == CAPPED

    @property
    def is_difference(self) -> bool:
        return self.of == DIFFERENCE


def gross_of(divisions: Iterable[Division]) -> dict[int, Gross]:
    """Division → its gross, by the orders, offers and invoices behind it; one query, however many they are.

    Every division comes with its `order_line__offer`, `order_line__order` and `invoice_line__invoice__report`.
    """
    by_pk = {division.pk: division for division in divisions}
    invoices = {of.invoice_line.invoice_id for of in by_pk.values() if of.invoice_line is not None}
    amounts: dict[int, dict[int, int]] = defaultdict(dict)
    for invoice, line, micros in RoyaltyInvoiceLine.objects.filter(
        invoice__in=invoices, amount_micros__gt=0
    ).values_list("invoice", "pk", "amount_micros"):
        amounts[invoice][line] = micros
    return {
        pk: _of_sale(division)
        if division.invoice_line is None
        else _of_royalty(division.invoice_line, amounts[division.invoice_line.invoice_id])
        for pk, division in by_pk.items()
    }


def gross_by_ledger(division: Division) -> Gross:
    """The same by what the stored shares give and by what the sale's or royalty's entry credited."""
    currency = division.currency
    line = division.invoice_line
    if line is None:
        order_line = division.order_line
        assert order_line is not None
        pool = RoyaltyPool.objects.filter(order_line=order_line).first()
        upfront = _credited(chart.upfront(order_line, currency))
        pooled = _credited(chart.royalty_pool(pool)) if pool else 0
        fee = order_line.price.micros - upfront - pooled
        return _sale(division, fee, upfront if division.source == Division.Source.UPFRONT else pooled)
    due = royalties.datasets_due(line.result)
    share_ppq, rate_bps = next(
        ((one.share_ppq, one.rate_bps) for one in due if one.license.pk == line.license_id), (0, 0)
    )
    amount, pool_micros = _asked(line, due), _credited(chart.royalty(line, currency))
    return _royalty(line, amount, share_ppq, rate_bps, fee=amount - pool_micros)


def _of_sale(division: Division) -> Gross:
    assert division.order_line is not None
    price, offer = division.order_line.price, division.order_line.offer
    upfront, pooled = price.share(offer.upfront_bps).micros, price.share(offer.pool_bps).micros
    return _sale(
        division,
        price.micros - upfront - pooled,
        upfront if division.source == Division.Source.UPFRONT else pooled,
    )


def _sale(division: Division, fee: int, pool: int) -> Gross:
    assert division.order_line is not None
    offer, currency = division.order_line.offer, division.currency
    return Gross(
        of=PRICE,
        amount=division.order_line.price,
        fee_bps=offer.platform_fee_bps,
        fee=Money(fee, currency),
        pool_bps=offer.upfront_bps if division.source == Division.Source.UPFRONT else offer.pool_bps,
        pool=Money(pool, currency),
    )


def _of_royalty(line: RoyaltyInvoiceLine, amounts: dict[int, int]) -> Gross:
    fee = royalties.fees_of(line.invoice, amounts)[line.pk]
    return _royalty(line, line.amount_micros, line.share_ppq, line.rate_bps, fee=fee.micros)


def _royalty(line: RoyaltyInvoiceLine, amount: int, share_ppq: int, rate_bps: int, *, fee: int) -> Gross:
    invoice, currency = line.invoice, line.invoice.currency
    revenue = invoice.report.revenue
    missing = revenue.micros * share_ppq * rate_bps // (PPQ * 10_000) - amount
    if line.is_capped:
        of = CAPPED
    elif invoice.report.replaces_id is not None and missing >= Money.micros_per_minor(currency):
        of = DIFFERENCE  # rounding an invoice takes less than a minor unit of all its lines together
    else:
        of = ROYALTY
    return Gross(
        of=of,
        amount=Money(amount, currency),
        fee_bps=invoice.platform_fee_bps,
        fee=Money(fee, currency),
        pool_bps=10_000 - invoice.platform_fee_bps,
        pool=Money(amount - fee, currency),
        revenue=revenue,
        share_ppq=share_ppq,
        rate_bps=rate_bps,
    )


def _asked(line: RoyaltyInvoiceLine, due: "list[royalties.DatasetDue]") -> int:
    """What the invoice asks for this dataset; what a cap or an earlier report took off is known by the invoice alone."""
    invoice = line.invoice
    if invoice.report.replaces_id is not None or invoice.lines.filter(is_capped=True).exists():
        return line.amount_micros
    revenue = invoice.report.revenue_micros
    exact = {one.license.pk: revenue * one.share_ppq * one.rate_bps // (PPQ * 10_000) for one in due}
    asked = allocate(invoice.total, {license: micros for license, micros in exact.items() if micros})
    return asked[line.license_id].micros if line.license_id in asked else 0


def _credited(code: str) -> int:
    """What a sale or a royalty put on an account."""
    found = Posting.objects.filter(
        account__code=code,
        amount_micros__lt=0,
        entry__kind__in=[JournalEntry.Kind.SALE, JournalEntry.Kind.ROYALTY],
    )
    return -int(found.aggregate(sum=Sum("amount_micros", default=0))["sum"])
