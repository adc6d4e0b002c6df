import json
from datetime import timedelta

import pytest

from attribution.models import AttributionResult, AttributionRun, MeteredRun, MeterHead, Shard, Verification
from marketplace import clock
from marketplace.models import Disclosure, License, Party
from tests.factories.attribution import DisclosureFactory, ModelFactory, PublishedResultFactory, declaration
from tests.factories.marketplace import LicenseFactory, OfferFactory, PublishedVersionFactory
from tests.pages import assert_page, signed_in, text_of


@pytest.fixture
def measured(alice, bob, carol) -> AttributionResult:
    """Carol's model of alice's and bob's records, of which alice's did three quarters."""
    version = PublishedVersionFactory(contributions={alice: 5, bob: 5})
    offer = OfferFactory(version=version)
    disclosure = DisclosureFactory(
        model=ModelFactory(owner=carol, slug="net", name="Whale net"),
        licenses=[LicenseFactory(licensee=carol, offer=offer)],
    )
    return PublishedResultFactory(
        disclosure=disclosure,
        shares={alice: 3, bob: 1},
        reliability=0.83,
        total=1.742,
        total_low=1.61,
        total_high=1.88,
    )


def test_model_page_cites_measures_and_draws(client, measured):
    response = client.get("/models/net/")
    text = assert_page(response)

    version = measured.disclosure.citations.get().version
    assert version.dataset.title in text and "10 of 10 records" in text and "licensed for $100.00" in text
    assert "Alice 10" not in text
    assert "75.00 %" in text and "25.00 %" in text and "74.00 % to 76.00 %" in text
    assert "Reliability λ 0.83" in text and "1.610 to 1.880" in text
    assert response.content.count(b'<circle class="measured"') == 2 * (1 + 2)  # two partitions: a legend and two rows
    assert b'role="img"' in response.content


def test_the_page_says_which_result_holds_and_why_a_newer_one_does_not(client, measured, alice, carol):
    """Carol discloses her replayed model anew, as declared; and then without half of the records, with checkpoints only."""
    (citation,) = measured.disclosure.citations.all()
    whole = declaration(licenses=[citation.license], slug="net", name="Whale net again")
    half = declaration(licenses=[citation.license], slug="net", selections=[[[0, 5]]])
    for document, grade in ((whole, "declared"), (half, "estimated")):
        again = DisclosureFactory(model=measured.model, licenses=[citation.license], document=document)
        PublishedResultFactory(disclosure=again, shares={alice: 1}, grade=grade)

    text = assert_page(client.get("/models/net/"))

    assert "Result 1, replayed, of disclosure 1 holds: it divides this model’s royalties." in text
    assert "Result 2, declared, of disclosure 2 is newer and did not take its place: its evidence is weaker." in text
    assert "75.00 %" in text
    assert '<span class="badge accent">replayed</span>' in client.get("/models/").content.decode()
    told = client.get("/api/v1/models/net/").json()
    assert (told["result"]["number"], [one["number"] for one in told["history"]]) == (1, [3, 2, 1])


def test_the_page_says_that_a_newer_result_leaves_data_out(client, alice, carol):
    licenses = [LicenseFactory(licensee=carol) for _ in range(2)]
    model = ModelFactory(owner=carol, slug="net")
    for cited in (licenses, licenses[:1]):
        disclosure = DisclosureFactory(model=model, licenses=cited)
        PublishedResultFactory(disclosure=disclosure, grade="declared")

    text = assert_page(client.get("/models/net/"))

    assert (
        "Result 2, declared, of disclosure 2 is newer and did not take its place: it leaves out data that was cited, "
        "and the training was not run again to show it." in text
    )


