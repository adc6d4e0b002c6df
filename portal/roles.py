"""The three database roles (DESIGN §2): owner migrates, app serves and pays, worker parses and measures.

`residual_app` may only SELECT and INSERT where rows are evidence; `residual_worker` has no money table at all, no key, no
session and no password. The roles are made by whoever owns the server (`create_roles`, or the same SQL by hand in
production); what they may do is granted again after every migration.
"""

from typing import Any

import psycopg
from django.apps import apps
from django.db import connections
from psycopg import sql

OWNER, APP, WORKER = "residual_owner", "residual_app", "residual_worker"

#: Evidence: never changed, never deleted, whoever asks (triggers say the same to the owner).
APPEND_ONLY = frozenset(
    {
        "marketplace_auditevent",
        "marketplace_attestation",
        "marketplace_offer",
        "marketplace_citation",
        "marketplace_recordcopy",
        "marketplace_recordfingerprint",
        "marketplace_staffact",
        "attribution_artifact",
        "attribution_share",
        "attribution_meteredrun",
        "attribution_meterhead",
        "attribution_metercommitment",
        "payouts_account",
        "payouts_journalentry",
        "payouts_posting",
        "payouts_balancesnapshot",
        "payouts_payeecount",
        "payouts_division",
        "payouts_divisionline",
        "payouts_royaltyreport",
        "payouts_royaltyinvoiceline",
        "payouts_clawback",
        "payouts_clawbackundo",
        "payouts_clawbackline",
        "payouts_reclaim",
        "payouts_writeoff",
        "payouts_receiptuse",
        "payouts_bankdetails",
        "payouts_bankdetailserasure",
        "payouts_document",
        "payouts_correctionline",
        "payouts_closedperiod",
        "payouts_closedbalance",
        "payouts_manualentry",
        "payouts_manualleg",
        "payouts_manualdecision",
        "payouts_balancecheck",
        "payouts_issuedstatement",
        "payouts_statementbalance",
        "payouts_statementtotal",
        "payouts_reconciliationdifference",
        "payouts_prooffinding",
        "payouts_servedcountries",
    }
)
#: What only the owner of the tables writes, when it migrates.
READ_ONLY = frozenset({"django_migrations", "payouts_approvallimit"})
#: Rows that change state and are never deleted by the app: a missing payout would be paid again.
NEVER_DELETED = (
    "payouts_",
    "marketplace_contribution",
    "marketplace_order",
    "marketplace_license",
    "marketplace_disclosure",
    "marketplace_mailoptout",
    "marketplace_staff",
    "attribution_",
)
#: What ingest and attribution write.
WORKER_WRITES = frozenset(
    {
        "marketplace_party",
        "marketplace_dataset",
        "marketplace_datasetversion",
        "marketplace_upload",
        "marketplace_contribution",
        "marketplace_recordfingerprint",
        "attribution_artifact",
        "attribution_verification",
        "attribution_segmentreplay",
        "attribution_attributionrun",
        "attribution_shard",
        "attribution_attributionresult",
        "attribution_share",
        "attribution_influenceindex",
        "attribution_indexshard",
        "attribution_influencequestion",
    }
)
#: What they only read.
WORKER_READS = frozenset(
    {
        "marketplace_clockoffset",
        "marketplace_attestation",
        "marketplace_recordcopy",
        "marketplace_trainedmodel",
        "marketplace_disclosure",
        "marketplace_citation",
        "marketplace_license",
        "marketplace_offer",
        "marketplace_order",
        "marketplace_orderline",
        "attribution_meteredrun",
        "attribution_meterhead",
        "attribution_metercommitment",
        "django_content_type",
        "django_migrations",
    }
)


def create_roles(connection: psycopg.Connection, *, passwords: dict[str, str] | None = None) -> None:
    """Make the roles that are missing; needs the right to create roles."""
    for role in (OWNER, APP, WORKER):
        known = connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [role]).fetchone()
        if not known:
            connection.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
        if passwords:
            connection.execute(
                sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(role), sql.Literal(passwords[role]))
            )


def grant_after_migrate(sender: Any, using: str, **kwargs: Any) -> None:
    """Grant each role exactly what it needs on every table of the project; a role that does not exist is skipped."""
    connection = connections[using]
    with connection.cursor() as cursor:
        cursor.execute("SELECT rolname FROM pg_roles WHERE rolname = ANY(%s)", [[APP, WORKER]])
        roles = [name for (name,) in cursor.fetchall()]
        database = connection.settings_dict["NAME"]
        tables = sorted(set(connection.introspection.table_names(cursor)) & _project_tables())
        for role in roles:
            cursor.execute(f'GRANT TEMPORARY ON DATABASE "{database}" TO "{role}"')  # copies are matched in one
            cursor.execute(f'GRANT USAGE ON SCHEMA public TO "{role}"')
            for table in tables:
                cursor.execute(f'REVOKE ALL ON TABLE "{table}" FROM "{role}"')
                if rights := _rights(role, table):
                    cursor.execute(f'GRANT {rights} ON TABLE "{table}" TO "{role}"')
            cursor.execute(f'GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO "{role}"')  # nextval only; tells nothing


def _project_tables() -> set[str]:
    models = apps.get_models(include_auto_created=True)
    return {model._meta.db_table for model in models} | {"django_migrations"}


def _rights(role: str, table: str) -> str:
    if role == APP:
        if table in READ_ONLY:
            return "SELECT"
        if table in APPEND_ONLY:
            return "SELECT, INSERT"
        return "SELECT, INSERT, UPDATE" if table.startswith(NEVER_DELETED) else "SELECT, INSERT, UPDATE, DELETE"
    if table in WORKER_WRITES:
        return "SELECT, INSERT" if table in APPEND_ONLY else "SELECT, INSERT, UPDATE"
    return "SELECT" if table in WORKER_READS else ""
