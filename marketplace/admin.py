"""For staff, to look things up. What is evidence cannot be changed here either; the services make the rest."""

from typing import Any

from django.contrib import admin
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.db.models import Model, QuerySet
from django.http import HttpRequest

from marketplace import jobs
from marketplace.models import (
    ApiKey,
    Attestation,
    AuditEvent,
    Citation,
    Contribution,
    Dataset,
    DatasetVersion,
    Disclosure,
    Invitation,
    License,
    Membership,
    Offer,
    Order,
    OrderLine,
    Party,
    TrainedModel,
    Upload,
    User,
)
from marketplace.services import audit

#: What of a person is written down when staff change it.
AUDITED = ("is_active", "is_staff", "is_superuser")


class ReadOnly(admin.ModelAdmin):
    """Rows that come to be and change only through services."""

    show_full_result_count = False

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


class ReadOnlyInline(admin.TabularInline):
    extra = 0
    can_delete = False
    show_change_link = True

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


class MembershipInline(ReadOnlyInline):
    model = Membership
    fields = ["user", "role", "created_at"]


class VersionInline(ReadOnlyInline):
    model = DatasetVersion
    fields = ["number", "status", "merkle_root", "n_records", "n_copies", "published_at"]


class OfferInline(ReadOnlyInline):
    model = Offer
    fields = ["number", "version", "price_micros", "currency", "upfront_bps", "pool_bps", "royalty_bps", "created_at"]


class ContributionInline(ReadOnlyInline):
    model = Contribution
    fields = ["party", "role", "number", "n_records", "n_copies"]


class OrderLineInline(ReadOnlyInline):
    model = OrderLine
    fields = ["version", "offer", "price_micros"]


class CitationInline(ReadOnlyInline):
    model = Citation
    fields = ["position", "version", "license", "n_records"]


@admin.register(User)
class UserAdmin(DjangoUserAdmin):
    """Staff can be named and accounts closed; people are never deleted, for what they signed stays signed."""

    ordering = ["email"]
    list_display = ["email", "is_active", "is_staff", "date_joined"]
    search_fields = ["email"]
    fieldsets = [
        (None, {"fields": ["email", "password"]}),
        ("Rights", {"fields": ["is_active", "is_staff", "is_superuser", "groups", "user_permissions"]}),
        ("Dates", {"fields": ["last_login", "date_joined"]}),
    ]
    readonly_fields = ["last_login", "date_joined"]

    def save_model(self, request: HttpRequest, obj: User, form: Any, change: bool) -> None:
        """With what it was and became, but never an address or a password."""
        kept = [name for name in form.changed_data if name in AUDITED]
        was = User.objects.filter(pk=obj.pk).values(*kept).first() if kept else {}
        super().save_model(request, obj, form, change)
        assert isinstance(request.user, User), "nobody else gets here"
        audit.record(
            actor=request.user,
            action="user.changed",
            target=f"user:{obj.pk}",
            before=was or {},
            after={name: getattr(obj, name) for name in kept},
            fields=form.changed_data,
        )

    def save_related(self, request: HttpRequest, form: Any, formsets: Any, change: bool) -> None:
        rights = ("groups", "user_permissions")
        of = form.instance
        before = {name: sorted(getattr(of, name).values_list("pk", flat=True)) for name in rights}
        super().save_related(request, form, formsets, change)
        after = {name: sorted(getattr(of, name).values_list("pk", flat=True)) for name in rights}
        if after != before:
            assert isinstance(request.user, User), "nobody else gets here"
            audit.record(
                actor=request.user, action="user.rights_changed", target=f"user:{of.pk}", before=before, after=after
            )

    def user_change_password(self, request: HttpRequest, id: str, form_url: str = "") -> Any:
        """Written down too, though never what it is."""
        response = super().user_change_password(request, id, form_url)
        if request.method == "POST" and response.status_code == 302:
            assert isinstance(request.user, User), "nobody else gets here"
            audit.record(actor=request.user, action="user.password_set", target=f"user:{id}")
        return response

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False  # people sign up, and so have a party

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


@admin.register(Party)
class PartyAdmin(ReadOnly):
    list_display = ["name", "kind", "country", "introduced_by", "claimed_at", "created_at"]
    list_select_related = ["introduced_by"]
    list_filter = ["kind"]
    search_fields = ["name", "external_ref", "public_id", "members__email"]
    inlines = [MembershipInline]


