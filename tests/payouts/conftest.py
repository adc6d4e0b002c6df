"""A database in which tests may commit, and a local Stripe that the services talk to."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from django.db import connection

from marketplace.models import Party
from payouts.local_stripe import process
from payouts.models import PayeeAccount, StripeEvent
from payouts.services import payees

CARD = {"email": "carol@example.org", "card_number": "4242424242424242", "expiry": "12/34", "cvc": "123", "name": "C"}
BANK = {"name": "A. Payee", "country": "DE", "account_number": "DE89370400440532013000"}
DAY = 24 * 3600


@pytest.fixture(autouse=True)
def quick_passwords(settings: Any) -> None:
    """No test here is about passwords, and hashing them well takes a third of a second each."""
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]


@contextmanager
def as_owner() -> Iterator[None]:
    """Inside a test's transaction: what the owner of the tables may do, and no service."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_user")
        (role,) = cursor.fetchone()
        cursor.execute("SET LOCAL ROLE NONE")
    yield
    with connection.cursor() as cursor:
        cursor.execute("SELECT set_config('role', %s, true)", [role])


def switch_off(trigger: str, *, table: str) -> None:
    """As the owner could, so that what the database's rules refuse can be looked for."""
    with as_owner(), connection.cursor() as cursor:
        cursor.execute(f"SET CONSTRAINTS ALL IMMEDIATE; ALTER TABLE {table} DISABLE TRIGGER {trigger}")
        cursor.execute("SET CONSTRAINTS ALL DEFERRED")


@dataclass
class StripeWorld:
    """The local Stripe as a buyer, a payee and time act on it."""

    handle: process.Handle

    def pay(self, url: str, *, card: str = CARD["card_number"]) -> None:
        """What a buyer does on the checkout's page."""
        answer = httpx.post(url, data=CARD | {"card_number": card})
        assert answer.status_code == 303, answer.text

    def debit(self, url: str, *, account: str = "000123456789") -> None:
        """The same from a US bank account, whose bank takes four days to say whether it goes through."""
        given = {"method": "us_bank_account", "account_number": account, "routing_number": "110000000"}
        answer = httpx.post(url, data=given | {"bank_email": CARD["email"], "bank_name": CARD["name"]})
        assert answer.status_code == 303, answer.text

    def advance(self, *, days: float) -> None:
        self._control("POST", "clock", json={"advance_seconds": int(days * DAY)})

    def onboard(self, party: Party, **given: str) -> PayeeAccount:
        """What a payee does on Stripe's onboarding page, and the event that follows."""
        if "country" in given:
            Party.objects.filter(pk=party.pk).update(country=given["country"])
            party.refresh_from_db()
        url = payees.start_onboarding(party=party, return_url="http://shop.test/", refresh_url="http://shop.test/")
        answer = httpx.post(url, data=BANK | given)
        assert answer.status_code == 303, answer.text
        account = PayeeAccount.objects.get(party=party).stripe_account_id
        payee = payees.refresh_payee(account)
        assert payee is not None and payee.is_ready
        return payee

    def objects(self, path: str, **headers: str) -> list[dict[str, Any]]:
        """A whole list of Stripe's, newest first."""
        answer = httpx.get(f"{self.handle.url}/v1/{path}", auth=(self.handle.secret_key, ""), headers=headers)
        assert answer.status_code == 200, answer.text
        found: list[dict[str, Any]] = answer.json()["data"]
        return found

    def events(self, kind: str) -> list[dict[str, Any]]:
        return self.objects(f"events?type={kind}&limit=100")

    def received(self, told: dict[str, Any], *, endpoint: str = "platform") -> StripeEvent:
        """An event as the webhook keeps it; the same one again is the same row."""
        row, _ = StripeEvent.objects.get_or_create(
            event_id=told["id"],
            defaults={"endpoint": endpoint, "type": told["type"], "payload": json.dumps(told)},
        )
        return row

    def dispute(self, **given: Any) -> dict[str, Any]:
        """What the cardholder does (`charge`, and perhaps `amount`), or their bank (`dispute` and `verdict`)."""
        found: dict[str, Any] = self._control("POST", "disputes", json=given)
        return found

    def _control(self, method: str, what: str, **given: Any) -> Any:
        answer = httpx.request(
            method, f"{self.handle.url}/_control/{what}", auth=(self.handle.secret_key, ""), timeout=30, **given
        )
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture
def stripe(tmp_path: Path, settings: Any) -> Iterator[StripeWorld]:
    """A local Stripe of this test's own, so that its balance is this test's ledger's; each of its answers is checked."""
    handle = process.start(tmp_path / "stripe", secret_key="sk_test_of_the_services", payout_days=1)
    settings.STRIPE_API_BASE, settings.STRIPE_API_KEY = handle.url, handle.secret_key
    yield StripeWorld(handle)
    handle.kill()
    assert "Traceback" not in handle.log.read_text(encoding="utf-8")


@dataclass
class Door:
    """A door before the local Stripe that can answer for it: as Stripe does, it repeats a 5xx under its idempotency key."""

    url: str
    refuse_with: int | None = None  # answer every new POST of an effect with this
    keys: list[str] = field(default_factory=list)  # of every POST, in order
    remembered: dict[str, int] = field(default_factory=dict)


@pytest.fixture
def door(stripe: StripeWorld, settings: Any) -> Iterator[Door]:
    """The services talk to Stripe through it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            key = self.headers.get("Idempotency-Key", "")
            given = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.command == "POST":
                kept.keys.append(key)
                is_replayed = key in kept.remembered
                status = kept.remembered.get(key) or kept.refuse_with
                if status is not None:
                    if status >= 500:
                        kept.remembered[key] = status
                    error = b'{"error": {"type": "api_error", "message": "sk_test_secret is not yours to read."}}'
                    self.answer(status, error, {"Idempotent-Replayed": "true"} if is_replayed else {})
                    return
            passed = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
            answer = httpx.request(self.command, f"{stripe.handle.url}{self.path}", headers=passed, content=given)
            self.answer(answer.status_code, answer.content, {})

        do_GET = do_POST

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kept = Door(f"http://127.0.0.1:{server.server_port}")
    settings.STRIPE_API_BASE = kept.url
    yield kept
    server.shutdown()
    server.server_close()
