from datetime import timedelta
from typing import ClassVar

from django.db import models
from django.db.models import F, Q
from django.utils import timezone

from marketplace.jobs import Job

#: For so long a change waits before it is used, so that whoever did not make it can still say so.
HOLD = timedelta(hours=72)


class BankDetails(models.Model):
    """Where a payee whom Stripe does not reach is paid, sealed (`payouts.sealing`). Append-only: a change is another row.

    Erased, it is empty, and its erasure says since when.
    """

    party = models.ForeignKey("marketplace.Party", models.PROTECT, related_name="bank_details")
    sealed = models.TextField()  # account_holder, iban or account_number, bic, bank, address
    last_four = models.CharField(max_length=4)  # of the account: all that a page shows
    entered_by = models.ForeignKey("marketplace.User", models.PROTECT, related_name="+")
    entered_at = models.DateTimeField()  # business time
    usable_from = models.DateTimeField()  # business time; not used for a payment before

    class Meta:
        ordering = ["-pk"]
        constraints = [
            models.CheckConstraint(
                condition=Q(usable_from__gte=F("entered_at") + HOLD), name="bank_details_are_held_for_72_hours"
            ),
        ]

    def __str__(self) -> str:
        return f"Account ending in {self.last_four}" if self.last_four else "An account that was erased"


class BankDetailsErasure(models.Model):
    """That a payee's bank details were erased, by whom and why; writing it empties the row (migration `0041_erasure_rules`).

    Append-only: all that is left of them.
    """

    details = models.OneToOneField(BankDetails, models.PROTECT, related_name="erasure")
    erased_by = models.ForeignKey("marketplace.User", models.PROTECT, related_name="+")
    erased_at = models.DateTimeField()  # business time
    reason = models.TextField(blank=True)  # of the staff; empty: an owner of the payee did it

    class Meta:
        ordering = ["-pk"]

    def __str__(self) -> str:
        return f"Erasure of bank details {self.details_id}"


class BankDetailsNotice(Job):
    """The mail that says that a payee's bank details were changed, to the party's owners."""

    task_name: ClassVar[str] = "payouts.tasks.send_bank_details_notice"

    details = models.OneToOneField(BankDetails, models.PROTECT, related_name="notice")
    created_at = models.DateTimeField(default=timezone.now)

    class Meta(Job.Meta):
        pass

    def __str__(self) -> str:
        return f"Notice of bank details {self.details_id}"
