"""A local Stripe on a free port, spoken to with the real SDK; both directions are held against Stripe's document."""

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx
import pytest
import stripe

from payouts.local_stripe import process, schema
from payouts.local_stripe.process import Handle

KEY = "sk_test_the_tests_own"
CARD = {
    "email": "carol@example.org",
    "card_number": "4242 4242 4242 4242",
    "expiry": "12/34",
    "cvc": "123",
    "name": "C",
}
IBAN = {"name": "Alice", "country": "DE", "account_number": "DE89 3704 0044 0532 0130 00"}
DAY = 24 * 3600
#: One client for all, since each would read the system's certificates anew; no connection outlives the server it led to.
http = httpx.Client(timeout=30, limits=httpx.Limits(max_keepalive_connections=0))
_numbers = itertools.count(1)


class CheckedClient(stripe.RequestsClient):
    """The SDK's own transport; every request it sends and every answer it gets must agree with Stripe's document."""

    def request(self, method: str, url: str, headers: Any, post_data: Any = None) -> tuple[Any, int, Any]:
        parts = urlsplit(url)
        body, status, answer_headers = super().request(method, url, headers, post_data)
        if status == 200:  # a refused request may be wrong on purpose
            query, form = parse_qsl(parts.query), parse_qsl(post_data or "")
            schema.validate_request(method.upper(), parts.path, query=query, form=form)
        schema.validate_response(method.upper(), parts.path, status, json.loads(body))
        return body, status, answer_headers


@dataclass
class LocalStripe:
    """A running server and the ways in which the tests use it."""

    handle: Handle

    @property
    def url(self) -> str:
        return self.handle.url

    @property
    def sdk(self) -> Any:
        return stripe.StripeClient(
            KEY, base_addresses={"api": self.url}, max_network_retries=0, http_client=CheckedClient()
        ).v1

    def post(self, path: str, data: dict[str, Any], **headers: str) -> httpx.Response:
        return http.post(f"{self.url}{path}", data=data, headers=headers, auth=(KEY, ""))

    def get(self, path: str, **headers: str) -> httpx.Response:
        return http.get(f"{self.url}{path}", headers=headers, auth=(KEY, ""))

    def advance(self, seconds: int) -> int:
        answer = http.post(f"{self.url}/_control/clock", json={"advance_seconds": seconds}, auth=(KEY, ""))
        assert answer.status_code == 200, answer.text
        return int(answer.json()["now"])

    def now(self) -> int:
        return int(self.get("/_control/clock").json()["now"])

    def session(self, amount: int = 10_000, currency: str = "usd", **more: Any) -> Any:
        product = {"currency": currency, "unit_amount": amount, "product_data": {"name": "Digits"}}
        return self.sdk.checkout.sessions.create(
            {
                "mode": "payment",
                "line_items": [{"price_data": product, "quantity": 1}],
                "success_url": "http://shop.test/done?session={CHECKOUT_SESSION_ID}",
                "cancel_url": "http://shop.test/cart",
                **more,
            }
        )

    def paid(self, amount: int = 10_000, currency: str = "usd", *, card: str = "", **more: Any) -> Any:
        """A checkout session that was paid on its page; with its charge and balance transaction."""
        session = self.session(amount, currency, **more)
        answer = http.post(session.url, data=CARD | ({"card_number": card} if card else {}))
        assert answer.status_code == 303, answer.text
        expand = {"expand": ["payment_intent.latest_charge.balance_transaction"]}
        return self.sdk.checkout.sessions.retrieve(session.id, expand)

    def account(self, **more: Any) -> Any:
        return self.sdk.accounts.create(
            {
                "country": "DE",
                "email": f"payee{next(_numbers)}@example.org",
                "controller": {
                    "fees": {"payer": "application"},
                    "losses": {"payments": "application"},
                    "stripe_dashboard": {"type": "express"},
                },
                "capabilities": {"transfers": {"requested": True}},
                **more,
            }
        )

    def onboarded(self, **more: Any) -> str:
        account = self.account(**more)
        answer = http.post(self.onboarding_link(account.id), data=IBAN)
        assert answer.status_code == 303, answer.text
        return str(account.id)

    def onboarding_link(self, account: str) -> str:
        link = self.sdk.account_links.create(
            {
                "account": account,
                "type": "account_onboarding",
                "return_url": "http://shop.test/return",
                "refresh_url": "http://shop.test/refresh",
            }
        )
        return str(link.url)

    def funds(self, currency: str = "usd", *, account: str | None = None) -> tuple[int, int]:
        """(pending, available)."""
        balance = self.sdk.balance.retrieve({}, {"stripe_account": account} if account else {})
        held = [
            [entry.amount for entry in side if entry.currency == currency]
            for side in (balance.pending, balance.available)
        ]
        return sum(held[0]), sum(held[1])


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStripe]:
    """One server for all tests that leave its clock and balances usable: they compare before and after."""
    handle = process.start(tmp_path_factory.mktemp("stripe"), secret_key=KEY)
    yield LocalStripe(handle)
    handle.stop()
    assert "Traceback" not in handle.log.read_text(encoding="utf-8")


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Callable[..., LocalStripe]]:
    """Starts servers of this test's own on one data folder; what still runs at the end is killed."""
    started: list[Handle] = []

    def start(**options: Any) -> LocalStripe:
        started.append(process.start(tmp_path / "stripe", secret_key=KEY, **options))
        return LocalStripe(started[-1])

    yield start
    for handle in started:
        handle.kill()


@dataclass
class Receiver:
    """A webhook endpoint of the test's own; it answers `status` and keeps what it got."""

    url: str
    status: int = 200
    got: list[tuple[bytes, str]] = field(default_factory=list)  # (payload, Stripe-Signature)

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(payload) for payload, _ in self.got]

    def wait(self, *kinds: str, seconds: float = 10) -> list[dict[str, Any]]:
        """The events of these kinds, once each kind came."""
        deadline = time.monotonic() + seconds
        while not set(kinds) <= {event["type"] for event in self.events()}:
            assert time.monotonic() < deadline, f"only {[event['type'] for event in self.events()]}"
            time.sleep(0.02)
        return [event for event in self.events() if event["type"] in kinds]


@pytest.fixture
def receiver() -> Iterator[Callable[[], Receiver]]:
    servers = []

    def start() -> Receiver:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                payload = self.rfile.read(int(self.headers["Content-Length"]))
                kept.got.append((payload, self.headers["Stripe-Signature"]))
                self.send_response(kept.status)
                self.send_header("Location", "/elsewhere")
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                """Quiet."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        kept = Receiver(f"http://127.0.0.1:{server.server_port}/hook")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return kept

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
