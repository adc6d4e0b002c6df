"""Copies: who is first, and for whom a record counts."""

import threading

import pytest
from django.db import connection

from marketplace.ingest.copies import keyed_hash
from marketplace.models import Party, RecordCopy, User
from marketplace.selectors import MoneyCount, money_counts
from marketplace.services import versions
from marketplace.services.copies import write_copies
from marketplace.services.parties import create_party
from marketplace.services.versions import NothingNew, fingerprint_key, publish_version, version_key
from tests.marketplace.services.ingested import as_csv, parsed_here, published, uploaded


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(versions, "parsed", parsed_here)


def copies_of(version):
    found = RecordCopy.objects.filter(version=version).order_by("row")
    return [
        (copy.row, copy.original_version_id, copy.original_row, copy.payee.name, copy.labeller and copy.labeller.name)
        for copy in found.select_related("payee", "labeller")
    ]


def counts_of(version):
    names = dict(Party.objects.values_list("pk", "name"))
    return {(count.role, names[count.party_id]): count.n_records for count in money_counts(version)}


def test_labels_by_two_labellers_on_one_item_are_no_copies(alice):
    version = published(
        alice,
        [
            [1, 1, "a", "ann", "lea"],
            [1, 1, "b", "ann", "leo"],  # the same item, another labeller: an event of its own
            [1, 1, "b", "ann", "leo"],  # the same labeller again
            [1, 1, "a", "ben", "leo"],  # another holder claims the item
            [1, 1, "a", "ann", ""],  # nobody labelled this one
            [2, 2, "a", "ben", "lea"],
        ],
    )

    assert copies_of(version) == [
        (2, version.pk, 1, "ann", "leo"),
        (3, version.pk, 0, "ann", "lea"),
        (4, version.pk, 0, "ann", "lea"),
    ]
    assert counts_of(version) == {
        ("rights_holder", "ann"): 2,
        ("rights_holder", "ben"): 1,
        ("labeller", "lea"): 2,
        ("labeller", "leo"): 1,
    }
    assert version.n_copies == 3
    contributed = version.contributions.order_by("role", "number").values_list("party__name", "n_records", "n_copies")
    assert list(contributed) == [("lea", 2, 0), ("leo", 3, 2), ("ann", 4, 2), ("ben", 2, 1)]


def test_records_without_labellers_are_copies_by_content_alone(alice):
    version = published(
        alice, [[1, 1, "a", "ann", ""], [1, 1, "b", "ann", "lea"], [1, 1, "b", "ann", ""], [2, 2, "a", "ann", ""]]
    )

    assert [(row, original) for row, _, original, _, _ in copies_of(version)] == [(1, 0), (2, 0)]


def test_copies_of_published_records_belong_to_the_first_registrant(alice, bob):
    first = published(alice, [[1, 1, "a", "ann", "lea"], [2, 2, "b", "ann", ""]])
    second = published(bob, [[3, 3, "a", "bea", "max"], [1, 1, "x", "bea", "max"], [2, 2, "b", "bea", "max"]])

    assert copies_of(second) == [(1, first.pk, 0, "ann", "lea"), (2, first.pk, 1, "ann", None)]
    assert counts_of(second) == {
        ("rights_holder", "bea"): 1,
        ("rights_holder", "ann"): 2,
        ("labeller", "max"): 1,
        ("labeller", "lea"): 1,
        ("labeller", "ann"): 1,  # nobody labelled the original, so its rights holder stands in
    }
    assert second.n_copies == 2


def test_first_is_by_publication_not_by_upload(alice, bob):
    early = uploaded(alice, as_csv([[1, 1, "a", "ann", ""], [5, 5, "a", "ann", ""]])).version
    late = published(bob, [[1, 1, "a", "bea", ""]])

    publish_version(version=early, user=alice.user, signed_name="Alice")

    assert copies_of(early) == [(0, late.pk, 0, "bea", None)]
    assert copies_of(late) == []


def test_a_copy_of_a_copy_leads_to_the_original(alice, bob, carol):
    first = published(alice, [[1, 1, "a", "ann", ""]])
    published(bob, [[1, 1, "a", "bea", ""], [2, 2, "a", "bea", ""]])
    third = published(carol, [[3, 3, "a", "cat", ""], [1, 1, "a", "cat", ""], [1, 1, "a", "cat", ""]])

    assert copies_of(third) == [(1, first.pk, 0, "ann", None), (2, first.pk, 0, "ann", None)]
    assert counts_of(third)["rights_holder", "ann"] == 1  # one original, however often it is repeated here


def test_a_new_version_finds_each_labellers_own_event(alice):
    first = published(alice, [[1, 1, "a", "ann", "lea"], [1, 1, "b", "ann", "leo"]])
    second = published(
        alice,
        [[1, 1, "b", "ann", "leo"], [1, 1, "a", "ann", "lea"], [1, 1, "c", "ann", "max"], [2, 2, "a", "ann", "max"]],
    )

    assert copies_of(second) == [
        (0, first.pk, 1, "ann", "leo"),
        (1, first.pk, 0, "ann", "lea"),
        (2, first.pk, 0, "ann", "lea"),
    ]
    assert counts_of(second) == {
        ("rights_holder", "ann"): 3,
        ("labeller", "lea"): 1,
        ("labeller", "leo"): 1,
        ("labeller", "max"): 1,
    }


