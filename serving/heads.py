"""Heads of requests that never end: uvicorn waits for them for ever, and with httptools keeps all that comes."""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from cachec.serving.refusals import Refused

LARGEST = 65_536  # bytes of a head


def heads_within(seconds: float) -> type[asyncio.Protocol]:
    """Connections whose requests' heads must come within ``seconds``, and within ``LARGEST`` bytes; else they are closed.

    What stands behind the head is for the app to read, and to time.
    """

    class Heads(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        _timer: asyncio.TimerHandle | None = None
        _size = 0  # bytes of a head that is not there yet

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            if before is not None and before.more_body:
                super().data_received(data)
                return
            self._size += len(data)
            if self._timer is None:
                self._wait()
            super().data_received(data)
            if self.cycle is not before or self.transport.is_closing():
                self._done()
            elif self._size > LARGEST:
                self._close(Refused(431, f"the head is larger than the {LARGEST} bytes that this server takes",
                                    code="too_large"))  # fmt: skip

        def connection_lost(self, exc: Exception | None) -> None:
            self._done()
            super().connection_lost(exc)

        def _wait(self) -> None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._late)

        def _done(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer, self._size = None, 0

        def _late(self) -> None:
            self._close(Refused(408, f"the head did not come within {seconds:g} s", code="slow_head"))

        def _close(self, refused: Refused) -> None:
            if self._size and not self.transport.is_closing():  # who said nothing hears nothing
                self.transport.write(_answer(refused))
            self._done()
            self.transport.close()

    return Heads


def _answer(refused: Refused) -> bytes:
    """All of it: there is no request that the app could answer."""
    body = json.dumps(refused.to_json()).encode()
    fields: dict[str, Any] = {"content-type": "application/json", "content-length": len(body), "connection": "close"}
    words = {408: "Request Timeout", 431: "Request Header Fields Too Large"}[refused.status_code]
    lines = [f"HTTP/1.1 {refused.status_code} {words}", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body
