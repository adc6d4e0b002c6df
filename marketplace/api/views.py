from collections.abc import Iterator
from typing import IO, Any, ClassVar

from django.db.models import QuerySet
from django.http import FileResponse, HttpRequest, HttpResponse, HttpResponseBase, JsonResponse, StreamingHttpResponse
from django.shortcuts import get_object_or_404, render
from django.utils.http import content_disposition_header, http_date
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe
from drf_spectacular.utils import OpenApiParameter, OpenApiResponse, extend_schema, extend_schema_view
from rest_framework import status
from rest_framework.decorators import action
from rest_framework.mixins import ListModelMixin, RetrieveModelMixin
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.serializers import BaseSerializer
from rest_framework.viewsets import GenericViewSet

from marketplace import clock
from marketplace.api.keys import acting_key, idempotency_key
from marketplace.api.serializers import (
    ContributorOutput,
    DatasetDetailOutput,
    DatasetOutput,
    DownloadOutput,
    InvitationInput,
    InvitationOutput,
    LicenseOutput,
    OrderInput,
    OrderOutput,
)
from marketplace.bodies import problem_document
from marketplace.errors import DomainError
from marketplace.models import ApiKey, Dataset, License, Order, Party
from marketplace.selectors import (
    contributors_of,
    datasets_of,
    licenses_visible_to,
    listed_datasets,
    orders_visible_to,
)
from marketplace.services import disclosures
from marketplace.services.downloads import Download, note_first_download, open_download, signed_download_url
from marketplace.services.invitations import invite
from marketplace.services.orders import place_order

CHUNK_BYTES = 1 << 18

IDEMPOTENCY_KEY = OpenApiParameter(
    "Idempotency-Key",
    str,
    OpenApiParameter.HEADER,
    required=True,
    description="1 to 255 characters, new for each order and the same on a retry.",
)


@extend_schema_view(
    list=extend_schema(
        summary="Datasets on sale",
        parameters=[OpenApiParameter("q", str, description="Words that the title, summary or description has.")],
    ),
    retrieve=extend_schema(
        summary="A dataset: terms, contract, price history, who cites it", responses=DatasetDetailOutput
    ),
)
class DatasetViewSet(ListModelMixin, RetrieveModelMixin, GenericViewSet):
    """Public: reading it needs no key."""

    scopes: ClassVar[dict[str, None]] = {"list": None, "retrieve": None}
    queryset = Dataset.objects.none()
    lookup_field = "slug"

    def get_queryset(self) -> QuerySet[Dataset]:
        return listed_datasets(self.request.query_params.get("q", ""))

    def get_serializer_class(self) -> type[BaseSerializer]:
        return DatasetDetailOutput if self.action == "retrieve" else DatasetOutput


@extend_schema_view(
    list=extend_schema(
        summary="The contributors that your files name",
        parameters=[
            OpenApiParameter("dataset", str, description="The slug of one of your datasets: its contributors.")
        ],
    )
)
class ContributorViewSet(ListModelMixin, GenericViewSet):
    scopes: ClassVar[dict[str, str]] = {"invite": ApiKey.Scope.UPLOAD}
    serializer_class = ContributorOutput
    queryset = Party.objects.none()
    lookup_field = "public_id"
    lookup_url_kwarg = "id"
    lookup_value_converter = "uuid"

    def get_queryset(self) -> QuerySet[Party]:
        party, slug = acting_key(self.request).party, self.request.query_params.get("dataset")
        dataset = get_object_or_404(datasets_of(party), slug=slug) if slug else None
        return contributors_of(party, dataset)

    @extend_schema(
        summary="Invite a contributor to claim their part",
        description="One mail with a link that is bound to the address and a way to opt out. Only after a version with "
        "the contributor in it is published. To the same address within a day it is the same invitation and no second mail.",
        request=InvitationInput,
        responses={201: InvitationOutput},
    )
    @action(detail=True, methods=["post"], url_path="invitations")
    def invite(self, request: Request, id: str) -> Response:
        party, data = self.get_object(), InvitationInput(data=request.data)
        data.is_valid(raise_exception=True)
        invitation = invite(party=party, email=data.validated_data["email"], by=None)
        return Response(InvitationOutput(invitation).data, status=status.HTTP_201_CREATED)


@extend_schema_view(
    list=extend_schema(summary="Your orders"), retrieve=extend_schema(summary="One of your orders, with its licenses")
)
class OrderViewSet(ListModelMixin, RetrieveModelMixin, GenericViewSet):
    scopes: ClassVar[dict[str, str]] = {"create": ApiKey.Scope.BUY}
    serializer_class = OrderOutput
    queryset = Order.objects.none()
    lookup_field = "public_id"
    lookup_url_kwarg = "id"
    lookup_value_converter = "uuid"

    def get_queryset(self) -> QuerySet[Order]:
        return orders_visible_to(acting_key(self.request).party)

    @extend_schema(
        summary="Place an order",
        description="A line per offer, in one currency. Pay it at the address that `orders/{id}/checkout/` gives; the "
        "licenses are there once the payment is confirmed. The same key and body again give the same order. One that is not "
        "paid within 24 hours is cancelled; a new order needs a new key.",
        parameters=[IDEMPOTENCY_KEY],
        request=OrderInput,
        responses={201: OrderOutput},
    )
    def create(self, request: Request) -> Response:
        data, api_key = OrderInput(data=request.data), acting_key(request)
        data.is_valid(raise_exception=True)
        order = place_order(buyer=api_key.party, key=idempotency_key(request), api_key=api_key, **data.validated_data)
        seen = self.get_queryset().get(pk=order.pk)
        return Response(OrderOutput(seen).data, status=status.HTTP_201_CREATED)


