"""Demo only: two people on the staff, so that one can approve what the other proposes; prints passwords and current codes."""

import secrets
from typing import Any

from allauth.account.models import EmailAddress
from allauth.mfa.models import Authenticator
from allauth.mfa.totp.internal.auth import (
    TOTP,
    format_hotp_value,
    generate_totp_secret,
    hotp_value,
    yield_hotp_counters_from_time,
)
from allauth.mfa.utils import decrypt
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.db import transaction

from marketplace.models import User

NAMES = ("finance", "controller")


class Command(BaseCommand):
    help = __doc__

    @transaction.atomic
    def handle(self, *args: Any, **options: Any) -> None:
        if not settings.IS_DEMO:
            raise CommandError("In production staff set up their own second factor; nobody prints its codes.")
        for name in NAMES:
            email = f"{name}@demo.example"
            user = User.objects.filter(email=email).first()
            password = ""
            if user is None:
                password = secrets.token_urlsafe(12)
                user = User.objects.create_user(email, password, is_staff=True)
                EmailAddress.objects.create(user=user, email=email, verified=True, primary=True)
            held = Authenticator.objects.filter(user=user, type=Authenticator.Type.TOTP).first()
            if held is None:
                held = TOTP.activate(user, generate_totp_secret()).instance
            code = format_hotp_value(hotp_value(decrypt(held.data["secret"]), next(yield_hotp_counters_from_time())))
            known = f"password {password}, " if password else "password as printed before, "
            self.stdout.write(f"{email}: {known}code for the next seconds {code} (run this again for the next one)")
