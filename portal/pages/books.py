"""The books at the desk: trial balance, closing, journals, payables, manual entries, reconciliation, other rails, audit log.

For staff with a second factor; for anyone else none of it exists (404). Every act is a service's, with the person in the log.
"""

import uuid
from datetime import UTC, date, datetime, timedelta
from typing import Any

from django.contrib import messages
from django.core.paginator import Paginator
from django.db.models import Prefetch
from django.http import Http404, HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.utils import timezone
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from marketplace import clock
from marketplace.errors import DomainError
from marketplace.jobs import Job
from marketplace.money import MINOR_DIGITS, Money
from marketplace.selectors import audit_events
from payouts import books, chart
from payouts.book_files import as_download, yearly_csv
from payouts.book_files import journal_csv as journal_csv_of
from payouts.models import (
    BalanceCheck,
    BooksProof,
    ClosedPeriod,
    JournalEntry,
    ManualEntry,
    RailConfirmation,
    RailExport,
    RailPayout,
    ReconciliationRun,
    RoyaltyPool,
)
from payouts.services import closing, manual_entries, other_rails, proving, reach, reconciliation
from portal.pages.forms import AuditFilterForm, CloseForm, ManualEntryForm, ReferenceForm
from portal.second_factor import StaffRequest, staff_only

PER_PAGE = 50
N_ACCOUNTS = 200


#: Where an obstacle to closing a month is settled, by what it is about: the page, and what it is called.
SETTLED_AT = {
    "looks": ("desk-reconciliation", "Reconciliation"),
    "proof": ("desk-reconciliation", "Proof of the books"),
    "balances": ("desk-reconciliation", "Kept balances"),
    "events": ("desk-events", "Stripe’s events"),
    "manual": ("desk-manual-list", "Manual entries"),
    "receipts": ("desk-invoices", "Invoices and transfers"),
    "bank": ("desk-bank", "Money at the bank"),
    "rails": ("desk-rails", "Other rails"),
}


# --- trial balance, closing -------------------------------------------------------------------------------------------
@staff_only
@require_http_methods(["GET", "POST"])
def trial_balance(request: StaffRequest) -> HttpResponseBase:
    """As of a day (the end of it), per currency; and the month that can be closed next."""
    as_of, asked = _as_of(request.GET.get("as_of", ""))
    coming = closing.find_next_period()
    form = CloseForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        try:
            period = closing.close_period(
                starts_on=form.cleaned_data["month"], by=request.user, note=form.cleaned_data["note"]
            )
        except DomainError as error:
            form.add_refusal(error)
        else:
            messages.success(request, f"{period.starts_on:%B %Y} is closed. Its statements are being issued.")
            return redirect("desk-trial-balance")
    context = {
        "tab": "trial-balance",
        "as_of": as_of - timedelta(days=1),
        "asked": asked,
        "trials": books.trial_balance(as_of=as_of),
        "coming": coming,
        "obstacles": [(one.text, *SETTLED_AT[one.about]) for one in coming.obstacles] if coming else [],
        "form": form if coming and coming.is_over else None,
        "periods": ClosedPeriod.objects.select_related("closed_by", "statement_run")[:24],
        "years": range(clock.today().year, clock.today().year - 3, -1),
    }
    return render(request, "portal/desk_trial_balance.html", context, status=422 if form.errors else 200)


def _as_of(text: str) -> tuple[datetime, str]:
    """The first moment after the day asked for, and the text if it is a day; today otherwise."""
    try:
        day = date.fromisoformat(text)
    except ValueError:
        day, text = clock.today(), ""
    if not 2000 <= day.year <= 9998:
        day, text = clock.today(), ""
    return datetime(day.year, day.month, day.day, tzinfo=UTC) + timedelta(days=1), text


@staff_only
@require_GET
def beancount_export(request: StaffRequest) -> StreamingHttpResponse:
    as_of, _ = _as_of(request.GET.get("as_of", ""))
    return as_download(books.beancount_lines(until=as_of), "residual.beancount", "text/plain")


@staff_only
@require_GET
def yearly_export(request: StaffRequest, year: int) -> StreamingHttpResponse:
    """One row per payee and currency, for tax forms."""
    if not 2000 <= year <= 9998:
        raise Http404("There is no such year")
    return as_download(yearly_csv(year), f"residual-payees-{year}.csv", "text/csv")


# --- journals ---------------------------------------------------------------------------------------------------------
@staff_only
@require_GET
def accounts(request: StaffRequest) -> HttpResponse:
    query = request.GET.get("q", "").strip()
    page = Paginator(books.accounts_found(query), PER_PAGE).get_page(request.GET.get("page"))
    accounts = [(account, _meaning(account.code)) for account in page]
    context = {"tab": "journal", "page": page, "accounts": accounts, "query": query}
    return render(request, "portal/desk_accounts.html", context)


