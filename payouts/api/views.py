import re
from typing import ClassVar

from django.conf import settings
from django.db.models import QuerySet
from django.http import HttpResponse, StreamingHttpResponse
from django.shortcuts import get_object_or_404
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, OpenApiResponse, extend_schema, extend_schema_view
from rest_framework import status
from rest_framework.decorators import action
from rest_framework.mixins import ListModelMixin, RetrieveModelMixin
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView
from rest_framework.viewsets import GenericViewSet

from marketplace.api.keys import idempotency_key
from marketplace.api.pagination import CreatedCursorPagination
from marketplace.errors import InvalidInput
from marketplace.models import ApiKey, Party
from marketplace.money import MINOR_DIGITS, Money
from marketplace.services.parties import set_country
from payouts.api.serializers import (
    BillingProfileInput,
    BillingProfileOutput,
    CheckoutOutput,
    DocumentOutput,
    EarningsOutput,
    IssuedStatementDetail,
    IssuedStatementOutput,
    MinimumInput,
    MinimumOutput,
    OnboardingInput,
    OnboardingLinkOutput,
    OnboardingOutput,
    PayoutOutput,
    ReportDutyOutput,
    RoyaltyInvoiceOutput,
    RoyaltyQuoteInput,
    RoyaltyQuoteOutput,
    RoyaltyReportCorrectionInput,
    RoyaltyReportInput,
    RoyaltyReportOutput,
    StatementOutput,
)
from payouts.errors import NotFound
from payouts.models import BillingProfile, Document, IssuedStatement, Payout, RoyaltyInvoice, RoyaltyReport
from payouts.selectors import (
    documents_of,
    earnings_of,
    find_document,
    onboarding_of,
    paid_out_of,
    payee_of,
    reportable_models_of,
    reports_due_of,
    royalty_invoices_of,
    royalty_reports_of,
    statements_of,
)
from payouts.services import duties
from payouts.services.billing import set_billing_profile
from payouts.services.documents import render_pdf
from payouts.services.issuing import statement_pdf, stored_csv
from payouts.services.payees import start_onboarding
from payouts.services.plans import minimum_of, set_minimum
from payouts.services.quotes import quote_plan
from payouts.services.report_corrections import correct_report
from payouts.services.royalties import quote_royalty, report_revenue, start_invoice_checkout
from payouts.services.statements import Statement, month_bounds, statement, statement_csv

IDEMPOTENCY_KEY = OpenApiParameter(
    "Idempotency-Key",
    str,
    OpenApiParameter.HEADER,
    required=True,
    description="1 to 255 characters, new for each report and the same on a retry.",
)
CURRENCY = OpenApiParameter("currency", str, OpenApiParameter.PATH, enum=list(MINOR_DIGITS))
MONTH = OpenApiParameter("month", str, OpenApiParameter.PATH, description="2026-03")


@extend_schema_view(list=extend_schema(summary="Your revenue reports, with their invoices"))
class RoyaltyReportViewSet(ListModelMixin, GenericViewSet):
    scopes: ClassVar[dict[str, str]] = {"create": ApiKey.Scope.REPORT, "correct": ApiKey.Scope.REPORT}
    serializer_class = RoyaltyReportOutput
    queryset = RoyaltyReport.objects.none()
    lookup_url_kwarg = "id"
    lookup_value_converter = "int"

    def get_queryset(self) -> QuerySet[RoyaltyReport]:
        return royalty_reports_of(_party(self.request))

    @extend_schema(
        summary="Report a model's revenue",
        description="For a period that is over, once per model, period and currency. The invoice has a line per cited "
        "dataset with a rate; below Stripe's smallest charge it is carried over to your next one.",
        parameters=[IDEMPOTENCY_KEY],
        request=RoyaltyReportInput,
        responses={201: RoyaltyReportOutput},
    )
    def create(self, request: Request) -> Response:
        data = RoyaltyReportInput(data=request.data)
        data.fields["model"].queryset = reportable_models_of(_party(request))  # type: ignore[attr-defined]
        data.is_valid(raise_exception=True)
        invoice = report_revenue(licensee=_party(request), key=idempotency_key(request), **data.validated_data)
        duties.settle(_party(request))
        seen = self.get_queryset().get(pk=invoice.report_id)
        return Response(RoyaltyReportOutput(seen).data, status=status.HTTP_201_CREATED)

    @extend_schema(
        summary="Correct a report",
        description="Another report takes its place. Unpaid, its invoice is void and a new one asks for all; paid, the difference "
        "is invoiced, or goes back the way it was paid.",
        parameters=[IDEMPOTENCY_KEY],
        request=RoyaltyReportCorrectionInput,
        responses={201: RoyaltyReportOutput},
    )
    @action(detail=True, methods=["post"])
    def correct(self, request: Request, id: int) -> Response:
        data = RoyaltyReportCorrectionInput(data=request.data)
        data.is_valid(raise_exception=True)
        invoice = correct_report(
            licensee=_party(request), report=self.get_object(), key=idempotency_key(request), **data.validated_data
        )
        duties.settle(_party(request))
        seen = self.get_queryset().get(pk=invoice.report_id)
        return Response(RoyaltyReportOutput(seen).data, status=status.HTTP_201_CREATED)


