"""A staff key ends at once and for good with what lets its person in, whoever asks; and what was done by it stays written down.

As elsewhere, every trigger is ENABLE ALWAYS and every function pins its search path.
"""

from django.db import migrations

RULES = """
-- Only the last use and the end of a key are ever written; its end is never taken back. Django takes the reference away when
-- the second factor is deleted: that is the end too.
CREATE FUNCTION marketplace_keep_staff_key() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    free text[] := ARRAY['last_used_at', 'revoked_at', 'second_factor_id'];
BEGIN
    IF TG_OP = 'DELETE' OR to_jsonb(NEW) - free IS DISTINCT FROM to_jsonb(OLD) - free
        OR (NEW.second_factor_id IS NOT NULL AND NEW.second_factor_id IS DISTINCT FROM OLD.second_factor_id)
        OR (OLD.revoked_at IS NOT NULL AND NEW.revoked_at IS DISTINCT FROM OLD.revoked_at) THEN
        RAISE EXCEPTION '% on staff key % is refused: it can only end', TG_OP, OLD.id
            USING ERRCODE = 'restrict_violation';
    END IF;
    IF NEW.second_factor_id IS NULL AND NEW.revoked_at IS NULL THEN
        NEW.revoked_at := clock_timestamp();
        INSERT INTO marketplace_auditevent (happened_at, actor_id, party_id, action, target, detail)
        VALUES (clock_timestamp(), NULL, NULL, 'staff_key.ended', 'staff_key:' || NEW.id,
            jsonb_build_object('user', NEW.user_id, 'because', 'its second factor was taken away'));
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER keep_staff_key BEFORE UPDATE OR DELETE ON marketplace_staffkey
    FOR EACH ROW EXECUTE FUNCTION marketplace_keep_staff_key();
CREATE TRIGGER never_truncated BEFORE TRUNCATE ON marketplace_staffkey
    FOR EACH STATEMENT EXECUTE FUNCTION marketplace_refuse_change();
ALTER TABLE marketplace_staffkey ENABLE ALWAYS TRIGGER keep_staff_key;
ALTER TABLE marketplace_staffkey ENABLE ALWAYS TRIGGER never_truncated;

CREATE FUNCTION marketplace_end_staff_keys() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    WITH ended AS (
        UPDATE marketplace_staffkey SET revoked_at = clock_timestamp()
        WHERE user_id = NEW.id AND revoked_at IS NULL
        RETURNING id
    )
    INSERT INTO marketplace_auditevent (happened_at, actor_id, party_id, action, target, detail)
    SELECT clock_timestamp(), NULL, NULL, 'staff_key.ended', 'staff_key:' || id,
        jsonb_build_object('user', NEW.id, 'because', 'its person is no active staff any more')
    FROM ended;
    RETURN NULL;
END $$;
CREATE TRIGGER end_staff_keys AFTER UPDATE ON marketplace_user
    FOR EACH ROW
    WHEN ((OLD.is_staff AND OLD.is_active) AND NOT (NEW.is_staff AND NEW.is_active))
    EXECUTE FUNCTION marketplace_end_staff_keys();
ALTER TABLE marketplace_user ENABLE ALWAYS TRIGGER end_staff_keys;

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON marketplace_staffact
    FOR EACH ROW EXECUTE FUNCTION marketplace_refuse_change();
CREATE TRIGGER append_only_truncate BEFORE TRUNCATE ON marketplace_staffact
    FOR EACH STATEMENT EXECUTE FUNCTION marketplace_refuse_change();
ALTER TABLE marketplace_staffact ENABLE ALWAYS TRIGGER append_only;
ALTER TABLE marketplace_staffact ENABLE ALWAYS TRIGGER append_only_truncate;
"""

DROP = """
DROP TRIGGER append_only_truncate ON marketplace_staffact;
DROP TRIGGER append_only ON marketplace_staffact;
DROP TRIGGER end_staff_keys ON marketplace_user;
DROP FUNCTION marketplace_end_staff_keys();
DROP TRIGGER never_truncated ON marketplace_staffkey;
DROP TRIGGER keep_staff_key ON marketplace_staffkey;
DROP FUNCTION marketplace_keep_staff_key();
"""


class Migration(migrations.Migration):
    dependencies = [("marketplace", "0011_staff_keys")]

    operations = [migrations.RunSQL(RULES, DROP)]
