"""The books: trial balance, journals, what is owed and how old it is, yearly totals, closing months, and manual entries."""

from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, overload

from django.db.models import QuerySet
from django.http import Http404, StreamingHttpResponse
from django.shortcuts import get_object_or_404
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import extend_schema, extend_schema_field, extend_schema_view
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace import clock
from marketplace.api.fields import MoneyField, SignedMoneyField
from marketplace.money import Money
from payouts import books
from payouts.api.desk.base import (
    AmountField,
    CurrencyField,
    DeskAct,
    DeskDetail,
    DeskList,
    DeskPartyOutput,
    DeskView,
    OffsetPages,
    OldestFirst,
    PersonField,
    SearchFilter,
)
from payouts.book_files import as_download, journal_csv, yearly_csv
from payouts.models import Account, ClosedBalance, ClosedPeriod, JournalEntry, ManualEntry, ManualLeg, Posting, TaxRate
from payouts.selectors import manual_entries_found
from payouts.services import closing, manual_entries

PAGE_SIZE, MAX_PAGE_SIZE = 50, 200


# --- trial balance and whole journals ---------------------------------------------------------------------------------
class TrialLineOutput(serializers.Serializer):
    """One purpose of the chart of accounts; debits positive."""

    purpose = serializers.CharField()
    kind = serializers.CharField(help_text="asset, liability, revenue, expense or equity.")
    meaning = serializers.CharField()
    debit = MoneyField()
    credit = MoneyField()
    balance = SignedMoneyField()


class TrialBalanceOutput(serializers.Serializer):
    """One currency: assets = for_others + own_revenue + owners."""

    currency = serializers.CharField()
    balances = serializers.BooleanField(help_text="Debits equal credits.")
    debit = MoneyField()
    credit = MoneyField()
    assets = SignedMoneyField()
    for_others = SignedMoneyField(help_text="Held, and not the platform's own.")
    own_revenue = SignedMoneyField()
    owners = SignedMoneyField()
    lines = TrialLineOutput(many=True)


class AsOfFilter(serializers.Serializer):
    as_of = serializers.DateField(required=False, help_text="The end of this day (UTC); today, without.")

    def validate_as_of(self, day: date) -> date:
        return _booked_year(day)


def _booked_year(day: date) -> date:
    if not 2000 <= day.year <= 9998:
        raise serializers.ValidationError("These books have no such year.")
    return day


def _end_of(day: date | None) -> datetime:
    """The first moment after a day."""
    return datetime.combine(day or clock.today(), time(), UTC) + timedelta(days=1)


class TrialBalanceView(DeskView):
    serializer_class = TrialBalanceOutput
    pagination_class = None
    filter_class = AsOfFilter

    @extend_schema(
        summary="The trial balance as of a day, per currency",
        operation_id="desk_trial_balance",
        responses=TrialBalanceOutput(many=True),
    )
    def get(self, request: Request) -> Response:
        trials = books.trial_balance(as_of=_end_of(self.asked().get("as_of")))
        return Response(TrialBalanceOutput(trials, many=True).data)


class BeancountView(DeskView):
    pagination_class = None
    filter_class = AsOfFilter

    @extend_schema(
        summary="The whole journal, for beancount",
        description="Each closed month's trial balance stands in it as assertions.",
        operation_id="desk_beancount",
        responses={(200, "text/plain"): OpenApiTypes.STR},
    )
    def get(self, request: Request) -> StreamingHttpResponse:
        until = _end_of(self.asked().get("as_of"))
        return as_download(books.beancount_lines(until=until), "residual.beancount", "text/plain")


class YearlyTotalsView(DeskView):
    pagination_class = None

    @extend_schema(
        summary="What each payee was credited and sent in a year, as CSV",
        description="For tax forms: a row per payee and currency, by quarter.",
        operation_id="desk_yearly_totals",
        responses={(200, "text/csv"): OpenApiTypes.STR},
    )
    def get(self, request: Request, year: int) -> StreamingHttpResponse:
        if not 2000 <= year <= 9998:
            raise Http404("There is no such year")
        return as_download(yearly_csv(year), f"residual-payees-{year}.csv", "text/csv")


# --- accounts ---------------------------------------------------------------------------------------------------------
class AccountOutput(serializers.ModelSerializer):
    party = DeskPartyOutput(allow_null=True)

    class Meta:
        model = Account
        fields = ["code", "kind", "currency", "party", "created_at"]


