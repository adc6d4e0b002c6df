import re

import pytest
from django.test import Client

from marketplace.models import ApiKey, Invitation, Membership, Party, User
from marketplace.services.invitations import has_opted_out, invite, opt_out_mark, token_of
from marketplace.services.parties import introduce_party
from tests.factories.marketplace import DatasetFactory, OfferFactory, PublishedVersionFactory
from tests.pages import assert_page, signed_in


def test_signing_up_makes_a_party_and_signs_in(db):
    browser = Client()
    assert_page(browser.get("/accounts/signup/"))

    response = browser.post("/accounts/signup/", {"email": "dora@example.org", "password1": "a long enough one 7"})

    assert response.status_code == 302
    party = Party.objects.get()
    assert (party.name, party.memberships.get().role) == ("dora", Membership.Role.OWNER)
    assert "dora" in assert_page(browser.get("/"))


def test_signing_in_with_a_wrong_password_says_so(alice):
    response = Client().post("/accounts/login/", {"login": "alice@example.org", "password": "wrong"})

    assert "You are not signed in yet" in assert_page(response, 200)


@pytest.mark.parametrize("page", ["login", "signup", "password/reset", "password/reset/done"])
def test_account_pages_for_a_visitor(db, page):
    assert_page(Client().get(f"/accounts/{page}/"))


@pytest.mark.parametrize("page", ["email", "logout", "password/change"])
def test_account_pages_for_who_is_signed_in(alice, page):
    assert_page(signed_in(alice).get(f"/accounts/{page}/"))


def test_one_acts_for_the_chosen_party_and_sees_its_things_only(alice):
    browser = signed_in(alice)

    made = browser.post("/organisations/new/", {"name": "Acme", "country": "de"})
    assert made.url == "/"
    assert "What Acme has ordered" in assert_page(browser.get("/orders/"))
    assert Party.objects.get(name="Acme").country == "DE"

    browser.post("/party/", {"party": str(alice.public_id)})
    assert "What Alice has ordered" in assert_page(browser.get("/orders/"))


def test_nobody_switches_to_a_party_that_is_not_theirs(alice, mallory):
    browser = signed_in(mallory)

    for party in (str(alice.public_id), "", "abc"):
        assert_page(browser.post("/party/", {"party": party}), 404)
    assert "What Mallory has ordered" in assert_page(browser.get("/orders/"))


def test_an_organisation_needs_a_country_code(alice):
    response = signed_in(alice).post("/organisations/new/", {"name": "Acme", "country": "Germany"})

    assert "two letters" in assert_page(response, 422)
    assert Party.objects.count() == 1


@pytest.fixture
def invited(alice, bob):
    """An introduced contributor and the invitation that alice sent to bob's address."""
    party = introduce_party(introducer=alice, external_ref="B. in the file")
    version = PublishedVersionFactory(
        dataset=DatasetFactory(owner=alice, slug="scans", title="Scans"), contributions={alice: 8}, labellers={party: 5}
    )
    OfferFactory(version=version, labellers_bps=2_500)
    return party, token_of(invite(party=party, email="bob@example.org", by=alice.user))


def test_an_invitation_is_shown_before_it_is_taken_up(invited, bob):
    party, token = invited
    browser, url = signed_in(bob), f"/invitations/{token}/"

    text = assert_page(browser.get(url))
    assert "B. in the file" in text
    assert "Scans : 25 % for the labels of 8 records, of which you labelled 5" in text and "and I accept" in text
    party.refresh_from_db()
    assert not party.is_claimed

    assert browser.post(url).url == "/earnings/"
    party.refresh_from_db()
    assert party.is_claimed and party.memberships.get().user == bob.user


def test_an_invitation_of_someone_else_says_so_and_does_nothing(invited, mallory):
    party, token = invited
    browser = signed_in(mallory)

    for response in (browser.get(f"/invitations/{token}/"), browser.post(f"/invitations/{token}/")):
        assert "sent to another address" in assert_page(response, 410)
    assert "unknown or has expired" in assert_page(browser.get("/invitations/wrong/"), 410)
    party.refresh_from_db()
    assert not party.is_claimed


def test_an_owner_invites_from_the_datasets_page(alice, invited):
    party, _ = invited
    Invitation.objects.all().delete()
    browser, page = signed_in(alice), "/datasets/scans/"
    form = f"{page}contributors/{party.public_id}/invite/"
    assert f'href="{form}"' in browser.get(page).content.decode()

    assert "Invite B. in the file" in assert_page(browser.get(form))
    assert "valid email" in assert_page(browser.post(form, {"email": "bob"}), 422)
    assert browser.post(form, {"email": "bob@example.org"}).url == page

    invitation = Invitation.objects.get()
    assert (invitation.party, invitation.email, invitation.invited_by) == (party, "bob@example.org", alice.user)
    text = assert_page(browser.get(page))
    assert "is invited at bob@example.org" in text and "invited" in text.split("Claimed")[1]


def test_a_stranger_invites_nobody(client, mallory, invited):
    party, _ = invited
    form = f"/datasets/scans/contributors/{party.public_id}/invite/"

    assert form not in client.get("/datasets/scans/").content.decode()
    assert_page(signed_in(mallory).post(form, {"email": "mallory@example.org"}), 404)
    assert Invitation.objects.count() == 1


def test_opting_out_asks_first_and_needs_no_account(client, db):
    url = f"/invitations/opt-out/{opt_out_mark('bob@example.org')}/"

    assert "Get no more invitations?" in assert_page(client.get(url))
    assert not has_opted_out("bob@example.org")
    strict = Client(enforce_csrf_checks=True)  # a mail program has no token
    assert "No more invitations" in assert_page(strict.post(url, {"List-Unsubscribe": "One-Click"}))
    assert has_opted_out("Bob@example.org")
    assert "incomplete" in assert_page(client.get("/invitations/opt-out/forged/"), 410)


def test_a_key_is_shown_once(alice):
    browser = signed_in(alice)

    made = browser.post("/settings/keys/", {"name": "cluster", "scopes": ["read", "buy"], "spending_limit": "500"})

    text = re.search(r'id="new-key">(rk_[\w-]+)<', made.content.decode())[1]
    key = ApiKey.objects.get()
    assert (key.party, key.scopes, key.spending_limit_micros) == (alice, ["buy", "read"], 500_000_000)
    assert "no-store" in made.headers["Cache-Control"]
    later = browser.get("/settings/keys/")
    assert text not in later.content.decode() and key.prefix in assert_page(later)


def test_a_key_is_revoked_by_its_party_only(alice, mallory):
    signed_in(alice).post("/settings/keys/", {"name": "cluster", "scopes": ["read"]})
    key = ApiKey.objects.get()

    assert_page(signed_in(mallory).post(f"/settings/keys/{key.pk}/revoke/"), 404)
    key.refresh_from_db()
    assert key.revoked_at is None

    signed_in(alice).post(f"/settings/keys/{key.pk}/revoke/")
    key.refresh_from_db()
    assert key.revoked_at is not None


def test_a_key_without_a_scope_or_with_a_wrong_limit_is_refused_beside_its_field(alice):
    response = signed_in(alice).post("/settings/keys/", {"name": "cluster", "spending_limit": "-1"})

    text = assert_page(response, 422)
    assert "Choose at least one." in text and "is negative" in text
    assert not ApiKey.objects.exists()


def test_who_has_no_party_is_asked_to_make_one(db):
    user = User.objects.create_user("staff@example.org", "correct horse battery staple")
    browser = Client()
    browser.force_login(user)

    assert browser.get("/orders/").url == "/organisations/new/"