def test_shares_come_in_pages(client, alice, carol):
    people = Party.objects.bulk_create(Party(name=f"P{n}") for n in range(60))
    version = PublishedVersionFactory(contributions=dict.fromkeys(people, 1))
    license = LicenseFactory(licensee=carol, version=version)
    PublishedResultFactory(
        disclosure=DisclosureFactory(model=ModelFactory(owner=carol, slug="wide"), licenses=[license]),
        shares=dict.fromkeys(people, 1),
    )

    first, second = (client.get(f"/models/wide/?rights_holder={page}") for page in (1, 2))

    assert "there are 60 in all" in assert_page(first)
    assert b"?rights_holder=2#shares-rights_holder" in first.content
    rows = [page.content.split(b"shares-labeller")[0].count(b'data-label="Paid"') for page in (first, second)]
    assert rows == [50, 10]


def test_model_list_shows_what_anyone_may_read(client, measured, carol):
    DisclosureFactory(model=ModelFactory(owner=carol, name="Secret net"), embargo_until=clock.now() + timedelta(days=1))

    text = assert_page(client.get("/models/"))

    assert "Whale net" in text and "replayed" in text and "1 source " in text
    assert "Secret net" not in text


@pytest.mark.parametrize("n_rows", [1, 3])
def test_model_list_takes_the_same_number_of_queries_for_any_number_of_rows(
    client, db, django_assert_num_queries, n_rows
):
    for _ in range(n_rows):
        PublishedResultFactory()

    with django_assert_num_queries(9):
        client.get("/models/")


def test_a_model_under_embargo_exists_for_its_owner_only(client, carol, mallory):
    DisclosureFactory(model=ModelFactory(owner=carol, slug="secret"), embargo_until=clock.now() + timedelta(days=1))

    assert "under embargo" in assert_page(signed_in(carol).get("/models/secret/"))
    assert_page(client.get("/models/secret/"), 404)
    assert_page(signed_in(mallory).get("/models/secret/"), 404)
    assert_page(client.get("/models/secret/disclosures/1.json"), 404)


def test_a_model_that_is_only_declared_says_so(client, carol):
    DisclosureFactory(model=ModelFactory(owner=carol, slug="net"))

    assert "Declared: the citations stand on the trainer’s word" in assert_page(client.get("/models/net/"))


def test_while_it_is_measured_the_page_counts(client, carol):
    disclosure = DisclosureFactory(model=ModelFactory(owner=carol, slug="net"))
    run = AttributionRun.objects.create(disclosure=disclosure, grade="replayed", budget=10)
    for number, status in enumerate(("done", "queued")):
        Shard.objects.create(run=run, number=number, status=status)

    page = client.get("/models/net/")
    fragment = client.get("/models/net/", headers={"HX-Request": "true"})

    assert "Measuring what each record did" in assert_page(page)
    assert b'max="2000" value="1000"' in fragment.content and b"<html" not in fragment.content

    AttributionRun.objects.update(status="done")
    last = client.get("/models/net/", headers={"HX-Request": "true"})
    assert "Measured." in text_of(last) and b"hx-trigger" not in last.content


def test_the_document_is_served_as_its_digest_names_it(client, carol):
    disclosure = DisclosureFactory(model=ModelFactory(owner=carol, slug="net"))

    response = client.get("/models/net/disclosures/1.json")

    assert json.loads(response.content) == disclosure.document
    assert b": " not in response.content
    assert_page(client.get("/models/net/disclosures/2.json"), 404)


def test_the_references_leave_as_bibtex_and_csl(client, measured):
    page = client.get("/models/net/").content.decode()
    title = measured.disclosure.citations.get().version.dataset.title

    bibtex = client.get("/models/net/disclosures/1/references.bib")
    csl = client.get("/models/net/disclosures/1/references.csl.json")

    assert "/models/net/disclosures/1/references.bib" in page
    assert bibtex.content.startswith(b"@misc{") and title.encode() in bibtex.content
    assert [item["title"] for item in csl.json()] == [title]
    assert_page(client.get("/models/net/disclosures/2/references.bib"), 404)


