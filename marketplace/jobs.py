"""Rows hold the work, the broker only wakes it (DESIGN §2).

    queued (from `due_at` on) → running (lease, heartbeat, attempt) → done | failed

A worker claims a row with one conditional `update()`, which also takes over an expired lease; every later write checks
`attempt`, so that a worker that was thought dead cannot write over its successor. The sweeper re-sends what was lost.
An attempt that ends by an error of ours comes back later and later, until `MAX_FAILURES` in a row; staff can `reopen` it.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, ClassVar, Self, TypeVar

from celery import current_app
from django.db import DatabaseError, close_old_connections, connection, models, transaction
from django.db.models import F, Q
from django.utils import timezone
from kombu.exceptions import ChannelError, OperationalError

from marketplace.errors import DomainError

logger = logging.getLogger(__name__)

LEASE = timedelta(seconds=20)
HEARTBEAT_SECONDS = 5.0
#: A row whose message went out this long ago without being claimed is sent again, once its queue is empty …
RESEND_AFTER = timedelta(seconds=10)
#: … or after this long, whatever else waits: a worker that is away for a night must not find a million messages.
RESEND_ANYWAY_AFTER = timedelta(minutes=10)
MAX_FAILURES = 6
FIRST_PAUSE, LONGEST_PAUSE = timedelta(seconds=10), timedelta(minutes=30)


class LostLease(Exception):
    """Another worker holds the job now; whatever this one was about to write is not written."""


class Job(models.Model):
    """Work as a row. A subclass names its task and queue; the task takes the row's id and nothing else."""

    class Status(models.TextChoices):
        QUEUED = "queued"
        RUNNING = "running"
        DONE = "done"
        FAILED = "failed"

    #: dotted name of the Celery task that does this work
    task_name: ClassVar[str]
    #: what it failed by that was no fault of its input
    reopened_codes: ClassVar[tuple[str, ...]] = ("internal",)

    status = models.CharField(max_length=10, choices=Status, default=Status.QUEUED, db_index=True)
    attempt = models.PositiveIntegerField(default=0)  # claims so far: whose write it is
    n_failures = models.PositiveIntegerField(default=0)  # attempts in a row that ended by an error of ours, or by death
    due_at = models.DateTimeField(default=timezone.now)  # not claimed before
    queued_at = models.DateTimeField(default=timezone.now)
    sent_at = models.DateTimeField(default=timezone.now)
    started_at = models.DateTimeField(null=True, blank=True)
    finished_at = models.DateTimeField(null=True, blank=True)
    lease_expires_at = models.DateTimeField(null=True, blank=True)
    progress_done = models.PositiveBigIntegerField(default=0)
    progress_total = models.PositiveBigIntegerField(default=0)
    error_code = models.CharField(max_length=60, blank=True)
    error_message = models.TextField(blank=True)
    error_pointers = models.JSONField(default=dict, blank=True)

    class Meta:
        abstract = True
        constraints = [
            models.CheckConstraint(
                condition=Q(status="running", lease_expires_at__isnull=False)
                | (~Q(status="running") & Q(lease_expires_at__isnull=True)),
                name="%(app_label)s_%(class)s_lease_iff_running",
            ),
        ]

    @property
    def is_finished(self) -> bool:
        return self.status in (self.Status.DONE, self.Status.FAILED)

    def write(self, **changes: Any) -> None:
        """Change the row, if this worker still holds it.

        Raises:
            LostLease: the lease ran out and another worker took the job.
        """
        held = type(self)._default_manager.filter(pk=self.pk, attempt=self.attempt, status=self.Status.RUNNING)
        if held.update(**changes) != 1:
            raise LostLease(f"{type(self).__name__} {self.pk} attempt {self.attempt}")
        for name, value in changes.items():
            setattr(self, name, value)

    def lock(self) -> Self:
        """Inside a transaction: hold the row, so that what is written with it is this attempt's alone.

        Raises:
            LostLease: see `write`.
        """
        held = (
            type(self)
            ._default_manager.select_for_update()
            .filter(pk=self.pk, attempt=self.attempt, status=self.Status.RUNNING)
            .first()
        )
        if held is None:
            raise LostLease(f"{type(self).__name__} {self.pk} attempt {self.attempt}")
        return held

    def finish(self) -> None:
        self.write(status=self.Status.DONE, lease_expires_at=None, finished_at=timezone.now())

    def fail(self, *, code: str, message: str, pointers: dict[str, str] | None = None) -> None:
        self.write(
            status=self.Status.FAILED,
            lease_expires_at=None,
            finished_at=timezone.now(),
            error_code=code,
            error_message=message,
            error_pointers=pointers or {},
        )

    def postpone(self, until: datetime) -> None:
        """Back to the queue, for no fault of anybody's; `resume` may bring it forward."""
        self.write(status=self.Status.QUEUED, lease_expires_at=None, due_at=until, n_failures=0)

    def progress(self, *, done: int, total: int) -> None:
        self.write(progress_done=done, progress_total=total)


