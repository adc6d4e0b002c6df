"""Statements: a month as it stands while it is open, then the numbered one, as a page, CSV and PDF."""

import re
from datetime import date
from decimal import Decimal

from django.core.paginator import Paginator
from django.http import Http404, HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_GET

from marketplace.errors import DomainError
from marketplace.money import MICROS, Money
from marketplace.web.access import ActingRequest, acting
from payouts import selectors as payouts
from payouts.models import IssuedStatement
from payouts.services import issuing, statements

#: Above so many lines a page shows what they come to, and the CSV has them.
MAX_LINES = 500
N_TOTALS = 100


@acting
@require_GET
def month(request: ActingRequest, month: str) -> HttpResponseBase:
    """The month's issued statement, if there is one; else what it holds so far."""
    year, number = _month_or_404(month)
    issued = payouts.statements_of(request.party).filter(period__starts_on=date(year, number, 1)).first()
    if issued is not None:
        return redirect("issued-statement", number=issued.number)
    n_lines = statements.n_lines_of(party=request.party, year=year, month=number)
    found = statements.statement(party=request.party, year=year, month=number, with_lines=n_lines <= MAX_LINES)
    totals = statements.totals_of(party=request.party, year=year, month=number)
    context = {
        "section": "earnings",
        "statement": found,
        "month": month,
        "n_lines": n_lines,
        "shows_lines": n_lines <= MAX_LINES,
        "totals": totals[:N_TOTALS],
        "has_adjustments": any(of.adjustments for of in found.currencies),
    }
    return render(request, "portal/statement.html", context)


@acting
@require_GET
def month_csv(request: ActingRequest, month: str) -> HttpResponseBase:
    year, number = _month_or_404(month)
    issued = payouts.statements_of(request.party).filter(period__starts_on=date(year, number, 1)).first()
    if issued is not None:
        return redirect("issued-statement-csv", number=issued.number)
    return _csv(statements.statement_csv(party=request.party, year=year, month=number), f"residual-{month}.csv")


@acting
@require_GET
def issued(request: ActingRequest, number: str) -> HttpResponse:
    found = _issued_or_404(request, number)
    page = Paginator(found.totals.all(), N_TOTALS).get_page(request.GET.get("page"))
    rows = list(issuing.stored_rows(found)) if found.n_lines <= MAX_LINES else []
    context = {
        "section": "earnings",
        "statement": found,
        "balances": found.balances.all(),
        "page": page,
        "lines": [statements.line_of_row(row) for row in rows if row["division"]],
        "others": [_Row(row) for row in rows if not row["division"] and "balance" not in row["what"]],
    }
    return render(request, "portal/issued_statement.html", context)


class _Row:
    """A row of an issued CSV, whose cells are texts, as a page shows it."""

    def __init__(self, cells: dict[str, str]) -> None:
        self.cells = {name: cell.removeprefix("'") for name, cell in cells.items()}  # which keeps formulas off
        self.on = date.fromisoformat(cells["date"][:10])
        for name in ("pot", "earned", "taken_back", "paid_out"):
            setattr(self, name, self._money(cells[name]))

    def _money(self, text: str) -> Money | None:
        """Exact to the micro, as it was written."""
        return Money(int(Decimal(text) * MICROS), self.cells["currency"]) if text else None


@acting
@require_GET
def issued_csv(request: ActingRequest, number: str) -> StreamingHttpResponse:
    found = _issued_or_404(request, number)
    return _csv(issuing.stored_csv(found), f"{found.number}.csv")


@acting
@require_GET
def issued_pdf(request: ActingRequest, number: str) -> HttpResponse:
    found = _issued_or_404(request, number)
    return HttpResponse(
        issuing.statement_pdf(found),
        content_type="application/pdf",
        headers={"Content-Disposition": f'attachment; filename="{found.number}.pdf"'},
    )


def _issued_or_404(request: ActingRequest, number: str) -> IssuedStatement:
    """Another party's statement does not exist."""
    return get_object_or_404(payouts.statements_of(request.party), number=number)


def _month_or_404(month: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d{4}-\d{2}", month, re.ASCII):
        raise Http404("A month is written 2026-03")
    year, number = int(month[:4]), int(month[5:])
    try:
        statements.month_bounds(year, number)
    except DomainError as error:
        raise Http404(error.message) from None
    return year, number


def _csv(lines: object, name: str) -> StreamingHttpResponse:
    return StreamingHttpResponse(
        lines,  # type: ignore[arg-type]
        content_type="text/csv; charset=utf-8",
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )
