"""How a client of the soak sends its request and reads the answer, and what came of it."""

import asyncio
import base64
import hashlib
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from bench.soak_cases import STEPS, Case, Key, Kind, Stage

BODY_SECONDS = 2.0  # that the server gives a head, and a body
TRICKLE = 0.2  # seconds between two bytes
HEAD = 2**20  # bytes of a head that goes on and on
FEW, LIFE = 1024, 2.5  # bytes that a slow reader takes at once; seconds in which a request is made, and more
PICTURE, STILL, REFUSED, LATE, CUT = (
    "the right picture",
    "changed, and still a request: a picture",
    "refused in words",
    "too slow: 408",
    "cut off",
)
WENT = {stage: f"went away {stage.value}" for stage in Stage}
RIGHT = (PICTURE, STILL, REFUSED, LATE, CUT, *WENT.values())
STEP = re.compile(rb'"step": (\d+)')


async def one(url: str, case: Case, wanted: dict[Key, str]) -> str:
    """One of the right outcomes, or what is wrong."""
    match case.kind:
        case Kind.LEAVES:
            async with connected(url, few=case.stage is Stage.ANSWER) as (reader, writer):
                stage, answer = await leave(reader, writer, case)
            return judge(case, answer, wanted) if stage is None else WENT[stage]
        case Kind.ENDLESS | Kind.SILENT | Kind.TRICKLES | Kind.HALF:
            async with connected(url) as (reader, writer):
                return refusal(case.kind, *await asyncio.gather(everything(reader), dawdle(writer, case)))
        case Kind.READS_SLOWLY:
            async with connected(url, few=True) as (reader, writer):
                writer.write(case.data)
                answer = b""
                while piece := await reader.read(FEW):
                    answer += piece
                    await asyncio.sleep(0.05 + 0.05 * case.draw.random())
                return judge(case, answer, wanted)
    async with connected(url) as (reader, writer):
        writer.write(case.data)
        return judge(case, await everything(reader), wanted)


@asynccontextmanager
async def connected(url: str, *, few: bool = False) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection, closed at the end. ``few``: next to nothing of an answer finds room on this side."""
    where, taken = urlsplit(url), socket.socket()
    taken.setblocking(False)
    if few:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, FEW)
    await asyncio.get_running_loop().sock_connect(taken, (where.hostname, where.port))
    reader, writer = await asyncio.open_connection(sock=taken, limit=FEW if few else 2**16)
    try:
        yield reader, writer
    finally:
        writer.close()


async def everything(reader: asyncio.StreamReader) -> bytes:
    """What comes until the server closes, also if it closes while something is sent to it."""
    answer = b""
    try:
        while piece := await reader.read(2**16):
            answer += piece
    except ConnectionError:
        pass
    return answer


async def dawdle(writer: asyncio.StreamWriter, case: Case) -> None:
    """Send half of it, or more than all, in its own time; until the server closes."""
    try:
        match case.kind:
            case Kind.HALF:
                writer.write(case.data[: case.draw.randrange(1, len(case.data))])
                await asyncio.sleep(0.2)
                writer.write_eof()
            case Kind.SILENT:
                writer.write(case.data[: case.draw.randrange(1, case.head - 2)])
            case Kind.TRICKLES:
                pieces = int(3 * BODY_SECONDS / TRICKLE)
                writer.write(case.data[: case.head])
                for byte in case.data[case.head : case.head + pieces]:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(TRICKLE)
            case _:
                writer.write(case.data[: case.head - 2])
                for place in range(0, HEAD, 2**14):
                    writer.write(f"X-{place}: {'a' * 2**14}\r\n".encode())
                    await writer.drain()
    except ConnectionError:
        pass


def refusal(kind: Kind, answer: bytes, _: None) -> str:
    """What came of a client that never sent a whole request."""
    status = status_of(answer)
    if kind in (Kind.SILENT, Kind.TRICKLES):
        return LATE if status == 408 and in_words(answer) else f"{kind.value}, and got {answer[:200]!r}"
    if not answer:
        return CUT
    return REFUSED if 400 <= status < 500 and in_words(answer) else f"{kind.value}, and got {answer[:200]!r}"


async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, case: Case) -> tuple[Stage | None, bytes]:
    """When it went away, as far as it has heard; or that the whole answer was there before it did, and the answer."""
    draw = case.draw
    if case.stage is Stage.SENDING:
        writer.write(case.data[: draw.randrange(1, len(case.data))])
        await asyncio.sleep(draw.uniform(0, 0.3))
        return Stage.SENDING, b""
    writer.write(case.data)
    if case.stage is Stage.ANY:
        try:
            return None, await asyncio.wait_for(everything(reader), draw.uniform(0, LIFE))
        except TimeoutError:
            return Stage.ANY, b""
    answer = b""
    while piece := await reader.read(FEW if case.stage is Stage.ANSWER else 2**16):
        answer += piece
        stage = heard(answer)
        step, most = case.leaves_after
        match case.stage:
            case Stage.WAITING if stage is not None:
                return stage, b""
            case Stage.DENOISING if stage is Stage.DENOISING and steps_of(answer) < step:
                continue
            case Stage.DENOISING if stage in (Stage.DENOISING, Stage.DECODING, Stage.ANSWER):
                return stage, b""
            case Stage.DECODING if stage in (Stage.DECODING, Stage.ANSWER):
                return stage, b""
            case Stage.ANSWER if stage is Stage.ANSWER and len(answer) > most:
                return stage, b""
    return None, answer


def heard(answer: bytes) -> Stage | None:
    """Where the request is, by what has come of its answer so far."""
    head, end, body = answer.partition(b"\r\n\r\n")
    if not end:
        return None
    if b"event-stream" not in head:
        return Stage.ANSWER if body else None
    if b".completed" in body:
        return Stage.ANSWER
    if not (step := steps_of(body)):
        return Stage.WAITING
    return Stage.DECODING if step == STEPS else Stage.DENOISING


def steps_of(answer: bytes) -> int:
    """The latest step that a stream has told of; 0 before the first."""
    return max((int(step) for step in STEP.findall(answer)), default=0)


def judge(case: Case, answer: bytes, wanted: dict[Key, str]) -> str:
    """What came of a request that was sent whole."""
    status = status_of(answer)
    malformed = case.kind in (Kind.CHANGED, Kind.VIDEO)
    if status != 200:
        return REFUSED if malformed and 400 <= status < 500 and in_words(answer) else f"refused: {answer[:400]!r}"
    if case.must_be_refused:
        return f"an answer to what is no request: {case.body[:200]!r}"
    if malformed and b'"type": "error"' in answer:
        return f"an error of its own: {answer[-200:]!r}" if b'"server_error"' in answer else REFUSED
    pictures = re.findall(rb'"b64_json": "([^"]*)"', answer)  # previews before results
    if len(pictures) < case.count:
        return f"an answer without a picture: {answer[:200]!r}"
    made = base64.b64decode(pictures[-case.count])
    if malformed:
        return STILL if made.startswith(b"\x89PNG") and made.endswith(b"IEND\xaeB`\x82") else "half a picture"
    return PICTURE if hashlib.sha256(made).hexdigest() == wanted[case.key] else "another picture"


def status_of(answer: bytes) -> int:
    """Of its first line; 0 if there is no answer."""
    words = answer.split(b" ", 2)
    return int(words[1]) if len(words) > 2 and words[1].isdigit() else 0


def in_words(answer: bytes) -> bool:
    """Does it say what is wrong? uvicorn does in a line of its own where there is no HTTP at all."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return body.startswith(b"Invalid HTTP request") or (b"application/json" in head.lower() and b'"message"' in body)
