from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.db import connections

from tests.stories.running import Story, running_story


@pytest.fixture
def db(django_db_setup: None) -> None:
    """Here no transaction around the test: a story has a database of its own. The name alone makes the template be there."""


@pytest.fixture
def story(
    db: None, django_db_blocker: Any, tmp_path_factory: pytest.TempPathFactory, media: Path, settings: Any
) -> Iterator[Story]:
    var = tmp_path_factory.mktemp("story")
    default = settings.STORAGES["default"] | {"OPTIONS": {"location": str(var / "media")}}
    settings.STORAGES = settings.STORAGES | {"default": default}
    with django_db_blocker.unblock(), running_story(var, connections["default"].settings_dict["NAME"]) as running:
        for name, value in running.site.environment.stripe.items():
            setattr(settings, name, value)
        yield running
