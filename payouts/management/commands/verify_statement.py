"""Recomputes an issued statement from the stored attribution and pools; prints the first line that differs, and exits 1."""

import csv
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from marketplace.errors import DomainError
from payouts.services.statement_proofs import get_statement, verify_statement


class Command(BaseCommand):
    help = __doc__

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("statement", help="a statement's number (RS-17-0003), or the path of its downloaded CSV")

    def handle(self, *args: Any, **options: Any) -> None:
        named = options["statement"]
        path = Path(named)
        try:
            verified = self._of_file(path) if path.is_file() else verify_statement(get_statement(named))
        except (DomainError, UnicodeDecodeError) as error:
            raise CommandError(str(error)) from error
        number = verified.statement.number
        if verified.mismatch is not None:
            self.stdout.write(f"{number} DIFFERS: {verified.mismatch}")
            sys.exit(1)
        self.stdout.write(f"{number}: all {verified.n_rows} rows recompute, SHA-256 {verified.statement.csv_sha256}")

    def _of_file(self, path: Path) -> Any:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            first = next(iter(islice(csv.DictReader(lines), 1)), None)
        if not first or not first.get("statement"):
            raise CommandError(f"{path} is no issued statement: its rows name no number. Months still open have none.")
        with path.open(encoding="utf-8-sig", newline="") as lines:
            return verify_statement(get_statement(first["statement"]), given=lines)
