"""The desk's navigation, and how its pages put codes, amounts in the audit log and what an event was about into words."""

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from django import template
from django.urls import reverse

from marketplace.money import MINOR_DIGITS, Money
from marketplace.templatetags.residual import exact_money

register = template.Library()

#: Group → its pages: key, label, name of the address. Every page of the desk is under one of them.
PAGES: dict[str, list[tuple[str, str, str]]] = {
    "Waiting": [("waiting", "Waiting", "desk")],
    "Buyers": [
        ("payments", "Payments", "desk-payments"),
        ("disputes", "Disputes", "desk-disputes"),
        ("invoices", "Invoices", "desk-invoices"),
        ("overdue", "Reports and reminders", "desk-overdue"),
        ("taxes", "Taxes", "desk-taxes"),
    ],
    "Payees": [
        ("payables", "Payables", "desk-payables"),
        ("runs", "Payout runs", "desk-payout-runs"),
        ("rails", "Other rails", "desk-rails"),
        ("pools", "Pools", "desk-pools"),
        ("divisions", "Divisions", "desk-divisions"),
    ],
    "Books": [
        ("trial-balance", "Trial balance and closing", "desk-trial-balance"),
        ("journal", "Journals", "desk-accounts"),
        ("manual", "Manual entries", "desk-manual-list"),
        ("bank", "Bank account", "desk-bank"),
        ("events", "Stripe’s events", "desk-events"),
        ("reconciliation", "Reconciliation", "desk-reconciliation"),
        ("audit", "Audit log", "desk-audit"),
        ("keys", "API keys", "desk-keys"),
    ],
}

#: What an audit event is about → the page that shows it, by the id after the colon.
TARGETS = {
    "dispute": "desk-dispute",
    "division": "desk-division",
    "manual_entry": "desk-manual",
    "party": "desk-payee",
    "payment": "desk-payment",
    "payout_run": "desk-payout-run",
    "rail_export": "desk-rail-export",
    "reconciliation": "desk-reconciliation-run",
}


@register.inclusion_tag("portal/_desk_tabs.html")
def desk_tabs(tab: str) -> dict[str, Any]:
    """The groups, and the pages of the group that `tab` is in."""
    group = next(name for name, pages in PAGES.items() if tab in [key for key, _, _ in pages])
    return {
        "tab": tab,
        "groups": [(name, pages[0][2], name == group) for name, pages in PAGES.items()],
        "pages": PAGES[group] if len(PAGES[group]) > 1 else [],
    }


@register.filter
def in_words(code: str) -> str:
    """ "rail_export.proposed" → "rail export proposed"."""
    return code.replace("_", " ").replace(".", " ")


@register.filter
def target_words(target: str) -> str:
    """ "manual_entry:3" → "manual entry 3"."""
    return target.replace("_", " ").replace(":", " ", 1)


@register.filter
def target_page(target: str) -> str:
    """The address of the desk's page about it; empty where there is none."""
    name, _, number = target.partition(":")
    if name in TARGETS and number.isascii() and number.isdigit() and len(number) < 19:
        return reverse(TARGETS[name], args=[int(number)])
    return ""


@register.filter
def detail_words(detail: dict[str, Any]) -> list[tuple[str, str]]:
    """An event's detail as pairs to read: nested names in one, micros as money where the currency is known."""
    return list(_pairs(detail, "", _currency_of(detail)))


def _currency_of(detail: dict[str, Any]) -> str:
    for value in detail.values():
        if isinstance(value, dict) and (found := _currency_of(value)):
            return found
    found = detail.get("currency", "")
    return found if found in MINOR_DIGITS else ""


def _pairs(detail: dict[str, Any], within: str, currency: str) -> Iterator[tuple[str, str]]:
    for name, value in sorted(detail.items(), key=lambda item: (item[0] == "after", item[0])):  # "before" before it
        if name == "currency" and any("micros" in other for other in detail):
            continue  # the amounts say it
        label = f"{within} {in_words(name)}".strip()
        if isinstance(value, dict):
            yield from _pairs(value, label, currency)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield _amount(name, label, value, currency)
        elif isinstance(value, list):
            yield label, ", ".join(map(str, value)) or "none"
        elif value is None or value == "":
            yield label, "none"
        else:
            yield label, str(value)


def _amount(name: str, label: str, value: int, currency: str) -> tuple[str, str]:
    """Micros by their name, or by the account code that is the name of a leg; else a count or an id."""
    code = name.rpartition(":")[2]
    if code in MINOR_DIGITS:
        side = "debit" if value >= 0 else "credit"
        return label, f"{side} {exact_money(Money(abs(value), code))}"
    if name.endswith("micros"):
        amount = exact_money(Money(value, currency)) if currency else f"{Decimal(value) / 1_000_000:,}"
        return label.removesuffix("micros").strip() or "amount", amount
    return label, str(value)


@register.filter
def debit(amount: Money) -> str:
    """The amount if it is a debit; nothing otherwise."""
    return exact_money(amount) if amount.micros > 0 else ""


@register.filter
def credit(amount: Money) -> str:
    """The amount, as a positive number, if it is a credit; nothing otherwise."""
    return exact_money(-amount) if amount.micros < 0 else ""


@register.filter
def with_side(balance: Money) -> str:
    """ "$12.00 Cr": a balance as bookkeepers write it."""
    if not balance:
        return exact_money(balance)
    return f"{debit(balance)} Dr" if balance.micros > 0 else f"{credit(balance)} Cr"
