"""Rows of the marketplace, with real bytes behind every version.

A party that a factory makes has its user as `party.user`, as the fixtures alice, bob, carol and mallory do.
"""

import hashlib
import hmac
import json
import random
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import factory
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from django.conf import settings
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.utils import timezone
from factory.django import DjangoModelFactory

from marketplace import clock
from marketplace.ingest.copies import text_fingerprints, vector_fingerprints
from marketplace.models import (
    Attestation,
    Contribution,
    Dataset,
    DatasetVersion,
    License,
    Membership,
    Offer,
    Order,
    OrderLine,
    Party,
    RecordCopy,
    RecordFingerprint,
    User,
)
from marketplace.services.orders import PAYMENT_TERM, mark_paid

PASSWORD = "correct horse battery staple"


class UserFactory(DjangoModelFactory):
    class Meta:
        model = User

    email = factory.Sequence(lambda n: f"person{n}@example.org")

    @classmethod
    def _create(cls, model_class: type[User], *args: Any, **fields: Any) -> User:
        return User.objects.create_user(fields.pop("email"), fields.pop("password", PASSWORD), **fields)


class PartyFactory(DjangoModelFactory):
    class Meta:
        model = Party
        skip_postgeneration_save = True

    name = factory.Sequence(lambda n: f"Party {n}")
    country = "DE"
    claimed_at = factory.LazyFunction(timezone.now)

    @factory.post_generation
    def user(self: Party, create: bool, extracted: User | None, **fields: Any) -> None:
        user = extracted or UserFactory(**fields)
        Membership.objects.create(party=self, user=user, role=Membership.Role.OWNER)
        self.user = user


class DatasetFactory(DjangoModelFactory):
    class Meta:
        model = Dataset

    owner = factory.SubFactory(PartyFactory)
    slug = factory.Sequence(lambda n: f"dataset-{n}")
    title = factory.Sequence(lambda n: f"Dataset {n}")
    summary = "Small vectors with a label each."
    source = "Made for a test."


