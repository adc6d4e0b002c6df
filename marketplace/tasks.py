from celery import shared_task

from marketplace import jobs
from marketplace.models import Invitation, Upload
from marketplace.services import invitations, versions


@shared_task(acks_late=True)
def ingest_upload(upload_id: int) -> None:
    """Harmless to run twice, at once, or after a crash."""
    with jobs.claimed(Upload, upload_id) as upload:
        if upload:
            versions.ingest(upload)
    versions.discard_finished_files()


@shared_task(acks_late=True)
def send_invitation(invitation_id: int) -> None:
    """A worker that dies between the mail and its note sends it twice; nobody is left without it."""
    with jobs.claimed(Invitation, invitation_id) as invitation:
        if invitation:
            invitations.send_invitation(invitation)


@shared_task
def sweep_jobs() -> None:
    """Wake again what waits without a worker, and remove uploaded files that nobody needs any more."""
    jobs.sweep()
    versions.discard_finished_files()
