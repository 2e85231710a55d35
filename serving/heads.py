"""Heads of requests that never end: uvicorn waits for them for ever, and with httptools keeps all that comes."""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from cachec.serving.refusals import Refused

LARGEST = 65_536  # bytes of a head


def heads_within(seconds: float, protocol: type[asyncio.Protocol] = AutoHTTPProtocol) -> type[asyncio.Protocol]:
    """Connections whose requests' heads must come within ``seconds``, and within ``LARGEST`` bytes; else they are closed.

    What stands behind the head is for the app to read, and to time; but what is left of a body when its request was answered
    must come within ``seconds``, too. While an answer is on its way, no head is timed. ``protocol``: uvicorn's, of either kind.
    """

    class Heads(protocol):  # type: ignore[misc, valid-type]
        _timer: asyncio.TimerHandle | None = None
        _size = 0  # bytes of a head that is not there yet
        _last: Any = None  # the request behind which that head comes
        _has_begun = False  # that head, as far as httptools tells

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._wait()

        def on_message_begin(self) -> None:
            """Only httptools says so. It keeps whatever comes of a head, and h11 has a limit of its own."""
            super().on_message_begin()
            self._size, self._has_begun = 0, True

        def data_received(self, data: bytes) -> None:
            before, answers = self.cycle, self._answers()
            if answers and before.more_body:
                super().data_received(data)
                return
            if self._timer is None and not answers:
                self._wait()
            super().data_received(data)
            if self.cycle is not before or self.transport.is_closing():
                self._done()
                return
            self._size += len(data)
            rest = before is not None and before.more_body and not self._has_begun  # of a body, which is dropped
            if self._size > LARGEST and not rest and not self.flow.read_paused:  # then a whole request may be there
                self._close(Refused(431, f"the head is larger than the {LARGEST} bytes that this server takes",
                                    code="too_large"))  # fmt: skip

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.cycle is not self._last:  # h11 begins only now with a request that came meanwhile
                self._done()
            elif self._size:
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._done()
            super().connection_lost(exc)

        def _answers(self) -> bool:
            """Is there a request whose answer is not all written?"""
            return self.cycle is not None and not self.cycle.response_complete

        def _wait(self) -> None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._late)

        def _done(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer, self._size, self._last, self._has_begun = None, 0, self.cycle, False

        def _late(self) -> None:
            self._close(Refused(408, f"the head did not come within {seconds:g} s", code="slow_head"))

        def _close(self, refused: Refused) -> None:
            """Say so, but not to those who said nothing, and not behind an answer that was cut, or came before its body."""
            may_hear = not self._answers() and not (self.cycle is not None and self.cycle.more_body)
            if self._size and may_hear and not self.transport.is_closing():
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
