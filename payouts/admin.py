"""Money can be looked at here and changed nowhere: what moves it are services, and what they wrote stays."""

from typing import Any

from django.contrib import admin
from django.http import HttpRequest

from payouts.models import (
    Account,
    BalanceSnapshot,
    Clawback,
    ClawbackLine,
    ClosedPeriod,
    Dispute,
    Division,
    DivisionLine,
    IssuedStatement,
    JournalEntry,
    ManualEntry,
    Movement,
    PayeeAccount,
    Payment,
    Payout,
    PayoutRun,
    Posting,
    RailConfirmation,
    RailPayout,
    ReconciliationRun,
    Refund,
    RoyaltyInvoice,
    RoyaltyInvoiceLine,
    RoyaltyPool,
    RoyaltyReport,
    StatementRun,
    StripeEvent,
    TransferReversal,
    WriteOff,
)


class ReadOnly:
    def has_add_permission(self, request: HttpRequest, *args: Any) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, *args: Any) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, *args: Any) -> bool:
        return False


class PostingInline(ReadOnly, admin.TabularInline):
    model = Posting
    fields = ["leg", "account", "amount_micros"]
    extra = 0


class DivisionLineInline(ReadOnly, admin.TabularInline):
    model = DivisionLine
    fields = ["party", "role", "n_records", "weight", "amount_micros", "due_at"]
    extra = 0


class InvoiceLineInline(ReadOnly, admin.TabularInline):
    model = RoyaltyInvoiceLine
    fields = ["version", "license", "result", "share_ppq", "rate_bps", "amount_micros", "is_capped"]
    extra = 0


@admin.register(Account)
class AccountAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["code", "kind", "currency", "party"]
    list_filter = ["kind", "currency"]
    list_select_related = ["party"]
    search_fields = ["code"]


@admin.register(BalanceSnapshot)
class BalanceSnapshotAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["account", "up_to", "balance_micros", "taken_at"]
    list_select_related = ["account"]


@admin.register(JournalEntry)
class JournalEntryAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["key", "kind", "currency", "n_legs", "booked_at"]
    list_filter = ["kind", "currency"]
    search_fields = ["key"]
    inlines = [PostingInline]


@admin.register(Division)
class DivisionAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["key", "source", "version", "result", "amount", "divided_at"]
    list_filter = ["source", "currency"]
    list_select_related = ["version__dataset", "result__model"]
    search_fields = ["key"]
    inlines = [DivisionLineInline]


@admin.register(RoyaltyPool)
class RoyaltyPoolAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["pk", "version", "amount", "deadline", "released_at"]
    list_filter = ["currency"]
    list_select_related = ["version__dataset"]


@admin.register(RoyaltyReport)
class RoyaltyReportAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["model", "licensee", "period_start", "period_end", "revenue", "reported_at"]
    list_select_related = ["model", "licensee"]


@admin.register(RoyaltyInvoice)
class RoyaltyInvoiceAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["pk", "status", "total", "issued_at", "paid_at"]
    list_filter = ["status", "currency"]
    inlines = [InvoiceLineInline]


@admin.register(Payment)
class PaymentAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["pk", "status", "amount", "charge_id", "paid_at", "available_on", "settled_at"]
    list_filter = ["status", "currency"]
    search_fields = ["checkout_id", "charge_id", "balance_transaction_id"]


@admin.register(PayeeAccount)
class PayeeAccountAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["party", "stripe_account_id", "transfers_active", "payouts_enabled", "updated_at"]
    list_select_related = ["party"]


@admin.register(PayoutRun)
class PayoutRunAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["key", "state", "status", "n_planned", "due_until", "planned_at", "error_message"]
    list_filter = ["state", "status", "currency"]


@admin.register(Payout)
class PayoutAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["pk", "party", "amount", "status", "transfer_id", "refusal_code", "intended_at"]
    list_filter = ["status", "currency"]
    list_select_related = ["party"]
    search_fields = ["transfer_id", "bank_payout_id"]


@admin.register(StripeEvent)
class StripeEventAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["event_id", "endpoint", "type", "account", "status", "attempt", "error_message", "received_at"]
    list_filter = ["status", "endpoint", "type"]
    search_fields = ["event_id", "account"]


@admin.register(Refund)
class RefundAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["pk", "payment", "amount", "reason", "state", "refund_id", "refusal_code", "intended_at"]
    list_filter = ["state", "reason", "currency"]
    list_select_related = ["payment"]
    search_fields = ["refund_id"]


@admin.register(Dispute)
class DisputeAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["pk", "payment", "amount", "reason", "status", "evidence_due_at", "closed_at"]
    list_filter = ["status", "reason", "currency"]
    list_select_related = ["payment"]
    search_fields = ["dispute_id"]


class ClawbackLineInline(ReadOnly, admin.TabularInline):
    model = ClawbackLine
    fields = ["order_line", "invoice_line", "amount_micros", "fee_micros", "pool_micros"]
    extra = 0


@admin.register(Clawback)
class ClawbackAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["key", "kind", "payment", "amount_micros", "loss_micros", "currency", "taken_at"]
    list_filter = ["kind", "currency"]
    list_select_related = ["payment"]
    search_fields = ["key"]
    inlines = [ClawbackLineInline]


@admin.register(TransferReversal)
class TransferReversalAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["pk", "payout", "amount", "state", "reversal_id", "refusal_code", "intended_at"]
    list_filter = ["state", "currency"]
    list_select_related = ["payout__party"]


@admin.register(WriteOff)
class WriteOffAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["pk", "party", "amount_micros", "currency", "reason", "decided_by", "decided_at"]
    list_select_related = ["party", "decided_by"]


@admin.register(Movement)
class MovementAdmin(ReadOnly, admin.ModelAdmin):
    list_display = [
        "balance_transaction_id",
        "kind",
        "amount_micros",
        "fee_micros",
        "currency",
        "booked_at",
        "settled_at",
    ]
    list_filter = ["kind", "currency"]
    search_fields = ["balance_transaction_id"]


@admin.register(ClosedPeriod)
class ClosedPeriodAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["starts_on", "ends_at", "closed_by", "closed_at", "note"]
    list_select_related = ["closed_by"]


@admin.register(ManualEntry)
class ManualEntryAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["pk", "currency", "booked_at", "state", "reason", "proposed_by", "proposed_at"]
    list_select_related = ["proposed_by", "decision"]


@admin.register(IssuedStatement)
class IssuedStatementAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["number", "party", "period", "n_lines", "csv_sha256", "issued_at"]
    list_select_related = ["party", "period"]
    search_fields = ["number", "party__name"]


@admin.register(ReconciliationRun)
class ReconciliationRunAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["pk", "key", "status", "n_transactions", "n_differences", "error_message", "requested_at"]
    list_filter = ["status"]


@admin.register(StatementRun)
class StatementRunAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["period", "status", "attempt", "progress_done", "progress_total", "error_message"]
    list_select_related = ["period"]


@admin.register(RailConfirmation)
class RailConfirmationAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["pk", "payout", "outcome", "reference", "status", "recorded_by", "decided_by"]
    list_filter = ["status", "outcome"]
    list_select_related = ["payout__party", "recorded_by", "decided_by"]


@admin.register(RailPayout)
class RailPayoutAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["pk", "export", "party", "amount", "status", "reference", "confirmed_by"]
    list_filter = ["status", "currency"]
    list_select_related = ["export", "party", "confirmed_by"]
