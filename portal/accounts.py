"""Sign-up gives a person a party of their own, so that they can buy, upload and be paid from the first minute."""

from typing import Any

from allauth.account.adapter import DefaultAccountAdapter
from django.db import transaction
from django.http import HttpRequest

from marketplace.models import User
from marketplace.services.parties import create_party


class AccountAdapter(DefaultAccountAdapter):
    @transaction.atomic
    def save_user(self, request: HttpRequest, user: User, form: Any, commit: bool = True) -> User:
        saved: User = super().save_user(request, user, form, commit=commit)
        if commit:
            create_party(user=saved, name=saved.email.split("@")[0])
        return saved
