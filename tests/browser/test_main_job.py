"""Upload → buy → earn as people do it, on real processes; axe on every page, at the desk and on a phone, with and without JavaScript."""

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.test import Client
from playwright.sync_api import Browser

from attribution.models import AttributionResult
from marketplace.models import DatasetVersion, License, Party, User
from payouts.models import Division, Document, JournalEntry, Payment
from payouts.services import manual_entries
from portal.templatetags.desk import PAGES
from tests.browser.conftest import Visitor
from tests.factories.attribution import PublishedResultFactory
from tests.pages import with_second_factor
from tests.stories.running import Story

pytestmark = [pytest.mark.browser, pytest.mark.story]

DESK = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 375, "height": 812}, "has_touch": True, "is_mobile": True}
PASSWORD = "a long enough one 7"
CARD = {
    "email": "carol@example.org",
    "card_number": "4242424242424242",
    "expiry": "12/40",
    "cvc": "123",
    "name": "Carol C.",
}


def sign_up(visitor: Visitor, name: str) -> None:
    visitor.go("/accounts/signup/")
    visitor.fill(email=f"{name}@example.org", password1=PASSWORD)
    visitor.press("Create account")


def digits(path: Path) -> Path:
    """Twelve pictures of 4 × 4 pixels, labelled by the brighter half."""
    names = [f"pixel_{n}" for n in range(16)]
    rows = [",".join([*names, "label"])]
    for seed in range(12):
        pixels = [(seed * 7 + n * n * (seed % 3 + 1)) % 17 for n in range(16)]
        rows.append(",".join(map(str, [*pixels, int(sum(pixels[:8]) > sum(pixels[8:]))])))
    path.write_text("\n".join(rows) + "\n")
    return path


def test_upload_buy_earn(story: Story, chromium: Browser, tmp_path: Path) -> None:
    alice = Visitor(chromium, story.url, **DESK)
    carol = Visitor(chromium, story.url, **PHONE)

    upload_and_list(alice, digits(tmp_path / "digits.csv"))
    buy_and_download(carol)
    earn_and_onboard(alice, story)
    read_what_was_measured(alice, carol)
    look_at_the_books(chromium, story)
    for visitor, pages in ((alice, PAGES_OF_A_SELLER), (carol, PAGES_OF_A_BUYER)):
        for page in pages:
            visitor.go(page)


def upload_and_list(alice: Visitor, file: Path) -> None:
    alice.go("/")
    alice.page.keyboard.press("Tab")
    assert alice.page.evaluate("document.activeElement.textContent") == "Skip to content"
    sign_up(alice, "alice")
    alice.go("/datasets/new/")
    alice.press("Continue to the file")  # the browser itself asks for the title
    assert alice.page.url.endswith("/datasets/new/")
    alice.fill(title="Small digits", summary="Pictures of 4 × 4 pixels.")
    alice.page.get_by_label("Kind of data").select_option("image")
    alice.press("Continue to the file")

    alice.page.set_input_files("#id_file", file)
    alice.press("Upload and look at its columns")
    alice.sees("digits.csv has 17 columns")
    assert alice.page.get_by_label("Content").input_value() == "pixel_*"
    alice.press("Read the file")
    alice.page.locator("#upload-status[data-status=done]").wait_for()  # without a reload: the page asks for itself
    alice.sees("Read, counted and sealed. It is not public yet.")
    alice.check()

    alice.follow("Sign and publish")
    alice.page.get_by_label("Your full name").fill("Alice A.")
    alice.page.get_by_label("I make this statement").check()
    alice.press("Sign and publish")

    alice.fill(price="200")
    alice.page.locator("#terms-example", has_text="What becomes of $200.00").wait_for()  # as it is typed
    alice.fill(pool="10")
    alice.press("Publish the offer")
    alice.sees("They add up to 40 %")
    assert alice.page.evaluate("document.activeElement.className") == "error-summary"
    alice.fill(pool="60")
    alice.press("Publish the offer")
    alice.sees("12")
    assert alice.page.get_by_role("img", name=re.compile("^Record 1, labelled")).is_visible()


def buy_and_download(carol: Visitor) -> None:
    sign_up(carol, "carol")
    carol.go("/datasets/?q=small")
    carol.follow("Small digits")
    carol.page.get_by_label("Your full name").fill("Carol C.")
    carol.press("License for $200.00")
    carol.press("Pay at Stripe")
    for name, answer in CARD.items():
        carol.page.locator(f"[name={name}]").fill(answer)
    carol.page.locator("button[type=submit]").click()
    carol.page.wait_for_url(f"{carol.url}/orders/**")
    carol.page.locator("#order-state[data-status=paid]").wait_for()  # once the webhook has said so
    carol.check()

    carol.follow("Licenses and downloads")
    with carol.page.expect_download() as downloading:
        carol.page.get_by_role("button", name="Download Small digits").click()
    data = Path(downloading.value.path()).read_bytes()
    assert hashlib.sha256(data).hexdigest() == DatasetVersion.objects.get().parquet_sha256


