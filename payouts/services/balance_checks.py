"""Kept balances against their postings, a part at every look, so that all of them are seen again and again."""

import logging

from django.db import connection

from payouts import ledger
from payouts.models import BalanceCheck

logger = logging.getLogger(__name__)

#: How many accounts one look takes; the next look goes on behind them.
ACCOUNTS = 5_000

_CHECK = f"""
SELECT s.account_id, a.code, s.up_to, s.balance_micros, coalesce(earlier.balance_micros, 0) + coalesce((
    SELECT sum(amount_micros) FROM {ledger.postings_between("s.account_id", "coalesce(earlier.up_to, 0)", "s.up_to")}
), 0)
FROM (
    SELECT DISTINCT account_id FROM payouts_balancesnapshot WHERE account_id > %(after)s
    ORDER BY account_id LIMIT %(accounts)s
) chosen
JOIN LATERAL (
    SELECT * FROM payouts_balancesnapshot WHERE account_id = chosen.account_id ORDER BY up_to DESC LIMIT 2
) s ON true
JOIN payouts_account a ON a.id = s.account_id
LEFT JOIN LATERAL (
    SELECT up_to, balance_micros FROM payouts_balancesnapshot
    WHERE account_id = s.account_id AND up_to < s.up_to ORDER BY up_to DESC LIMIT 1
) earlier ON true
ORDER BY s.account_id, s.up_to
"""  # noqa: S608


def check_balances(*, accounts: int = ACCOUNTS) -> BalanceCheck:
    """Sum up again the latest snapshots of the next accounts, each from the one before it, and keep what was found.

    A snapshot is checked when it is among its account's last two; `check_ledger` proves all of them.
    """
    last = BalanceCheck.objects.first()
    after = last.up_to_account if last is not None else 0
    with connection.cursor() as cursor:
        cursor.execute(_CHECK, {"after": after, "accounts": accounts})
        rows = cursor.fetchall()
    seen = {row[0] for row in rows}
    wrong = [
        f"{code} up to posting {up_to}: {kept} is kept, the postings sum to {int(summed)}"
        for _, code, up_to, kept, summed in rows
        if kept != int(summed)
    ]
    check = BalanceCheck.objects.create(
        after_account=after,
        up_to_account=max(seen) if len(seen) == accounts else 0,
        n_checked=len(rows),
        n_wrong=len(wrong),
        findings=wrong[: BalanceCheck.KEPT_FINDINGS],
    )
    for finding in wrong:
        logger.error("A kept balance is wrong %s", finding)
    logger.info("Checked balances=%s wrong=%s after=%s", len(rows), len(wrong), after)
    return check
