"""Nobody gets back more of a surplus charge than it was, a charge is never both paid and surplus, and what was proposed stays.

As in `0002_ledger_rules`, every trigger is ENABLE ALWAYS and every function pins its search path.
"""

from django.db import migrations

RULES = """
-- A refund stands for its amount unless it was refused or failed; it is of a payment, or of a charge that is for nothing.
CREATE OR REPLACE FUNCTION payouts_check_refund() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    paid bigint;
    currency_paid text;
    payment_status text;
    refunded numeric;
BEGIN
    IF NEW.payment_id IS NULL THEN
        SELECT amount_micros, currency, 'paid' INTO paid, currency_paid, payment_status
            FROM payouts_surpluscharge WHERE id = NEW.surplus_id FOR UPDATE;
    ELSE
        SELECT amount_micros, currency, status INTO paid, currency_paid, payment_status
            FROM payouts_payment WHERE id = NEW.payment_id FOR UPDATE;
    END IF;
    IF payment_status IS DISTINCT FROM 'paid' THEN
        RAISE EXCEPTION 'refund refused: payment % is not paid', NEW.payment_id USING ERRCODE = 'restrict_violation';
    END IF;
    IF NEW.currency <> currency_paid THEN
        RAISE EXCEPTION 'refund refused: payment % is in %, not in %', NEW.payment_id, currency_paid, NEW.currency
            USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.state IN ('intended', 'pending', 'sent') THEN
        SELECT coalesce(sum(amount_micros), 0) INTO refunded FROM payouts_refund
            WHERE (payment_id = NEW.payment_id OR surplus_id = NEW.surplus_id) AND id <> NEW.id
                AND state IN ('intended', 'pending', 'sent');
        IF refunded + NEW.amount_micros > paid THEN
            RAISE EXCEPTION 'refund refused: % of % of payment % are refunded, % more is too much',
                refunded, paid, coalesce(NEW.payment_id, NEW.surplus_id), NEW.amount_micros
                USING ERRCODE = 'check_violation';
        END IF;
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION payouts_keep_refund_surplus() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF NEW.surplus_id IS DISTINCT FROM OLD.surplus_id THEN
        RAISE EXCEPTION 'refund % keeps what it is about; make another one', OLD.id USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER keep_refund_surplus BEFORE UPDATE ON payouts_refund
    FOR EACH ROW EXECUTE FUNCTION payouts_keep_refund_surplus();
ALTER TABLE payouts_refund ENABLE ALWAYS TRIGGER keep_refund_surplus;

-- A charge is what a payment was paid by, or it is for nothing: never both. Both sides hold the payment's row.
CREATE FUNCTION payouts_check_surplus() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    PERFORM 1 FROM payouts_payment WHERE id = NEW.payment_id FOR UPDATE;
    IF EXISTS (SELECT FROM payouts_payment WHERE charge_id = NEW.charge_id) THEN
        RAISE EXCEPTION 'charge % paid something', NEW.charge_id USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER surplus_paid_nothing BEFORE INSERT ON payouts_surpluscharge
    FOR EACH ROW EXECUTE FUNCTION payouts_check_surplus();
CREATE FUNCTION payouts_check_charge() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF EXISTS (SELECT FROM payouts_surpluscharge WHERE charge_id = NEW.charge_id) THEN
        RAISE EXCEPTION 'charge % is booked as being for nothing', NEW.charge_id USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER charge_is_for_something BEFORE INSERT OR UPDATE OF charge_id ON payouts_payment
    FOR EACH ROW WHEN (NEW.charge_id IS NOT NULL) EXECUTE FUNCTION payouts_check_charge();
ALTER TABLE payouts_surpluscharge ENABLE ALWAYS TRIGGER surplus_paid_nothing;
ALTER TABLE payouts_payment ENABLE ALWAYS TRIGGER charge_is_for_something;

-- What was proposed stays as it was proposed, and is decided once, by somebody of the staff.
CREATE FUNCTION payouts_keep_settlement() RETURNS trigger
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
CREATE TRIGGER keep_settlement BEFORE INSERT OR UPDATE ON payouts_eventsettlement
    FOR EACH ROW EXECUTE FUNCTION payouts_keep_settlement();
ALTER TABLE payouts_eventsettlement ENABLE ALWAYS TRIGGER keep_settlement;
"""

UNDO_RULES = """
DROP TRIGGER keep_settlement ON payouts_eventsettlement;
DROP FUNCTION payouts_keep_settlement();
DROP TRIGGER charge_is_for_something ON payouts_payment;
DROP FUNCTION payouts_check_charge();
DROP TRIGGER surplus_paid_nothing ON payouts_surpluscharge;
DROP FUNCTION payouts_check_surplus();
DROP TRIGGER keep_refund_surplus ON payouts_refund;
DROP FUNCTION payouts_keep_refund_surplus();
CREATE OR REPLACE FUNCTION payouts_check_refund() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    paid bigint;
    currency_paid text;
    payment_status text;
    refunded numeric;
BEGIN
    SELECT amount_micros, currency, status INTO paid, currency_paid, payment_status
        FROM payouts_payment WHERE id = NEW.payment_id FOR UPDATE;
    IF payment_status <> 'paid' THEN
        RAISE EXCEPTION 'refund refused: payment % is not paid', NEW.payment_id USING ERRCODE = 'restrict_violation';
    END IF;
    IF NEW.currency <> currency_paid THEN
        RAISE EXCEPTION 'refund refused: payment % is in %, not in %', NEW.payment_id, currency_paid, NEW.currency
            USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.state IN ('intended', 'pending', 'sent') THEN
        SELECT coalesce(sum(amount_micros), 0) INTO refunded FROM payouts_refund
            WHERE payment_id = NEW.payment_id AND id <> NEW.id AND state IN ('intended', 'pending', 'sent');
        IF refunded + NEW.amount_micros > paid THEN
            RAISE EXCEPTION 'refund refused: % of % of payment % are refunded, % more is too much',
                refunded, paid, NEW.payment_id, NEW.amount_micros USING ERRCODE = 'check_violation';
        END IF;
    END IF;
    RETURN NEW;
END $$;
"""


def _refused(table, what):
    return migrations.RunSQL(
        f"""
CREATE TRIGGER append_only BEFORE {what} ON {table} FOR EACH ROW EXECUTE FUNCTION payouts_refuse_change();
CREATE TRIGGER never_truncated BEFORE TRUNCATE ON {table}
    FOR EACH STATEMENT EXECUTE FUNCTION payouts_refuse_change();
ALTER TABLE {table} ENABLE ALWAYS TRIGGER append_only;
ALTER TABLE {table} ENABLE ALWAYS TRIGGER never_truncated;
""",
        f"DROP TRIGGER never_truncated ON {table}; DROP TRIGGER append_only ON {table};",
    )


class Migration(migrations.Migration):
    dependencies = [("payouts", "0025_settled_events")]

    operations = [
        migrations.RunSQL(RULES, UNDO_RULES),
        _refused("payouts_surpluscharge", "UPDATE OR DELETE"),
        _refused("payouts_eventsettlement", "DELETE"),
    ]
