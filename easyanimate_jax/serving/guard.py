"""Refuse requests by host, origin, token and size, before a route sees them.

Without these rules, any page in a browser could send requests to a server on its own machine, and
a name of the attacker's could point to it (DNS rebinding).
"""

from collections.abc import Callable, Mapping, Sequence
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SAFE = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}


class TooLarge(Exception):
    """A body grew above the limit while it was read."""


class Guard:
    """ASGI middleware: refuses foreign hosts and origins, missing tokens and large bodies.

    `hosts` are the allowed names, without port. `most` is the largest body in bytes. The token
    comes as `Authorization: Bearer TOKEN`, or in the cookie that the page received for it;
    `open_paths` need none.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        admits: Callable[[str | None], bool],
        hosts: Sequence[str],
        most: int,
        cookie: str,
        open_paths: Sequence[str],
    ):
        self.app, self.admits, self.hosts = app, admits, set(hosts)
        self.most, self.cookie, self.open_paths = most, cookie, set(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # no route is a web socket
        refusal = self._refusal(scope, Headers(scope=scope))
        if refusal is not None:
            await refusal(scope, receive, self._with_headers(send))
            return
        answered = False

        async def answer(message: Message) -> None:
            nonlocal answered
            answered = answered or message["type"] == "http.response.start"
            await self._with_headers(send)(message)

        try:
            await self.app(scope, self._counted(receive), answer)
        except TooLarge:
            if not answered:
                await self._too_large()(scope, receive, self._with_headers(send))

    def _refusal(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        host = name_of(headers.get("host", ""))
        if host not in self.hosts:
            return problem(400, f"this server is not called {host!r}", code="host")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != headers["host"]:
            return problem(403, "requests of pages of other servers are refused", code="origin")
        if scope["path"] not in self.open_paths and not self.admits(self._token(headers)):
            said = {"www-authenticate": "Bearer"}
            return problem(401, "give the token of this server", None, "unauthorized", said)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.most:
            return self._too_large()
        return None

    def _token(self, headers: Headers) -> str | None:
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return token.strip()
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return None
        return found and found.value

    def _counted(self, receive: Receive) -> Receive:
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self.most:
                raise TooLarge
            return message

        return counted

    def _too_large(self) -> JSONResponse:
        return problem(413, f"a request may have {self.most:,} bytes", code="too_large")

    def _with_headers(self, send: Send) -> Send:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"]] + [
                    (name.encode(), value.encode())
                    for name, value in SAFE.items()
                    if name.encode() not in own
                ]
            await send(message)

        return sending


def name_of(host: str) -> str:
    """Return the name of a Host header, without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower()


def problem(
    status: int,
    message: str,
    param: str | None = None,
    code: str = "invalid",
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Return an error in OpenAI's form."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status, headers)
