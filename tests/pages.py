"""Signing in, and what every page of the site must keep to."""

import re
import time
from typing import Any

from allauth.mfa.models import Authenticator
from allauth.mfa.totp.internal.auth import TOTP, generate_totp_secret
from django.test import Client

from marketplace.models import Party

INLINE_STYLE = re.compile(r"<[^>]+\sstyle=|<style[\s>]", re.IGNORECASE)
INLINE_SCRIPT = re.compile(r"<script(?![^>]*\ssrc=)|<[^>]+\son[a-z]+=|javascript:", re.IGNORECASE)


def signed_in(party: Party) -> Client:
    """A browser of the party's user; `party.user` is set by the fixtures and factories."""
    client = Client()
    client.force_login(party.user)  # type: ignore[attr-defined]
    return client


def with_second_factor(client: Client, user: Any, *, seconds_ago: float = 0) -> Client:
    """The browser of somebody who has an authenticator app and showed its code so long ago, as allauth keeps it."""
    if not Authenticator.objects.filter(user=user).exists():
        TOTP.activate(user, generate_totp_secret())
    client.force_login(user)
    session = client.session
    session["account_authentication_methods"] = [{"method": "mfa", "at": time.time() - seconds_ago, "type": "totp"}]
    session["account_authentication_methods_user"] = str(user.pk)
    session.save()
    return client


def text_of(response: Any) -> str:
    """The page without its tags, in single blanks."""
    return " ".join(re.sub(r"<[^>]+>", " ", response.content.decode()).split())


def assert_page(response: Any, status: int = 200) -> str:
    """The status, and the rules that the content security policy makes; answers with the page's text."""
    assert response.status_code == status, text_of(response)[:500]
    html = response.content.decode()
    assert not INLINE_STYLE.search(html)
    assert not INLINE_SCRIPT.search(html)
    assert html.count("<h1") == 1
    policy = response.headers["Content-Security-Policy"]
    assert "unsafe" not in policy and "script-src 'self'" in policy
    return text_of(response)
