"""PostgreSQL holds a payout run against the limit of its own currency: what is much in dollars is little in yen.

The functions pin their search path, as those of `0002_ledger_rules` do; the triggers stay as they are.
"""

import re

from django.db import migrations

LIMIT = """
-- The latest that was written down for the currency, or for every one; nothing: everything needs a second person.
CREATE FUNCTION payouts_approval_above(currency_of text) RETURNS bigint
LANGUAGE sql STABLE SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT coalesce((
        SELECT above_micros FROM payouts_approvallimit WHERE currency IN ('', currency_of) ORDER BY id DESC LIMIT 1
    ), 0)
$$;
"""

# As in 0029, but for the limit and for how the run's row is held.
CHECKS = """
CREATE OR REPLACE FUNCTION payouts_check_payout() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    run_state text;
    run_currency text;
    most bigint;
    intended numeric;
    above bigint;
BEGIN
    IF NEW.status <> 'intended' OR NEW.transfer_id IS NOT NULL THEN
        RAISE EXCEPTION 'payout refused: it begins as intended, not as %', NEW.status USING ERRCODE = 'restrict_violation';
    END IF;
    -- The row is held, so that who pauses or rejects the run waits for what is being intended, or is seen here.
    -- Before there is a plan it is held alone, so that the sum below is whole; at once, for two that hold it and want more wait in a ring.
    SELECT state INTO run_state FROM payouts_payoutrun WHERE id = NEW.run_id;
    IF run_state = 'planning' THEN
        SELECT state, currency INTO run_state, run_currency FROM payouts_payoutrun WHERE id = NEW.run_id FOR NO KEY UPDATE;
    ELSE
        SELECT state, currency INTO run_state, run_currency FROM payouts_payoutrun WHERE id = NEW.run_id FOR SHARE;
    END IF;
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
    IF run_state <> 'planning' THEN
        IF most IS NULL THEN
            RAISE EXCEPTION 'payout refused: run % does not plan to pay party %', NEW.run_id, NEW.party_id
                USING ERRCODE = 'check_violation';
        END IF;
        RETURN NEW;
    END IF;
    SELECT coalesce(sum(amount_micros), 0) INTO intended FROM payouts_payout WHERE run_id = NEW.run_id AND status <> 'refused';
    above := THE_LIMIT(run_currency);
    IF intended + NEW.amount_micros > coalesce(above, 0) THEN
        RAISE EXCEPTION 'payout refused: run % has no plan yet, and % are above what needs no approval', NEW.run_id,
            intended + NEW.amount_micros USING ERRCODE = 'restrict_violation', CONSTRAINT = 'four_eyes';
    END IF;
    RETURN NEW;
END $$;

CREATE OR REPLACE FUNCTION payouts_check_approval() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    above bigint;
    summed numeric;
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NEW.state <> 'planning' OR NEW.planned_at IS NOT NULL OR NEW.approved_at IS NOT NULL
            OR NEW.approved_by_id IS NOT NULL OR NEW.approval_above_micros IS NOT NULL THEN
            RAISE EXCEPTION 'payout run refused: it begins with its plan' USING ERRCODE = 'restrict_violation';
        END IF;
        RETURN NEW;
    END IF;
    IF NEW.approval_above_micros IS DISTINCT FROM OLD.approval_above_micros THEN
        RAISE EXCEPTION 'payout run % keeps the limit that it was planned under', OLD.id USING ERRCODE = 'restrict_violation';
    END IF;
    above := THE_LIMIT(NEW.currency);
    IF OLD.planned_at IS NULL AND NEW.planned_at IS NOT NULL THEN
        SELECT coalesce(sum(amount_micros), 0) INTO summed FROM payouts_plannedpayout WHERE run_id = NEW.id;
        IF summed <> NEW.planned_micros THEN
            RAISE EXCEPTION 'payout run % refused: its plan sums to %, not to %', NEW.id, summed, NEW.planned_micros
                USING ERRCODE = 'check_violation';
        END IF;
        NEW.approval_above_micros := above;
    END IF;
    IF (NEW.approved_at IS NULL) <> (NEW.approved_by_id IS NULL) THEN
        RAISE EXCEPTION 'payout run % is approved by a person, at a time', OLD.id
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'four_eyes';
    END IF;
    IF NEW.approved_by_id IS DISTINCT FROM OLD.approved_by_id
        AND NOT EXISTS (SELECT FROM marketplace_user WHERE id = NEW.approved_by_id AND is_staff AND is_active) THEN
        RAISE EXCEPTION 'payout run % refused: user % is not of the staff', OLD.id, NEW.approved_by_id
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'four_eyes';
    END IF;
    IF OLD.state IN ('planning', 'awaiting_approval') AND NEW.state NOT IN ('planning', 'awaiting_approval', 'rejected') THEN
        IF NEW.planned_at IS NULL THEN
            RAISE EXCEPTION 'payout run % is planned first', OLD.id USING ERRCODE = 'restrict_violation';
        END IF;
        IF NEW.planned_micros > coalesce(NEW.approval_above_micros, above) AND NEW.approved_by_id IS NULL THEN
            RAISE EXCEPTION 'payout run % refused: it sends %, which is above %, and nobody approved it', OLD.id,
                NEW.planned_micros, coalesce(NEW.approval_above_micros, above)
                USING ERRCODE = 'restrict_violation', CONSTRAINT = 'four_eyes';
        END IF;
    END IF;
    RETURN NEW;
END $$;
"""

RULES = LIMIT + CHECKS.replace("THE_LIMIT(", "payouts_approval_above(")
LEAST = """
INSERT INTO payouts_approvallimit (currency, above_micros, set_at)
SELECT '', min(above_micros), now() FROM (
    SELECT DISTINCT ON (currency) above_micros FROM payouts_approvallimit ORDER BY currency, id DESC
) latest HAVING count(*) > 0;
"""
#: One for all currencies, as before; the least of them, since the latest may be a yen's.
UNDO_RULES = (
    LEAST
    + re.sub(
        r"THE_LIMIT\([\w.]+\)",
        "coalesce((SELECT above_micros FROM payouts_approvallimit ORDER BY id DESC LIMIT 1), 0)",
        CHECKS,
    )
    + "DROP FUNCTION payouts_approval_above(text);"
)


class Migration(migrations.Migration):
    dependencies = [("payouts", "0037_approval_limits_by_currency")]

    operations = [migrations.RunSQL(RULES, UNDO_RULES)]
