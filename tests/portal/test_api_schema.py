import contextlib
import io
import json

import jsonschema
import pytest
from drf_spectacular.drainage import GENERATOR_STATS
from drf_spectacular.generators import SchemaGenerator
from drf_spectacular.validation import validate_schema
from rest_framework.test import APIClient

from tests.factories.marketplace import LicenseFactory, OrderFactory


@pytest.fixture(scope="module")
def schema():
    GENERATOR_STATS.reset()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        made = SchemaGenerator().get_schema(request=None, public=True)
    assert said.getvalue() == ""  # drf-spectacular warns on stderr
    return json.loads(json.dumps(made))


def test_the_document_is_valid_openapi(schema):
    validate_schema(schema)


def test_every_operation_is_described_and_says_how_it_refuses(schema):
    operations = [
        (f"{method} {path}", operation)
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    ]

    assert [name for name, operation in operations if not operation.get("summary")] == []
    assert [name for name, operation in operations if "default" not in operation["responses"]] == []
    ids = [operation["operationId"] for _, operation in operations]
    assert len(ids) == len(set(ids)) > 15


def test_what_needs_a_key_says_which_scope(schema):
    place = schema["paths"]["/api/v1/orders/"]["post"]
    browse = schema["paths"]["/api/v1/datasets/"]["get"]

    assert place["security"] == [{"apiKey": []}]
    assert "scope `buy`" in place["description"]
    assert "security" not in browse
    assert {p["name"]: p["required"] for p in place["parameters"]} == {"Idempotency-Key": True}


def test_an_example_shows_how_an_order_is_placed(schema):
    body = schema["paths"]["/api/v1/orders/"]["post"]["requestBody"]["content"]["application/json"]
    (example,) = body["examples"].values()

    jsonschema.validate(example["value"], _resolved(schema, body["schema"]))


@pytest.mark.parametrize(
    ("path", "make"),
    [
        ("/api/v1/orders/", lambda party: OrderFactory(buyer=party)),
        ("/api/v1/orders/", lambda party: LicenseFactory(licensee=party)),
        ("/api/v1/licenses/", lambda party: LicenseFactory(licensee=party)),
        ("/api/v1/datasets/", lambda party: LicenseFactory()),
        ("/api/v1/models/", lambda party: None),
        ("/api/v1/disclosures/", lambda party: None),
    ],
)
def test_answers_are_what_the_document_says(schema, carol, path, make):
    from marketplace.api.keys import create_api_key

    make(carol)
    client = APIClient()
    _, text = create_api_key(party=carol, user=carol.user, name="k", scopes=["read"])
    client.credentials(HTTP_AUTHORIZATION=f"Bearer {text}")

    answer = client.get(path)

    assert answer.status_code == 200
    stated = schema["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    jsonschema.Draft202012Validator(_resolved(schema, stated)).validate(answer.json())


def test_problems_are_what_the_document_says(schema, db):
    refused = APIClient().get("/api/v1/orders/")

    jsonschema.validate(refused.json(), schema["components"]["schemas"]["Problem"])


def test_the_site_serves_the_document_and_a_page_of_it(client, db):
    document = client.get("/api/v1/schema/?format=json")
    page = client.get("/api/v1/docs/")

    assert document.json()["info"]["title"] == "Residual API"
    assert page.status_code == 200
    text = page.content.decode()
    assert "/api/v1/orders/" in text and "Idempotency-Key" in text and "expected_total" in text
    assert "https://" not in text.replace("https://testserver", "")  # nothing from elsewhere
    assert "<style" not in text and "style=" not in text


def test_an_unknown_route_is_a_problem(client, db):
    for method in (client.get, client.post):
        refused = method("/api/v1/nothing/here/")
        assert (refused.status_code, refused["Content-Type"]) == (404, "application/problem+json")
        assert refused.json()["code"] == "not_found"


def test_the_disclosure_schema_is_served_as_it_is_in_the_repository(client, db):
    from marketplace.services.disclosures import SCHEMA_PATH

    served = client.get("/schemas/disclosure/1.json")

    assert (served.status_code, served["Content-Type"]) == (200, "application/schema+json")
    assert served.json() == json.loads(SCHEMA_PATH.read_text())


def _resolved(schema, part):
    return part | {"components": schema["components"]}
