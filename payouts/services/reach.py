"""Whom Stripe reaches, by its own word on countries; the others are paid over another rail (`other_rails`)."""

from django.conf import settings
from django.db.models import QuerySet

from marketplace.models import Party
from payouts import gateway
from payouts.models import PayeeAccount, ServedCountries


def ask_served_countries() -> ServedCountries:
    """Write down where Stripe says that it transfers to from the platform's country; a row only if it has changed.

    Raises:
        gateway.StripeRefused, gateway.StripeUncertain: ask again.
    """
    countries = sorted(gateway.transfer_countries(settings.STRIPE_PLATFORM_COUNTRY))
    latest = ServedCountries.objects.filter(platform_country=settings.STRIPE_PLATFORM_COUNTRY).first()
    if latest is not None and latest.countries == countries:
        return latest
    return ServedCountries.objects.create(platform_country=settings.STRIPE_PLATFORM_COUNTRY, countries=countries)


def is_served(country: str) -> bool | None:
    """Whether Stripe can pay to a country; None while nobody knows: no country, or Stripe was not asked yet."""
    latest = ServedCountries.objects.filter(platform_country=settings.STRIPE_PLATFORM_COUNTRY).first()
    if latest is None or not country:
        return None
    return country in latest.countries


def unserved_parties() -> QuerySet[Party]:
    """Parties with a country that Stripe does not reach, and no account at Stripe that it could pay."""
    latest = ServedCountries.objects.filter(platform_country=settings.STRIPE_PLATFORM_COUNTRY).first()
    if latest is None:
        return Party.objects.none()
    ready = PayeeAccount.objects.filter(transfers_active=True)
    return Party.objects.exclude(country="").exclude(country__in=latest.countries).exclude(pk__in=ready.values("party"))


def is_unserved(party: Party) -> bool:
    """Whether it is paid over another rail."""
    if is_served(party.country) is not False:
        return False
    return not PayeeAccount.objects.filter(party=party, transfers_active=True).exists()
