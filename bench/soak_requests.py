"""Requests of all kinds to a server of tiny-flux: good ones, changed ones, clients that are slow or go away."""

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from bench import soak_clients
from bench.soak_cases import PROMPTS, SEEDS, STEPS, STRENGTH, TAKE_LONG, Case, Key, a_picture, prompts

CLIENTS = 12
PATIENCE = 120.0  # seconds without an answer: it hangs
PARTS = 10  # of the campaign, after each of which memory is looked at
GROWTH = 0.05  # memory after the last part is at most so much above that after the first
QUIET = 10.0  # seconds until all connections are closed, at the end


def run(count: int, folder: Path, work: Path) -> dict[str, Any]:
    """``count`` requests, of which one in eleven is malformed; what came of them, and what is left behind."""
    begun, bundle = time.monotonic(), work / "requests.cachec"
    given = ["compile", "tiny-flux", "--method", "taylor", "--interval", "2", "--steps", str(STEPS), "--target", "ort"]
    if not bundle.exists():
        subprocess.run([sys.executable, "-m", "cachec", *given, "-o", str(bundle)], check=True, capture_output=True)
    wanted = pictures(bundle)
    command = [sys.executable, "-m", "cachec", "serve", str(bundle), "--port", "0"]
    command += ["--max-body-seconds", str(soak_clients.BODY_SECONDS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        try:
            wrong, seen, left = asyncio.run(campaign(url, server.pid, count, wanted))
        finally:
            server.send_signal(signal.SIGTERM)
        if (code := server.wait(60)) != 0:
            wrong.append([count, f"the server ended with {code}"])
    return {"cases": count, "outcomes": seen, "wrong": wrong, "seconds": round(time.monotonic() - begun), "left": left}


def pictures(bundle: Path) -> dict[Key, str]:
    """The hash of every picture that is asked for, as a generator makes them, without a server."""
    import cachec
    from cachec.pictures.files import read_picture
    from cachec.pictures.generator import Generator

    found = {}
    with cachec.load(bundle) as loaded, Generator(loaded) as maker:
        size = loaded.manifest.variants[0].size
        begins = [False, True] if maker.takes_pictures else [False]
        for edit, level, place, seed in product(begins, loaded.programs, range(PROMPTS), range(SEEDS)):
            given = {"pictures": read_picture(a_picture(), [size])[None], "strength": STRENGTH} if edit else {}
            (picture,) = maker.generate([prompts()[place]], seeds=[seed], level=level, **given)
            found[level, place, seed, edit] = hashlib.sha256(maker.to_png(picture)).hexdigest()
    return found


async def campaign(url: str, process: int, count: int, wanted: dict[Key, str]) -> tuple[list[Any], Any, Any]:
    """All cases, some at a time; then nothing may be left: no request, no file, no memory. Slow ones run beside the others."""
    wrong, seen, memory, slow = list[Any](), Counter[str](), list[int](), set[asyncio.Task[None]]()
    kinds = {"levels": sorted({key[0] for key in wanted}), "edits": any(key[3] for key in wanted)}
    for case in range(50):  # what is only taken once is taken now
        await soak_clients.one(url, Case(case, **kinds, good=True), wanted)
    files, cases = open_files(process), iter(range(count))

    async def do(number: int, case: Case) -> None:
        try:
            said = await asyncio.wait_for(soak_clients.one(url, case, wanted), PATIENCE)
        except TimeoutError:
            said = "hung"
        except OSError as error:
            said = f"{type(error).__name__}: {error}"
        seen[said if said in soak_clients.RIGHT else "wrong"] += 1
        if said not in soak_clients.RIGHT:
            wrong.append([number, said])
            print(f"requests {number}: {said}", flush=True)
        if seen.total() * PARTS >= count * (len(memory) + 1):
            memory.append(resident(process))

    async def client() -> None:
        for number in cases:
            case = Case(number, **kinds)
            if case.kind in TAKE_LONG:
                slow.add(asyncio.create_task(do(number, case)))
            else:
                await do(number, case)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    await asyncio.gather(*slow)
    left = {"memory": [*memory[:-1], resident(process)], "open": [files, await quiet(process, files)]}
    wrong += [[count, what] for what in [*await busy(url), *missed(left)]]
    return wrong, dict(seen.most_common()), left


def missed(left: dict[str, Any]) -> Iterator[str]:
    """The marks that what is left does not keep."""
    first, last = left["memory"][0], left["memory"][-1]
    if last > (1 + GROWTH) * first:
        yield f"memory: {first / 1e6:.1f} MB after the first tenth, {last / 1e6:.1f} MB after the last"
    before, after = left["open"]
    if after > before:
        yield f"{after - before} files more are open"


def marks(left: dict[str, Any]) -> str:
    """What is left and what may be, as the page says it."""
    first, last = left["memory"][0] / 1e6, left["memory"][-1] / 1e6
    return (
        f"The server's memory was {first:.1f} MB after the first tenth of the requests, and {last:.1f} MB after the last: "
        f"{last / first - 1:+.1%} (mark: {GROWTH:.0%} more at most). Of files it had {left['open'][0]} open before, and "
        f"{left['open'][1]} after (mark: not more)."
    )


async def busy(url: str) -> list[str]:
    """What still waits or runs, by the server's own account."""
    async with soak_clients.connected(url) as (reader, writer):
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        text = (await soak_clients.everything(reader)).decode()
    lines = [line for line in text.splitlines() if line.startswith(("cachec_queued_requests{", "cachec_running_requests{"))]
    return [line for line in lines if not line.endswith(" 0.0")] if lines else ["the server does not say what runs"]


async def quiet(process: int, files: int) -> int:
    """How many files are open when what was closed is closed on the other side, too."""
    end = time.monotonic() + QUIET
    while (found := open_files(process)) > files and time.monotonic() < end:
        await asyncio.sleep(0.2)
    return found


def open_files(process: int) -> int:
    """How many file descriptors a process has, sockets among them."""
    return len(os.listdir(f"/proc/{process}/fd"))


def resident(process: int) -> int:
    """Bytes of memory."""
    pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