class PublishedVersionFactory(DjangoModelFactory):
    """A frozen, attested, published version whose normalised Parquet is in storage.

    Args:
        contributions: rights holder → number of records, in file order; by default the dataset's owner has 8.
        labellers: labeller → number of records, in file order; the rest has none.
        content: a vector or a text per record; by default random vectors of length 4 that no other version repeats.
        labels: a label per record; by default "0" and "1" in turn.
        copies: row → (earlier version, row there), each a `RecordCopy`; give the same content if fingerprints matter.
    """

    class Meta:
        model = DatasetVersion

    dataset = factory.SubFactory(DatasetFactory)

    @classmethod
    def _create(
        cls,
        model_class: type[DatasetVersion],
        *args: Any,
        dataset: Dataset,
        contributions: Mapping[Party, int] | None = None,
        labellers: Mapping[Party, int] | None = None,
        content: Sequence[Sequence[float]] | Sequence[str] | None = None,
        labels: Sequence[str | None] | None = None,
        copies: Mapping[int, tuple[DatasetVersion, int]] | None = None,
        **fields: Any,
    ) -> DatasetVersion:
        contributions = contributions or {dataset.owner: len(content) if content is not None else 8}
        holder = _spread(contributions)
        labeller = _spread(labellers or {})
        labeller += [-1] * (len(holder) - len(labeller))
        version = DatasetVersion.objects.create(dataset=dataset, number=dataset.versions.count() + 1)
        if content is None:
            rng = random.Random(version.pk)
            content = [[round(rng.gauss(0, 1), 6) for _ in range(4)] for _ in holder]
        labels = list(labels or (str(row % 2) for row in range(len(holder))))
        assert len(content) == len(labels) == len(holder) == len(labeller), "one content, label and labeller per record"

        salts = [_hmac(f"salt:{version.pk}".encode(), str(row).encode())[:16] for row in range(len(holder))]
        digests = [
            hashlib.sha256(salt + json.dumps([one, label]).encode()).digest()
            for salt, one, label in zip(salts, content, labels, strict=True)
        ]
        data = _parquet(digests, salts, content, labels, holder, labeller)
        sha256 = hashlib.sha256(data).hexdigest()
        key = default_storage.save(f"versions/{sha256}.parquet", ContentFile(data))

        for role, numbers in (
            (Contribution.Role.RIGHTS_HOLDER, contributions),
            (Contribution.Role.LABELLER, labellers),
        ):
            Contribution.objects.bulk_create(
                Contribution(version=version, party=party, role=role, number=number, n_records=n_records)
                for number, (party, n_records) in enumerate((numbers or {}).items())
            )
        RecordFingerprint.objects.bulk_create(
            RecordFingerprint(
                version=version,
                row=row,
                fingerprint=fingerprint,
                holder=holder[row],
                labeller=labeller[row],
            )
            for row, fingerprint in enumerate(_fingerprints(content))
        )
        by_number = {
            role: dict(version.contributions.filter(role=role).values_list("number", "party"))
            for role in Contribution.Role.values
        }
        frozen = {
            "status": DatasetVersion.Status.FROZEN,
            "merkle_root": merkle_root(digests).hex(),
            "n_records": len(holder),
            "size_bytes": len(data),
            "parquet_sha256": sha256,
            "parquet_key": key,
            "features": _features(content, labels),
            "frozen_at": timezone.now(),
        }
        published_at = fields.pop("published_at", None) or timezone.now()
        for name, value in (frozen | fields).items():
            setattr(version, name, value)
        version.save()  # frozen first: the database refuses to publish a draft
        for role, column in ((Contribution.Role.RIGHTS_HOLDER, holder), (Contribution.Role.LABELLER, labeller)):
            for number, party in by_number[role].items():
                n = sum(column[row] == number for row in copies or {})
                if n:
                    Contribution.objects.filter(version=version, role=role, party=party).update(n_copies=n)
        version.status, version.published_at, version.n_copies = (
            version.Status.PUBLISHED,
            published_at,
            len(copies or {}),
        )
        version.save()
        for row, (original, original_row) in (copies or {}).items():
            first = RecordFingerprint.objects.get(version=original, row=original_row)
            theirs = original.contributions.filter
            labelled = theirs(role=Contribution.Role.LABELLER, number=first.labeller).first()
            RecordCopy.objects.create(
                version=version,
                row=row,
                original_version=original,
                original_row=original_row,
                payee=theirs(role=Contribution.Role.RIGHTS_HOLDER, number=first.holder).get().party,
                labeller=labelled.party if labelled else None,
            )
        user = owner_of(dataset.owner)
        Attestation.objects.create(
            version=version,
            merkle_root=version.merkle_root,
            party=dataset.owner,
            signed_by=user,
            signed_name=dataset.owner.name,
            statement="I may license these records.",
        )
        return version


class OfferFactory(DjangoModelFactory):
    """The current offer of a listed dataset: 100 USD, of which 10 % fee, 30 % upfront and 60 % royalty pool."""

    class Meta:
        model = Offer

    version = factory.SubFactory(PublishedVersionFactory)
    dataset = factory.LazyAttribute(lambda offer: offer.version.dataset)
    number = factory.LazyAttribute(lambda offer: offer.dataset.offers.count() + 1)
    price_micros = 100_000_000
    currency = "USD"
    platform_fee_bps = 1_000
    upfront_bps = 3_000
    pool_bps = 6_000
    royalty_bps = 500
    allowed_uses = factory.LazyFunction(lambda: ["train"])
    policy = factory.LazyAttribute(
        lambda offer: {"@type": "Offer", "uid": f"urn:offer:{offer.dataset.slug}:{offer.number}"}
    )
    policy_sha256 = factory.LazyAttribute(
        lambda offer: hashlib.sha256(json.dumps(offer.policy, sort_keys=True).encode()).hexdigest()
    )
    contract_text = "You may train models on these records."
    created_by = factory.LazyAttribute(lambda offer: owner_of(offer.dataset.owner))

    @classmethod
    def _create(cls, model_class: type[Offer], *args: Any, **fields: Any) -> Offer:
        offer: Offer = super()._create(model_class, *args, **fields)
        offer.dataset.status = Dataset.Status.LISTED
        offer.dataset.save(update_fields=["status"])
        return offer