class JournalRowOutput(serializers.Serializer):
    """One posting; debits positive."""

    posting = serializers.IntegerField(source="posting_id")
    entry = serializers.IntegerField(source="entry_id")
    key = serializers.CharField()
    kind = serializers.CharField()
    booked_at = serializers.DateTimeField()
    amount = SignedMoneyField()
    balance = SignedMoneyField(help_text="After it.")


class JournalPageOutput(serializers.Serializer):
    """Newest first; `opening` is the balance before the oldest row. `next` is older."""

    account = AccountOutput()
    opening = SignedMoneyField()
    next = serializers.CharField(allow_null=True)
    previous = serializers.CharField(allow_null=True)
    results = JournalRowOutput(many=True)


class JournalFilter(serializers.Serializer):
    before = serializers.IntegerField(
        required=False, min_value=0, max_value=2**63 - 1, help_text="The page that ends before this posting."
    )
    after = serializers.IntegerField(
        required=False, min_value=0, max_value=2**63 - 1, help_text="The page that follows this posting."
    )
    since = serializers.DateField(required=False, help_text="The page that begins with this business day.")
    page_size = serializers.IntegerField(required=False, min_value=1, default=PAGE_SIZE)

    def validate_page_size(self, size: int) -> int:
        return min(size, MAX_PAGE_SIZE)

    def validate_since(self, day: date) -> date:
        return _booked_year(day)


class EntryLegOutput(serializers.ModelSerializer):
    account = serializers.CharField(source="account.code")
    amount = AmountField(currency="account.currency")

    class Meta:
        model = Posting
        fields = ["leg", "account", "amount"]


class EntryOutput(serializers.ModelSerializer):
    reverses = serializers.CharField(source="reverses.key", default=None, allow_null=True)

    class Meta:
        model = JournalEntry
        fields = ["id", "key", "kind", "currency", "booked_at", "n_legs", "reverses"]


@extend_schema_view(
    get=extend_schema(
        summary="Accounts",
        description="By the beginning of their code, or the name of the party.",
        operation_id="desk_accounts_list",
    )
)
class AccountList(DeskList):
    serializer_class = AccountOutput
    filter_class = SearchFilter

    def get_queryset(self) -> QuerySet[Account]:
        return books.accounts_found(self.asked()["q"].strip())


class JournalView(DeskView):
    serializer_class = JournalPageOutput
    pagination_class = None
    filter_class = JournalFilter

    @extend_schema(
        summary="One account's journal, with the balance after each posting",
        operation_id="desk_accounts_journal",
        responses=JournalPageOutput,
    )
    def get(self, request: Request, code: str) -> Response:
        asked = self.asked()
        size = asked.pop("page_size")
        page = books.account_journal(code=code, size=size, **asked)
        told = {
            "account": page.account,
            "opening": page.opening,
            "next": page.earlier and self._page(before=page.earlier, page_size=size),
            "previous": page.later and self._page(after=page.later, page_size=size),
            "results": page.rows[::-1],
        }
        return Response(JournalPageOutput(told).data)

    def _page(self, **given: int) -> str:
        query = "&".join(f"{name}={number}" for name, number in given.items())
        return self.request.build_absolute_uri(f"{self.request.path}?{query}")


class JournalCsvView(DeskView):
    pagination_class = None

    @extend_schema(
        summary="One account's whole journal, as CSV",
        operation_id="desk_accounts_journal_csv",
        responses={(200, "text/csv"): OpenApiTypes.STR},
    )
    def get(self, request: Request, code: str) -> StreamingHttpResponse:
        return as_download(journal_csv(books.find_account(code)), f"{code.replace(':', '-')}.csv", "text/csv")


@extend_schema_view(get=extend_schema(summary="One journal entry", operation_id="desk_entries_retrieve"))
class EntryDetail(DeskDetail):
    serializer_class = EntryOutput
    queryset = JournalEntry.objects.select_related("reverses")


class _ByLeg(OldestFirst):
    ordering = "leg"


@extend_schema_view(
    get=extend_schema(
        summary="The legs of a journal entry, debits positive",
        operation_id="desk_entries_legs",
        responses=EntryLegOutput(many=True),
    )
)
class EntryLegs(DeskList):
    serializer_class = EntryLegOutput
    pagination_class = _ByLeg

    def get_queryset(self) -> QuerySet[Posting]:
        entry = get_object_or_404(JournalEntry, pk=self.kwargs["id"])
        return entry.postings.select_related("account")


# --- what is owed -----------------------------------------------------------------------------------------------------
class AgedAmountsOutput(serializers.Serializer):
    """By how long it has been due."""

    not_due = MoneyField()
    days_0_to_30 = MoneyField()
    days_31_to_60 = MoneyField()
    days_61_to_90 = MoneyField()
    more_than_90_days = MoneyField()
    without_a_line = MoneyField(help_text="Given otherwise than by a division.")


