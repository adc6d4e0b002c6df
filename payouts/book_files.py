"""Long lists of the books as files, a row at a time, so that memory does not grow with them: for pages and API alike."""

from collections.abc import Iterator

from django.http import StreamingHttpResponse

from marketplace.csv_cells import cell_text, written
from marketplace.money import Money
from payouts import books
from payouts.models import Account


def as_download(lines: Iterator[str], name: str, kind: str) -> StreamingHttpResponse:
    return StreamingHttpResponse(
        lines,
        content_type=f"{kind}; charset=utf-8",
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )


def yearly_csv(year: int) -> Iterator[str]:
    """One row per payee and currency, for tax forms."""
    yield written(
        [
            "year",
            "party",
            "name",
            "kind",
            "country",
            "stripe_account",
            "currency",
            "credited_q1",
            "credited_q2",
            "credited_q3",
            "credited_q4",
            "credited",
            "n_credits",
            "taken_back",
            "given",
            "adjusted_net",
            "paid_out",
        ]
    )
    for row in books.yearly_totals(year):
        quarters = [quarter.amount_text(exact=True) for quarter in row.credited_by_quarter]
        adjusted = row.adjusted
        none = Money(0, row.currency)
        yield written(
            [
                year,
                row.party,
                cell_text(row.name),
                row.kind,
                row.country,
                row.stripe_account,
                row.currency,
                *quarters,
                row.credited.amount_text(exact=True),
                row.n_credits,
                (-adjusted if adjusted.micros < 0 else none).amount_text(exact=True),
                (adjusted if adjusted.micros > 0 else none).amount_text(exact=True),
                cell_text(adjusted.amount_text(exact=True)),
                cell_text(row.paid_out.amount_text(exact=True)),
            ]
        )


def journal_csv(account: Account) -> Iterator[str]:
    """Every posting of an account with the balance after it."""
    yield written(
        ["posting", "booked_at", "kind", "key", "debit", "credit", "balance_debit", "balance_credit", "currency"]
    )
    for row in books.account_journal_rows(account):
        yield written(
            [
                row.posting_id,
                f"{row.booked_at:%Y-%m-%dT%H:%M:%SZ}",
                row.kind,
                cell_text(row.key),
                *_sides(row.amount),
                *_sides(row.balance),
                account.currency,
            ]
        )


def _sides(amount: Money) -> tuple[str, str]:
    """Debit and credit: no cell is negative."""
    text = (amount if amount.micros >= 0 else -amount).amount_text(exact=True)
    return (text, "") if amount.micros >= 0 else ("", text)
