"""Proves every invariant of the books again from the stored rows, prints each finding, and exits 1 if there is one."""

import sys
from typing import Any

from django.core.management.base import BaseCommand

from payouts.services.proofs import check_books


class Command(BaseCommand):
    help = __doc__

    def handle(self, *args: Any, **options: Any) -> None:
        books = check_books()
        for finding in books.findings:
            self.stdout.write(f"FINDING {finding}")
        counted = ", ".join(f"{n} {name}" for name, n in books.checked.items())
        self.stdout.write(f"{counted} checked, {books.n_findings} findings")
        if books.n_findings:
            sys.exit(1)
