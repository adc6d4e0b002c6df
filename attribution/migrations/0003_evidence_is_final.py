"""Evidence is final, whoever asks: artifacts and shares are append-only, a published result never changes.

A result is made as a draft, given its shares, and published by one update, which the database checks: each partition's
paid shares sum to 10^15. Triggers are ENABLE ALWAYS, so that no session's settings switch them off.
"""

from django.db import migrations

FUNCTIONS = """
CREATE FUNCTION attribution_refuse_change() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    RAISE EXCEPTION '% of % is refused: it is evidence and stays as it was written', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation';
END $$;

CREATE FUNCTION attribution_check_share() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    found text;
BEGIN
    -- The lock makes a publication wait for this insert's transaction, or this insert see the publication.
    SELECT status INTO found FROM attribution_attributionresult WHERE id = NEW.result_id FOR SHARE;
    IF found IS DISTINCT FROM 'draft' THEN
        RAISE EXCEPTION 'share refused: result % is %', NEW.result_id, coalesce(found, 'missing')
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION attribution_check_result() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    part text;
    paid numeric;
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NEW.status <> 'draft' THEN
            RAISE EXCEPTION 'result refused: it starts as a draft and is published with its shares'
                USING ERRCODE = 'restrict_violation';
        END IF;
        RETURN NEW;
    END IF;
    IF OLD.status = 'published' THEN
        RAISE EXCEPTION '% of result % is refused: it is published', TG_OP, OLD.id USING ERRCODE = 'restrict_violation';
    END IF;
    IF TG_OP = 'DELETE' THEN
        RETURN OLD;
    END IF;
    IF NEW.status = 'published' THEN
        FOREACH part IN ARRAY ARRAY['rights_holder', 'labeller'] LOOP
            SELECT coalesce(sum(paid_ppq), 0) INTO paid FROM attribution_share
                WHERE result_id = NEW.id AND partition = part;
            IF paid <> 1000000000000000 THEN
                RAISE EXCEPTION 'result % refused: its % shares sum to % ppq', NEW.id, part, paid
                    USING ERRCODE = 'check_violation';
            END IF;
        END LOOP;
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER result_is_final BEFORE INSERT OR UPDATE OR DELETE ON attribution_attributionresult
    FOR EACH ROW EXECUTE FUNCTION attribution_check_result();
ALTER TABLE attribution_attributionresult ENABLE ALWAYS TRIGGER result_is_final;
CREATE TRIGGER share_joins_a_draft BEFORE INSERT ON attribution_share
    FOR EACH ROW EXECUTE FUNCTION attribution_check_share();
ALTER TABLE attribution_share ENABLE ALWAYS TRIGGER share_joins_a_draft;
"""

UNDO_FUNCTIONS = """
DROP TRIGGER share_joins_a_draft ON attribution_share;
DROP TRIGGER result_is_final ON attribution_attributionresult;
DROP FUNCTION attribution_check_result();
DROP FUNCTION attribution_check_share();
DROP FUNCTION attribution_refuse_change();
"""


def _refuse(table, name, when):
    return migrations.RunSQL(
        f"""
CREATE TRIGGER {name} BEFORE {when} ON {table}
    FOR EACH {"STATEMENT" if when == "TRUNCATE" else "ROW"} EXECUTE FUNCTION attribution_refuse_change();
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {name};
""",
        f"DROP TRIGGER {name} ON {table};",
    )


class Migration(migrations.Migration):
    dependencies = [("attribution", "0002_relations")]

    operations = [
        migrations.RunSQL(FUNCTIONS, UNDO_FUNCTIONS),
        _refuse("attribution_artifact", "append_only", "UPDATE OR DELETE"),
        _refuse("attribution_share", "append_only", "UPDATE OR DELETE"),
        _refuse("attribution_artifact", "never_truncated", "TRUNCATE"),
        _refuse("attribution_share", "never_truncated", "TRUNCATE"),
        _refuse("attribution_attributionresult", "never_truncated", "TRUNCATE"),
    ]
