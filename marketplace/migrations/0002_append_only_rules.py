"""What is evidence stays as it was written, whoever asks (DESIGN §3, §7).

Plain SQL: a trigger of PostgreSQL holds for the owner too, and for every session. A table that may only grow refuses
UPDATE, DELETE and TRUNCATE; a version that is frozen keeps its content for ever.
"""

from django.db import migrations

APPEND_ONLY = [
    "marketplace_auditevent",
    "marketplace_attestation",
    "marketplace_offer",
    "marketplace_citation",
    "marketplace_recordcopy",
]

REFUSE = """
CREATE FUNCTION marketplace_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% on % is refused: its rows are append-only', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation';
END $$;
"""

KEEP_VERSION = """
CREATE FUNCTION marketplace_keep_version() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    free text[] := ARRAY['status', 'published_at', 'n_copies'];
BEGIN
    IF TG_OP = 'DELETE' THEN
        IF OLD.status = 'draft' THEN
            RETURN OLD;
        END IF;
        RAISE EXCEPTION 'version % is %: it cannot be deleted', OLD.id, OLD.status
            USING ERRCODE = 'restrict_violation';
    END IF;
    IF OLD.status = 'draft' THEN
        IF NEW.status = 'published' THEN
            RAISE EXCEPTION 'version % must be frozen before it is published', OLD.id
                USING ERRCODE = 'restrict_violation';
        END IF;
        RETURN NEW;
    END IF;
    IF to_jsonb(NEW) - free IS DISTINCT FROM to_jsonb(OLD) - free THEN
        RAISE EXCEPTION 'version % is %: its content cannot change', OLD.id, OLD.status
            USING ERRCODE = 'restrict_violation';
    END IF;
    IF OLD.status = 'frozen' AND NEW.status = 'published' THEN
        RETURN NEW;
    END IF;
    IF to_jsonb(NEW) IS DISTINCT FROM to_jsonb(OLD) THEN
        RAISE EXCEPTION 'version % is %: only its publication can still happen', OLD.id, OLD.status
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER keep_version BEFORE UPDATE OR DELETE ON marketplace_datasetversion
    FOR EACH ROW EXECUTE FUNCTION marketplace_keep_version();
CREATE TRIGGER keep_version_truncate BEFORE TRUNCATE ON marketplace_datasetversion
    FOR EACH STATEMENT EXECUTE FUNCTION marketplace_refuse_change();
"""

DROP_VERSION = """
DROP TRIGGER keep_version_truncate ON marketplace_datasetversion;
DROP TRIGGER keep_version ON marketplace_datasetversion;
DROP FUNCTION marketplace_keep_version();
"""


def append_only(table):
    return migrations.RunSQL(
        f"""
        CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON {table}
            FOR EACH ROW EXECUTE FUNCTION marketplace_refuse_change();
        CREATE TRIGGER append_only_truncate BEFORE TRUNCATE ON {table}
            FOR EACH STATEMENT EXECUTE FUNCTION marketplace_refuse_change();
        """,
        f"DROP TRIGGER append_only_truncate ON {table}; DROP TRIGGER append_only ON {table};",
    )


class Migration(migrations.Migration):
    dependencies = [("marketplace", "0001_initial")]

    operations = [
        migrations.RunSQL(REFUSE, "DROP FUNCTION marketplace_refuse_change();"),
        *(append_only(table) for table in APPEND_ONLY),
        migrations.RunSQL(KEEP_VERSION, DROP_VERSION),
    ]
