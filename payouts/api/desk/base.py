"""What the desk's addresses have in common: a staff member's key, pages, filters, and acts that happen once."""

import hashlib
from operator import attrgetter
from typing import Any, ClassVar

from drf_spectacular.utils import OpenApiParameter
from rest_framework import serializers
from rest_framework.generics import GenericAPIView
from rest_framework.mixins import ListModelMixin, RetrieveModelMixin
from rest_framework.pagination import LimitOffsetPagination
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.serializers import Serializer

from marketplace.api.fields import SignedMoneyField
from marketplace.api.keys import idempotency_key
from marketplace.api.pagination import CreatedCursorPagination
from marketplace.api.staff_keys import (
    CODE_HEADER,
    MayActAtDesk,
    StaffKeyAuthentication,
    acted_once,
    acting_staff,
    staff_scope,
)
from marketplace.models import Party, User
from marketplace.money import MINOR_DIGITS, Money

IDEMPOTENCY_KEY = OpenApiParameter(
    "Idempotency-Key",
    str,
    OpenApiParameter.HEADER,
    required=True,
    description="1 to 255 characters, new for each act of yours and the same on a retry, which is answered as the first was.",
)
ONE_TIME_CODE = OpenApiParameter(
    CODE_HEADER,
    str,
    OpenApiParameter.HEADER,
    required=True,
    description="What your authenticator app shows now; each code is good for one request, a retry included.",
)


# --- views ------------------------------------------------------------------------------------------------------------
class DeskView(GenericAPIView):
    """For a staff member's own key alone; nobody reads here what metadata would say of it."""

    authentication_classes = [StaffKeyAuthentication]
    permission_classes = [MayActAtDesk]
    metadata_class = None
    #: of a POST: whether it needs the person's one-time code
    needs_code: ClassVar[bool] = True
    filter_class: ClassVar[type[Serializer] | None] = None

    @staticmethod
    def needed_scope(method: str) -> str:
        return staff_scope(method)

    def parameters(self, method: str) -> list[Any]:
        """For the OpenAPI document: what it takes besides body and path."""
        if method == "POST":
            return [IDEMPOTENCY_KEY, ONE_TIME_CODE] if self.needs_code else [IDEMPOTENCY_KEY]
        return [self.filter_class] if self.filter_class else []

    def asked(self) -> dict[str, Any]:
        """The filters of a GET, checked."""
        assert self.filter_class is not None
        data = self.filter_class(data=self.request.query_params)
        data.is_valid(raise_exception=True)
        return dict(data.validated_data)

    @property
    def person(self) -> User:
        return acting_staff(self.request)


class DeskDetail(RetrieveModelMixin, DeskView):
    lookup_url_kwarg = "id"

    def get(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        return self.retrieve(request, *args, **kwargs)


class DeskList(ListModelMixin, DeskView):
    def get(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        return self.list(request, *args, **kwargs)


class DeskAct(DeskView):
    """A POST that happens once per person and Idempotency-Key; `act` calls the service and answers with what there is now."""

    lookup_url_kwarg = "id"
    input_class: ClassVar[type[Serializer] | None] = None
    answers: ClassVar[int] = 200

    def post(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        key, given = idempotency_key(request), {}
        if self.input_class is not None:
            data = self.input_class(data=request.data)
            data.is_valid(raise_exception=True)
            given = data.validated_data
        return acted_once(request, key=key, act=lambda: Response(self.act(**given), status=self.answers))

    def act(self, **given: Any) -> Any:
        raise NotImplementedError

    def told(self, pk: int) -> Any:
        """The row as it is now, read anew as the view's own lists read it."""
        assert self.serializer_class is not None
        return self.serializer_class(self.get_queryset().get(pk=pk)).data

    def once(self) -> str:
        """The key that a service is given: of this person's request, and short enough for every table."""
        return service_key(self.person, idempotency_key(self.request))


def service_key(user: User, key: str) -> str:
    return f"desk-api:{user.pk}:{hashlib.sha256(key.encode()).hexdigest()[:32]}"


# --- pages ------------------------------------------------------------------------------------------------------------
class OldestFirst(CreatedCursorPagination):
    ordering = "pk"


class InOrder(CreatedCursorPagination):
    """By the position that each row has among its kind."""

    ordering = "position"


class OffsetPages(LimitOffsetPagination):
    """For what is added up at each look and so has no cursor: the same answer as a page by cursor."""

    default_limit = 50
    max_limit = 200
    limit_query_param = "page_size"
    MAX_OFFSET = 10**9

    def get_offset(self, request: Request) -> int:
        return min(super().get_offset(request), self.MAX_OFFSET)

    def get_paginated_response(self, data: Any) -> Response:
        return Response({"next": self.get_next_link(), "previous": self.get_previous_link(), "results": data})

    def get_paginated_response_schema(self, schema: dict[str, Any]) -> dict[str, Any]:
        return CreatedCursorPagination().get_paginated_response_schema(schema)


# --- fields -----------------------------------------------------------------------------------------------------------
class AmountField(SignedMoneyField):
    """Money out of a column of micros and the currency's own column, here or across a relation; null where there is none."""

    def __init__(self, micros: str = "amount_micros", *, currency: str = "currency", **kwargs: Any) -> None:
        self.micros, self.currency = micros, currency
        super().__init__(source="*", read_only=True, **kwargs)

    def to_representation(self, row: Any) -> Any:
        micros = attrgetter(self.micros)(row)
        return None if micros is None else super().to_representation(Money(int(micros), attrgetter(self.currency)(row)))


class PersonField(serializers.EmailField):
    """Who of the staff did it, by e-mail address; null: nobody yet, or the schedule."""

    def __init__(self, source: str, **kwargs: Any) -> None:
        super().__init__(source=f"{source}.email", default=None, allow_null=True, **kwargs)


class DeskPartyOutput(serializers.ModelSerializer):
    """`id` is the one in account codes: payable:17:USD."""

    class Meta:
        model = Party
        fields = ["id", "public_id", "name", "kind", "country"]


class CurrencyField(serializers.ChoiceField):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(choices=list(MINOR_DIGITS), **kwargs)


class ReasonInput(serializers.Serializer):
    reason = serializers.CharField(max_length=500, help_text="In words; whoever looks at it reads it.")


class SearchFilter(serializers.Serializer):
    q = serializers.CharField(required=False, default="", allow_blank=True, max_length=100)
