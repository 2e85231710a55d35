"""``cachec serve``: bundles opened, and an HTTP server around them that stops as it should."""

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from cachec.engines import open_bundle
from cachec.runtime.errors import InputError, OutputError, in_one_line
from cachec.runtime.session import LoadedBundle
from cachec.serving.desk import Desk
from cachec.serving.served import Pictures, Served

log = logging.getLogger(__name__)
CONNECTIONS = 2048  # at once; more get 503


def open_served(
    bundles: Sequence[Path],
    pictures: Callable[[LoadedBundle], Pictures],
    *,
    lanes: int = 8,
    policy: str = "shortest",
    **where: Any,
) -> list[Served]:
    """Bundles by the names of their directories, without ``.cachec``. ``where``: as ``cachec.load`` takes it."""
    served = list[Served]()
    for bundle in bundles:
        name = bundle.resolve().name.removesuffix(".cachec")
        if name in [one.name for one in served]:
            raise InputError(f"two bundles are called {name}, and requests could not tell them apart: rename one")
        loaded = open_bundle(bundle, **where)
        served.append(Served(name, loaded, pictures(loaded), lanes=lanes, policy=policy))
    return served


class Server(uvicorn.Server):
    """One that tells the desk when it is to stop, so that what runs is finished or handed back in words."""

    def __init__(self, config: uvicorn.Config, desk: Desk) -> None:
        super().__init__(config)
        self._desk, self._draining = desk, list[asyncio.Task[None]]()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._draining:  # uvicorn's own handler stops at once when it hears a second signal
            self._draining.append(asyncio.get_event_loop().create_task(self._desk.drain()))
        super().handle_exit(sig, frame)


def serve(app: FastAPI, *, host: str = "127.0.0.1", port: int = 8000, told: Callable[[str], None] = print) -> None:
    """Serve until SIGINT or SIGTERM. Port 0 takes a free one; ``told`` hears where it is.

    Raises:
        OutputError: the address cannot be taken.
    """
    desk: Desk = app.state.desk
    taken = _bind(host, port)
    url = f"http://{_in_url(host)}:{taken.getsockname()[1]}"
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, limit_concurrency=CONNECTIONS, ws="none",
        timeout_graceful_shutdown=int(desk.limits.grace) + 5,
    )  # fmt: skip
    server = Server(config, desk)
    told(f"serving {', '.join(desk.served)} on {url}")
    server.run(sockets=[taken])


def is_loopback(host: str) -> bool:
    """Can only this machine reach it?"""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise OutputError(f"the server cannot listen on {host}:{port} ({in_one_line(error)}): choose another --port") from error