@extend_schema_view(
    list=extend_schema(summary="Your royalty invoices"), retrieve=extend_schema(summary="One of your royalty invoices")
)
class RoyaltyInvoiceViewSet(ListModelMixin, RetrieveModelMixin, GenericViewSet):
    scopes: ClassVar[dict[str, str]] = {"checkout": ApiKey.Scope.REPORT}
    serializer_class = RoyaltyInvoiceOutput
    queryset = RoyaltyInvoice.objects.none()
    lookup_url_kwarg = "id"
    lookup_value_converter = "int"

    def get_queryset(self) -> QuerySet[RoyaltyInvoice]:
        return royalty_invoices_of(_party(self.request))

    @extend_schema(
        summary="Where to pay the invoice",
        description="The address of a page at Stripe; asking again gives the same page while it is open. The invoice is "
        "paid once Stripe has confirmed it.",
        request=None,
        responses={200: CheckoutOutput},
    )
    @action(detail=True, methods=["post"])
    def checkout(self, request: Request, id: int) -> Response:
        invoice = self.get_object()
        back = f"{settings.BASE_URL}/models/{invoice.report.model.slug}/"
        url = start_invoice_checkout(invoice=invoice, success_url=back, cancel_url=back)
        return Response(CheckoutOutput({"url": url}).data)


class RoyaltyQuoteView(APIView):
    scopes = {"post": ApiKey.Scope.READ}

    @extend_schema(
        operation_id="royalty_quotes_create",
        summary="What a model would owe at a revenue",
        description="Of a model of yours by the result that holds today; of a selection that you plan, by its records, with the least and "
        "the most that any result could make of it. Nothing is written.",
        request=RoyaltyQuoteInput,
        responses={200: RoyaltyQuoteOutput},
    )
    def post(self, request: Request) -> Response:
        data = RoyaltyQuoteInput(data=request.data)
        data.fields["model"].queryset = reportable_models_of(_party(request))  # type: ignore[attr-defined]
        data.is_valid(raise_exception=True)
        given = data.validated_data
        if "model" in given:
            quote = quote_royalty(model=given["model"], revenue=given["revenue"])
            lines = [
                {
                    "dataset": line.license.version.dataset.slug,
                    "share_ppq": line.share_ppq,
                    "rate_bps": line.rate_bps,
                    "amount": Money(line.micros, quote.total.currency),
                    "is_capped": line.is_capped,
                }
                for line in quote.lines
            ]
            told = {"total": quote.total, "least": quote.total, "most": quote.total}
        else:
            records = {offer.pk: n for offer, n in zip(given["offers"], given.get("records", []), strict=False)}
            plan = quote_plan(offers=given["offers"], revenue=given["revenue"], records=records, party=_party(request))
            lines = [
                {
                    "dataset": line.offer.dataset.slug,
                    "share_ppq": line.share_ppq,
                    "rate_bps": line.offer.royalty_bps,
                    "amount": line.amount,
                    "is_capped": line.is_capped,
                }
                for line in plan.lines
            ]
            told = {"total": plan.by_count, "least": plan.least, "most": plan.most}
        return Response(RoyaltyQuoteOutput({"revenue": given["revenue"], "lines": lines, **told}).data)


class ReportDutiesView(APIView):
    @extend_schema(
        operation_id="royalty_reports_due",
        summary="The reports that you still owe",
        description="The nearest due day first; overdue ones are public, and in the end suspend the license.",
        responses={200: ReportDutyOutput(many=True)},
    )
    def get(self, request: Request) -> Response:
        return Response(ReportDutyOutput(reports_due_of(_party(request)), many=True).data)


class DocumentListView(APIView):
    @extend_schema(
        operation_id="documents_list",
        summary="Your invoices and credit notes",
        description="The latest hundred, newest first.",
        responses={200: DocumentOutput(many=True)},
    )
    def get(self, request: Request) -> Response:
        return Response(DocumentOutput(documents_of(_party(request))[:100], many=True).data)


