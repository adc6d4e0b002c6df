"""The chart of accounts: every code, and what each heap of money is for.

A code is a name, an id where there are many, and the currency last: `payable:17:USD`. An account exists from its first
posting on. Debits are positive: an asset or an expense stands above zero, a liability or a revenue below.
"""

from dataclasses import dataclass
from functools import lru_cache

from marketplace.models import OrderLine, Party
from marketplace.money import MINOR_DIGITS
from payouts.models import Account, Dispute, DivisionCorrection, RoyaltyInvoiceLine, RoyaltyPool, TaxRate


@dataclass(frozen=True)
class Purpose:
    kind: Account.Kind
    meaning: str
    has_id: bool = False


PURPOSES = {
    "cash:pending": Purpose(Account.Kind.ASSET, "charged, and not yet available at Stripe"),
    "cash:available": Purpose(Account.Kind.ASSET, "available at Stripe: what transfers are made of"),
    "expense:stripe_fees": Purpose(Account.Kind.EXPENSE, "what Stripe kept of the charges"),
    "revenue:platform_fee": Purpose(Account.Kind.REVENUE, "the platform's part of sales and royalties"),
    "clearing:upfront": Purpose(Account.Kind.LIABILITY, "an order line's upfront share on its way to payees", True),
    "clearing:royalty": Purpose(Account.Kind.LIABILITY, "an invoice line's part on its way to payees", True),
    "clearing:correction": Purpose(
        Account.Kind.LIABILITY, "from payees who had too much to those who had too little", True
    ),
    "tax": Purpose(Account.Kind.LIABILITY, "tax collected from buyers at one rate, owed to its office", True),
    "pool": Purpose(Account.Kind.LIABILITY, "an order line's royalty pool, until it is released", True),
    "payable": Purpose(Account.Kind.LIABILITY, "owed to a party", True),
    "in_transit": Purpose(Account.Kind.LIABILITY, "promised to a payee, and Stripe has not yet answered"),
    "refunding": Purpose(Account.Kind.LIABILITY, "promised to a buyer, and Stripe has not yet answered"),
    "surplus": Purpose(Account.Kind.LIABILITY, "charged, and for nothing that we sell, until it is refunded"),
    "dispute": Purpose(Account.Kind.ASSET, "taken by Stripe for a dispute, less what is frozen for it", True),
    "receivable": Purpose(Account.Kind.ASSET, "paid to a party for what went back since; from later earnings", True),
    "expense:dispute_fees": Purpose(Account.Kind.EXPENSE, "what Stripe keeps for disputes"),
    "expense:losses": Purpose(Account.Kind.EXPENSE, "what went back to buyers and no payee gives back"),
    "expense:other": Purpose(Account.Kind.EXPENSE, "what only a manual entry books"),
    "revenue:other": Purpose(Account.Kind.REVENUE, "what only a manual entry books"),
    "equity:owners": Purpose(Account.Kind.EQUITY, "what the platform's owners put in, less what they took out"),
    "bank": Purpose(
        Account.Kind.ASSET, "in our own bank account: buyers' transfers come to it, other rails are paid from it"
    ),
    "in_transit_rail": Purpose(Account.Kind.LIABILITY, "promised to a payee over another rail, not yet confirmed"),
    "refunding_bank": Purpose(
        Account.Kind.LIABILITY, "promised to a buyer by bank transfer, not yet confirmed as sent"
    ),
    "unapplied": Purpose(
        Account.Kind.LIABILITY, "arrived, and fits no invoice: its payer’s until it is applied or returned"
    ),
}


@dataclass(frozen=True)
class Code:
    """A code taken apart."""

    name: str
    id: int | None
    currency: str

    @property
    def purpose(self) -> Purpose:
        return PURPOSES[self.name]

    @property
    def party(self) -> int | None:
        """Whose account it is: what it is owed, and what it owes."""
        return self.id if self.name in ("payable", "receivable") else None


@lru_cache(maxsize=65_536)  # the same few thousand codes, over and over
def parse(code: str) -> Code:
    """Take a code apart.

    Raises:
        ValueError: no such account can exist.
    """
    rest, _, currency = code.rpartition(":")
    name, _, last = rest.rpartition(":")
    if currency in MINOR_DIGITS:
        if rest in PURPOSES and not PURPOSES[rest].has_id:
            return Code(rest, None, currency)
        if name in PURPOSES and PURPOSES[name].has_id and last.isascii() and last.isdigit() and last == str(int(last)):
            return Code(name, int(last), currency)
    raise ValueError(f"{code!r} is no account of the chart")


def currency_of(code: str) -> str:
    """Of a code that `parse` accepts."""
    return code.rpartition(":")[2]


def cash_pending(currency: str) -> str:
    return f"cash:pending:{currency}"


def cash_available(currency: str) -> str:
    return f"cash:available:{currency}"


def stripe_fees(currency: str) -> str:
    return f"expense:stripe_fees:{currency}"


def platform_fee(currency: str) -> str:
    return f"revenue:platform_fee:{currency}"


def upfront(line: OrderLine, currency: str) -> str:
    return f"clearing:upfront:{line.pk}:{currency}"


def royalty(line: RoyaltyInvoiceLine, currency: str) -> str:
    return f"clearing:royalty:{line.pk}:{currency}"


def correction(of: DivisionCorrection) -> str:
    return f"clearing:correction:{of.pk}:{of.division.currency}"


def tax(rate: TaxRate, currency: str) -> str:
    return f"tax:{rate.pk}:{currency}"


def royalty_pool(pool: RoyaltyPool) -> str:
    return f"pool:{pool.pk}:{pool.currency}"


def payable(party: Party | int, currency: str) -> str:
    return f"payable:{party if isinstance(party, int) else party.pk}:{currency}"


def in_transit(currency: str) -> str:
    return f"in_transit:{currency}"


def refunding(currency: str) -> str:
    return f"refunding:{currency}"


def surplus(currency: str) -> str:
    return f"surplus:{currency}"


def dispute(of: Dispute) -> str:
    return f"dispute:{of.pk}:{of.currency}"


def receivable(party: Party | int, currency: str) -> str:
    return f"receivable:{party if isinstance(party, int) else party.pk}:{currency}"


def dispute_fees(currency: str) -> str:
    return f"expense:dispute_fees:{currency}"


def losses(currency: str) -> str:
    return f"expense:losses:{currency}"


def bank(currency: str) -> str:
    return f"bank:{currency}"


def in_transit_rail(currency: str) -> str:
    return f"in_transit_rail:{currency}"


def refunding_bank(currency: str) -> str:
    return f"refunding_bank:{currency}"


def unapplied(currency: str) -> str:
    return f"unapplied:{currency}"
