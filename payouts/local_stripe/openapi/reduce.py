"""Cut Stripe's OpenAPI document down to what the local Stripe speaks.

    python -m payouts.local_stripe.openapi.reduce spec3.json > payouts/local_stripe/openapi/spec3.reduced.json

Kept: the operations in `OPERATIONS` and every schema that they reach, through any number of references. Each of them is
verbatim; nothing inside an operation or a schema is edited, so a new document can be reduced again and compared.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OPERATIONS = {
    "/v1/account_links": ["post"],
    "/v1/accounts": ["get", "post"],
    "/v1/accounts/{account}": ["get", "post"],
    "/v1/balance": ["get"],
    "/v1/balance_transactions": ["get"],
    "/v1/balance_transactions/{id}": ["get"],
    "/v1/charges": ["get"],
    "/v1/charges/{charge}": ["get"],
    "/v1/checkout/sessions": ["get", "post"],
    "/v1/checkout/sessions/{session}": ["get"],
    "/v1/checkout/sessions/{session}/expire": ["post"],
    "/v1/checkout/sessions/{session}/line_items": ["get"],
    "/v1/country_specs/{country}": ["get"],
    "/v1/customers": ["get", "post"],
    "/v1/customers/{customer}": ["delete", "get", "post"],
    "/v1/disputes": ["get"],
    "/v1/disputes/{dispute}": ["get", "post"],
    "/v1/disputes/{dispute}/close": ["post"],
    "/v1/events": ["get"],
    "/v1/events/{id}": ["get"],
    "/v1/payment_intents": ["get"],
    "/v1/payment_intents/{intent}": ["get"],
    "/v1/payouts": ["get", "post"],
    "/v1/payouts/{payout}": ["get"],
    "/v1/refunds": ["get", "post"],
    "/v1/refunds/{refund}": ["get", "post"],
    "/v1/transfers": ["get", "post"],
    "/v1/transfers/{id}/reversals": ["get", "post"],
    "/v1/transfers/{transfer}": ["get", "post"],
    "/v1/transfers/{transfer}/reversals/{id}": ["get"],
    "/v1/webhook_endpoints": ["get", "post"],
    "/v1/webhook_endpoints/{webhook_endpoint}": ["delete", "get", "post"],
}
PREFIX = "#/components/schemas/"


def references(node: Any) -> Iterator[str]:
    """The schema names that a piece of the document refers to."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "$ref" and isinstance(value, str):
                yield value.removeprefix(PREFIX)
            else:
                yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def reduce(document: dict[str, Any]) -> dict[str, Any]:
    paths = {
        path: {method: document["paths"][path][method] for method in methods} for path, methods in OPERATIONS.items()
    }
    schemas = document["components"]["schemas"]
    reached: set[str] = set()
    waiting = list(references(paths))
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting.extend(references(schemas[name]))
    return {
        "openapi": document["openapi"],
        "info": document["info"],
        "paths": paths,
        "components": {"schemas": {name: schemas[name] for name in sorted(reached)}},
    }


def written(document: dict[str, Any]) -> str:
    """One line per operation path and per schema: a new version then gives a diff that names what changed."""

    def lines(entries: dict[str, Any]) -> str:
        return ",\n".join(f"{json.dumps(name)}:{json.dumps(entry, sort_keys=True)}" for name, entry in entries.items())

    return (
        f'{{"openapi":{json.dumps(document["openapi"])},\n"info":{json.dumps(document["info"])},\n'
        f'"paths":{{\n{lines(document["paths"])}\n}},\n'
        f'"components":{{"schemas":{{\n{lines(document["components"]["schemas"])}\n}}}}}}\n'
    )


if __name__ == "__main__":
    sys.stdout.write(written(reduce(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