@staff_only
@require_GET
def journal(request: StaffRequest, code: str) -> HttpResponse:
    """One account's postings with the balance after each, a hundred to a page."""
    since = request.GET.get("since", "")
    try:
        page = books.account_journal(
            code=code,
            after=_number(request.GET.get("after")),
            before=_number(request.GET.get("before")),
            since=date.fromisoformat(since) if since else None,
        )
    except DomainError as error:
        raise Http404(error.message) from None
    except ValueError:
        return redirect("desk-journal", code=code)
    context = {"tab": "journal", "page": page, "since": since, "meaning": _meaning(code)}
    return render(request, "portal/desk_journal.html", context)


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 19 else None


@staff_only
@require_GET
def journal_csv(request: StaffRequest, code: str) -> StreamingHttpResponse:
    try:
        account = books.find_account(code)
    except DomainError as error:
        raise Http404(error.message) from None
    return as_download(journal_csv_of(account), f"{code.replace(':', '-')}.csv", "text/csv")


@staff_only
@require_GET
def entry(request: StaffRequest, entry_id: int) -> HttpResponse:
    found = get_object_or_404(JournalEntry.objects.select_related("reverses"), pk=entry_id)
    legs = [
        (posting.account, _meaning(posting.account.code), Money(posting.amount_micros, found.currency))
        for posting in found.postings.select_related("account").order_by("leg")[:N_ACCOUNTS]
    ]
    context = {"tab": "journal", "entry": found, "legs": legs, "n_more": found.n_legs - len(legs)}
    return render(request, "portal/desk_entry.html", context)


def _meaning(code: str) -> str:
    """What an account is for, in words."""
    return chart.parse(code).purpose.meaning


# --- payables and pools -----------------------------------------------------------------------------------------------
@staff_only
@require_GET
def payables(request: StaffRequest) -> HttpResponse:
    """What is owed to payees, by how long it has been due."""
    totals = books.aged_totals()
    n_rows = sum(count for count, _ in totals.values())
    paginator = Paginator(range(n_rows), PER_PAGE)
    page = paginator.get_page(request.GET.get("page"))
    context = {
        "tab": "payables",
        "ages": books.AGES,
        "totals": [
            (
                currency,
                count,
                list(zip(books.AGES, amounts, strict=True)),
                Money(sum(amount.micros for amount in amounts), currency),
            )
            for currency, (count, amounts) in totals.items()
        ],
        "rows": [
            (row, list(zip(books.AGES, row.by_age, strict=True)))
            for row in books.aged_payables(offset=(page.number - 1) * PER_PAGE, limit=PER_PAGE)
        ],
        "page": page,
    }
    return render(request, "portal/desk_payables.html", context)


@staff_only
@require_GET
def pools(request: StaffRequest) -> HttpResponse:
    """Royalty pools: those that wait, by their deadline; then what was released."""
    shows_released = request.GET.get("show") == "released"
    found = RoyaltyPool.objects.with_left().select_related(
        "version__dataset", "order_line__order", "division__result__model"
    )
    if shows_released:
        found = found.filter(released_at__isnull=False).order_by("-released_at", "pk")
    else:
        found = found.filter(released_at=None).order_by("deadline", "pk")
    page = Paginator(found, PER_PAGE).get_page(request.GET.get("page"))
    context = {
        "tab": "pools",
        "page": page,
        "pools": [(pool, Money(pool.left_micros, pool.currency)) for pool in page],
        "shows_released": shows_released,
        "now": clock.now(),
    }
    return render(request, "portal/desk_pools.html", context)


# --- manual entries ---------------------------------------------------------------------------------------------------
@staff_only
@require_http_methods(["GET", "POST"])
def manual_list(request: StaffRequest) -> HttpResponseBase:
    """What was proposed and what became of it; and a form to propose another."""
    form = ManualEntryForm(request.POST or None, initial={"key": uuid.uuid4().hex, "booked_on": clock.today()})
    if form.is_valid():
        try:
            made = manual_entries.propose(user=request.user, **form.proposal)
        except DomainError as error:
            form.add_refusal(error)
        else:
            messages.success(request, f"Proposed as number {made.pk}. Another one of the staff must approve it.")
            return redirect("desk-manual", manual_id=made.pk)
    found = ManualEntry.objects.select_related("proposed_by", "decision__decided_by").prefetch_related("legs")
    page = Paginator(found, PER_PAGE).get_page(request.GET.get("page"))
    legs = form.leg_fields()
    context = {
        "tab": "manual",
        "page": page,
        "form": form,
        "legs": legs,
        "needs_more_legs": any(field.value() or field.errors for leg in legs[2:] for field in leg),
    }
    return render(request, "portal/desk_manual_list.html", context, status=422 if form.errors else 200)


