from datetime import UTC, datetime, timedelta

import pytest
from django.db import IntegrityError, transaction
from django.utils import timezone

from marketplace import clock
from marketplace.models import ClockOffset

SECOND = timedelta(seconds=1)


def test_business_time_is_wall_time_until_it_is_moved(db):
    assert abs(clock.now() - timezone.now()) < SECOND
    assert clock.now().tzinfo is UTC
    assert clock.today() == clock.now().date()


def test_the_demo_moves_it_forward_and_further(db):
    reached = clock.advance(timedelta(days=30))
    clock.advance(timedelta(hours=1))

    assert abs(reached - timezone.now() - timedelta(days=30)) < SECOND
    assert abs(clock.now() - timezone.now() - timedelta(days=30, hours=1)) < SECOND
    assert ClockOffset.objects.count() == 1


def test_it_never_goes_back(db):
    with pytest.raises(ValueError, match="cannot go back"):
        clock.advance(-SECOND)
    assert not ClockOffset.objects.exists()


def test_in_production_it_is_the_wall_clock_whatever_the_table_says(db, settings, django_assert_num_queries):
    clock.advance(timedelta(days=365))
    settings.RESIDUAL_MODE = "production"

    with django_assert_num_queries(0):
        assert abs(clock.now() - datetime.now(UTC)) < SECOND
    with pytest.raises(RuntimeError, match="demo"):
        clock.advance(SECOND)


def test_there_is_one_clock(db):
    with pytest.raises(IntegrityError), transaction.atomic():
        ClockOffset.objects.create(pk=2, seconds=5)
