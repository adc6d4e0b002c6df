"""What a client may say, and what it gets back: two promises, so two kinds of serializers."""

from typing import Any

from drf_spectacular.utils import OpenApiExample, extend_schema_field, extend_schema_serializer
from rest_framework import serializers

from marketplace import clock
from marketplace.api.fields import MoneyField
from marketplace.models import Citation, Dataset, DatasetVersion, Invitation, License, Offer, Order, OrderLine, Party
from marketplace.money import Money
from marketplace.selectors import cited_by, current_offer, price_history
from marketplace.services.orders import MAX_LINES

MAX_ID = 2**63 - 1  # of PostgreSQL's bigint


class VersionOutput(serializers.ModelSerializer):
    """A version's records, named by the Merkle root over their digests."""

    class Meta:
        model = DatasetVersion
        fields = ["number", "merkle_root", "n_records", "n_copies", "size_bytes", "features", "published_at"]


class OfferOutput(serializers.ModelSerializer):
    """The terms on sale: `platform_fee_bps + upfront_bps + pool_bps` make 10,000 of the price."""

    price = MoneyField()
    royalty_cap = MoneyField(allow_null=True, help_text="Per license, over its life; null: no cap.")
    allowed_uses = serializers.ListField(child=serializers.CharField())

    class Meta:
        model = Offer
        fields = [
            "id",
            "number",
            "price",
            "platform_fee_bps",
            "upfront_bps",
            "pool_bps",
            "royalty_bps",
            "royalty_cap",
            "labellers_bps",
            "term_days",
            "seats",
            "allowed_uses",
            "disclosure_due_days",
            "policy_sha256",
            "created_at",
        ]


class ContractOutput(OfferOutput):
    policy = serializers.JSONField(help_text="ODRL, JSON-LD.")

    class Meta(OfferOutput.Meta):
        fields = [*OfferOutput.Meta.fields, "policy", "contract_text"]


class PriceOutput(serializers.ModelSerializer):
    """One step of the public price history."""

    price = MoneyField()

    class Meta:
        model = Offer
        fields = ["number", "price", "royalty_bps", "created_at"]


class CitedByOutput(serializers.ModelSerializer):
    """A model that says it was trained on the dataset."""

    model = serializers.SlugField(source="disclosure.model.slug")
    name = serializers.CharField(source="disclosure.model.name")
    disclosure = serializers.UUIDField(source="disclosure.public_id")
    version = serializers.IntegerField(source="version.number")
    disclosed_at = serializers.DateTimeField(source="disclosure.disclosed_at")

    class Meta:
        model = Citation
        fields = ["model", "name", "disclosure", "version", "n_records", "disclosed_at"]


class DatasetOutput(serializers.ModelSerializer):
    owner = serializers.CharField(source="owner.name")
    offer = serializers.SerializerMethodField()
    version = serializers.SerializerMethodField()

    class Meta:
        model = Dataset
        fields = ["slug", "title", "summary", "modality", "owner", "version", "offer"]

    @extend_schema_field(OfferOutput)
    def get_offer(self, dataset: Dataset) -> dict[str, Any]:
        return OfferOutput(_offer_of(dataset)).data

    @extend_schema_field(VersionOutput)
    def get_version(self, dataset: Dataset) -> dict[str, Any]:
        return VersionOutput(_offer_of(dataset).version).data


class DatasetDetailOutput(DatasetOutput):
    price_history = serializers.SerializerMethodField()
    cited_by = serializers.SerializerMethodField()
    statistics = serializers.SerializerMethodField(help_text="Per column; the labels with their counts.")
    preview = serializers.SerializerMethodField(help_text="The rows that the rights holder lets anyone see.")

    class Meta(DatasetOutput.Meta):
        fields = [
            *DatasetOutput.Meta.fields,
            "description",
            "source",
            "statistics",
            "preview",
            "price_history",
            "cited_by",
        ]

    @extend_schema_field(ContractOutput)
    def get_offer(self, dataset: Dataset) -> dict[str, Any]:
        return ContractOutput(_offer_of(dataset)).data

    @extend_schema_field(PriceOutput(many=True))
    def get_price_history(self, dataset: Dataset) -> list[dict[str, Any]]:
        return PriceOutput(price_history(dataset), many=True).data  # type: ignore[return-value]

    @extend_schema_field(CitedByOutput(many=True))
    def get_cited_by(self, dataset: Dataset) -> list[dict[str, Any]]:
        return CitedByOutput(cited_by(dataset), many=True).data  # type: ignore[return-value]

    @extend_schema_field({"type": "object", "additionalProperties": True})
    def get_statistics(self, dataset: Dataset) -> Any:
        return _offer_of(dataset).version.statistics

    @extend_schema_field({"type": "array", "items": {}})
    def get_preview(self, dataset: Dataset) -> Any:
        return _offer_of(dataset).version.preview


def _offer_of(dataset: Dataset) -> Offer:
    offer = current_offer(dataset)
    assert offer is not None, "a listed dataset has an offer"
    return offer


