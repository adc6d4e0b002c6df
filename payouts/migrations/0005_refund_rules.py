"""Nobody gets back more than was paid, whoever asks and however many at once.

Every check holds the payment's row, so that what it sums up cannot change until its transaction ends. The functions pin
their search path and the triggers fire always, as those of `0002_ledger_rules` do.
"""

from django.db import migrations

RULES = """
-- A refund stands for its amount unless it was refused or failed.
CREATE FUNCTION payouts_check_refund() RETURNS trigger
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

-- What a refund is about never changes, and its state only goes forward.
CREATE FUNCTION payouts_keep_refund() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF (NEW.payment_id, NEW.amount_micros, NEW.currency, NEW.reason, NEW.note, NEW.requested_by_id, NEW.key, NEW.intended_at)
        IS DISTINCT FROM
       (OLD.payment_id, OLD.amount_micros, OLD.currency, OLD.reason, OLD.note, OLD.requested_by_id, OLD.key, OLD.intended_at)
    THEN
        RAISE EXCEPTION 'refund % keeps what it is about; make another one', OLD.id USING ERRCODE = 'restrict_violation';
    END IF;
    IF NEW.state <> OLD.state AND (OLD.state, NEW.state) NOT IN (
        ('intended', 'pending'), ('intended', 'sent'), ('intended', 'refused'), ('pending', 'sent'), ('pending', 'failed'),
        ('sent', 'failed')
    ) THEN
        RAISE EXCEPTION 'refund % does not go from % to %', OLD.id, OLD.state, NEW.state
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION payouts_hold_payment() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    PERFORM 1 FROM payouts_payment WHERE id = NEW.payment_id FOR UPDATE;
    RETURN NEW;
END $$;

-- A line gives back at most its price, and its pool at most what it holds, and only while it is not released.
CREATE FUNCTION payouts_check_clawback_line() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    price bigint;
    pooled bigint;
    released timestamptz;
    taken numeric;
    of_pool numeric;
BEGIN
    PERFORM 1 FROM payouts_payment p JOIN payouts_clawback c ON c.payment_id = p.id WHERE c.id = NEW.clawback_id
        FOR UPDATE OF p;
    IF NEW.order_line_id IS NOT NULL THEN
        SELECT l.price_micros INTO price FROM marketplace_orderline l
            JOIN payouts_payment p ON p.order_id = l.order_id JOIN payouts_clawback c ON c.payment_id = p.id
            WHERE l.id = NEW.order_line_id AND c.id = NEW.clawback_id;
    ELSE
        SELECT l.amount_micros INTO price FROM payouts_royaltyinvoiceline l
            JOIN payouts_payment p ON p.invoice_id = l.invoice_id JOIN payouts_clawback c ON c.payment_id = p.id
            WHERE l.id = NEW.invoice_line_id AND c.id = NEW.clawback_id;
    END IF;
    SELECT coalesce(sum(l.amount_micros), 0), coalesce(sum(l.pool_micros), 0) INTO taken, of_pool
        FROM payouts_clawbackline l
        WHERE (l.order_line_id = NEW.order_line_id OR l.invoice_line_id = NEW.invoice_line_id)
            AND NOT EXISTS (SELECT 1 FROM payouts_clawbackundo u WHERE u.clawback_id = l.clawback_id);
    IF price IS NULL OR taken + NEW.amount_micros > price THEN
        RAISE EXCEPTION 'clawback refused: % of % are taken back, % more is too much', taken, price, NEW.amount_micros
            USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.pool_micros > 0 THEN
        SELECT amount_micros, released_at INTO pooled, released FROM payouts_royaltypool
            WHERE order_line_id = NEW.order_line_id FOR UPDATE;
        IF pooled IS NULL OR released IS NOT NULL OR of_pool + NEW.pool_micros > pooled THEN
            RAISE EXCEPTION 'clawback refused: the pool of order line % has not % left', NEW.order_line_id, NEW.pool_micros
                USING ERRCODE = 'check_violation';
        END IF;
    END IF;
    RETURN NEW;
END $$;

-- Nobody gives back more of a line than it gave.
CREATE FUNCTION payouts_check_reclaim() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    given bigint;
    taken numeric;
BEGIN
    SELECT amount_micros INTO given FROM payouts_divisionline WHERE id = NEW.division_line_id;
    SELECT coalesce(sum(r.amount_micros), 0) INTO taken
        FROM payouts_reclaim r JOIN payouts_clawbackline l ON l.id = r.clawback_line_id
        WHERE r.division_line_id = NEW.division_line_id
            AND NOT EXISTS (SELECT 1 FROM payouts_clawbackundo u WHERE u.clawback_id = l.clawback_id);
    IF taken + NEW.amount_micros > given THEN
        RAISE EXCEPTION 'reclaim refused: line % gave %, % are taken back, % more is too much',
            NEW.division_line_id, given, taken, NEW.amount_micros USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

-- A payout is reversed at most wholly, and only one that was sent.
CREATE FUNCTION payouts_check_reversal() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    sent bigint;
    payout_status text;
    reversed numeric;
BEGIN
    SELECT amount_micros, status INTO sent, payout_status FROM payouts_payout WHERE id = NEW.payout_id FOR UPDATE;
    IF TG_OP = 'UPDATE' AND (NEW.payout_id, NEW.amount_micros, NEW.currency) IS DISTINCT FROM
        (OLD.payout_id, OLD.amount_micros, OLD.currency) THEN
        RAISE EXCEPTION 'reversal % keeps what it is about; make another one', OLD.id
            USING ERRCODE = 'restrict_violation';
    END IF;
    SELECT coalesce(sum(amount_micros), 0) INTO reversed FROM payouts_transferreversal
        WHERE payout_id = NEW.payout_id AND id <> NEW.id AND state <> 'refused';
    IF NEW.state <> 'refused'
        AND (payout_status NOT IN ('sent', 'paid') OR reversed + NEW.amount_micros > sent) THEN
        RAISE EXCEPTION 'reversal refused: % of % of payout % are reversed, % more is too much',
            reversed, sent, NEW.payout_id, NEW.amount_micros USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

-- A movement is Stripe's word; only that its funds became available comes later, once.
CREATE FUNCTION payouts_keep_movement() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF OLD.settled_at IS NOT NULL
        OR to_jsonb(NEW) - 'settled_at' IS DISTINCT FROM to_jsonb(OLD) - 'settled_at' THEN
        RAISE EXCEPTION 'movement % is kept as Stripe said it', OLD.balance_transaction_id
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;

-- What a dispute is about never changes, and a closed one stays closed.
CREATE FUNCTION payouts_keep_dispute() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF (NEW.dispute_id, NEW.payment_id, NEW.amount_micros, NEW.currency)
        IS DISTINCT FROM (OLD.dispute_id, OLD.payment_id, OLD.amount_micros, OLD.currency) THEN
        RAISE EXCEPTION 'dispute % keeps what it is about', OLD.id USING ERRCODE = 'restrict_violation';
    END IF;
    IF OLD.closed_at IS NOT NULL AND (NEW.closed_at, NEW.status) IS DISTINCT FROM (OLD.closed_at, OLD.status) THEN
        RAISE EXCEPTION 'dispute % is closed', OLD.id USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;

-- Not on every update: a worker's heartbeat must not wait for the payment that its own transaction holds.
CREATE TRIGGER refund_within_payment BEFORE INSERT OR UPDATE OF state, amount_micros, currency, payment_id ON payouts_refund
    FOR EACH ROW EXECUTE FUNCTION payouts_check_refund();
CREATE TRIGGER keep_refund BEFORE UPDATE ON payouts_refund FOR EACH ROW EXECUTE FUNCTION payouts_keep_refund();
CREATE TRIGGER clawback_holds_payment BEFORE INSERT ON payouts_clawback
    FOR EACH ROW EXECUTE FUNCTION payouts_hold_payment();
CREATE TRIGGER clawback_within_line BEFORE INSERT ON payouts_clawbackline
    FOR EACH ROW EXECUTE FUNCTION payouts_check_clawback_line();
CREATE TRIGGER reclaim_within_line BEFORE INSERT ON payouts_reclaim
    FOR EACH ROW EXECUTE FUNCTION payouts_check_reclaim();
CREATE TRIGGER reversal_within_payout
    BEFORE INSERT OR UPDATE OF state, amount_micros, currency, payout_id ON payouts_transferreversal
    FOR EACH ROW EXECUTE FUNCTION payouts_check_reversal();
CREATE TRIGGER keep_movement BEFORE UPDATE ON payouts_movement
    FOR EACH ROW EXECUTE FUNCTION payouts_keep_movement();
CREATE TRIGGER keep_dispute BEFORE UPDATE ON payouts_dispute FOR EACH ROW EXECUTE FUNCTION payouts_keep_dispute();
ALTER TABLE payouts_refund ENABLE ALWAYS TRIGGER refund_within_payment;
ALTER TABLE payouts_refund ENABLE ALWAYS TRIGGER keep_refund;
ALTER TABLE payouts_clawback ENABLE ALWAYS TRIGGER clawback_holds_payment;
ALTER TABLE payouts_clawbackline ENABLE ALWAYS TRIGGER clawback_within_line;
ALTER TABLE payouts_reclaim ENABLE ALWAYS TRIGGER reclaim_within_line;
ALTER TABLE payouts_transferreversal ENABLE ALWAYS TRIGGER reversal_within_payout;
ALTER TABLE payouts_movement ENABLE ALWAYS TRIGGER keep_movement;
ALTER TABLE payouts_dispute ENABLE ALWAYS TRIGGER keep_dispute;
"""

