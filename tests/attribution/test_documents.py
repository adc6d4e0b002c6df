"""Which records are copies of each other, and whose they are."""

import numpy as np
import torch

from attribution.documents import NOBODY, Payee, build_task, copy_classes, read_records
from tests.factories.attribution import DisclosureFactory, ModelFactory, declaration, published_clouds, trained_document
from tests.factories.marketplace import LicenseFactory


def _classes(*records: tuple[tuple[int, int], tuple[int, int], int, int, int]) -> list[int]:
    places, roots, rank, holder, labeller = (np.array(column) for column in zip(*records, strict=True))
    return copy_classes(roots=roots, places=places, rank=rank, holder=holder, labeller=labeller).tolist()


def test_a_copy_follows_its_original_wherever_that_stands():
    copy, other, original = (
        ((2, 0), (1, 5), 1, 0, NOBODY),
        ((2, 1), (2, 1), 1, 0, NOBODY),
        ((1, 5), (1, 5), 0, 0, NOBODY),
    )

    assert _classes(copy, other, original) == [2, 1, 2]


def test_without_the_original_the_first_registrant_stands_for_the_others():
    later, earlier, again = (
        ((9, 0), (1, 5), 2, 0, NOBODY),
        ((8, 3), (1, 5), 1, 0, NOBODY),
        ((8, 7), (1, 5), 1, 4, NOBODY),
    )

    assert _classes(later, earlier, again) == [1, 1, 1]


def test_label_events_on_one_item_are_no_copies_of_each_other():
    """The item's original is not selected; two people labelled it in version 8, one of them twice."""
    first, second, twice = ((8, 0), (1, 5), 1, 0, 3), ((8, 1), (1, 5), 1, 0, 4), ((8, 2), (1, 5), 1, 0, 3)
    elsewhere, unlabelled = ((9, 0), (1, 5), 2, 0, 4), ((8, 4), (1, 5), 1, 0, NOBODY)

    assert _classes(first, second, twice, elsewhere, unlabelled) == [0, 1, 0, 0, 0]


def test_the_original_makes_copies_of_all_its_label_events():
    assert _classes(((8, 0), (1, 5), 1, 0, 3), ((8, 1), (1, 5), 1, 0, 4), ((1, 5), (1, 5), 0, 0, 0)) == [2, 2, 2]


def test_copy_classes_are_what_the_engine_takes():
    rng = np.random.default_rng(0)
    roots = np.stack([rng.integers(0, 3, 300), rng.integers(0, 20, 300)], 1)
    places = np.stack([np.arange(300) % 3 + 5, np.arange(300)], 1)
    copy_of = copy_classes(
        roots=roots,
        places=places,
        rank=places[:, 0],
        holder=rng.integers(0, 2, 300),
        labeller=rng.integers(-1, 3, 300),
    )

    assert (copy_of[copy_of] == copy_of).all()
    assert (roots[copy_of] == roots).all()


def test_every_record_has_a_payee_in_both_partitions(alice, bob, carol):
    version = published_clouds({alice: 6, bob: 4}, labellers={carol: 8})
    license = LicenseFactory(licensee=carol, version=version)
    document = declaration(licenses=[license], selections=[[[2, 5], [7, 10]]])
    disclosure = DisclosureFactory(model=ModelFactory(owner=carol), licenses=[license], document=document)

    records = read_records(disclosure)

    assert records.row.tolist() == [2, 3, 4, 7, 8, 9]
    holders = [records.owners[index].party_id for index in records.owner]
    assert holders == [alice.pk] * 3 + [bob.pk] * 3
    labellers = [records.labellers[index] for index in records.labeller]
    assert labellers == [Payee(version.pk, carol.pk)] * 4 + [Payee(version.pk, bob.pk)] * 2


def test_a_task_is_the_trainers_own_whatever_order_the_licenses_came_in(alice, bob, carol):
    versions = [published_clouds({alice: 20}, seed=1), published_clouds({bob: 24}, seed=2)]
    licenses = [LicenseFactory(licensee=carol, version=version) for version in reversed(versions)]
    document = trained_document(licenses=licenses, selections=[[[1, 21]], "all"])
    disclosure = DisclosureFactory(model=ModelFactory(owner=carol), licenses=licenses, document=document)

    task, again = build_task(disclosure), build_task(disclosure)

    assert (task.n_train, task.n_query, task.require_recipe().n_step) == (40, 24, 6)
    assert task.digest == again.digest
    features, targets = task.train[torch.arange(40)]
    assert (features.dtype, features.shape, targets.dtype) == (torch.float32, (40, 6), torch.int64)
    assert targets.tolist() == [1, 0] * 10 + [0, 1] * 10


def test_reading_records_takes_as_many_queries_for_many_records_as_for_few(
    alice, bob, carol, django_assert_num_queries
):
    counts = []
    for n in (4, 40):
        license = LicenseFactory(licensee=carol, version=published_clouds({alice: n, bob: n}, seed=n))
        disclosure = DisclosureFactory(model=ModelFactory(owner=carol), licenses=[license])
        with django_assert_num_queries(4) as queries:
            read_records(disclosure)
        counts.append(len(queries))

    assert counts == [4, 4]
