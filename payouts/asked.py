"""What Stripe asks of a payee, in a payee's words."""

from collections.abc import Iterable

#: Stripe's names of what it asks a payee, from the most specific beginning on: https://docs.stripe.com/api/accounts/object
ASKED = {
    "external_account": "a bank account",
    "individual.ssn_last_4": "your tax form (the last digits of your social security number)",
    "individual.id_number": "your tax form (your tax identification number)",
    "company.tax_id": "your tax form (the company's tax number)",
    "company.vat_id": "the company's VAT number",
    "tax": "your tax form",
    "individual.verification": "a photo of your ID",
    "person.verification": "a photo of an ID",
    "company.verification": "a document about the company",
    "individual.dob": "your date of birth",
    "individual.address": "your address",
    "individual.first_name": "your name",
    "individual.last_name": "your name",
    "individual.email": "your e-mail address",
    "individual.phone": "your phone number",
    "individual": "more about you",
    "business_profile": "what your business does",
    "business_type": "whether you are a person or a company",
    "company": "more about the company",
    "representative": "who acts for the company",
    "owners": "who owns the company",
    "directors": "who directs the company",
    "tos_acceptance": "your agreement to its terms",
}


def words_asked(names: Iterable[str]) -> list[str]:
    """Stripe's requirements as a person calls them, each once."""
    return list(dict.fromkeys(_asked(name) for name in names))


def asked_in_words(names: Iterable[str]) -> str:
    """Stripe's requirements as a list to read: "a bank account and your tax form"."""
    words = words_asked(names)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words) or "something"


def _asked(name: str) -> str:
    if name.startswith("person_"):  # person_1a2b.verification.document: somebody of a company
        name = f"person.{name.partition('.')[2]}"
    beginnings = [known for known in ASKED if name == known or name.startswith((f"{known}.", f"{known}_"))]
    return ASKED[max(beginnings, key=len)] if beginnings else name.replace("_", " ").replace(".", ", ")
