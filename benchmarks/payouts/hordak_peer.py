"""django-hordak doing what ledger.py does, in its own virtual environment; ledger.py starts this.

    python benchmarks/payouts/hordak_peer.py URL

Reads one command a line from standard input (`two N`, `batch N SIZE`, `bulk N SIZE`, `wide N LEGS`, `hot N`, `changes`), answers each with JSON
on a line: {"seconds": …, "cpu": …}. Each is what its documentation does, in bulk where Django has a bulk form.
"""

import json
import sys
import time
from urllib.parse import urlsplit

import django
from django.conf import settings

URL = urlsplit(sys.argv[1])
settings.configure(
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": URL.path.strip("/"),
            "USER": URL.username,
            "HOST": URL.hostname,
            "PORT": URL.port,
        }
    },
    INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "mptt", "djmoney", "hordak"],
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    USE_TZ=True,
    SECRET_KEY="-",  # noqa: S106 - nothing is signed with it
    DEFAULT_CURRENCY="USD",
    CURRENCIES=["USD"],
    HORDAK_INTERNAL_CURRENCY="USD",
)
django.setup()

from django.core.management import call_command  # noqa: E402
from django.db import DatabaseError, connection, transaction  # noqa: E402
from hordak.models import Account, AccountType, Leg, Transaction  # noqa: E402
from moneyed import Money  # noqa: E402


def accounts(n: int) -> list[Account]:
    found = list(Account.objects.order_by("pk")[:n])
    while len(found) < n:
        code = f"{len(found):06}"
        found.append(Account.objects.create(name=code, code=code, type=AccountType.asset, currencies=["USD"]))
    return found


def one(debit: Account, credit: Account) -> None:
    amount = Money("1.00", "USD")
    entry = Transaction.objects.create()
    Leg.objects.bulk_create(
        [Leg(transaction=entry, account=debit, debit=amount), Leg(transaction=entry, account=credit, credit=amount)]
    )


def two(n: int) -> None:
    debit, credit = accounts(2)
    for _ in range(n):
        with transaction.atomic():
            one(debit, credit)


def batch(n: int, size: int) -> None:
    """As its documentation makes entries, many in one transaction."""
    debit, credit = accounts(2)
    for _ in range(n):
        with transaction.atomic():
            for _ in range(size):
                one(debit, credit)


def bulk(n: int, size: int) -> None:
    """The same by Django's bulk forms of both tables."""
    debit, credit = accounts(2)
    amount = Money("1.00", "USD")
    for _ in range(n):
        with transaction.atomic():
            entries = Transaction.objects.bulk_create(Transaction() for _ in range(size))
            Leg.objects.bulk_create(
                leg
                for entry in entries
                for leg in (
                    Leg(transaction=entry, account=debit, debit=amount),
                    Leg(transaction=entry, account=credit, credit=amount),
                )
            )


def wide(n: int, legs: int) -> None:
    source, *payees = accounts(legs)
    for _ in range(n):
        with transaction.atomic():
            entry = Transaction.objects.create()
            rows = [Leg(transaction=entry, account=source, debit=Money(legs - 1, "USD"))]
            rows += [Leg(transaction=entry, account=payee, credit=Money(1, "USD")) for payee in payees]
            Leg.objects.bulk_create(rows)


def changes() -> dict[str, str]:
    """What the database says to an UPDATE and a DELETE of a posted entry; all of it is undone."""
    debit, credit = accounts(2)
    with transaction.atomic():
        one(debit, credit)
    said = {}
    for name, statement in (
        ("UPDATE", "UPDATE hordak_leg SET account_id = (SELECT max(id) FROM hordak_account)"),
        ("DELETE", "DELETE FROM hordak_leg WHERE transaction_id = (SELECT max(transaction_id) FROM hordak_leg)"),
    ):
        try:
            with transaction.atomic(), connection.cursor() as cursor:
                cursor.execute(statement)
                cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
                said[name] = f"accepted, {cursor.rowcount} rows" if name == "UPDATE" else "accepted"
                transaction.set_rollback(True)
        except DatabaseError as error:
            said[name] = f"refused: {str(error).splitlines()[0]}"
    return said


call_command("migrate", verbosity=0)
accounts(1_000)
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    name, *arguments = line.split()
    started, cpu = time.perf_counter(), time.process_time()
    told = {"two": two, "batch": batch, "bulk": bulk, "wide": wide, "changes": changes}[name](*map(int, arguments))
    took = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    print(json.dumps(took | (told or {})), flush=True)
