"""The Celery application: tasks live in each package's `tasks.py`; JSON ids are all that travels."""

import os

from celery import Celery

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "portal.settings")

app = Celery("residual")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