class AgedPayableOutput(serializers.Serializer):
    party = serializers.IntegerField(source="party_id")
    name = serializers.CharField(source="party_name")
    country = serializers.CharField()
    account = serializers.CharField(source="code")
    can_be_paid = serializers.BooleanField(help_text="By Stripe.")
    currency = serializers.CharField()
    total = MoneyField()
    n_days = serializers.IntegerField(help_text="Since the oldest of it fell due; 0: nothing is due.")
    by_age = serializers.SerializerMethodField()

    @extend_schema_field(AgedAmountsOutput)
    def get_by_age(self, row: books.AgedPayable) -> Any:
        return _aged(row.by_age)


class AgedTotalOutput(serializers.Serializer):
    currency = serializers.CharField()
    n_parties = serializers.IntegerField()
    total = MoneyField()
    by_age = AgedAmountsOutput()


def _aged(amounts: Sequence[Money]) -> Any:
    names = list(AgedAmountsOutput().fields)
    assert len(names) == len(books.AGES), "an amount for each age"
    return AgedAmountsOutput(dict(zip(names, amounts, strict=True))).data


class _AgedPayables(Sequence[books.AgedPayable]):
    """All of them, of which a page is added up when it is looked at."""

    def __len__(self) -> int:
        return sum(count for count, _ in books.aged_totals().values())

    @overload
    def __getitem__(self, at: int) -> books.AgedPayable: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[books.AgedPayable]: ...
    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return books.aged_payables(offset=at.start, limit=at.stop - at.start)
        return books.aged_payables(offset=at, limit=1)[0]


class AgedPayableList(DeskView):
    serializer_class = AgedPayableOutput
    pagination_class = OffsetPages

    @extend_schema(
        summary="What is owed to payees, by age; who has waited longest first",
        operation_id="desk_payables_list",
        responses=AgedPayableOutput(many=True),
    )
    def get(self, request: Request) -> Response:
        page = self.paginate_queryset(_AgedPayables())
        return self.get_paginated_response(AgedPayableOutput(page, many=True).data)


class AgedTotalsView(DeskView):
    serializer_class = AgedTotalOutput
    pagination_class = None

    @extend_schema(
        summary="What is owed to payees in all, by age and currency",
        operation_id="desk_payables_totals",
        responses=AgedTotalOutput(many=True),
    )
    def get(self, request: Request) -> Response:
        told = [
            {
                "currency": currency,
                "n_parties": count,
                "total": Money(sum(amount.micros for amount in amounts), currency),
                "by_age": dict(zip(AgedAmountsOutput().fields, amounts, strict=True)),
            }
            for currency, (count, amounts) in books.aged_totals().items()
        ]
        return Response(AgedTotalOutput(told, many=True).data)


# --- closing months ---------------------------------------------------------------------------------------------------
class ClosedPeriodOutput(serializers.ModelSerializer):
    month = serializers.CharField(source="__str__", help_text="2026-03")
    closed_by = PersonField("closed_by", help_text="null: by itself, as nothing was open.")

    class Meta:
        model = ClosedPeriod
        fields = ["month", "ends_at", "closed_by", "closed_at", "note"]


class ClosedBalanceOutput(serializers.ModelSerializer):
    debit = AmountField("debit_micros")
    credit = AmountField("credit_micros")

    class Meta:
        model = ClosedBalance
        fields = ["purpose", "currency", "debit", "credit"]


class ClosedPeriodDetail(ClosedPeriodOutput):
    balances = serializers.SerializerMethodField(help_text="The trial balance that was kept.")

    class Meta(ClosedPeriodOutput.Meta):
        fields = [*ClosedPeriodOutput.Meta.fields, "balances"]

    @extend_schema_field(ClosedBalanceOutput(many=True))
    def get_balances(self, period: ClosedPeriod) -> Any:
        return ClosedBalanceOutput(period.balances.order_by("pk"), many=True).data


class ObstacleOutput(serializers.Serializer):
    about = serializers.ChoiceField(
        choices=closing.ABOUT,
        help_text="Where it is settled. looks: `reconciliations/`; proof: `proofs/`; balances: at the desk; events: "
        "`stripe-events/`; manual: `manual-entries/`; receipts: `receipts/`; bank: `outgoing-transfers/` and `applications/`; "
        "rails: `rail-exports/` and `rail-confirmations/`.",
    )
    text = serializers.CharField()


