"""What is evidence stays as it was written, whoever asks (DESIGN §3, §7).

Plain SQL: a trigger of PostgreSQL holds for the owner too, and for every session. A table that may only grow refuses
UPDATE, DELETE and TRUNCATE; a version that is frozen keeps its content for ever, and who gave what to it: whoever could
change a contribution or a fingerprint afterwards could redirect its money. A disclosure keeps its document.
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

KEEP_RECORDS = """
CREATE FUNCTION marketplace_keep_records() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    version_id bigint := CASE TG_OP WHEN 'INSERT' THEN NEW.version_id ELSE OLD.version_id END;
    state text := (SELECT status FROM marketplace_datasetversion WHERE id = version_id);
BEGIN
    IF state = 'draft' AND (TG_OP <> 'UPDATE' OR NEW.version_id = version_id) THEN
        RETURN CASE TG_OP WHEN 'DELETE' THEN OLD ELSE NEW END;
    END IF;
    -- Publication settles the copies, and writes how many each contribution has.
    IF TG_OP = 'UPDATE' AND state = 'frozen' AND to_jsonb(NEW) - 'n_copies' = to_jsonb(OLD) - 'n_copies' THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION '% on % is refused: version % is %', TG_OP, TG_TABLE_NAME, version_id, state
        USING ERRCODE = 'restrict_violation';
END $$;
CREATE FUNCTION marketplace_refuse_late_records() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    late bigint := (
        SELECT v.id FROM (SELECT DISTINCT version_id FROM added) a
        JOIN marketplace_datasetversion v ON v.id = a.version_id
        WHERE v.status <> 'draft' LIMIT 1
    );
BEGIN
    IF late IS NOT NULL THEN
        RAISE EXCEPTION 'INSERT on % is refused: version % is frozen', TG_TABLE_NAME, late
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER keep_contribution BEFORE INSERT OR UPDATE OR DELETE ON marketplace_contribution
    FOR EACH ROW EXECUTE FUNCTION marketplace_keep_records();
CREATE TRIGGER keep_contribution_truncate BEFORE TRUNCATE ON marketplace_contribution
    FOR EACH STATEMENT EXECUTE FUNCTION marketplace_refuse_change();
CREATE TRIGGER keep_fingerprint BEFORE UPDATE OR DELETE ON marketplace_recordfingerprint
    FOR EACH ROW EXECUTE FUNCTION marketplace_keep_records();
CREATE TRIGGER keep_fingerprint_insert AFTER INSERT ON marketplace_recordfingerprint
    REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION marketplace_refuse_late_records();
CREATE TRIGGER keep_fingerprint_truncate BEFORE TRUNCATE ON marketplace_recordfingerprint
    FOR EACH STATEMENT EXECUTE FUNCTION marketplace_refuse_change();
"""

DROP_RECORDS = """
DROP TRIGGER keep_fingerprint_truncate ON marketplace_recordfingerprint;
DROP TRIGGER keep_fingerprint_insert ON marketplace_recordfingerprint;
DROP TRIGGER keep_fingerprint ON marketplace_recordfingerprint;
DROP TRIGGER keep_contribution_truncate ON marketplace_contribution;
DROP TRIGGER keep_contribution ON marketplace_contribution;
DROP FUNCTION marketplace_refuse_late_records();
DROP FUNCTION marketplace_keep_records();
"""

KEEP_DISCLOSURE = """
CREATE FUNCTION marketplace_keep_disclosure() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND to_jsonb(NEW) - 'embargo_until' = to_jsonb(OLD) - 'embargo_until' THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION '% on disclosure % is refused: it was published as it stands; publish another', TG_OP, OLD.id
        USING ERRCODE = 'restrict_violation';
END $$;
CREATE TRIGGER keep_disclosure BEFORE UPDATE OR DELETE ON marketplace_disclosure
    FOR EACH ROW EXECUTE FUNCTION marketplace_keep_disclosure();
CREATE TRIGGER keep_disclosure_truncate BEFORE TRUNCATE ON marketplace_disclosure
    FOR EACH STATEMENT EXECUTE FUNCTION marketplace_refuse_change();
"""

DROP_DISCLOSURE = """
DROP TRIGGER keep_disclosure_truncate ON marketplace_disclosure;
DROP TRIGGER keep_disclosure ON marketplace_disclosure;
DROP FUNCTION marketplace_keep_disclosure();
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
        migrations.RunSQL(KEEP_RECORDS, DROP_RECORDS),
        migrations.RunSQL(KEEP_DISCLOSURE, DROP_DISCLOSURE),
    ]
