"""Nobody deletes a party or changes its id: money, data and evidence name it, and the ledger relies on it without a foreign key per row."""

from django.db import migrations

RULES = """
CREATE FUNCTION marketplace_keep_party() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% of a party is refused: what it owns and is owed names it', TG_OP USING ERRCODE = 'restrict_violation';
END $$;
CREATE TRIGGER keep_party BEFORE DELETE ON marketplace_party FOR EACH ROW EXECUTE FUNCTION marketplace_keep_party();
CREATE TRIGGER keep_party_id BEFORE UPDATE OF id ON marketplace_party
    FOR EACH ROW WHEN (NEW.id <> OLD.id) EXECUTE FUNCTION marketplace_keep_party();
CREATE TRIGGER keep_party_truncate BEFORE TRUNCATE ON marketplace_party
    FOR EACH STATEMENT EXECUTE FUNCTION marketplace_keep_party();
ALTER TABLE marketplace_party ENABLE ALWAYS TRIGGER keep_party;
ALTER TABLE marketplace_party ENABLE ALWAYS TRIGGER keep_party_id;
ALTER TABLE marketplace_party ENABLE ALWAYS TRIGGER keep_party_truncate;
"""

UNDO_RULES = """
DROP TRIGGER keep_party_truncate ON marketplace_party;
DROP TRIGGER keep_party_id ON marketplace_party;
DROP TRIGGER keep_party ON marketplace_party;
DROP FUNCTION marketplace_keep_party();
"""


class Migration(migrations.Migration):
    dependencies = [("marketplace", "0009_licenses_in_arrears")]

    operations = [migrations.RunSQL(RULES, UNDO_RULES)]
