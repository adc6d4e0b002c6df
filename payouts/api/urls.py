from django.urls import path

from payouts.api.views import (
    EarningsView,
    PayoutMinimumView,
    PayoutViewSet,
    RoyaltyInvoiceViewSet,
    RoyaltyReportViewSet,
    StatementCsvView,
    StatementView,
)

routes = [
    ("payouts", PayoutViewSet, "payout"),
    ("royalty-reports", RoyaltyReportViewSet, "royalty-report"),
    ("royalty-invoices", RoyaltyInvoiceViewSet, "royalty-invoice"),
]
paths = [
    path("statements/<str:month>/", StatementView.as_view(), name="api-statement"),
    path("statements/<str:month>/csv/", StatementCsvView.as_view(), name="api-statement-csv"),
    path("payout-minimums/<str:currency>/", PayoutMinimumView.as_view(), name="api-payout-minimum"),
    path("earnings/", EarningsView.as_view(), name="api-earnings"),
]