J = TypeVar("J", bound=Job)


def wake(job: Job) -> None:
    """Tell a worker that the row is there, once the row is committed. A broker that is down loses nothing: the sweeper sends it again."""
    name, pk = job.task_name, job.pk
    transaction.on_commit(lambda: _send(name, pk))


def resume(job: Job) -> bool:
    """Make a postponed job due now and wake it; False if it was not waiting."""
    wall = timezone.now()
    waiting = type(job)._default_manager.filter(pk=job.pk, status=Job.Status.QUEUED)
    if not waiting.update(due_at=wall, sent_at=wall):
        return False
    wake(job)
    return True


def reopen(job: Job, *, even_refused: bool = False) -> bool:
    """Try once more what failed by an error of ours; False if it did not. What the input was refused for stays failed.

    Args:
        even_refused: a person says that what it was refused for has passed.
    """
    wall = timezone.now()
    failed = type(job)._default_manager.filter(pk=job.pk, status=Job.Status.FAILED)
    if not even_refused:
        failed = failed.filter(error_code__in=job.reopened_codes)
    if not failed.update(
        status=Job.Status.QUEUED,
        n_failures=0,
        due_at=wall,
        sent_at=wall,
        finished_at=None,
        error_code="",
        error_message="",
    ):
        return False
    wake(job)
    return True


def _send(task_name: str, pk: int) -> None:
    try:
        current_app.send_task(task_name, args=[pk], retry=False)
    except (OperationalError, ConnectionError, OSError) as error:
        logger.warning("Broker did not take the message task=%s id=%s error=%s", task_name, pk, error)


def claim(model: type[J], pk: int) -> J | None:
    """Take a queued row that is due, or an expired lease; `None` if neither, which is every second delivery of a message."""
    wall = timezone.now()
    rows = model._default_manager.filter(pk=pk)
    expired = rows.filter(status=Job.Status.RUNNING, lease_expires_at__lt=wall)
    _fail_poison(expired, wall)
    taking = {
        "status": Job.Status.RUNNING,
        "attempt": F("attempt") + 1,
        "started_at": wall,
        "lease_expires_at": wall + LEASE,
    }
    taken = rows.filter(status=Job.Status.QUEUED, due_at__lte=wall).update(**taking) or expired.update(
        n_failures=F("n_failures") + 1, **taking
    )
    if not taken:
        return None
    job = model._default_manager.get(pk=pk)
    logger.info("Claimed %s id=%s attempt=%s", model.__name__, pk, job.attempt)
    return job


def _fail_poison(expired: models.QuerySet[Any], wall: datetime) -> None:
    """A job whose worker has died at every attempt would take the next one down too, and the queue behind it."""
    if expired.filter(n_failures__gte=MAX_FAILURES - 1).update(
        status=Job.Status.FAILED,
        n_failures=F("n_failures") + 1,
        lease_expires_at=None,
        finished_at=wall,
        error_code="internal",
        error_message=f"Its worker died, or it failed, {MAX_FAILURES} times in a row. We have been told.",
    ):
        logger.error("Gave up %s: its worker died at the last of %s failures", expired.model.__name__, MAX_FAILURES)


