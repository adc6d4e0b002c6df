from datetime import timedelta
from threading import Barrier, Event, Thread

import pytest
from django.db import DatabaseError, IntegrityError, connection, transaction
from django.utils import timezone
from kombu.exceptions import OperationalError

from marketplace import jobs
from marketplace.errors import InvalidInput
from marketplace.jobs import Job, LostLease
from marketplace.models import Attestation, DatasetVersion, Upload
from tests.factories.marketplace import DatasetFactory


def make_upload(**fields):
    dataset = DatasetFactory()
    return Upload.objects.create(
        version=DatasetVersion.objects.create(dataset=dataset, number=dataset.versions.count() + 1),
        uploaded_by=dataset.owner.user,
        filename="digits.csv",
        format="csv",
        size_bytes=1,
        sha256="0" * 64,
        file_key="uploads/x",
        mapping={},
        **fields,
    )


@pytest.fixture
def upload(db):
    return make_upload()


@pytest.fixture
def sent(monkeypatch):
    """What went to the broker."""
    messages = []
    monkeypatch.setattr(jobs.current_app, "send_task", lambda name, args, **options: messages.append((name, args)))
    return messages


def expire_lease(job):
    Upload.objects.filter(pk=job.pk).update(lease_expires_at=timezone.now() - timedelta(seconds=1))


def make_due(job):
    Upload.objects.filter(pk=job.pk).update(due_at=timezone.now() - timedelta(seconds=1))


def test_a_claimed_row_has_a_lease_and_counts_its_attempt(upload):
    job = jobs.claim(Upload, upload.pk)

    assert (job.status, job.attempt) == (Job.Status.RUNNING, 1)
    assert timedelta(0) < job.lease_expires_at - timezone.now() <= jobs.LEASE
    assert jobs.claim(Upload, upload.pk) is None  # a second delivery of the message


def test_an_expired_lease_is_taken_over_by_the_next(upload):
    jobs.claim(Upload, upload.pk)
    expire_lease(upload)

    assert jobs.claim(Upload, upload.pk).attempt == 2


@pytest.mark.parametrize("status", [Job.Status.DONE, Job.Status.FAILED])
def test_what_is_over_is_never_claimed(upload, status):
    Upload.objects.filter(pk=upload.pk).update(status=status)

    assert jobs.claim(Upload, upload.pk) is None
    assert Upload.objects.get().is_finished


def test_two_workers_at_once_get_one_claim(committed_db):
    upload, barrier, claims = make_upload(), Barrier(4), []

    def work():
        barrier.wait()
        claims.append(jobs.claim(Upload, upload.pk))
        connection.close()

    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [job.attempt for job in claims if job] == [1]
    assert len(claims) == 4


def test_whoever_lost_the_lease_writes_nothing(upload):
    slow = jobs.claim(Upload, upload.pk)
    expire_lease(upload)
    quick = jobs.claim(Upload, upload.pk)

    for late in (slow.finish, lambda: slow.progress(done=1, total=2), lambda: slow.fail(code="x", message="y")):
        with pytest.raises(LostLease):
            late()
    with pytest.raises(LostLease), transaction.atomic():
        slow.lock()

    assert quick.lock().pk == upload.pk
    quick.finish()
    found = Upload.objects.get()
    assert (found.status, found.attempt, found.progress_done, found.error_code) == (Job.Status.DONE, 2, 0, "")
    assert found.lease_expires_at is None


def test_a_body_that_ends_is_done(upload):
    with jobs.claimed(Upload, upload.pk) as job:
        job.progress(done=3, total=4)

    found = Upload.objects.get()
    assert (found.status, found.progress_done, found.progress_total) == (Job.Status.DONE, 3, 4)
    assert found.finished_at is not None and found.lease_expires_at is None


def test_a_second_delivery_has_nothing_to_do(upload):
    with jobs.claimed(Upload, upload.pk), jobs.claimed(Upload, upload.pk) as second:
        assert second is None


def test_a_refusal_is_the_inputs_fault_and_final(upload):
    with jobs.claimed(Upload, upload.pk):
        raise InvalidInput("Row 70,000 has 66 fields.", pointers={"/file": "row 70,000"})

    found = Upload.objects.get()
    assert (found.status, found.error_code, found.error_message, found.error_pointers) == (
        Job.Status.FAILED,
        "invalid_input",
        "Row 70,000 has 66 fields.",
        {"/file": "row 70,000"},
    )


