"""What stands before every route: who may ask, how much is read, and what is written down about it."""

import asyncio
import hmac
import ipaddress
import logging
import time
import uuid
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cachec.serving.limits import Limits
from cachec.serving.refusals import Refused

log = logging.getLogger(__name__)
OPEN = ("/", "/health")  # need no key, and neither has what is under FILES, whose names are secret
FILES = "/files/"


class Guard:
    """``key``: what requests must bring as a bearer token, if there is one. ``only_here``: the server listens on loopback.

    A body is read as a whole before anybody sees it.
    """

    def __init__(self, app: ASGIApp, *, limits: Limits, key: str | None, only_here: bool = False) -> None:
        self._app, self._limits, self._key, self._only_here = app, limits, key, only_here

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        number, begun, status = uuid.uuid4().hex, time.monotonic(), 0
        scope.setdefault("state", {})["number"] = number

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", number.encode())]
            await send(message)

        try:
            headers = Headers(scope=scope)
            if self._only_here and self._key is None:
                _check_host(headers.get("host", ""))
            check_head(scope["path"], headers, self._limits, self._key)
            body = await self._read(receive, self._limits.body_at(scope["path"]))
        except Refused as refused:
            response = JSONResponse(refused.to_json(), refused.status_code, refused.headers)
            await response(scope, receive, answer)
        else:
            if body is not None:
                await self._app(scope, _again(body, receive), answer)
        log.info("request %s: status %d after %.3f s", number, status, time.monotonic() - begun)

    async def _read(self, receive: Receive, most: int) -> bytes | None:
        """The whole body, of ``most`` bytes; ``None``: the client went away before it was sent."""
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_large(most)
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError as error:
            raise Refused(408, f"the body did not come within {self._limits.body_seconds:g} s", code="slow_body") from error


def check_head(path: str, headers: Mapping[str, str], limits: Limits, key: str | None) -> None:
    """Raise ``Refused`` for a request that may not ask, or says that its body is too large."""
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        raise Refused(403, "a page of another site asks: only the page that this server shows may", code="origin")
    if key is not None and path not in OPEN and not path.startswith(FILES):
        given = headers.get("authorization", "").encode("latin-1").removeprefix(b"Bearer ")  # its bytes, as they came
        if not hmac.compare_digest(given, key.encode()):
            raise Refused(401, "this server wants an API key: send Authorization: Bearer KEY", code="invalid_api_key")
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()) or int(length[:19]) > limits.body_at(path):
        raise too_large(limits.body_at(path))


def _check_host(host: str) -> None:
    """Raise ``Refused`` for a name that is not this machine's: a page of another site may have it lead here."""
    name = host if host.endswith("]") else host.rpartition(":")[0] or host  # without a port
    if not is_loopback(name.strip("[]")):
        raise Refused(403, f"{name[:80]} is no name of this machine: ask 127.0.0.1, or start the server with an API key",
                      code="host")  # fmt: skip


def is_loopback(host: str) -> bool:
    """Can only this machine reach it?"""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def too_large(most: int) -> Refused:
    """What a request with a body of more than ``most`` bytes gets."""
    return Refused(413, f"the body is larger than the {most} bytes that this server takes", code="too_large")


def _again(body: bytes, receive: Receive) -> Receive:
    """``receive`` for those behind: the body that was read, then what else comes."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
