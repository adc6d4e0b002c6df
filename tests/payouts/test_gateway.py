"""The door to Stripe, against the local Stripe over HTTP; and against a server that fails on purpose."""

import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import httpx
import pytest

from payouts import gateway
from payouts.gateway import BadSignature, CheckoutLine, StripeRefused, StripeUncertain
from payouts.local_stripe import process
from payouts.local_stripe.process import Handle

http = httpx.Client(timeout=30, limits=httpx.Limits(max_keepalive_connections=0))
KEY = "sk_test_the_gateways"
CARD = {"email": "carol@example.org", "expiry": "12/34", "cvc": "123", "name": "Carol"}
PENDING_CARD, AVAILABLE_CARD = "4242424242424242", "4000000000000077"
DAY = 24 * 3600


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Handle]:
    with process.start(tmp_path_factory.mktemp("stripe"), secret_key=KEY) as handle:
        yield handle


@pytest.fixture
def stripe_server(server: Handle, settings: Any) -> Handle:
    settings.STRIPE_API_KEY = KEY
    settings.STRIPE_API_BASE = server.url
    return server


def _checkout(key: str, *, amount_minor: int = 12_900, currency: str = "USD") -> gateway.CheckoutSession:
    return gateway.create_checkout(
        order_id="17",
        public_reference="R-17",
        lines=[CheckoutLine("Digits", amount_minor)],
        currency=currency,
        success_url="http://shop.test/done",
        cancel_url="http://shop.test/cart",
        key=key,
        metadata={"buyer": "5"},
        customer_email="carol@example.org",
    )


def _pay(session: gateway.CheckoutSession, card: str) -> int:
    return http.post(session.url, data=CARD | {"card_number": card}).status_code


def _payee(server: Handle) -> str:
    account = gateway.create_payee_account(party_id="9", country="DE", email="a@example.org", key=f"p{time.time_ns()}")
    link = gateway.create_onboarding_link(account=account, return_url="http://s.test/r", refresh_url="http://s.test/f")
    form = {"name": "Alice", "country": "DE", "account_number": "DE89370400440532013000"}
    assert http.post(link, data=form).status_code == 303
    return account


def _advance(server: Handle, seconds: int) -> None:
    http.post(f"{server.url}/_control/clock", json={"advance_seconds": seconds}, auth=(KEY, "")).raise_for_status()


def test_a_checkout_is_paid_and_carries_our_order(stripe_server: Handle) -> None:
    session = _checkout("checkout-1")
    assert _checkout("checkout-1") == session
    unpaid = gateway.get_checkout(session.id)
    assert (unpaid.is_paid, unpaid.charge, unpaid.fee_minor, unpaid.available_on) == (False, None, None, None)

    assert _pay(session, "4000000000000002") == 402
    assert gateway.get_checkout(session.id).charge is None  # the latest charge is a failed one
    assert _pay(session, PENDING_CARD) == 303
    paid = gateway.get_checkout(session.id)
    assert (paid.status, paid.is_paid, paid.amount_total_minor, paid.currency) == ("complete", True, 12_900, "USD")
    assert (paid.order_id, paid.public_reference, paid.metadata["buyer"]) == ("17", "R-17", "5")
    assert (paid.fee_minor, paid.net_minor, paid.booked_currency) == (404, 12_496, "USD")
    entry = list(gateway.balance_transactions())[-1]
    assert (entry.id, entry.source) == (paid.balance_transaction, paid.charge)
    assert paid.available_on == entry.available_on == entry.created_at + timedelta(days=2)