class NextPeriodOutput(serializers.Serializer):
    """The month that can be closed next, and what stands in the way."""

    month = serializers.CharField(help_text="2026-03")
    ends_at = serializers.DateTimeField()
    is_over = serializers.BooleanField()
    obstacles = ObstacleOutput(many=True)


class ClosePeriodInput(serializers.Serializer):
    month = serializers.RegexField(r"^\d{4}-(0[1-9]|1[0-2])$", help_text="2026-03: the next one.")
    note = serializers.CharField(
        required=False,
        allow_blank=True,
        default="",
        max_length=2_000,
        help_text="Why it is closed although something is open.",
    )

    def validate_month(self, month: str) -> date:
        return _booked_year(date(max(1, int(month[:4])), int(month[5:]), 1))


@extend_schema_view(
    get=extend_schema(summary="Closed months, latest first", operation_id="desk_periods_list"),
    post=extend_schema(
        summary="Close the next month, for good",
        description="Nothing is booked into it any more, its trial balance is kept, and its statements go out.",
        operation_id="desk_periods_close",
        request=ClosePeriodInput,
        responses={201: ClosedPeriodDetail},
    ),
)
class PeriodList(DeskList, DeskAct):
    serializer_class = ClosedPeriodOutput
    input_class = ClosePeriodInput
    queryset = ClosedPeriod.objects.select_related("closed_by").order_by("-pk")
    answers = 201

    def act(self, **given: Any) -> Any:
        period = closing.close_period(starts_on=given["month"], by=self.person, note=given["note"])
        return ClosedPeriodDetail(period).data


class PeriodDetail(DeskView):
    serializer_class = ClosedPeriodDetail

    @extend_schema(
        summary="One closed month, with its trial balance",
        operation_id="desk_periods_retrieve",
        responses=ClosedPeriodDetail,
    )
    def get(self, request: Request, month: str) -> Response:
        data = ClosePeriodInput(data={"month": month})
        starts_on = data.validated_data["month"] if data.is_valid() else None
        found = get_object_or_404(ClosedPeriod.objects.select_related("closed_by"), starts_on=starts_on)
        return Response(ClosedPeriodDetail(found).data)


class NextPeriodView(DeskView):
    serializer_class = NextPeriodOutput

    @extend_schema(
        summary="The month that can be closed next, and what stands in the way",
        description="404 while nothing was booked.",
        operation_id="desk_periods_next",
        responses=NextPeriodOutput,
    )
    def get(self, request: Request) -> Response:
        coming = closing.find_next_period()
        if coming is None:
            raise Http404("Nothing was booked yet")
        return Response(NextPeriodOutput(coming).data)


# --- manual entries ---------------------------------------------------------------------------------------------------
class ManualLegOutput(serializers.ModelSerializer):
    account = serializers.CharField(source="account_code")
    amount = SignedMoneyField(help_text="Debits positive.")

    class Meta:
        model = ManualLeg
        fields = ["account", "amount"]


class ManualEntryOutput(serializers.ModelSerializer):
    """`state`: awaiting → approved, that is booked, or rejected."""

    state = serializers.CharField()
    legs = ManualLegOutput(many=True)
    proposed_by = PersonField("proposed_by")
    decided_by = PersonField("decision.decided_by")
    decided_at = serializers.DateTimeField(source="decision.decided_at", default=None, allow_null=True)
    note = serializers.CharField(source="decision.note", default=None, allow_null=True)
    entry = serializers.IntegerField(source="decision.entry_id", default=None, allow_null=True)

    class Meta:
        model = ManualEntry
        fields = [
            "id",
            "key",
            "state",
            "currency",
            "booked_at",
            "reason",
            "balance_transaction_id",
            "legs",
            "proposed_by",
            "proposed_at",
            "decided_by",
            "decided_at",
            "note",
            "entry",
        ]


class ManualLegInput(serializers.Serializer):
    """A debit or a credit, one of the two."""

    account = serializers.ChoiceField(choices=list(manual_entries.BY_HAND))
    tax_rate = serializers.PrimaryKeyRelatedField(
        queryset=TaxRate.objects.all(),
        required=False,
        help_text="Of `tax` alone, and there always: each rate has its account.",
    )
    debit = MoneyField(required=False)
    credit = MoneyField(required=False)

    def validate(self, data: dict[str, Any]) -> dict[str, Any]:
        if ("debit" in data) == ("credit" in data):
            raise serializers.ValidationError({"debit": "Give a debit or a credit, one of the two."})
        if ("tax_rate" in data) != (data["account"] == "tax"):
            raise serializers.ValidationError({"tax_rate": "Say which rate's account, of tax alone."})
        return data


