import os
import subprocess
import sys
from pathlib import Path

import pytest
from django.apps import apps
from django.conf import settings
from django.test import override_settings

from payouts.approval_limits import read_limits
from payouts.apps import _keep_approval_limits
from payouts.models import ApprovalLimit
from payouts.services.plans import approval_above_micros

MICROS = 1_000_000


def test_one_number_is_every_currencys_and_a_named_one_its_own() -> None:
    assert read_limits("10000") == {"USD": 10_000, "EUR": 10_000, "GBP": 10_000, "JPY": 10_000}
    assert read_limits("USD=10000, EUR=9000,GBP=8000 ,JPY=1500000") == {
        "USD": 10_000,
        "EUR": 9_000,
        "GBP": 8_000,
        "JPY": 1_500_000,
    }
    assert read_limits("10000,JPY=1500000") == read_limits("10000") | {"JPY": 1_500_000}
    assert read_limits("USD=0") == dict.fromkeys(["USD", "EUR", "GBP", "JPY"], 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'' is no limit"),
        ("10000,", "'' is no limit"),
        ("10.000", "'10.000' is no limit"),
        ("-1", "'-1' is no limit"),
        ("1e4", "'1e4' is no limit"),
        ("=5", "'=5' is no limit"),
        ("USD=", "'USD=' is no limit"),
        ("USD=٥", "'USD=٥' is no limit"),
        ("USD=1000000000001", "is no limit"),
        ("USD:10000", "'USD:10000' is no limit"),
        ("usd=10000", "No balance is held in 'usd', only in USD, EUR, GBP, JPY"),
        ("CHF=1", "No balance is held in 'CHF'"),
        ("USD=1,USD=1", "Two limits for USD"),
        ("1,2", "Two limits for every other currency"),
    ],
)
def test_what_is_no_limit_says_how_one_is_written(text: str, said: str) -> None:
    with pytest.raises(ValueError, match="Write whole units: 10000 for every currency") as refused:
        read_limits(text)

    assert said in str(refused.value)


def test_a_wrong_setting_stops_the_start() -> None:
    environment = os.environ | {"PAYOUT_RUN_APPROVAL_ABOVE": "USD=ten", "DJANGO_SETTINGS_MODULE": "portal.settings"}
    done = subprocess.run(
        [sys.executable, "-c", "import django; django.setup()"],
        env=environment,
        cwd=Path(settings.BASE_DIR),
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode != 0
    assert "ImproperlyConfigured: PAYOUT_RUN_APPROVAL_ABOVE: 'USD=ten' is no limit." in done.stderr


def keep() -> list[tuple[str, int]]:
    _keep_approval_limits(apps.get_app_config("payouts"), using="default")  # type: ignore[arg-type]
    return list(ApprovalLimit.objects.order_by("pk").values_list("currency", "above_micros"))


def test_migrate_writes_down_what_has_changed_by_currency(db: None) -> None:
    """As of a database whose one limit was of every currency, and the setting that meant it."""
    ApprovalLimit.objects.create(above_micros=9 * MICROS)
    before = ApprovalLimit.objects.count()
    with override_settings(PAYOUT_RUN_APPROVAL_ABOVE=read_limits("9")):
        assert len(keep()) == before
        assert approval_above_micros("JPY") == 9 * MICROS
    with override_settings(PAYOUT_RUN_APPROVAL_ABOVE=read_limits("9,JPY=1500")):
        assert approval_above_micros("JPY") == 9 * MICROS  # raised, it holds after the next migration
        assert keep()[before:] == [("JPY", 1_500 * MICROS)] == keep()[before:]
        assert (approval_above_micros("JPY"), approval_above_micros("USD")) == (1_500 * MICROS, 9 * MICROS)
    with override_settings(PAYOUT_RUN_APPROVAL_ABOVE=read_limits("9,JPY=1")):
        assert approval_above_micros("JPY") == MICROS  # lowered, at once
