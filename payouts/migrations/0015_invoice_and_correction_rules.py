"""Reports do not overlap, invoices are numbered without gaps, corrections move money and make none, whoever asks.

The functions pin their search path and the triggers fire always, as those of `0002_ledger_rules` do.
"""

from django.db import migrations

RULES = """
-- A report is of its model's owner; a correction replaces one of the same model and currency; none that stand overlap.
CREATE FUNCTION payouts_check_report() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    owner bigint;
    replaced record;
    other record;
BEGIN
    SELECT owner_id INTO owner FROM marketplace_trainedmodel WHERE id = NEW.model_id FOR NO KEY UPDATE;
    IF owner IS DISTINCT FROM NEW.licensee_id THEN
        RAISE EXCEPTION 'report refused: model % is not party %''s', NEW.model_id, NEW.licensee_id
            USING ERRCODE = 'restrict_violation';
    END IF;
    IF NEW.replaces_id IS NOT NULL THEN
        SELECT model_id, currency INTO replaced FROM payouts_royaltyreport WHERE id = NEW.replaces_id;
        IF (replaced.model_id, replaced.currency) IS DISTINCT FROM (NEW.model_id, NEW.currency) THEN
            RAISE EXCEPTION 'report refused: it replaces one of another model or currency'
                USING ERRCODE = 'restrict_violation';
        END IF;
    END IF;
    SELECT r.id INTO other FROM payouts_royaltyreport r LEFT JOIN payouts_royaltyinvoice i ON i.report_id = r.id
        WHERE r.model_id = NEW.model_id AND r.currency = NEW.currency AND r.id <> NEW.id
            AND r.id IS DISTINCT FROM NEW.replaces_id
            AND r.period_start <= NEW.period_end AND r.period_end >= NEW.period_start
            AND i.status IS DISTINCT FROM 'refunded'
            AND NOT EXISTS (SELECT 1 FROM payouts_royaltyreport later WHERE later.replaces_id = r.id)
        LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'report refused: report % is of some of the same days', other.id USING ERRCODE = 'exclusion_violation';
    END IF;
    RETURN NEW;
END $$;

-- What an invoice asks for never changes, and its status goes only where it may.
CREATE FUNCTION payouts_keep_royalty_invoice() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    into_ record;
BEGIN
    IF (NEW.report_id, NEW.total_micros, NEW.currency, NEW.platform_fee_bps, NEW.issued_at, NEW.due_on, NEW.purchase_order)
        IS DISTINCT FROM
       (OLD.report_id, OLD.total_micros, OLD.currency, OLD.platform_fee_bps, OLD.issued_at, OLD.due_on, OLD.purchase_order)
    THEN
        RAISE EXCEPTION 'royalty invoice % keeps what it asks for; correct its report', OLD.id
            USING ERRCODE = 'restrict_violation';
    END IF;
    IF NEW.status <> OLD.status AND (OLD.status, NEW.status) NOT IN (
        ('open', 'paid'), ('open', 'void'), ('carried', 'paid'), ('carried', 'void'), ('paid', 'refunded'),
        ('refunded', 'paid')
    ) THEN
        RAISE EXCEPTION 'royalty invoice % does not go from % to %', OLD.id, OLD.status, NEW.status
            USING ERRCODE = 'restrict_violation';
    END IF;
    IF NEW.carried_into_id IS DISTINCT FROM OLD.carried_into_id THEN
        IF OLD.status <> 'carried' THEN
            RAISE EXCEPTION 'royalty invoice % is %; only what is carried is asked for with another', OLD.id, OLD.status
                USING ERRCODE = 'restrict_violation';
        END IF;
        SELECT i.status, i.currency, r.licensee_id INTO into_ FROM payouts_royaltyinvoice i
            JOIN payouts_royaltyreport r ON r.id = i.report_id WHERE i.id = coalesce(NEW.carried_into_id, OLD.carried_into_id);
        IF into_.currency <> NEW.currency
            OR into_.licensee_id <> (SELECT licensee_id FROM payouts_royaltyreport WHERE id = NEW.report_id)
            OR (NEW.carried_into_id IS NOT NULL AND into_.status <> 'open')
            OR (NEW.carried_into_id IS NULL AND into_.status NOT IN ('open', 'void')) THEN
            RAISE EXCEPTION 'royalty invoice % cannot be asked for with invoice %', OLD.id, NEW.carried_into_id
                USING ERRCODE = 'restrict_violation';
        END IF;
    END IF;
    RETURN NEW;
END $$;

-- What was paid is what was paid.
CREATE FUNCTION payouts_keep_payment() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF (NEW.order_id, NEW.invoice_id, NEW.currency) IS DISTINCT FROM (OLD.order_id, OLD.invoice_id, OLD.currency)
        OR (OLD.status = 'paid' AND (NEW.status, NEW.amount_micros, NEW.tax_micros, NEW.tax_rate_id, NEW.method, NEW.charge_id,
            NEW.balance_transaction_id, NEW.fee_micros, NEW.paid_at) IS DISTINCT FROM (OLD.status, OLD.amount_micros,
            OLD.tax_micros, OLD.tax_rate_id, OLD.method, OLD.charge_id, OLD.balance_transaction_id, OLD.fee_micros, OLD.paid_at))
        OR (OLD.settled_at IS NOT NULL AND NEW.settled_at IS DISTINCT FROM OLD.settled_at) THEN
        RAISE EXCEPTION 'payment % keeps what it is about', OLD.id USING ERRCODE = 'restrict_violation';
    END IF;
    IF (NEW.amount_micros, NEW.tax_micros, NEW.tax_rate_id, NEW.purchase_order, NEW.due_on) IS DISTINCT FROM
       (OLD.amount_micros, OLD.tax_micros, OLD.tax_rate_id, OLD.purchase_order, OLD.due_on)
        AND EXISTS (SELECT 1 FROM payouts_document WHERE payment_id = OLD.id) THEN
        RAISE EXCEPTION 'payment % was invoiced, and keeps what it asks for', OLD.id USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;

-- Rates of one jurisdiction do not overlap; an open-ended one may be given its last day, once.
CREATE FUNCTION payouts_check_tax_rate() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('tax:' || NEW.jurisdiction, 0));
    IF TG_OP = 'UPDATE' AND (OLD.valid_until IS NOT NULL
        OR to_jsonb(NEW) - 'valid_until' IS DISTINCT FROM to_jsonb(OLD) - 'valid_until') THEN
        RAISE EXCEPTION 'tax rate % is kept as it is; end it and make another one', OLD.id
            USING ERRCODE = 'restrict_violation';
    END IF;
    IF EXISTS (SELECT 1 FROM payouts_taxrate WHERE jurisdiction = NEW.jurisdiction AND id <> NEW.id
        AND valid_from <= coalesce(NEW.valid_until, 'infinity') AND coalesce(valid_until, 'infinity') >= NEW.valid_from) THEN
        RAISE EXCEPTION 'tax rate refused: another one of % is valid on some of its days', NEW.jurisdiction
            USING ERRCODE = 'exclusion_violation';
    END IF;
    RETURN NEW;
END $$;

-- The number is the series' next one, and its row stays locked until this is committed or gone: no gap, none twice.
CREATE FUNCTION payouts_number_document() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    NEW.year := extract(year FROM NEW.issued_on);
    INSERT INTO payouts_documentseries AS s (series, year, last_number) VALUES (NEW.kind, NEW.year, 1)
        ON CONFLICT (series, year) DO UPDATE SET last_number = s.last_number + 1
        RETURNING last_number INTO NEW.number;
    RETURN NEW;
END $$;

CREATE FUNCTION payouts_check_series() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT 1 FROM payouts_document
        WHERE kind = NEW.series AND year = NEW.year AND number = NEW.last_number) THEN
        RAISE EXCEPTION 'series %-% has no document %', NEW.series, NEW.year, NEW.last_number
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NULL;
END $$;

CREATE FUNCTION payouts_keep_series() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF (NEW.id, NEW.series, NEW.year, NEW.last_number) IS DISTINCT FROM
       (OLD.id, OLD.series, OLD.year, OLD.last_number + 1) THEN
        RAISE EXCEPTION 'series %-% goes on by one', OLD.series, OLD.year USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;

-- Who decided stays who decided; what is decided stays so.
CREATE FUNCTION payouts_decide_once() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF OLD.decided_by_id IS NOT NULL OR NEW.decided_by_id IS NULL
        OR to_jsonb(NEW) - ARRAY['status', 'decided_by_id', 'decided_at'] IS DISTINCT FROM
           to_jsonb(OLD) - ARRAY['status', 'decided_by_id', 'decided_at'] THEN
        RAISE EXCEPTION '% % is decided once, and keeps what it is about', TG_TABLE_NAME, OLD.id
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;

-- At commit: a correction's lines say the same sum before and after, its own; booked, losses and gains are as they say.
CREATE FUNCTION payouts_check_correction() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    before numeric;
    after numeric;
    gained numeric;
    lost bigint;
    gains bigint;
BEGIN
    SELECT coalesce(sum(before_micros), 0), coalesce(sum(after_micros), 0),
           coalesce(sum(after_micros - before_micros) FILTER (WHERE after_micros > before_micros), 0)
        INTO before, after, gained FROM payouts_correctionline WHERE correction_id = NEW.id;
    IF before <> NEW.amount_micros OR after <> NEW.amount_micros THEN
        RAISE EXCEPTION 'correction % of % refused: its lines sum to % before and % after', NEW.id, NEW.amount_micros, before,
            after USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.status = 'booked' THEN
        SELECT amount_micros INTO lost FROM payouts_clawback WHERE correction_id = NEW.id;
        SELECT amount_micros INTO gains FROM payouts_division WHERE corrects_id = NEW.id;
        IF lost IS DISTINCT FROM gained OR gains IS DISTINCT FROM gained THEN
            RAISE EXCEPTION 'correction % refused: % lost, % gained, % by its lines', NEW.id, lost, gains, gained
                USING ERRCODE = 'check_violation';
        END IF;
    END IF;
    RETURN NULL;
END $$;

-- As in 0005, with tax, invoices that were carried into the one that was paid, and corrections, which take nothing of the price.
CREATE OR REPLACE FUNCTION payouts_check_clawback_line() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    cause text;
    price numeric;
    pooled bigint;
    released timestamptz;
    taken numeric;
    of_pool numeric;
BEGIN
    PERFORM 1 FROM payouts_payment p JOIN payouts_clawback c ON c.payment_id = p.id WHERE c.id = NEW.clawback_id
        FOR UPDATE OF p;
    SELECT kind INTO cause FROM payouts_clawback WHERE id = NEW.clawback_id;
    IF NEW.order_line_id IS NOT NULL THEN
        SELECT l.price_micros + ceil(p.tax_micros::numeric * l.price_micros / (p.amount_micros - p.tax_micros)) INTO price
            FROM marketplace_orderline l
            JOIN payouts_payment p ON p.order_id = l.order_id JOIN payouts_clawback c ON c.payment_id = p.id
            WHERE l.id = NEW.order_line_id AND c.id = NEW.clawback_id;
    ELSE
        SELECT l.amount_micros + ceil(p.tax_micros::numeric * l.amount_micros / (p.amount_micros - p.tax_micros)) INTO price
            FROM payouts_royaltyinvoiceline l JOIN payouts_royaltyinvoice i ON i.id = l.invoice_id
            JOIN payouts_payment p ON p.invoice_id = coalesce(i.carried_into_id, i.id)
            JOIN payouts_clawback c ON c.payment_id = p.id
            WHERE l.id = NEW.invoice_line_id AND c.id = NEW.clawback_id;
    END IF;
    SELECT coalesce(sum(l.amount_micros), 0), coalesce(sum(l.pool_micros), 0) INTO taken, of_pool
        FROM payouts_clawbackline l JOIN payouts_clawback c ON c.id = l.clawback_id
        WHERE (l.order_line_id = NEW.order_line_id OR l.invoice_line_id = NEW.invoice_line_id) AND c.kind <> 'correction'
            AND NOT EXISTS (SELECT 1 FROM payouts_clawbackundo u WHERE u.clawback_id = l.clawback_id);
    IF cause = 'correction' THEN
        IF price IS NULL OR NEW.fee_micros + NEW.pool_micros + NEW.tax_micros <> 0 THEN
            RAISE EXCEPTION 'clawback refused: a correction takes from payees only' USING ERRCODE = 'check_violation';
        END IF;
    ELSIF price IS NULL OR taken + NEW.amount_micros > price THEN
        RAISE EXCEPTION 'clawback refused: % of % are taken back, % more is too much', taken, price, NEW.amount_micros
            USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.pool_micros > 0 THEN
        SELECT amount_micros, released_at INTO pooled, released FROM payouts_royaltypool
            WHERE order_line_id = NEW.order_line_id FOR UPDATE;
        IF pooled IS NULL OR released IS NOT NULL OR of_pool + NEW.pool_micros > pooled THEN
            RAISE EXCEPTION 'clawback refused: the pool of order line % has not % left', NEW.order_line_id, NEW.pool_micros
                USING ERRCODE = 'check_violation';
        END IF;
    END IF;
    RETURN NEW;
END $$;

-- As in 0012, with tax and corrections: nobody gives back more of a line than it gave, nor for another line than the clawback's, nor all of them more than it takes.
CREATE OR REPLACE FUNCTION payouts_check_reclaim() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    given bigint;
    taken numeric;
    of_line record;
    of_division record;
    reclaimed numeric;
BEGIN
    PERFORM 1 FROM payouts_payment p JOIN payouts_clawback c ON c.payment_id = p.id
        JOIN payouts_clawbackline l ON l.clawback_id = c.id WHERE l.id = NEW.clawback_line_id FOR UPDATE OF p;
    SELECT * INTO of_line FROM payouts_clawbackline WHERE id = NEW.clawback_line_id;
    SELECT d.order_line_id, coalesce(d.invoice_line_id, corrected.invoice_line_id) AS invoice_line_id, l.amount_micros
        INTO of_division FROM payouts_divisionline l JOIN payouts_division d ON d.id = l.division_id
        LEFT JOIN payouts_divisioncorrection c ON c.id = d.corrects_id
        LEFT JOIN payouts_division corrected ON corrected.id = c.division_id WHERE l.id = NEW.division_line_id;
    given := of_division.amount_micros;
    -- A royalty's division names the order line of its license beside the invoice line that it is of.
    IF of_line.invoice_line_id IS DISTINCT FROM of_division.invoice_line_id
        OR of_line.invoice_line_id IS NULL AND of_line.order_line_id IS DISTINCT FROM of_division.order_line_id THEN
        RAISE EXCEPTION 'reclaim refused: line % was not divided from what clawback line % takes back',
            NEW.division_line_id, NEW.clawback_line_id USING ERRCODE = 'check_violation';
    END IF;
    SELECT coalesce(sum(r.amount_micros), 0) INTO taken
        FROM payouts_reclaim r JOIN payouts_clawbackline l ON l.id = r.clawback_line_id
        WHERE r.division_line_id = NEW.division_line_id
            AND NOT EXISTS (SELECT 1 FROM payouts_clawbackundo u WHERE u.clawback_id = l.clawback_id);
    IF taken + NEW.amount_micros > given THEN
        RAISE EXCEPTION 'reclaim refused: line % gave %, % are taken back, % more is too much',
            NEW.division_line_id, given, taken, NEW.amount_micros USING ERRCODE = 'check_violation';
    END IF;
    SELECT coalesce(sum(amount_micros), 0) INTO reclaimed FROM payouts_reclaim
        WHERE clawback_line_id = NEW.clawback_line_id;
    IF reclaimed + NEW.amount_micros > of_line.amount_micros - of_line.fee_micros - of_line.pool_micros - of_line.tax_micros THEN
        RAISE EXCEPTION 'reclaim refused: clawback line % takes % of its payees, % more than the % they give is too much',
            NEW.clawback_line_id, of_line.amount_micros - of_line.fee_micros - of_line.pool_micros - of_line.tax_micros, NEW.amount_micros,
            reclaimed USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER report_stands_alone BEFORE INSERT ON payouts_royaltyreport
    FOR EACH ROW EXECUTE FUNCTION payouts_check_report();
CREATE TRIGGER keep_royalty_invoice BEFORE UPDATE ON payouts_royaltyinvoice
    FOR EACH ROW EXECUTE FUNCTION payouts_keep_royalty_invoice();
CREATE TRIGGER keep_payment BEFORE UPDATE ON payouts_payment FOR EACH ROW EXECUTE FUNCTION payouts_keep_payment();
CREATE TRIGGER tax_rates_apart BEFORE INSERT OR UPDATE ON payouts_taxrate
    FOR EACH ROW EXECUTE FUNCTION payouts_check_tax_rate();
CREATE TRIGGER number_document BEFORE INSERT ON payouts_document
    FOR EACH ROW EXECUTE FUNCTION payouts_number_document();
CREATE TRIGGER keep_series BEFORE UPDATE ON payouts_documentseries
    FOR EACH ROW EXECUTE FUNCTION payouts_keep_series();
CREATE CONSTRAINT TRIGGER series_has_its_document AFTER INSERT OR UPDATE ON payouts_documentseries
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION payouts_check_series();
CREATE TRIGGER decide_once BEFORE UPDATE ON payouts_divisioncorrection
    FOR EACH ROW EXECUTE FUNCTION payouts_decide_once();
CREATE TRIGGER decide_once BEFORE UPDATE ON payouts_bankreceipt FOR EACH ROW EXECUTE FUNCTION payouts_decide_once();
CREATE CONSTRAINT TRIGGER correction_adds_up AFTER INSERT OR UPDATE ON payouts_divisioncorrection
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION payouts_check_correction();
ALTER TABLE payouts_royaltyreport ENABLE ALWAYS TRIGGER report_stands_alone;
ALTER TABLE payouts_royaltyinvoice ENABLE ALWAYS TRIGGER keep_royalty_invoice;
ALTER TABLE payouts_payment ENABLE ALWAYS TRIGGER keep_payment;
ALTER TABLE payouts_taxrate ENABLE ALWAYS TRIGGER tax_rates_apart;
ALTER TABLE payouts_document ENABLE ALWAYS TRIGGER number_document;
ALTER TABLE payouts_documentseries ENABLE ALWAYS TRIGGER keep_series;
ALTER TABLE payouts_documentseries ENABLE ALWAYS TRIGGER series_has_its_document;
ALTER TABLE payouts_divisioncorrection ENABLE ALWAYS TRIGGER decide_once;
ALTER TABLE payouts_bankreceipt ENABLE ALWAYS TRIGGER decide_once;
ALTER TABLE payouts_divisioncorrection ENABLE ALWAYS TRIGGER correction_adds_up;
"""

APPEND_ONLY = ("payouts_document", "payouts_correctionline")
#: Their state moves on; the row stays.
NEVER_DELETED = (
    "payouts_royaltyinvoice",
    "payouts_payment",
    "payouts_taxrate",
    "payouts_documentseries",
    "payouts_divisioncorrection",
    "payouts_bankreceipt",
)


def _refused(table, what):
    return migrations.RunSQL(
        f"""
CREATE TRIGGER append_only BEFORE {what} ON {table} FOR EACH ROW EXECUTE FUNCTION payouts_refuse_change();
CREATE TRIGGER never_truncated BEFORE TRUNCATE ON {table}
    FOR EACH STATEMENT EXECUTE FUNCTION payouts_refuse_change();
ALTER TABLE {table} ENABLE ALWAYS TRIGGER append_only;
ALTER TABLE {table} ENABLE ALWAYS TRIGGER never_truncated;
"""
    )


class Migration(migrations.Migration):
    dependencies = [("payouts", "0014_taxes_invoices_and_corrections")]

    operations = [
        migrations.RunSQL(RULES),
        *(_refused(table, "UPDATE OR DELETE") for table in APPEND_ONLY),
        *(_refused(table, "DELETE") for table in NEVER_DELETED),
    ]
