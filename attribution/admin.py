"""For staff, to look things up: evidence, jobs and results come to be and change only through services."""

from django.contrib import admin

from attribution.models import (
    Artifact,
    AttributionResult,
    AttributionRun,
    IndexShard,
    InfluenceIndex,
    InfluenceQuestion,
    MeteredRun,
    MeterHead,
    SegmentReplay,
    Shard,
    Share,
    Verification,
)
from marketplace.admin import JobAdmin, ReadOnly, ReadOnlyInline

JOB = ["status", "attempt", "queued_at", "finished_at", "error_code"]


class ShardInline(ReadOnlyInline):
    model = Shard
    fields = ["number", *JOB]


class SegmentInline(ReadOnlyInline):
    model = SegmentReplay
    fields = ["number", "first_step", "last_step", "matches", *JOB]


class ShareInline(ReadOnlyInline):
    model = Share
    fields = ["version", "party", "partition", "n_records", "count_ppq", "paid_ppq", "raw", "low", "high"]


@admin.register(Artifact)
class ArtifactAdmin(ReadOnly):
    list_display = ["sha256", "kind", "owner", "size_bytes", "registered_at"]
    list_filter = ["kind"]
    list_select_related = ["owner"]
    search_fields = ["sha256"]


@admin.register(Verification)
class VerificationAdmin(JobAdmin):
    list_display = ["disclosure", "verdict", *JOB]
    list_filter = ["status", "verdict"]
    list_select_related = ["disclosure__model"]
    inlines = [SegmentInline]


@admin.register(SegmentReplay)
class SegmentReplayAdmin(JobAdmin):
    list_display = ["verification", "number", "first_step", "last_step", "matches", *JOB]
    list_filter = ["status", "matches"]
    list_select_related = ["verification__disclosure__model"]


@admin.register(MeteredRun)
class MeteredRunAdmin(ReadOnly):
    list_display = ["slug", "owner", "queries_sha256", "planned_at"]
    list_select_related = ["owner"]
    search_fields = ["slug"]


@admin.register(MeterHead)
class MeterHeadAdmin(ReadOnly):
    list_display = ["run", "entry", "step", "head", "posted_at"]
    list_select_related = ["run"]


@admin.register(AttributionRun)
class AttributionRunAdmin(JobAdmin):
    list_display = ["public_id", "disclosure", "grade", "budget", *JOB]
    list_filter = ["status", "grade"]
    list_select_related = ["disclosure__model"]
    inlines = [ShardInline]


@admin.register(Shard)
class ShardAdmin(JobAdmin):
    list_display = ["run", "number", *JOB]
    list_filter = ["status"]
    list_select_related = ["run__disclosure__model"]


class IndexShardInline(ReadOnlyInline):
    model = IndexShard
    fields = ["number", *JOB]


@admin.register(InfluenceIndex)
class InfluenceIndexAdmin(JobAdmin):
    list_display = ["disclosure", "n_records", *JOB]
    list_filter = ["status"]
    list_select_related = ["disclosure__model"]
    inlines = [IndexShardInline]


@admin.register(IndexShard)
class IndexShardAdmin(JobAdmin):
    list_display = ["index", "number", *JOB]
    list_filter = ["status"]
    list_select_related = ["index__disclosure__model"]


@admin.register(InfluenceQuestion)
class InfluenceQuestionAdmin(JobAdmin):
    list_display = ["public_id", "index", "query", *JOB]
    list_filter = ["status"]
    list_select_related = ["index__disclosure__model"]


@admin.register(AttributionResult)
class AttributionResultAdmin(ReadOnly):
    list_display = ["model", "number", "grade", "paid_by", "reliability", "status", "published_at"]
    list_filter = ["grade", "paid_by", "status"]
    list_select_related = ["model"]
    inlines = [ShareInline]
