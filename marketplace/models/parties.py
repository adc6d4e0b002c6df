"""People, organisations, and the contributors that an upload names before they have an account."""

import uuid
from typing import Any, ClassVar

from django.contrib.auth.models import AbstractUser, BaseUserManager
from django.db import models
from django.db.models import (  # in Party's body, mypy takes `models` for its related name
    ManyToManyField,
    Q,
    TextChoices,
)
from django.db.models.functions import Lower
from django.utils import timezone

from marketplace.jobs import Job


class UserManager(BaseUserManager["User"]):
    def create_user(self, email: str, password: str | None = None, **fields: Any) -> "User":
        if not email:
            raise ValueError("A user needs an e-mail address")
        user = self.model(email=self.normalize_email(email), **fields)
        user.set_password(password)
        user.save(using=self._db)
        return user

    def create_superuser(self, email: str, password: str | None = None, **fields: Any) -> "User":
        return self.create_user(email, password, is_staff=True, is_superuser=True, **fields)


class User(AbstractUser):
    """Someone who signs in, by e-mail. What they own belongs to the parties they are members of."""

    username = None  # type: ignore[assignment]
    email = models.EmailField(unique=True)

    USERNAME_FIELD = "email"
    REQUIRED_FIELDS: ClassVar[list[str]] = []
    objects: ClassVar[UserManager] = UserManager()  # type: ignore[assignment]

    class Meta:
        constraints = [models.UniqueConstraint(Lower("email"), name="email_unique_whatever_its_case")]

    def __str__(self) -> str:
        return self.email


class Party(models.Model):
    """A person or organisation that owns, buys, labels or is paid.

    A contributor that an upload names is a party too, introduced by the uploader under the name the file used; it
    accrues from the first day and belongs to nobody until someone claims it.
    """

    class Kind(TextChoices):
        PERSON = "person"
        ORGANISATION = "organisation"

    public_id = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    kind = models.CharField(max_length=12, choices=Kind, default=Kind.PERSON)
    name = models.CharField(max_length=120)
    country = models.CharField(max_length=2, blank=True)  # ISO 3166-1 alpha-2
    introduced_by = models.ForeignKey("self", models.PROTECT, null=True, blank=True, related_name="introduced")
    external_ref = models.CharField(max_length=200, blank=True)  # what the introducer's files call it
    claimed_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(default=timezone.now)
    members: ManyToManyField = ManyToManyField(User, through="Membership", related_name="parties")

    class Meta:
        verbose_name_plural = "parties"
        constraints = [
            models.UniqueConstraint(
                fields=["introduced_by", "external_ref"],
                condition=Q(introduced_by__isnull=False),
                name="one_party_per_introduced_name",
            ),
            models.CheckConstraint(
                condition=Q(introduced_by__isnull=True, external_ref="")
                | Q(introduced_by__isnull=False) & ~Q(external_ref=""),
                name="introduced_party_has_a_name_in_the_file",
            ),
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def is_claimed(self) -> bool:
        return self.claimed_at is not None

    @property
    def public_name(self) -> str:
        """For anyone to read; what a file called someone who has not claimed the party is for its introducer alone."""
        return self.name if self.is_claimed else f"Contributor {str(self.public_id)[:8]}"


class Membership(models.Model):
    """What a user may do in a party's name."""

    class Role(models.TextChoices):
        OWNER = "owner"  # signs, buys, moves money, manages members and keys
        EDITOR = "editor"  # uploads and describes
        VIEWER = "viewer"  # reads

    party = models.ForeignKey(Party, models.PROTECT, related_name="memberships")
    user = models.ForeignKey(User, models.PROTECT, related_name="memberships")
    role = models.CharField(max_length=8, choices=Role)
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["party", "user"], name="one_membership_per_party_and_user")]

    def __str__(self) -> str:
        return f"{self.user} as {self.role} of {self.party}"

    @property
    def has_authority(self) -> bool:
        """May sign, buy and move money."""
        return self.role == self.Role.OWNER


class Invitation(Job):
    """An introduced contributor's way to their party: bound to one address, usable once. As a job: its mail."""

    task_name: ClassVar[str] = "marketplace.tasks.send_invitation"

    party = models.ForeignKey(Party, models.PROTECT, related_name="invitations")
    email = models.EmailField()
    nonce = models.CharField(max_length=32)  # the token is made from it and the server's secret: see the service
    token_hash = models.CharField(max_length=64, unique=True)  # SHA-256 of the token, which only the mail holds
    invited_by = models.ForeignKey(User, models.PROTECT, null=True, related_name="+")  # null: by API key
    created_at = models.DateTimeField(default=timezone.now)
    expires_at = models.DateTimeField()
    revoked_at = models.DateTimeField(null=True, blank=True)  # a later one to the same address took its place
    accepted_at = models.DateTimeField(null=True, blank=True)
    accepted_by = models.ForeignKey(User, models.PROTECT, null=True, blank=True, related_name="+")

    class Meta(Job.Meta):
        constraints = [
            *Job.Meta.constraints,
            models.UniqueConstraint(
                fields=["party", "email"],
                condition=Q(accepted_at__isnull=True, revoked_at__isnull=True),
                name="one_open_invitation_per_address",
            ),
        ]

    def __str__(self) -> str:
        return f"Invitation of {self.party}"


class MailOptOut(models.Model):
    """An address that wants no invitation, from anyone, ever again; kept as a hash only."""

    address_sha256 = models.CharField(max_length=64, primary_key=True)  # of the address in lower case
    opted_out_at = models.DateTimeField(default=timezone.now)

    def __str__(self) -> str:
        return f"{self.address_sha256[:12]}…"
