"""The legs of one statement are checked at once, not one by one: a wide entry and a division cost a join, not a lookup per leg.

The rules are those of `0002_ledger_rules`, word for word: a leg belongs to an entry of its own transaction, below its `n_legs`.
"""

from django.db import migrations

RULES = """
CREATE FUNCTION payouts_check_legs() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    wrong record;
BEGIN
    SELECT l.entry_id, l.leg, e.n_legs, e.txid INTO wrong
        FROM new_legs l LEFT JOIN payouts_journalentry e ON e.id = l.entry_id
        WHERE e.txid IS DISTINCT FROM pg_current_xact_id() OR l.leg >= e.n_legs
        LIMIT 1;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    IF wrong.txid IS DISTINCT FROM pg_current_xact_id() THEN
        RAISE EXCEPTION 'posting refused: entry % was not made in this transaction', wrong.entry_id
            USING ERRCODE = 'restrict_violation';
    END IF;
    RAISE EXCEPTION 'posting refused: entry % declares % legs, this would be number %', wrong.entry_id, wrong.n_legs,
        wrong.leg USING ERRCODE = 'restrict_violation';
END $$;

CREATE TRIGGER legs_join_their_entries AFTER INSERT ON payouts_posting
    REFERENCING NEW TABLE AS new_legs FOR EACH STATEMENT EXECUTE FUNCTION payouts_check_legs();
ALTER TABLE payouts_posting ENABLE ALWAYS TRIGGER legs_join_their_entries;
DROP TRIGGER leg_joins_its_entry ON payouts_posting;
"""

UNDO_RULES = """
CREATE TRIGGER leg_joins_its_entry BEFORE INSERT ON payouts_posting
    FOR EACH ROW EXECUTE FUNCTION payouts_check_leg();
ALTER TABLE payouts_posting ENABLE ALWAYS TRIGGER leg_joins_its_entry;
DROP TRIGGER legs_join_their_entries ON payouts_posting;
DROP FUNCTION payouts_check_legs();
"""


class Migration(migrations.Migration):
    dependencies = [("payouts", "0010_payee_counts")]

    operations = [migrations.RunSQL(RULES, UNDO_RULES)]
