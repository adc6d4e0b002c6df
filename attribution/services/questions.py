"""Which records moved an output: who may ask what, how often, and of which models. Answers are `influence`'s, by a worker.

An index is made once a result is published of a disclosure with checkpoints. A question is a row, asked once: whoever asks
the same again gets the same row and costs nothing.
"""

import hashlib
import logging

from django.conf import settings
from django.core.cache import cache
from django.db import IntegrityError, transaction
from django.utils import timezone

from attribution.errors import NotIndexed, QuestionInvalid, TooManyQuestions
from attribution.models import InfluenceIndex, InfluenceQuestion
from marketplace import jobs
from marketplace.models import Disclosure

logger = logging.getLogger(__name__)

MAX_TEXT = 4_000  # characters of an entered text
MAX_WAITING = 200  # questions in the queue, whoever asked them


def is_indexable(disclosure: Disclosure) -> bool:
    """Whether there is a state of the model at which gradients can be taken, and something to ask about."""
    return all(name in disclosure.document for name in ("checkpoints", "architecture", "queries"))


def request_index(disclosure: Disclosure) -> InfluenceIndex | None:
    """Queue the gradient store of a disclosure's records; None if it has no checkpoints. Harmless to call twice."""
    if not is_indexable(disclosure):
        return None
    index, is_new = InfluenceIndex.objects.get_or_create(disclosure=disclosure)
    if is_new:
        jobs.wake(index)
    return index


def takes_text(disclosure: Disclosure) -> bool:
    """Whether a text can be entered: the disclosed transform makes numbers of it on the server."""
    steps = disclosure.document["features"]["transform"]
    return bool(steps) and steps[0]["kind"] in ("bytes", "hashed_ngrams")


def ask(
    *, disclosure: Disclosure, asker: str, query: int | None = None, text: str = "", label: str = ""
) -> InfluenceQuestion:
    """Ask which records moved an output most: of one evaluation query, or of a text (and, of classes, one of them).

    Args:
        asker: whose quota it costs: "party:7" or "address:192.0.2.1".

    Raises:
        NotIndexed: the model has no index, or it is still being made.
        QuestionInvalid: with a pointer to the field.
        TooManyQuestions: the asker's hour, or the queue, is full.
    """
    index = InfluenceIndex.objects.filter(disclosure=disclosure).first()
    if index is None or index.status != InfluenceIndex.Status.DONE:
        raise NotIndexed("The records of this model cannot be asked about yet; look again when its index is made.")
    text, label = text.strip(), label.strip()
    _check(disclosure, query, text, label)
    digest = hashlib.sha256(f"{label}\0{text}".encode()).hexdigest() if query is None else ""
    known = InfluenceQuestion.objects.filter(index=index, query=query, text_sha256=digest)
    if found := known.first():
        jobs.reopen(found)  # if it failed by an error of ours
        return found
    _charge(asker)
    try:
        with transaction.atomic():
            question = InfluenceQuestion.objects.create(
                index=index, query=query, text=text, label=label, text_sha256=digest
            )
    except IntegrityError:
        return known.get()  # somebody else asked the same at the same moment
    jobs.wake(question)
    logger.info("Asked question=%s index=%s", question.pk, index.pk)
    return question


def _check(disclosure: Disclosure, query: int | None, text: str, label: str) -> None:
    document = disclosure.document
    if query is not None:
        if text or label:
            raise QuestionInvalid(
                "Ask about a query or about a text, not both.", pointers={"query": "given with a text"}
            )
        n_queries = document["queries"]["n_queries"]
        if not 0 <= query < n_queries:
            raise QuestionInvalid(
                f"The model was evaluated on queries 0 to {n_queries - 1}.",
                pointers={"query": f"not 0 to {n_queries - 1}"},
            )
        return
    if not takes_text(disclosure):
        raise QuestionInvalid(
            "This model takes no texts; choose one of its evaluation queries.", pointers={"query": "is missing"}
        )
    if not text or len(text) > MAX_TEXT or "\0" in text:
        raise QuestionInvalid(
            f"Enter a text of 1 to {MAX_TEXT:,} characters, or choose an evaluation query.",
            pointers={"text": "1 to 4,000"},
        )
    classes = document["features"].get("classes")
    if classes is None and label:
        raise QuestionInvalid("This model has no classes; leave the label out.", pointers={"label": "not used"})
    if classes is not None and label not in classes:
        listed = ", ".join(classes[:20])
        raise QuestionInvalid(f"Choose a label of {listed}.", pointers={"label": "none of the classes"})


def _charge(asker: str) -> None:
    """A fixed window of an hour per asker, in the cache: it bounds work, so a lost count is no harm."""
    waiting = InfluenceQuestion.objects.filter(status=InfluenceQuestion.Status.QUEUED)
    if waiting[:MAX_WAITING].count() >= MAX_WAITING:
        raise TooManyQuestions("Many questions are waiting; ask again in a few minutes.")
    limit = settings.QUESTIONS_PER_HOUR["party" if asker.startswith("party:") else "address"]
    key = f"questions:{hashlib.sha256(asker.encode()).hexdigest()}:{timezone.now():%Y%m%d%H}"
    cache.add(key, 0, timeout=3_600)
    try:
        asked = cache.incr(key)
    except ValueError:  # it has expired in between
        asked = 1
    if asked > limit:
        raise TooManyQuestions(f"You have asked {limit} new questions this hour; ask again in the next.")
