import uuid
from typing import Any, ClassVar

from django.db.models import Q, QuerySet
from django.http import Http404
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema, extend_schema_view
from rest_framework import status
from rest_framework.decorators import action
from rest_framework.generics import get_object_or_404
from rest_framework.mixins import ListModelMixin, RetrieveModelMixin
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.viewsets import GenericViewSet

from attribution import selectors
from attribution.api.parsers import RawBody
from attribution.api.serializers import (
    ArtifactOutput,
    DisclosureOutput,
    HeadsInput,
    HeadsOutput,
    MeteredRunInput,
    MeteredRunOutput,
    ModelOutput,
    ModelSummary,
    QuestionInput,
    QuestionOutput,
)
from attribution.artifacts import store_artifact
from attribution.errors import ArtifactInvalid
from attribution.models import Artifact, MeteredRun
from attribution.services.disclosures import disclose_model
from attribution.services.meters import PostedHead, plan_metered_run, post_heads
from attribution.services.questions import ask
from marketplace import clock
from marketplace.errors import InvalidInput
from marketplace.models import ApiKey, Disclosure, Party, TrainedModel

#: What a trainer hands in; the other kinds are the engine's own.
HANDED_IN = (Artifact.Kind.STATE, Artifact.Kind.QUERIES, Artifact.Kind.METER)


class ArtifactViewSet(GenericViewSet):
    """Evidence, handed in before the disclosure that names it."""

    scopes: ClassVar[dict[str, str]] = {"create": ApiKey.Scope.DISCLOSE}
    parser_classes = [RawBody]
    body_limit = "MAX_ARTIFACT_BYTES"
    serializer_class = ArtifactOutput
    queryset = Artifact.objects.none()

    @extend_schema(
        summary="Hand in a checkpoint, evaluation queries or a meter's log",
        description="The body is the file as it is. Checkpoints are safetensors; queries are Parquet with the columns "
        "`content` (a list of numbers, or a string) and `label` (a string); a meter's log is closed. The same bytes again "
        "give the same answer.",
        parameters=[OpenApiParameter("kind", str, enum=[kind.value for kind in HANDED_IN], required=True)],
        request={"application/octet-stream": OpenApiTypes.BINARY},
        responses={201: ArtifactOutput},
    )
    def create(self, request: Request) -> Response:
        kind = request.query_params.get("kind", "")
        if kind not in [known.value for known in HANDED_IN]:
            raise ArtifactInvalid(
                f"Add ?kind=, one of {', '.join(HANDED_IN)}, to the address.", pointers={"kind": "unknown or missing"}
            )
        if not hasattr(request.data, "read"):
            raise ArtifactInvalid("The body is empty; send the file's bytes as they are.", pointers={"/body": "empty"})
        artifact = store_artifact(owner=_acting_party(request), kind=kind, stream=request.data)
        return Response(ArtifactOutput(artifact).data, status=status.HTTP_201_CREATED)


@extend_schema_view(
    list=extend_schema(summary="Your disclosures"),
    retrieve=extend_schema(summary="A disclosure, its replay, its measurement and its results"),
)
class DisclosureViewSet(ListModelMixin, RetrieveModelMixin, GenericViewSet):
    scopes: ClassVar[dict[str, str]] = {"create": ApiKey.Scope.DISCLOSE}
    body_limit = "MAX_DISCLOSURE_BYTES"
    serializer_class = DisclosureOutput
    queryset = Disclosure.objects.none()
    lookup_field = "public_id"
    lookup_value_converter = "uuid"

    def get_queryset(self) -> QuerySet[Disclosure]:
        return selectors.disclosures_visible_to(_acting_party(self.request))

    @extend_schema(
        summary="Disclose what a model was trained on",
        description="The body is the document itself; its schema is served at `/schemas/disclosure/1.json`. The same "
        "document again is the same disclosure.",
        request=OpenApiTypes.OBJECT,
        responses={201: DisclosureOutput},
    )
    def create(self, request: Request) -> Response:
        document: Any = request.data
        if not isinstance(document, dict):
            raise InvalidInput("The body is the document: a JSON object.", pointers={"": "not an object"})
        disclosure = disclose_model(owner=_acting_party(request), document=document)
        seen = self.get_queryset().get(pk=disclosure.pk)
        return Response(DisclosureOutput(seen).data, status=status.HTTP_201_CREATED)


