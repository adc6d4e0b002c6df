"""Who gave what to a version: the names in a file become parties, and each of them a row with its count."""

from collections.abc import Sequence

from marketplace.models import Contribution, DatasetVersion, Party

CHUNK = 5_000


def write_contributions(
    *, version: DatasetVersion, role: Contribution.Role, names: Sequence[str], counts: Sequence[int]
) -> list[Contribution]:
    """One row per name, numbered as the file's columns number them; inside the caller's transaction."""
    parties = parties_named(introducer=version.dataset.owner, names=names)
    return Contribution.objects.bulk_create(
        [
            Contribution(version=version, party=parties[name], role=role, number=number, n_records=n_records)
            for number, (name, n_records) in enumerate(zip(names, counts, strict=True))
        ],
        batch_size=CHUNK,
    )


def parties_named(*, introducer: Party, names: Sequence[str]) -> dict[str, Party]:
    """The party behind each name in `introducer`'s files; always the same one for the same name.

    "" and the introducer's own name are the introducer; everyone else is introduced, and accrues until they claim.
    """
    parties = {name: introducer for name in names if name in ("", introducer.name)}
    others = sorted(set(names) - set(parties))  # in one order, so that two uploads cannot wait for each other
    for start in range(0, len(others), CHUNK):
        chunk = others[start : start + CHUNK]
        known = Party.objects.filter(introduced_by=introducer, external_ref__in=chunk)
        new = set(chunk) - set(known.values_list("external_ref", flat=True))
        Party.objects.bulk_create(
            [Party(introduced_by=introducer, external_ref=name, name=name[:120]) for name in chunk if name in new],
            ignore_conflicts=True,  # another upload may have just introduced them
        )
        parties |= {party.external_ref: party for party in known.all()}
    return parties