class OrderFactory(DjangoModelFactory):
    """A placed order with a line per offer; `offers=[…]`, one new offer by default."""

    class Meta:
        model = Order

    buyer = factory.SubFactory(PartyFactory)
    placed_by = factory.LazyAttribute(lambda order: owner_of(order.buyer))
    key = factory.Sequence(lambda n: f"order-{n}")
    request_sha256 = "0" * 64
    accepted_name = "A Buyer"
    placed_at = factory.LazyFunction(clock.now)
    expires_at = factory.LazyAttribute(lambda order: order.placed_at + PAYMENT_TERM)

    @classmethod
    def _create(
        cls, model_class: type[Order], *args: Any, offers: Sequence[Offer] | None = None, **fields: Any
    ) -> Order:
        offers = offers or [OfferFactory()]
        order: Order = super()._create(
            model_class,
            total_micros=sum(offer.price_micros for offer in offers),
            currency=offers[0].currency,
            **fields,
        )
        for offer in offers:
            OrderLine.objects.create(order=order, offer=offer, version=offer.version, price_micros=offer.price_micros)
        return order


class PaidOrderFactory(OrderFactory):
    """Paid, with its licenses; no money is booked (that is payouts')."""

    class Meta:
        model = Order

    @classmethod
    def _create(cls, model_class: type[Order], *args: Any, **fields: Any) -> Order:
        paid_at = fields.pop("paid_at", None) or clock.now()
        order = super()._create(model_class, *args, **fields)
        mark_paid(order=order, paid_at=paid_at)
        order.refresh_from_db()
        return order


class LicenseFactory(factory.Factory):
    """`LicenseFactory(licensee=carol, offer=offer)` or `version=version`: the one license of a paid order of one line."""

    class Meta:
        model = License

    @classmethod
    def _create(
        cls,
        model_class: type[License],
        *args: Any,
        licensee: Party | None = None,
        offer: Offer | None = None,
        version: DatasetVersion | None = None,
        **fields: Any,
    ) -> License:
        if offer is None:
            current = version and version.offers.order_by("-number").first()
            offer = current or (OfferFactory(version=version) if version else OfferFactory())
        order = PaidOrderFactory(buyer=licensee or PartyFactory(), offers=[offer])
        license = License.objects.get(order_line__order=order)
        for name, value in fields.items():
            setattr(license, name, value)
        license.save()
        return license


def owner_of(party: Party) -> User:
    """Someone who may sign for the party."""
    return User.objects.filter(memberships__party=party, memberships__role=Membership.Role.OWNER).earliest("pk")


def merkle_root(digests: Sequence[bytes]) -> bytes:
    """RFC 6962's definition, word by word."""
    if len(digests) == 1:
        return hashlib.sha256(b"\0" + digests[0]).digest()
    split = 1 << (len(digests) - 1).bit_length() - 1  # the largest power of two below the length
    return hashlib.sha256(b"\1" + merkle_root(digests[:split]) + merkle_root(digests[split:])).digest()


def _spread(counts: Mapping[Party, int]) -> list[int]:
    return [number for number, n_records in enumerate(counts.values()) for _ in range(n_records)]


def _hmac(*parts: bytes) -> bytes:
    key = settings.FINGERPRINT_KEY.encode()
    for part in parts:
        key = hmac.digest(key, part, "sha256")
    return key


def _fingerprints(content: Sequence[Sequence[float]] | Sequence[str]) -> list[bytes]:
    key = settings.FINGERPRINT_KEY.encode()
    if isinstance(content[0], str):
        return text_fingerprints(key, [str(one) for one in content])
    return vector_fingerprints(key, [np.array(one, dtype=np.float64) for one in content])


def _features(content: Sequence[Any], labels: Sequence[str | None]) -> dict[str, Any]:
    classes = sorted({label for label in labels if label is not None})
    if isinstance(content[0], str):
        return {"content": {"kind": "text"}, "label": {"classes": classes}}
    values = [float(value) for one in content for value in one]
    return {
        "content": {"kind": "vector", "length": len(content[0]), "minimum": min(values), "maximum": max(values)},
        "label": {"classes": classes},
    }


def _parquet(
    digests: list[bytes],
    salts: list[bytes],
    content: Sequence[Any],
    labels: Sequence[str | None],
    holder: list[int],
    labeller: list[int],
) -> bytes:
    kind = pa.string() if isinstance(content[0], str) else pa.list_(pa.float64())
    table = pa.table(
        {
            "digest": pa.array(digests, pa.binary(32)),
            "salt": pa.array(salts, pa.binary(16)),
            "content": pa.array([one if isinstance(one, str) else list(one) for one in content], kind),
            "label": pa.array(labels, pa.string()),
            "rights_holder": pa.array(holder, pa.int32()),
            "labeller": pa.array(labeller, pa.int32()),
        }
    )
    sink = BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