@staff_only
@require_http_methods(["GET", "POST"])
def manual(request: StaffRequest, manual_id: int) -> HttpResponseBase:
    found = get_object_or_404(
        ManualEntry.objects.select_related("proposed_by", "decision__decided_by", "decision__entry"), pk=manual_id
    )
    problem = None
    if request.method == "POST":
        note = request.POST.get("note", "")[:2_000]
        try:
            if request.POST.get("act") == "approve":
                manual_entries.approve(manual=found, user=request.user, note=note)
                messages.success(request, "Approved and booked.")
            else:
                manual_entries.reject(manual=found, user=request.user, note=note)
                messages.success(request, "Rejected.")
        except DomainError as error:
            problem = error.message
        else:
            return redirect("desk-manual", manual_id=found.pk)
    context = {
        "tab": "manual",
        "manual": found,
        "legs": [(leg, _meaning(leg.account_code)) for leg in found.legs.all()],
        "problem": problem,
        "may_decide": found.state == "awaiting" and found.proposed_by_id != request.user.pk,
    }
    return render(request, "portal/desk_manual.html", context, status=422 if problem else 200)


# --- reconciliation ---------------------------------------------------------------------------------------------------
@staff_only
@require_http_methods(["GET", "POST"])
def reconciliation_list(request: StaffRequest) -> HttpResponseBase:
    """The latest look, what it found, and the ones before; the latest proof of the books; and buttons for others."""
    if request.method == "POST":
        act, minute = request.POST.get("act"), f"{timezone.now():%Y-%m-%dT%H:%M}"
        key = f"desk:{request.user.pk}:{minute}"
        if act == "prove":
            proving.request_proof(key=key, user=request.user)
            messages.success(request, "Asked for; it reads every row, which takes minutes where there are many.")
            return redirect("desk-reconciliation")
        is_full = act == "full"
        run = reconciliation.request_reconciliation(
            key=f"{key}:full" if is_full else key, user=request.user, is_full=is_full
        )
        messages.success(request, "Asked for; it takes seconds to minutes.")
        return redirect("desk-reconciliation-run", run_id=run.pk)
    page = Paginator(ReconciliationRun.objects.select_related("requested_by"), PER_PAGE).get_page(
        request.GET.get("page")
    )
    ended = ReconciliationRun.objects.filter(n_differences__isnull=False)
    proof = proving.latest_proof()
    context = {
        "tab": "reconciliation",
        "page": page,
        "check": BalanceCheck.objects.first(),
        "full": ended.filter(is_full=True).first(),
        "proof": proof,
        "findings": proof.findings.all()[:PER_PAGE] if proof is not None else [],
        "next_proof": BooksProof.objects.exclude(status__in=[Job.Status.DONE, Job.Status.FAILED]).first(),
    } | _look_context(ended.first())
    return render(request, "portal/desk_reconciliation.html", context)


@staff_only
@require_GET
def reconciliation_run(request: StaffRequest, run_id: int) -> HttpResponse:
    found = get_object_or_404(ReconciliationRun.objects.select_related("requested_by"), pk=run_id)
    return render(
        request, "portal/desk_reconciliation.html", {"tab": "reconciliation", "is_one": True} | _look_context(found)
    )


def _look_context(run: ReconciliationRun | None) -> dict[str, Any]:
    if run is None:
        return {"run": None}
    return {
        "run": run,
        "here": reverse("desk-reconciliation-run", args=[run.pk]),
        "differences": run.differences.all()[:500],
        "cash": [
            {
                "currency": held["currency"],
                "agrees": held["agrees"],
                "rows": [
                    (
                        side,
                        Money(held["ledger"][index], held["currency"]),
                        Money(held["coming"][index], held["currency"]),
                        Money(held["stripe"][index], held["currency"]),
                    )
                    for index, side in enumerate(("pending", "available"))
                ],
            }
            for held in run.cash
        ],
    }


# --- other rails ------------------------------------------------------------------------------------------------------
@staff_only
@require_http_methods(["GET", "POST"])
def rails(request: StaffRequest) -> HttpResponseBase:
    """Payees whom Stripe does not reach: exports over another rail, and a button to propose the next."""
    problem = None
    if request.method == "POST":
        try:
            export = other_rails.propose_export(
                user=request.user,
                currency=request.POST.get("currency", ""),
                key=request.POST.get("key", "")[:80] or uuid.uuid4().hex,
            )
        except DomainError as error:
            problem = error.message
        else:
            messages.success(request, f"Proposed as export {export.pk}. Another one of the staff must approve it.")
            return redirect("desk-rail-export", export_id=export.pk)
    page = Paginator(RailExport.objects.select_related("proposed_by", "decided_by"), PER_PAGE).get_page(
        request.GET.get("page")
    )
    context = {
        "tab": "rails",
        "page": page,
        "problem": problem,
        "currencies": list(MINOR_DIGITS),
        "key": uuid.uuid4().hex,
        "n_unserved": reach.unserved_parties().count(),
        "waiting": other_rails.waiting_for_details(),
        "to_confirm": Paginator(other_rails.confirmations_waiting(), PER_PAGE).get_page(request.GET.get("confirm")),
    }
    return render(request, "portal/desk_rails.html", context, status=422 if problem else 200)


