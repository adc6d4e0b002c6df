from pathlib import Path

from django.core.mail import EmailMultiAlternatives, get_connection

from portal.demo.mailbox import find_link


def test_the_newest_link_to_an_address_is_found(tmp_path: Path) -> None:
    for to, number in (("ann@example.org", 1), ("ben@example.org", 2), ("ann@example.org", 3)):
        connection = get_connection("django.core.mail.backends.filebased.EmailBackend", file_path=str(tmp_path))
        text = f"Hello “you”,\n\nhttp://site.test/invitations/{number}{'x' * 90}/\n\nhttp://site.test/other/\n"
        mail = EmailMultiAlternatives("Hello", text, to=[to], connection=connection)
        mail.attach_alternative("<p>Hello</p>", "text/html")
        mail.send()

    found = [find_link(tmp_path, to=f"{name}@example.org", path="/invitations/") for name in ("ann", "ben", "cem")]

    assert found == [f"http://site.test/invitations/3{'x' * 90}/", f"http://site.test/invitations/2{'x' * 90}/", None]
    assert find_link(tmp_path, to="ann@example.org", path="/accounts/") is None
