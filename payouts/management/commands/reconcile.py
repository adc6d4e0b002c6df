"""Compares the ledger with Stripe, names every difference, and exits 1 if there is one."""

import sys
from typing import Any

from django.core.management.base import BaseCommand

from payouts.services.reconciliation import reconcile


class Command(BaseCommand):
    help = __doc__

    def handle(self, *args: Any, **options: Any) -> None:
        found = reconcile()
        for cash in found.cash:
            self.stdout.write(
                f"pending {cash.ledger_pending} in the ledger, {cash.stripe_pending} at Stripe; "
                f"available {cash.ledger_available} and {cash.stripe_available}"
            )
        for difference in found.differences:
            self.stdout.write(f"DIFFERENCE {difference}")
        self.stdout.write(f"{found.n_transactions} transactions compared, {len(found.differences)} differences")
        if not found.agrees:
            sys.exit(1)
