"""``cachec serve``: bundles opened, and an HTTP server around them that stops as it should."""

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from cachec.engines import open_bundle
from cachec.runtime.errors import OutputError, in_one_line
from cachec.runtime.host_memory import num_cores
from cachec.runtime.session import LoadedBundle
from cachec.serving.desk import Desk
from cachec.serving.heads import LARGEST, heads_within
from cachec.serving.limits import STRENGTHS, Limits
from cachec.serving.served import Served, check_names, name_and_place

log = logging.getLogger(__name__)
CONNECTIONS = 2048  # at once; more get 503


def open_one(
    bundle: str | Path,
    *,
    lanes: int = 8,
    policy: str = "deadline",
    strengths: Sequence[float] = STRENGTHS,
    **where: Any,
) -> Served:
    """A bundle with its text encoders and decoder, called as its directory without ``.cachec``, or as ``NAME=DIRECTORY`` says.

    On the CPU its engines take turns, unless each of them is given at most half of the cores.

    ``strengths``: of requests with a picture; ``where``: as ``cachec.load`` takes it.

    Raises:
        InputError: it has none.
        BundleError: it is damaged, or nothing of it runs here.
    """
    from cachec.pictures.generator import Generator

    name, place = name_and_place(bundle)
    loaded = open_bundle(place, **where)
    pictures, in_turns = Generator(loaded, tells=False), want_same_cores(loaded, where.get("threads"))
    return Served(name, loaded, pictures, lanes=lanes, policy=policy, strengths=strengths, in_turns=in_turns)


def want_same_cores(loaded: LoadedBundle, threads: int | None) -> bool:
    """Can two engines of ``threads`` each, or as many as there are cores, not run at once without waiting for each other?"""
    beside = next(iter(loaded.engines.values())).device.beside_host
    return not beside and 2 * (threads or num_cores()) > num_cores()


def open_all(bundles: Sequence[Path], **options: Any) -> list[Served]:
    """All of them.

    Raises:
        InputError: two have one name.
    """
    check_names(bundles)
    return [open_one(bundle, **options) for bundle in bundles]


class Server(uvicorn.Server):
    """One that tells the desk when it is to stop, so that what runs is finished or handed back in words."""

    def __init__(self, config: uvicorn.Config, desk: Desk) -> None:
        super().__init__(config)
        self._desk, self._draining = desk, list[asyncio.Task[None]]()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._draining:  # uvicorn's own handler stops at once when it hears a second signal
            self._draining.append(asyncio.get_event_loop().create_task(self._desk.drain()))
        super().handle_exit(sig, frame)


def config_of(app: FastAPI, protocol: type[asyncio.Protocol] = AutoHTTPProtocol) -> uvicorn.Config:
    """How uvicorn serves it; ``protocol``: its reader of HTTP, by default the quickest that is installed."""
    limits: Limits = app.state.desk.limits
    return uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, limit_concurrency=CONNECTIONS, ws="none",
        http=heads_within(limits.body_seconds, protocol), h11_max_incomplete_event_size=8 * LARGEST,  # ours is met first
        timeout_graceful_shutdown=int(limits.grace) + 5,
    )  # fmt: skip


def serve(app: FastAPI, *, host: str = "127.0.0.1", port: int = 8000, told: Callable[[str], None] = print) -> None:
    """Serve until SIGINT or SIGTERM. Port 0 takes a free one; ``told`` hears where it is.

    Raises:
        OutputError: the address cannot be taken.
    """
    desk: Desk = app.state.desk
    taken = _bind(host, port)
    url = f"http://{_in_url(host)}:{taken.getsockname()[1]}"
    server = Server(config_of(app), desk)
    told(f"serving {', '.join(desk.served)} on {url}")
    server.run(sockets=[taken])


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise OutputError(f"the server cannot listen on {host}:{port} ({in_one_line(error)}): choose another --port") from error
