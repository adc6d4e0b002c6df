"""Nothing leaves the bank account for a buyer or payer beyond what is theirs, and nothing that two people have not seen.

The functions pin their search path and the triggers fire always, as those of `0002_ledger_rules` do.
"""

from django.db import migrations

RULES = """
-- A refund goes the way that its payment came; one by bank is sent once a booked transfer carried it, and failed once that came back.
CREATE FUNCTION payouts_check_refund_method() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    paid_by text;
    carried text;
BEGIN
    SELECT method INTO paid_by FROM payouts_payment WHERE id = NEW.payment_id;
    paid_by := coalesce(paid_by, 'stripe');  -- a surplus charge is Stripe's
    IF NEW.method <> paid_by OR TG_OP = 'UPDATE' AND NEW.method <> OLD.method THEN
        RAISE EXCEPTION 'refund refused: payment % was paid by %, not by %', NEW.payment_id, paid_by, NEW.method
            USING ERRCODE = 'restrict_violation';
    END IF;
    IF NEW.method = 'bank' AND NEW.state NOT IN ('intended', 'refused') THEN
        SELECT status INTO carried FROM payouts_outgoingtransfer
            WHERE refund_id = NEW.id AND status <> 'rejected' AND amount_micros = NEW.amount_micros;
        IF (NEW.state, carried) IS DISTINCT FROM ('sent', 'booked')
            AND (NEW.state, carried) IS DISTINCT FROM ('failed', 'returned') THEN
            RAISE EXCEPTION 'refund % is not %: no transfer says so', NEW.id, NEW.state USING ERRCODE = 'restrict_violation';
        END IF;
    END IF;
    IF NEW.method = 'bank' AND NEW.state = 'refused' AND EXISTS (
        SELECT FROM payouts_outgoingtransfer WHERE refund_id = NEW.id AND status <> 'rejected'
    ) THEN
        RAISE EXCEPTION 'refund % has a transfer that carries it', NEW.id USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;

-- What is left of a receipt that fits no invoice: its amount, less what pays invoices and what was sent back and stayed there.
CREATE FUNCTION payouts_left_of_receipt(receipt bigint) RETURNS numeric
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    held record;
BEGIN
    SELECT amount_micros, status, payment_id INTO held FROM payouts_bankreceipt WHERE id = receipt;
    IF held.status IS DISTINCT FROM 'booked' OR held.payment_id IS NOT NULL THEN
        RETURN 0;
    END IF;
    RETURN held.amount_micros - coalesce((
        SELECT sum(u.amount_micros) FROM payouts_receiptuse u JOIN payouts_receiptapplication a ON a.id = u.application_id
            WHERE u.receipt_id = receipt AND a.status <> 'rejected'
    ), 0) - coalesce((
        SELECT sum(amount_micros) FROM payouts_outgoingtransfer WHERE receipt_id = receipt AND status IN ('recorded', 'booked')
    ), 0);
END $$;

CREATE FUNCTION payouts_check_receipt_use() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    held record;
    of_application record;
BEGIN
    SELECT currency INTO held FROM payouts_bankreceipt WHERE id = NEW.receipt_id FOR UPDATE;
    SELECT currency, status INTO of_application FROM payouts_receiptapplication WHERE id = NEW.application_id;
    IF held.currency IS DISTINCT FROM of_application.currency OR of_application.status <> 'proposed' THEN
        RAISE EXCEPTION 'use of receipt % refused: another currency, or decided already', NEW.receipt_id
            USING ERRCODE = 'restrict_violation';
    END IF;
    IF payouts_left_of_receipt(NEW.receipt_id) < NEW.amount_micros THEN
        RAISE EXCEPTION 'use of receipt % refused: it has not % left', NEW.receipt_id, NEW.amount_micros
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

-- An application pays its payment exactly; at commit its uses are its amount.
CREATE FUNCTION payouts_check_application() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    asked record;
    used numeric;
BEGIN
    SELECT amount_micros, currency INTO asked FROM payouts_payment WHERE id = NEW.payment_id;
    SELECT coalesce(sum(amount_micros), 0) INTO used FROM payouts_receiptuse WHERE application_id = NEW.id;
    IF (asked.amount_micros, asked.currency) IS DISTINCT FROM (NEW.amount_micros, NEW.currency) OR used <> NEW.amount_micros THEN
        RAISE EXCEPTION 'application % of % refused: payment % asks for %, its receipts give %', NEW.id, NEW.amount_micros,
            NEW.payment_id, asked.amount_micros, used USING ERRCODE = 'check_violation';
    END IF;
    RETURN NULL;
END $$;

CREATE FUNCTION payouts_check_outgoing() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    wanted record;
BEGIN
    IF NEW.status <> 'recorded' THEN
        RAISE EXCEPTION 'a transfer waits for a second person at first' USING ERRCODE = 'restrict_violation';
    END IF;
    IF NEW.refund_id IS NOT NULL THEN
        SELECT amount_micros, currency, method, state INTO wanted FROM payouts_refund WHERE id = NEW.refund_id FOR UPDATE;
        IF (wanted.amount_micros, wanted.currency, wanted.method, wanted.state)
            IS DISTINCT FROM (NEW.amount_micros, NEW.currency, 'bank', 'intended') THEN
            RAISE EXCEPTION 'transfer refused: refund % is not % % by bank, intended', NEW.refund_id, NEW.amount_micros,
                NEW.currency USING ERRCODE = 'check_violation';
        END IF;
    ELSE
        SELECT currency INTO wanted FROM payouts_bankreceipt WHERE id = NEW.receipt_id FOR UPDATE;
        IF wanted.currency <> NEW.currency OR payouts_left_of_receipt(NEW.receipt_id) < NEW.amount_micros THEN
            RAISE EXCEPTION 'transfer refused: receipt % has not % % left', NEW.receipt_id, NEW.amount_micros, NEW.currency
                USING ERRCODE = 'check_violation';
        END IF;
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION payouts_keep_outgoing() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    moves text[] := ARRAY['status', 'decided_by_id', 'decided_at', 'return_reference', 'return_note', 'returned_by_id',
        'returned_at'];
BEGIN
    IF to_jsonb(NEW) - moves IS DISTINCT FROM to_jsonb(OLD) - moves
        OR OLD.decided_by_id IS NOT NULL
            AND (NEW.decided_by_id, NEW.decided_at) IS DISTINCT FROM (OLD.decided_by_id, OLD.decided_at)
        OR (OLD.status, NEW.status) NOT IN (('recorded', 'booked'), ('recorded', 'rejected'), ('booked', 'returned')) THEN
        RAISE EXCEPTION 'transfer % keeps what it is about, and does not go from % to %', OLD.id, OLD.status, NEW.status
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER refund_goes_as_it_came BEFORE INSERT OR UPDATE OF state, method ON payouts_refund
    FOR EACH ROW EXECUTE FUNCTION payouts_check_refund_method();
CREATE TRIGGER use_within_receipt BEFORE INSERT ON payouts_receiptuse
    FOR EACH ROW EXECUTE FUNCTION payouts_check_receipt_use();
CREATE CONSTRAINT TRIGGER application_is_exact AFTER INSERT OR UPDATE ON payouts_receiptapplication
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION payouts_check_application();
CREATE TRIGGER decide_once BEFORE UPDATE ON payouts_receiptapplication
    FOR EACH ROW EXECUTE FUNCTION payouts_decide_once();
CREATE TRIGGER outgoing_within_cause BEFORE INSERT ON payouts_outgoingtransfer
    FOR EACH ROW EXECUTE FUNCTION payouts_check_outgoing();
CREATE TRIGGER keep_outgoing BEFORE UPDATE ON payouts_outgoingtransfer
    FOR EACH ROW EXECUTE FUNCTION payouts_keep_outgoing();
ALTER TABLE payouts_refund ENABLE ALWAYS TRIGGER refund_goes_as_it_came;
ALTER TABLE payouts_receiptuse ENABLE ALWAYS TRIGGER use_within_receipt;
ALTER TABLE payouts_receiptapplication ENABLE ALWAYS TRIGGER application_is_exact;
ALTER TABLE payouts_receiptapplication ENABLE ALWAYS TRIGGER decide_once;
ALTER TABLE payouts_outgoingtransfer ENABLE ALWAYS TRIGGER outgoing_within_cause;
ALTER TABLE payouts_outgoingtransfer ENABLE ALWAYS TRIGGER keep_outgoing;
"""

UNDO_RULES = """
DROP TRIGGER keep_outgoing ON payouts_outgoingtransfer;
DROP TRIGGER outgoing_within_cause ON payouts_outgoingtransfer;
DROP TRIGGER decide_once ON payouts_receiptapplication;
DROP TRIGGER application_is_exact ON payouts_receiptapplication;
DROP TRIGGER use_within_receipt ON payouts_receiptuse;
DROP TRIGGER refund_goes_as_it_came ON payouts_refund;
DROP FUNCTION payouts_keep_outgoing();
DROP FUNCTION payouts_check_outgoing();
DROP FUNCTION payouts_check_application();
DROP FUNCTION payouts_check_receipt_use();
DROP FUNCTION payouts_left_of_receipt(bigint);
DROP FUNCTION payouts_check_refund_method();
"""

#: What PostgreSQL refuses to do to them.
KEPT = {
    "payouts_receiptuse": "UPDATE OR DELETE",
    "payouts_receiptapplication": "DELETE",
    "payouts_outgoingtransfer": "DELETE",
}


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
    dependencies = [("payouts", "0030_bank_money")]

    operations = [
        migrations.RunSQL(RULES, UNDO_RULES),
        *(_refused(table, what) for table, what in KEPT.items()),
    ]
