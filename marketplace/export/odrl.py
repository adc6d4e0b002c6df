"""An offer's terms twice: as an ODRL policy that a program can check, and as a contract in words.

ODRL Information Model 2.2 and its JSON-LD context. What the vocabulary has no term for (training, seats, a share of
revenue) is in the profile `urn:residual:odrl:1`, whose actions are all included in ODRL's `use`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marketplace.money import Money

#: What a license may allow, and what that means in words.
ALLOWED_USES = {
    "train": "Train a model from scratch",
    "fine-tune": "Fine-tune a model that exists",
    "evaluate": "Evaluate a model",
}
CONTEXT = "http://www.w3.org/ns/odrl.jsonld"
PROFILE = "urn:residual:odrl:1"


@dataclass(frozen=True)
class Terms:
    """Everything that a policy and a contract say; rates in basis points."""

    uid: str  # of the offer, a URN
    assigner: str  # URN of the party that offers
    assigner_name: str
    title: str
    version_number: int
    merkle_root: str
    n_records: int
    price: Money
    platform_fee_bps: int
    upfront_bps: int
    pool_bps: int
    royalty_bps: int
    royalty_cap: Money | None
    labellers_bps: int
    term_days: int
    seats: int
    allowed_uses: Sequence[str]
    disclosure_due_days: int


def version_urn(merkle_root: str) -> str:
    """Names a version by its content: the SHA-256 root over its records' digests."""
    return f"urn:residual:merkle:sha256:{merkle_root}"


def offer_policy(terms: Terms) -> dict[str, Any]:
    """The terms as an ODRL Offer."""
    target = version_urn(terms.merkle_root)
    duties = [_pay(terms.price), _disclose(terms.disclosure_due_days)]
    if terms.royalty_bps:
        duties.append(_royalty(terms.royalty_bps, terms.royalty_cap))
    return {
        "@context": CONTEXT,
        "@type": "Offer",
        "uid": terms.uid,
        "profile": PROFILE,
        "assigner": {"@type": "Party", "uid": terms.assigner},
        "permission": [
            {
                "target": target,
                "action": f"{PROFILE}:{use}",
                "constraint": [
                    _constraint("elapsedTime", "lteq", f"P{terms.term_days}D", "xsd:duration"),
                    _constraint(f"{PROFILE}:seats", "lteq", str(terms.seats), "xsd:integer"),
                ],
                "duty": duties,
            }
            for use in terms.allowed_uses
        ],
        "prohibition": [{"target": target, "action": action} for action in ("distribute", "sell")],
    }


def policy_sha256(policy: Mapping[str, Any]) -> str:
    """Over canonical JSON (sorted keys, no spaces, UTF-8); what a license keeps."""
    canonical = json.dumps(policy, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def contract_text(terms: Terms) -> str:
    """The same terms for a person, paragraph by paragraph; the buyer accepts it by name."""
    uses = "; ".join(_lowered(ALLOWED_USES[use]) for use in terms.allowed_uses)
    forbidden = "; ".join(_lowered(words) for use, words in ALLOWED_USES.items() if use not in terms.allowed_uses)
    paragraphs = [
        f"{terms.assigner_name} licenses “{terms.title}”, version {terms.version_number}: {terms.n_records:,} records, named by "
        f"the Merkle root {terms.merkle_root}.",
        f"Allowed: {uses}." + (f" Not allowed: {forbidden}." if forbidden else ""),
        "The records may not be passed on, published or sold. What was learned from them may.",
        f"The license is for {_count(terms.seats, 'person', 'people')} and ends {_count(terms.term_days, 'day')} after payment. "
        "Models trained before it ends may be used after it.",
        f"The price is {terms.price}. Of it, {_percent(terms.upfront_bps)} is divided among the contributors at once, by number of "
        f"records; {_percent(terms.pool_bps)} waits until it is measured what each record did for a model, and is divided by that; "
        f"{_percent(terms.platform_fee_bps)} is the platform’s fee."
        + (
            f" Labellers receive {_percent(terms.labellers_bps)} of what contributors receive, rights holders the rest."
            if terms.labellers_bps
            else ""
        ),
        f"Each model trained on the records is disclosed on its public page within {_count(terms.disclosure_due_days, 'day')} of "
        "payment: which records, and how. An overdue disclosure is public.",
        _royalty_words(terms),
    ]
    return "\n\n".join(paragraphs)


def _royalty_words(terms: Terms) -> str:
    if not terms.royalty_bps:
        return "No royalty is due on the revenue of models trained on the records."
    cap = f", at most {terms.royalty_cap} over the life of this license" if terms.royalty_cap else ""
    return (
        f"A royalty is due on the revenue of each such model: {_percent(terms.royalty_bps)} of the part of the revenue that equals "
        f"this dataset’s measured share in the model{cap}. The licensee reports the revenue of each period."
    )


def _pay(price: Money) -> dict[str, Any]:
    return {
        "action": [{"rdf:value": {"@id": "odrl:compensate"}, "refinement": [_amount("eq", price)]}],
        "constraint": [{"leftOperand": "event", "operator": "lt", "rightOperand": {"@id": "odrl:policyUsage"}}],
    }


def _disclose(days: int) -> dict[str, Any]:
    return {
        "action": f"{PROFILE}:disclose",
        "constraint": [_constraint("delayPeriod", "lteq", f"P{days}D", "xsd:duration")],
    }


def _royalty(bps: int, cap: Money | None) -> dict[str, Any]:
    share = _constraint(f"{PROFILE}:shareOfAttributedRevenue", "eq", f"{bps / 100:.2f}", "xsd:decimal")
    refinement = [share | {"unit": f"{PROFILE}:percent"}]
    if cap is not None:
        refinement.append(_amount("lteq", cap))
    return {"action": [{"rdf:value": {"@id": "odrl:compensate"}, "refinement": refinement}]}


def _amount(operator: str, money: Money) -> dict[str, Any]:
    return _constraint("payAmount", operator, money.amount_text(exact=True), "xsd:decimal") | {
        "unit": f"urn:iso:std:iso:4217:{money.currency}"
    }


def _constraint(left: str, operator: str, right: str, type_: str) -> dict[str, Any]:
    return {"leftOperand": left, "operator": operator, "rightOperand": {"@value": right, "@type": type_}}


def _percent(bps: int) -> str:
    return f"{bps / 100:g} %"


def _count(n: int, one: str, many: str | None = None) -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def _lowered(words: str) -> str:
    return words[:1].lower() + words[1:]
