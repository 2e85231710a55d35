"""A bundle as a worker of NVIDIA Dynamo: its frontend takes the requests of OpenAI's image API, this makes the pictures.

    pip install 'cachec[serve,pictures,ort]' ai-dynamo
    python -m dynamo.frontend --discovery-backend file --http-port 8000 &
    DYN_DISCOVERY_BACKEND=file python examples/dynamo_worker.py flux.cachec

Requests that arrive while others run join them in the lanes. What ``cachec serve`` takes passes (``seed``, ``deadline``), and
what it refuses is refused in the same words. Of ``quality`` Dynamo's frontend knows standard, hd, high, medium, low and auto
only: call levels so.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvloop
from dynamo.llm import HttpError, ModelInput, ModelType, WorkerType, register_model
from dynamo.llm.exceptions import InvalidArgument
from dynamo.runtime import Context, DistributedRuntime, dynamo_worker

from cachec.serving.app import make_app
from cachec.serving.hosted import Asked, Hosted
from cachec.serving.server import open_all
from cachec.serving.wishes import ImageWish


def fields_of(request: dict[str, Any]) -> dict[str, Any]:
    """The fields of an image request as ``cachec serve`` takes them, from what the frontend hands over."""
    own = {name: value for name, value in request.items() if name in ImageWish.model_fields and value is not None}
    return own | ((request.get("extra_args") or {}).get("media_passthrough") or {})


@dynamo_worker()
async def work(runtime: DistributedRuntime, bundle: Path) -> None:
    """Serve the bundle until Dynamo says stop."""
    served = open_all([bundle], lanes=8)
    hosted = Hosted(make_app(served))
    await hosted.open()

    async def generate(request: dict[str, Any], context: Context) -> AsyncIterator[dict[str, Any]]:
        body = json.dumps(fields_of(request)).encode()
        asked = Asked("POST", "/v1/images/generations", b"", [(b"content-type", b"application/json")], body)
        status, answer = 200, b""
        async for message in hosted.call(asked):
            status = message.get("status", status)
            answer += message.get("body", b"")
        data = json.loads(answer)
        if status in (400, 404):
            raise InvalidArgument(data["error"]["message"])
        if status != 200:
            raise HttpError(status, data["error"]["message"])
        yield {"created": data["created"], "data": [{"b64_json": one["b64_json"]} for one in data["data"]]}

    endpoint = runtime.endpoint("cachec.images.generate")
    name = served[0].name
    await register_model(ModelInput.Text, ModelType.Images, endpoint, name, name, worker_type=WorkerType.Aggregated, needs=[])
    try:
        await endpoint.serve_endpoint(generate, graceful_shutdown=True)
    finally:
        await hosted.close()
        served[0].close()


if __name__ == "__main__":
    uvloop.install()
    asyncio.run(work(Path(sys.argv[1])))
