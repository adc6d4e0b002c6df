"""Bank details are emptied by the row that says so and by nothing else, and not while a transfer to them is under way.

Whoever may write the erasure may not write the details: the trigger's function empties them with the owner's rights. The functions
pin their search path and the triggers fire always, as those of `0002_ledger_rules` do.
"""

from django.db import migrations

RULES = """
CREATE FUNCTION payouts_keep_bank_details() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.sealed = '' AND NEW.last_four = ''
        AND to_jsonb(NEW) - 'sealed' - 'last_four' = to_jsonb(OLD) - 'sealed' - 'last_four'
        AND EXISTS (SELECT FROM payouts_bankdetailserasure WHERE details_id = OLD.id) THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION 'bank details % are followed by others or erased, never changed', OLD.id
        USING ERRCODE = 'restrict_violation';
END $$;
DROP TRIGGER append_only ON payouts_bankdetails;
CREATE TRIGGER only_erased BEFORE UPDATE OR DELETE ON payouts_bankdetails
    FOR EACH ROW EXECUTE FUNCTION payouts_keep_bank_details();
ALTER TABLE payouts_bankdetails ENABLE ALWAYS TRIGGER only_erased;

CREATE FUNCTION payouts_erase_bank_details() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    PERFORM FROM payouts_bankdetails WHERE id = NEW.details_id FOR UPDATE;
    IF EXISTS (SELECT FROM payouts_railpayout WHERE details_id = NEW.details_id AND status = 'intended') THEN
        RAISE EXCEPTION 'bank details % are kept: a transfer to them is under way', NEW.details_id
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'bank_details_in_use';
    END IF;
    UPDATE payouts_bankdetails SET sealed = '', last_four = '' WHERE id = NEW.details_id;
    RETURN NULL;
END $$;
CREATE TRIGGER erases_the_details AFTER INSERT ON payouts_bankdetailserasure
    FOR EACH ROW EXECUTE FUNCTION payouts_erase_bank_details();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON payouts_bankdetailserasure
    FOR EACH ROW EXECUTE FUNCTION payouts_refuse_change();
CREATE TRIGGER never_truncated BEFORE TRUNCATE ON payouts_bankdetailserasure
    FOR EACH STATEMENT EXECUTE FUNCTION payouts_refuse_change();
ALTER TABLE payouts_bankdetailserasure ENABLE ALWAYS TRIGGER erases_the_details;
ALTER TABLE payouts_bankdetailserasure ENABLE ALWAYS TRIGGER append_only;
ALTER TABLE payouts_bankdetailserasure ENABLE ALWAYS TRIGGER never_truncated;

-- Nothing is promised to an account that nobody can read any more. The row is held, so that an erasure waits or came first.
CREATE FUNCTION payouts_check_rail_account() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    PERFORM FROM payouts_bankdetails WHERE id = NEW.details_id FOR SHARE;
    IF EXISTS (SELECT FROM payouts_bankdetailserasure WHERE details_id = NEW.details_id) THEN
        RAISE EXCEPTION 'rail payout % refused: the account was erased', NEW.id
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'bank_details_erased';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER rail_payout_has_an_account BEFORE INSERT OR UPDATE OF status ON payouts_railpayout
    FOR EACH ROW WHEN (NEW.status = 'intended' AND NEW.details_id IS NOT NULL) EXECUTE FUNCTION payouts_check_rail_account();
ALTER TABLE payouts_railpayout ENABLE ALWAYS TRIGGER rail_payout_has_an_account;
"""

UNDO_RULES = """
DROP TRIGGER rail_payout_has_an_account ON payouts_railpayout;
DROP FUNCTION payouts_check_rail_account();
DROP TRIGGER never_truncated ON payouts_bankdetailserasure;
DROP TRIGGER append_only ON payouts_bankdetailserasure;
DROP TRIGGER erases_the_details ON payouts_bankdetailserasure;
DROP FUNCTION payouts_erase_bank_details();
DROP TRIGGER only_erased ON payouts_bankdetails;
DROP FUNCTION payouts_keep_bank_details();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON payouts_bankdetails
    FOR EACH ROW EXECUTE FUNCTION payouts_refuse_change();
ALTER TABLE payouts_bankdetails ENABLE ALWAYS TRIGGER append_only;
"""


class Migration(migrations.Migration):
    dependencies = [("payouts", "0040_bank_details_erasures")]

    operations = [migrations.RunSQL(RULES, UNDO_RULES)]
