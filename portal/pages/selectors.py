"""What only a page over several packages asks for."""

from dataclasses import dataclass
from datetime import datetime

from django.db.models import Count, Exists, OuterRef, Prefetch, QuerySet, Sum

from attribution.selectors import public_disclosures
from marketplace.models import Dataset, DatasetVersion, Disclosure, Offer, TrainedModel
from marketplace.money import Money
from payouts.models import Payout


@dataclass(frozen=True)
class SiteFigures:
    """The live system in four numbers."""

    n_datasets: int
    n_records: int
    n_models: int
    paid_out: list[Money]  # one per currency


def site_figures(at: datetime) -> SiteFigures:
    on_sale = (
        Offer.objects.filter(dataset__status=Dataset.Status.LISTED)
        .order_by("dataset_id", "-number")
        .distinct("dataset_id")
    )
    versions = DatasetVersion.objects.filter(pk__in=on_sale.values("version")).aggregate(
        n_datasets=Count("dataset", distinct=True), n_records=Sum("n_records", default=0)
    )
    paid = (
        Payout.objects.filter(status__in=[Payout.Status.SENT, Payout.Status.PAID])
        .values("currency")
        .annotate(micros=Sum("amount_micros"))
        .order_by("-micros")
    )
    return SiteFigures(
        n_datasets=versions["n_datasets"],
        n_records=versions["n_records"],
        n_models=public_models(at).count(),
        paid_out=[Money(row["micros"], row["currency"]) for row in paid],
    )


def public_models(at: datetime) -> QuerySet[TrainedModel]:
    """Models with a disclosure that anyone may read, newest first, each with those disclosures."""
    return (
        TrainedModel.objects.filter(Exists(public_disclosures(at).filter(model=OuterRef("pk"))))
        .select_related("owner")
        .prefetch_related(Prefetch("disclosures", public_disclosures(at)))
        .order_by("-pk")
    )


def visible_disclosures(model: TrainedModel, *, is_owner: bool, at: datetime) -> QuerySet[Disclosure]:
    """A model's disclosures, latest first; its owner sees those under embargo too."""
    found = model.disclosures.all() if is_owner else public_disclosures(at).filter(model=model)
    return found.order_by("-number")
