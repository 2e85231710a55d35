"""``/v1/videos``: jobs that are asked for, looked at, fetched and let go of; or one that is waited for (``/sync``)."""

import asyncio
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from cachec.runtime.variants import PictureSize
from cachec.serving.bodies import FORM, content_type, form_body, json_body, while_there
from cachec.serving.desk import Desk, Job, Made
from cachec.serving.refusals import Refused, refused_for
from cachec.serving.ticker import Seen
from cachec.serving.wishes import VideoWish, read_wish

MP4 = "video/mp4"


@dataclass(eq=False)
class VideoJob:
    """One video on its way. ``step``: so many of its steps are done."""

    job: Job
    task: "asyncio.Task[Made]"
    number: str = field(default_factory=lambda: f"video_{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    completed: int | None = None
    step: int = 0

    def to_json(self) -> dict[str, Any]:
        """As OpenAI has it: ``status`` is queued, in_progress, completed or failed; ``stage`` says it more finely."""
        choice, program = self.job.choice, self.job.served.program(self.job.choice)
        done, error = self.task.done(), None
        if done and not self.task.cancelled() and (failure := self.task.exception()) is not None:
            refused = refused_for(failure if isinstance(failure, Exception) else RuntimeError())
            error = {"code": refused.code, "message": refused.detail}
        if done:
            stage = "completed" if error is None and not self.task.cancelled() else "failed"
        elif self.step == program.num_steps:
            stage = "encoding"
        else:
            stage = "generating" if self.step else "queued"
        status = stage if stage in ("queued", "completed", "failed") else "in_progress"
        return {
            "id": self.number,
            "object": "video",
            "model": self.job.served.name,
            "status": status,
            "stage": stage,
            "progress": 100 if status == "completed" else 99 * self.step // program.num_steps,
            "created_at": self.created,
            "completed_at": self.completed,
            "expires_at": None,
            "size": choice.size,
            "seconds": f"{PictureSize.parse(choice.size).frames / choice.fps:g}",
            "quality": choice.level,
            "prompt": choice.prompt,
            "error": error,
            "remixed_from_video_id": None,
            "inference_time_s": None,
            **(self.task.result().measured if status == "completed" else {}),
        }


class Videos:
    """The jobs of a server, in order. Of those that are done, the newest ``kept`` stay."""

    def __init__(self, desk: Desk) -> None:
        self._desk, self._jobs = desk, dict[str, VideoJob]()

    def start(self, job: Job) -> VideoJob:
        progress = list[VideoJob]()

        def watch(_: int, seen: Seen) -> None:
            progress[0].step = seen.step

        one = VideoJob(job, self._desk.start(job, watch))
        progress.append(one)
        self._jobs[one.number] = one
        one.task.add_done_callback(lambda _: self._done(one))
        return one

    def _done(self, one: VideoJob) -> None:
        one.completed = int(time.time())
        if not one.task.cancelled():
            one.task.exception()  # it was looked at, and is told to whoever asks
        done = [number for number, other in self._jobs.items() if other.task.done()]
        for number in done[: max(0, len(done) - self._desk.limits.kept)]:
            del self._jobs[number]

    def find(self, number: str) -> VideoJob:
        if number not in self._jobs:
            raise Refused(404, "there is no such video, or newer ones have taken its place", code="not_found")
        return self._jobs[number]

    def all(self) -> list[VideoJob]:
        return list(self._jobs.values())

    def remove(self, number: str) -> VideoJob:
        one = self.find(number)
        one.task.cancel()
        del self._jobs[number]
        return one


async def _wish(request: Request) -> VideoWish:
    if content_type(request) == FORM:
        return read_wish(VideoWish, await form_body(request), text=True)
    data = await json_body(request)
    if isinstance(data, Mapping) and isinstance(data.get("seconds"), str):  # as OpenAI has it
        return read_wish(VideoWish, data, text=True)
    return read_wish(VideoWish, data)


def video_routes(desk: Desk) -> APIRouter:
    """All under ``/v1/videos``."""
    routes, videos = APIRouter(), Videos(desk)

    @routes.post("/v1/videos")
    async def create(request: Request) -> Response:
        job = desk.admit(await _wish(request), request.state.number, video=True)
        return JSONResponse(videos.start(job).to_json())

    @routes.post("/v1/videos/sync")
    async def make(request: Request) -> Response:
        job = desk.admit(await _wish(request), request.state.number, video=True)
        made = await while_there(request, desk.start(job))
        return Response(made.files[0], media_type=MP4, headers={"x-inference-time-s": f"{made.seconds:.3f}"})

    @routes.get("/v1/videos")
    async def listed() -> dict[str, Any]:
        return {"object": "list", "data": [one.to_json() for one in videos.all()], "has_more": False}

    @routes.get("/v1/videos/{number}")
    async def look(number: str) -> dict[str, Any]:
        return videos.find(number).to_json()

    @routes.get("/v1/videos/{number}/content")
    async def content(number: str) -> Response:
        one = videos.find(number)
        if one.to_json()["status"] != "completed":
            raise Refused(409, f"the video is not there yet, or never will be: its status is {one.to_json()['status']}",
                          code="not_ready")  # fmt: skip
        return Response(one.task.result().files[0], media_type=MP4)

    @routes.delete("/v1/videos/{number}")
    async def delete(number: str) -> dict[str, Any]:
        return {"id": videos.remove(number).number, "object": "video.deleted", "deleted": True}

    return routes
