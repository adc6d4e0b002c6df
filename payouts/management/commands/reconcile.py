"""Compares the ledger with Stripe, names every difference, and exits 1 if there is one."""

import sys
from datetime import timedelta
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from payouts.services.reconciliation import GRACE, reconcile


class Command(BaseCommand):
    help = __doc__

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--strict",
            action="store_true",
            help="miss also what Stripe made in the last quarter hour: at a quiet moment",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        found = reconcile(grace=timedelta(0) if options["strict"] else GRACE)
        for cash in found.cash:
            self.stdout.write(
                f"pending {cash.ledger_pending} in the ledger, {cash.stripe_pending} at Stripe; "
                f"available {cash.ledger_available} and {cash.stripe_available}"
            )
        for difference in found.differences:
            dated = f" ({difference.happened_at:%Y-%m-%d %H:%M})" if difference.happened_at else ""
            self.stdout.write(f"DIFFERENCE {difference}{dated}. {difference.cause}")
        self.stdout.write(f"{found.n_transactions} transactions compared, {len(found.differences)} differences")
        if found.n_on_their_way:
            self.stdout.write(f"{found.n_on_their_way} of them are being booked")
        if not found.agrees:
            sys.exit(1)
