"""Each proof of the books: asked for, carried out, and kept with what it found."""

import logging

from django.db import transaction

from marketplace import clock, jobs
from marketplace.jobs import Job
from marketplace.models import User
from marketplace.services import audit
from payouts.models import BooksProof, ProofFinding
from payouts.services import proofs

logger = logging.getLogger(__name__)


@transaction.atomic
def request_proof(*, key: str, user: User | None = None) -> BooksProof:
    """Ask for a proof of all books; the same key asks once."""
    proof, is_new = BooksProof.objects.get_or_create(key=key, defaults={"requested_by": user})
    if is_new:
        jobs.wake(proof)
        if user is not None:
            audit.record(actor=user, action="proof.requested", target=f"proof:{proof.pk}")
    return proof


def request_daily_proof() -> BooksProof:
    """One for each business day, however often beat calls."""
    return request_proof(key=f"day:{clock.today()}")


def execute_proof(proof: BooksProof) -> None:
    """Derive every invariant again and keep the findings; harmless to run again.

    Raises:
        LostLease: another worker has taken it over; nothing was kept.
    """
    began_at = clock.now()
    books = proofs.check_books()
    with transaction.atomic():
        proof.lock()
        ProofFinding.objects.bulk_create(
            (ProofFinding(proof=proof, code=one.code, detail=one.detail) for one in books.findings), batch_size=500
        )
        proof.write(covers_until=began_at, n_findings=books.n_findings, checked=books.checked)
    for finding in books.findings:
        logger.error("The books are wrong %s", finding)
    logger.info("Proved the books proof=%s findings=%s", proof.pk, books.n_findings)


def latest_proof() -> BooksProof | None:
    """The last one that came to an end."""
    return BooksProof.objects.filter(status=Job.Status.DONE, n_findings__isnull=False).first()
