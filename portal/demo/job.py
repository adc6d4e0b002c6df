"""The main job, as its users do it: over the site's pages and API, never past them.

The demo reads its figures from the database and moves the demo's two clocks; everything else goes over HTTP. Every act is looked
for before it is done and carries a fixed key, so that a second run on the same `var/` changes nothing.
"""

import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Self

import httpx
from allauth.account.models import EmailAddress
from django.db.models import Max, Sum
from django.utils.text import slugify

from attribution.models import AttributionResult, AttributionRun, Verification
from marketplace import clock
from marketplace.models import Dataset, Disclosure, License, Offer, Order, Party, Upload, User
from marketplace.money import Money
from payouts.models import (
    DivisionLine,
    PayeeAccount,
    Payment,
    Payout,
    PayoutRun,
    RoyaltyInvoice,
    RoyaltyPool,
    RoyaltyReport,
    StripeEvent,
)
from payouts.services.transfers import request_payout_run
from portal.demo import cast
from portal.demo.browser import Browser
from portal.demo.cast import Listing, email_of
from portal.demo.console import DemoFailed, follow, say, wait_for
from portal.demo.mailbox import find_link
from portal.demo.trainer import (
    ESTIMATED_SLUG,
    METERED_SLUG,
    MODEL_SLUG,
    LicensedFile,
    file_digest,
    train_and_describe,
    train_metered,
    train_unexplained,
)
from portal.site import Site

REVENUE = Money(50_000_000_000, "USD")
CARD = {"card_number": "4242424242424242", "expiry": "12/40", "cvc": "123"}