def earn_and_onboard(alice: Visitor, story: Story) -> None:
    story.wait_for("the upfront share", lambda: Party.objects.get(name="alice").division_lines.exists())
    alice.go("/earnings/")
    alice.sees("$60.00")  # 30 % of the price, all of it hers
    alice.sees("Held so that a claim can still overturn it")
    alice.page.get_by_label("Country of your bank account").fill("US")
    alice.press("Set up payouts")
    bank = {"name": "Alice A.", "country": "US", "account_number": "000123456789", "routing_number": "110000000"}
    for name, answer in bank.items():
        field = alice.page.locator(f"[name={name}]")
        if field.count() and field.is_editable():
            field.select_option(answer) if field.evaluate("f => f.tagName") == "SELECT" else field.fill(answer)
    alice.page.locator("button[type=submit]").click()
    alice.page.wait_for_url(f"{alice.url}/earnings/**")

    def is_set_up() -> Any:
        alice.page.reload()
        return "Payouts are set up" in alice.page.inner_text("main")

    story.wait_for("Stripe's word on the account", is_set_up)
    alice.check()
    alice.page.locator("aside").get_by_role("link").first.click()
    alice.sees("recomputes")
    alice.check()


def read_what_was_measured(alice: Visitor, carol: Visitor) -> None:
    """The measuring itself has stories of its own; here its page is read."""
    license = License.objects.get()
    result = PublishedResultFactory(
        license=license,
        shares={license.version.dataset.owner: 1},
        reliability=0.9,
        total=1.5,
        total_low=1,
        total_high=2,
    )
    assert AttributionResult.objects.get() == result
    page = f"/models/{result.model.slug}/"
    for visitor in (alice, carol):
        visitor.go(page)
        visitor.sees("100.00 %")
    alice.follow("Small digits")
    alice.sees("Cited by")


def look_at_the_books(chromium: Browser, story: Story) -> None:
    """Every page of the desk, reached from its tabs, and each kind of page behind them; at a desk and on a phone."""
    user = User.objects.create_user("finance@example.org", PASSWORD, is_staff=True)
    cookie = with_second_factor(Client(), user).cookies[settings.SESSION_COOKIE_NAME].value
    manual = manual_entries.propose(
        user=user,
        key="k",
        legs={"expense:other:USD": 1_000_000, "equity:owners:USD": -1_000_000},
        reason="A bank's fee",
    )
    payment, document, entry = Payment.objects.get(), Document.objects.get(), JournalEntry.objects.earliest("pk")
    division = Division.objects.earliest("pk")
    payee = Party.objects.get(name="alice")
    behind = [
        f"/desk/payments/{payment.pk}/",
        f"/desk/invoices/{document.reference}/",
        f"/desk/divisions/{division.pk}/",
        f"/desk/payees/{payee.pk}/",
        f"/desk/debts/{payee.pk}/USD/",
        f"/desk/entries/{manual.pk}/",
        f"/desk/journal/entries/{entry.pk}/",
        f"/desk/journal/payable:{payee.pk}:USD/",
    ]
    for screen in (DESK, PHONE):
        finance = Visitor(chromium, story.url, **screen)
        finance.context.add_cookies([{"name": settings.SESSION_COOKIE_NAME, "value": cookie, "url": story.url}])
        finance.go("/desk/")
        finance.sees("1 manual entry to approve")
        tabs = finance.page.get_by_role("navigation", name="Desk")
        for group, pages in PAGES.items():
            for _, label, _ in pages:
                tabs.get_by_role("link", name=group, exact=True).click()
                tabs.get_by_role("link", name=label, exact=True).first.click()
                finance.page.wait_for_load_state()
                finance.check()
                assert tabs.locator("[aria-current=page]").text_content() == label
        for page in behind:
            finance.go(page)


PAGES_OF_A_SELLER = [
    "/",
    "/datasets/yours/",
    "/datasets/small-digits/offer/",
    "/datasets/small-digits/upload/",
    "/organisations/new/",
    "/accounts/email/",
    "/accounts/password/change/",
    "/no-such-page/",
]
PAGES_OF_A_BUYER = ["/models/", "/orders/", "/royalties/", "/settings/keys/", "/earnings/", "/api/v1/docs/"]


def test_the_essential_path_needs_no_javascript(story: Story, chromium: Browser, tmp_path: Path) -> None:
    bob = Visitor(chromium, story.url, java_script_enabled=False, **PHONE)
    sign_up(bob, "bob")
    bob.go("/datasets/new/")
    bob.fill(title="Plain digits")
    bob.press("Continue to the file")
    bob.page.set_input_files("#id_file", digits(tmp_path / "digits.csv"))
    bob.press("Upload and look at its columns")
    bob.press("Read the file")
    story.wait_for("the end of the upload", lambda: not DatasetVersion.objects.filter(status="draft").exists())
    bob.page.reload()
    bob.follow("Sign and publish")
    bob.page.get_by_label("Your full name").fill("Bob B.")
    bob.page.get_by_label("I make this statement").check()
    bob.press("Sign and publish")
    bob.fill(price="50")
    bob.press("Show the example")
    bob.sees("What becomes of $50.00")
    bob.press("Publish the offer")
    bob.sees("What others see and pay.")
    dataset = bob.page.url
    bob.page.locator("summary", has_text="bob").click()
    bob.press("Sign out")
    assert bob.page.get_by_role("link", name="Sign in").is_visible()

    carol = Visitor(chromium, story.url, java_script_enabled=False, **PHONE)
    sign_up(carol, "carol")
    carol.page.goto(dataset)
    carol.page.get_by_label("Your full name").fill("Carol C.")
    carol.press("License for $50.00")
    carol.sees("Pay at Stripe")
