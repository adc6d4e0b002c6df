"""The amounts above which a payout run waits for a second person, as the setting writes them: one number, or one per currency."""

from marketplace.money import MINOR_DIGITS

#: Far above any run, and in micros still far below 2**63.
MOST = 10**12
HOW = "Write whole units: 10000 for every currency, or one each, as in USD=10000,JPY=1500000; a number without a currency is all others'."


def read_limits(text: str) -> dict[str, int]:
    """Currency → whole units. A currency that nothing is said of has 0: every run in it waits for a second person.

    Raises:
        ValueError: it is not such a list; the message says which part and how it is written.
    """
    given: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        currency, digits = name.strip(), number.strip()
        if ("=" in part) != bool(currency) or not (digits.isascii() and digits.isdigit()) or int(digits) > MOST:
            raise ValueError(f"{part.strip()!r} is no limit. {HOW}")
        if currency and currency not in MINOR_DIGITS:
            raise ValueError(f"No balance is held in {currency!r}, only in {', '.join(MINOR_DIGITS)}. {HOW}")
        if currency in given:
            raise ValueError(f"Two limits for {currency or 'every other currency'}. {HOW}")
        given[currency] = int(digits)
    return {currency: given.get(currency, given.get("", 0)) for currency in MINOR_DIGITS}