class MainJob:
    """One demo on one running site; each public method is a step."""

    def __init__(self, site: Site, var: Path) -> None:
        self.site = site
        self.files = var / "demo"
        self.mail = var / "mail"
        self.curator = Browser(site.url)
        self.trainer = Browser(site.url)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for browser in (self.curator, self.trainer):
            browser.client.close()

    # --- 2. upload

    def upload(self) -> None:
        cast.write_files(self.files)
        self._enter(self.curator, cast.CURATOR)
        self._act_for(self.curator, cast.COOPERATIVE)
        for listing in cast.LISTINGS:
            slug = slug_of(listing)
            if Dataset.objects.filter(slug=slug).exists():
                say(f"{listing.title} is there already")
                continue
            self._upload(listing, slug)

    def _upload(self, listing: Listing, slug: str) -> None:
        page = self.curator.get("/datasets/new/")
        page = self.curator.submit(
            page,
            page.form(having="title"),
            {
                "title": listing.title,
                "summary": listing.summary,
                "modality": "image",
                "description": "8 × 8 images with 17 shades of grey, one digit each, written by 13 people.",
                "source": "scikit-learn's copy of the test part of UCI's Optical Recognition of Handwritten Digits "
                "(Alpaydin and Kaynak 1998, CC BY 4.0). Rights holders and labellers are assigned for the demo.",
            },
        )
        page = self.curator.get(f"/datasets/{slug}/upload/")
        page = self.curator.submit(page, page.form(having="file"), files={"file": self.files / listing.filename})
        page = self.curator.submit(page, page.form(having="rights_holder"), dict(listing.mapping))
        upload_id = _last_uuid(page.url)

        def state() -> tuple[int, int, bool]:
            row = Upload.objects.get(public_id=upload_id)
            if row.status == Upload.Status.FAILED:
                raise DemoFailed(f"{listing.filename}: {row.error_message}")
            return row.progress_done, row.progress_total, row.status == Upload.Status.DONE

        follow(f"reading {listing.filename}", state, seconds=120, check=self.site.supervisor.check)
        version = Upload.objects.select_related("version").get(public_id=upload_id).version
        report = Upload.objects.get(public_id=upload_id).report
        page = self.curator.get(f"/uploads/{upload_id}/publish/")
        fields = {"signed_name": "Cora Curator", "confirmed": "on"}
        self.curator.submit(page, page.form(having="signed_name"), fields)
        version.refresh_from_db()
        say(
            f"{listing.filename}: {version.n_records:,} records of {report['n_rights_holders']} rights holders and "
            f"{report['n_labellers']} labellers, {version.n_copies} of them exact copies; root {version.merkle_root[:16]}…"
        )

    # --- 3. list

    def list_for_sale(self) -> None:
        for listing in cast.LISTINGS:
            slug = slug_of(listing)
            if not Offer.objects.filter(dataset__slug=slug).exists():
                page = self.curator.get(f"/datasets/{slug}/offer/")
                self.curator.submit(
                    page,
                    page.form(having="price"),
                    {
                        "price": listing.price,
                        "currency": "USD",
                        "upfront": listing.upfront_percent,
                        "pool": listing.pool_percent,
                        "royalty": listing.royalty_percent,
                        "royalty_cap": listing.royalty_cap,
                        "labellers": listing.labellers_percent,
                    },
                )
            offer = Offer.objects.filter(dataset__slug=slug).latest("number")
            say(
                f"{listing.title}: {offer.price}, {offer.upfront_bps / 100:g} % at once, {offer.pool_bps / 100:g} % in the pool, "
                f"{offer.royalty_bps / 100:g} % royalty up to {offer.royalty_cap}, labellers {offer.labellers_bps / 100:g} %; "
                f"ODRL {offer.policy_sha256[:16]}…"
            )

    # --- 4. license

    def license(self) -> None:
        self._enter(self.trainer, cast.TRAINER)
        self._act_for(self.trainer, cast.LAB)
        offers = [Offer.objects.filter(dataset__slug=slug_of(each)).latest("number") for each in cast.LISTINGS]
        total = offers[0].price + offers[1].price
        with self._api() as api:
            order = _json(
                api.post(
                    "orders/",
                    json={
                        "offers": [offer.pk for offer in offers],
                        "expected_total": {"amount": total.amount_text(), "currency": "USD"},
                        "accepted_name": "Theo Trainer",
                    },
                    headers={"Idempotency-Key": "demo-order-1"},
                )
            )
            if order["status"] != "paid":
                self._pay(_json(api.post(f"orders/{order['id']}/checkout/"))["url"])
            wait_for(
                "Stripe's webhook marking the order paid",
                lambda: Order.objects.get(public_id=order["id"]).status == Order.Status.PAID,
                seconds=60,
                check=self.site.supervisor.check,
            )
            licenses = _json(api.get("licenses/"))["results"]
            for each in licenses:
                self._download(api, each["id"])
        payment = Payment.objects.get(order__public_id=order["id"])
        fee = Money(payment.fee_micros or 0, payment.currency)
        say(f"{total} paid by Stripe Checkout, Stripe's fee {fee}; {len(licenses)} licenses, both files downloaded")

    def _pay(self, url: str) -> None:
        page = self.trainer.get(url)
        card = CARD | {"email": cast.TRAINER, "name": "Theo Trainer"}
        form = page.form(having="card_number")
        self.trainer.submit(page, form, {name: value for name, value in card.items() if name in form.names})

    def _download(self, api: httpx.Client, license_id: str) -> None:
        target = self.files / f"{license_id}.parquet"
        if target.exists():
            return
        link = _json(api.get(f"licenses/{license_id}/download/"))
        partial = target.with_suffix(".partial")
        with httpx.stream("GET", link["url"], timeout=60) as answer, partial.open("wb") as file:
            answer.raise_for_status()
            for chunk in answer.iter_bytes():
                file.write(chunk)
        partial.replace(target)

    # --- 5. train and disclose

    def train_and_disclose(self) -> None:
        found = Disclosure.objects.filter(model__slug=MODEL_SLUG).first()
        if found:
            say(f"{found.model.name} is disclosed already")
            return
        queries = self.files / "queries.parquet"
        with self._api() as api:
            self._hand_in(api, "queries", queries)  # before training: they decide what counts as help
            trained = train_and_describe(self._licensed(), queries, self.files)
            self._hand_in(api, "state", trained.checkpoint)
            answer = _json(api.post("disclosures/", json=trained.document))
        say(
            f"trained {trained.n_step} steps on {trained.n_record:,} records: {trained.accuracy:.1%} of the held-out images right; "
            f"disclosed as {answer.get('id') or answer.get('public_id')}"
        )
        say(f"public at {self.site.url}/models/{MODEL_SLUG}/")

    def _licensed(self) -> list[LicensedFile]:
        rows = (
            License.objects.filter(licensee__name=cast.LAB).select_related("version").order_by("version__published_at")
        )
        return [
            LicensedFile(str(row.public_id), row.version.merkle_root, self.files / f"{row.public_id}.parquet")
            for row in rows
        ]

    @staticmethod
    def _hand_in(api: httpx.Client, kind: str, path: Path) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        _json(api.post("artifacts/", params={"kind": kind}, content=path.read_bytes(), headers=headers))

    # --- 6. attribute

    def attribute(self) -> None:
        disclosure = Disclosure.objects.get(model__slug=MODEL_SLUG)
        check = self.site.supervisor.check
        wait_for(
            "The verification",
            lambda: Verification.objects.filter(disclosure=disclosure).exists(),
            seconds=60,
            check=check,
        )

        def replay() -> tuple[int, int, bool]:
            row = Verification.objects.get(disclosure=disclosure)
            if row.status == Verification.Status.FAILED:
                raise DemoFailed(f"verification: {row.error_message}")
            return row.progress_done, row.progress_total, row.status == Verification.Status.DONE

        follow("replaying the training", replay, seconds=120, check=check)
        verification = Verification.objects.get(disclosure=disclosure)
        if verification.verdict != Verification.Verdict.MATCH:
            raise DemoFailed(f"the disclosure was not reproduced: {verification.report}")
        say(str(verification.report["summary"]))

        def rounds() -> tuple[int, int, bool]:
            run = AttributionRun.objects.filter(disclosure=disclosure).first()
            if run is None:
                return 0, 0, False
            if run.status == AttributionRun.Status.FAILED:
                raise DemoFailed(f"attribution: {run.error_message}")
            shards = list(run.shards.values_list("progress_done", "progress_total", "status"))
            done = sum(total or 1 if status == "done" else done for done, total, status in shards)
            published = AttributionResult.objects.filter(run=run, status=AttributionResult.Status.PUBLISHED).exists()
            return done, sum(total or 1 for _, total, _ in shards), published

        follow("measuring the records' values", rounds, seconds=240, check=check)
        result = AttributionResult.objects.get(run__disclosure=disclosure)
        run = AttributionRun.objects.get(result=result)
        spent = result.summary.get("run_equivalents")
        say(
            f"{run.shards.count()} rounds, {spent:.0f} trainings' worth of work; f(all) − f(none) = {result.total:.3f} nats "
            f"[{result.total_low:.3f}, {result.total_high:.3f}]; reliability λ = {result.reliability:.2f}; {result.regime}; "
            f"paid by {result.paid_by}"
        )

    # --- 7. weaker evidence

    def disclose_more(self) -> None:
        """Two more models on the same records: one metered while it trained, one of which checkpoints alone are shown.

        They are measured while the next steps run: `read_weaker` waits for their results.
        """
        queries = self.files / "queries.parquet"
        with self._api() as api:
            if not Disclosure.objects.filter(model__slug=METERED_SLUG).exists():
                self._hand_in(api, "queries", queries)
                plan = {"slug": "digits-by-meter", "queries_sha256": file_digest(queries)}
                run = _json(api.post("metered-runs/", json=plan))["id"]
                document, states, log = train_metered(
                    self._licensed(),
                    queries,
                    self.files,
                    run_id=run,
                    post=lambda head: _json(api.post(f"metered-runs/{run}/heads/", json={"heads": [asdict(head)]})),
                )
                self._disclose(api, document, states, log)
            if not Disclosure.objects.filter(model__slug=ESTIMATED_SLUG).exists():
                document, states = train_unexplained(self._licensed(), queries, self.files)
                self._disclose(api, document, states)
        for slug in (METERED_SLUG, ESTIMATED_SLUG):
            say(f"disclosed, and being measured: {self.site.url}/models/{slug}/")

    def read_weaker(self) -> None:
        for slug, grade in ((METERED_SLUG, "metered"), (ESTIMATED_SLUG, "estimated")):
            self._await_result(slug, grade)

    def _disclose(
        self, api: httpx.Client, document: dict[str, Any], states: list[Path], log: Path | None = None
    ) -> None:
        for state in states:
            self._hand_in(api, "state", state)
        if log:
            self._hand_in(api, "meter", log)
        _json(api.post("disclosures/", json=document))

    def _await_result(self, slug: str, grade: str) -> None:
        def published() -> AttributionResult | None:
            for job in (Verification, AttributionRun):
                failed = job.objects.filter(disclosure__model__slug=slug, status="failed").first()
                if failed:
                    raise DemoFailed(f"{slug}: {failed.error_message}")
            return AttributionResult.objects.filter(
                model__slug=slug, grade=grade, status=AttributionResult.Status.PUBLISHED
            ).first()

        result = wait_for(f"The {grade} result", published, seconds=120, check=self.site.supervisor.check)
        verification = Verification.objects.filter(disclosure__model__slug=slug).first()
        if verification:
            say(str(verification.report["summary"]))
        say(
            f"{result.model.name}, {grade}: reliability λ = {result.reliability:.2f} = the method's record {result.summary['record']:.2f} "
            f"× coherence {result.summary['coherence']:.2f}; paid by {result.paid_by}; {self.site.url}/models/{slug}/"
        )

    # --- 8. divide and pay

    def divide_and_pay(self) -> None:
        check = self.site.supervisor.check
        wait_for(
            "The release of the pools",
            lambda: not RoyaltyPool.objects.filter(released_at=None).exists(),
            seconds=60,
            check=check,
        )
        pools = Money(RoyaltyPool.objects.aggregate(sum=Sum("amount_micros"))["sum"], "USD")
        say(f"the sale's royalty pools, {pools}, are divided by the published result")
        self._pay_royalty()
        self._onboard_payees()
        if not PayoutRun.objects.filter(status=PayoutRun.Status.DONE).exists():
            self._advance_past_holds()
            request_payout_run(currency="USD", key=f"run:USD:{clock.today()}")
        run = PayoutRun.objects.order_by("pk").first()
        assert run is not None

        def transfers() -> tuple[int, int, bool]:
            run.refresh_from_db()
            if run.status == PayoutRun.Status.FAILED:
                raise DemoFailed(f"payout run: {run.error_message}")
            sent = run.payouts.exclude(status=Payout.Status.INTENDED).count()
            return sent, run.payouts.count(), run.status == PayoutRun.Status.DONE

        follow("sending transfers", transfers, seconds=120, check=check)
        self._let_the_bank_confirm()
        paid = Payout.objects.filter(status=Payout.Status.PAID)
        total = Money(paid.aggregate(sum=Sum("amount_micros"))["sum"] or 0, "USD")
        say(
            f"{paid.count()} transfers, {total}, sent and confirmed in the bank by {StripeEvent.objects.count()} webhooks so far"
        )

    def _pay_royalty(self) -> None:
        start, end = self._reported_month()
        with self._api() as api:
            report = _json(
                api.post(
                    "royalty-reports/",
                    json={
                        "model": MODEL_SLUG,
                        "period_start": start.isoformat(),
                        "period_end": end.isoformat(),
                        "revenue": {"amount": REVENUE.amount_text(), "currency": REVENUE.currency},
                    },
                    headers={"Idempotency-Key": "demo-report-1"},
                )
            )
            invoice = report["invoice"]
            if invoice["status"] == RoyaltyInvoice.Status.OPEN:
                self._pay(_json(api.post(f"royalty-invoices/{invoice['id']}/checkout/"))["url"])
        wait_for(
            "The division of the royalty",
            lambda: DivisionLine.objects.filter(division__invoice_line__invoice_id=invoice["id"]).exists(),
            seconds=60,
            check=self.site.supervisor.check,
        )
        say(
            f"revenue of {REVENUE} in {start:%B %Y} reported; a royalty of {RoyaltyInvoice.objects.get().total} paid and divided"
        )

    def _reported_month(self) -> tuple[date, date]:
        """The month of the sale; the clock moves on until it is over."""
        found = RoyaltyReport.objects.filter(model__slug=MODEL_SLUG).first()
        if found:
            return found.period_start, found.period_end
        paid_at = Order.objects.get(buyer__name=cast.LAB).paid_at
        assert paid_at is not None
        start = paid_at.date().replace(day=1)
        end = (start + timedelta(days=31)).replace(day=1) - timedelta(days=1)
        if clock.today() <= end:
            self._advance(timedelta(days=(end - clock.today()).days + 1))
        return start, end

    def _onboard_payees(self) -> None:
        names = [*cast.HOLDERS, *cast.LABELLERS]
        missing = [
            name for name in names if not PayeeAccount.objects.filter(party__name=name, transfers_active=True).exists()
        ]
        unclaimed = [name for name in missing if not _party(name).is_claimed]
        for name in unclaimed:
            self._invite(name)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda name: self._onboard(name, is_claimed=name not in unclaimed), missing))
        wait_for(
            "Stripe's word on the payees' accounts",
            lambda: PayeeAccount.objects.filter(transfers_active=True).count() >= len(names),
            seconds=60,
            check=self.site.supervisor.check,
        )
        say(f"{len(names)} contributors were invited by mail, have claimed their party and onboarded at Stripe")

    def _invite(self, name: str) -> None:
        """The cooperative invites whom its file names, from the dataset's page; the same day again, no second mail goes out."""
        party = _party(name)
        slug = Dataset.objects.filter(versions__contributions__party=party).earliest("pk").slug
        page = self.curator.get(f"/datasets/{slug}/contributors/{party.public_id}/invite/")
        self.curator.submit(page, page.form(having="email"), {"email": email_of(name)})

    def _onboard(self, name: str, *, is_claimed: bool) -> None:
        with Browser(self.site.url) as browser:
            self._enter(browser, email_of(name))
            if not is_claimed:
                self._claim(browser, name)
            self._onboard_at_stripe(browser, name)

    def _claim(self, browser: Browser, name: str) -> None:
        """Confirm the address by the one mail, then take up the invitation by the other."""
        if not EmailAddress.objects.filter(email=email_of(name), verified=True).exists():
            page = browser.get(self._link(name, "/accounts/confirm-email/"))
            browser.submit(page, page.form(action="/accounts/confirm-email/"))
        page = browser.get(self._link(name, "/invitations/"))
        browser.submit(page, page.own_form())

    def _link(self, name: str, path: str) -> str:
        """Out of the person's mail."""
        found: str = wait_for(
            f"The mail to {email_of(name)}",
            lambda: find_link(self.mail, to=email_of(name), path=path),
            seconds=60,
            check=self.site.supervisor.check,
        )
        return found

    def _onboard_at_stripe(self, browser: Browser, name: str) -> None:
        self._act_for(browser, name)
        page = browser.get("/earnings/")
        form = page.form(action="/earnings/onboarding/")
        page = browser.submit(page, form, {"country": "US"} if "country" in form.names else {})
        stripe = page.form(having="account_number")
        bank = {"name": name, "country": "US", "account_number": "000123456789", "routing_number": "110000000"}
        browser.submit(page, stripe, {field: value for field, value in bank.items() if field in stripe.names})

    def _advance_past_holds(self) -> None:
        last = DivisionLine.objects.aggregate(last=Max("due_at"))["last"]
        if last and last > clock.now():
            self._advance(last - clock.now() + timedelta(days=1))
        wait_for(
            "Stripe's funds becoming available",
            lambda: not Payment.objects.filter(status=Payment.Status.PAID, settled_at=None).exists(),
            seconds=60,
            check=self.site.supervisor.check,
        )

    def _let_the_bank_confirm(self) -> None:
        """Connected accounts are paid out at the next midnight of Stripe's clock; the money arrives a day later."""
        open_payouts = Payout.objects.filter(status=Payout.Status.SENT)
        for _ in range(4):
            if not open_payouts.exists():
                return
            self._advance(timedelta(days=1))
            try:
                wait_for("The bank", lambda: not open_payouts.exists(), seconds=5, check=self.site.supervisor.check)
            except DemoFailed:
                continue
        wait_for("payout.paid", lambda: not open_payouts.exists(), seconds=60, check=self.site.supervisor.check)

    def _advance(self, by: timedelta) -> None:
        """Both clocks: ours and the local Stripe's."""
        whole = timedelta(seconds=int(by.total_seconds()) + 1)
        clock.advance(whole)
        self.site.advance_stripe_clock(int(whole.total_seconds()))
        days = f"{whole.days} day{'' if whole.days == 1 else 's'}"
        say(f"the demo's clocks moved on by {days}, to {clock.now():%-d %B %Y}")

    # --- 9. read

    def read_pages(self) -> None:
        """Each role's pages and statement, as its person sees them."""
        seen = 0
        with Browser(self.site.url) as anyone:
            for path in ("/", "/datasets/", "/models/"):
                seen += bool(anyone.get(path).text)
            if cast.LISTINGS[0].title not in anyone.get(f"/models/{MODEL_SLUG}/").text:
                raise DemoFailed("the model's page does not cite the dataset")
            for listing in cast.LISTINGS:
                if "Lumen Digits MLP" not in anyone.get(f"/datasets/{slug_of(listing)}/").text:
                    raise DemoFailed(f"the page of {listing.title} does not say who cites it")
                seen += 1
        with Browser(self.site.url) as trainer:
            self._enter(trainer, cast.TRAINER)
            self._act_for(trainer, cast.LAB)
            for path, shown in (
                ("/orders/", cast.LISTINGS[0].title),
                ("/licenses/", cast.LISTINGS[0].title),
                ("/royalties/", "Lumen Digits MLP"),
            ):
                if shown not in trainer.get(path).text:
                    raise DemoFailed(f"the trainer's page {path} does not show {shown}")
                seen += 1
        for name in (cast.HOLDERS[0], cast.LABELLERS[0]):
            with Browser(self.site.url) as reader:
                seen += self._read_statements(reader, name)
        say(f"{seen + 1} pages and statements read")

    def _read_statements(self, reader: Browser, name: str) -> int:
        self._enter(reader, email_of(name))
        self._act_for(reader, name)
        seen = int(bool(reader.get("/earnings/").text))
        for month in _months(DivisionLine.objects.filter(party__name=name).dates("division__divided_at", "month")):
            page = reader.get(f"/earnings/{month}/")
            statement = reader.get(f"/earnings/{month}.csv")
            if not page.text or "," not in statement.html:
                raise DemoFailed(f"{name}'s statement of {month} is empty")
            seen += 2
        return seen

    # --- people

    def _enter(self, browser: Browser, email: str) -> None:
        """Sign in, or sign up the first time."""
        if User.objects.filter(email=email).exists():
            page = browser.get("/accounts/login/")
            browser.submit(page, page.form(having="login"), {"login": email, "password": cast.PASSWORD})
        else:
            page = browser.get("/accounts/signup/")
            browser.submit(page, page.form(having="password1"), {"email": email, "password1": cast.PASSWORD})

    def _act_for(self, browser: Browser, name: str) -> None:
        """Choose the party to act for; make the organisation where it is missing."""
        party = Party.objects.filter(name=name).first()
        if party is None:
            page = browser.get("/organisations/new/")
            browser.submit(page, page.form(having="country"), {"name": name, "country": "US"})
            return
        page = browser.get("/")
        form = page.form(action="/party/")
        browser.submit(page, form, {"party": str(party.public_id)})

    def _api(self) -> httpx.Client:
        """A client with the lab's key, which is shown once and kept in `var/demo/key.json`."""
        path = self.files / "key.json"
        if not path.exists():
            page = self.trainer.get("/settings/keys/")
            scopes = ["read", "buy", "disclose", "report"]
            page = self.trainer.submit(page, page.form(having="scopes"), {"name": "demo", "scopes": scopes})
            shown = re.search(r"rk_[\w-]{40,}", page.html)
            if not shown:
                raise DemoFailed(f"the key was not shown: {page.text[:300]}")
            path.touch(mode=0o600)
            path.write_text(json.dumps({"key": shown[0]}))
        key = json.loads(path.read_text())["key"]
        return httpx.Client(base_url=f"{self.site.url}/api/v1/", headers={"Authorization": f"Bearer {key}"}, timeout=60)


def _party(name: str) -> Party:
    """Whom the cooperative's files call so."""
    return Party.objects.get(external_ref=name, introduced_by__name=cast.COOPERATIVE)


def slug_of(listing: Listing) -> str:
    return slugify(listing.title)


def _json(answer: httpx.Response) -> Any:
    """The body; a refusal ends the demo with its problem document."""
    if answer.status_code >= 400:
        raise DemoFailed(
            f"{answer.request.method} {answer.request.url} answered {answer.status_code}: {answer.text[:600]}"
        )
    return answer.json()


def _months(days: Iterable[date]) -> list[str]:
    return [f"{day:%Y-%m}" for day in days]


def _last_uuid(url: str) -> str:
    return re.findall(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", url)[-1]
