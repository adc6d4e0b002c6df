"""What the services refuse, PostgreSQL refuses too: reclaims, undone clawbacks, reversals, payments and pools.

Checks that sum something hold the payment's row, as those of `0005_refund_rules` do.
"""

from django.db import migrations

RULES = """
-- Nobody gives back more of a line than it gave, nor for another line than the clawback's, nor all of them more than it takes.
CREATE OR REPLACE FUNCTION payouts_check_reclaim() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    given bigint;
    taken numeric;
    of_line record;
    of_division record;
    reclaimed numeric;
BEGIN
    PERFORM 1 FROM payouts_payment p JOIN payouts_clawback c ON c.payment_id = p.id
        JOIN payouts_clawbackline l ON l.clawback_id = c.id WHERE l.id = NEW.clawback_line_id FOR UPDATE OF p;
    SELECT * INTO of_line FROM payouts_clawbackline WHERE id = NEW.clawback_line_id;
    SELECT d.order_line_id, d.invoice_line_id, l.amount_micros INTO of_division
        FROM payouts_divisionline l JOIN payouts_division d ON d.id = l.division_id WHERE l.id = NEW.division_line_id;
    given := of_division.amount_micros;
    -- A royalty's division names the order line of its license beside the invoice line that it is of.
    IF of_line.invoice_line_id IS DISTINCT FROM of_division.invoice_line_id
        OR of_line.invoice_line_id IS NULL AND of_line.order_line_id IS DISTINCT FROM of_division.order_line_id THEN
        RAISE EXCEPTION 'reclaim refused: line % was not divided from what clawback line % takes back',
            NEW.division_line_id, NEW.clawback_line_id USING ERRCODE = 'check_violation';
    END IF;
    SELECT coalesce(sum(r.amount_micros), 0) INTO taken
        FROM payouts_reclaim r JOIN payouts_clawbackline l ON l.id = r.clawback_line_id
        WHERE r.division_line_id = NEW.division_line_id
            AND NOT EXISTS (SELECT 1 FROM payouts_clawbackundo u WHERE u.clawback_id = l.clawback_id);
    IF taken + NEW.amount_micros > given THEN
        RAISE EXCEPTION 'reclaim refused: line % gave %, % are taken back, % more is too much',
            NEW.division_line_id, given, taken, NEW.amount_micros USING ERRCODE = 'check_violation';
    END IF;
    SELECT coalesce(sum(amount_micros), 0) INTO reclaimed FROM payouts_reclaim
        WHERE clawback_line_id = NEW.clawback_line_id;
    IF reclaimed + NEW.amount_micros > of_line.amount_micros - of_line.fee_micros - of_line.pool_micros THEN
        RAISE EXCEPTION 'reclaim refused: clawback line % takes % of its payees, % more than the % they give is too much',
            NEW.clawback_line_id, of_line.amount_micros - of_line.fee_micros - of_line.pool_micros, NEW.amount_micros,
            reclaimed USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

-- A refund that stands is not given back: by the end of the transaction that undoes its clawback it was refused or failed.
CREATE FUNCTION payouts_check_undo() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    refund_state text;
BEGIN
    SELECT r.state INTO refund_state FROM payouts_clawback c JOIN payouts_refund r ON r.id = c.refund_id
        WHERE c.id = NEW.clawback_id AND c.kind = 'refund';
    IF refund_state IN ('intended', 'pending', 'sent') THEN
        RAISE EXCEPTION 'undo refused: the refund of clawback % is %', NEW.clawback_id, refund_state
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NULL;
END $$;

-- A reversal is in its payout's currency, and all that are on their way together at most what the payee owes.
CREATE FUNCTION payouts_check_reversal_owed() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    payee bigint;
    payout_currency text;
    owed numeric;
    asked numeric;
BEGIN
    SELECT party_id, currency INTO payee, payout_currency FROM payouts_payout WHERE id = NEW.payout_id FOR UPDATE;
    IF NEW.currency <> payout_currency THEN
        RAISE EXCEPTION 'reversal refused: payout % is in %, not in %', NEW.payout_id, payout_currency, NEW.currency
            USING ERRCODE = 'check_violation';
    END IF;
    SELECT coalesce(sum(p.amount_micros), 0) INTO owed FROM payouts_account a JOIN payouts_posting p ON p.account_id = a.id
        WHERE a.code = 'receivable:' || payee || ':' || NEW.currency;
    SELECT coalesce(sum(r.amount_micros), 0) INTO asked
        FROM payouts_transferreversal r JOIN payouts_payout o ON o.id = r.payout_id
        WHERE o.party_id = payee AND r.currency = NEW.currency AND r.state = 'intended';
    IF asked + NEW.amount_micros > owed THEN
        RAISE EXCEPTION 'reversal refused: party % owes %, % are asked back, % more is too much',
            payee, owed, asked, NEW.amount_micros USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

-- A payment is for the whole of its order or invoice (and perhaps its tax), in its currency.
CREATE FUNCTION payouts_check_payment() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    wanted record;
BEGIN
    IF NEW.order_id IS NOT NULL THEN
        SELECT total_micros, currency INTO wanted FROM marketplace_order WHERE id = NEW.order_id;
    ELSE
        SELECT total_micros, currency INTO wanted FROM payouts_royaltyinvoice WHERE id = NEW.invoice_id;
    END IF;
    IF NEW.amount_micros < wanted.total_micros OR NEW.currency <> wanted.currency THEN
        RAISE EXCEPTION 'payment refused: % % is less than the % % that it is for', NEW.amount_micros, NEW.currency,
            wanted.total_micros, wanted.currency USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

-- A pool is at most its line's price; it never changes, and is released once.
CREATE FUNCTION payouts_check_pool() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    price bigint;
BEGIN
    SELECT price_micros INTO price FROM marketplace_orderline WHERE id = NEW.order_line_id;
    IF NEW.amount_micros > price THEN
        RAISE EXCEPTION 'pool refused: order line % costs %, its pool cannot be %', NEW.order_line_id, price,
            NEW.amount_micros USING ERRCODE = 'check_violation';
    END IF;
    IF TG_OP = 'UPDATE' THEN
        IF (NEW.order_line_id, NEW.version_id, NEW.amount_micros, NEW.currency)
            IS DISTINCT FROM (OLD.order_line_id, OLD.version_id, OLD.amount_micros, OLD.currency)
            OR OLD.released_at IS NOT NULL AND NEW.released_at IS DISTINCT FROM OLD.released_at THEN
            RAISE EXCEPTION 'pool % keeps what it is about', OLD.id USING ERRCODE = 'restrict_violation';
        END IF;
    END IF;
    RETURN NEW;
END $$;

CREATE CONSTRAINT TRIGGER undo_of_what_does_not_stand AFTER INSERT ON payouts_clawbackundo
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION payouts_check_undo();
CREATE TRIGGER reversal_within_debt BEFORE INSERT ON payouts_transferreversal
    FOR EACH ROW EXECUTE FUNCTION payouts_check_reversal_owed();
CREATE TRIGGER payment_of_the_whole BEFORE INSERT ON payouts_payment
    FOR EACH ROW EXECUTE FUNCTION payouts_check_payment();
CREATE TRIGGER pool_within_price BEFORE INSERT OR UPDATE ON payouts_royaltypool
    FOR EACH ROW EXECUTE FUNCTION payouts_check_pool();
ALTER TABLE payouts_clawbackundo ENABLE ALWAYS TRIGGER undo_of_what_does_not_stand;
ALTER TABLE payouts_transferreversal ENABLE ALWAYS TRIGGER reversal_within_debt;
ALTER TABLE payouts_payment ENABLE ALWAYS TRIGGER payment_of_the_whole;
ALTER TABLE payouts_royaltypool ENABLE ALWAYS TRIGGER pool_within_price;
"""

UNDO_RULES = """
DROP TRIGGER pool_within_price ON payouts_royaltypool;
DROP TRIGGER payment_of_the_whole ON payouts_payment;
DROP TRIGGER reversal_within_debt ON payouts_transferreversal;
DROP TRIGGER undo_of_what_does_not_stand ON payouts_clawbackundo;
DROP FUNCTION payouts_check_pool();
DROP FUNCTION payouts_check_payment();
DROP FUNCTION payouts_check_reversal_owed();
DROP FUNCTION payouts_check_undo();
"""


class Migration(migrations.Migration):
    dependencies = [("payouts", "0011_legs_by_statement")]

    operations = [migrations.RunSQL(RULES, UNDO_RULES)]