@staff_only
@require_http_methods(["GET", "POST"])
def rail_export(request: StaffRequest, export_id: int) -> HttpResponseBase:
    found = get_object_or_404(RailExport.objects.select_related("proposed_by", "decided_by"), pk=export_id)
    problem = None
    if request.method == "POST":
        try:
            if request.POST.get("act") == "approve":
                other_rails.approve_export(export=found, user=request.user)
                messages.success(request, "Approved and booked.")
            else:
                other_rails.reject_export(export=found, user=request.user)
                messages.success(request, "Rejected.")
        except DomainError as error:
            problem = error.message
        else:
            return redirect("desk-rail-export", export_id=found.pk)
    recorded = Prefetch("confirmations", other_rails.confirmations_waiting(), to_attr="waiting_confirmations")
    of_export = found.payouts.select_related("party", "details", "confirmed_by").prefetch_related(recorded)
    page = Paginator(of_export, PER_PAGE).get_page(request.GET.get("page"))
    context = {
        "tab": "rails",
        "export": found,
        "page": page,
        "problem": problem,
        "may_decide": found.status == RailExport.Status.AWAITING and found.proposed_by_id != request.user.pk,
        "standing": RailPayout.STANDING,
    }
    return render(request, "portal/desk_rail_export.html", context, status=422 if problem else 200)


@staff_only
@require_POST
def rail_export_csv(request: StaffRequest, export_id: int) -> StreamingHttpResponse:
    """It names bank accounts in plain: by POST, so that it takes a fresh second factor, and each one is in the audit log."""
    found = get_object_or_404(RailExport, pk=export_id, status=RailExport.Status.APPROVED)
    lines = other_rails.export_file(export=found, user=request.user)
    answer = as_download(lines, f"residual-export-{found.pk}.csv", "text/csv")
    answer.headers["Cache-Control"] = "no-store"
    return answer


@staff_only
@require_POST
def rail_payout(request: StaffRequest, payout_id: int) -> HttpResponseBase:
    """Record that the bank sent it, or sent it back."""
    found = get_object_or_404(RailPayout, pk=payout_id)
    form = ReferenceForm(request.POST)
    act = other_rails.record_returned if request.POST.get("act") == "returned" else other_rails.record_sent
    try:
        act(payout=found, user=request.user, reference=form.cleaned_data["reference"] if form.is_valid() else "")
    except DomainError as error:
        messages.error(request, error.message)
    else:
        messages.success(request, "Recorded. Somebody else confirms it before anything is booked.")
    return redirect("desk-rail-export", export_id=found.export_id)


@staff_only
@require_POST
def rail_confirmation(request: StaffRequest, confirmation_id: int) -> HttpResponseBase:
    """Confirm what was recorded, or reject the record."""
    found = get_object_or_404(RailConfirmation.objects.select_related("payout"), pk=confirmation_id)
    is_approved = request.POST.get("act") == "approve"
    try:
        other_rails.decide_confirmation(confirmation=found, approved=is_approved, user=request.user)
    except DomainError as error:
        messages.error(request, error.message)
    else:
        turned_down = "Withdrawn" if found.recorded_by_id == request.user.pk else "Rejected"
        messages.success(request, "Booked." if is_approved else f"{turned_down}; nothing was booked.")
    return redirect("desk-rail-export", export_id=found.payout.export_id)


# --- audit log --------------------------------------------------------------------------------------------------------
@staff_only
@require_GET
def audit_log(request: StaffRequest) -> HttpResponse:
    """Who did what to what and when, newest first; pages by the last row seen, so that a long log stays quick."""
    form = AuditFilterForm(request.GET or None)
    found = audit_events(**(form.cleaned_data if form.is_valid() else {}))
    before = _number(request.GET.get("before"))
    if before is not None:
        found = found.filter(pk__lt=before)
    rows = list(found.order_by("-pk")[: PER_PAGE + 1])
    query = request.GET.copy()
    query.pop("before", None)
    context = {
        "tab": "audit",
        "form": form,
        "rows": rows[:PER_PAGE],
        "older": rows[PER_PAGE - 1].pk if len(rows) > PER_PAGE else None,
        "query": query.urlencode(),
    }
    return render(request, "portal/desk_audit.html", context)
