from django.urls import path

from marketplace.web.views import datasets, orders, parties, uploads

urlpatterns = [
    path("datasets/", datasets.catalogue, name="catalogue"),
    path("datasets/new/", datasets.dataset_new, name="dataset-new"),
    path("datasets/yours/", datasets.my_datasets, name="my-datasets"),
    path("datasets/<slug:slug>/", datasets.dataset, name="dataset"),
    path("datasets/<slug:slug>/odrl.json", datasets.odrl, name="dataset-odrl"),
    path("datasets/<slug:slug>/offer/", datasets.offer_new, name="offer-new"),
    path("datasets/<slug:slug>/order/", orders.order_place, name="order-place"),
    path("datasets/<slug:slug>/upload/", uploads.upload, name="upload"),
    path("datasets/<slug:slug>/upload/<uuid:incoming_id>/", uploads.upload_map, name="upload-map"),
    path("datasets/<slug:slug>/contributors/<uuid:party_id>/invite/", parties.invite_contributor, name="invite"),
    path("uploads/<uuid:upload_id>/", uploads.upload_status, name="upload-status"),
    path("uploads/<uuid:upload_id>/publish/", uploads.publish, name="publish"),
    path("orders/", orders.orders, name="orders"),
    path("licenses/", orders.licenses, name="licenses"),
    path("licenses/<uuid:license_id>/download/", orders.license_download, name="license-download"),
    path("settings/keys/", parties.api_keys, name="api-keys"),
    path("settings/keys/<int:key_id>/revoke/", parties.api_key_revoke, name="api-key-revoke"),
    path("party/", parties.party_switch, name="party-switch"),
    path("organisations/new/", parties.organisation_new, name="organisation-new"),
    path("invitations/opt-out/<str:mark>/", parties.opt_out, name="opt-out"),
    path("invitations/<str:token>/", parties.invitation, name="invitation"),
]
