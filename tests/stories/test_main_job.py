"""The demo's main job as a story: every check that the demo prints holds, and a second run changes nothing."""

import pytest
from django.apps import apps

from marketplace.models import AuditEvent
from payouts import gateway
from portal.demo.checks import all_checks, table_rows
from portal.demo.job import MainJob
from tests.stories.running import Story

pytestmark = pytest.mark.story
#: Rows that a person's visit adds, whatever they do: sessions, and when a key was last used is a column.
VISITS = {"django_session", "account_emailaddress"}
#: Rows that beat adds each minute or quarter of an hour, whoever does what: each is a look at the books.
LOOKS = {"payouts_balancecheck", "payouts_reconciliationrun", "payouts_booksproof"}


def _rows() -> dict[str, int]:
    models = apps.get_models(include_auto_created=True)
    return {m._meta.db_table: m._default_manager.count() for m in models if m._meta.db_table not in VISITS | LOOKS}


def _do(story: Story) -> None:
    with MainJob(story.site, story.var) as job:
        job.upload()
        job.list_for_sale()
        job.license()
        job.train_and_disclose()
        job.attribute()
        job.disclose_more()
        job.divide_and_pay()
        job.read_weaker()
        job.read_pages()


def test_the_main_job_holds_what_it_promises_and_a_second_run_changes_nothing(story: Story) -> None:
    _do(story)

    assert [f"{check.claim}: {check.figures}" for check in all_checks() if not check.holds] == []
    holders = {row[0]: row for row in table_rows("rights_holder")}
    assert len(holders) == 10
    assert holders["Juniper Reuploads"][-2:] == ["0.00", "0.00"]
    assert all(row[-2] == row[-1] for row in holders.values())  # whatever is earned is paid, to the cent
    before, balance = _rows(), gateway.balance()

    _do(story)

    assert _rows() == before
    assert gateway.balance() == balance
    assert AuditEvent.objects.filter(action="party.claimed").count() == 15
