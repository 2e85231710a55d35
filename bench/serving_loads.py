"""Arrivals, the client that sends them, and figures of what became of them. All times are in seconds.

A load is played until its last arrival, and until whoever can still be in time has been; a server that cannot keep up is
not waited for. Requests that are cut off then are late, whatever limit they are held to here, and percentiles that fall on
them are known from below.
"""

import asyncio
import json
import random
import time
from dataclasses import dataclass
from math import ceil, inf
from urllib.parse import urlsplit

from cachec.compiler.calibration.prompts import default_prompts

WITHIN = 3.0  # times the idle latency: what counts as good
PROMPT = 0.95  # of that: the deadline that a client sends, as the way there and back takes time, too
PATIENCE = 90.0  # for the last ones, where the server should keep up
PROMPTS = default_prompts("avatars", "train")


@dataclass(frozen=True)
class Load:
    """``count`` requests at ``rate`` a second, each of one of ``kinds``. ``keeps_up``: should the server?"""

    rate: float
    count: int
    kinds: tuple[str, ...]
    keeps_up: bool
    mix: str = "mixed"

    @property
    def name(self):
        return f"{self.mix} {self.rate:g} x {self.count}"

    def arrivals(self, seed=0):
        """(moment, kind) in order of time: the same for all who are asked."""
        draw, moments, now = random.Random(seed), [], 0.0
        for _ in range(self.count):
            now += draw.expovariate(self.rate)
            moments.append((now, draw.choice(self.kinds)))
        return moments


def percentile(values, percent):
    """The value that so many of a hundred do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, ceil(percent / 100 * len(ordered)) - 1)]


def bounded(found, percent):
    """A percentile of a played load, and whether the true one may be more: a request that was cut off waited longer.

    Requests that were refused at once are left out.
    """
    taken = [each for each in zip(found["latencies"], found["how"], strict=True) if each[1] != "refused"]
    value = percentile([latency for latency, _ in taken], percent)
    return value, any(how == "cut" and latency <= value for latency, how in taken)


def goodput(latencies, kinds, limits, window):
    """Requests a second that were done within the limit of their kind."""
    return sum(latency <= limits[kind] for latency, kind in zip(latencies, kinds, strict=True)) / window


def good(found, idle):
    """Goodput of a played load; who was cut off or refused was not good."""
    times = [latency if how == "made" else inf for latency, how in zip(found["latencies"], found["how"], strict=True)]
    return goodput(times, found["kinds"], {kind: WITHIN * one for kind, one in idle.items()}, found["window"])


async def play(url, load, limits, deadlines=None):
    """What became of ``load``. ``limits``: by kind, what is waited for after the last arrival; ``deadlines``: sent, by kind."""
    arrivals, begun = load.arrivals(), time.perf_counter()
    latencies, how = [0.0] * load.count, ["cut"] * load.count
    left = load.count

    async def one(place, moment, kind):
        nonlocal left
        await asyncio.sleep(max(0.0, begun + moment - time.perf_counter()))
        made = await generate(url, kind, place, deadline=deadlines and deadlines[kind])
        latencies[place], how[place] = time.perf_counter() - begun - moment, "made" if made else "refused"
        left -= 1

    tasks = [asyncio.create_task(one(place, *each)) for place, each in enumerate(arrivals)]
    patience = PATIENCE if load.keeps_up else 0.0
    await asyncio.wait(tasks, timeout=arrivals[-1][0] + max(patience, *limits.values()))
    now = time.perf_counter() - begun
    for place, task in enumerate(tasks):
        if not task.done():
            task.cancel()
            latencies[place] = now - arrivals[place][0]
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome
    done = [moment + latency for (moment, _), latency, made in zip(arrivals, latencies, how, strict=True) if made == "made"]
    window = arrivals[-1][0]
    span = max(window, max(done, default=window) if left == 0 else now)
    return {
        "rate": load.rate, "count": load.count, "mix": load.mix, "moments": [round(moment, 4) for moment, _ in arrivals],
        "latencies": [round(one, 4) for one in latencies], "how": how, "kinds": [kind for _, kind in arrivals],
        "window": window, "throughput": len(done) / span, "deadlines": deadlines,
    }  # fmt: skip


async def closed_loop(url, kinds, clients, count):
    """Requests a second that so many clients get, each of which asks again when it is answered."""
    todo, begun = iter(range(count)), time.perf_counter()

    async def client():
        for place in todo:
            await generate(url, kinds[place % len(kinds)], place)

    await asyncio.gather(*(client() for _ in range(clients)))
    return count / (time.perf_counter() - begun)


async def ask(url, path):
    """JSON that the server has there."""
    status, body = await _http(url, f"GET {path}", "")
    if status != 200:
        raise RuntimeError(body[:500].decode())
    return json.loads(body)


async def generate(url, kind, seed, *, deadline=None):
    """One request, on a connection of its own: was it made? ``kind``: a level, or a level and a number of steps.

    Raises:
        RuntimeError: it failed for another reason than its deadline.
    """
    level, _, steps = kind.partition("/")
    asked = {"prompt": PROMPTS[seed % len(PROMPTS)], "quality": level, "seed": seed}
    asked |= {"num_inference_steps": int(steps)} if steps else {}
    asked |= {"deadline": deadline} if deadline else {}
    status, body = await _http(url, "POST /v1/images/generations", json.dumps(asked))
    if status != 200 and not (deadline and b"deadline" in body):
        raise RuntimeError(body[:500].decode())
    return status == 200


async def _http(url, what, body):
    where = urlsplit(url)
    head = f"{what} HTTP/1.1\r\nHost: {where.netloc}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        writer.write((head + body).encode())
        answer = await reader.read()
    finally:
        writer.close()
    first, _, rest = answer.partition(b"\r\n")
    return int(first.split()[1]), rest.partition(b"\r\n\r\n")[2]
