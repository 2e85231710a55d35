"""``bench/SERVING.md`` and its chart, from what the serving bench kept: no figure comes from anywhere else.

``python -m bench.serving_report [--work DIR] [--out DIR]`` makes both anew from the loads that are there.
"""

import argparse
import json
from pathlib import Path

from bench.serving_chart import draw
from bench.serving_gains import compared, gains, gpu, simulator, verdicts
from bench.serving_loads import PROMPT, WITHIN, bounded, good
from bench.serving_plan import SETTINGS, loads_of
from bench.speed_report import table

ABOUT = """# Serving

`make serve-bench`. Each system stands behind the same HTTP server in a process of its own; the client is another process on the
same machine. Arrivals are Poisson, each of one of the bundle's cached levels with equal chances, by a seed: the same for all.

* **lanes**: requests at different steps and levels share the runs of the model, with the cache.
* **one at a time**: with the cache, a request alone from its first step to its last.
* **whole requests**: with the cache, up to eight requests of one level together from the first step to the last.
* **lanes uncached**: lanes that compute every step: what a step-level batcher without a cache does.
* **diffusers eager**: the pipeline's own loop under PyTorch, one request at a time, every step.

All of them have the same policy, the best of three for goodput (`--policy deadline`): a request brings a deadline, {prompt:g}
of the time within which it is good; the earliest is first, and who cannot be in time is refused at once, by what calls cost.
*lanes fifo* and *lanes shortest* are asked without deadlines; *lanes no batch* makes a tick of one request. Levels *and exact*:
of ten requests nine are mixed as they are elsewhere, and one computes every step.

Rates are shares of what *lanes* gave a closed loop of 16 clients; those that compute every step are also asked at a share of
what they gave it themselves. *Loop*: what a system gave such a loop right before and after a load: others use this machine,
too, and one figure may be compared with another as far as it was as fast.

A load is played to its last arrival, and until every request that can still be in time has been. A server that cannot keep up
is then cut off. That changes no goodput: who is cut off is late already. Percentiles are of requests that were taken; those
that fall on one that was cut off are known from below, and are written with ≥.

**Goodput**: requests a second, of those that arrived in the load's time, that were answered within {within:g} times the idle
latency of *lanes* at their level; *own goodput*: within {within:g} times the system's own idle latency, from which those that
compute every step have their deadlines.
"""


def write(work, out):
    """Both files into ``out``; the page's path."""
    found = {name: json.loads((work / f"{name}.json").read_text()) for name in SETTINGS if (work / f"{name}.json").exists()}
    out.mkdir(parents=True, exist_ok=True)
    page = out / "SERVING.md"
    page.write_text(report(found), encoding="utf-8")
    for name, data in found.items():
        draw(data, out / f"serving-{name}.png")
    return page


def report(found):
    """The whole page."""
    parts = [ABOUT.format(within=WITHIN, prompt=PROMPT)]
    for name, data in found.items():
        told_beside = list(compared(data))
        parts += [f"## {name}\n", _setting(data), f"![Goodput, throughput and latency of {name}](serving-{name}.png)\n"]
        if name == "tiny-flux":
            parts += ["### What was asked\n", verdicts(data, SETTINGS[name], told_beside)]
        parts += ["### Against arrival rate\n", _rates(data)]
        parts += ["### Whose gain it is\n", gains(data, SETTINGS[name])]
        parts += ["### The simulator beside the server\n", simulator(data, told_beside)]
        if name == "tiny-flux":
            parts += ["### What a GPU would change\n", gpu(data)]
        parts += ["### One request alone\n", _overhead(data), _flat(data), _missing(data, SETTINGS[name])]
    absent = [name for name in SETTINGS if name not in found]
    if absent:
        parts.append(f"Not measured: {', '.join(absent)} (`python -m bench.serving --model …`).\n")
    return "\n".join(part for part in parts if part)


def _setting(data):
    where, first = data["where"], data["systems"]["lanes"]
    levels = ", ".join(f"{kind} ({_computed(first, kind)} runs of the model)" for kind in first["facts"]["kinds"])
    machine = f"{where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB, {where['date']}"
    rate = first["busy"]["rate"]
    return f"{machine}. Levels: {levels}. *Lanes* gave 16 clients in a closed loop {rate:.2f} requests a second.\n"


def _computed(found, kind):
    return len(found["facts"]["packed"]["stages"][kind])


def _rates(data):
    idle, lines = data["systems"]["lanes"]["idle"], []
    for system, found in data["systems"].items():
        for one in sorted(found["loads"].values(), key=lambda one: (one["mix"], -one["count"], one["rate"])):
            times = []
            for percent in (50, 95, 99):
                value, is_open = bounded(one, percent)
                times.append(f"{'≥ ' * is_open}{value:.3g}")
            refused = one["how"].count("refused")
            loop = f"{one['beside']['count'] / one['beside']['took']:.2f}" if "beside" in one else ""
            lines.append([system, one["mix"], one["count"], f"{one['rate']:g}", loop, f"{one['throughput']:.2f}",
                          f"{good(one, idle):.2f}", f"{good(one, found['idle']):.2f}", *times, refused or ""])  # fmt: skip
    header = ["system", "levels", "requests", "arrivals / s", "loop / s", "throughput / s", "goodput / s", "own goodput / s"]
    return table([*header, "p50, s", "p95, s", "p99, s", "refused"], lines)


def _overhead(data):
    lines = []
    for system in data["systems"]:
        found = data["systems"][system]
        for kind, alone in found["facts"]["alone"].items() if "facts" in found else ():
            whole, parts = found["idle"][kind], [alone[name] for name in ("before", "lanes", "after")]
            lines.append([system, kind, *(f"{1e3 * one:.1f}" for one in (whole, *parts, found["over"][kind]))])
    return table(["system", "level", "over HTTP, ms", "encode, ms", "denoise, ms", "decode and PNG, ms", "server, ms"], lines)


def _flat(data):
    sizes = data["systems"]["lanes"].get("flat")
    if not sizes:
        return ""
    words = ", ".join(f"{size / 1e6:.1f} after {count:,}" for count, size in sizes)
    return f"Memory of the server of *lanes*, after each load and then in a closed loop of the fastest level, in MB: {words}.\n"


def _missing(data, setting):
    systems, first, missing = data["systems"], data["systems"]["lanes"], []
    for system in setting.systems:
        if "busy" not in systems.get(system, {}):
            missing.append(system)
            continue
        loads = [one for one in loads_of(system, setting, first, systems[system]) if one.name not in systems[system]["loads"]]
        missing += [f"{system} at {one.rate:g}" for one in loads]
    if setting.flat and "flat" not in first:
        missing.append("memory")
    return f"Not measured: {', '.join(missing)}.\n" if missing else ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("build/serving"))
    parser.add_argument("--out", type=Path, default=Path("bench"))
    given = parser.parse_args()
    print(write(given.work, given.out))


if __name__ == "__main__":
    main()
