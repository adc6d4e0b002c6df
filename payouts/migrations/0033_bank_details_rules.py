"""Bank details are never changed, only followed by others; a payout over another rail keeps those that it was approved with.

The functions pin their search path and the triggers fire always, as those of `0002_ledger_rules` do.
"""

from django.db import migrations

RULES = """
CREATE FUNCTION payouts_check_rail_details() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        IF NEW.details_id IS DISTINCT FROM OLD.details_id THEN
            RAISE EXCEPTION 'rail payout % keeps where it goes', OLD.id USING ERRCODE = 'restrict_violation';
        END IF;
    ELSIF NOT EXISTS (SELECT FROM payouts_bankdetails WHERE id = NEW.details_id AND party_id = NEW.party_id) THEN
        RAISE EXCEPTION 'rail payout refused: these are no bank details of party %', NEW.party_id
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER rail_payout_goes_to_its_party BEFORE INSERT OR UPDATE OF details_id ON payouts_railpayout
    FOR EACH ROW EXECUTE FUNCTION payouts_check_rail_details();
ALTER TABLE payouts_railpayout ENABLE ALWAYS TRIGGER rail_payout_goes_to_its_party;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON payouts_bankdetails
    FOR EACH ROW EXECUTE FUNCTION payouts_refuse_change();
CREATE TRIGGER never_truncated BEFORE TRUNCATE ON payouts_bankdetails
    FOR EACH STATEMENT EXECUTE FUNCTION payouts_refuse_change();
ALTER TABLE payouts_bankdetails ENABLE ALWAYS TRIGGER append_only;
ALTER TABLE payouts_bankdetails ENABLE ALWAYS TRIGGER never_truncated;
"""

UNDO_RULES = """
DROP TRIGGER never_truncated ON payouts_bankdetails;
DROP TRIGGER append_only ON payouts_bankdetails;
DROP TRIGGER rail_payout_goes_to_its_party ON payouts_railpayout;
DROP FUNCTION payouts_check_rail_details();
"""


class Migration(migrations.Migration):
    dependencies = [("payouts", "0032_bank_details")]

    operations = [migrations.RunSQL(RULES, UNDO_RULES)]
