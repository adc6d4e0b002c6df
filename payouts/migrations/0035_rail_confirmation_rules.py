"""A rail payout was sent, or came back, once two people have seen it; one transfer on the bank's statement is one thing.

The functions pin their search path and the triggers fire always, as those of `0002_ledger_rules` do.
"""

from django.db import migrations

RULES = """
CREATE FUNCTION payouts_check_rail_confirmation() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    stands text;
BEGIN
    IF NEW.status <> 'recorded' THEN
        RAISE EXCEPTION 'a confirmation waits for a second person at first' USING ERRCODE = 'restrict_violation';
    END IF;
    SELECT status INTO stands FROM payouts_railpayout WHERE id = NEW.payout_id FOR UPDATE;
    IF stands = 'intended' OR stands = 'sent' AND NEW.outcome = 'returned' THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION 'confirmation refused: rail payout % is %, it cannot be % now', NEW.payout_id, stands, NEW.outcome
        USING ERRCODE = 'restrict_violation';
END $$;
CREATE TRIGGER confirms_what_stands BEFORE INSERT ON payouts_railconfirmation
    FOR EACH ROW EXECUTE FUNCTION payouts_check_rail_confirmation();

CREATE FUNCTION payouts_keep_rail_confirmation() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    moves text[] := ARRAY['status', 'decided_by_id', 'decided_at'];
BEGIN
    IF to_jsonb(NEW) - moves IS DISTINCT FROM to_jsonb(OLD) - moves OR OLD.status <> 'recorded' THEN
        RAISE EXCEPTION 'confirmation % is decided, or keeps what it is about', OLD.id USING ERRCODE = 'restrict_violation';
    END IF;
    IF NOT EXISTS (SELECT FROM marketplace_user WHERE id = NEW.decided_by_id AND is_staff AND is_active) THEN
        RAISE EXCEPTION 'confirmation % is decided by one of the staff', OLD.id
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'four_eyes';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER keep_confirmation BEFORE UPDATE ON payouts_railconfirmation
    FOR EACH ROW EXECUTE FUNCTION payouts_keep_rail_confirmation();

-- What the payout says of its end is what a booked confirmation says, and stays.
CREATE FUNCTION payouts_check_rail_outcome() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF NEW.status = OLD.status THEN
        IF (NEW.reference, NEW.confirmed_by_id, NEW.confirmed_at)
            IS DISTINCT FROM (OLD.reference, OLD.confirmed_by_id, OLD.confirmed_at) THEN
            RAISE EXCEPTION 'rail payout % keeps by what it was confirmed', OLD.id USING ERRCODE = 'restrict_violation';
        END IF;
    ELSIF NEW.status IN ('sent', 'returned') AND NOT EXISTS (
        SELECT FROM payouts_railconfirmation
        WHERE payout_id = NEW.id AND outcome = NEW.status AND status = 'booked' AND reference = NEW.reference
            AND decided_by_id = NEW.confirmed_by_id
    ) THEN
        RAISE EXCEPTION 'rail payout % is not %: no two people have confirmed it', OLD.id, NEW.status
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'four_eyes';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER rail_payout_is_confirmed BEFORE UPDATE OF status, reference, confirmed_by_id, confirmed_at ON payouts_railpayout
    FOR EACH ROW EXECUTE FUNCTION payouts_check_rail_outcome();

-- At commit: what is confirmed stands in the journal, and the payout says so.
CREATE FUNCTION payouts_check_confirmed() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM payouts_railpayout WHERE id = NEW.payout_id AND status IN (NEW.outcome, 'returned'))
        OR NOT EXISTS (SELECT FROM payouts_journalentry WHERE key = 'rail:' || NEW.payout_id || ':' || NEW.outcome) THEN
        RAISE EXCEPTION 'confirmation % refused: rail payout % is not booked as %', NEW.id, NEW.payout_id, NEW.outcome
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER confirmed_is_booked AFTER UPDATE OF status ON payouts_railconfirmation
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (NEW.status = 'booked') EXECUTE FUNCTION payouts_check_confirmed();

-- One transfer on the statement does not both pay a payee and carry a refund. The lock makes two who record it at once see each
-- other: each table's own index knows only its own rows.
CREATE FUNCTION payouts_check_statement_line() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    is_taken boolean;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('bank_reference:' || NEW.reference, 0));
    IF TG_TABLE_NAME = 'payouts_railconfirmation' THEN
        is_taken := EXISTS (SELECT FROM payouts_outgoingtransfer WHERE reference = NEW.reference AND status <> 'rejected');
    ELSE
        is_taken := EXISTS (SELECT FROM payouts_railconfirmation WHERE reference = NEW.reference AND status <> 'rejected');
    END IF;
    IF is_taken THEN
        RAISE EXCEPTION 'transfer % is recorded for something else', NEW.reference
            USING ERRCODE = 'unique_violation', CONSTRAINT = 'one_thing_per_reference';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER one_thing_per_reference BEFORE INSERT ON payouts_railconfirmation
    FOR EACH ROW EXECUTE FUNCTION payouts_check_statement_line();
CREATE TRIGGER one_thing_per_reference BEFORE INSERT ON payouts_outgoingtransfer
    FOR EACH ROW EXECUTE FUNCTION payouts_check_statement_line();

CREATE TRIGGER append_only BEFORE DELETE ON payouts_railconfirmation
    FOR EACH ROW EXECUTE FUNCTION payouts_refuse_change();
CREATE TRIGGER never_truncated BEFORE TRUNCATE ON payouts_railconfirmation
    FOR EACH STATEMENT EXECUTE FUNCTION payouts_refuse_change();

ALTER TABLE payouts_railconfirmation ENABLE ALWAYS TRIGGER confirms_what_stands;
ALTER TABLE payouts_railconfirmation ENABLE ALWAYS TRIGGER keep_confirmation;
ALTER TABLE payouts_railconfirmation ENABLE ALWAYS TRIGGER confirmed_is_booked;
ALTER TABLE payouts_railconfirmation ENABLE ALWAYS TRIGGER one_thing_per_reference;
ALTER TABLE payouts_railconfirmation ENABLE ALWAYS TRIGGER append_only;
ALTER TABLE payouts_railconfirmation ENABLE ALWAYS TRIGGER never_truncated;
ALTER TABLE payouts_railpayout ENABLE ALWAYS TRIGGER rail_payout_is_confirmed;
ALTER TABLE payouts_outgoingtransfer ENABLE ALWAYS TRIGGER one_thing_per_reference;
"""

UNDO_RULES = """
DROP TRIGGER never_truncated ON payouts_railconfirmation;
DROP TRIGGER append_only ON payouts_railconfirmation;
DROP TRIGGER one_thing_per_reference ON payouts_outgoingtransfer;
DROP TRIGGER one_thing_per_reference ON payouts_railconfirmation;
DROP FUNCTION payouts_check_statement_line();
DROP TRIGGER confirmed_is_booked ON payouts_railconfirmation;
DROP FUNCTION payouts_check_confirmed();
DROP TRIGGER rail_payout_is_confirmed ON payouts_railpayout;
DROP FUNCTION payouts_check_rail_outcome();
DROP TRIGGER keep_confirmation ON payouts_railconfirmation;
DROP FUNCTION payouts_keep_rail_confirmation();
DROP TRIGGER confirms_what_stands ON payouts_railconfirmation;
DROP FUNCTION payouts_check_rail_confirmation();
"""


class Migration(migrations.Migration):
    dependencies = [("payouts", "0034_rail_confirmations")]

    operations = [migrations.RunSQL(RULES, UNDO_RULES)]
