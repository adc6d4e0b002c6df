from django.urls import path, re_path

from portal.pages import desk, desk_runs, views

urlpatterns = [
    path("", views.home, name="home"),
    path("robots.txt", views.robots),
    path("favicon.ico", views.favicon),
    path("models/", views.models, name="models"),
    path("models/<slug:slug>/", views.model, name="model"),
    path("models/<slug:slug>/disclosures/<int:number>.json", views.disclosure_document, name="disclosure-document"),
    re_path(
        r"^models/(?P<slug>[-\w]+)/disclosures/(?P<number>\d{1,9})/references\.(?P<suffix>bib|csl\.json)$",
        views.bibliography,
        name="bibliography",
    ),
    path("orders/<uuid:order_id>/", views.order, name="order"),
    path("orders/<uuid:order_id>/checkout/", views.checkout, name="checkout"),
    path("orders/<uuid:order_id>/refund/", views.refund, name="refund"),
    path("royalties/", views.royalty_list, name="royalties"),
    path("royalties/<int:invoice_id>/checkout/", views.invoice_checkout, name="invoice-checkout"),
    path("earnings/", views.earnings, name="earnings"),
    path("earnings/onboarding/", views.onboarding, name="onboarding"),
    path("earnings/minimum/<str:currency>/", views.payout_minimum, name="payout-minimum"),
    path("desk/", desk.desk, name="desk"),
    path("desk/payout-runs/", desk_runs.payout_runs, name="desk-payout-runs"),
    path("desk/payout-runs/<int:run_id>/", desk_runs.payout_run, name="desk-payout-run"),
    path("desk/payees/<int:party_id>/", desk_runs.payee, name="desk-payee"),
    path("desk/payments/<int:payment_id>/", desk.payment, name="desk-payment"),
    path("desk/disputes/<int:dispute_id>/", desk.dispute, name="desk-dispute"),
    path("desk/debts/<int:party_id>/<str:currency>/", desk.debt, name="desk-debt"),
    re_path(r"^earnings/(?P<month>\d{4}-\d{2})/$", views.statement, name="statement"),
    re_path(r"^earnings/(?P<month>\d{4}-\d{2})(?P<suffix>\.csv)$", views.statement, name="statement-csv"),
]