@extend_schema_view(list=extend_schema(summary="Your licenses"), retrieve=extend_schema(summary="One of your licenses"))
class LicenseViewSet(ListModelMixin, RetrieveModelMixin, GenericViewSet):
    serializer_class = LicenseOutput
    queryset = License.objects.none()
    lookup_field = "public_id"
    lookup_url_kwarg = "id"
    lookup_value_converter = "uuid"

    def get_queryset(self) -> QuerySet[License]:
        return licenses_visible_to(acting_key(self.request).party)

    def get_serializer_context(self) -> dict[str, Any]:
        return {**super().get_serializer_context(), "now": clock.now()}  # asked once for the whole list

    @extend_schema(
        summary="A link to the licensed file",
        description="Signed, good for minutes, and checked against the license again when it is used.",
        responses={
            200: DownloadOutput,
            403: OpenApiResponse(description="The license was revoked or has ended."),
        },
    )
    @action(detail=True, methods=["get"])
    def download(self, request: Request, id: str) -> Response:
        license = self.get_object()
        signed, version = signed_download_url(license=license), license.version
        return Response(
            DownloadOutput(
                {
                    "url": signed.url,
                    "expires_at": signed.expires_at,
                    "filename": f"{version.dataset.slug}-v{version.number}.parquet",
                    "size_bytes": version.size_bytes,
                    "sha256": version.parquet_sha256,
                    "merkle_root": version.merkle_root,
                }
            ).data
        )


@require_safe
def disclosure_schema(request: HttpRequest) -> JsonResponse:
    """The JSON Schema of disclosure documents, version 1: it never changes, a new version is a new address."""
    return JsonResponse(
        disclosures.disclosure_schema(),
        content_type="application/schema+json",
        headers={"Access-Control-Allow-Origin": "*", "Cache-Control": "public, max-age=3600"},
        json_dumps_params={"ensure_ascii": False},
    )


@require_safe
@never_cache
def download(request: HttpRequest, token: str) -> HttpResponseBase:
    """The licensed bytes behind a signed link: whole, or the one range that is asked for, so that a client can resume."""
    try:
        found = open_download(token=token)
    except DomainError as error:
        return _refusal(request, error)
    span = _range(request, found)
    if span is not None and span.start >= found.size_bytes:
        found.file.close()
        return HttpResponse(status=416, headers={"Content-Range": f"bytes */{found.size_bytes}"})
    if request.method == "GET":
        try:
            note_first_download(license=found.license)
        except DomainError as error:
            found.file.close()
            return _refusal(request, error)
    response: StreamingHttpResponse
    if span is None:
        response = FileResponse(found.file)
        response["Content-Length"] = str(found.size_bytes)
    else:
        response = StreamingHttpResponse(_Span(found.file, span), status=206)
        response["Content-Length"] = str(len(span))
        response["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{found.size_bytes}"
    response["Content-Type"] = "application/vnd.apache.parquet"
    response["Content-Disposition"] = content_disposition_header(True, found.filename) or "attachment"
    response["Accept-Ranges"] = "bytes"
    response["ETag"] = f'"{found.sha256}"'
    assert found.license.version.frozen_at is not None, "a published version was frozen"
    response["Last-Modified"] = http_date(found.license.version.frozen_at.timestamp())
    return response


def _refusal(request: HttpRequest, error: DomainError) -> HttpResponse:
    """A page for a person, a problem document for a program."""
    if "text/html" in request.headers.get("Accept", ""):
        return render(request, f"{error.status}.html", {"message": error.message}, status=error.status)
    return problem_document(error)


def _range(request: HttpRequest, found: Download) -> range | None:
    """The single byte range that is asked for; `None`: send everything, as RFC 9110 has it for what is not understood.

    A range that begins beyond the end comes back as it is asked.
    """
    unit, _, asked = request.headers.get("Range", "").partition("=")
    first, dash, last = asked.strip().partition("-")
    condition = request.headers.get("If-Range")
    if unit.strip().lower() != "bytes" or not dash or (condition and condition != f'"{found.sha256}"'):
        return None
    if not all(part == "" or (part.isascii() and part.isdigit() and len(part) < 19) for part in (first, last)):
        return None
    if first == "":
        return range(max(0, found.size_bytes - int(last)), found.size_bytes) if last and int(last) else None
    start, stop = int(first), min(int(last) + 1, found.size_bytes) if last else found.size_bytes
    if last and int(last) < start:
        return None
    return range(start, max(start, stop))


class _Span:
    """A part of a file in chunks; Django closes it with the response, read or not."""

    def __init__(self, file: IO[bytes], span: range) -> None:
        self.file, self.span = file, span
        self.close = file.close

    def __iter__(self) -> Iterator[bytes]:
        self.file.seek(self.span.start)
        left = len(self.span)
        while left and (chunk := self.file.read(min(CHUNK_BYTES, left))):
            left -= len(chunk)
            yield chunk
