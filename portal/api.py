"""The API: the packages' routes under one router, its OpenAPI document, and a page that shows it."""

from typing import Any

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.urls import path, re_path, reverse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_safe
from drf_spectacular.generators import SchemaGenerator
from drf_spectacular.views import SpectacularAPIView
from rest_framework.routers import SimpleRouter

import attribution.api.urls
import marketplace.api.urls
import payouts.api.urls
from portal.pages import api as checkouts

PACKAGES = (marketplace.api.urls, attribution.api.urls, payouts.api.urls)
METHODS = ("get", "post", "put", "patch", "delete")


@csrf_exempt
def no_such_route(request: HttpRequest) -> JsonResponse:
    """What the API does not know it refuses as it refuses everything else."""
    return JsonResponse(
        {
            "type": "/docs/problems#not_found",
            "title": "Not found",
            "status": 404,
            "detail": f"There is no {request.path}; {reverse('api-docs')} lists what there is.",
            "code": "not_found",
        },
        status=404,
        content_type="application/problem+json",
    )


@require_safe
def docs(request: HttpRequest) -> HttpResponse:
    """The OpenAPI document as a plain page."""
    schema = SchemaGenerator().get_schema(request=None, public=True)
    operations = [
        {
            "method": method.upper(),
            "path": where,
            "anchor": operation["operationId"],
            "summary": operation.get("summary", ""),
            "description": operation.get("description", ""),
            "needs_key": {} not in operation.get("security", [{}]),
            "parameters": operation.get("parameters", []),
            "body": _body(operation, schema),
            "answers": [(status, answer.get("description", "")) for status, answer in operation["responses"].items()],
        }
        for where, methods in schema["paths"].items()
        for method, operation in methods.items()
        if method in METHODS
    ]
    return render(request, "portal/api_docs.html", {"info": schema["info"], "operations": operations})


def _body(operation: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The fields of the request's body."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    found = schema["components"]["schemas"].get(content.get("$ref", "").rpartition("/")[2], content)
    return [
        {
            "name": name,
            "type": field.get("type", "object"),
            "required": name in found.get("required", []),
            "description": field.get("description", ""),
        }
        for name, field in found.get("properties", {}).items()
    ]


router = SimpleRouter()
urlpatterns: list[Any] = []
for package in PACKAGES:
    for prefix, viewset, basename in package.routes:
        router.register(prefix, viewset, basename=basename)
    urlpatterns += package.paths
urlpatterns += [
    *checkouts.paths,
    path("schema/", SpectacularAPIView.as_view(), name="api-schema"),
    path("docs/", docs, name="api-docs"),
    *router.urls,
    re_path("", no_such_route),
]
