"""The only doors to rows for who is not staff: to a stranger they do not exist (404, not 403)."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date

import pyarrow.parquet as pq
from django.core.files.storage import default_storage
from django.db.models import F, Prefetch, Q, QuerySet
from django.utils import timezone

from marketplace import clock
from marketplace.models import (
    ApiKey,
    AuditEvent,
    Citation,
    Dataset,
    DatasetVersion,
    Invitation,
    License,
    Offer,
    Order,
    OrderLine,
    Party,
    StaffKey,
    Upload,
)
from marketplace.planning import hash_joins


def orders_visible_to(party: Party) -> QuerySet[Order]:
    """A buyer's orders, newest first, with their lines and licenses."""
    lines = OrderLine.objects.select_related("version__dataset__owner", "offer", "license").order_by("pk")
    return Order.objects.filter(buyer=party).prefetch_related(Prefetch("lines", lines)).order_by("-placed_at", "-pk")


def licenses_visible_to(party: Party) -> QuerySet[License]:
    """A licensee's licenses, newest first."""
    return (
        License.objects.filter(licensee=party)
        .select_related("version__dataset__owner", "offer", "order_line__order")
        .order_by("-granted_at", "-pk")
    )


def cited_by(dataset: Dataset) -> QuerySet[Citation]:
    """Who says that they trained on it, latest first; what is under embargo is not said yet."""
    return (
        Citation.objects.filter(version__dataset=dataset)
        .filter(Q(disclosure__embargo_until=None) | Q(disclosure__embargo_until__lte=clock.now()))
        .select_related("disclosure__model__owner", "version__dataset")
        .order_by("-disclosure__disclosed_at", "-pk")
    )


def api_keys_of(party: Party) -> QuerySet[ApiKey]:
    """A party's keys, those in use first; never their text, which nobody has."""
    return ApiKey.objects.filter(party=party).order_by(F("revoked_at").asc(nulls_first=True), "-pk")


# --- datasets, offers, records ----------------------------------------------------------------------------------------
def listed_datasets(query: str = "") -> QuerySet[Dataset]:
    """The catalogue: what is for sale, newest first, each with its offers."""
    found = Dataset.objects.filter(status=Dataset.Status.LISTED)
    for word in query.split()[:10]:
        found = found.filter(
            Q(title__icontains=word)
            | Q(summary__icontains=word)
            | Q(description__icontains=word)
            | Q(owner__name__icontains=word)
        )
    return found.select_related("owner").prefetch_related(_offers()).order_by("-pk")


def datasets_visible_to(party: Party | None) -> QuerySet[Dataset]:
    """Whatever has ever been for sale, and a party's own drafts."""
    visible = Q(status=Dataset.Status.LISTED) | Q(status=Dataset.Status.WITHDRAWN, offers__isnull=False)
    if party is not None:
        visible |= Q(owner=party)
    return Dataset.objects.filter(visible).select_related("owner").prefetch_related(_offers()).distinct()


def datasets_of(party: Party) -> QuerySet[Dataset]:
    """A party's own datasets, drafts included, newest first."""
    return (
        Dataset.objects.filter(owner=party)
        .select_related("owner")
        .prefetch_related(_offers(), Prefetch("versions", DatasetVersion.objects.order_by("-number")))
        .order_by("-pk")
    )


def contributors_of(introducer: Party, dataset: Dataset | None = None) -> QuerySet[Party]:
    """Whom a party's files have named, latest first, each with its newest invitation that still holds as `invitations`."""
    found = Party.objects.filter(introduced_by=introducer)
    if dataset is not None:
        found = found.filter(contributions__version__dataset=dataset).distinct()
    still = Invitation.objects.filter(accepted_at=None, revoked_at=None, expires_at__gt=timezone.now())
    return found.prefetch_related(Prefetch("invitations", still.order_by("-pk"))).order_by("-pk")


def uploads_visible_to(party: Party) -> QuerySet[Upload]:
    """A party's uploads, newest first, with the version that each makes."""
    return (
        Upload.objects.filter(version__dataset__owner=party)
        .select_related("version__dataset__owner")
        .order_by("-queued_at", "-pk")
    )


def current_offer(dataset: Dataset) -> Offer | None:
    """The terms on sale, which are the newest; None before there are any. Whether it is for sale, its status says."""
    return next(iter(price_history(dataset)), None)


