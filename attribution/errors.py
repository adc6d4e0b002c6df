"""What attribution refuses, each with a stable code; the message says what to do."""

from marketplace.errors import DomainError, InvalidInput


class ArtifactInvalid(InvalidInput):
    """The bytes are not what their kind promises, or are too many."""

    code = "artifact_invalid"


class ArtifactMissing(InvalidInput):
    """The document names bytes that its owner has not handed in."""

    code = "artifact_missing"


class EvidenceInvalid(InvalidInput):
    """A disclosure whose evidence cannot be turned into a task; pointers lead into the document."""

    code = "evidence_invalid"


class RunFailed(DomainError):
    """A round of the run failed for good, so the run cannot be merged."""

    code = "run_failed"


class NotReplayed(DomainError):
    """A measurement was asked for before the replay proved the disclosure."""

    code = "not_replayed"


class MeteredRunTaken(DomainError):
    """The party has planned another run under this name."""

    code = "metered_run_taken"


class HeadsRefused(DomainError):
    """Heads that are malformed, out of order, or contradict what was posted."""

    code = "heads_refused"


class MeterCommitted(DomainError):
    """The metered run was disclosed; neither its log nor its evidence changes any more."""

    code = "meter_committed"


class QuestionInvalid(InvalidInput):
    """The question names no query of the model, or a text or a label that the model cannot take."""

    code = "question_invalid"


class NotIndexed(DomainError):
    """The model's records cannot be asked about, or not yet."""

    code = "not_indexed"


class TooManyQuestions(DomainError):
    """More was asked than one asker, or all together, may ask."""

    code = "too_many_questions"
    status = 429
