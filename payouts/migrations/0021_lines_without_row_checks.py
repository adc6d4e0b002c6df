"""A division's lines and the accounts that it opens look their division and parties up at once, as the legs of an entry do.

Three foreign keys cost half of a division of a million lines: a lookup and a lock for each row and key, at its commit. The rule stays
what a foreign key says (see `0013_postings_without_row_checks`): divisions and parties refuse DELETE and TRUNCATE to everybody and
their ids never change, so a row that is there when a line is made is there for good.
"""

import django.db.models.deletion
from django.db import migrations, models

RULES = """
CREATE FUNCTION payouts_check_lines() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    wrong record;
BEGIN
    SELECT l.division_id, l.party_id, d.id AS division INTO wrong
        FROM new_lines l LEFT JOIN payouts_division d ON d.id = l.division_id
        LEFT JOIN marketplace_party p ON p.id = l.party_id
        WHERE d.id IS NULL OR p.id IS NULL LIMIT 1;
    IF FOUND AND wrong.division IS NULL THEN
        RAISE EXCEPTION 'line refused: there is no division %', wrong.division_id USING ERRCODE = 'foreign_key_violation';
    ELSIF FOUND THEN
        RAISE EXCEPTION 'line refused: there is no party %', wrong.party_id USING ERRCODE = 'foreign_key_violation';
    END IF;
    RETURN NULL;
END $$;

CREATE FUNCTION payouts_check_accounts() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    missing bigint;
BEGIN
    SELECT a.party_id INTO missing FROM new_accounts a LEFT JOIN marketplace_party p ON p.id = a.party_id
        WHERE a.party_id IS NOT NULL AND p.id IS NULL LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'account refused: there is no party %', missing USING ERRCODE = 'foreign_key_violation';
    END IF;
    RETURN NULL;
END $$;

CREATE TRIGGER lines_are_of_division_and_parties AFTER INSERT ON payouts_divisionline
    REFERENCING NEW TABLE AS new_lines FOR EACH STATEMENT EXECUTE FUNCTION payouts_check_lines();
CREATE TRIGGER accounts_are_of_parties AFTER INSERT ON payouts_account
    REFERENCING NEW TABLE AS new_accounts FOR EACH STATEMENT EXECUTE FUNCTION payouts_check_accounts();
ALTER TABLE payouts_divisionline ENABLE ALWAYS TRIGGER lines_are_of_division_and_parties;
ALTER TABLE payouts_account ENABLE ALWAYS TRIGGER accounts_are_of_parties;
"""

UNDO_RULES = """
DROP TRIGGER accounts_are_of_parties ON payouts_account;
DROP TRIGGER lines_are_of_division_and_parties ON payouts_divisionline;
DROP FUNCTION payouts_check_accounts();
DROP FUNCTION payouts_check_lines();
"""


class Migration(migrations.Migration):
    dependencies = [("payouts", "0020_vacuum_postings"), ("marketplace", "0010_parties_stay")]

    operations = [
        migrations.RunSQL(RULES, UNDO_RULES),
        migrations.AlterField(
            "account",
            "party",
            models.ForeignKey(
                db_constraint=False,
                null=True,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="accounts",
                to="marketplace.party",
            ),
        ),
        migrations.AlterField(
            "divisionline",
            "division",
            models.ForeignKey(
                db_constraint=False,
                db_index=False,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="lines",
                to="payouts.division",
            ),
        ),
        migrations.AlterField(
            "divisionline",
            "party",
            models.ForeignKey(
                db_constraint=False,
                db_index=False,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="division_lines",
                to="marketplace.party",
            ),
        ),
    ]
