"""Which of a model's results holds: weaker evidence and left-out data do not take the place of what was proven."""

from datetime import timedelta
from typing import Any

import pytest

from attribution.holding import Refusal, holding_result, holding_results, succession
from attribution.models import AttributionResult
from marketplace import clock
from tests.factories.attribution import DisclosureFactory, ModelFactory, PublishedResultFactory, declaration
from tests.factories.marketplace import LicenseFactory, OfferFactory, PublishedVersionFactory

Grade = AttributionResult.Grade
GRADES = [Grade.DECLARED, Grade.METERED, Grade.ESTIMATED, Grade.REPLAYED]


@pytest.fixture
def licenses(alice: Any, bob: Any, carol: Any) -> list[Any]:
    """Two datasets that carol may use: alice's with ten records, bob's with four."""
    versions = [PublishedVersionFactory(contributions={alice: 10}), PublishedVersionFactory(contributions={bob: 4})]
    return [LicenseFactory(licensee=carol, offer=OfferFactory(version=version)) for version in versions]


@pytest.fixture
def model(carol: Any) -> Any:
    return ModelFactory(owner=carol)


def disclosed(model: Any, licenses: list[Any], selections: list[Any] | None = None) -> Any:
    document = declaration(licenses=licenses, slug=model.slug, name=model.name, selections=selections)
    document["model"]["summary"] = f"Disclosure {model.disclosures.count() + 1}."
    return DisclosureFactory(model=model, licenses=licenses, document=document)


def published(disclosure: Any, grade: str, **fields: Any) -> AttributionResult:
    shares = {citation.version: {citation.version.dataset.owner: 1} for citation in disclosure.citations.all()}
    version = disclosure.citations.get(position=0).version
    found: AttributionResult = PublishedResultFactory(
        disclosure=disclosure, version=version, shares=shares, grade=grade, **fields
    )
    return found


@pytest.mark.parametrize("later", GRADES)
@pytest.mark.parametrize("earlier", GRADES)
def test_a_later_result_takes_the_place_of_one_that_is_not_stronger(
    model: Any, licenses: list[Any], earlier: str, later: str
) -> None:
    first = published(disclosed(model, licenses), earlier)
    second = published(disclosed(model, licenses), later)

    found = succession(model)

    if GRADES.index(later) >= GRADES.index(earlier):
        assert (found.holding, found.passed_over) == (second, [])
    else:
        assert (found.holding, found.passed_over) == (first, [(second, Refusal.WEAKER)])


@pytest.mark.parametrize("later", GRADES)
@pytest.mark.parametrize("earlier", GRADES)
def test_whoever_leaves_a_license_out_has_the_training_run_again(
    model: Any, licenses: list[Any], earlier: str, later: str
) -> None:
    first = published(disclosed(model, licenses), earlier)
    second = published(disclosed(model, licenses[:1]), later)

    found = succession(model)

    was_run_again = later in (Grade.METERED, Grade.REPLAYED)
    if GRADES.index(later) < GRADES.index(earlier):
        assert (found.holding, found.passed_over) == (first, [(second, Refusal.WEAKER)])
    elif not was_run_again:
        assert (found.holding, found.passed_over) == (first, [(second, Refusal.LEAVES_OUT)])
    else:
        assert (found.holding, found.passed_over) == (second, [])


@pytest.mark.parametrize(
    ("before", "after", "takes_place"),
    [
        ("all", [[0, 9]], False),  # fewer records
        ([[0, 5]], [[0, 5]], True),
        ([[0, 5]], "all", True),
        ([[0, 5]], [[0, 6]], True),
        ([[0, 2], [4, 6]], [[0, 1], [1, 7]], True),  # one range over two
        ([[0, 5]], [[5, 10]], False),  # as many, and other people's
        ([[0, 5]], [[1, 10]], False),  # more, without the first
    ],
)
def test_records_are_left_out_as_a_license_is(
    model: Any, licenses: list[Any], before: Any, after: Any, takes_place: bool
) -> None:
    first = published(disclosed(model, licenses, [before, "all"]), Grade.DECLARED)
    second = published(disclosed(model, licenses, [after, "all"]), Grade.DECLARED)

    assert holding_result(model) == (second if takes_place else first)


def test_another_license_of_the_same_data_does_not_stand_for_the_one_it_was_trained_under(
    model: Any, licenses: list[Any], carol: Any
) -> None:
    first = published(disclosed(model, licenses), Grade.DECLARED)
    cheaper = LicenseFactory(licensee=carol, offer=OfferFactory(version=licenses[1].version, royalty_bps=0))
    published(disclosed(model, [licenses[0], cheaper]), Grade.DECLARED)

    assert holding_result(model) == first


def test_more_data_may_always_be_disclosed(model: Any, licenses: list[Any]) -> None:
    published(disclosed(model, licenses[:1]), Grade.DECLARED)
    second = published(disclosed(model, licenses), Grade.DECLARED)

    assert holding_result(model) == second


def test_what_a_result_has_to_reach_is_the_one_that_holds_not_the_one_before(model: Any, licenses: list[Any]) -> None:
    published(disclosed(model, licenses), Grade.DECLARED)
    published(disclosed(model, licenses[:1]), Grade.ESTIMATED)  # passed over: it leaves a license out
    third = published(disclosed(model, licenses), Grade.DECLARED)

    assert holding_result(model) == third


def test_what_held_at_a_time_does_not_change_afterwards(model: Any, licenses: list[Any]) -> None:
    now = clock.now()
    disclosure = disclosed(model, licenses)
    first = published(disclosure, Grade.REPLAYED, published_at=now - timedelta(days=20))
    second = published(disclosure, Grade.REPLAYED, published_at=now - timedelta(days=10))

    held = [holding_result(model, now - timedelta(days=days)) for days in (21, 20, 11, 10, 0)]

    assert held == [None, first, first, second, second]


def test_holding_results_of_many_models_take_as_many_queries_as_of_one(
    licenses: list[Any], carol: Any, django_assert_num_queries: Any
) -> None:
    models = [ModelFactory(owner=carol) for _ in range(3)]
    results = [published(disclosed(model, licenses), Grade.REPLAYED) for model in models]
    for model in models:
        published(disclosed(model, licenses[:1]), Grade.DECLARED)
    with django_assert_num_queries(2):
        assert holding_results(models[:1]) == {models[0].pk: results[0]}

    with django_assert_num_queries(2):
        assert holding_results(models) == {result.model_id: result for result in results}
