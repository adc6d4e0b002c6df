"""Whether a leg's account is in its entry's currency is checked with the legs of its statement, whose accounts are looked up anyway.

At commit each entry was joined with the accounts again: where a division has just opened very many, PostgreSQL read all of them for
each of its entries. Accounts never change, so what is right when a leg is made stays right.
"""

from django.db import migrations

RULES = """
CREATE OR REPLACE FUNCTION payouts_check_legs() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    wrong record;
BEGIN
    SELECT l.entry_id, l.leg, l.account_id, e.key, e.n_legs, e.txid, e.currency, a.id AS account, a.currency AS of_account
        INTO wrong
        FROM new_legs l LEFT JOIN payouts_journalentry e ON e.id = l.entry_id
        LEFT JOIN payouts_account a ON a.id = l.account_id
        WHERE e.txid IS DISTINCT FROM pg_current_xact_id() OR l.leg >= e.n_legs OR a.id IS NULL OR a.currency <> e.currency
        LIMIT 1;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    IF wrong.txid IS DISTINCT FROM pg_current_xact_id() THEN
        RAISE EXCEPTION 'posting refused: entry % was not made in this transaction', wrong.entry_id
            USING ERRCODE = 'restrict_violation';
    END IF;
    IF wrong.account IS NULL THEN
        RAISE EXCEPTION 'posting refused: there is no account %', wrong.account_id USING ERRCODE = 'foreign_key_violation';
    END IF;
    IF wrong.leg >= wrong.n_legs THEN
        RAISE EXCEPTION 'posting refused: entry % declares % legs, this would be number %', wrong.entry_id, wrong.n_legs,
            wrong.leg USING ERRCODE = 'restrict_violation';
    END IF;
    RAISE EXCEPTION 'entry % refused: its leg % is in %, not in %', wrong.key, wrong.leg, wrong.of_account, wrong.currency
        USING ERRCODE = 'check_violation';
END $$;

CREATE OR REPLACE FUNCTION payouts_check_entry() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    legs bigint;
    total numeric;
BEGIN
    SELECT count(*), coalesce(sum(amount_micros), 0) INTO legs, total FROM payouts_posting WHERE entry_id = NEW.id;
    IF legs <> NEW.n_legs OR legs < 2 THEN
        RAISE EXCEPTION 'entry % refused: it declares % legs and has %', NEW.key, NEW.n_legs, legs
            USING ERRCODE = 'check_violation';
    END IF;
    IF total <> 0 THEN
        RAISE EXCEPTION 'entry % refused: its legs sum to %, not 0', NEW.key, total USING ERRCODE = 'check_violation';
    END IF;
    RETURN NULL;
END $$;
"""


class Migration(migrations.Migration):
    dependencies = [("payouts", "0021_lines_without_row_checks")]

    operations = [migrations.RunSQL(RULES, migrations.RunSQL.noop)]