UNDO_RULES = """
DROP TRIGGER keep_dispute ON payouts_dispute;
DROP TRIGGER keep_movement ON payouts_movement;
DROP TRIGGER reversal_within_payout ON payouts_transferreversal;
DROP TRIGGER reclaim_within_line ON payouts_reclaim;
DROP TRIGGER clawback_within_line ON payouts_clawbackline;
DROP TRIGGER clawback_holds_payment ON payouts_clawback;
DROP TRIGGER keep_refund ON payouts_refund;
DROP TRIGGER refund_within_payment ON payouts_refund;
DROP FUNCTION payouts_keep_dispute();
DROP FUNCTION payouts_keep_movement();
DROP FUNCTION payouts_check_reversal();
DROP FUNCTION payouts_check_reclaim();
DROP FUNCTION payouts_check_clawback_line();
DROP FUNCTION payouts_hold_payment();
DROP FUNCTION payouts_keep_refund();
DROP FUNCTION payouts_check_refund();
"""

APPEND_ONLY = (
    "payouts_clawback",
    "payouts_clawbackundo",
    "payouts_clawbackline",
    "payouts_reclaim",
    "payouts_writeoff",
)
#: Their state moves on; the row stays.
NEVER_DELETED = ("payouts_refund", "payouts_dispute", "payouts_transferreversal", "payouts_movement")


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
    dependencies = [("payouts", "0004_refunds")]

    operations = [
        migrations.RunSQL(RULES, UNDO_RULES),
        *(_refused(table, "UPDATE OR DELETE") for table in APPEND_ONLY),
        *(_refused(table, "DELETE") for table in NEVER_DELETED),
    ]
