"""What a person finds in their mail: the demo's mail server is a folder, one file per delivery."""

import email
import email.policy
import re
from pathlib import Path

END = b"-" * 79  # that Django's file backend writes after each message


def find_link(folder: Path, *, to: str, path: str) -> str | None:
    """The link whose path begins like that in the newest mail to the address that has one."""
    files = sorted(folder.glob("*.log"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    for file in files:
        for written in reversed(file.read_bytes().split(END)):
            message = email.message_from_bytes(written.lstrip(), policy=email.policy.default)
            body = message.get_body(("plain",)) if message["To"] == to else None
            found = re.search(rf"https?://[^/\s]+{re.escape(path)}\S*", body.get_content()) if body else None
            if found:
                return found[0]
    return None