class DocumentView(APIView):
    @extend_schema(
        operation_id="documents_retrieve", summary="One invoice or credit note", responses={200: DocumentOutput}
    )
    def get(self, request: Request, reference: str) -> Response:
        return Response(DocumentOutput(_document(request, reference)).data)


class DocumentPdfView(APIView):
    @extend_schema(
        operation_id="documents_pdf",
        summary="The same, as PDF",
        responses={(200, "application/pdf"): OpenApiResponse(OpenApiTypes.BINARY)},
    )
    def get(self, request: Request, reference: str) -> HttpResponse:
        document = _document(request, reference)
        headers = {"Content-Disposition": f'attachment; filename="{document.reference}.pdf"'}
        return HttpResponse(render_pdf(document), content_type="application/pdf", headers=headers)


class BillingProfileView(APIView):
    scopes = {"get": ApiKey.Scope.READ, "put": ApiKey.Scope.BUY}

    @extend_schema(
        operation_id="billing_retrieve", summary="How your invoices name you", responses={200: BillingProfileOutput}
    )
    def get(self, request: Request) -> Response:
        return Response(BillingProfileOutput(get_object_or_404(BillingProfile, party=_party(request))).data)

    @extend_schema(
        operation_id="billing_update",
        summary="Say how your next invoices name you",
        request=BillingProfileInput,
        responses={200: BillingProfileOutput},
    )
    def put(self, request: Request) -> Response:
        data = BillingProfileInput(data=request.data)
        data.is_valid(raise_exception=True)
        profile = set_billing_profile(party=_party(request), user=None, **data.validated_data)
        return Response(BillingProfileOutput(profile).data)


def _document(request: Request, reference: str) -> Document:
    found = find_document(documents_of(_party(request)), reference)
    if found is None:
        raise NotFound("There is no such document, or it is not yours.")
    return found


@extend_schema_view(
    list=extend_schema(summary="Your issued statements"),
    retrieve=extend_schema(summary="One of your issued statements, with its totals", responses=IssuedStatementDetail),
)
class IssuedStatementViewSet(ListModelMixin, RetrieveModelMixin, GenericViewSet):
    serializer_class = IssuedStatementOutput
    queryset = IssuedStatement.objects.none()
    lookup_field = "number"
    lookup_value_regex = r"RS-[0-9]+-[0-9]+"

    def get_queryset(self) -> QuerySet[IssuedStatement]:
        return statements_of(_party(self.request)).prefetch_related("balances", "totals")

    def get_serializer_class(self) -> type[IssuedStatementOutput]:
        return IssuedStatementDetail if self.action == "retrieve" else IssuedStatementOutput

    @extend_schema(summary="Every line of it, as CSV", responses={(200, "text/csv"): OpenApiTypes.STR})
    @action(detail=True, methods=["get"])
    def csv(self, request: Request, number: str) -> StreamingHttpResponse:
        return StreamingHttpResponse(
            stored_csv(self.get_object()),
            content_type="text/csv; charset=utf-8",
            headers={"Content-Disposition": f'attachment; filename="{number}.csv"'},
        )

    @extend_schema(summary="The statement as PDF", responses={(200, "application/pdf"): OpenApiTypes.BINARY})
    @action(detail=True, methods=["get"])
    def pdf(self, request: Request, number: str) -> HttpResponse:
        return HttpResponse(
            statement_pdf(self.get_object()),
            content_type="application/pdf",
            headers={"Content-Disposition": f'attachment; filename="{number}.pdf"'},
        )


class StatementView(APIView):
    @extend_schema(
        summary="Your statement of a month",
        operation_id="statements_retrieve",
        parameters=[MONTH],
        responses={200: StatementOutput},
    )
    def get(self, request: Request, month: str) -> Response:
        return Response(StatementOutput(_statement(_party(request), month)).data)


class StatementCsvView(APIView):
    @extend_schema(
        summary="Your statement of a month, as CSV",
        operation_id="statements_csv_retrieve",
        parameters=[MONTH],
        responses={(200, "text/csv"): OpenApiTypes.STR},
    )
    def get(self, request: Request, month: str) -> StreamingHttpResponse:
        year, number = _month(month)
        name = f"residual-{month}.csv"
        return StreamingHttpResponse(
            statement_csv(party=_party(request), year=year, month=number),
            content_type="text/csv; charset=utf-8",
            headers={"Content-Disposition": f'attachment; filename="{name}"'},
        )


class EarningsView(APIView):
    @extend_schema(
        summary="What you have earned, per currency, and where each part of it is",
        operation_id="earnings_retrieve",
        responses={200: OpenApiResponse(EarningsOutput(many=True))},
    )
    def get(self, request: Request) -> Response:
        party = _party(request)
        return Response(EarningsOutput(earnings_of(party), many=True, context={"party": party}).data)


