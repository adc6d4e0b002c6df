"""Who gave what to a version, and the private index by which copies are found."""

from django.db import models
from django.db.models import Q


class Contribution(models.Model):
    """What one party adds to one version in one role; the Parquet's columns `rights_holder` and `labeller` hold `number`."""

    class Role(models.TextChoices):
        RIGHTS_HOLDER = "rights_holder"
        LABELLER = "labeller"

    version = models.ForeignKey("marketplace.DatasetVersion", models.PROTECT, related_name="contributions")
    party = models.ForeignKey("marketplace.Party", models.PROTECT, related_name="contributions")
    role = models.CharField(max_length=13, choices=Role)
    number = models.PositiveIntegerField()  # 0, 1, …: within version and role, in order of first appearance in the file
    n_records = models.PositiveBigIntegerField()
    n_copies = models.PositiveBigIntegerField(
        default=0
    )  # of those, records whose money belongs to an earlier registrant

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["version", "party", "role"], name="one_contribution_per_version_party_role"
            ),
            models.UniqueConstraint(fields=["version", "role", "number"], name="contribution_number_once"),
            models.CheckConstraint(
                condition=Q(n_records__gt=0) & Q(n_copies__lte=models.F("n_records")), name="contribution_counts"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.party}: {self.n_records} as {self.role} of {self.version}"


class RecordFingerprint(models.Model):
    """A keyed fingerprint of one record's normalised content (HMAC-SHA256, 16 bytes): equal means an exact copy.

    Private: it answers "is this a copy, and whose was first?" and never leaves the server. The first registrant is the
    record of the first published version, then the lowest row.
    """

    version = models.ForeignKey("marketplace.DatasetVersion", models.PROTECT, related_name="fingerprints")
    row = models.PositiveBigIntegerField()
    fingerprint = models.BinaryField(max_length=16)
    holder = models.PositiveIntegerField()  # contribution numbers within the version
    labeller = models.IntegerField(default=-1)  # -1: nobody

    class Meta:
        constraints = [models.UniqueConstraint(fields=["version", "row"], name="one_fingerprint_per_record")]
        indexes = [models.Index(fields=["fingerprint", "version", "row"], name="fingerprint_lookup")]

    def __str__(self) -> str:
        return f"{self.version_id}:{self.row}"


class RecordCopy(models.Model):
    """A record of a published version that repeats an earlier registered one, and whose money it therefore is.

    Written once, when the version is published; the original is never itself a copy. Append-only.
    """

    version = models.ForeignKey("marketplace.DatasetVersion", models.PROTECT, related_name="copies")
    row = models.PositiveBigIntegerField()
    original_version = models.ForeignKey("marketplace.DatasetVersion", models.PROTECT, related_name="+")
    original_row = models.PositiveBigIntegerField()
    payee = models.ForeignKey("marketplace.Party", models.PROTECT, related_name="+")  # the original's rights holder
    labeller = models.ForeignKey("marketplace.Party", models.PROTECT, null=True, related_name="+")  # the original's

    class Meta:
        constraints = [models.UniqueConstraint(fields=["version", "row"], name="one_original_per_copy")]
        indexes = [models.Index(fields=["original_version", "original_row"], name="copies_of_a_record")]

    def __str__(self) -> str:
        return f"{self.version_id}:{self.row} repeats {self.original_version_id}:{self.original_row}"
