from marketplace.export.citations import bibtex, csl_json
from marketplace.services.disclosures import record_disclosure
from tests.factories.marketplace import LicenseFactory, PartyFactory, PublishedVersionFactory
from tests.marketplace.services.test_disclosures import cite, document


def cited(carol, **dataset):
    version = PublishedVersionFactory(**{f"dataset__{name}": value for name, value in dataset.items()})
    license = LicenseFactory(licensee=carol, version=version)
    disclosure = record_disclosure(owner=carol, document=document(cite(license, [[0, 5]])))
    return version, disclosure.citations.select_related("version__dataset__owner")


def test_a_bibliography_in_bibtex(carol, settings):
    settings.BASE_URL = "https://residual.example"
    owner = PartyFactory(name="Alice & Sons")
    version, citations = cited(carol, owner=owner, title="50 % {digits}_\\", slug="digits")

    assert bibtex(citations) == (
        f"@misc{{digits-v1-{version.merkle_root[:8]},\n"
        "  author = {{Alice \\& Sons}},\n"
        "  title = {50 \\% \\{digits\\}\\_\\textbackslash{}},\n"
        f"  year = {{{version.published_at.year}}},\n"
        "  version = {1},\n"
        "  publisher = {Residual},\n"
        "  url = {https://residual.example/datasets/digits/},\n"
        f"  note = {{5 of 8 records; Merkle root {version.merkle_root}}}\n"
        "}\n"
    )


def test_a_bibliography_in_csl_json(carol, settings):
    settings.BASE_URL = "https://residual.example"
    version, citations = cited(carol, title="Digits & more", slug="digits")
    published = version.published_at

    (item,) = csl_json(citations)

    assert item == {
        "id": f"digits-v1-{version.merkle_root[:8]}",
        "type": "dataset",
        "title": "Digits & more",
        "author": [{"literal": version.dataset.owner.name}],
        "issued": {"date-parts": [[published.year, published.month, published.day]]},
        "version": "1",
        "publisher": "Residual",
        "URL": "https://residual.example/datasets/digits/",
        "note": f"5 of 8 records; Merkle root {version.merkle_root}",
    }
