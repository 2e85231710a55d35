"""Throughput and latency of the server against its rivals, on one machine: ``bench/SERVING.md``.

``python -m bench.serving [--model flux-shaped] [--plan] [--quick] [--work DIR]``. First every system is asked alone and in a
closed loop, a minute each; rates of Poisson arrivals follow from that (``bench/serving_plan.py``). ``--plan`` stops there, and
says what is to come and the minutes that it takes. Every load is kept when it is played: the same command goes on.
"""

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bench.serving_loads import PROMPT, WITHIN, ask, closed_loop, generate, play
from bench.serving_plan import CACHED, EXACT, ORDERS, SETTINGS, SLOW, fastest, loads_of, plan, setting_of
from bench.timing import facts as machine

CLIENTS = 16
COMPILE = {
    "tiny-flux": ("--method", "gram", "--levels", "high,balanced,fast"),
    "flux-shaped": ("--method", "taylor", "--schedule", "interval", "--interval", "5", "--steps", "20,14", "--size", "128x128"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny-flux", choices=SETTINGS)
    parser.add_argument("--work", type=Path, default=Path("build/serving"))
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--bundle", type=Path, help="Default: compiled into the work folder.")
    parser.add_argument("--systems", help="Only these, beside lanes.")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--plan", action="store_true", help="What is to come, and how long it takes.")
    parser.add_argument("--quick", action="store_true", help="Few requests of few systems: does it run?")
    given = parser.parse_args()
    setting = SETTINGS[given.model]
    if given.quick:
        few = ("lanes", "lanes fifo", "lanes uncached")
        setting = replace(setting, systems=few, count=24, few=12, alone=2, loop=12, beside=6, flat=40)
    if given.systems:
        asked = given.systems.split(",")
        if unknown := set(asked) - set(SETTINGS[given.model].systems):
            parser.error(f"--systems: there are {', '.join(SETTINGS[given.model].systems)}, not {', '.join(sorted(unknown))}")
        setting = replace(setting, systems=tuple(dict.fromkeys(("lanes", *asked))))
    given.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(given, setting)
    for system in setting.systems:
        bench.measure(system)
    lines, minutes = plan(bench.data, setting)
    for line in lines:
        print("{:16} {:9} {:>10} {:>6} {:9} {}".format(*line), flush=True)
    print(f"{given.model}: {minutes:.0f} minutes to go", flush=True)
    if given.plan:
        return
    for system in setting.systems:
        bench.load(system)
    from bench.serving_report import write

    print(write(given.work, given.out))


class Bench:
    """One model's measurements, kept in a file."""

    def __init__(self, given, setting):
        self.given, self.setting = given, setting
        self.file = given.work / f"{given.model}.json"
        self.data = json.loads(self.file.read_text()) if self.file.exists() else {"model": given.model, "systems": {}}
        self.data |= {"within": WITHIN}
        self.bundle = given.bundle or make_bundle(given.model, given.work)

    def save(self):
        self.data["where"] = machine()
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.data))
        part.replace(self.file)

    def measure(self, system):
        """A system alone and in a closed loop, where that is missing."""
        found = self.data["systems"].setdefault(system, {"loads": {}})
        exact = [EXACT] if self.setting.exact and system in CACHED and EXACT not in found.get("idle", {}) else []
        if "busy" in found and not exact:
            return
        setting = setting_of(system, self.setting)
        with server(system, self.bundle, self.given, setting) as (facts, _):
            if "busy" not in found:
                seconds, over = asyncio.run(idle(facts, facts["kinds"], setting.alone))
                found |= {"facts": facts, "idle": seconds, "over": over, "busy": asyncio.run(busy(facts, setting.loop))}
            found["idle"] |= asyncio.run(idle(facts, exact, setting.alone))[0]
            self.save()

    def load(self, system):
        """Every load that is missing, on a server of its own."""
        first, found = self.data["systems"]["lanes"], self.data["systems"][system]
        missing = [one for one in loads_of(system, self.setting, first, found) if one.name not in found["loads"]]
        watch = system == "lanes" and self.setting.flat and "flat" not in found
        if not missing and not watch:
            return
        few = replace(self.setting, alone=min(3, self.setting.alone))
        with server(system, self.bundle, self.given, few) as (facts, process):
            limits = {kind: WITHIN * one for kind, one in first["idle"].items()}
            own = {kind: WITHIN * one for kind, one in found["idle"].items()}
            asked = {kind: PROMPT * one for kind, one in (own if system in SLOW else limits).items()}
            deadlines = None if system in ORDERS else asked
            loop = setting_of(system, self.setting).beside if missing else 0
            sizes, served = [[0, resident(process)]], in_loop(loop)
            near = asyncio.run(busy(facts, loop)) if loop else None
            for one in missing:
                wait = {kind: max(limits[kind], own.get(kind, 0)) for kind in limits}
                print(f"{time.strftime('%H:%M:%S')} {system}: {one.name}", flush=True)
                before = asyncio.run(ask(facts["url"], "/bench"))
                played = asyncio.run(play(facts["url"], one, wait, deadlines))
                after = asyncio.run(ask(facts["url"], "/bench"))
                asyncio.run(settled(facts))
                if near:
                    then = asyncio.run(busy(facts, loop))
                    both = {name: near[name] + then[name] for name in near if name != "rate"}
                    did = {name: after[name] - before[name] for name in before}
                    played |= {"did": did, "beside": both, "packed": facts["packed"], "alone": facts["alone"]}
                    near = then
                found["loads"][one.name] = played
                self.save()
                served += one.count + in_loop(loop)
                sizes.append([served, resident(process)])
            while watch and served < self.setting.flat:
                more = min(self.setting.flat // 10, self.setting.flat - served)
                asyncio.run(closed_loop(facts["url"], [fastest(found)[0]], 8, more))
                served += more
                sizes.append([served, resident(process)])
            if watch:
                found["flat"] = sizes
                self.save()


def make_bundle(model, work):
    """Compiled, with all its components, where it is not there yet."""
    bundle, source = work / f"{model}.cachec", model
    if bundle.exists():
        return bundle
    if model == "flux-shaped":
        from bench.cases import SHAPED_CONFIG
        from bench.random_flux import write_flux

        source = str(work / "flux-shaped")
        write_flux(Path(source), SHAPED_CONFIG["num_layers"], SHAPED_CONFIG["num_single_layers"], config=SHAPED_CONFIG)
    command = [sys.executable, "-m", "cachec", "compile", source, *COMPILE[model], "--components", "all", "--target", "ort"]
    subprocess.run([*command, "-o", str(bundle)], check=True)
    return bundle


@contextmanager
def server(system, bundle, given, setting):
    """What a child says when it is up, and its number; it is stopped afterwards."""
    command = [sys.executable, "-m", "bench.serving_child", system, str(bundle), "--alone", str(setting.alone)]
    command += ["--threads", str(given.threads)] if given.threads else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            line = child.stdout.readline()
            if not line:
                raise RuntimeError(f"{' '.join(command)} ended before it was up")
            yield json.loads(line), child.pid
        finally:
            child.send_signal(signal.SIGTERM)


async def idle(facts, kinds, count):
    """Seconds of a request where nobody else is, in the median, by kind; and those of them that were no work on pictures."""
    took, over = {}, {}
    for kind in kinds:
        await generate(facts["url"], kind, 0)
        some, rest = [], []
        for seed in range(count):
            before, begun = await ask(facts["url"], "/bench"), time.perf_counter()
            await generate(facts["url"], kind, seed)
            some.append(time.perf_counter() - begun)
            after = await ask(facts["url"], "/bench")
            rest.append(some[-1] - sum(after[name] - before[name] for name in ("before", "seconds", "after")))
        took[kind], over[kind] = statistics.median(some), statistics.median(rest)
    return took, over


def in_loop(count):
    """Requests of :func:`busy`."""
    return count + count // 6


async def busy(facts, count):
    """What the server did while clients that ask again and again kept it busy, and how many requests a second they got."""
    await closed_loop(facts["url"], facts["kinds"], CLIENTS, in_loop(count) - count)
    before, begun = await ask(facts["url"], "/bench"), time.perf_counter()
    rate = await closed_loop(facts["url"], facts["kinds"], CLIENTS, count)
    took, after = time.perf_counter() - begun, await ask(facts["url"], "/bench")
    return {"rate": rate, "took": took, "count": count} | {name: after[name] - before[name] for name in before}


async def settled(facts):
    """Wait until nothing is left of the load before."""
    while (await ask(facts["url"], "/bench"))["present"]:
        await asyncio.sleep(0.1)


def resident(process):
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/{process}/status has no VmRSS")


if __name__ == "__main__":
    main()
