"""A settlement is proposed by somebody of the staff, decided once by another; what a payment asks is never less than it is for.

As `0026_settled_event_rules` and `0012_limits_of_the_services` had it, but for changes too. The functions pin their search path; the
triggers fire always.
"""

from django.db import migrations

RULES = """
-- It begins as proposed; then only who decides it, when and with which note is added, once. Who no longer works here does neither.
CREATE OR REPLACE FUNCTION payouts_keep_settlement() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    moves text[] := ARRAY['status', 'decided_by_id', 'decided_at', 'note'];
BEGIN
    IF TG_OP = 'INSERT' AND NEW.status <> 'proposed' THEN
        RAISE EXCEPTION 'settlement refused: it waits for a second person at first' USING ERRCODE = 'restrict_violation';
    END IF;
    IF TG_OP = 'UPDATE' AND (OLD.status <> 'proposed' OR to_jsonb(NEW) - moves IS DISTINCT FROM to_jsonb(OLD) - moves) THEN
        RAISE EXCEPTION 'settlement % is decided, or keeps what was proposed', OLD.id USING ERRCODE = 'restrict_violation';
    END IF;
    IF NOT EXISTS (
        SELECT FROM marketplace_user WHERE id = coalesce(NEW.decided_by_id, NEW.proposed_by_id) AND is_staff AND is_active
    ) THEN
        RAISE EXCEPTION 'settlement refused: only staff propose and decide it'
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'four_eyes';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER payment_still_of_the_whole BEFORE UPDATE OF amount_micros, currency, order_id, invoice_id ON payouts_payment
    FOR EACH ROW EXECUTE FUNCTION payouts_check_payment();
ALTER TABLE payouts_payment ENABLE ALWAYS TRIGGER payment_still_of_the_whole;
"""

UNDO_RULES = """
DROP TRIGGER payment_still_of_the_whole ON payouts_payment;
CREATE OR REPLACE FUNCTION payouts_keep_settlement() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND (
        OLD.status <> 'proposed'
        OR (NEW.event_id, NEW.object_id, NEW.act, NEW.reason, NEW.charge_id, NEW.amount_micros, NEW.currency, NEW.proposed_by_id,
            NEW.proposed_at)
        IS DISTINCT FROM
           (OLD.event_id, OLD.object_id, OLD.act, OLD.reason, OLD.charge_id, OLD.amount_micros, OLD.currency, OLD.proposed_by_id,
            OLD.proposed_at)
    ) THEN
        RAISE EXCEPTION 'settlement % is decided, or keeps what was proposed', OLD.id USING ERRCODE = 'restrict_violation';
    END IF;
    IF NOT EXISTS (SELECT FROM marketplace_user WHERE id = coalesce(NEW.decided_by_id, NEW.proposed_by_id) AND is_staff) THEN
        RAISE EXCEPTION 'settlement refused: only staff propose and decide it'
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'four_eyes';
    END IF;
    RETURN NEW;
END $$;
"""


class Migration(migrations.Migration):
    dependencies = [("payouts", "0041_erasure_rules")]

    operations = [migrations.RunSQL(RULES, UNDO_RULES)]
