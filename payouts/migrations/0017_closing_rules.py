"""Closed months stay closed, nobody approves what they proposed, and what was issued stays as it was, whoever asks.

As in `0002_ledger_rules`, every trigger is ENABLE ALWAYS and every function pins its search path.
"""

from django.db import migrations

RULES = """
-- The entry's own trigger `stamp_entry` fires before this one (triggers fire in the order of their names) and holds the
-- ledger's lock shared; whoever closes a month holds it alone. So either this entry was committed before the month was
-- closed, or the closing is seen here: at READ COMMITTED each statement of a function looks anew.
CREATE FUNCTION payouts_check_period() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    closed_until timestamptz;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'entry % refused: entries are made at READ COMMITTED, or a closed month might not be seen', NEW.key
            USING ERRCODE = 'restrict_violation';
    END IF;
    SELECT ends_at INTO closed_until FROM payouts_closedperiod ORDER BY ends_at DESC LIMIT 1;
    IF NEW.booked_at < closed_until THEN
        RAISE EXCEPTION 'entry % refused: it is booked at %, and everything before % is closed',
            NEW.key, NEW.booked_at, closed_until
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'entry_in_open_period';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER stands_in_open_period BEFORE INSERT ON payouts_journalentry
    FOR EACH ROW EXECUTE FUNCTION payouts_check_period();
ALTER TABLE payouts_journalentry ENABLE ALWAYS TRIGGER stands_in_open_period;

CREATE FUNCTION payouts_close_period() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    last_end timestamptz;
    first_booked timestamptz;
BEGIN
    PERFORM pg_advisory_xact_lock(1818584935);  -- no entry is being made, and the next one sees this row
    IF NEW.starts_on <> date_trunc('month', NEW.starts_on)::date
        OR NEW.ends_at <> (NEW.starts_on + interval '1 month')::timestamp AT TIME ZONE 'UTC' THEN
        RAISE EXCEPTION 'a period is one month in UTC, not % to %', NEW.starts_on, NEW.ends_at
            USING ERRCODE = 'check_violation';
    END IF;
    SELECT max(ends_at) INTO last_end FROM payouts_closedperiod;
    IF last_end IS NOT NULL AND NEW.starts_on::timestamp AT TIME ZONE 'UTC' <> last_end THEN
        RAISE EXCEPTION 'months are closed one after the other: the next one begins at %', last_end
            USING ERRCODE = 'restrict_violation';
    END IF;
    SELECT min(booked_at) INTO first_booked FROM payouts_journalentry;
    IF last_end IS NULL AND first_booked < NEW.starts_on::timestamp AT TIME ZONE 'UTC' THEN
        RAISE EXCEPTION 'the first month to close is that of the first entry, %', first_booked
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER closes_in_order BEFORE INSERT ON payouts_closedperiod
    FOR EACH ROW EXECUTE FUNCTION payouts_close_period();
ALTER TABLE payouts_closedperiod ENABLE ALWAYS TRIGGER closes_in_order;

-- What belongs to a row is written with it or never: a month's balances, a proposal's legs, a statement's totals.
CREATE FUNCTION payouts_stamp_txid() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    NEW.txid := pg_current_xact_id();
    RETURN NEW;
END $$;
CREATE FUNCTION payouts_join_parent() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    made_in xid8;
BEGIN
    EXECUTE format('SELECT txid FROM %I WHERE id = ($1).%I', TG_ARGV[0], TG_ARGV[1]) INTO made_in USING NEW;
    IF made_in IS DISTINCT FROM pg_current_xact_id() THEN
        RAISE EXCEPTION 'row of % refused: what it belongs to was written before', TG_TABLE_NAME
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;
-- Four eyes.
CREATE FUNCTION payouts_check_decision() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    proposer bigint;
BEGIN
    SELECT proposed_by_id INTO proposer FROM payouts_manualentry WHERE id = NEW.manual_id;
    IF proposer = NEW.decided_by_id THEN
        RAISE EXCEPTION 'decision refused: manual entry % needs another person than the one who proposed it', NEW.manual_id
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'four_eyes';
    END IF;
    IF NOT EXISTS (SELECT FROM marketplace_user WHERE id = NEW.decided_by_id AND is_staff AND is_active) THEN
        RAISE EXCEPTION 'decision refused: user % is not of the staff', NEW.decided_by_id
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'four_eyes';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER decided_by_another BEFORE INSERT ON payouts_manualdecision
    FOR EACH ROW EXECUTE FUNCTION payouts_check_decision();

-- At commit: a manual entry is what was approved, leg by leg, and an approved proposal is such an entry.
CREATE FUNCTION payouts_check_manual_entry() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    of_manual bigint;
    n_different bigint;
BEGIN
    SELECT d.manual_id INTO of_manual FROM payouts_manualdecision d
        JOIN payouts_manualentry m ON m.id = d.manual_id
        WHERE d.entry_id = NEW.id AND d.is_approved AND m.currency = NEW.currency AND m.booked_at = NEW.booked_at;
    IF of_manual IS NULL THEN
        RAISE EXCEPTION 'entry % refused: nobody approved it', NEW.key
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'four_eyes';
    END IF;
    SELECT count(*) INTO n_different FROM (
        (SELECT a.code, p.amount_micros FROM payouts_posting p JOIN payouts_account a ON a.id = p.account_id
            WHERE p.entry_id = NEW.id)
        EXCEPT
        (SELECT account_code, amount_micros FROM payouts_manualleg WHERE manual_id = of_manual)
    ) different;
    IF n_different > 0 OR NEW.n_legs <> (SELECT count(*) FROM payouts_manualleg WHERE manual_id = of_manual) THEN
        RAISE EXCEPTION 'entry % refused: it is not what was approved', NEW.key
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'four_eyes';
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER manual_entry_is_approved AFTER INSERT ON payouts_journalentry
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (NEW.kind = 'manual') EXECUTE FUNCTION payouts_check_manual_entry();
CREATE FUNCTION payouts_check_approved() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM payouts_journalentry WHERE id = NEW.entry_id AND kind = 'manual') THEN
        RAISE EXCEPTION 'decision refused: what it approves is no manual entry' USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER approves_a_manual_entry BEFORE INSERT ON payouts_manualdecision
    FOR EACH ROW WHEN (NEW.is_approved) EXECUTE FUNCTION payouts_check_approved();
ALTER TABLE payouts_manualdecision ENABLE ALWAYS TRIGGER decided_by_another;
ALTER TABLE payouts_manualdecision ENABLE ALWAYS TRIGGER approves_a_manual_entry;
ALTER TABLE payouts_journalentry ENABLE ALWAYS TRIGGER manual_entry_is_approved;

-- Other rails: what a row is about never changes, it only goes forward, and nothing is promised that nobody approved.
CREATE FUNCTION payouts_keep_rail_export() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF (NEW.key, NEW.currency, NEW.proposed_by_id, NEW.proposed_at)
        IS DISTINCT FROM (OLD.key, OLD.currency, OLD.proposed_by_id, OLD.proposed_at)
        OR OLD.status <> 'awaiting' THEN
        RAISE EXCEPTION 'export % is decided, or keeps what it is about', OLD.id USING ERRCODE = 'restrict_violation';
    END IF;
    IF NOT EXISTS (SELECT FROM marketplace_user WHERE id = NEW.decided_by_id AND is_staff AND is_active) THEN
        RAISE EXCEPTION 'export % is decided by one of the staff', OLD.id
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'four_eyes';
    END IF;
    RETURN NEW;
END $$;
CREATE FUNCTION payouts_begin_rail() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF TG_TABLE_NAME = 'payouts_railexport' AND to_jsonb(NEW) ->> 'status' <> 'awaiting'
        OR TG_TABLE_NAME = 'payouts_railpayout' AND to_jsonb(NEW) ->> 'status' <> 'proposed' THEN
        RAISE EXCEPTION 'a new row of % waits for approval', TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE FUNCTION payouts_keep_rail_payout() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF (NEW.export_id, NEW.party_id, NEW.currency) IS DISTINCT FROM (OLD.export_id, OLD.party_id, OLD.currency)
        OR NEW.amount_micros > OLD.amount_micros
        OR NEW.amount_micros <> OLD.amount_micros AND OLD.status <> 'proposed' THEN
        RAISE EXCEPTION 'rail payout % keeps what it is about', OLD.id USING ERRCODE = 'restrict_violation';
    END IF;
    IF NEW.status <> OLD.status AND (OLD.status, NEW.status) NOT IN (
        ('proposed', 'intended'), ('proposed', 'dropped'), ('intended', 'sent'), ('intended', 'returned'), ('sent', 'returned')
    ) THEN
        RAISE EXCEPTION 'rail payout % does not go from % to %', OLD.id, OLD.status, NEW.status
            USING ERRCODE = 'restrict_violation';
    END IF;
    IF NEW.status = 'intended' AND NOT EXISTS (
        SELECT FROM payouts_railexport WHERE id = NEW.export_id AND status = 'approved'
    ) THEN
        RAISE EXCEPTION 'rail payout % is of an export that nobody approved', OLD.id
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'four_eyes';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER keep_export BEFORE UPDATE ON payouts_railexport
    FOR EACH ROW EXECUTE FUNCTION payouts_keep_rail_export();
CREATE TRIGGER begin_export BEFORE INSERT ON payouts_railexport FOR EACH ROW EXECUTE FUNCTION payouts_begin_rail();
CREATE TRIGGER keep_rail_payout BEFORE UPDATE ON payouts_railpayout
    FOR EACH ROW EXECUTE FUNCTION payouts_keep_rail_payout();
CREATE TRIGGER begin_rail_payout BEFORE INSERT ON payouts_railpayout FOR EACH ROW EXECUTE FUNCTION payouts_begin_rail();
ALTER TABLE payouts_railexport ENABLE ALWAYS TRIGGER keep_export;
ALTER TABLE payouts_railexport ENABLE ALWAYS TRIGGER begin_export;
ALTER TABLE payouts_railpayout ENABLE ALWAYS TRIGGER keep_rail_payout;
ALTER TABLE payouts_railpayout ENABLE ALWAYS TRIGGER begin_rail_payout;
"""

