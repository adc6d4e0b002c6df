"""A person's browser without its picture: fetches pages, fills in their forms, follows their links; no back door."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Self
from urllib.parse import urljoin

import httpx


class PageRefused(RuntimeError):
    """The site answered with an error, or sent the form back; the message is what the page says."""


@dataclass
class Form:
    """A form as the page has it: what would be sent if a person pressed its button now."""

    action: str
    method: str = "get"
    fields: dict[str, list[str]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)  # of every control, also those that send nothing now
    text: str = ""


class _Forms(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.forms: list[Form] = []
        self.text: list[str] = []
        self.problems: list[str] = []
        self._form: Form | None = None
        self._select = self._textarea = ""
        self._silent = 0
        self._problem = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        if tag in ("script", "style"):
            self._silent += 1
        if (
            "error" in named.get("class", "")
            or named.get("role") == "alert"
            or (self._problem and tag not in ("br", "input", "img", "hr", "meta", "link"))
        ):
            self._problem += 1
        if tag == "form":
            self._form = Form(action=named.get("action", ""), method=named.get("method", "get").lower())
            self.forms.append(self._form)
        if self._form is None:
            return
        name = named.get("name", "")
        if name:
            self._form.names.add(name)
        kind = named.get("type", "text")
        if tag == "input" and name and kind not in ("submit", "button", "file"):
            if kind not in ("checkbox", "radio") or "checked" in named:
                self._add(name, named.get("value", "on" if kind == "checkbox" else ""))
        elif tag == "select":
            self._select = name
        elif tag == "option" and self._select and ("selected" in named or self._select not in self._form.fields):
            self._form.fields[self._select] = [named.get("value", "")]
        elif tag == "textarea":
            self._textarea = name
            self._form.fields[name] = [""]

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._silent -= 1
        if self._problem and tag not in ("br", "input", "img", "hr", "meta", "link"):
            self._problem -= 1
        if tag == "form":
            self._form = None
        elif tag == "select":
            self._select = ""
        elif tag == "textarea":
            self._textarea = ""

    def handle_data(self, data: str) -> None:
        if self._silent:
            return
        if data.strip():
            self.text.append(data.strip())
            if self._problem:
                self.problems.append(data.strip())
            if self._form:
                self._form.text += f" {data.strip()}"
        if self._form and self._textarea:
            self._form.fields[self._textarea] = [data.lstrip("\n")]

    def _add(self, name: str, value: str) -> None:
        assert self._form is not None
        self._form.fields.setdefault(name, []).append(value)


@dataclass
class Page:
    """What came back, parsed."""

    url: str
    status: int
    text: str
    html: str
    forms: list[Form]
    problems: list[str]

    def form(self, *, having: str = "", action: str = "") -> Form:
        """The first form with a control of that name and an action that holds that text."""
        for form in self.forms:
            if (not having or having in form.names) and action in form.action:
                return form
        raise PageRefused(f"{self.url} has no form with {having or action!r}: {self.text[:300]}")

    def own_form(self) -> Form:
        """The form that is sent to the page's own address."""
        for form in self.forms:
            if form.method == "post" and not form.action:
                return form
        raise PageRefused(f"{self.url} has no form of its own: {self.text[:300]}")


class Browser:
    """One person's session on the site and on the pages that it sends them to."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self.client = httpx.Client(base_url=base_url, follow_redirects=True, timeout=60)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.close()

    def get(self, path: str) -> Page:
        return self._page(self.client.get(path))

    def submit(
        self, page: Page, form: Form, fields: dict[str, Any] | None = None, files: dict[str, Path] | None = None
    ) -> Page:
        """Fill in a form of a page and press its button.

        Raises:
            PageRefused: a field is not on the form, or the form came back with errors.
        """
        data = {name: list(values) for name, values in form.fields.items()}
        for name, value in (fields or {}).items():
            if name not in form.names:
                raise PageRefused(f"{page.url} has no field {name!r}; it has {', '.join(sorted(form.names))}")
            data[name] = [str(item) for item in value] if isinstance(value, list) else [str(value)]
        target = urljoin(page.url, form.action or page.url)
        headers = {"Referer": page.url}
        if form.method == "get":
            return self._page(self.client.get(target, params=data))
        if files:
            opened = {name: (path.name, path.open("rb"), "application/octet-stream") for name, path in files.items()}
            try:
                answer = self.client.post(target, data=data, files=opened, headers=headers)
            finally:
                for _, file, _ in opened.values():
                    file.close()
        else:
            answer = self.client.post(target, data=data, headers=headers)
        return self._page(answer)

    def _page(self, answer: httpx.Response) -> Page:
        parsed = _Forms()
        html = answer.text if "html" in answer.headers.get("content-type", "") else ""
        parsed.feed(html)
        page = Page(
            url=str(answer.url),
            status=answer.status_code,
            text=" ".join(parsed.text),
            html=html or answer.text,
            forms=parsed.forms,
            problems=parsed.problems,
        )
        if answer.status_code >= 400:
            raise PageRefused(
                f"{answer.request.method} {answer.url} answered {answer.status_code}: {' '.join(page.problems) or page.text[:500]}"
            )
        return page