def price_history(dataset: Dataset) -> list[Offer]:
    """Every offer there was, newest first."""
    if "offers" in getattr(dataset, "_prefetched_objects_cache", {}):
        return list(dataset.offers.all())
    return list(dataset.offers.select_related("version").order_by("-number"))


def _offers() -> Prefetch:
    return Prefetch("offers", Offer.objects.select_related("version").order_by("-number"))


@dataclass(frozen=True)
class MoneyCount:
    """How many records of a version one party is paid for, in one role."""

    party_id: int
    role: str  # of Contribution.Role
    n_records: int


def money_counts(version: DatasetVersion) -> list[MoneyCount]:
    """Distinct records of a version by the party that is paid for them; in both roles they sum to the same.

    A record that repeats another version's counts for the original's rights holder and labeller, once however often it
    is repeated here; a repeat within the version does not count. As labeller, whoever labelled the record; a record that
    nobody labelled counts for its rights holder in both roles.
    """
    with hash_joins() as cursor:
        cursor.execute(f"{MONEY_COUNTS} ORDER BY 2, 1", {"version": version.pk})
        return [MoneyCount(*row) for row in cursor.fetchall()]


#: `money_counts` as a statement for whoever keeps or compares them without fetching: (party, role, records) of `version`.
MONEY_COUNTS = """
WITH paid AS (
    SELECT holder.party_id AS holder, coalesce(labeller.party_id, holder.party_id) AS labeller
    FROM marketplace_recordfingerprint f
    JOIN marketplace_contribution holder
        ON holder.version_id = f.version_id AND holder.role = 'rights_holder' AND holder.number = f.holder
    LEFT JOIN marketplace_contribution labeller
        ON labeller.version_id = f.version_id AND labeller.role = 'labeller' AND labeller.number = f.labeller
    WHERE f.version_id = %(version)s AND NOT EXISTS (
        SELECT FROM marketplace_recordcopy c WHERE c.version_id = f.version_id AND c.row = f.row
    )
    UNION ALL
    SELECT payee, coalesce(labeller, payee) FROM (
        SELECT DISTINCT original_version_id, original_row, payee_id AS payee, labeller_id AS labeller
        FROM marketplace_recordcopy WHERE version_id = %(version)s AND original_version_id <> %(version)s
    ) originals
)
SELECT holder, 'rights_holder', count(*) FROM paid GROUP BY holder
UNION ALL
SELECT labeller, 'labeller', count(*) FROM paid GROUP BY labeller
"""


@contextmanager
def record_columns(version: DatasetVersion) -> Iterator[pq.ParquetFile]:
    """A version's normalised Parquet, open; `marketplace.ingest.records` says what is in it.

    Read what is needed: `parquet.read(["content", "label"])`, or `parquet.iter_batches(columns=["digest"])`.
    """
    with default_storage.open(version.parquet_key, "rb") as file, pq.ParquetFile(file) as parquet:
        yield parquet


# --- for staff --------------------------------------------------------------------------------------------------------
def audit_events(
    *,
    who: str = "",
    action: str = "",
    target: str = "",
    since: date | None = None,
    until: date | None = None,
    staff: bool = False,
) -> QuerySet[AuditEvent]:
    """Who did what to what and when, newest first.

    Args:
        who: part of an e-mail address or of a party's name.
        action: how it begins: "payout_run"; target: the whole of it: "period:2026-03". Both also as pages write them:
            "payout run", "period 2026-03".
        since, until: days (UTC), both included.
        staff: only what staff did.
    """
    found = AuditEvent.objects.select_related("actor", "party").order_by("-pk")
    if who:
        found = found.filter(Q(actor__email__icontains=who) | Q(party__name__icontains=who))
    if action:
        found = found.filter(action__iregex=rf"^{_as_written(action)}")
    if target:
        found = found.filter(target__iregex=rf"^{_as_written(target)}$")
    if since:
        found = found.filter(happened_at__date__gte=since)
    if until:
        found = found.filter(happened_at__date__lte=until)
    return found.filter(actor__is_staff=True) if staff else found


def _as_written(words: str) -> str:
    """A pattern for a code as it is kept or as a page writes it: "manual entry 3" finds "manual_entry:3"."""
    return ".".join(re.escape(part) for part in re.split(r"[ _.:]+", words.strip()))


def staff_keys() -> QuerySet[StaffKey]:
    """Every key to the desk, those that work first; never their text, which nobody has."""
    return StaffKey.objects.select_related("user").order_by(F("revoked_at").asc(nulls_first=True), "-pk")