def test_a_payee_onboards_and_is_paid(stripe_server: Handle) -> None:
    new = gateway.create_payee_account(party_id="8", country="US", email="b@example.org", key="payee-new")
    state = gateway.get_account(new)
    assert (state.can_be_paid, state.details_submitted, state.disabled_reason) == (
        False,
        False,
        "requirements.past_due",
    )
    assert "external_account" in state.requirements

    payee = _payee(stripe_server)
    assert gateway.get_account(payee).can_be_paid
    assert gateway.get_account(payee).requirements == []
    _pay(_checkout("payee-funds"), AVAILABLE_CARD)
    pending, available = gateway.balance()["USD"]
    assert gateway.find_transfer("payout:1") is None
    sent = gateway.create_transfer(
        amount_minor=5_000,
        currency="USD",
        destination=payee,
        transfer_group="payout:1",
        key="payout:1:1",
        metadata={"payout": "1"},
    )
    assert (sent.amount_minor, sent.currency, sent.destination, sent.metadata) == (5_000, "USD", payee, {"payout": "1"})
    assert gateway.find_transfer("payout:1") == sent
    assert gateway.balance()["USD"] == (pending, available - 5_000)

    _advance(stripe_server, DAY)
    payouts = http.get(f"{stripe_server.url}/v1/payouts", auth=(KEY, ""), headers={"Stripe-Account": payee}).json()
    assert gateway.transfers_in_payout(account=payee, payout=payouts["data"][0]["id"]) == [sent.id]


def test_balance_transactions_come_oldest_first_from_a_cursor(stripe_server: Handle) -> None:
    for number in range(3):
        _pay(_checkout(f"cursor-{number}", amount_minor=1_000 + number), PENDING_CARD)
    everything = list(gateway.balance_transactions())

    assert [entry.amount_minor for entry in everything[-3:]] == [1_000, 1_001, 1_002]
    assert list(gateway.balance_transactions(since=everything[-3].id)) == everything[-2:]
    assert list(gateway.balance_transactions(since=everything[-1].id)) == []
    net = sum(entry.net_minor for entry in everything if entry.currency == "USD")
    assert net == sum(gateway.balance()["USD"])


def test_a_definite_refusal_says_so(stripe_server: Handle, settings: Any) -> None:
    payee = _payee(stripe_server)
    with pytest.raises(StripeRefused) as refused:
        gateway.create_transfer(
            amount_minor=10**8, currency="EUR", destination=payee, transfer_group="payout:2", key="payout:2:1"
        )
    assert (refused.value.code, refused.value.http_status) == ("balance_insufficient", 400)
    assert gateway.find_transfer("payout:2") is None

    with pytest.raises(StripeRefused) as missing:
        gateway.get_checkout("cs_test_none")
    assert (missing.value.code, missing.value.http_status) == ("resource_missing", 404)
    with pytest.raises(StripeRefused) as unknown:
        gateway.get_account("acct_none")
    assert (unknown.value.code, unknown.value.http_status) == ("account_invalid", 403)
    settings.STRIPE_API_KEY = "sk_test_wrong"
    with pytest.raises(StripeRefused) as stranger:
        gateway.balance()
    assert stranger.value.http_status == 401


def test_a_key_used_for_something_else_is_no_refusal(stripe_server: Handle) -> None:
    """Whoever used it may have succeeded: reversing the intent now could pay twice."""
    _checkout("reused", amount_minor=1_000)
    with pytest.raises(StripeUncertain) as uncertain:
        _checkout("reused", amount_minor=2_000)

    assert (uncertain.value.http_status, uncertain.value.is_key_spent) == (400, True)


def test_a_silent_or_absent_server_leaves_it_uncertain(settings: Any, monkeypatch: Any) -> None:
    settings.STRIPE_API_KEY = KEY
    settings.STRIPE_API_BASE = "http://127.0.0.1:9"  # the discard port: nobody listens
    with pytest.raises(StripeUncertain) as absent:
        gateway.balance()
    assert (absent.value.http_status, absent.value.is_key_spent) == (None, False)

    monkeypatch.setattr(gateway, "TIMEOUT_SECONDS", 0.2)
    with _failing(status=200, delay_seconds=1.0) as url:
        settings.STRIPE_API_BASE = url
        with pytest.raises(StripeUncertain) as silent:
            gateway.balance()
    assert (silent.value.http_status, silent.value.is_key_spent) == (None, False)


@pytest.mark.parametrize(
    ("status", "is_key_spent"), [(409, False), (429, False), (500, True), (502, True), (503, True), (504, True)]
)
def test_what_may_have_happened_is_uncertain(settings: Any, status: int, is_key_spent: bool) -> None:
    settings.STRIPE_API_KEY = KEY
    with _failing(status=status) as url:
        settings.STRIPE_API_BASE = url
        with pytest.raises(StripeUncertain) as uncertain:
            gateway.create_transfer(
                amount_minor=1, currency="USD", destination="acct_1", transfer_group="payout:3", key="payout:3:1"
            )

    assert (uncertain.value.http_status, uncertain.value.is_key_spent) == (status, is_key_spent)
    assert uncertain.value.retry_after_seconds == 7.0


