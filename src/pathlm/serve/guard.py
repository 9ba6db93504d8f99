"""What stands before every request: who may ask, how much may be sent, and what a browser may do with what comes back."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pathlm.serve.errors import Refusal
from pathlm.serve.limits import Limits

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

SAME_ORIGIN = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; connect-src 'self'; "
HEADERS = [
    (b"content-security-policy", (SAME_ORIGIN + "base-uri 'none'; form-action 'none'; frame-ancestors 'none'").encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class Guard:
    """Asks for the key, where there is one, and for a known host, and cuts off bodies that are too long."""

    def __init__(self, app: App, *, limits: Limits, api_key: str | None = None, hosts: tuple[str, ...] | None = None):
        self._app, self._limits, self._key, self._hosts = app, limits, api_key, hosts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        taken = 0

        async def take() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._limits.max_body_bytes:
                raise _too_long(self._limits)
            return message

        try:
            self._check(scope)
            await self._app(scope, take, answer)
        except Refusal as refusal:
            if not started:
                await refuse(refusal, answer)

    def _check(self, scope: Message) -> None:
        headers = dict(scope["headers"])
        if self._hosts is not None:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
            if name not in self._hosts:  # a page elsewhere may have let its name point here
                raise Refusal(403, "this server answers to its loopback names only", code="host_not_allowed")
        path = scope["path"]
        if self._key is not None and (path == "/metrics" or path.startswith("/v1")):
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key.encode()):
                rule = "a key is needed: send the header Authorization: Bearer KEY"
                raise Refusal(401, rule, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:12]) > self._limits.max_body_bytes:
            raise _too_long(self._limits)


async def refuse(refusal: Refusal, send: Send) -> None:
    """Send a refusal as a whole answer."""
    headers = [(name.encode(), value.encode()) for name, value in (refusal.headers or {}).items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(refusal.body)).encode())]
    await send({"type": "http.response.start", "status": refusal.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": refusal.body})


def _too_long(limits: Limits) -> Refusal:
    return Refusal(
        413, f"the request's body must be at most {limits.max_body_bytes:,} bytes", code="body_too_large", headers={"connection": "close"}
    )
