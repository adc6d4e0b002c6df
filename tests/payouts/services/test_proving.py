"""Proofs of the books that are asked for, carried out and kept."""

import logging
from datetime import timedelta
from typing import Any

import pytest
from django.conf import settings
from django.db import DatabaseError, transaction

from marketplace import clock
from marketplace.models import AuditEvent
from payouts import ledger, tasks
from payouts.models import BooksProof, JournalEntry, ProofFinding
from payouts.services import proofs
from payouts.services.proofs import Finding, check_books
from payouts.services.proving import latest_proof, request_proof
from tests.factories.marketplace import OrderFactory, UserFactory
from tests.factories.payouts import sell


def plant(n: int) -> None:
    """So many clearing accounts that are not empty."""
    for number in range(n):
        postings = {f"clearing:upfront:{900 + number}:USD": -5, "revenue:platform_fee:USD": 5}
        ledger.post(key=f"planted {number}", kind=JournalEntry.Kind.UPFRONT, postings=postings)


@pytest.mark.as_owner
def test_the_books_are_proved_each_business_day_and_what_was_found_is_kept(db: Any, caplog: Any) -> None:
    sell(OrderFactory())
    before = clock.now()
    for _ in range(2):
        tasks.request_daily_proof()
    tasks.execute_proof(BooksProof.objects.get().pk)

    proof = BooksProof.objects.get()
    assert (proof.status, proof.n_findings, proof.key) == ("done", 0, f"day:{before.date()}")
    assert before <= proof.covers_until <= clock.now() and proof.checked["entries"] == JournalEntry.objects.count()
    assert latest_proof() == proof

    clock.advance(timedelta(days=1))
    plant(1)
    tasks.request_daily_proof()
    with caplog.at_level(logging.ERROR):
        tasks.execute_proof(BooksProof.objects.first().pk)

    latest = latest_proof()
    assert latest is not None and latest.n_findings == 1 and latest != proof
    assert [str(finding) for finding in latest.findings.all()] == [
        "clearing_not_empty: clearing:upfront:900:USD has 5 left"
    ]
    assert "clearing_not_empty" in caplog.text
    with pytest.raises(DatabaseError, match="append-only"), transaction.atomic():
        ProofFinding.objects.update(detail="nothing")


def test_beat_asks_for_it() -> None:
    tasks_of_beat = {entry["task"] for entry in settings.CELERY_BEAT_SCHEDULE.values()}
    assert "payouts.tasks.request_daily_proof" in tasks_of_beat


def test_staff_ask_for_one_once_and_it_is_in_the_log(db: Any) -> None:
    staff = UserFactory(is_staff=True)
    for _ in range(2):
        proof = request_proof(key="now", user=staff)

    assert BooksProof.objects.count() == 1
    assert AuditEvent.objects.get(action="proof.requested").target == f"proof:{proof.pk}"


def test_many_findings_are_counted_and_the_first_are_kept(db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proofs, "KEPT_FINDINGS", 3)
    plant(5)

    books = check_books()

    assert (len(books.findings), books.n_findings) == (3, 5)
    assert books.findings[0] == Finding("clearing_not_empty", "clearing:upfront:900:USD has 5 left")
