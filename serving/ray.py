"""The same server on Ray Serve: an ingress takes requests, replicas make them, each with lanes of its own.

``serve run cachec.serving.ray:app bundles=/data/flux.cachec``; from Python ``serve.run(app({...}))``. The ingress holds a
request until it is answered: one whose replica dies is given to another.
"""

import asyncio
import importlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from cachec.runtime.errors import InputError, in_one_line, unknown_name
from cachec.serving.app import make_app
from cachec.serving.bodies import FORM, content_type, edit_body, json_body
from cachec.serving.command import KEY, read_key
from cachec.serving.desk import in_own_thread
from cachec.serving.guard import check_head, too_large
from cachec.serving.hosted import Asked, Hosted
from cachec.serving.limits import Limits
from cachec.serving.refusals import Refused
from cachec.serving.served import Served, check_names, name_and_place

log = logging.getLogger(__name__)
PAUSE = 0.2  # seconds before a request is given to another replica
STREAM = b"text/event-stream"


@dataclass(frozen=True)
class Plan:
    """What is deployed, as ``serve run`` and a RayService write it.

    ``bundles``: directories that every machine has, or ``NAME=DIRECTORY``. ``replicas``: how many, or ``0-4`` for as many as
    the load asks for; ``gpus`` of each; ``per_replica``: bundles that one keeps open. ``keyed``: requests must bring an API
    key, and nothing is served where the ingress finds none (``key_file``, or ``CACHEC_API_KEY`` of its machine). ``opener``:
    where the function is that opens a bundle, given it as it is written here and ``options``.
    """

    bundles: Sequence[str]
    replicas: str = "1"
    gpus: float = 0.0
    cpus: float = 1.0
    per_replica: int = 1
    lanes: int = 8
    key_file: str | None = None
    keyed: bool = False
    limits: Limits = field(default_factory=Limits)
    options: Mapping[str, Any] = field(default_factory=dict)
    opener: str = "cachec.serving.server:open_one"

    @property
    def names(self) -> dict[str, str]:
        """Bundles by what requests call them."""
        return {name_and_place(bundle)[0]: bundle for bundle in self.bundles}

    @property
    def scaling(self) -> dict[str, Any]:
        """What Ray Serve is told of the number of replicas.

        Raises:
            InputError: it is none.
        """
        least, dash, most = self.replicas.partition("-")
        if not least.isdigit() or (dash and not most.isdigit()) or int(most or least) < max(1, int(least)):
            raise InputError(f"replicas is {self.replicas}; write a number, or two as in 0-4")
        if not dash:
            return {"num_replicas": int(least)}
        bounds = {"min_replicas": int(least), "max_replicas": int(most), "target_ongoing_requests": self.lanes}
        return {"autoscaling_config": bounds}

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> "Plan":
        """From the ``args`` of a Serve application; ``bundles`` may be one text with commas, ``limits`` a mapping.

        Raises:
            InputError: there is no such argument, no bundle, or two of one name.
        """
        given = dict(args)
        if strange := sorted(set(given) - set(cls.__dataclass_fields__)):
            raise unknown_name("argument", strange[0], cls.__dataclass_fields__)
        if not given.get("bundles"):
            raise InputError("there is nothing to serve: give bundles=DIRECTORY")
        if isinstance(given["bundles"], str):
            given["bundles"] = given["bundles"].split(",")
        if isinstance(given.get("limits"), Mapping):
            given["limits"] = Limits(**given["limits"])
        for name, kind in (("gpus", float), ("cpus", float), ("per_replica", int), ("lanes", int), ("replicas", str)):
            if name in given:
                given[name] = kind(given[name])
        check_names(given["bundles"])
        return cls(**given)


