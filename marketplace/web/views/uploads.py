"""From a file to a published version: choose it, say which column is what, watch it being read, sign for it."""

import uuid

from django.http import HttpResponse, HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_GET, require_http_methods

from marketplace import selectors
from marketplace.bodies import takes_files
from marketplace.errors import DomainError
from marketplace.models import Upload
from marketplace.services.versions import attestation_statement, publish_version, start_upload
from marketplace.web.access import ActingRequest, acting, acting_editor, acting_owner
from marketplace.web.forms import FileForm, MappingForm, PublishForm
from marketplace.web.incoming import get_incoming, receive


@takes_files("MAX_UPLOAD_BYTES")
@acting_editor
@require_http_methods(["GET", "POST"])
def upload(request: ActingRequest, slug: str) -> HttpResponseBase:
    """The first step: the file."""
    dataset = get_object_or_404(selectors.datasets_of(request.party), slug=slug)
    form = FileForm(request.POST or None, request.FILES or None)
    if request.method == "POST":
        form = FileForm(request.POST, request.FILES)
        if form.is_valid():
            try:
                incoming = receive(dataset=dataset, file=form.cleaned_data["file"])
            except DomainError as error:
                form.add_refusal(error)
            else:
                return redirect("upload-map", slug=dataset.slug, incoming_id=incoming.id)
    context = {"section": "datasets", "dataset": dataset, "form": form}
    return render(request, "marketplace/upload_file.html", context, status=422 if form.errors else 200)


@acting_editor
@require_http_methods(["GET", "POST"])
def upload_map(request: ActingRequest, slug: str, incoming_id: uuid.UUID) -> HttpResponseBase:
    """The second step: which of the file's columns is what; then it is read in the background."""
    dataset = get_object_or_404(selectors.datasets_of(request.party), slug=slug)
    incoming = get_incoming(dataset=dataset, id=incoming_id)
    form = MappingForm(request.POST or None, columns=incoming.columns, party=dataset.owner)
    if form.is_valid():
        try:
            with incoming.open() as file:
                started = start_upload(
                    dataset=dataset,
                    user=request.user,
                    party=request.party,
                    file=file,
                    filename=incoming.filename,
                    mapping=form.mapping,
                )
        except DomainError as error:
            form.add_refusal(error)
        else:
            incoming.delete()
            return redirect("upload-status", upload_id=started.public_id)
    context = {"section": "datasets", "dataset": dataset, "incoming": incoming, "form": form}
    return render(request, "marketplace/upload_map.html", context, status=422 if form.errors else 200)


@acting
@require_GET
def upload_status(request: ActingRequest, upload_id: uuid.UUID) -> HttpResponse:
    """Live while it is being read: the fragment asks for itself once a second until there is nothing more to say."""
    found = _upload_or_404(request, upload_id)
    template = "marketplace/_upload_status.html" if request.htmx else "marketplace/upload_status.html"
    return render(request, template, {"section": "datasets", "upload": found, "dataset": found.version.dataset})


@acting_owner
@require_http_methods(["GET", "POST"])
def publish(request: ActingRequest, upload_id: uuid.UUID) -> HttpResponseBase:
    found = _upload_or_404(request, upload_id)
    if found.version.status == found.version.Status.DRAFT:
        return redirect("upload-status", upload_id=upload_id)
    form = PublishForm(request.POST or None)
    if form.is_valid():
        try:
            publish_version(version=found.version, user=request.user, signed_name=form.cleaned_data["signed_name"])
        except DomainError as error:
            form.add_refusal(error)
        else:
            return redirect("offer-new", slug=found.version.dataset.slug)
    context = {
        "section": "datasets",
        "upload": found,
        "version": found.version,
        "dataset": found.version.dataset,
        "form": form,
        "statement": attestation_statement(found.version),
    }
    return render(request, "marketplace/publish_form.html", context, status=422 if form.errors else 200)


def _upload_or_404(request: ActingRequest, upload_id: uuid.UUID) -> Upload:
    return get_object_or_404(selectors.uploads_visible_to(request.party), public_id=upload_id)