class PayoutPagination(CreatedCursorPagination):
    """By when it was made: the two rails number theirs apart."""

    ordering = "-created_at"


class PayoutViewSet(GenericViewSet):
    serializer_class = PayoutOutput
    pagination_class = PayoutPagination
    queryset = Payout.objects.none()
    lookup_url_kwarg = "id"
    lookup_value_converter = "int"

    @extend_schema(
        summary="Your payouts", description="By Stripe and, where it does not reach, by our bank; newest first."
    )
    def list(self, request: Request) -> Response:
        page = self.paginate_queryset(paid_out_of(_party(request)))  # type: ignore[arg-type]
        return self.get_paginated_response(PayoutOutput(page, many=True).data)

    @extend_schema(
        summary="One of your payouts",
        parameters=[
            OpenApiParameter("rail", str, enum=["stripe", "bank"], description="stripe, unless told otherwise.")
        ],
    )
    def retrieve(self, request: Request, id: int) -> Response:
        found = paid_out_of(_party(request)).find(rail=request.query_params.get("rail", "stripe"), id=int(id))
        if found is None:
            raise NotFound("There is no such payout, or it is not yours.")
        return Response(PayoutOutput(found).data)


class PayoutMinimumView(APIView):
    scopes: ClassVar[dict[str, str]] = {"put": ApiKey.Scope.REPORT}

    @extend_schema(
        summary="From how much on you are paid",
        operation_id="payout_minimum_retrieve",
        parameters=[CURRENCY],
        responses={200: MinimumOutput},
    )
    def get(self, request: Request, currency: str) -> Response:
        return Response(MinimumOutput(minimum_of(_party(request), _held(currency))).data)

    @extend_schema(
        summary="Change from how much on you are paid",
        operation_id="payout_minimum_update",
        parameters=[CURRENCY],
        request=MinimumInput,
        responses={200: MinimumOutput},
    )
    def put(self, request: Request, currency: str) -> Response:
        data = MinimumInput(data=request.data)
        data.is_valid(raise_exception=True)
        amount = data.validated_data["minimum"]
        if amount.currency != _held(currency):
            raise InvalidInput(
                f"The minimum is in {amount.currency}, the address says {currency}.", pointers={"/minimum": "currency"}
            )
        assert isinstance(request.auth, ApiKey)
        row = set_minimum(party=request.auth.party, amount=amount, user=None)
        return Response(MinimumOutput(row.amount).data)


class OnboardingView(APIView):
    scopes: ClassVar[dict[str, str]] = {"post": ApiKey.Scope.REPORT}

    @extend_schema(
        summary="How far you are at Stripe, which pays you",
        operation_id="onboarding_retrieve",
        responses={200: OnboardingOutput},
    )
    def get(self, request: Request) -> Response:
        party = _party(request)
        told = onboarding_of(payee_of(party))
        answer = {"state": told.state, "title": told.title, "needs": told.needs, "country": party.country}
        return Response(OnboardingOutput(answer).data)

    @extend_schema(
        summary="A link to Stripe's page, where you say how you are paid",
        description="Makes your account at Stripe the first time. A person opens the link, once and within minutes; ask again "
        "for a fresh one. Refused where Stripe does not reach your country: what you earn is kept for you.",
        operation_id="onboarding_start",
        request=OnboardingInput,
        responses={200: OnboardingLinkOutput},
    )
    def post(self, request: Request) -> Response:
        data = OnboardingInput(data=request.data)
        data.is_valid(raise_exception=True)
        party = _party(request)
        if "country" in data.validated_data and payee_of(party) is None:
            set_country(party=party, country=data.validated_data["country"])
        page = f"{settings.BASE_URL}/earnings/"
        url = start_onboarding(party=party, return_url=f"{page}?from=stripe", refresh_url=f"{page}onboarding/")
        return Response(OnboardingLinkOutput({"url": url}).data)


def _held(currency: str) -> str:
    if currency not in MINOR_DIGITS:
        raise NotFound(f"No balance is held in {currency}; use one of {', '.join(MINOR_DIGITS)}.")
    return currency


def _party(request: Request) -> Party:
    """Whom the request's key acts for."""
    assert isinstance(request.auth, ApiKey)  # the permission lets nobody in without a key
    return request.auth.party


def _statement(party: Party, month: str) -> Statement:
    year, number = _month(month)
    return statement(party=party, year=year, month=number)


def _month(month: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d{4}-\d{2}", month, re.ASCII):
        raise InvalidInput(f"{month!r} is no month; write it as 2026-03.", pointers={"/month": "no month"})
    year, number = int(month[:4]), int(month[5:])
    month_bounds(year, number)
    return year, number
