"""A leg's entry and account are looked up once for all legs of a statement; a foreign key looks each of them up by itself.

The rule stays what a foreign key says: both tables refuse DELETE and TRUNCATE to everybody and ids never change, so a row that is
there when a leg is made is there for good. Indexes that others begin with go too: a division of a million lines writes each of them.
"""

import django.db.models.deletion
from django.db import migrations, models

RULES = """
CREATE OR REPLACE FUNCTION payouts_check_legs() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    wrong record;
BEGIN
    SELECT l.entry_id, l.leg, l.account_id, e.n_legs, e.txid, a.id AS account INTO wrong
        FROM new_legs l LEFT JOIN payouts_journalentry e ON e.id = l.entry_id
        LEFT JOIN payouts_account a ON a.id = l.account_id
        WHERE e.txid IS DISTINCT FROM pg_current_xact_id() OR l.leg >= e.n_legs OR a.id IS NULL
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
    RAISE EXCEPTION 'posting refused: entry % declares % legs, this would be number %', wrong.entry_id, wrong.n_legs,
        wrong.leg USING ERRCODE = 'restrict_violation';
END $$;
"""


class Migration(migrations.Migration):
    dependencies = [("payouts", "0012_limits_of_the_services")]

    operations = [
        migrations.RunSQL(RULES, migrations.RunSQL.noop),
        migrations.AlterField(
            "posting",
            "entry",
            models.ForeignKey(
                db_constraint=False,
                db_index=False,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="postings",
                to="payouts.journalentry",
            ),
        ),
        migrations.AlterField(
            "posting",
            "account",
            models.ForeignKey(
                db_constraint=False,
                db_index=False,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="postings",
                to="payouts.account",
            ),
        ),
        migrations.AlterField(
            "divisionline",
            "division",
            models.ForeignKey(
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
                db_index=False,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="division_lines",
                to="marketplace.party",
            ),
        ),
    ]
