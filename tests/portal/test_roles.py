"""The three database roles hold exactly what DESIGN §2 gives them."""

from typing import Any

import pytest
from django.db import connection

from portal.roles import APP, APPEND_ONLY, NEVER_DELETED, WORKER


def _may(role: str, table: str, right: str) -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT has_table_privilege(%s, %s, %s)", [role, table, right])
        return bool(cursor.fetchone()[0])


@pytest.fixture
def tables(db: Any) -> set[str]:
    with connection.cursor() as cursor:
        return set(connection.introspection.table_names(cursor))


def test_worker_has_no_right_on_any_table_of_money_keys_sessions_or_people(tables: set[str]) -> None:
    secret = {t for t in tables if t.startswith(("payouts_", "account_", "django_session"))}
    secret |= {"marketplace_apikey", "marketplace_user", "marketplace_invitation", "marketplace_membership"}

    rights = {(t, r) for t in secret for r in ("SELECT", "INSERT", "UPDATE", "DELETE") if _may(WORKER, t, r)}

    assert rights == set()
    assert len(secret) > 12


def test_nobody_but_the_owner_may_truncate_and_evidence_is_only_ever_added(tables: set[str]) -> None:
    assert {t for t in tables for role in (APP, WORKER) if _may(role, t, "TRUNCATE")} == set()
    assert tables >= APPEND_ONLY
    changed = {
        (t, role) for t in APPEND_ONLY for role in (APP, WORKER) for r in ("UPDATE", "DELETE") if _may(role, t, r)
    }
    assert changed == set()
    assert all(_may(APP, t, "INSERT") for t in APPEND_ONLY)


def test_the_app_deletes_no_row_of_money_or_evidence(tables: set[str]) -> None:
    kept = {t for t in tables if t.startswith(NEVER_DELETED)}

    assert {t for t in kept for role in (APP, WORKER) if _may(role, t, "DELETE")} == set()
    assert {
        "payouts_payout",
        "payouts_payment",
        "payouts_stripeevent",
        "marketplace_order",
        "marketplace_license",
    } <= kept
