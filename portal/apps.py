from django.apps import AppConfig
from django.db.models.signals import post_migrate


class PortalConfig(AppConfig):
    name = "portal"

    def ready(self) -> None:
        from portal.roles import grant_after_migrate

        post_migrate.connect(grant_after_migrate, sender=self)