def app(args: Mapping[str, Any]) -> Any:
    """The Serve application of these arguments, which are the fields of ``Plan``."""
    plan = Plan.from_args(args)
    replica = serve.deployment(
        name="cachec-replica",
        max_ongoing_requests=plan.lanes + plan.limits.queue,
        graceful_shutdown_timeout_s=plan.limits.grace,
        health_check_period_s=2.0,
        ray_actor_options={"num_gpus": plan.gpus, "num_cpus": plan.cpus},
        **plan.scaling,
    )(_opening(plan.per_replica))
    ingress = serve.deployment(name="cachec-ingress", max_ongoing_requests=4096, ray_actor_options={"num_cpus": 0})(Ingress)
    return ingress.bind(plan, replica.bind(plan))


def run_on_ray(args: Mapping[str, Any], *, host: str, port: int, told: Callable[[str], None]) -> None:
    """Deploy, and stay until SIGINT or SIGTERM; what was deployed then ends.

    Raises:
        InputError: an argument cannot be used, or there is no such cluster.
    """
    application = app(args)
    own = {} if os.environ.get("RAY_ADDRESS") else {"address": "local", "include_dashboard": False}
    try:
        ray.init(**own, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"Ray cannot be used: {in_one_line(error)}") from error
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(application)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has put one of its own there, which aborts
        told(f"serving {', '.join(Plan.from_args(args).names)} on http://{host}:{port}, on Ray")
        threading.Event().wait()
    except KeyboardInterrupt:
        log.info("stopped")
    finally:
        serve.shutdown()
        ray.shutdown()


class Replica:
    """One process with engines and lanes; a bundle is opened when it is first asked for."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._open = plan, dict[str, _Bundle]()

    async def hosted(self, name: str) -> "_Bundle":
        """A bundle, opened if it is not; what else is open may have to make room."""
        module, _, function = self._plan.opener.partition(":")
        opener = getattr(importlib.import_module(module), function)
        options = {"lanes": self._plan.lanes, **self._plan.options}
        served = await asyncio.to_thread(opener, self._plan.names[name], **options)
        one = _Bundle(served, self._plan.limits)
        await one.open()
        self._open = {other: still for other, still in self._open.items() if still.is_open} | {name: one}
        return one

    async def answer(self, asked: Asked) -> AsyncIterator[Any]:
        """What the bundle's own server answers, message by message."""
        one = await self.hosted(serve.get_multiplexed_model_id())
        async for message in one.call(asked):
            yield message

    def check_health(self) -> None:
        """Raise if lanes stand still, or engines fail request after request: Ray then starts another replica in its place."""
        for one in self._open.values():
            if one.is_open and one.failure is not None:
                raise one.failure


def _opening(most: int) -> type[Replica]:
    """The replica that keeps so many bundles open, as a decorator of Ray Serve's on its class tells it."""

    class Opening(Replica):
        hosted = serve.multiplexed(max_num_models_per_replica=most)(Replica.hosted)

    return Opening


class _Bundle(Hosted):
    """One that is open in a replica."""

    def __init__(self, served: Served, limits: Limits) -> None:
        super().__init__(make_app([served], limits=limits))
        self._served, self.is_open = served, True
        self._loop = asyncio.get_running_loop()

    @property
    def failure(self) -> Exception | None:
        failure: Exception | None = self.app.state.desk.failure
        return failure

    def __del__(self) -> None:
        """What Ray Serve calls when another bundle takes its place, and Python later."""
        if self.is_open:
            self.is_open = False
            self._loop.create_task(self._end())

    async def _end(self) -> None:
        await self.close()
        await in_own_thread(self._served.close)


