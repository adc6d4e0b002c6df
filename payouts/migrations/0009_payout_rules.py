"""No payout leaves a run that is stopped, none is more than was planned for its payee, and none changes what it is about."""

from django.db import migrations

RULES = """
CREATE FUNCTION payouts_check_payout() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    run_state text;
    run_currency text;
    most bigint;
BEGIN
    -- The row is held, so that who pauses or rejects the run waits for what is being intended, or is seen here.
    SELECT state, currency INTO run_state, run_currency FROM payouts_payoutrun WHERE id = NEW.run_id FOR SHARE;
    IF run_state IN ('awaiting_approval', 'paused', 'rejected') THEN
        RAISE EXCEPTION 'payout refused: run % is %', NEW.run_id, run_state USING ERRCODE = 'restrict_violation';
    END IF;
    IF NEW.currency <> run_currency THEN
        RAISE EXCEPTION 'payout refused: run % is in %, not in %', NEW.run_id, run_currency, NEW.currency
            USING ERRCODE = 'check_violation';
    END IF;
    SELECT amount_micros INTO most FROM payouts_plannedpayout WHERE run_id = NEW.run_id AND party_id = NEW.party_id;
    IF NEW.amount_micros > most THEN
        RAISE EXCEPTION 'payout refused: run % plans % for party %, this is %', NEW.run_id, most, NEW.party_id,
            NEW.amount_micros USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION payouts_keep_payout() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF (NEW.run_id, NEW.party_id, NEW.destination, NEW.amount_micros, NEW.currency, NEW.intended_at)
        IS DISTINCT FROM (OLD.run_id, OLD.party_id, OLD.destination, OLD.amount_micros, OLD.currency, OLD.intended_at)
        OR (OLD.transfer_id IS NOT NULL AND NEW.transfer_id IS DISTINCT FROM OLD.transfer_id) THEN
        RAISE EXCEPTION 'payout % keeps what it is about; make another one', OLD.id USING ERRCODE = 'restrict_violation';
    END IF;
    IF NEW.status <> OLD.status AND (OLD.status, NEW.status) NOT IN (
        ('intended', 'sent'), ('intended', 'refused'), ('refused', 'sent'), ('sent', 'paid'),
        ('paid', 'sent')  -- the bank sent it back after all
    ) THEN
        RAISE EXCEPTION 'payout % does not go from % to %', OLD.id, OLD.status, NEW.status
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;

-- What was approved is what was planned: the plan does not grow afterwards.
CREATE FUNCTION payouts_keep_plan() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF to_jsonb(NEW) - 'outcome' IS DISTINCT FROM to_jsonb(OLD) - 'outcome' THEN
        RAISE EXCEPTION 'planned payout % keeps what it is about', OLD.id USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION payouts_check_plan() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF EXISTS (
        SELECT FROM payouts_payoutrun r WHERE r.id IN (SELECT run_id FROM new_plan) AND r.planned_at IS NOT NULL
    ) THEN
        RAISE EXCEPTION 'planned payout refused: its run has been planned' USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NULL;
END $$;

CREATE FUNCTION payouts_keep_run() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF (NEW.key, NEW.currency, NEW.due_until, NEW.started_by_id)
        IS DISTINCT FROM (OLD.key, OLD.currency, OLD.due_until, OLD.started_by_id)
        OR (OLD.planned_at IS NOT NULL AND (NEW.planned_at, NEW.n_planned, NEW.planned_micros)
            IS DISTINCT FROM (OLD.planned_at, OLD.n_planned, OLD.planned_micros))
        OR (OLD.approved_at IS NOT NULL AND (NEW.approved_at, NEW.approved_by_id)
            IS DISTINCT FROM (OLD.approved_at, OLD.approved_by_id)) THEN
        RAISE EXCEPTION 'payout run % keeps what it is about', OLD.id USING ERRCODE = 'restrict_violation';
    END IF;
    IF OLD.state = 'rejected' AND NEW.state <> 'rejected'
        OR OLD.state = 'awaiting_approval' AND NEW.state NOT IN ('awaiting_approval', 'rejected')
            AND NEW.approved_at IS NULL THEN
        RAISE EXCEPTION 'payout run % does not go from % to %', OLD.id, OLD.state, NEW.state
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER payout_within_its_run BEFORE INSERT ON payouts_payout
    FOR EACH ROW EXECUTE FUNCTION payouts_check_payout();
CREATE TRIGGER keep_payout BEFORE UPDATE ON payouts_payout FOR EACH ROW EXECUTE FUNCTION payouts_keep_payout();
CREATE TRIGGER keep_plan BEFORE UPDATE ON payouts_plannedpayout FOR EACH ROW EXECUTE FUNCTION payouts_keep_plan();
CREATE TRIGGER plan_before_it_is_made AFTER INSERT ON payouts_plannedpayout
    REFERENCING NEW TABLE AS new_plan FOR EACH STATEMENT EXECUTE FUNCTION payouts_check_plan();
CREATE TRIGGER keep_run
    BEFORE UPDATE OF key, currency, due_until, started_by_id, planned_at, n_planned, planned_micros, approved_at,
        approved_by_id, state
    ON payouts_payoutrun FOR EACH ROW EXECUTE FUNCTION payouts_keep_run();
ALTER TABLE payouts_payout ENABLE ALWAYS TRIGGER payout_within_its_run;
ALTER TABLE payouts_payout ENABLE ALWAYS TRIGGER keep_payout;
ALTER TABLE payouts_plannedpayout ENABLE ALWAYS TRIGGER keep_plan;
ALTER TABLE payouts_plannedpayout ENABLE ALWAYS TRIGGER plan_before_it_is_made;
ALTER TABLE payouts_payoutrun ENABLE ALWAYS TRIGGER keep_run;
"""

UNDO_RULES = """
DROP TRIGGER keep_run ON payouts_payoutrun;
DROP TRIGGER plan_before_it_is_made ON payouts_plannedpayout;
DROP TRIGGER keep_plan ON payouts_plannedpayout;
DROP TRIGGER keep_payout ON payouts_payout;
DROP TRIGGER payout_within_its_run ON payouts_payout;
DROP FUNCTION payouts_keep_run();
DROP FUNCTION payouts_check_plan();
DROP FUNCTION payouts_keep_plan();
DROP FUNCTION payouts_keep_payout();
DROP FUNCTION payouts_check_payout();
"""

NEVER_DELETED = ("payouts_payoutrun", "payouts_payout", "payouts_plannedpayout", "payouts_payoutshard")


def _refused(table):
    return migrations.RunSQL(
        f"""
CREATE TRIGGER append_only BEFORE DELETE ON {table} FOR EACH ROW EXECUTE FUNCTION payouts_refuse_change();
CREATE TRIGGER never_truncated BEFORE TRUNCATE ON {table}
    FOR EACH STATEMENT EXECUTE FUNCTION payouts_refuse_change();
ALTER TABLE {table} ENABLE ALWAYS TRIGGER append_only;
ALTER TABLE {table} ENABLE ALWAYS TRIGGER never_truncated;
""",
        f"DROP TRIGGER never_truncated ON {table}; DROP TRIGGER append_only ON {table};",
    )


class Migration(migrations.Migration):
    dependencies = [("payouts", "0008_payout_runs")]

    operations = [migrations.RunSQL(RULES, UNDO_RULES), *(_refused(table) for table in NEVER_DELETED)]
