"""A real Chromium, driven by Playwright; without one the tests say so by name, unless REQUIRE_BROWSER=1 makes that a failure."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.db import connections
from playwright.sync_api import Browser, Page, sync_playwright

from tests.stories.conftest import db, story

__all__ = ["db", "story"]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
AXE = Path(__file__).parent / "vendor" / "axe.min.js"
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


@pytest.fixture
def chromium(monkeypatch: pytest.MonkeyPatch) -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        missing = f"Chromium is missing: none of {', '.join(NAMES)} is on PATH"
        if os.environ.get("REQUIRE_BROWSER") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    # Playwright keeps an event loop in this thread, by which Django would take the test's own queries for asynchronous ones.
    monkeypatch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "true")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()
        connections.close_all()  # Django keeps connections per event loop; the story's cannot reach this loop's


class Visitor:
    """One person at one screen: goes to pages and fills them in by what their labels say; every page is checked on the way."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.url = url
        self.has_javascript = options.get("java_script_enabled", True)
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(60_000)
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", self._listen)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def go(self, path: str) -> None:
        self.page.goto(f"{self.url}{path}")
        self.check()

    def fill(self, **answers: str) -> None:
        """By the fields' names, in the form that has them."""
        for name, answer in answers.items():
            self.page.locator(f"main [name={name}]:not([type=hidden])").fill(answer)

    def press(self, button: str) -> None:
        self.page.get_by_role("button", name=button).click()
        self.page.wait_for_load_state()
        self.check()

    def follow(self, link: str) -> None:
        self.page.locator("main").get_by_role("link", name=link).first.click()
        self.page.wait_for_load_state()
        self.check()

    def sees(self, text: str) -> None:
        self.page.locator("main", has_text=text).wait_for()

    def check(self) -> None:
        """No violation that axe knows of, in either colour scheme; nothing wider than the screen; no complaint of the console."""
        if not self.page.url.startswith(self.url) or not self.has_javascript:
            return  # Stripe's pages are not ours
        assert self.complaints == [], f"{self.page.url}: {self.complaints}"
        excess = self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert excess <= 0, f"{self.page.url} is {excess} px wider than the screen"
        # The policy forbids inline scripts, so axe comes in through the debugger, which it does not govern.
        self.page.evaluate(AXE.read_text())
        for scheme in ("dark", "light"):
            self.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            found = self.page.evaluate(f"axe.run({{runOnly: {RULES}, resultTypes: ['violations']}})")
            told = [
                f"{self.page.url} ({scheme}): {violation['id']}: {violation['help']}: {node['html'][:200]}"
                for violation in found["violations"]
                for node in violation["nodes"]
            ]
            assert told == [], "\n".join(told)

    def _listen(self, message: Any) -> None:
        refused = (
            "status of 404" in message.text or "status of 422" in message.text
        )  # by us, as the test meant it to be
        if message.type == "error" and not refused:
            self.complaints.append(message.text)