def test_copies_are_found_across_formats_and_column_names(alice, bob):
    first = published(alice, [[1, 0, "a", "ann", ""]])
    again = uploaded(
        bob, b"width;height\n1.0;-0.0\n2;2\n", mapping={"content": ["width", "height"]}, filename="other.csv"
    )

    assert again.report["copies"] == {"within": 0, "of_listed": 1}
    version = publish_version(version=again.version, user=bob.user, signed_name="Bob")
    assert copies_of(version) == [(0, first.pk, 0, "ann", None)]


def test_report_counts_copies_and_names_nobody(alice, bob):
    published(alice, [[1, 1, "a", "ann", "lea"]])

    upload = uploaded(bob, as_csv([[1, 1, "a", "bea", ""], [2, 2, "a", "bea", ""], [2, 2, "a", "bea", ""]]))

    assert upload.report["copies"] == {"within": 1, "of_listed": 1}
    assert "ann" not in str(upload.report)
    assert "ann" not in str(upload.version.statistics)


def test_a_version_of_nothing_but_copies_is_not_published(alice, bob):
    published(alice, [[1, 1, "a", "ann", ""], [2, 2, "a", "ann", ""]])
    version = uploaded(bob, as_csv([[2, 2, "b", "bea", ""], [1, 1, "b", "bea", ""]])).version

    with pytest.raises(NothingNew, match="Each of the 2 records repeats one that is registered already"):
        publish_version(version=version, user=bob.user, signed_name="Bob")

    version.refresh_from_db()
    assert version.status == "frozen"
    assert copies_of(version) == []
    assert not version.contributions.filter(n_copies__gt=0).exists()


def test_money_counts_sum_to_the_distinct_records_in_both_roles(alice):
    version = published(alice, [[n % 5, 0, "a", f"h{n % 3}", f"l{n % 2}"] for n in range(30)])

    counts = money_counts(version)

    by_role = {
        role: sum(count.n_records for count in counts if count.role == role) for role in ("rights_holder", "labeller")
    }
    assert by_role == {
        "rights_holder": version.n_records - version.n_copies,
        "labeller": version.n_records - version.n_copies,
    }
    assert all(isinstance(count, MoneyCount) and count.n_records > 0 for count in counts)


@pytest.mark.parametrize("n_listed", [5, 500])
def test_matching_copies_meets_each_record_a_few_times_whatever_the_statistics_say(alice, n_listed):
    """A version written a moment ago is none that PostgreSQL's statistics know; it once took its records for a single one."""
    published(alice, [[n, n, "a", "ann", "lea"] for n in range(n_listed)])
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE")
    n_record = 3_000
    version = uploaded(
        alice, as_csv([[n // 2, n // 2, "a", f"h{n % 7}", f"l{n % 3}"] for n in range(n_record)])
    ).version
    plans = []

    def explain(execute, sql, params, many, context):
        if not sql.lstrip().startswith(("CREATE", "WITH", "UPDATE")):
            return execute(sql, params, many, context)
        execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {sql}", params, many, context)
        plans.append(context["cursor"].fetchone()[0][0]["Plan"])
        return None

    with connection.execute_wrapper(explain):
        write_copies(version=version)

    assert version.copies.count() == n_record // 2 + n_listed  # the second of each pair, and the first of those listed
    assert len(plans) == 7  # the four tables, the copies, and the counts of both roles
    assert sum(map(rows_met, plans)) < 60 * n_record


def rows_met(plan):
    met = plan["Actual Rows"] + plan.get("Rows Removed by Join Filter", 0) + plan.get("Rows Removed by Filter", 0)
    return met * plan["Actual Loops"] + sum(map(rows_met, plan.get("Plans", [])))


def test_keys_keep_versions_and_fingerprints_apart():
    assert version_key(1) != version_key(2)
    assert version_key(1) == keyed_hash(fingerprint_key())(b"salt:1")


def test_two_publications_at_once_agree_who_was_first(committed_db, media):
    """Both hold the same content; without the lock neither would see the other."""
    frozen = []
    for name in ("one", "two"):
        user = User.objects.create_user(f"{name}@example.org", "correct horse battery staple")
        party = create_party(user=user, name=name)
        party.user = user
        frozen.append((user, uploaded(party, as_csv([[1, 1, "a", "x", ""], [2, len(frozen), "a", "x", ""]])).version))
    start, errors = threading.Barrier(2), []

    def publish(user, version):
        try:
            start.wait()
            publish_version(version=version, user=user, signed_name="Someone")
        except Exception as error:  # noqa: BLE001 - told to the test's own thread
            errors.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=publish, args=pair) for pair in frozen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    first, second = sorted((version for _, version in frozen), key=lambda version: version.copies.count())
    assert copies_of(first) == []
    assert [(row, original, at) for row, original, at, _, _ in copies_of(second)] == [(0, first.pk, 0)]
