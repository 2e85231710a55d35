"""The app: routes over a desk, and how every error is told."""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from cachec.runtime.version import VERSION
from cachec.serving.desk import Desk
from cachec.serving.guard import Guard
from cachec.serving.images import image_routes
from cachec.serving.limits import Limits
from cachec.serving.refusals import Refused, refused_for
from cachec.serving.served import Served
from cachec.serving.videos import video_routes

log = logging.getLogger(__name__)
POLICY = (
    "default-src 'none'; img-src 'self' data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)


def make_app(
    served: Sequence[Served],
    *,
    limits: Limits | None = None,
    key: str | None = None,
    log_requests: bool = False,
    only_here: bool = False,
) -> FastAPI:
    """The app that serves these bundles; its lanes run from its startup to its shutdown.

    ``key``: an API key that requests must bring. ``log_requests``: what is asked for, too, not ids alone. ``only_here``: it
    listens on loopback, so that without a key it answers under this machine's own names alone.
    """
    limits = limits or Limits()
    desk = Desk(served, limits, log_requests=log_requests)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        async with desk.open():
            yield

    app = FastAPI(title="cachec", version=VERSION, lifespan=life, docs_url=None, redoc_url=None)
    app.state.desk = desk
    app.add_middleware(Guard, limits=limits, key=key, only_here=only_here)
    app.add_exception_handler(HTTPException, _tell)
    app.add_exception_handler(Exception, _tell)
    app.include_router(image_routes(desk))
    app.include_router(video_routes(desk))
    _add_about(app, desk)
    return app


def _add_about(app: FastAPI, desk: Desk) -> None:
    page = files("cachec.serving").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/")
    async def show() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [one.to_json() for one in desk.served.values()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return desk.find(name).to_json()

    @app.get("/health")
    async def health() -> Response:
        status = "broken" if desk.failure is not None else "stopping" if desk.draining else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(desk.metrics.in_text(), media_type=CONTENT_TYPE_LATEST)


async def _tell(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and not isinstance(error, Refused):
        words = {404: f"there is nothing at {request.url.path[:80]}", 405: f"{request.method} is not done here"}
        error = Refused(error.status_code, words.get(error.status_code, str(error.detail)), code="invalid_request")
    refused = refused_for(error)
    return JSONResponse(refused.to_json(), refused.status_code, refused.headers)
