"""Throughput and latency of the server against its rivals, on one machine: ``bench/SERVING.md``.

``python -m bench.serving [--quick] [--work DIR]``. Arrivals are Poisson, with levels drawn by a seed, the same for all.
Rates are shares of what lanes can serve at most, as their costs say. Interrupted, the same command goes on.
"""

import argparse
import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from bench.serving_child import SYSTEMS
from bench.serving_report import draw, report
from cachec.compiler.calibration.prompts import default_prompts

SHARES = (0.25, 0.5, 0.75, 0.9, 1.0, 1.25, 1.5)
WITHIN = 3.0  # times the idle latency: what counts as good
COMPILE = ("--method", "gram", "--levels", "high,balanced,fast", "--components", "all", "--target", "ort")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny-flux")
    parser.add_argument("--work", type=Path, default=Path("build/serving"))
    parser.add_argument("--bundle", type=Path, help="Default: compiled into the work folder.")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--flat", type=int, default=10_000, help="Requests over which memory is watched; 0: none.")
    parser.add_argument("--quick", action="store_true", help="Two systems, two rates, 6 requests: does it run?")
    given = parser.parse_args()
    if given.quick:
        given.requests, given.systems, given.flat = 6, "lanes,whole requests", 0
    given.alone = 2 if given.quick else 15
    given.work.mkdir(parents=True, exist_ok=True)
    bundle = given.bundle or make_bundle(given.model, given.work)
    file = given.work / "serving.json"
    data = json.loads(file.read_text()) if file.exists() and not given.quick else {"systems": {}}
    data |= {"model": given.model, "requests": given.requests, "within": WITHIN, "date": time.strftime("%Y-%m-%d")}
    rates, base = None, None
    for system in given.systems.split(","):
        found = data["systems"].setdefault(system, {"rates": {}})
        with_server(bundle, system, given, found, (rates, base), lambda: file.write_text(json.dumps(data, indent=1)))
        rates, base = rates or list(map(float, found["rates"])), base or found["idle"]
    out = given.work if given.quick else Path("bench")
    draw(data, out / "serving.png")
    (out / "SERVING.md").write_text(report(data))
    print(out / "SERVING.md")


def make_bundle(model: str, work: Path) -> Path:
    bundle = work / f"{model}.cachec"
    if not bundle.exists():
        subprocess.run([sys.executable, "-m", "cachec", "compile", model, *COMPILE, "-o", str(bundle)], check=True)
    return bundle


def with_server(bundle, system, given, found, first, save):
    """Every rate that is missing, on a server of its own, which is stopped afterwards.

    ``first``: rates and idle latencies of the first system, which all are measured by.
    """
    rates, base = first
    command = [sys.executable, "-m", "bench.serving_child", system, str(bundle)]
    command += ["--alone", str(given.alone)]
    command += ["--threads", str(given.threads)] if given.threads else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            facts = json.loads(child.stdout.readline())
            found |= {"facts": facts, "idle": found.get("idle") or idle(facts, given.alone)}
            save()
            most = 1 / statistics.mean(facts["seconds"].values())
            shares = SHARES[1::3] if given.quick else SHARES
            for rate in rates or [round(share * most, 3) for share in shares]:
                if str(rate) not in found["rates"]:
                    found["rates"][str(rate)] = asyncio.run(load(facts, rate, given.requests, base or found["idle"]))
                    save()
            if given.flat and system == "lanes" and "flat" not in found:
                found["flat"] = asyncio.run(flat(facts, child.pid, given.flat))
                save()
        finally:
            child.send_signal(signal.SIGTERM)


def idle(facts, count):
    """Seconds of a request where nobody else is, in the median, by level."""

    async def run():
        took = {level: [await generate(facts, level, seed) for seed in range(count)] for level in facts["levels"]}
        return {level: statistics.median(seconds) for level, seconds in took.items()}

    return asyncio.run(run())


async def load(facts, rate, count, idle_seconds):
    """Latencies of ``count`` requests that arrive at ``rate`` a second, whatever becomes of those before."""
    draw_from = random.Random(0)
    moments, now = [], 0.0
    for _ in range(count):
        now += draw_from.expovariate(rate)
        moments.append((now, draw_from.choice(facts["levels"])))
    begun = time.perf_counter()

    async def one(place, moment, level):
        await asyncio.sleep(max(0.0, begun + moment - time.perf_counter()))
        await generate(facts, level, place)
        return time.perf_counter() - begun - moment

    latencies = await asyncio.gather(*(one(place, *each) for place, each in enumerate(moments)))
    took = time.perf_counter() - begun
    ordered = sorted(latencies)
    good = sum(latency <= WITHIN * idle_seconds[level] for latency, (_, level) in zip(latencies, moments, strict=True))
    percentiles = {str(percent): ordered[min(count - 1, int(percent / 100 * count))] for percent in (50, 95, 99)}
    return {"throughput": count / took, "goodput": good / took, "percentiles": percentiles}


async def flat(facts, process, count):
    """Memory of the server in bytes, at the beginning and at every tenth of ``count`` requests, four at a time."""
    sizes = []
    for _ in range(11):
        sizes.append(resident(process))
        done = 0
        while len(sizes) < 11 and done < count // 10:
            await asyncio.gather(*(generate(facts, facts["levels"][seed % len(facts["levels"])], seed) for seed in range(4)))
            done += 4
    return sizes


def resident(process):
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/{process}/status has no VmRSS")


PROMPTS = default_prompts("avatars", "train")


async def generate(facts, level, seed):
    """One request, on a connection of its own; its seconds."""
    where = urlsplit(facts["url"])
    body = json.dumps({"prompt": PROMPTS[seed % len(PROMPTS)], "quality": level, "seed": seed}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {where.netloc}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    begun = time.perf_counter()
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    writer.write(head.encode() + body)
    answer = await reader.read()
    writer.close()
    if not answer.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(answer[:500].decode())
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
