"""Requests of all kinds to a server of tiny-flux: good ones, malformed ones, clients that are slow or go away."""

import asyncio
import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

from cachec.compiler.calibration.prompts import default_prompts

CLIENTS = 12
PATIENCE = 120.0  # seconds without an answer: it hangs
PROMPTS, SEEDS, STEPS = 8, 4, 4
PICTURE, REFUSED, GONE = "the right picture", "refused in words", "went away"
ODD: list[Any] = [None, True, 0, -1, 2**70, 1e308, "", "x" * 9000, [], {}, "\u202e\0\ud83d", [[[]]], "1024x1024", "exact"]
FIELDS = (
    "prompt",
    "n",
    "seed",
    "quality",
    "size",
    "num_inference_steps",
    "guidance_scale",
    "stream",
    "model",
    "deadline",
    "lora",
)


def run(count: int, folder: Path, work: Path) -> dict[str, Any]:
    """``count`` requests, of which one in eleven is malformed; what came of them, and what is left behind."""
    begun, bundle = time.monotonic(), work / "requests.cachec"
    given = ["compile", "tiny-flux", "--method", "taylor", "--interval", "2", "--steps", str(STEPS), "--target", "ort"]
    if not bundle.exists():
        subprocess.run([sys.executable, "-m", "cachec", *given, "-o", str(bundle)], check=True, capture_output=True)
    wanted = pictures(bundle)
    command = [sys.executable, "-m", "cachec", "serve", str(bundle), "--port", "0", "--max-body-seconds", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        wrong, seen, left = asyncio.run(campaign(url, server.pid, count, wanted))
        server.send_signal(signal.SIGTERM)
        if (code := server.wait(60)) != 0:
            wrong.append([count, f"the server ended with {code}"])
    return {"cases": count, "outcomes": seen, "wrong": wrong, "seconds": round(time.monotonic() - begun), "left": left}


def pictures(bundle: Path) -> dict[tuple[str, int, int], str]:
    """The hash of every picture that is asked for, by level, prompt and seed, as a generator makes them, without a server."""
    import cachec
    from cachec.pictures.generator import Generator

    found = {}
    with cachec.load(bundle) as loaded, Generator(loaded) as maker:
        for level in loaded.programs:
            for place, prompt in enumerate(default_prompts("avatars", "train")[:PROMPTS]):
                for seed in range(SEEDS):
                    (picture,) = maker.generate([prompt], seeds=[seed], level=level)
                    found[level, place, seed] = hashlib.sha256(maker.to_png(picture)).hexdigest()
    return found


async def campaign(url: str, process: int, count: int, wanted: dict[tuple[str, int, int], str]) -> tuple[list[Any], Any, Any]:
    """All cases, some at a time; then nothing may be left: no request, no file, no memory."""
    wrong, seen, cases = list[Any](), Counter[str](), iter(range(count))
    levels = sorted({level for level, _, _ in wanted})
    for case in range(50):  # what is only taken once is taken now
        await one(url, Case(case, levels, good=True), wanted)
    files, memory = open_files(process), resident(process)

    async def client() -> None:
        for case in cases:
            try:
                said = await asyncio.wait_for(one(url, Case(case, levels), wanted), PATIENCE)
            except TimeoutError:
                said = "hung"
            seen[said if said in (PICTURE, REFUSED, GONE) else "wrong"] += 1
            if said not in (PICTURE, REFUSED, GONE):
                wrong.append([case, said])
                print(f"requests {case}: {said}", flush=True)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    await asyncio.sleep(1)
    text = (await asked(url, b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")).decode()
    waiting = [line for line in text.splitlines() if line.startswith(("cachec_queued_requests{", "cachec_running_requests{"))]
    wrong += [[count, line] for line in waiting if not line.endswith(" 0.0")]
    left = {"files": open_files(process) - files, "bytes": resident(process) - memory}
    if left["files"] > CLIENTS:
        wrong.append([count, f"{left['files']} files more are open"])
    return wrong, dict(seen.most_common()), left


class Case:
    """What is sent: made from its number alone."""

    def __init__(self, number: int, levels: list[str], *, good: bool = False) -> None:
        draw = Random(number)
        self.key = draw.choice(levels), draw.randrange(PROMPTS), draw.randrange(SEEDS)
        level, place, seed = self.key
        fields: dict[str, Any] = {"prompt": default_prompts("avatars", "train")[place], "quality": level, "seed": seed}
        self.malformed = not good and draw.random() < 1 / 11
        self.stays = draw.uniform(0, 0.3) if not good and not self.malformed and draw.random() < 0.1 else None
        self.streams = not self.malformed and draw.random() < 0.15
        if self.streams:
            fields |= {"stream": True, "partial_images": draw.randrange(3)}
        if self.malformed and draw.random() < 0.6:
            fields[draw.choice((*FIELDS, "what"))] = draw.choice(ODD)
        body = json.dumps(fields).encode("utf-8", "surrogatepass")
        self.stalls = self.malformed and draw.random() < 0.1
        if self.malformed and draw.random() < 0.5:
            body = damaged(body, draw)
        head = (
            f"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
        )
        head += "Content-Type: application/json\r\n\r\n"
        data = head.encode() + body
        self.data = data[: draw.randrange(1, len(data))] if self.stalls else data


def damaged(body: bytes, draw: Random) -> bytes:
    """Some bytes changed, lost or repeated."""
    changed = bytearray(body)
    for _ in range(draw.randrange(1, 5)):
        place = draw.randrange(len(changed))
        kind = draw.randrange(3)
        if kind == 0:
            changed[place] = draw.randrange(256)
        elif kind == 1 and len(changed) > 1:
            del changed[place]
        else:
            changed[place:place] = changed[place : place + draw.randrange(1, 40)]
    return bytes(changed)


async def one(url: str, case: Case, wanted: dict[tuple[str, int, int], str]) -> str:
    """What came of it: one of the right outcomes, or what is wrong."""
    answer = await asked(url, case.data, case.stays, half=case.stalls)
    if case.stays is not None or not answer:
        return GONE if case.stays is not None or case.stalls else "no answer"
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    if status != 200:
        if not case.malformed:
            return f"status {status}: {body[:200]!r}"
        words = body if b"application/json" in head.lower() else b""
        plain = status == 400 and body.startswith(b"Invalid HTTP request")  # no HTTP at all, so no request either
        return REFUSED if 400 <= status < 500 and (plain or b'"message"' in words) else f"status {status}: {body[:200]!r}"
    if case.malformed:
        return PICTURE if b"b64_json" in body else f"an answer without a picture: {body[:200]!r}"
    found = body.rpartition(b'"b64_json": "')[2].partition(b'"')[0]
    digest = hashlib.sha256(base64.b64decode(found)).hexdigest()
    return PICTURE if digest == wanted[case.key] else "another picture"


async def asked(url: str, data: bytes, stays: float | None = None, *, half: bool = False) -> bytes:
    """The whole answer; nothing if the client goes away after ``stays`` seconds, or when it has sent ``half``."""
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        writer.write(data)
        if half:
            await asyncio.sleep(0.2)
            writer.write_eof()
        if stays is None:
            return await reader.read()
        await asyncio.sleep(stays)
    except ConnectionError:
        pass  # the server may close first
    finally:
        writer.close()
    return b""


def open_files(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


def resident(process: int) -> int:
    """Bytes of memory."""
    pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
