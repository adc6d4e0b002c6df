from django.urls import include, path

from payouts.api.desk import urls as desk
from payouts.api.views import (
    BillingProfileView,
    DocumentListView,
    DocumentPdfView,
    DocumentView,
    EarningsView,
    IssuedStatementViewSet,
    OnboardingView,
    PayoutMinimumView,
    PayoutViewSet,
    ReportDutiesView,
    RoyaltyInvoiceViewSet,
    RoyaltyQuoteView,
    RoyaltyReportViewSet,
    StatementCsvView,
    StatementView,
)

routes = [
    ("payouts", PayoutViewSet, "payout"),
    ("royalty-reports", RoyaltyReportViewSet, "royalty-report"),
    ("royalty-invoices", RoyaltyInvoiceViewSet, "royalty-invoice"),
    ("issued-statements", IssuedStatementViewSet, "api-issued-statement"),
]
paths = [
    path("statements/<str:month>/", StatementView.as_view(), name="api-statement"),
    path("statements/<str:month>/csv/", StatementCsvView.as_view(), name="api-statement-csv"),
    path("payout-minimums/<str:currency>/", PayoutMinimumView.as_view(), name="api-payout-minimum"),
    path("billing/", BillingProfileView.as_view(), name="api-billing"),
    path("documents/", DocumentListView.as_view(), name="api-documents"),
    path("documents/<str:reference>/", DocumentView.as_view(), name="api-document"),
    path("documents/<str:reference>/pdf/", DocumentPdfView.as_view(), name="api-document-pdf"),
    path("royalty-quotes/", RoyaltyQuoteView.as_view(), name="api-royalty-quotes"),
    path("royalty-reports/due/", ReportDutiesView.as_view(), name="api-reports-due"),
    path("onboarding/", OnboardingView.as_view(), name="api-onboarding"),
    path("desk/", include(desk.paths)),
    path("earnings/", EarningsView.as_view(), name="api-earnings"),
]
