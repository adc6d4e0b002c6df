"""Which records moved an output: ask about an evaluation query or a text, read the answer that a worker finds."""

import uuid
from dataclasses import dataclass
from typing import Any

from django.core.files.storage import default_storage
from django.core.paginator import Paginator
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_GET, require_http_methods
from rest_framework.throttling import BaseThrottle

from attribution import selectors as attribution
from attribution.artifacts import normalised_key, read_queries
from attribution.models import Artifact
from attribution.services import questions
from marketplace.errors import DomainError
from marketplace.models import Disclosure
from marketplace.web.thumbnails import thumbnail
from portal.pages.forms import QueryForm, TextQuestionForm
from portal.pages.views import model_or_404

PER_PAGE = 24
MAX_SHOWN_BYTES = 4_000_000  # of a file of queries that a page reads


@dataclass(frozen=True)
class ShownQuery:
    """An evaluation query whose trainer lets it be seen."""

    number: int
    label: str
    text: str  # or its numbers, in words
    image: str  # a data: URI, if the numbers make a picture


@require_http_methods(["GET", "POST"])
def ask(request: HttpRequest, slug: str) -> HttpResponseBase:
    """Choose what to ask about; anyone may, as often as the quota lets them."""
    model, disclosures = model_or_404(request, slug)
    disclosure = disclosures[0]
    index = attribution.find_index(disclosure)
    document = disclosure.document
    query_form = text_form = None
    if index:
        posted = request.POST if request.method == "POST" else None
        is_text = posted is not None and "text" in posted
        query_form = QueryForm(None if is_text else posted, n_queries=document["queries"]["n_queries"])
        if questions.takes_text(disclosure):
            classes = document["features"].get("classes", [])
            text_form = TextQuestionForm(posted if is_text else None, classes=classes)
    form = next((form for form in (query_form, text_form) if form is not None and form.is_bound), None)
    if form is not None and form.is_valid():
        try:
            question = questions.ask(disclosure=disclosure, asker=asker_of(request), **form.question)
        except DomainError as error:
            form.add_refusal(error)
        else:
            return redirect("influence-answer", slug=slug, question_id=question.public_id)
    is_owner = model.owner == request.party  # type: ignore[attr-defined]
    shown = shown_queries(disclosure, is_owner=is_owner) if index else []
    context = {
        "section": "models",
        "model": model,
        "index": index,
        "progress": attribution.index_progress(index) if index else None,
        "n_queries": document["queries"]["n_queries"] if index else 0,
        "page": Paginator(shown, PER_PAGE).get_page(request.GET.get("page")) if shown else None,
        "has_pictures": bool(shown) and all(query.image for query in shown[:PER_PAGE]),
        "query_form": query_form,
        "text_form": text_form,
        "form": form,
    }
    return render(request, "portal/influence.html", context, status=422 if form is not None and form.errors else 200)


@require_GET
def answer(request: HttpRequest, slug: str, question_id: uuid.UUID) -> HttpResponse:
    model, disclosures = model_or_404(request, slug)
    question = get_object_or_404(attribution.questions_about(disclosures), public_id=question_id)
    disclosure = question.index.disclosure
    is_owner = model.owner == request.party  # type: ignore[attr-defined]
    numbers = {citation.version_id: number for number, citation in enumerate(disclosure.citations.all(), 1)}
    shown = None
    if question.query is not None:
        queries = shown_queries(disclosure, is_owner=is_owner)
        shown = queries[question.query] if question.query < len(queries) else None
    sides = [
        (title, [(record, numbers.get(record.version.pk), _look(record)) for record in records])
        for title, records in zip(
            ("Helped most", "Harmed most"), attribution.moved_records(question).values(), strict=True
        )
    ]
    context = {
        "section": "models",
        "model": model,
        "question": question,
        "answer": question.answer,
        "shown": shown,
        "sides": sides,
        "has_classes": "classes" in disclosure.document["features"],
        "loss": disclosure.document["measurement"].replace("_", " "),
        "step": disclosure.document["checkpoints"][-1]["step"],
    }
    template = "portal/_influence_answer.html" if request.htmx else "portal/influence_answer.html"  # type: ignore[attr-defined]
    return render(request, template, context)


def asker_of(request: HttpRequest) -> str:
    """Whose quota a question costs."""
    party = getattr(request, "party", None)
    return f"party:{party.pk}" if party else f"address:{BaseThrottle().get_ident(request)}"  # type: ignore[arg-type]


def shown_queries(disclosure: Disclosure, *, is_owner: bool) -> list[ShownQuery]:
    """The evaluation queries, if the trainer makes them public or is the one who looks, and the file is small."""
    spec = disclosure.document["queries"]
    if not (is_owner or spec.get("is_public")):
        return []
    artifact = Artifact.objects.filter(
        owner=disclosure.model.owner_id, kind=Artifact.Kind.QUERIES, sha256=spec["sha256"]
    ).first()
    if artifact is None or default_storage.size(normalised_key(artifact)) > MAX_SHOWN_BYTES:
        return []
    queries = read_queries(artifact)
    if isinstance(queries.content, list):
        return [
            ShownQuery(n, label, text[:200], "")
            for n, (text, label) in enumerate(zip(queries.content, queries.labels, strict=True))
        ]
    low, high = float(queries.content.min()), float(queries.content.max())
    return [
        ShownQuery(n, label, _numbers(row), thumbnail(row, minimum=low, maximum=high))
        for n, (row, label) in enumerate(zip(queries.content.tolist(), queries.labels, strict=True))
    ]


def _look(record: attribution.MovedRecord) -> dict[str, Any] | None:
    """A record's preview as the page shows it."""
    if record.preview is None:
        return None
    content = record.preview["content"]
    label = record.preview["label"]
    if isinstance(content, str):
        return {"text": content[:200], "image": "", "label": label}
    limits = record.version.features["content"]
    picture = thumbnail(content, minimum=limits["minimum"], maximum=limits["maximum"])
    return {"text": _numbers(content), "image": picture, "label": label}


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values[:8]) + (", …" if len(values) > 8 else "")
