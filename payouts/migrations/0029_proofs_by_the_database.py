"""No payable is paid beyond its balance, a division is its lines and what left its source, nothing large is sent unapproved.

Each check runs at commit, once per payout or division; the lines of a statement are looked at together. As in `0002_ledger_rules`,
every trigger is ENABLE ALWAYS and every function pins its search path.
"""

from django.db import migrations

RULES = """
-- The entry `key` moves `micros` of a party's payable to `promised`, and leaves the payable on its side: its latest snapshot and the
-- later postings. The payables' lock is held, so that two who pay the same balance at once see each other.
CREATE FUNCTION payouts_require_intent(what text, key_of text, party bigint, currency_of text, micros bigint, promised text)
RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    entry bigint;
    payable bigint;
    is_promised boolean;
    balance numeric;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('payouts:' || currency_of, 0));
    -- From the entry to its few legs: the other way, PostgreSQL might read every leg that `promised` ever had.
    SELECT id INTO entry FROM payouts_journalentry WHERE key = key_of;
    SELECT max(a.id) FILTER (WHERE a.code = 'payable:' || party || ':' || currency_of AND p.amount_micros = micros),
            coalesce(bool_or(a.code = promised AND p.amount_micros = -micros), false) INTO payable, is_promised
        FROM (SELECT account_id, amount_micros FROM payouts_posting WHERE entry_id = entry OFFSET 0) p
        JOIN payouts_account a ON a.id = p.account_id;
    IF payable IS NULL OR NOT is_promised THEN
        RAISE EXCEPTION '% refused: there is no % of its amount, %, in the journal', what, split_part(key_of, ':', 3), micros
            USING ERRCODE = 'check_violation';
    END IF;
    -- By pairs, in the order of the account's own index: see `ledger.postings_between`.
    SELECT coalesce(s.balance_micros, 0) + coalesce((
            SELECT sum(p.amount_micros) FROM (
                SELECT amount_micros FROM payouts_posting
                WHERE (account_id, id) > (payable, coalesce(s.up_to, 0)) AND (account_id, id) <= (payable, 9223372036854775807)
                ORDER BY account_id, id OFFSET 0
            ) p
        ), 0) INTO balance
        FROM (SELECT payable AS account_id) a LEFT JOIN LATERAL (
            SELECT up_to, balance_micros FROM payouts_balancesnapshot b WHERE b.account_id = a.account_id
            ORDER BY up_to DESC LIMIT 1
        ) s ON true;
    IF balance > 0 THEN
        RAISE EXCEPTION '% refused: party % would be paid % beyond what it is owed in %', what, party, balance, currency_of
            USING ERRCODE = 'check_violation';
    END IF;
END $$;

CREATE FUNCTION payouts_check_payout_intent() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    PERFORM payouts_require_intent('payout ' || NEW.id, 'payout:' || NEW.id || CASE WHEN TG_OP = 'INSERT' THEN ':intent'
        ELSE ':intent-again' END, NEW.party_id, NEW.currency, NEW.amount_micros, 'in_transit:' || NEW.currency);
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER payout_has_its_intent AFTER INSERT ON payouts_payout
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION payouts_check_payout_intent();
CREATE CONSTRAINT TRIGGER found_payout_has_its_intent AFTER UPDATE OF status ON payouts_payout
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (OLD.status = 'refused' AND NEW.status <> 'refused')
    EXECUTE FUNCTION payouts_check_payout_intent();

CREATE FUNCTION payouts_check_rail_intent() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    PERFORM payouts_require_intent('rail payout ' || NEW.id, 'rail:' || NEW.id || ':intent', NEW.party_id, NEW.currency,
        NEW.amount_micros, 'in_transit_rail:' || NEW.currency);
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER rail_payout_has_its_intent AFTER UPDATE OF status ON payouts_railpayout
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (OLD.status = 'proposed' AND NEW.status <> 'dropped')
    EXECUTE FUNCTION payouts_check_rail_intent();

-- As in 0009; and it begins as intended, is of somebody who was planned, and of nothing large before there is a plan.
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
    IF run_state <> 'planning' THEN
        IF most IS NULL THEN
            RAISE EXCEPTION 'payout refused: run % does not plan to pay party %', NEW.run_id, NEW.party_id
                USING ERRCODE = 'check_violation';
        END IF;
        RETURN NEW;
    END IF;
    PERFORM 1 FROM payouts_payoutrun WHERE id = NEW.run_id FOR NO KEY UPDATE;  -- one at a time, so that the sum is whole
    SELECT coalesce(sum(amount_micros), 0) INTO intended FROM payouts_payout WHERE run_id = NEW.run_id AND status <> 'refused';
    SELECT above_micros INTO above FROM payouts_approvallimit ORDER BY id DESC LIMIT 1;
    IF intended + NEW.amount_micros > coalesce(above, 0) THEN
        RAISE EXCEPTION 'payout refused: run % has no plan yet, and % are above what needs no approval', NEW.run_id,
            intended + NEW.amount_micros USING ERRCODE = 'restrict_violation', CONSTRAINT = 'four_eyes';
    END IF;
    RETURN NEW;
END $$;

-- What is above the limit, which the owner of the tables sets, is sent only if another one of the staff approved it.
CREATE FUNCTION payouts_check_approval() RETURNS trigger
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
    SELECT coalesce(max(above_micros) FILTER (WHERE id = latest), 0) INTO above
        FROM (SELECT id, above_micros, max(id) OVER () AS latest FROM payouts_approvallimit) limits;
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
CREATE TRIGGER approved_above_the_limit
    BEFORE INSERT OR UPDATE OF state, planned_at, planned_micros, approved_at, approved_by_id, approval_above_micros
    ON payouts_payoutrun FOR EACH ROW EXECUTE FUNCTION payouts_check_approval();

-- Lines are above zero, so what was checked to be whole has room for none: it does not matter in which transaction one comes.
CREATE FUNCTION payouts_check_division_lines() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    wrong record;
BEGIN
    SELECT d.key, d.amount_micros, n.micros INTO wrong
        FROM (
            SELECT l.division_id, sum(l.amount_micros) AS micros FROM payouts_divisionline l
            WHERE l.division_id = ANY (ARRAY(SELECT DISTINCT division_id FROM new_lines)) GROUP BY l.division_id
        ) n JOIN payouts_division d ON d.id = n.division_id
        WHERE n.micros > d.amount_micros LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'line refused: division % would give %, more than the % that it divides', wrong.key, wrong.micros,
            wrong.amount_micros USING ERRCODE = 'check_violation';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER lines_within_their_division AFTER INSERT ON payouts_divisionline
    REFERENCING NEW TABLE AS new_lines FOR EACH STATEMENT EXECUTE FUNCTION payouts_check_division_lines();

-- At commit: its lines sum to its amount, its entries took just that from where it lay, and a pool has nothing left: all its
-- divisions together are what refunds and disputes have left of it.
CREATE FUNCTION payouts_check_division() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    source_code text;
    of_pool payouts_royaltypool;
    found numeric;
BEGIN
    SELECT coalesce(sum(amount_micros), 0) INTO found FROM payouts_divisionline WHERE division_id = NEW.id;
    IF found <> NEW.amount_micros THEN
        RAISE EXCEPTION 'division % of % refused: its lines sum to %', NEW.key, NEW.amount_micros, found
            USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.source = 'pool' THEN
        SELECT * INTO of_pool FROM payouts_royaltypool WHERE order_line_id = NEW.order_line_id FOR UPDATE;
        IF of_pool.id IS NULL OR NEW.pool_id IS NOT NULL AND NEW.pool_id <> of_pool.id OR of_pool.currency <> NEW.currency THEN
            RAISE EXCEPTION 'division % refused: it is of no pool', NEW.key USING ERRCODE = 'check_violation';
        END IF;
    END IF;
    source_code := CASE NEW.source WHEN 'pool' THEN 'pool:' || of_pool.id WHEN 'upfront' THEN 'clearing:upfront:' || NEW.order_line_id
        WHEN 'royalty' THEN 'clearing:royalty:' || NEW.invoice_line_id WHEN 'correction' THEN 'clearing:correction:' || NEW.corrects_id
        END || ':' || NEW.currency;
    SELECT coalesce(sum(p.amount_micros), 0) INTO found FROM payouts_account a
        JOIN payouts_posting p ON p.account_id = a.id JOIN payouts_journalentry e ON e.id = p.entry_id
        WHERE a.code = source_code AND starts_with(e.key, NEW.key || ':');
    IF found <> NEW.amount_micros THEN
        RAISE EXCEPTION 'division % of % refused: % were taken from %', NEW.key, NEW.amount_micros, found, source_code
            USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.source <> 'pool' THEN
        RETURN NULL;
    END IF;
    SELECT coalesce(-sum(p.amount_micros), 0) INTO found
        FROM payouts_account a JOIN payouts_posting p ON p.account_id = a.id WHERE a.code = source_code;
    IF found <> 0 THEN
        RAISE EXCEPTION 'division % refused: pool % has % left', NEW.key, of_pool.id, found USING ERRCODE = 'check_violation';
    END IF;
    SELECT coalesce(sum(d.amount_micros), 0) INTO found FROM payouts_division d
        WHERE d.order_line_id = NEW.order_line_id AND d.source = 'pool';
    of_pool.amount_micros := of_pool.amount_micros - coalesce((
        SELECT sum(l.pool_micros) FROM payouts_clawbackline l WHERE l.order_line_id = NEW.order_line_id
            AND NOT EXISTS (SELECT FROM payouts_clawbackundo u WHERE u.clawback_id = l.clawback_id)
    ), 0);
    IF found <> of_pool.amount_micros THEN
        RAISE EXCEPTION 'division % refused: divided % of the % that pool % has to give', NEW.key, found, of_pool.amount_micros,
            of_pool.id USING ERRCODE = 'check_violation';
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER division_adds_up AFTER INSERT ON payouts_division
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION payouts_check_division();

-- Whoever closes a month holds the ledger's lock (`closes_in_order` fires before this): what is posted later has a higher id.
CREATE FUNCTION payouts_mark_postings() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    SELECT coalesce(
        (SELECT min(p.id) - 1 FROM payouts_journalentry e JOIN payouts_posting p ON p.entry_id = e.id
            WHERE e.booked_at >= NEW.ends_at),
        (SELECT max(id) FROM payouts_posting), 0
    ) INTO NEW.postings_after;
    RETURN NEW;
END $$;
CREATE TRIGGER marks_its_postings BEFORE INSERT ON payouts_closedperiod
    FOR EACH ROW EXECUTE FUNCTION payouts_mark_postings();

ALTER TABLE payouts_payout ENABLE ALWAYS TRIGGER payout_has_its_intent;
ALTER TABLE payouts_payout ENABLE ALWAYS TRIGGER found_payout_has_its_intent;
ALTER TABLE payouts_railpayout ENABLE ALWAYS TRIGGER rail_payout_has_its_intent;
ALTER TABLE payouts_payoutrun ENABLE ALWAYS TRIGGER approved_above_the_limit;
ALTER TABLE payouts_divisionline ENABLE ALWAYS TRIGGER lines_within_their_division;
ALTER TABLE payouts_division ENABLE ALWAYS TRIGGER division_adds_up;
ALTER TABLE payouts_closedperiod ENABLE ALWAYS TRIGGER marks_its_postings;
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
    dependencies = [("payouts", "0028_proofs")]

    operations = [
        migrations.RunSQL(RULES),
        *(migrations.RunSQL(_append_only(table)) for table in ("payouts_approvallimit", "payouts_prooffinding")),
    ]
