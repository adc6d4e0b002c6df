"""The root of every refusal: one class, one stable code, one sentence that says what to do."""

from collections.abc import Mapping


class DomainError(Exception):
    """The request was understood and refused; nothing was written.

    Args:
        message: what is wrong and the remedy, for a person.
        pointers: field → what is wrong with it, as JSON pointers or form field names ("/lines/0/offer").
    """

    code = "refused"
    status = 409

    def __init__(self, message: str, *, pointers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.pointers = dict(pointers or {})


class InvalidInput(DomainError):
    """A field of the input is wrong."""

    code = "invalid_input"
    status = 422


class NotAllowed(DomainError):
    """The party may see the thing, but not do this to it."""

    code = "not_allowed"
    status = 403


class KeyReused(DomainError):
    """The idempotency key was used before, with other contents."""

    code = "idempotency_key_reused"
    status = 409


class SecondFactorNeeded(DomainError):
    """The act needs a one-time code of the person's that is current and was not used before."""

    code = "second_factor"
    status = 403


class TooManyCodes(DomainError):
    """So many wrong codes that somebody may be guessing; they are looked at again in some minutes."""

    code = "too_many_codes"
    status = 429