@extend_schema_serializer(
    examples=[
        OpenApiExample(
            "Two datasets, one order",
            value={
                "offers": [17, 23],
                "expected_total": {"amount": "129.00", "currency": "USD"},
                "accepted_name": "Carol Chen",
            },
            request_only=True,
        )
    ]
)
class OrderInput(serializers.Serializer):
    #: place_order refuses what is not open to the buyer
    offers = serializers.ListField(
        child=serializers.IntegerField(min_value=1, max_value=MAX_ID), allow_empty=False, max_length=MAX_LINES
    )
    expected_total = MoneyField(help_text="What you were shown; an order is never placed at another price.")
    accepted_name = serializers.CharField(
        max_length=120, help_text="Your full name: with it you accept the contract of every line."
    )

    def validate_offers(self, ids: list[int]) -> list[Offer]:
        found = Offer.objects.select_related("dataset").in_bulk(ids)
        if missing := {index: [f"There is no offer {id}."] for index, id in enumerate(ids) if id not in found}:
            raise serializers.ValidationError(missing)  # type: ignore[arg-type]
        return [found[id] for id in ids]


class ContributorOutput(serializers.ModelSerializer):
    """Someone whom one of your files named; who they are, only they can say."""

    id = serializers.UUIDField(source="public_id")
    name = serializers.CharField(source="external_ref", help_text="As your files have it.")
    is_claimed = serializers.BooleanField()
    invited_at = serializers.SerializerMethodField()

    class Meta:
        model = Party
        fields = ["id", "name", "is_claimed", "claimed_at", "invited_at"]

    @extend_schema_field({"type": ["string", "null"], "format": "date-time", "description": "While it still holds."})
    def get_invited_at(self, party: Party) -> str | None:
        newest = next(iter(party.invitations.all()), None)
        return newest.created_at.isoformat() if newest else None


class InvitationInput(serializers.Serializer):
    email = serializers.EmailField(help_text="Only who reads mail at this address can claim the contributor.")


class InvitationOutput(serializers.ModelSerializer):
    contributor = serializers.UUIDField(source="party.public_id")

    class Meta:
        model = Invitation
        fields = ["contributor", "email", "created_at", "expires_at"]


class OrderLineOutput(serializers.ModelSerializer):
    dataset = serializers.SlugField(source="version.dataset.slug")
    title = serializers.CharField(source="version.dataset.title")
    version = serializers.IntegerField(source="version.number")
    merkle_root = serializers.CharField(source="version.merkle_root")
    offer = serializers.IntegerField(source="offer_id")
    price = MoneyField()
    license = serializers.SerializerMethodField()

    class Meta:
        model = OrderLine
        fields = ["dataset", "title", "version", "merkle_root", "offer", "price", "license"]

    @extend_schema_field({"type": ["string", "null"], "format": "uuid", "description": "Once the order is paid."})
    def get_license(self, line: OrderLine) -> str | None:
        license: License | None = getattr(line, "license", None)
        return str(license.public_id) if license else None


class OrderOutput(serializers.ModelSerializer):
    id = serializers.UUIDField(source="public_id")
    total = MoneyField()
    lines = OrderLineOutput(many=True)

    class Meta:
        model = Order
        fields = ["id", "status", "total", "accepted_name", "placed_at", "expires_at", "paid_at", "lines"]
        extra_kwargs = {"expires_at": {"help_text": "Unpaid by then, the order is cancelled: place a new one."}}


class LicenseOutput(serializers.ModelSerializer):
    id = serializers.UUIDField(source="public_id")
    order = serializers.UUIDField(source="order_line.order.public_id")
    dataset = serializers.SlugField(source="version.dataset.slug")
    version = serializers.IntegerField(source="version.number")
    merkle_root = serializers.CharField(source="version.merkle_root")
    n_records = serializers.IntegerField(source="version.n_records")
    price = serializers.SerializerMethodField()
    royalty_bps = serializers.IntegerField(source="offer.royalty_bps")
    is_live = serializers.SerializerMethodField(help_text="In force now: not revoked and not expired.")

    class Meta:
        model = License
        fields = [
            "id",
            "order",
            "dataset",
            "version",
            "merkle_root",
            "n_records",
            "price",
            "royalty_bps",
            "policy_sha256",
            "granted_at",
            "expires_at",
            "disclosure_due_at",
            "first_downloaded_at",
            "is_live",
        ]

    @extend_schema_field(MoneyField)
    def get_price(self, license: License) -> dict[str, str]:
        price = Money(license.order_line.price_micros, license.order_line.order.currency)
        return MoneyField().to_representation(price)

    def get_is_live(self, license: License) -> bool:
        return license.is_live(self.context.get("now") or clock.now())


class DownloadOutput(serializers.Serializer):
    url = serializers.URLField(help_text="Needs no key; supports Range, so that a download can be resumed.")
    expires_at = serializers.DateTimeField(help_text="Ask again for a new link after that.")
    filename = serializers.CharField()
    size_bytes = serializers.IntegerField()
    sha256 = serializers.CharField()
    merkle_root = serializers.CharField()
