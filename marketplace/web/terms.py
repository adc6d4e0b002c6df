"""What a sale and a year of revenue would bring, in figures that a person can check in the head."""

from dataclasses import dataclass

from marketplace.money import MICROS, Money

REVENUE_MICROS = 10_000 * MICROS  # of the example's model
SHARE_BPS = 5_000  # of the example's dataset in that model


@dataclass(frozen=True)
class Example:
    """Where the price of one license goes, and what one model's revenue adds."""

    price: Money
    fee: Money
    upfront: Money
    pool: Money
    upfront_to_labellers: Money
    pool_to_labellers: Money
    upfront_bps: int
    pool_bps: int
    fee_bps: int
    labellers_bps: int
    royalty_bps: int
    royalty_cap: Money | None
    revenue: Money
    royalty: Money  # due from the licensee at that revenue, if this dataset's share were SHARE_BPS
    royalty_is_capped: bool

    @property
    def widths(self) -> dict[str, str]:
        """Of the drawn bar: x and width of each part, in per cent."""
        return {
            "upfront": f"{self.upfront_bps / 100:g}%",
            "pool_x": f"{self.upfront_bps / 100:g}%",
            "pool": f"{self.pool_bps / 100:g}%",
            "fee_x": f"{(self.upfront_bps + self.pool_bps) / 100:g}%",
            "fee": f"{self.fee_bps / 100:g}%",
        }


def example_sale(
    *,
    price: Money,
    platform_fee_bps: int,
    upfront_bps: int,
    pool_bps: int,
    labellers_bps: int,
    royalty_bps: int,
    royalty_cap: Money | None,
) -> Example:
    upfront, pool = price.share(upfront_bps), price.share(pool_bps)
    revenue = Money(REVENUE_MICROS, price.currency)
    uncapped = revenue.share(SHARE_BPS).share(royalty_bps)
    is_capped = royalty_cap is not None and royalty_cap < uncapped
    return Example(
        price=price,
        fee=price - upfront - pool,
        upfront=upfront,
        pool=pool,
        upfront_to_labellers=upfront.share(labellers_bps),
        pool_to_labellers=pool.share(labellers_bps),
        upfront_bps=upfront_bps,
        pool_bps=pool_bps,
        fee_bps=platform_fee_bps,
        labellers_bps=labellers_bps,
        royalty_bps=royalty_bps,
        royalty_cap=royalty_cap,
        revenue=revenue,
        royalty=royalty_cap if is_capped and royalty_cap else uncapped,
        royalty_is_capped=is_capped,
    )
