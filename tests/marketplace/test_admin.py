import pytest
from django.contrib import admin
from django.urls import reverse

from marketplace.admin import ReadOnly
from marketplace.api.keys import create_api_key
from marketplace.models import AuditEvent, Upload, User
from marketplace.services.disclosures import record_disclosure
from tests.factories.marketplace import LicenseFactory, UserFactory
from tests.marketplace.services.test_disclosures import cite, document
from tests.marketplace.test_jobs import make_upload
from tests.pages import with_second_factor

REGISTERED = [model for model in admin.site._registry if model._meta.app_label == "marketplace"]


@pytest.fixture
def staff(client, db):
    return with_second_factor(client, User.objects.create_superuser("root@example.org", "correct horse battery staple"))


@pytest.mark.parametrize("model", REGISTERED, ids=lambda model: model.__name__)
def test_staff_can_look_at_every_list_and_row(staff, carol, model):
    create_api_key(party=carol, user=carol.user, name="k", scopes=["read"])
    record_disclosure(owner=carol, document=document(cite(LicenseFactory(licensee=carol))))
    name = f"admin:marketplace_{model._meta.model_name}"

    assert staff.get(reverse(f"{name}_changelist"), {"q": "a"}).status_code == 200
    if (row := model.objects.first()) is not None:
        assert staff.get(reverse(f"{name}_change", args=[row.pk])).status_code == 200


@pytest.mark.parametrize(
    "model",
    [model for model in REGISTERED if isinstance(admin.site._registry[model], ReadOnly)],
    ids=lambda m: m.__name__,
)
def test_staff_change_nothing_that_services_make(staff, carol, model):
    create_api_key(party=carol, user=carol.user, name="k", scopes=["read"])
    record_disclosure(owner=carol, document=document(cite(LicenseFactory(licensee=carol))))
    name, row = f"admin:marketplace_{model._meta.model_name}", model.objects.first()

    assert staff.post(reverse(f"{name}_add")).status_code == 403
    if row is not None:
        assert staff.post(reverse(f"{name}_change", args=[row.pk]), {}).status_code == 403
        assert staff.post(reverse(f"{name}_delete", args=[row.pk]), {"post": "yes"}).status_code == 403
        assert model.objects.filter(pk=row.pk).exists()


def test_staff_can_try_again_what_failed_by_our_fault_and_nothing_else(staff):
    failed, refused = (
        make_upload(status="failed", error_code="internal"),
        make_upload(status="failed", error_code="empty"),
    )
    chosen = {"action": "try_again", "_selected_action": [failed.pk, refused.pk]}

    page = staff.post(reverse("admin:marketplace_upload_changelist"), chosen, follow=True)

    assert "1 of 2 will be tried again" in page.content.decode()
    assert list(Upload.objects.order_by("pk").values_list("status", flat=True)) == ["queued", "failed"]
    assert AuditEvent.objects.get(action="job.reopened").target == f"upload:{failed.pk}"

    User.objects.update(is_superuser=False)  # staff who may only look
    staff.post(reverse("admin:marketplace_upload_changelist"), chosen)
    assert AuditEvent.objects.filter(action="job.reopened").count() == 1


def test_a_keys_hash_is_not_shown(staff, carol):
    key, _ = create_api_key(party=carol, user=carol.user, name="k", scopes=["read"])

    page = staff.get(reverse("admin:marketplace_apikey_change", args=[key.pk])).content.decode()

    assert key.prefix in page and key.key_sha256 not in page


def test_people_are_never_deleted(staff):
    person = UserFactory()

    assert staff.post(reverse("admin:marketplace_user_delete", args=[person.pk]), {"post": "yes"}).status_code == 403
    assert User.objects.filter(pk=person.pk).exists()
    assert AuditEvent in admin.site._registry


def test_the_admin_is_for_staff(client, carol):
    client.force_login(carol.user)

    assert client.get(reverse("admin:marketplace_party_changelist")).status_code == 302
