"""Statements of a closed month: issued once, numbered without a gap per party, kept as they are, and mailed.

A statement's lines are one CSV file in object storage, named by its SHA-256; its totals are rows. Web, CSV and PDF show these
and nothing else, so a statement reads the same for ever. Whoever had no movement in the month gets none.
"""

import gzip
import hashlib
import logging
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta
from typing import IO, Any, cast

from django.conf import settings
from django.core.files import File
from django.core.files.storage import default_storage
from django.db import transaction
from django.urls import reverse
from django.utils import timezone

from marketplace import clock, jobs
from marketplace.jobs import Job
from marketplace.mail import send_mail
from marketplace.models import Membership, Party
from marketplace.services import audit
from marketplace.services.authority import owners_emails
from marketplace.templatetags.residual import bps, exact_money, percent, ppq
from payouts.documents import compile_pdf
from payouts.models import (
    Account,
    ClosedPeriod,
    IssuedStatement,
    JournalEntry,
    StatementBalance,
    StatementNotice,
    StatementRun,
    StatementTotal,
)
from payouts.services import statements

logger = logging.getLogger(__name__)

#: While an earlier month's statements are not all out, a later month waits: numbers follow months.
WAIT = timedelta(minutes=1)
#: A PDF shows so many lines; beyond it, the totals by dataset and model, and the CSV has the lines.
PDF_LINES = 300


def issue_statements(run: StatementRun) -> None:
    """Issue whatever is missing of one month; harmless to run again.

    Raises:
        LostLease: another worker has taken the run over.
    """
    earlier = StatementRun.objects.filter(period__starts_on__lt=run.period.starts_on).exclude(status=Job.Status.DONE)
    if earlier.exists():
        run.postpone(timezone.now() + WAIT)
        return
    starts_at = statements.month_bounds(run.period.starts_on.year, run.period.starts_on.month)[0]
    entries = JournalEntry.objects.filter(booked_at__gte=starts_at, booked_at__lt=run.period.ends_at)
    moved = Account.objects.filter(party__isnull=False, postings__entry__in=entries)
    issued = IssuedStatement.objects.filter(period=run.period)
    parties = list(
        moved.exclude(party__in=issued.values("party")).order_by("party").values_list("party", flat=True).distinct()
    )
    for number, party_id in enumerate(parties, start=1):
        with transaction.atomic():
            run.lock()
            issue_statement(party=Party.objects.get(pk=party_id), period=run.period)
        if number % 50 == 0 or number == len(parties):
            run.progress(done=number, total=len(parties))
    logger.info("Issued statements period=%s n=%s", run.period, len(parties))


@transaction.atomic
def issue_statement(*, party: Party, period: ClosedPeriod) -> IssuedStatement:
    """One party's statement of one closed month; the second call finds the first one's."""
    if known := IssuedStatement.objects.filter(party=party, period=period).first():
        return known
    starts_at, ends_at = statements.month_bounds(period.starts_on.year, period.starts_on.month)
    sequence = IssuedStatement.objects.filter(party=party).count() + 1
    number = f"RS-{party.pk}-{sequence:04}"
    tally = _Tally()
    with tempfile.TemporaryFile() as raw:
        digest, size = hashlib.sha256(), 0
        with gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) as packed:
            rows = statements.statement_rows(party=party, starts_at=starts_at, ends_at=ends_at, number=number)
            for line in statements.csv_lines(tally.counted(rows)):
                encoded = line.encode()
                digest.update(encoded)
                size += len(encoded)
                packed.write(encoded)
        raw.seek(0)
        name = _file_name(digest.hexdigest())
        if not default_storage.exists(name):
            default_storage.save(name, File(cast("IO[Any]", raw)))
    statement = IssuedStatement.objects.create(
        party=party,
        period=period,
        sequence=sequence,
        number=number,
        party_name=party.name,
        format=statements.FORMAT,
        n_lines=tally.n_lines,
        csv_sha256=digest.hexdigest(),
        csv_bytes=size,
        issued_at=clock.now(),
    )
    StatementBalance.objects.bulk_create(tally.balances(statement))
    StatementTotal.objects.bulk_create(tally.totals(statement), batch_size=500)
    audit.record(
        actor=None, action="statement.issued", target=f"statement:{number}", party=party, sha256=statement.csv_sha256
    )
    if Membership.objects.filter(party=party, role=Membership.Role.OWNER).exists():
        jobs.wake(StatementNotice.objects.create(statement=statement))
    return statement


def send_notice(notice: StatementNotice) -> None:
    """Tell every owner of the party that the statement is there."""
    statement = notice.statement
    link = f"{settings.BASE_URL}{reverse('issued-statement', args=[statement.number])}"
    context = {
        "statement": statement,
        "balances": list(statement.balances.all()),
        "month": statement.period.starts_on,
        "link": link,
    }
    for email in owners_emails(statement.party):
        send_mail(
            "statement_ready",
            to=email,
            subject=f"Statement {statement.number} for {statement.period.starts_on:%B %Y}",
            context=context,
        )


def stored_csv(statement: IssuedStatement) -> Iterator[str]:
    """The issued CSV, line by line with its line breaks, streamed."""
    with (
        default_storage.open(_file_name(statement.csv_sha256)) as packed,
        gzip.open(cast("IO[bytes]", packed), "rt", encoding="utf-8", newline="") as lines,
    ):
        yield from lines


