"""What a meter's heads prove rests on when they came, so the database keeps the time and lets nothing be changed or slipped in.

Heads of one run ascend; none comes after the run was disclosed; planned runs, heads and commitments get the time of the
statement that wrote them, whatever the application says, and are append-only. Two posts at once, or a post and a disclosure, wait for each other by an
advisory lock: a lock on the row would need a right to change it, which nobody has. Triggers are ENABLE ALWAYS.
"""

from django.db import migrations

FUNCTIONS = """
CREATE FUNCTION attribution_plan_meter() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    NEW.planned_at := statement_timestamp();
    RETURN NEW;
END $$;

CREATE FUNCTION attribution_check_head() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    last bigint;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('attribution.meter'), NEW.run_id::int);
    IF EXISTS (SELECT FROM attribution_metercommitment WHERE run_id = NEW.run_id) THEN
        RAISE EXCEPTION 'head refused: run % was disclosed, and its log is committed', NEW.run_id
            USING ERRCODE = 'restrict_violation';
    END IF;
    SELECT max(entry) INTO last FROM attribution_meterhead WHERE run_id = NEW.run_id;
    IF NEW.entry <= last THEN
        RAISE EXCEPTION 'head refused: run % has one of entry %, and heads ascend', NEW.run_id, last
            USING ERRCODE = 'restrict_violation';
    END IF;
    NEW.posted_at := statement_timestamp();
    RETURN NEW;
END $$;

CREATE FUNCTION attribution_commit_meter() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('attribution.meter'), NEW.run_id::int);
    NEW.committed_at := statement_timestamp();
    RETURN NEW;
END $$;

CREATE TRIGGER planned_now BEFORE INSERT ON attribution_meteredrun
    FOR EACH ROW EXECUTE FUNCTION attribution_plan_meter();
ALTER TABLE attribution_meteredrun ENABLE ALWAYS TRIGGER planned_now;
CREATE TRIGGER heads_ascend BEFORE INSERT ON attribution_meterhead
    FOR EACH ROW EXECUTE FUNCTION attribution_check_head();
ALTER TABLE attribution_meterhead ENABLE ALWAYS TRIGGER heads_ascend;
CREATE TRIGGER committed_now BEFORE INSERT ON attribution_metercommitment
    FOR EACH ROW EXECUTE FUNCTION attribution_commit_meter();
ALTER TABLE attribution_metercommitment ENABLE ALWAYS TRIGGER committed_now;
"""

UNDO_FUNCTIONS = """
DROP TRIGGER committed_now ON attribution_metercommitment;
DROP TRIGGER heads_ascend ON attribution_meterhead;
DROP TRIGGER planned_now ON attribution_meteredrun;
DROP FUNCTION attribution_commit_meter();
DROP FUNCTION attribution_check_head();
DROP FUNCTION attribution_plan_meter();
"""

TABLES = ("attribution_meteredrun", "attribution_meterhead", "attribution_metercommitment")


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
    dependencies = [("attribution", "0004_metered_trainings")]

    operations = [
        migrations.RunSQL(FUNCTIONS, UNDO_FUNCTIONS),
        *[_refuse(table, "append_only", "UPDATE OR DELETE") for table in TABLES],
        *[_refuse(table, "never_truncated", "TRUNCATE") for table in TABLES],
    ]
