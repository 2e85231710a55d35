"""``/v1/images``: pictures, all at once or with their progress as server-sent events."""

import asyncio
import base64
import json
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from cachec.runtime.specs import Array
from cachec.serving.bodies import edit_body, json_body, while_there
from cachec.serving.desk import Desk, Job, Made
from cachec.serving.guard import FILES
from cachec.serving.limits import EDITS
from cachec.serving.refusals import Refused, refused_for
from cachec.serving.ticker import Seen
from cachec.serving.wishes import EditWish, ImageWish, read_wish


class Shelf:
    """Files that wait to be fetched, the newest ``kept`` of them, under names that nobody guesses."""

    def __init__(self, kept: int) -> None:
        self._kept, self._files = kept, OrderedDict[str, bytes]()

    def put(self, file: bytes) -> str:
        name = f"{uuid.uuid4().hex}.png"
        self._files[name] = file
        while len(self._files) > self._kept:
            self._files.popitem(last=False)
        return name

    def get(self, name: str) -> bytes:
        if name not in self._files:
            raise Refused(404, "there is no such file, or newer ones have taken its place", code="not_found")
        return self._files[name]


def image_routes(desk: Desk) -> APIRouter:
    """All under ``/v1/images``, and files whose URLs were given out."""
    routes, shelf = APIRouter(), Shelf(desk.limits.kept)

    @routes.post("/v1/images/generations")
    async def generate(request: Request, data: Annotated[object, Depends(json_body)]) -> Response:
        wish = read_wish(ImageWish, data)
        return await answer(request, wish, desk.admit(wish, request.state.number))

    @routes.post(EDITS)
    async def edit(request: Request) -> Response:
        wish = read_wish(EditWish, await edit_body(request), text=True)
        picture = await desk.apart(desk.find(wish.model).read_picture, wish)
        return await answer(request, wish, desk.admit(wish, request.state.number, picture=picture))

    @routes.post("/v1/images/variations")
    async def vary() -> None:
        raise Refused(400, f"pictures are made of prompts: post the picture and a prompt to {EDITS}", code="unsupported")

    async def answer(request: Request, wish: ImageWish, job: Job) -> Response:
        if wish.stream:
            return _stream(desk, job, wish)
        made = await while_there(request, desk.start(job))
        base = str(request.base_url).rstrip("/")
        where = "" if wish.response_format == "b64_json" else base + FILES
        return Response(json.dumps(_reply(job, made, shelf, where)), media_type="application/json")

    @routes.get(FILES + "{name}")
    async def file(name: str) -> Response:
        return Response(shelf.get(name), media_type="image/png")

    return routes


def _reply(job: Job, made: Made, shelf: Shelf, where: str) -> dict[str, Any]:
    """As sglang and OpenAI have it; ``where`` files are fetched, or they are in it."""
    data = []
    for file, seed in zip(made.files, made.seeds, strict=True):
        one = {"url": where + shelf.put(file)} if where else {"b64_json": _base64(file)}
        data.append({**one, "revised_prompt": None, "seed": seed})
    return {
        "id": job.number,
        "created": int(time.time()),
        "data": data,
        **_facts(job),
        **made.measured,
    }


def _facts(job: Job) -> dict[str, Any]:
    choice = job.choice
    return {
        "model": job.served.name,
        "size": choice.size,
        "quality": choice.level,
        "num_inference_steps": choice.steps,
        "output_format": "png",
        "background": "opaque",
    }


def _base64(file: bytes) -> str:
    return base64.b64encode(file).decode()


def _stream(desk: Desk, job: Job, wish: ImageWish) -> StreamingResponse:
    if wish.partial_images and job.served.program(job.choice).carry is not None:
        raise Refused(400, "partial_images: previews need a sampler that moves on straight lines, which this bundle's "
                      "does not: leave it out", code="unsupported", param="partial_images")  # fmt: skip
    progress: asyncio.Queue[tuple[int, Seen] | None] = asyncio.Queue()
    task = desk.start(job, lambda *seen: progress.put_nowait(seen), latents=wish.partial_images > 0)
    task.add_done_callback(lambda _: progress.put_nowait(None))
    return Stream(task, _events(desk, job, task, progress, wish.partial_images), media_type="text/event-stream",
                  headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})  # fmt: skip


class Stream(StreamingResponse):
    """One whose end is that of its ``task``, also if the client goes away before the first event."""

    def __init__(self, task: "asyncio.Task[Made]", content: AsyncIterator[str], **given: Any) -> None:
        super().__init__(content, **given)
        self._task = task

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._task.cancel()


async def _events(
    desk: Desk,
    job: Job,
    task: "asyncio.Task[Made]",
    progress: "asyncio.Queue[tuple[int, Seen] | None]",
    previews: int,
) -> AsyncIterator[str]:
    """One for every step that was made, ``previews`` with a picture for every sample, and one for every result."""
    before, sent = dict[int, tuple[int, Array]](), dict[int, int]()
    try:
        while (item := await progress.get()) is not None:
            place, seen = item
            of = job.served.program(job.choice).num_steps
            yield _event(job, "progress", {"step": seen.step, "steps": of, "index": place})
            if seen.latents is None:
                continue
            if place in before and seen.step < of and sent.get(place, 0) < previews:
                due = (sent.get(place, 0) + 1) * of // (previews + 1)
                if seen.step >= due:
                    file = await desk.apart(job.served.preview, job.choice, before[place], (seen.step, seen.latents))
                    partial = {"b64_json": _base64(file), "partial_image_index": sent.get(place, 0), "index": place}
                    yield _event(job, "partial_image", {**partial, **_facts(job), "created_at": int(time.time())})
                    sent[place] = sent.get(place, 0) + 1
            before[place] = seen.step, seen.latents
        made = await task
        for place, (file, seed) in enumerate(zip(made.files, made.seeds, strict=True)):
            result = {"b64_json": _base64(file), "index": place, "seed": seed, "created_at": int(time.time()), **_facts(job)}
            yield _event(job, "completed", {**result, **made.measured})
    except Exception as error:
        refused = refused_for(error)
        yield f"event: error\ndata: {json.dumps({'type': 'error', **refused.to_json()})}\n\n"


def _event(job: Job, kind: str, data: dict[str, Any]) -> str:
    name = f"{'image_generation' if job.choice.picture is None else 'image_edit'}.{kind}"
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n"
