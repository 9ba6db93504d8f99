"""How a server says that something is too much or wrong."""

from __future__ import annotations

import json
from typing import Any

from starlette.exceptions import HTTPException


class Refusal(HTTPException):
    """A request that is not answered: an HTTP status, and a message in the shape in which OpenAI's clients read errors."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
    ):
        super().__init__(status, message, headers=headers)
        kind = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}.get(status)
        kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
        self.error: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": code}

    @property
    def body(self) -> bytes:
        """The error as JSON; in ASCII, so that whatever a client sent can be told back."""
        return json.dumps({"error": self.error}).encode("ascii")
