"""The desk and the admin open to staff with a second factor, and ask for it again before anything changes."""

import time
from io import StringIO
from typing import Any

import pytest
from allauth.mfa.models import Authenticator
from allauth.mfa.totp.internal.auth import (
    TOTP,
    format_hotp_value,
    generate_totp_secret,
    hotp_value,
    yield_hotp_counters_from_time,
)
from django.core.management import CommandError, call_command
from django.test import Client

from marketplace.models import AuditEvent, User
from payouts.models import ReconciliationRun
from portal.second_factor import FRESH_SECONDS
from tests.factories.marketplace import PASSWORD, UserFactory
from tests.pages import assert_page, signed_in, with_second_factor

DESK = ["/desk/", "/desk/trial-balance/", "/desk/reconciliation/", "/desk/audit/", "/desk/entries/", "/desk/rails/"]


def code_of(secret: str) -> str:
    return format_hotp_value(hotp_value(secret, next(yield_hotp_counters_from_time())))


@pytest.fixture
def secret() -> str:
    return str(generate_totp_secret())


@pytest.fixture
def staff(db: Any, secret: str) -> User:
    user = UserFactory(is_staff=True)
    TOTP.activate(user, secret)
    return user


@pytest.mark.parametrize("page", DESK)
def test_for_anyone_else_the_desk_does_not_exist(db: Any, mallory: Any, page: str) -> None:
    assert Client().get(page).status_code == 404
    assert signed_in(mallory).get(page).status_code == 404
    assert with_second_factor(Client(), mallory.user).get(page).status_code == 404  # a second factor makes no staff


def test_staff_without_a_second_factor_are_sent_to_set_it_up(db: Any) -> None:
    browser = Client()
    browser.force_login(UserFactory(is_staff=True))

    assert browser.get("/desk/").url == "/accounts/2fa/totp/activate/"


def test_a_password_alone_does_not_sign_in_who_has_a_second_factor(staff: User, secret: str) -> None:
    browser = Client()
    answer = browser.post("/accounts/login/", {"login": staff.email, "password": PASSWORD})
    assert answer.url == "/accounts/2fa/authenticate/"
    assert browser.get("/desk/").status_code == 404
    assert "code that your authenticator app shows" in assert_page(browser.get("/accounts/2fa/authenticate/"))

    assert browser.post("/accounts/2fa/authenticate/", {"code": "000000"}).status_code == 200
    assert browser.get("/desk/").status_code == 404
    browser.post("/accounts/2fa/authenticate/", {"code": code_of(secret)})

    assert_page(browser.get("/desk/"))


def test_what_changes_something_needs_a_fresh_one_and_then_goes_on(staff: User, secret: str) -> None:
    browser = with_second_factor(Client(), staff, seconds_ago=FRESH_SECONDS + 1)
    assert_page(browser.get("/desk/reconciliation/"))  # looking needs none

    asked = browser.post("/desk/reconciliation/")
    assert asked.url.startswith("/accounts/2fa/reauthenticate/?next=")
    assert not ReconciliationRun.objects.exists()
    assert "second factor once more" in assert_page(browser.get(asked.url))
    resumed = browser.post("/accounts/2fa/reauthenticate/", {"code": code_of(secret), "next": "/desk/reconciliation/"})

    assert resumed.status_code == 302 and ReconciliationRun.objects.get().requested_by == staff
    assert AuditEvent.objects.get(action="reconciliation.requested").actor == staff


def test_the_admin_is_behind_the_same_door(db: Any, secret: str) -> None:
    root = User.objects.create_superuser("root@example.org", PASSWORD)
    browser = Client()
    browser.force_login(root)
    assert browser.get("/admin/").status_code == 302
    assert browser.get("/admin/login/").url == "/accounts/2fa/totp/activate/"
    other = UserFactory()
    with_second_factor(browser, root)
    assert browser.get("/admin/").status_code == 200

    page = f"/admin/marketplace/user/{other.pk}/change/"
    given = {"email": other.email, "is_active": "on", "is_staff": "on"}
    assert browser.post(page, given).status_code == 302
    event = AuditEvent.objects.get(action="user.changed")
    assert (event.actor, event.target) == (root, f"user:{other.pk}")
    assert (event.detail["before"], event.detail["after"]) == ({"is_staff": False}, {"is_staff": True})
    with_second_factor(browser, root, seconds_ago=FRESH_SECONDS + 1)
    assert browser.get(page).status_code == 200
    assert browser.post(page, given | {"is_superuser": "on"}).status_code == 302
    other.refresh_from_db()
    assert other.is_staff and not other.is_superuser


def test_setting_it_up_gives_recovery_codes_and_keeps_the_secret_encrypted(db: Any, alice: Any) -> None:
    browser = Client()
    browser.post("/accounts/login/", {"login": alice.user.email, "password": "correct horse battery staple"})
    session = browser.session
    session["account_authentication_methods"] = [{"method": "password", "at": time.time(), "reauthenticated": True}]
    session["account_authentication_methods_user"] = str(alice.user.pk)
    session.save()
    page = browser.get("/accounts/2fa/totp/activate/")
    assert_page(page)
    secret = page.context["form"].secret

    answer = browser.post("/accounts/2fa/totp/activate/", {"code": code_of(secret)}, follow=True)

    assert "Recovery codes" in assert_page(answer)
    kept = Authenticator.objects.get(user=alice.user, type="totp").data["secret"]
    assert secret not in kept
    assert "It is set up" in assert_page(browser.get("/accounts/2fa/"))
    assert "Make new codes" in assert_page(browser.get("/accounts/2fa/recovery-codes/generate/"))
    assert "Take the second factor away" in assert_page(browser.get("/accounts/2fa/totp/deactivate/"))


def test_the_demos_staff_are_two_and_only_the_demo_prints_their_codes(db: Any, settings: Any) -> None:
    out = StringIO()
    for _ in range(2):
        call_command("demo_staff", stdout=out)
    assert User.objects.filter(is_staff=True).count() == 2
    assert out.getvalue().count("password as printed before") == 2

    settings.IS_DEMO = False
    with pytest.raises(CommandError, match="nobody prints its codes"):
        call_command("demo_staff")