def statement_pdf(statement: IssuedStatement) -> bytes:
    """The statement as PDF: totals, and up to `PDF_LINES` lines."""
    rows = _pdf_rows(statement) if statement.n_lines <= PDF_LINES else []
    return compile_pdf(
        "statement",
        {
            "number": statement.number,
            "party": statement.party_name,
            "month": f"{statement.period.starts_on:%B %Y}",
            "issued": f"{statement.issued_at:%d %B %Y}",
            "sha256": statement.csv_sha256,
            "n_lines": f"{statement.n_lines:,}",
            "balances": [
                {
                    "currency": of.currency,
                    "opening": of.opening.amount_text(exact=True),
                    "earned": of.earned.amount_text(exact=True),
                    "adjusted": of.adjusted.amount_text(exact=True),
                    "paid_out": of.paid_out.amount_text(exact=True),
                    "closing": of.closing.amount_text(exact=True),
                }
                for of in statement.balances.all()
            ],
            "totals": [
                {
                    "currency": total.currency,
                    "source": total.source,
                    "dataset": f"{total.dataset}, version {total.version}",
                    "model": total.model or "by count",
                    "role": total.role.replace("_", " "),
                    "n_lines": f"{total.n_lines:,}",
                    "amount": total.amount.amount_text(exact=True),
                }
                for total in statement.totals.all()[:PDF_LINES]
            ],
            "rows": rows,
        },
    )


def _pdf_rows(statement: IssuedStatement) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for row in stored_rows(statement):
        if row["what"] in ("opening balance", "closing balance"):
            continue
        taken = row["taken_back"] or row["paid_out"]
        line = statements.line_of_row(row) if row["division"] else None
        found.append(
            {
                "date": row["date"][:10],
                "what": row["what"],
                "of": f"{line.dataset}, version {line.version}" if line else "",
                "model": line.model if line else "",
                "how": _how(line) if line else [],
                "amount": f"−{taken}" if taken else row["earned"],
                "currency": row["currency"],
            }
        )
    return found


def _how(line: statements.StatementLine) -> list[str]:
    """From what the buyer paid to the amount, in sentences."""
    told = []
    if gross := line.gross:
        amount = exact_money(gross.amount)
        if gross.revenue is not None and gross.share_ppq is not None and gross.rate_bps is not None:
            less = ", up to the license’s cap" if gross.is_capped else ""
            less = ", less what an earlier report asked for" if gross.is_difference else less
            whole = f"{exact_money(gross.revenue)} revenue × {ppq(gross.share_ppq)} of the model × {bps(gross.rate_bps)}{less} = {amount}"
        else:
            whole = f"Price of the license {amount}"
        divided = ""
        if gross.pool != line.divided:
            divided = f", of which {exact_money(line.divided)} here: the rest had gone back to the buyer"
        told.append(
            f"{whole}; platform’s fee of {bps(gross.fee_bps)} {exact_money(gross.fee)}; to divide {bps(gross.pool_bps)} "
            f"{exact_money(gross.pool)}{divided}"
        )
    told.append(
        f"Pot {exact_money(line.pot)} × {line.weight:,} ÷ {line.weight_total:,}, {percent(line.share, 4)}, "
        f"for {line.n_records:,} records as {line.role.replace('_', ' ')}"
    )
    if line.measured_low is not None:
        interval = f"95 %: {percent(line.measured_low, 2)} to {percent(line.measured_high, 2)}"
        share = (
            f"{percent(line.measured, 2)} of the whole model, " if line.measured is not None else "of the whole model, "
        )
        told.append(f"Measured: {share}{interval}")
    return told


def stored_rows(statement: IssuedStatement) -> Iterator[dict[str, str]]:
    """The issued rows, streamed, with the columns of the statement's format."""
    return statements.read_rows(stored_csv(statement), format=statement.format)


def _plain(cell: str) -> str:
    return cell.removeprefix("'")


def _file_name(sha256: str) -> str:
    return f"statements/{sha256[:2]}/{sha256}.csv.gz"


class _Tally:
    """Sums of the rows as they go by."""

    def __init__(self) -> None:
        self.n_lines = 0
        self._balances: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._totals: dict[tuple[str, str, str, int, str, str], list[int]] = defaultdict(lambda: [0, 0])

    def counted(self, rows: Iterator[dict[str, str]]) -> Iterator[dict[str, str]]:
        for row in rows:
            self._count(row)
            yield row

    def _count(self, row: dict[str, str]) -> None:
        sums = self._balances[row["currency"]]
        if row["what"] in ("opening balance", "closing balance"):
            sums[row["what"]] = statements.micros_of(row["balance"]) - statements.micros_of(row["owing"])
        elif row["division"]:
            self.n_lines += 1
            earned = statements.micros_of(row["earned"])
            sums["earned"] += earned
            key = (
                row["currency"],
                row["what"],
                _plain(row["dataset"]),
                int(row["version"]),
                _plain(row["model"]),
                row["role"],
            )
            self._totals[key][0] += 1
            self._totals[key][1] += earned
        elif row["what"].startswith("payout"):
            sums["paid_out"] += statements.micros_of(row["paid_out"]) - statements.micros_of(row["earned"])
        else:
            sums["adjusted"] += statements.micros_of(row["earned"]) - statements.micros_of(row["taken_back"])

    def balances(self, statement: IssuedStatement) -> list[StatementBalance]:
        return [
            StatementBalance(
                statement=statement,
                currency=currency,
                opening_micros=sums["opening balance"],
                earned_micros=sums["earned"],
                adjusted_micros=sums["adjusted"],
                paid_out_micros=sums["paid_out"],
                closing_micros=sums["closing balance"],
            )
            for currency, sums in sorted(self._balances.items())
        ]

    def totals(self, statement: IssuedStatement) -> list[StatementTotal]:
        return [
            StatementTotal(
                statement=statement,
                currency=currency,
                source=source,
                dataset=dataset,
                version=version,
                model=model,
                role=role,
                n_lines=n_lines,
                amount_micros=micros,
            )
            for (currency, source, dataset, version, model, role), (n_lines, micros) in sorted(self._totals.items())
        ]
