"""Every address of the site. The packages' own pages and webhooks are included as they stand."""

from django.contrib import admin
from django.urls import URLPattern, URLResolver, include, path

from marketplace.api.views import disclosure_schema, download
from portal.health import booksz, healthz, readyz

urlpatterns: list[URLPattern | URLResolver] = [
    path("healthz", healthz, name="healthz"),
    path("readyz", readyz, name="readyz"),
    path("booksz", booksz, name="booksz"),
    path("api/v1/", include("portal.api")),
    path("schemas/disclosure/1.json", disclosure_schema, name="disclosure-schema"),
    path("downloads/<str:token>", download, name="download"),
    path("admin/", admin.site.urls),
    path("accounts/", include("allauth.urls")),
    path("", include("portal.pages.urls")),
    path("", include("marketplace.web.urls")),
    path("", include("payouts.web.urls")),
]