class JobAdmin(ReadOnly):
    """A job can be looked at and, where it failed by an error of ours, tried again."""

    actions = ["try_again"]

    @admin.action(description="Try again what failed by an error of ours", permissions=["reopen"])
    def try_again(self, request: HttpRequest, chosen: QuerySet[Any]) -> None:
        assert isinstance(request.user, User), "nobody else gets here"
        reopened = [job for job in chosen.order_by("pk") if jobs.reopen(job)]
        for job in reopened:
            target = f"{job._meta.model_name}:{job.pk}"
            audit.record(
                actor=request.user,
                action="job.reopened",
                target=target,
                before={"status": "failed"},
                after={"status": "queued"},
            )
        self.message_user(
            request,
            f"{len(reopened)} of {len(chosen)} will be tried again; what was refused for its input stays as it is.",
        )

    def has_reopen_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.is_superuser)


@admin.register(Invitation)
class InvitationAdmin(JobAdmin):
    list_display = ["party", "email", "status", "expires_at", "accepted_at"]
    list_select_related = ["party"]
    exclude = ["nonce", "token_hash"]


@admin.register(ApiKey)
class ApiKeyAdmin(ReadOnly):
    list_display = ["prefix", "name", "party", "scopes", "last_used_at", "revoked_at"]
    list_select_related = ["party"]
    search_fields = ["prefix", "party__name"]
    exclude = ["key_sha256"]


@admin.register(Dataset)
class DatasetAdmin(ReadOnly):
    list_display = ["title", "owner", "status", "modality", "created_at"]
    list_select_related = ["owner"]
    list_filter = ["status", "modality"]
    search_fields = ["title", "slug", "owner__name"]
    inlines = [VersionInline, OfferInline]


@admin.register(DatasetVersion)
class DatasetVersionAdmin(ReadOnly):
    list_display = ["dataset", "number", "status", "n_records", "n_copies", "merkle_root", "published_at"]
    list_select_related = ["dataset"]
    list_filter = ["status"]
    search_fields = ["merkle_root", "dataset__title", "dataset__slug"]
    inlines = [ContributionInline]


@admin.register(Upload)
class UploadAdmin(JobAdmin):
    list_display = ["filename", "version", "status", "attempt", "size_bytes", "queued_at", "error_code"]
    list_select_related = ["version__dataset"]
    list_filter = ["status", "format"]


@admin.register(Attestation)
class AttestationAdmin(ReadOnly):
    list_display = ["version", "party", "signed_name", "signed_at"]
    list_select_related = ["version__dataset", "party"]


@admin.register(Offer)
class OfferAdmin(ReadOnly):
    list_display = ["dataset", "number", "price_micros", "currency", "royalty_bps", "created_at"]
    list_select_related = ["dataset"]
    search_fields = ["dataset__title", "dataset__slug"]


@admin.register(Order)
class OrderAdmin(ReadOnly):
    list_display = ["public_id", "buyer", "status", "total_micros", "currency", "placed_at", "paid_at"]
    list_select_related = ["buyer"]
    list_filter = ["status", "currency"]
    search_fields = ["public_id", "buyer__name"]
    inlines = [OrderLineInline]


@admin.register(License)
class LicenseAdmin(ReadOnly):
    list_display = ["public_id", "licensee", "version", "granted_at", "expires_at", "revoked_at"]
    list_select_related = ["licensee", "version__dataset"]
    search_fields = ["public_id", "licensee__name"]


@admin.register(TrainedModel)
class TrainedModelAdmin(ReadOnly):
    list_display = ["name", "slug", "owner", "created_at"]
    list_select_related = ["owner"]
    search_fields = ["name", "slug", "owner__name"]


@admin.register(Disclosure)
class DisclosureAdmin(ReadOnly):
    list_display = ["model", "number", "document_sha256", "disclosed_at", "embargo_until"]
    list_select_related = ["model"]
    search_fields = ["model__slug", "document_sha256"]
    inlines = [CitationInline]


@admin.register(AuditEvent)
class AuditEventAdmin(ReadOnly):
    list_display = ["happened_at", "action", "target", "actor", "party"]
    list_select_related = ["actor", "party"]
    search_fields = ["action", "target"]
    date_hierarchy = "happened_at"
