import pytest

from marketplace.api.throttling import PartyThrottle


@pytest.fixture
def rates(monkeypatch):
    monkeypatch.setattr(PartyThrottle, "THROTTLE_RATES", {"party": "3/min", "anon": "2/min"})


def test_headers_say_what_is_left_until_nothing_is(api, carol, rates):
    client = api(carol)

    answers = [client.get("/api/v1/orders/") for _ in range(4)]

    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [answer["RateLimit"] for answer in answers] == [f'"default";r={left}' for left in (2, 1, 0, 0)]
    assert {answer["RateLimit-Policy"] for answer in answers} == {'"default";q=3;w=60'}
    assert 1 <= int(answers[-1]["Retry-After"]) <= 61
    assert (answers[-1]["Content-Type"], answers[-1].json()["code"]) == ("application/problem+json", "throttled")


def test_a_limit_is_a_partys_whatever_its_keys(api, carol, bob, rates):
    first, second, other = api(carol), api(carol), api(bob)
    for _ in range(3):
        first.get("/api/v1/orders/")

    assert second.get("/api/v1/orders/").status_code == 429
    assert other.get("/api/v1/orders/").status_code == 200


def test_without_a_key_the_address_is_limited(api, db, rates):
    assert [api().get("/api/v1/datasets/").status_code for _ in range(3)] == [200, 200, 429]


def test_pages_are_not_limited(client, db):
    assert "RateLimit" not in client.get("/healthz")
