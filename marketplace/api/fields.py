from typing import Any

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from marketplace.money import MINOR_DIGITS, InvalidMoney, Money


@extend_schema_field(
    {
        "type": "object",
        "required": ["amount", "currency"],
        "additionalProperties": False,
        "properties": {
            "amount": {"type": "string", "pattern": r"^\d+(\.\d+)?$", "example": "129.00"},
            "currency": {"type": "string", "enum": list(MINOR_DIGITS)},
        },
    }
)
class MoneyField(serializers.Field):
    """{"amount": "129.00", "currency": "USD"}: strings, not floats."""

    def to_representation(self, value: Money) -> dict[str, str]:
        return {"amount": value.amount_text(exact=True), "currency": value.currency}

    def to_internal_value(self, data: Any) -> Money:
        if not isinstance(data, dict) or set(data) != {"amount", "currency"}:
            raise serializers.ValidationError('Give {"amount": "129.00", "currency": "USD"}.')
        if not isinstance(data["amount"], str) or not isinstance(data["currency"], str):
            raise serializers.ValidationError('Both are strings: {"amount": "129.00", "currency": "USD"}.')
        try:
            return Money.parse(data["amount"], data["currency"])
        except InvalidMoney as error:
            raise serializers.ValidationError(str(error)) from None


@extend_schema_field(
    {
        "type": "object",
        "required": ["amount", "currency"],
        "additionalProperties": False,
        "properties": {
            "amount": {"type": "string", "pattern": r"^-?\d+(\.\d+)?$", "example": "-12.50"},
            "currency": {"type": "string", "enum": list(MINOR_DIGITS)},
        },
    }
)
class SignedMoneyField(MoneyField):
    """The same for what may stand below zero, such as a balance; only ever an answer."""