class Ingress:
    """Takes requests, finds the bundle that is meant, and keeps asking until a replica has answered."""

    def __init__(self, plan: Plan, replica: Any) -> None:
        self._plan, self._replica = plan, replica
        self._key = read_key(None if plan.key_file is None else Path(plan.key_file))
        if plan.keyed and self._key is None:
            raise InputError(f"the API key did not reach this machine: give it as a file, or as {KEY} where Ray runs")

    async def __call__(self, request: Request) -> Response:
        """Ray Serve's proxy hands it every request."""
        limits = self._plan.limits
        try:
            check_head(request.url.path, request.headers, limits, self._key)
            body = await request.body()
            if len(body) > (most := limits.body_at(request.url.path)):
                raise too_large(most)
            name = self._name(request, await _fields(request))
        except Refused as refused:
            return JSONResponse(refused.to_json(), refused.status_code, refused.headers)
        if request.url.path == "/health":
            return JSONResponse({"status": "ok"})
        if request.url.path == "/v1/models":
            return await self._models(request)
        asked = Asked(request.method, request.url.path, request.url.query.encode(), request.headers.raw, body)
        messages = self._messages(name, asked)
        head = await anext(messages)
        headers = {key.decode(): value.decode() for key, value in head["headers"] if key != b"content-length"}
        return StreamingResponse(_bodies(messages), head["status"], headers)

    def _name(self, request: Request, fields: Mapping[str, Any]) -> str:
        """Which bundle a request is for.

        Raises:
            Refused: there is none of this name, or it is asked for what lives in one replica only.
        """
        path, names = request.url.path, self._plan.names
        if path.startswith("/v1/videos") and path != "/v1/videos/sync":
            raise Refused(400, "on Ray videos are made while the client waits: post to /v1/videos/sync", code="unsupported")
        name = path.removeprefix("/v1/models/") if path.startswith("/v1/models/") else fields.get("model")
        if fields.get("response_format") == "url":
            raise Refused(400, "response_format: on Ray pictures are in the reply; leave it out", code="unsupported",
                          param="response_format")  # fmt: skip
        if not isinstance(name, str):  # none, or one that the replica refuses in words
            return next(iter(names))
        if name not in names:
            raise Refused(404, str(unknown_name("model", name, names)), code="model_not_found", param="model")
        return name

    async def _models(self, request: Request) -> Response:
        """Of all bundles, which opens those that are not."""
        found = []
        for name in self._plan.names:
            asked = Asked("GET", f"/v1/models/{name}", b"", request.headers.raw, b"")
            messages = [message async for message in self._messages(name, asked)]
            found.append(json.loads(b"".join(message.get("body", b"") for message in messages)))
        return JSONResponse({"object": "list", "data": found})

    async def _messages(self, name: str, asked: Asked) -> AsyncIterator[Any]:
        """What a replica answers, its head first; from another replica if one dies or stops before it has answered."""
        end, told = time.monotonic() + self._plan.limits.seconds, False
        while True:
            stream = self._replica.options(stream=True, multiplexed_model_id=name).answer.remote(asked)
            try:
                head = await anext(stream)
                if head["status"] != 503 or time.monotonic() >= end:
                    if _is_stream(head):
                        if not told:
                            told = True
                            yield head
                        async for message in stream:  # if the replica dies now, another one's progress follows
                            yield message
                        return
                    whole = [message async for message in stream]
                    for message in map(_as_event, whole) if told else (head, *whole):
                        yield message
                    return
            except RayActorError as error:
                if time.monotonic() >= end:
                    raise
                log.warning("a replica was lost, and its request is given to another: %s", type(error).__name__)
            finally:
                stream.cancel()
            await asyncio.sleep(PAUSE)


def _as_event(message: Mapping[str, Any]) -> dict[str, Any]:
    """An error's body for a client that listens to events already."""
    body = message.get("body")
    return {**message, "body": b"event: error\ndata: " + body + b"\n\n"} if body else dict(message)


def _is_stream(head: Mapping[str, Any]) -> bool:
    return any(key == b"content-type" and value.startswith(STREAM) for key, value in head["headers"])


async def _bodies(messages: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    async for message in messages:
        if message.get("body"):
            yield message["body"]


async def _fields(request: Request) -> dict[str, Any]:
    """Those of a body in JSON, or of a form with a picture; none: it is neither, which the replica says in words."""
    try:
        data = await (edit_body if content_type(request) == FORM else json_body)(request)
    except (Refused, HTTPException, MultiPartException):
        return {}
    return data if isinstance(data, dict) else {}
