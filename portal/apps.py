from django.apps import AppConfig, apps
from django.contrib.admin.apps import AdminConfig as DjangoAdminConfig
from django.db.models.signals import post_migrate


class PortalConfig(AppConfig):
    name = "portal"

    def ready(self) -> None:
        from portal.roles import grant_after_migrate

        # Django sends the signal once per app that has models, after the last migration; one of them is enough.
        post_migrate.connect(grant_after_migrate, sender=apps.get_app_config("marketplace"))


class AdminConfig(DjangoAdminConfig):
    """The admin, behind a second factor."""

    default_site = "portal.second_factor.AdminSite"
