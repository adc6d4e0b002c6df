"""No manual entry takes from our bank account what is promised out of it, or held for whoever sent it.

The functions pin their search path and the trigger fires always, as those of `0002_ledger_rules` do.
"""

from django.db import migrations

RULES = """
-- An account's balance: its latest snapshot and the later postings, by pairs (see `ledger.postings_between`). Stable, so that balances
-- that one statement asks for are of one moment.
CREATE FUNCTION payouts_balance_of(code_of text) RETURNS numeric
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    of_account bigint;
    since bigint := 0;
    balance numeric := 0;
BEGIN
    SELECT id INTO of_account FROM payouts_account WHERE code = code_of;
    IF of_account IS NULL THEN
        RETURN 0;
    END IF;
    SELECT up_to, balance_micros INTO since, balance FROM payouts_balancesnapshot
        WHERE account_id = of_account ORDER BY up_to DESC LIMIT 1;
    RETURN coalesce(balance, 0) + coalesce((
        SELECT sum(p.amount_micros) FROM (
            SELECT amount_micros FROM payouts_posting
            WHERE (account_id, id) > (of_account, coalesce(since, 0)) AND (account_id, id) <= (of_account, 9223372036854775807)
            ORDER BY account_id, id OFFSET 0
        ) p
    ), 0);
END $$;

-- At commit, under the lock of whoever promises: two entries that take the same money see each other.
CREATE FUNCTION payouts_check_bank_promises() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    taken bigint;
    promised numeric;
    held numeric;
BEGIN
    SELECT -p.amount_micros INTO taken
        FROM (SELECT account_id, amount_micros FROM payouts_posting WHERE entry_id = NEW.id OFFSET 0) p
        JOIN payouts_account a ON a.id = p.account_id WHERE a.code = 'bank:' || NEW.currency;
    IF coalesce(taken, 0) <= 0 THEN
        RETURN NULL;
    END IF;
    PERFORM pg_advisory_xact_lock(hashtextextended('payouts:' || NEW.currency, 0));
    SELECT payouts_balance_of('bank:' || NEW.currency),
        -(payouts_balance_of('in_transit_rail:' || NEW.currency) + payouts_balance_of('refunding_bank:' || NEW.currency)
            + payouts_balance_of('unapplied:' || NEW.currency))
        INTO held, promised;
    IF promised > 0 AND held < promised THEN
        RAISE EXCEPTION 'entry % refused: it takes % from the bank account and leaves %, of which % are promised or held for others',
            NEW.key, taken, held, promised USING ERRCODE = 'check_violation', CONSTRAINT = 'bank_keeps_promises';
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER manual_entry_leaves_promises AFTER INSERT ON payouts_journalentry
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (NEW.kind = 'manual') EXECUTE FUNCTION payouts_check_bank_promises();
ALTER TABLE payouts_journalentry ENABLE ALWAYS TRIGGER manual_entry_leaves_promises;
"""

UNDO_RULES = """
DROP TRIGGER manual_entry_leaves_promises ON payouts_journalentry;
DROP FUNCTION payouts_check_bank_promises();
DROP FUNCTION payouts_balance_of(text);
"""


class Migration(migrations.Migration):
    dependencies = [("payouts", "0035_rail_confirmation_rules")]

    operations = [migrations.RunSQL(RULES, UNDO_RULES)]
