"""What the ledger must never hold is refused by PostgreSQL itself, whoever asks.

Every trigger is ENABLE ALWAYS, so that no session's `session_replication_role` switches it off, and every function pins
its search path with `pg_temp` last, so that no temporary table stands in for a ledger table.
"""

from django.db import migrations

FUNCTIONS = """
CREATE FUNCTION payouts_refuse_change() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    RAISE EXCEPTION '% of % is refused: it is append-only, a correction is a new row', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation';
END $$;

CREATE FUNCTION payouts_stamp_entry() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    NEW.txid := pg_current_xact_id();  -- the top-level transaction's, also inside a savepoint; never the client's word
    -- Whoever takes a snapshot of balances holds this lock alone: then no posting with a lower id is still to be committed.
    PERFORM pg_advisory_xact_lock_shared(1818584935);
    RETURN NEW;
END $$;

CREATE FUNCTION payouts_check_leg() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    made_in xid8;
    legs integer;
BEGIN
    SELECT txid, n_legs INTO made_in, legs FROM payouts_journalentry WHERE id = NEW.entry_id;
    IF made_in IS DISTINCT FROM pg_current_xact_id() THEN
        RAISE EXCEPTION 'posting refused: entry % was not made in this transaction', NEW.entry_id
            USING ERRCODE = 'restrict_violation';
    END IF;
    IF NEW.leg >= legs THEN
        RAISE EXCEPTION 'posting refused: entry % declares % legs, this would be number %', NEW.entry_id, legs, NEW.leg
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;

-- At commit, once per entry and linear in its legs. Whoever has it checked sooner gains nothing: an entry that passes has
-- every leg from 0 to n_legs - 1, each number once, so no further one can join.
CREATE FUNCTION payouts_check_entry() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    legs bigint;
    total numeric;
    foreign_legs bigint;
BEGIN
    SELECT count(*), coalesce(sum(p.amount_micros), 0), count(*) FILTER (WHERE a.currency <> NEW.currency)
        INTO legs, total, foreign_legs
        FROM payouts_posting p JOIN payouts_account a ON a.id = p.account_id
        WHERE p.entry_id = NEW.id;
    IF legs <> NEW.n_legs OR legs < 2 THEN
        RAISE EXCEPTION 'entry % refused: it declares % legs and has %', NEW.key, NEW.n_legs, legs
            USING ERRCODE = 'check_violation';
    END IF;
    IF total <> 0 THEN
        RAISE EXCEPTION 'entry % refused: its legs sum to %, not 0', NEW.key, total USING ERRCODE = 'check_violation';
    END IF;
    IF foreign_legs > 0 THEN
        RAISE EXCEPTION 'entry % refused: % of its legs are not in %', NEW.key, foreign_legs, NEW.currency
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NULL;
END $$;

ALTER TABLE payouts_journalentry ADD COLUMN txid xid8 NOT NULL DEFAULT pg_current_xact_id();

CREATE TRIGGER stamp_entry BEFORE INSERT ON payouts_journalentry
    FOR EACH ROW EXECUTE FUNCTION payouts_stamp_entry();
CREATE CONSTRAINT TRIGGER entry_balances AFTER INSERT ON payouts_journalentry
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION payouts_check_entry();
CREATE TRIGGER leg_joins_its_entry BEFORE INSERT ON payouts_posting
    FOR EACH ROW EXECUTE FUNCTION payouts_check_leg();
ALTER TABLE payouts_journalentry ENABLE ALWAYS TRIGGER stamp_entry;
ALTER TABLE payouts_journalentry ENABLE ALWAYS TRIGGER entry_balances;
ALTER TABLE payouts_posting ENABLE ALWAYS TRIGGER leg_joins_its_entry;
"""

UNDO_FUNCTIONS = """
DROP TRIGGER leg_joins_its_entry ON payouts_posting;
DROP TRIGGER entry_balances ON payouts_journalentry;
DROP TRIGGER stamp_entry ON payouts_journalentry;
ALTER TABLE payouts_journalentry DROP COLUMN txid;
DROP FUNCTION payouts_check_entry();
DROP FUNCTION payouts_check_leg();
DROP FUNCTION payouts_stamp_entry();
DROP FUNCTION payouts_refuse_change();
"""

APPEND_ONLY = (
    "payouts_account",
    "payouts_journalentry",
    "payouts_posting",
    "payouts_balancesnapshot",
    "payouts_division",
    "payouts_divisionline",
    "payouts_royaltyreport",
    "payouts_royaltyinvoiceline",
)


def _append_only(table):
    return f"""
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON {table}
    FOR EACH ROW EXECUTE FUNCTION payouts_refuse_change();
CREATE TRIGGER never_truncated BEFORE TRUNCATE ON {table}
    FOR EACH STATEMENT EXECUTE FUNCTION payouts_refuse_change();
ALTER TABLE {table} ENABLE ALWAYS TRIGGER append_only;
ALTER TABLE {table} ENABLE ALWAYS TRIGGER never_truncated;
"""


class Migration(migrations.Migration):
    dependencies = [("payouts", "0001_initial")]

    operations = [
        migrations.RunSQL(FUNCTIONS, UNDO_FUNCTIONS),
        *(
            migrations.RunSQL(
                _append_only(table),
                f"DROP TRIGGER never_truncated ON {table}; DROP TRIGGER append_only ON {table};",
            )
            for table in APPEND_ONLY
        ),
    ]