def test_what_may_pass_is_tried_again_later_and_later_and_not_for_ever(upload):
    pauses = []
    for failure in range(1, jobs.MAX_FAILURES + 1):
        with pytest.raises(ConnectionError), jobs.claimed(Upload, upload.pk):
            raise ConnectionError("storage is away")
        found = Upload.objects.get()
        assert (found.attempt, found.n_failures) == (failure, failure if failure < jobs.MAX_FAILURES else failure - 1)
        assert found.status == (Job.Status.QUEUED if failure < jobs.MAX_FAILURES else Job.Status.FAILED)
        if not found.is_finished:
            pauses.append((found.due_at - timezone.now()).total_seconds())
            assert jobs.claim(Upload, upload.pk) is None  # whoever else sends its message
            make_due(upload)

    assert pauses == pytest.approx([10, 40, 160, 640, 1800], abs=5)
    assert (found.error_code, "ConnectionError" in found.error_message) == ("internal", True)
    assert "storage is away" not in found.error_message  # our inside is not the uploader's to read


def test_a_job_that_kills_its_worker_every_time_is_given_up(upload):
    for attempt in range(1, jobs.MAX_FAILURES + 1):
        assert jobs.claim(Upload, upload.pk).attempt == attempt
        expire_lease(upload)

    assert jobs.claim(Upload, upload.pk) is None
    found = Upload.objects.get()
    assert (found.status, found.error_code, found.lease_expires_at) == (Job.Status.FAILED, "internal", None)
    assert f"{jobs.MAX_FAILURES} times in a row" in found.error_message


def test_waiting_is_no_failure_and_is_not_interrupted(upload, sent, django_capture_on_commit_callbacks):
    for _ in range(2 * jobs.MAX_FAILURES):
        with jobs.claimed(Upload, upload.pk) as job:
            job.postpone(timezone.now() + timedelta(days=1))
        assert jobs.claim(Upload, upload.pk) is None  # a stray message
        with django_capture_on_commit_callbacks(execute=True):
            assert jobs.resume(upload)

    assert len(sent) == 2 * jobs.MAX_FAILURES
    job = jobs.claim(Upload, upload.pk)
    assert (job.n_failures, jobs.resume(upload)) == (0, False)
    expire_lease(upload)  # the one death of a job that was claimed often
    assert jobs.claim(Upload, upload.pk).n_failures == 1


def test_what_failed_by_our_fault_can_be_tried_again_and_a_refusal_cannot(
    upload, sent, django_capture_on_commit_callbacks
):
    refused = make_upload()
    with jobs.claimed(Upload, refused.pk):
        raise InvalidInput("It is empty.")
    job = jobs.claim(Upload, upload.pk)
    assert not jobs.reopen(upload)
    job.fail(code="internal", message="It failed.")

    with django_capture_on_commit_callbacks(execute=True):
        assert [jobs.reopen(upload), jobs.reopen(upload), jobs.reopen(refused)] == [True, False, False]

    assert [args for _, args in sent] == [[upload.pk]]
    again = jobs.claim(Upload, upload.pk)
    assert (again.attempt, again.n_failures, again.error_code, again.finished_at) == (2, 0, "", None)


def test_a_refusal_after_the_lease_was_lost_is_the_successors_to_tell(upload):
    with jobs.claimed(Upload, upload.pk):
        expire_lease(upload)
        jobs.claim(Upload, upload.pk)
        raise InvalidInput("It is empty.")

    assert (Upload.objects.get().status, Upload.objects.get().error_code) == (Job.Status.RUNNING, "")


def test_a_body_whose_lease_was_lost_ends_quietly_and_changes_nothing(upload):
    with jobs.claimed(Upload, upload.pk) as job:
        expire_lease(upload)
        jobs.claim(Upload, upload.pk)
        job.progress(done=1, total=1)
        raise AssertionError("not reached")

    found = Upload.objects.get()
    assert (found.status, found.attempt, found.progress_done) == (Job.Status.RUNNING, 2, 0)


def test_the_lease_of_a_living_worker_goes_on(committed_db, monkeypatch):
    upload = make_upload()
    monkeypatch.setattr(jobs, "HEARTBEAT_SECONDS", 0.05)

    with jobs.claimed(Upload, upload.pk) as job:
        first = job.lease_expires_at
        expire_lease(upload)
        for _ in range(100):
            if Upload.objects.get(pk=upload.pk).lease_expires_at > first:
                break
            Event().wait(0.05)
        assert Upload.objects.get(pk=upload.pk).lease_expires_at > first

    assert Upload.objects.get(pk=upload.pk).status == Job.Status.DONE