UNDO_RULES = """
DROP TRIGGER begin_rail_payout ON payouts_railpayout;
DROP TRIGGER keep_rail_payout ON payouts_railpayout;
DROP TRIGGER begin_export ON payouts_railexport;
DROP TRIGGER keep_export ON payouts_railexport;
DROP FUNCTION payouts_keep_rail_payout();
DROP FUNCTION payouts_begin_rail();
DROP FUNCTION payouts_keep_rail_export();
DROP TRIGGER approves_a_manual_entry ON payouts_manualdecision;
DROP FUNCTION payouts_check_approved();
DROP TRIGGER manual_entry_is_approved ON payouts_journalentry;
DROP FUNCTION payouts_check_manual_entry();
DROP TRIGGER decided_by_another ON payouts_manualdecision;
DROP FUNCTION payouts_check_decision();
DROP TRIGGER closes_in_order ON payouts_closedperiod;
DROP FUNCTION payouts_close_period();
DROP TRIGGER stands_in_open_period ON payouts_journalentry;
DROP FUNCTION payouts_check_period();
DROP FUNCTION payouts_join_parent();
DROP FUNCTION payouts_stamp_txid();
"""

APPEND_ONLY = (
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
    "payouts_servedcountries",
)

#: What belongs to which row, by which column.
CHILDREN = {
    "payouts_closedbalance": ("payouts_closedperiod", "period_id"),
    "payouts_manualleg": ("payouts_manualentry", "manual_id"),
    "payouts_statementbalance": ("payouts_issuedstatement", "statement_id"),
    "payouts_statementtotal": ("payouts_issuedstatement", "statement_id"),
}