class ManualEntryInput(serializers.Serializer):
    booked_on = serializers.DateField(required=False, help_text="Its business day, in an open month; today, without.")
    reason = serializers.CharField(max_length=2_000, help_text="Why, in words, for the auditor.")
    balance_transaction_id = serializers.CharField(
        required=False,
        allow_blank=True,
        default="",
        max_length=255,
        help_text="txn_…, where the entry moves cash at Stripe; nowhere else.",
    )
    legs = ManualLegInput(many=True)

    def validate_booked_on(self, day: date) -> date:
        return _booked_year(day)

    def validate_legs(self, legs: list[dict[str, Any]]) -> dict[str, int]:
        """Account code → micros, as `propose` takes them."""
        made: dict[str, int] = {}
        for leg in legs:
            amount: Money = leg["debit"] if "debit" in leg else leg["credit"]
            name = f"tax:{leg['tax_rate'].pk}" if "tax_rate" in leg else leg["account"]
            code = f"{name}:{amount.currency}"
            if code in made:
                raise serializers.ValidationError(f"{code} has a leg already; give one amount.")
            made[code] = amount.micros if "debit" in leg else -amount.micros
        return made


class NoteInput(serializers.Serializer):
    note = serializers.CharField(required=False, allow_blank=True, default="", max_length=2_000)


class ManualReasonInput(serializers.Serializer):
    note = serializers.CharField(max_length=2_000, help_text="Why it is rejected.")


class ManualEntryFilter(serializers.Serializer):
    state = serializers.ChoiceField(choices=["awaiting", "approved", "rejected"], required=False)
    currency = CurrencyField(required=False)


@extend_schema_view(
    get=extend_schema(summary="Manual entries, newest first", operation_id="desk_manual_entries_list"),
    post=extend_schema(
        summary="Propose a manual entry",
        description="Two to twenty legs that balance, in one currency. Nothing is booked until somebody else approves it. Needs "
        "no one-time code.",
        operation_id="desk_manual_entries_propose",
        request=ManualEntryInput,
        responses={201: ManualEntryOutput},
    ),
)
class ManualEntryList(DeskList, DeskAct):
    needs_code = False
    serializer_class = ManualEntryOutput
    filter_class = ManualEntryFilter
    input_class = ManualEntryInput
    answers = 201

    def get_queryset(self) -> QuerySet[ManualEntry]:
        asked = self.asked()
        return manual_entries_found(state=asked.pop("state", None)).filter(**asked)

    def act(self, **given: Any) -> Any:
        made = manual_entries.propose(
            user=self.person,
            key=self.once(),
            legs=given["legs"],
            reason=given["reason"],
            booked_at=_at_noon(given.get("booked_on")),
            balance_transaction_id=given["balance_transaction_id"],
        )
        return ManualEntryOutput(made).data


def _at_noon(day: date | None) -> datetime | None:
    """Noon of a day, or now if that is today."""
    if day is None or day == clock.today():
        return None
    return datetime.combine(day, time(12), UTC)


@extend_schema_view(get=extend_schema(summary="One manual entry", operation_id="desk_manual_entries_retrieve"))
class ManualEntryDetail(DeskDetail):
    serializer_class = ManualEntryOutput

    def get_queryset(self) -> QuerySet[ManualEntry]:
        return manual_entries_found()


class _ManualAct(DeskAct):
    serializer_class = ManualEntryOutput

    def get_queryset(self) -> QuerySet[ManualEntry]:
        return manual_entries_found()


@extend_schema_view(
    post=extend_schema(
        summary="Approve and post a manual entry",
        description="Another person than the one who proposed it.",
        operation_id="desk_manual_entries_approve",
        request=NoteInput,
        responses=ManualEntryOutput,
    )
)
class ManualEntryApprove(_ManualAct):
    input_class = NoteInput

    def act(self, **given: Any) -> Any:
        decision = manual_entries.approve(manual=self.get_object(), user=self.person, **given)
        return self.told(decision.manual_id)


@extend_schema_view(
    post=extend_schema(
        summary="Reject a manual entry",
        description="Another person than the one who proposed it. Needs no one-time code: nothing is booked.",
        operation_id="desk_manual_entries_reject",
        request=ManualReasonInput,
        responses=ManualEntryOutput,
    )
)
class ManualEntryReject(_ManualAct):
    needs_code = False
    input_class = ManualReasonInput

    def act(self, **given: Any) -> Any:
        decision = manual_entries.reject(manual=self.get_object(), user=self.person, **given)
        return self.told(decision.manual_id)
