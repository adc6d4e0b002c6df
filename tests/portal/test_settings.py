"""Production does not start half configured, and never for play money."""

import os
import subprocess
import sys

import pytest

PRODUCTION = {
    "RESIDUAL_MODE": "production",
    "SECRET_KEY": "long and random",
    "FINGERPRINT_KEY": "long, random and never changed",
    "BANK_DETAILS_KEY": "long, random and another",
    "BASE_URL": "https://residual.example",
    "ALLOWED_HOSTS": "residual.example",
    "DATABASE_URL": "postgres://residual_app@db.internal/residual",
    "REDIS_URL": "redis://redis.internal/0",
    "STRIPE_API_KEY": "rk_live_x",
    "STRIPE_WEBHOOK_SECRET": "whsec_a",
    "STRIPE_CONNECT_WEBHOOK_SECRET": "whsec_b",
}


def _start(**changes: str | None) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in (PRODUCTION | changes).items() if value is not None}
    return subprocess.run(
        [sys.executable, "-c", "import portal.settings; print(portal.settings.BANK_DETAILS_KEY)"],
        env={"PATH": os.environ["PATH"]} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_production_starts_with_everything_it_needs() -> None:
    assert _start().returncode == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RESIDUAL_MODE": None}, "RESIDUAL_MODE"),
        ({"RESIDUAL_MODE": "staging"}, "RESIDUAL_MODE is 'staging'"),
        ({"DATABASE_URL": None}, "DATABASE_URL"),
        ({"DATABASE_URL": "sqlite:///db"}, "PostgreSQL"),
        ({"REDIS_URL": None}, "REDIS_URL"),
        ({"STRIPE_API_KEY": None}, "STRIPE_API_KEY is missing"),
        ({"STRIPE_API_KEY": "sk_test_x"}, "test key"),
        ({"STRIPE_API_BASE": "http://127.0.0.1:1"}, "local Stripe"),
        ({"STRIPE_WEBHOOK_SECRET": None}, "STRIPE_WEBHOOK_SECRET"),
        ({"FINGERPRINT_KEY": ""}, "FINGERPRINT_KEY"),
        ({"BANK_DETAILS_KEY": None}, "python -c 'import secrets; print(secrets.token_urlsafe(50))'"),
        ({"BANK_DETAILS_KEY": ""}, "BANK_DETAILS_KEY is missing"),
        ({"DEBUG": "true"}, "DEBUG=false"),
    ],
)
def test_production_says_what_is_missing_and_does_not_start(changes: dict[str, str | None], said: str) -> None:
    refused = _start(**changes)

    assert refused.returncode != 0
    assert said in refused.stderr.splitlines()[-1]


@pytest.mark.parametrize("process", ["ingest", "attribution", "default", "payments", "beat"])
def test_what_opens_no_bank_details_starts_without_their_key(process: str) -> None:
    assert _start(RESIDUAL_PROCESS=process, BANK_DETAILS_KEY=None).stdout == "\n"


def test_the_demo_seals_bank_details_under_a_key_of_their_own_that_stays() -> None:
    demo: dict[str, str | None] = {"RESIDUAL_MODE": "demo", "STRIPE_API_KEY": None, "BANK_DETAILS_KEY": None}
    key, again, other = (_start(**demo, SECRET_KEY=secret).stdout.strip() for secret in ("one", "one", "another"))

    assert key == again and len({key, other, "one", PRODUCTION["FINGERPRINT_KEY"], ""}) == 5
    assert _start(**demo | {"BANK_DETAILS_KEY": "given"}).stdout.strip() == "given"