def test_a_connection_stays_open_from_call_to_call_and_thread_to_thread(settings: Any) -> None:
    settings.STRIPE_API_KEY = KEY
    with _failing(status=429) as url:
        settings.STRIPE_API_BASE = url

        def ask() -> None:
            with pytest.raises(StripeUncertain):
                gateway.balance()

        for _ in range(3):
            ask()
            threading.Thread(target=ask).run()
            one = threading.Thread(target=ask)
            one.start()
            one.join()

        assert len(_failing.callers) == 1


def test_a_proxy_of_the_environment_is_used_unless_the_host_is_excepted(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.STRIPE_API_KEY = KEY
    with _failing(status=429) as url:
        monkeypatch.setenv("http_proxy", url)
        monkeypatch.setenv("no_proxy", "elsewhere.test")
        settings.STRIPE_API_BASE = "http://stripe.test"
        with pytest.raises(StripeUncertain) as through:
            gateway.balance()
        assert (through.value.http_status, _failing.paths) == (429, ["http://stripe.test/v1/balance"])

        settings.STRIPE_API_BASE = "http://elsewhere.test"  # nobody answers there
        with pytest.raises(StripeUncertain) as direct:
            gateway.balance()
    assert (direct.value.http_status, len(_failing.paths)) == (None, 1)


class _failing:
    """A server that answers everything alike; remembers who called the last one, and for what."""

    callers: ClassVar[set[tuple[str, int]]] = set()
    paths: ClassVar[list[str]] = []

    def __init__(self, *, status: int, delay_seconds: float = 0.0) -> None:
        self.callers.clear()
        self.paths.clear()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # connections stay open

            def do_GET(self) -> None:
                _failing.callers.add(self.client_address)
                _failing.paths.append(self.path)
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                time.sleep(delay_seconds)
                body = json.dumps({"error": {"type": "api_error", "message": "No."}}).encode()
                self.send_response(status)
                self.send_header("Retry-After", "7")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *arguments: Any) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()


SECRET = "whsec_ours"
PAYLOAD = json.dumps(
    {
        "id": "evt_1",
        "object": "event",
        "type": "payout.paid",
        "account": "acct_1",
        "created": 1_700_000_000,
        "data": {"object": {"id": "po_1", "object": "payout"}},
    }
).encode()


def _signed(payload: bytes, *, secret: str = SECRET, age_seconds: int = 0) -> str:
    moment = int(time.time()) - age_seconds
    return f"t={moment},v1={hmac.new(secret.encode(), f'{moment}.'.encode() + payload, hashlib.sha256).hexdigest()}"


def test_a_signed_event_is_read() -> None:
    event = gateway.parse_event(PAYLOAD, _signed(PAYLOAD), SECRET)

    assert (event.id, event.type, event.account, event.data["id"]) == ("evt_1", "payout.paid", "acct_1", "po_1")
    assert event.created_at.timestamp() == 1_700_000_000


@pytest.mark.parametrize(
    ("payload", "signature"),
    [
        (PAYLOAD, lambda: _signed(PAYLOAD, secret="whsec_theirs")),
        (PAYLOAD, lambda: _signed(PAYLOAD, age_seconds=301)),
        (PAYLOAD, lambda: _signed(PAYLOAD + b" ")),
        (PAYLOAD, lambda: ""),
        (PAYLOAD, lambda: "t=now,v1=abc"),
        (b"\xff", lambda: _signed(b"\xff")),
        (b"[]", lambda: _signed(b"[]")),
        (b"{}", lambda: _signed(b"{}")),
        (b"", lambda: _signed(b"")),
    ],
)
def test_anything_else_is_a_bad_signature(payload: bytes, signature: Callable[[], str]) -> None:
    with pytest.raises(BadSignature) as refused:
        gateway.parse_event(payload, signature(), SECRET)

    assert (refused.value.code, refused.value.status) == ("bad_signature", 400)


def test_an_empty_secret_verifies_nothing() -> None:
    with pytest.raises(ValueError, match="secret"):
        gateway.parse_event(PAYLOAD, _signed(PAYLOAD, secret=""), "")
