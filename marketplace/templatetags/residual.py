"""How amounts, counts, shares and times are written on every page."""

from datetime import date, datetime
from decimal import Decimal

from django import template
from django.templatetags.static import static
from django.utils import timezone
from django.utils.formats import date_format
from django.utils.html import format_html
from django.utils.safestring import SafeString

from marketplace.money import Money

register = template.Library()

SYMBOLS = {"USD": "$", "EUR": "€", "GBP": "£", "JPY": "¥"}
MINUS = "−"  # U+2212 lines up with tabular figures; a hyphen does not


@register.filter
def money(amount: Money) -> str:
    """ "$1,234.50", rounded down to the currency's decimals."""
    return _written(amount, exact=False)


@register.filter
def exact_money(amount: Money) -> str:
    """ "$0.034512": as many decimals as the micros need, as a statement must show them."""
    return _written(amount, exact=True)


def _written(amount: Money, *, exact: bool) -> str:
    shown = Money(abs(amount.micros), amount.currency)
    whole, point, fraction = shown.amount_text(exact=exact).partition(".")
    return f"{MINUS if amount.micros < 0 else ''}{SYMBOLS[amount.currency]}{int(whole):,}{point}{fraction}"


@register.filter
def number(value: int) -> str:
    """1234567 → "1,234,567"."""
    return f"{value:,}".replace("-", MINUS)


@register.filter
def bps(value: int) -> str:
    """Basis points as per cent: 1250 → "12.5 %"."""
    return f"{Decimal(value) / 100:f}".rstrip("0").rstrip(".") + " %" if value % 100 else f"{value // 100} %"


@register.filter
def ppq(value: int) -> str:
    """Parts per quadrillion as per cent with two decimals."""
    return f"{Decimal(value) / 10**13:.2f} %"


@register.filter
def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as per cent: 0.1234 → "12.3 %"; nothing for None."""
    return "" if value is None else f"{100 * value:.{digits}f} %".replace("-", MINUS)


@register.filter
def decimals(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:,.{digits}f}".replace("-", MINUS)


@register.filter
def short_hash(value: str) -> str:
    return value[:12]


@register.simple_tag
def icon(name: str) -> SafeString:
    return format_html('<svg class="icon" aria-hidden="true"><use href="{}#{}"></use></svg>', static("icons.svg"), name)


@register.simple_tag
def when(at: datetime | date, detail: str = "day") -> SafeString:
    """<time> with a date people read; `detail="minute"` adds the time of day, in UTC as everything here."""
    if isinstance(at, datetime):
        at = at.astimezone(timezone.get_current_timezone())
        text = date_format(at, "j M Y, H:i") + " UTC" if detail == "minute" else date_format(at, "j M Y")
    else:
        text = date_format(at, "j M Y")
    return format_html('<time datetime="{}" class="nowrap">{}</time>', at.isoformat(), text)
