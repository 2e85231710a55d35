"""An app that is called in its own process, without a socket: what a replica answers with."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from fastapi import FastAPI
from starlette.types import Message


@dataclass(frozen=True)
class Asked:
    """A request as HTTP has it; it can be sent to another process."""

    method: str
    path: str
    query: bytes
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes


class Hosted:
    """``app``, from ``open`` to ``close``."""

    def __init__(self, app: FastAPI) -> None:
        self.app, self._life = app, AsyncExitStack()

    async def open(self) -> None:
        await self._life.enter_async_context(self.app.router.lifespan_context(self.app))

    async def close(self) -> None:
        await self._life.aclose()

    async def call(self, asked: Asked) -> AsyncIterator[Message]:
        """What the app sends, message by message. Whoever stops listening is gone for the app, too."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        gone = asyncio.Event()
        messages: list[Message] = [{"type": "http.request", "body": asked.body, "more_body": False}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self.app(_scope(asked), receive, sent.put)
            finally:
                await sent.put(None)

        task = asyncio.create_task(run())
        try:
            while (message := await sent.get()) is not None:
                yield message
            await task
        finally:
            gone.set()
            task.cancel()


def _scope(asked: Asked) -> dict[str, object]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": asked.method,
        "scheme": "http",
        "path": asked.path,
        "raw_path": asked.path.encode(),
        "query_string": asked.query,
        "root_path": "",
        "headers": list(asked.headers),
        "client": None,
        "server": None,
    }