def _stamped(table):
    return f"""
ALTER TABLE {table} ADD COLUMN txid xid8 NOT NULL DEFAULT pg_current_xact_id();
CREATE TRIGGER stamp_txid BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION payouts_stamp_txid();
ALTER TABLE {table} ENABLE ALWAYS TRIGGER stamp_txid;
"""


def _joined(table, parent, column):
    return f"""
CREATE TRIGGER joins_its_parent BEFORE INSERT ON {table}
    FOR EACH ROW EXECUTE FUNCTION payouts_join_parent('{parent}', '{column}');
ALTER TABLE {table} ENABLE ALWAYS TRIGGER joins_its_parent;
"""


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
    dependencies = [("payouts", "0016_closing_the_books")]

    operations = [
        migrations.RunSQL(RULES, UNDO_RULES),
        *(
            migrations.RunSQL(
                _stamped(table), f"DROP TRIGGER stamp_txid ON {table}; ALTER TABLE {table} DROP COLUMN txid;"
            )
            for table in sorted({parent for parent, _ in CHILDREN.values()})
        ),
        *(
            migrations.RunSQL(_joined(table, *of), f"DROP TRIGGER joins_its_parent ON {table};")
            for table, of in CHILDREN.items()
        ),
        *(
            migrations.RunSQL(
                _append_only(table),
                f"DROP TRIGGER never_truncated ON {table}; DROP TRIGGER append_only ON {table};",
            )
            for table in APPEND_ONLY
        ),
    ]