@contextmanager
def claimed(model: type[J], pk: int) -> Iterator[J | None]:
    """Claim, keep the lease alive while the body runs, and book how it ended.

    A `DomainError` is the input's fault: the job fails with its message. Anything else may pass: the row goes back to
    the queue, each time for longer, until `MAX_FAILURES`, and the exception goes on to the worker's log.
    """
    job = claim(model, pk)
    if job is None:
        yield None
        return
    stop = threading.Event()
    beating = threading.Thread(target=_beat, args=(job, stop), name=f"lease-{pk}", daemon=True)
    beating.start()
    try:
        yield job
        if type(job)._default_manager.filter(pk=pk, attempt=job.attempt, status=Job.Status.RUNNING).exists():
            job.finish()
    except LostLease:
        logger.warning("Lease was lost %s id=%s attempt=%s", model.__name__, pk, job.attempt)
    except DomainError as error:
        _refuse(job, error)
    except Exception as error:
        _give_back(job, error)
        raise
    finally:
        stop.set()
        beating.join()


def _refuse(job: Job, error: DomainError) -> None:
    try:
        job.fail(code=error.code, message=error.message, pointers=error.pointers)
        logger.info("Refused %s id=%s code=%s", type(job).__name__, job.pk, error.code)
    except LostLease:
        logger.warning("Lease was lost while refusing id=%s attempt=%s", job.pk, job.attempt)


def _give_back(job: Job, error: Exception) -> None:
    n_failures = job.n_failures + 1
    try:
        if n_failures >= MAX_FAILURES:
            job.fail(
                code="internal",
                message=f"It failed {n_failures} times in a row; the last error was {type(error).__name__}. We have been told.",
            )
        else:
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 4 ** (n_failures - 1))
            job.write(
                status=Job.Status.QUEUED,
                lease_expires_at=None,
                n_failures=n_failures,
                due_at=timezone.now() + pause,
            )
    except LostLease:
        logger.warning("Lease was lost while failing id=%s attempt=%s", job.pk, job.attempt)


def _beat(job: Job, stop: threading.Event) -> None:
    """Extend the lease until told to stop; a lost lease is noticed by the worker's next write.

    A database that is away for a moment costs one beat, not the lease.
    """
    try:
        while not stop.wait(HEARTBEAT_SECONDS):
            close_old_connections()
            try:
                extended = (
                    type(job)
                    ._default_manager.filter(pk=job.pk, attempt=job.attempt, status=Job.Status.RUNNING)
                    .update(lease_expires_at=timezone.now() + LEASE)
                )
            except DatabaseError as error:
                logger.warning("Heartbeat failed id=%s attempt=%s error=%s", job.pk, job.attempt, type(error).__name__)
                connection.close()
                continue
            if not extended:
                return
    finally:
        connection.close()  # this thread's own


def sweep() -> int:
    """Send again every row that waits without a worker; returns how many."""
    wall = timezone.now()
    sent = 0
    for model in job_models():
        rows = model._default_manager.filter(sent_at__lt=wall - RESEND_AFTER)
        waiting = Q(status=Job.Status.QUEUED, due_at__lte=wall)
        if rows.filter(waiting).exists() and not _is_queue_empty(model.task_name):
            waiting &= Q(sent_at__lt=wall - RESEND_ANYWAY_AFTER)
        waiting |= Q(status=Job.Status.RUNNING, lease_expires_at__lt=wall)
        for pk in rows.filter(waiting).order_by("pk").values_list("pk", flat=True)[:1000]:
            model._default_manager.filter(pk=pk).update(sent_at=wall)
            _send(model.task_name, pk)
            sent += 1
    return sent


def _is_queue_empty(task_name: str) -> bool:
    """Whether nothing waits in the broker for this task's workers, so that what waits in rows has been lost or held back."""
    queue = current_app.amqp.router.route({}, task_name)["queue"].name
    try:
        with current_app.connection_for_read() as link:
            return bool(link.default_channel.queue_declare(queue, passive=True).message_count == 0)
    except ChannelError:  # Redis keeps no list that is empty
        return True
    except (OperationalError, ConnectionError, OSError) as error:
        logger.warning("Broker did not answer queue=%s error=%s", queue, error)
        return True


def job_models() -> list[type[Job]]:
    """Every concrete job, in a fixed order."""
    from django.apps import apps

    return sorted((m for m in apps.get_models() if issubclass(m, Job)), key=lambda m: m._meta.label)