@extend_schema_view(
    list=extend_schema(summary="Your metered trainings"),
    retrieve=extend_schema(summary="A metered training, and how far its heads were posted"),
)
class MeteredRunViewSet(ListModelMixin, RetrieveModelMixin, GenericViewSet):
    """Planned before training begins; heads are posted to it while training runs, and a disclosure names it."""

    scopes: ClassVar[dict[str, str]] = {"create": ApiKey.Scope.DISCLOSE, "heads": ApiKey.Scope.DISCLOSE}
    serializer_class = MeteredRunOutput
    queryset = MeteredRun.objects.none()
    lookup_field = "public_id"
    lookup_value_converter = "uuid"

    def get_queryset(self) -> QuerySet[MeteredRun]:
        return selectors.metered_runs_of(_acting_party(self.request))

    @extend_schema(
        summary="Plan a metered training",
        description="Before training begins, with the queries that will be asked. The same plan again is the same run.",
        request=MeteredRunInput,
        responses={201: MeteredRunOutput},
    )
    def create(self, request: Request) -> Response:
        data = MeteredRunInput(data=request.data)
        data.is_valid(raise_exception=True)
        run = plan_metered_run(owner=_acting_party(request), **data.validated_data)
        return Response(MeteredRunOutput(self.get_queryset().get(pk=run.pk)).data, status=status.HTTP_201_CREATED)

    @extend_schema(
        summary="Post heads of a metered training's log",
        description="While training runs. Entries ascend; heads that are there already are answered with the time at which they first "
        "came, so a request may be repeated. No more than an eighth of the log may lie between two posts. Nothing is ever changed or deleted.",
        request=HeadsInput,
        responses={201: HeadsOutput},
    )
    @action(detail=True, methods=["post"], pagination_class=None)
    def heads(self, request: Request, public_id: str) -> Response:
        data = HeadsInput(data=request.data)
        data.is_valid(raise_exception=True)
        heads = post_heads(run=self.get_object(), heads=[PostedHead(**head) for head in data.validated_data["heads"]])
        return Response(HeadsOutput({"heads": heads}).data, status=status.HTTP_201_CREATED)


@extend_schema_view(
    list=extend_schema(summary="Models with a public page"),
    retrieve=extend_schema(
        summary="A model's page",
        description="What it was trained on, at which prices, and what each contributor's records did for it.",
        responses=ModelOutput,
    ),
)
class ModelViewSet(ListModelMixin, RetrieveModelMixin, GenericViewSet):
    """Anyone may read it, as one follows references in a paper."""

    scopes: ClassVar[dict[str, str | None]] = {
        "list": None,
        "retrieve": None,
        "questions": ApiKey.Scope.READ,
        "question": None,
    }
    serializer_class = ModelSummary
    queryset = TrainedModel.objects.none()
    lookup_field = "slug"

    def get_queryset(self) -> QuerySet[TrainedModel]:
        public = selectors.public_disclosures(clock.now())
        return TrainedModel.objects.filter(disclosures__in=public).select_related("owner").distinct()

    def retrieve(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        return Response(ModelOutput(self.get_object()).data)

    @extend_schema(
        operation_id="models_questions_create",
        summary="Ask which records moved an output",
        description="Of one evaluation query, or of a text: the training records that pushed the output most, for better and "
        "for worse. The score is the inner product of gradients at the last checkpoint; it divides no money. The same "
        "question again is the same answer and costs no quota. Your own models may be asked about under embargo.",
        request=QuestionInput,
        responses={202: QuestionOutput},
    )
    @action(detail=True, methods=["post"])
    def questions(self, request: Request, slug: str) -> Response:
        data = QuestionInput(data=request.data)
        data.is_valid(raise_exception=True)
        party = _acting_party(request)
        disclosure = self._disclosures(slug, party).first()
        if disclosure is None:
            raise Http404
        question = ask(disclosure=disclosure, asker=f"party:{party.pk}", **data.validated_data)
        return Response(QuestionOutput(question).data, status=status.HTTP_202_ACCEPTED)

    @extend_schema(
        operation_id="models_questions_retrieve",
        summary="Which records moved an output",
        responses=QuestionOutput,
    )
    @action(detail=True, url_path="questions/(?P<public_id>[0-9a-f-]{36})")
    def question(self, request: Request, slug: str, public_id: uuid.UUID) -> Response:
        party = request.auth.party if isinstance(request.auth, ApiKey) else None
        asked = selectors.questions_about(self._disclosures(slug, party))
        return Response(QuestionOutput(get_object_or_404(asked, public_id=public_id)).data)

    def _disclosures(self, slug: str, party: Party | None) -> QuerySet[Disclosure]:
        """Of one model, latest first, what anyone may read; its owner sees those under embargo too."""
        is_public = Q(pk__in=selectors.public_disclosures(clock.now()).order_by().values("pk"))
        visible = is_public | Q(model__owner=party) if party else is_public
        return Disclosure.objects.filter(visible, model__slug=slug).order_by("-number")


def _acting_party(request: Request) -> Party:
    assert isinstance(request.auth, ApiKey), "HasScope lets nobody else through"
    return request.auth.party