SUMMARY = {
    "reliability_source": "record",
    "record": 0.5,
    "coherence": 0.76,
    "intervals": "95 %, given these checkpoints, queries bootstrapped",
    "why_counted": "",
}


def _graded(license: License, slug: str, evidence: dict[str, object]) -> Disclosure:
    document = declaration(licenses=[license], slug=slug) | evidence
    return DisclosureFactory(
        model=ModelFactory(owner=license.licensee, slug=slug), licenses=[license], document=document
    )


def test_an_estimated_models_page_says_what_it_rests_on(client, alice, bob, carol):
    license = LicenseFactory(licensee=carol, version=PublishedVersionFactory(contributions={alice: 5, bob: 5}))
    disclosure = _graded(license, "shown", {"checkpoints": []})
    PublishedResultFactory(
        disclosure=disclosure,
        shares={alice: 3, bob: 1},
        grade="estimated",
        paid_by="influence",
        reliability=0.38,
        summary=SUMMARY,
    )

    text = assert_page(client.get("/models/shown/"))

    assert "Checkpoints were disclosed, and no recipe" in text and "stands on the trainer’s word" in text
    assert "Money follows estimated influence" in text
    assert "Reliability λ 0.38" in text and "λ is from the method’s record 0.50 × coherence 0.76" in text
    assert (
        "From checkpoints of the training, the gradient of every record" in text
        and "given these checkpoints, queries bootstrapped" in text
    )
    assert "Sum of all values" in text and "what held-out replays showed" not in text


def test_a_count_says_why_it_pays_in_place_of_the_estimate(client, alice, carol):
    license = LicenseFactory(licensee=carol, version=PublishedVersionFactory(contributions={alice: 5}))
    why = {"why_counted": "the interval of the total touches or lies below 0"}
    PublishedResultFactory(
        disclosure=_graded(license, "flat", {"checkpoints": []}),
        shares={alice: 1},
        grade="estimated",
        reliability=0.0,
        summary=SUMMARY | why,
    )

    text = assert_page(client.get("/models/flat/"))

    assert "The count pays because the interval of the total touches or lies below 0." in text
    assert "Money follows number of records" in text


@pytest.mark.parametrize(
    ("verdict", "says"),
    [
        ("", "Until they match, the number of records pays."),
        ("match", "in 6 of 8 stretches of the training, drawn after disclosure,"),
        ("mismatch", "Contradicted by replay, so the log does not count. Between steps 4 and 8, entry 6"),
    ],
    ids=["open", "match", "mismatch"],
)
def test_a_metered_models_page_says_how_its_log_was_checked(client, alice, carol, verdict, says):
    license = LicenseFactory(licensee=carol, version=PublishedVersionFactory(contributions={alice: 5}))
    run = MeteredRun.objects.create(owner=carol, slug="night", queries_sha256="0" * 64)
    for entry in (3, 6):
        MeterHead.objects.create(run=run, entry=entry, step=entry, head=f"{entry:064x}")
    evidence = {"recipe": {}, "checkpoints": [], "meter": {"run": str(run.public_id), "log_sha256": "0" * 64}}
    disclosure = _graded(license, "watched", evidence)
    report = {
        "is_bit_equal": True,
        "summary": "Between steps 4 and 8, entry 6 does not come out again.",
        "draw": {"n_segment": 8, "drawn": [0, 1, 2, 4, 5, 7], "miss_probability": 0.036},
    }
    Verification.objects.create(
        disclosure=disclosure, verdict=verdict, report=report if verdict else {}, status="done" if verdict else "queued"
    )

    response = client.get("/models/watched/")
    text = assert_page(response)

    assert says in text
    assert "2 heads of the meter’s log were posted while training ran" in text
    assert ("missed with probability 0.036" in text) == (verdict == "match")
    assert ("Replaying drawn segments of the training…" in text) == (not verdict)
