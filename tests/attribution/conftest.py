"""A trainer with a license, and the workers' tasks run in this process, one message at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from django.apps import apps

from attribution import tasks
from marketplace.jobs import Job
from marketplace.models import DatasetVersion, License
from tests.factories.attribution import published_clouds
from tests.factories.marketplace import LicenseFactory


@pytest.fixture(autouse=True)
def small_jobs(settings: Any) -> None:
    settings.ATTRIBUTION_BUDGET = 40.0
    settings.ATTRIBUTION_THREADS = 1
    torch.set_num_threads(1)


@pytest.fixture
def version(alice: Any, bob: Any) -> DatasetVersion:
    return published_clouds({alice: 40, bob: 24}, labellers={bob: 50})


@pytest.fixture
def license(version: DatasetVersion, carol: Any) -> License:
    return LicenseFactory(licensee=carol, version=version)


@pytest.fixture
def work() -> Callable[[], int]:
    """Do what the attribution workers would, until no row is queued; returns how many messages that took."""

    def until_idle() -> int:
        done = 0
        while waiting := _queued():
            for model, pk in waiting:
                getattr(tasks, model.task_name.rpartition(".")[2])(pk)
                done += 1
            assert done < 200, "the jobs wake each other for ever"
        return done

    return until_idle


def _queued() -> list[tuple[type[Job], int]]:
    from django.utils import timezone

    models = [m for m in apps.get_app_config("attribution").get_models() if issubclass(m, Job)]
    due = {"status": Job.Status.QUEUED, "due_at__lte": timezone.now()}
    return [
        (model, pk)
        for model in models
        for pk in model.objects.filter(**due).order_by("pk").values_list("pk", flat=True)
    ]
