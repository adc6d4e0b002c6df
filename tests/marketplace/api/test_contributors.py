import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from marketplace.models import Invitation
from marketplace.services.parties import introduce_party
from tests.factories.marketplace import DatasetFactory, PublishedVersionFactory


@pytest.fixture
def named(alice):
    """Two contributors whom alice's published file names."""
    parties = [introduce_party(introducer=alice, external_ref=name) for name in ("ann", "ben")]
    dataset = DatasetFactory(owner=alice, slug="scans")
    PublishedVersionFactory(dataset=dataset, contributions=dict.fromkeys(parties, 4))
    return parties


def test_a_key_invites_a_contributor(api, alice, named):
    client = api(alice, "read", "upload")
    ben, ann = client.get("/api/v1/contributors/?dataset=scans").json()["results"]
    assert (ann["name"], ben["name"], ann["is_claimed"], ann["invited_at"]) == ("ann", "ben", False, None)

    made = client.post(f"/api/v1/contributors/{ann['id']}/invitations/", {"email": "ann@example.org"}, format="json")

    invitation = Invitation.objects.get()
    assert made.status_code == 201
    assert (made.json()["contributor"], made.json()["email"]) == (str(named[0].public_id), "ann@example.org")
    assert (invitation.party, invitation.invited_by) == (named[0], None)
    listed = client.get("/api/v1/contributors/").json()["results"]
    assert [one["invited_at"] is not None for one in listed] == [False, True]


def test_what_cannot_be_invited_is_a_problem_with_its_field(api, alice, named, settings):
    url = f"/api/v1/contributors/{named[0].public_id}/invitations/"
    client = api(alice, "upload")

    wrong = client.post(url, {"email": "ann"}, format="json")
    settings.INVITATIONS_PER_DAY = 0
    too_many = client.post(url, {"email": "ann@example.org"}, format="json")

    assert (wrong.status_code, wrong.json()["errors"][0]["pointer"]) == (422, "/email")
    assert (too_many.status_code, too_many.json()["code"]) == (429, "invitation_limit_reached")
    assert api(alice, "read").post(url, {"email": "ann@example.org"}, format="json").status_code == 403
    assert not Invitation.objects.exists()


def test_a_strangers_contributors_do_not_exist(api, mallory, named):
    client = api(mallory, "read", "upload")

    assert client.get("/api/v1/contributors/").json()["results"] == []
    assert client.get("/api/v1/contributors/?dataset=scans").status_code == 404
    url = f"/api/v1/contributors/{named[0].public_id}/invitations/"
    assert client.post(url, {"email": "mallory@example.org"}, format="json").status_code == 404


def test_a_list_of_contributors_asks_as_much_for_three_as_for_one(api, alice):
    def n_queries():
        with CaptureQueriesContext(connection) as queries:
            assert client.get("/api/v1/contributors/").status_code == 200
        return len(queries)

    client = api(alice)
    introduce_party(introducer=alice, external_ref="ann")
    one = n_queries()
    for name in ("ben", "cem"):
        introduce_party(introducer=alice, external_ref=name)

    assert (one, n_queries()) == (4, 4)  # the key, its last use, the parties, their invitations
