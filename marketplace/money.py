"""Money: an integer number of micros (millionths of the currency unit) and a currency. Nothing else holds an amount."""

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Self

MICROS = 1_000_000
#: ISO 4217 exponents of the currencies in which the platform holds a Stripe balance; no exchange ever happens.
MINOR_DIGITS = {"USD": 2, "EUR": 2, "GBP": 2, "JPY": 0}
#: Far above any price, far below 2**63 micros, so that sums over a million lines still fit a bigint.
MAX_MICROS = 10**9 * MICROS
#: The least and the most that Stripe charges at once, in minor units; what is less waits, what is more is paid by bank transfer.
MIN_CHARGE_MINOR = {"USD": 50, "EUR": 50, "GBP": 30, "JPY": 50}
MAX_CHARGE_MINOR = {"USD": 99_999_999, "EUR": 99_999_999, "GBP": 99_999_999, "JPY": 99_999_999}


class InvalidMoney(ValueError):
    """The text or number is no amount that can be charged."""


@dataclass(frozen=True, order=False)
class Money:
    """An amount in one currency, exact to the micro."""

    micros: int
    currency: str

    def __post_init__(self) -> None:
        if not isinstance(self.micros, int) or isinstance(self.micros, bool):
            raise TypeError(f"micros must be an int, not {self.micros!r}")
        if self.currency not in MINOR_DIGITS:
            raise InvalidMoney(
                f"{self.currency!r} is not a currency of this marketplace; use one of {', '.join(MINOR_DIGITS)}."
            )

    @classmethod
    def parse(cls, text: str, currency: str) -> Self:
        """Read a decimal amount, as people and the API write it ("129.00").

        Raises:
            InvalidMoney: not a number, negative, beyond the largest amount, or finer than the currency's minor unit.
        """
        digits = MINOR_DIGITS.get(currency)
        if digits is None:
            raise InvalidMoney(
                f"{currency!r} is not a currency of this marketplace; use one of {', '.join(MINOR_DIGITS)}."
            )
        try:
            amount = Decimal(str(text).strip())
        except InvalidOperation:
            raise InvalidMoney(f"{text!r} is not a number; write it as 129.00.") from None
        if not amount.is_finite():
            raise InvalidMoney(f"{text!r} is not a finite number; write it as 129.00.")
        if amount < 0:
            raise InvalidMoney(f"{text} is negative; an amount is 0 or more.")
        if (
            amount > MAX_MICROS // MICROS
        ):  # before any scaling: 1e30 must not become a huge integer, nor 1e999999 overflow
            raise InvalidMoney(f"{text} is more than the largest amount, {MAX_MICROS // MICROS:,} {currency}.")
        if amount != round(amount, digits):
            raise InvalidMoney(f"{text} is finer than the smallest unit of {currency}; give at most {digits} decimals.")
        return cls(int(amount * MICROS), currency)

    @classmethod
    def from_minor(cls, minor: int, currency: str) -> Self:
        """From whole minor units (cents), as Stripe counts."""
        return cls(minor * cls.micros_per_minor(currency), currency)

    @staticmethod
    def micros_per_minor(currency: str) -> int:
        return MICROS // 10 ** MINOR_DIGITS[currency]

    def to_minor(self) -> int:
        """Whole minor units; the caller has already set a remainder aside.

        Raises:
            ValueError: the amount is not a whole number of minor units.
        """
        minor, rest = divmod(self.micros, self.micros_per_minor(self.currency))
        if rest:
            raise ValueError(f"{self} is not a whole number of minor units")
        return minor

    def floor_to_minor(self) -> Self:
        """The largest payable amount not above this one (toward zero)."""
        unit = self.micros_per_minor(self.currency)
        return type(self)(
            self.micros // unit * unit if self.micros >= 0 else -(-self.micros // unit * unit), self.currency
        )

    def share(self, bps: int) -> Self:
        """`bps` basis points of the amount, rounded down to the micro."""
        return type(self)(self.micros * bps // 10_000, self.currency)

    @property
    def decimal(self) -> Decimal:
        return Decimal(self.micros) / MICROS

    def amount_text(self, *, exact: bool = False) -> str:
        """ "1234.50": at least the currency's decimals; with `exact`, as many as the micros need, at most six."""
        digits = MINOR_DIGITS[self.currency]
        text = f"{self.decimal:.6f}"
        whole, fraction = text.split(".")
        kept = fraction.rstrip("0") if exact else fraction[:digits]
        kept = kept.ljust(digits, "0")
        return f"{whole}.{kept}" if kept else whole

    def __add__(self, other: "Money") -> Self:
        self._same(other)
        return type(self)(self.micros + other.micros, self.currency)

    def __sub__(self, other: "Money") -> Self:
        self._same(other)
        return type(self)(self.micros - other.micros, self.currency)

    def __neg__(self) -> Self:
        return type(self)(-self.micros, self.currency)

    def __lt__(self, other: "Money") -> bool:
        self._same(other)
        return self.micros < other.micros

    def __le__(self, other: "Money") -> bool:
        self._same(other)
        return self.micros <= other.micros

    def __bool__(self) -> bool:
        return self.micros != 0

    def __str__(self) -> str:
        return f"{self.amount_text(exact=True)} {self.currency}"

    def _same(self, other: "Money") -> None:
        if self.currency != other.currency:
            raise ValueError(f"{self} and {other} are of two currencies")
