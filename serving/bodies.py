"""Bodies of requests as JSON or forms, and clients that go away."""

import asyncio
import json
from typing import Any, TypeVar

from fastapi import Request
from starlette.datastructures import UploadFile

from cachec.serving.refusals import Refused

R = TypeVar("R")
JSON = "application/json"
FORM = "multipart/form-data"


def content_type(request: Request) -> str:
    """Of the body, without its options."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def json_body(request: Request) -> Any:
    """What the body says.

    Raises:
        Refused: it is no JSON.
    """
    if (kind := content_type(request)) != JSON:
        raise Refused(
            415, f"the body is {kind[:80] or 'of no type'}: send JSON, with Content-Type: {JSON}", code="invalid_body"
        )
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise Refused(400, "the body is not JSON that can be read", code="invalid_body") from error


async def form_body(request: Request) -> dict[str, Any]:
    """The fields of a form, of files what is in them.

    Raises:
        Refused: it cannot be read, or says a field twice.
    """
    async with request.form(max_files=2, max_fields=64) as form:
        items = form.multi_items()
        if len({name for name, _ in items}) != len(items):
            raise Refused(400, "the form has a field twice", code="invalid_body")
        return {name: await value.read() if isinstance(value, UploadFile) else value for name, value in items}


async def edit_body(request: Request) -> dict[str, Any]:
    """The same; ``image[]`` is ``image``, as clients with a list of one have it. Raises ``Refused``, also if it is no form."""
    if (kind := content_type(request)) != FORM:
        raise Refused(
            415, f"the body is {kind[:80] or 'of no type'}: send a form, with Content-Type: {FORM}", code="invalid_body"
        )
    return {name.removesuffix("[]"): value for name, value in (await form_body(request)).items()}


async def while_there(request: Request, task: "asyncio.Task[R]") -> R:
    """What ``task`` makes; it is cancelled when the client goes away, or when this is."""
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refused(499, "the client went away", code="disconnected")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
