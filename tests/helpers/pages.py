"""A visitor of the service's pages without a browser: keeps cookies, and sends forms with their hidden field."""

from __future__ import annotations

import re
from typing import Any


class Visitor:
    """Sends requests as a browser would.

    Args:
        client: A test client of the application.
    """

    def __init__(self, client: Any) -> None:
        self.client = client

    def get(self, path: str, status: int = 200) -> str:
        """The text of a page."""
        answer = self.client.get(path, follow_redirects=False)
        assert answer.status_code == status, answer.text
        return str(answer.text)

    def csrf(self, page: str = "/login") -> str:
        """The hidden field of the forms of a page."""
        found = re.search(r'name="csrf" value="([0-9a-f]{64})"', self.client.get(page, follow_redirects=False).text)
        assert found, page
        return found[1]

    def send(self, path: str, data: dict[str, Any], page: str, **more: Any) -> Any:
        """The answer to a form of a page."""
        return self.client.post(path, data={"csrf": self.csrf(page), **data}, follow_redirects=False, **more)

    def log_in(self, token: str) -> Any:
        """The answer to the form of the login."""
        return self.send("/login", {"token": token}, "/login")
