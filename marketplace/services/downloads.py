"""Links to a licensed version's bytes: signed, good for minutes, and checked against the live license each time."""

import uuid
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import IO

from django.conf import settings
from django.core.files.storage import default_storage
from django.core.signing import BadSignature, SignatureExpired, TimestampSigner
from django.db import transaction
from django.urls import reverse
from django.utils import timezone

from marketplace import clock
from marketplace.errors import DomainError
from marketplace.models import License
from marketplace.services import audit

SALT = "download"


class NoSuchDownload(DomainError):
    """The link was not made here, or was changed."""

    code = "not_found"
    status = 404


class DownloadExpired(DomainError):
    """The link was good once."""

    code = "download_expired"
    status = 410


class LicenseNotLive(DomainError):
    """The license has ended, so its links have too."""

    code = "license_not_live"
    status = 403


@dataclass(frozen=True)
class SignedUrl:
    url: str
    expires_at: datetime  # wall time


@dataclass(frozen=True)
class Download:
    """An open file of a version, and what a client needs to resume and to verify it."""

    license: License
    file: IO[bytes]
    filename: str
    size_bytes: int
    sha256: str


def signed_download_url(*, license: License) -> SignedUrl:
    """A link for whoever may see the license; it needs no key, so that any tool can fetch it.

    Raises:
        LicenseNotLive: there is nothing to download under it any more.
    """
    _check_live(license)
    token = TimestampSigner(salt=SALT).sign(str(license.public_id))
    return SignedUrl(
        url=settings.BASE_URL.rstrip("/") + reverse("download", args=[token]),
        expires_at=timezone.now() + timedelta(seconds=settings.DOWNLOAD_URL_SECONDS),
    )


def open_download(*, token: str) -> Download:
    """Open what a signed link names; the caller closes the file.

    Raises:
        NoSuchDownload, DownloadExpired, LicenseNotLive: see the classes.
    """
    signer = TimestampSigner(salt=SALT)
    try:
        public_id = uuid.UUID(signer.unsign(token, max_age=settings.DOWNLOAD_URL_SECONDS))
    except SignatureExpired:
        raise DownloadExpired(
            f"This link was valid for {settings.DOWNLOAD_URL_SECONDS // 60} minutes and has expired. Get a new one on "
            "your licenses page, or from GET /api/v1/licenses/{id}/download/."
        ) from None
    except (BadSignature, ValueError):
        raise NoSuchDownload(
            "There is no such download; copy the whole link, or get a new one on your licenses page."
        ) from None
    license = License.objects.select_related("version__dataset", "licensee").filter(public_id=public_id).first()
    if license is None:
        raise NoSuchDownload("There is no such license.")
    _check_live(license)
    version = license.version
    return Download(
        license=license,
        file=default_storage.open(version.parquet_key, "rb"),
        filename=f"{version.dataset.slug}-v{version.number}.parquet",
        size_bytes=version.size_bytes,
        sha256=version.parquet_sha256,
    )


@transaction.atomic
def note_first_download(*, license: License) -> None:
    """The refund as of right ends here: once, whoever comes first. A refund on its way at the same moment ends the license.

    Raises:
        LicenseNotLive: it was refunded since the file was opened.
    """
    at = clock.now()
    still_held = License.objects.filter(pk=license.pk, revoked_at=None, suspended_at=None, in_arrears_at=None)
    if not still_held.filter(first_downloaded_at=None).update(first_downloaded_at=at):
        license.refresh_from_db(fields=["revoked_at", "suspended_at", "in_arrears_at", "first_downloaded_at"])
        if license.first_downloaded_at is None:
            _check_live(license)
    else:
        audit.record(actor=None, party=license.licensee_id, action="license.downloaded", target=f"license:{license.pk}")


def _check_live(license: License) -> None:
    at = clock.now()
    if license.is_live(at):
        return
    if license.revoked_at is not None:
        raise LicenseNotLive(f"This license was revoked on {license.revoked_at:%d %B %Y}.")
    if license.suspended_at is not None:
        raise LicenseNotLive(
            f"The payment for this license is disputed at the card's bank since {license.suspended_at:%d %B %Y}; downloads "
            "resume if the bank decides for the payment."
        )
    if license.in_arrears_at is not None:
        raise LicenseNotLive(
            f"This license is suspended since {license.in_arrears_at:%d %B %Y}, because a royalty report or invoice is overdue; "
            "downloads resume as soon as that is settled."
        )
    raise LicenseNotLive(
        f"This license ended on {license.expires_at:%d %B %Y}; order the dataset again to download it again."
    )
