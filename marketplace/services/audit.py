"""The append-only log of who did what: one way to write it, so that every entry reads alike."""

from typing import Any

from marketplace.models import AuditEvent, Party, User


def record(
    *,
    actor: User | None,
    action: str,
    target: str,
    party: Party | int | None = None,
    before: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
    **detail: Any,
) -> AuditEvent:
    """Write one act down, in the transaction of the act itself.

    Args:
        action: "period.closed"; target: "period:2026-03".
        party: whom it concerns, or their id where nothing else of them is at hand.
        before, after: what changed, as JSON; ids and amounts, never e-mails, bank details or record contents.
        detail: whatever else an auditor needs.
    """
    changed = {name: values for name, values in (("before", before), ("after", after)) if values is not None}
    return AuditEvent.objects.create(
        actor=actor,
        party_id=party.pk if isinstance(party, Party) else party,
        action=action,
        target=target,
        detail=detail | changed,
    )
