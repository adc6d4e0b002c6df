"""Is the process alive, and can it do its work: two questions for whoever starts, watches and routes to it."""

from collections.abc import Callable
from datetime import timedelta

import redis
from django.conf import settings
from django.db import DatabaseError, connection
from django.db.migrations.executor import MigrationExecutor
from django.http import HttpRequest, JsonResponse
from django.utils import timezone
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from payouts.models import BalanceCheck, JournalEntry, ReconciliationRun
from payouts.services.proving import latest_proof

TIMEOUT_SECONDS = 2
CHECKS_AT_LEAST_EVERY = timedelta(hours=1)
LOOKS_AT_LEAST_EVERY = timedelta(days=1)
PROOFS_AT_LEAST_EVERY = timedelta(days=2)  # one each night, which may take hours


@require_safe
@never_cache
def healthz(request: HttpRequest) -> JsonResponse:
    """The process answers; nothing else is asked, so that a database that is away restarts nobody."""
    return JsonResponse({"status": "ok"})


@require_safe
@never_cache
def readyz(request: HttpRequest) -> JsonResponse:
    """PostgreSQL, its migrations and Redis are there; otherwise 503 and what is missing, without addresses."""
    checks: dict[str, Callable[[], str]] = {"postgresql": _postgresql, "migrations": _migrations, "redis": _redis}
    missing = {name: problem for name, check in checks.items() if (problem := check())}
    if missing:
        return JsonResponse({"status": "not ready", "missing": missing}, status=503)
    return JsonResponse({"status": "ready", "checked": list(checks)})


@require_safe
@never_cache
def booksz(request: HttpRequest) -> JsonResponse:
    """Kept balances equal their postings, the ledger agrees with Stripe, and every invariant was proved from the rows: 503 where the
    latest of them says otherwise, or is old.

    For whoever watches, not for whoever routes: wrong books are no reason to stop serving. New books need none of them yet.
    """
    wall = timezone.now()
    wrong = {}
    first = JournalEntry.objects.order_by("pk").first()
    age = wall - first.created_at if first is not None else timedelta(0)
    check = BalanceCheck.objects.first()
    if check is not None and check.n_wrong:
        wrong["balances"] = f"{check.n_wrong} differ from their postings"
    elif check is not None and check.checked_at < wall - CHECKS_AT_LEAST_EVERY:
        wrong["balances"] = f"last looked at {check.checked_at:%Y-%m-%d %H:%M}"
    elif check is None and age > CHECKS_AT_LEAST_EVERY:
        wrong["balances"] = "never looked at"
    looks = ReconciliationRun.objects.filter(n_differences__isnull=False)
    look, full = looks.first(), looks.filter(is_full=True).first()
    if look is not None and look.n_differences:
        wrong["reconciliation"] = f"{look.n_differences} differences"
    elif full is not None and full.n_differences:
        wrong["reconciliation"] = f"{full.n_differences} differences at the latest full look"
    elif look is None and age > LOOKS_AT_LEAST_EVERY:
        wrong["reconciliation"] = "never looked at"
    elif look is not None and look.finished_at is not None and look.finished_at < wall - LOOKS_AT_LEAST_EVERY:
        wrong["reconciliation"] = f"last looked at {look.finished_at:%Y-%m-%d %H:%M}"
    proof = latest_proof()
    if proof is not None and proof.n_findings:
        wrong["proof"] = f"{proof.n_findings} findings"
    elif proof is not None and proof.finished_at is not None and proof.finished_at < wall - PROOFS_AT_LEAST_EVERY:
        wrong["proof"] = f"last proved {proof.finished_at:%Y-%m-%d %H:%M}"
    elif proof is None and age > PROOFS_AT_LEAST_EVERY:
        wrong["proof"] = "never proved"
    if wrong:
        return JsonResponse({"status": "look", "wrong": wrong}, status=503)
    return JsonResponse({"status": "ok", "checked": ["balances", "reconciliation", "proof"]})


def _postgresql() -> str:
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
    except DatabaseError as error:
        return f"does not answer ({type(error).__name__})"
    return ""


def _migrations() -> str:
    try:
        executor = MigrationExecutor(connection)
        pending = executor.migration_plan(executor.loader.graph.leaf_nodes())
    except DatabaseError as error:
        return f"unknown ({type(error).__name__})"
    return f"not applied: {', '.join(str(migration) for migration, _ in pending)}" if pending else ""


def _redis() -> str:
    client = redis.Redis.from_url(
        settings.REDIS_URL, socket_timeout=TIMEOUT_SECONDS, socket_connect_timeout=TIMEOUT_SECONDS
    )
    try:
        client.ping()
    except redis.RedisError as error:
        return f"does not answer ({type(error).__name__})"
    finally:
        client.close()
    return ""