def test_a_database_that_is_away_for_a_moment_costs_a_beat_and_not_the_lease(committed_db, monkeypatch):
    upload, beats = make_upload(), []
    monkeypatch.setattr(jobs, "HEARTBEAT_SECONDS", 0.05)
    real = jobs.close_old_connections

    def drop_the_connection():
        real()
        beats.append(1)
        if len(beats) == 1:
            with connection.cursor() as cursor, pytest.raises(DatabaseError):
                cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
            connection.connection.close()  # Django has not noticed: the next statement fails

    monkeypatch.setattr(jobs, "close_old_connections", drop_the_connection)
    with jobs.claimed(Upload, upload.pk) as job:
        first = job.lease_expires_at
        for _ in range(100):
            if Upload.objects.get(pk=upload.pk).lease_expires_at > first:
                break
            Event().wait(0.05)
        assert Upload.objects.get(pk=upload.pk).lease_expires_at > first
        assert len(beats) > 1


def test_a_message_goes_out_only_with_the_row(upload, sent, django_capture_on_commit_callbacks):
    with django_capture_on_commit_callbacks(execute=True):
        jobs.wake(upload)
        assert sent == []

    assert sent == [("marketplace.tasks.ingest_upload", [upload.pk])]


def test_a_broker_that_is_away_loses_nothing(upload, monkeypatch, django_capture_on_commit_callbacks):
    def refuse(*args, **options):
        raise OperationalError("broker is away")

    monkeypatch.setattr(jobs.current_app, "send_task", refuse)
    with django_capture_on_commit_callbacks(execute=True):
        jobs.wake(upload)

    assert Upload.objects.get().status == Job.Status.QUEUED


def test_the_sweeper_sends_again_what_nobody_works_on(db, sent):
    lost, fresh, dead, alive, over, later = (make_upload() for _ in range(6))
    jobs.claim(Upload, dead.pk)
    expire_lease(dead)
    jobs.claim(Upload, alive.pk)
    Upload.objects.filter(pk=over.pk).update(status=Job.Status.DONE)
    Upload.objects.filter(pk=later.pk).update(due_at=timezone.now() + timedelta(hours=1))
    age(Upload.objects.exclude(pk=fresh.pk), jobs.RESEND_AFTER)

    assert jobs.sweep() == 2
    assert [args for _, args in sent] == [[lost.pk], [dead.pk]]
    assert jobs.sweep() == 0  # each was just sent


def test_the_sweeper_does_not_fill_a_queue_that_is_not_empty(db, sent, celery_queue):
    """A night without a worker: messages must not pile up, a tenth of a minute after another."""
    waiting, forgotten, dead = (make_upload() for _ in range(3))
    jobs.claim(Upload, dead.pk)
    expire_lease(dead)
    age(Upload.objects.filter(pk__in=[waiting.pk, dead.pk]), jobs.RESEND_AFTER)
    age(Upload.objects.filter(pk=forgotten.pk), jobs.RESEND_ANYWAY_AFTER)
    celery_queue.put("somebody else's message")

    jobs.sweep()
    assert [args for _, args in sent] == [[forgotten.pk], [dead.pk]]

    celery_queue.clear()
    jobs.sweep()
    assert [args for _, args in sent] == [[forgotten.pk], [dead.pk], [waiting.pk]]


def age(rows, by):
    rows.update(sent_at=timezone.now() - by - timedelta(seconds=1))


@pytest.fixture
def celery_queue():
    """The broker's queue of the ingest worker."""
    with jobs.current_app.connection_for_write() as link, link.SimpleQueue("ingest") as queue:
        queue.clear()
        yield queue
        queue.clear()


def test_a_row_is_running_exactly_while_it_has_a_lease(upload):
    for wrong in ({"status": "running"}, {"lease_expires_at": timezone.now()}):
        with pytest.raises(IntegrityError), transaction.atomic():
            Upload.objects.filter(pk=upload.pk).update(**wrong)


def test_every_job_is_known_to_the_sweeper_and_names_its_task():
    found = jobs.job_models()

    assert Upload in found and Attestation not in found
    assert all(model.task_name.partition(".")[0] == model._meta.app_label for model in found)
