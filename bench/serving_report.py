"""``bench/SERVING.md`` and its chart, from the serving bench's JSON: no figure comes from anywhere else."""

from bench.speed_report import table

ABOUT = """# Serving

`python -m bench.serving` on {date}: {model}, {requests} requests a rate, Poisson arrivals, levels drawn with equal chances, the
same for every system, each of which stands behind the same HTTP server in a process of its own. Goodput: requests a second
that were answered within {within:g} times the idle latency of *lanes* at their level.
Every system takes the shortest request first.

* **lanes**: requests at different steps and levels share the runs of the model, with the cache.
* **lanes uncached**: the same, every step computed: what a step-level batcher without a cache does.
* **one at a time**: with the cache, a request alone.
* **whole requests**: with the cache, requests of one level together from the first step to the last.
* **diffusers eager**: the pipeline's own loop under PyTorch, one request at a time.
"""


def report(data):
    """The whole page."""
    parts = [ABOUT.format(**data), "![Goodput and latency](serving.png)\n", "## Against arrival rate\n", _rates(data)]
    parts += ["## One request alone\n", _overhead(data), _flat(data)]
    return "\n".join(part for part in parts if part)


def _rates(data):
    lines = []
    for system, found in data["systems"].items():
        for rate, one in found["rates"].items():
            times = [f"{one['percentiles'][percent]:.3f}" for percent in ("50", "95", "99")]
            lines.append([system, rate, f"{one['throughput']:.2f}", f"{one['goodput']:.2f}", *times])
    return table(["system", "arrivals / s", "throughput / s", "goodput / s", "p50, s", "p95, s", "p99, s"], lines)


def _overhead(data):
    lines = []
    for system, found in data["systems"].items():
        for level, alone in found["facts"]["alone"].items():
            idle = found["idle"][level]
            lines.append([system, level, f"{1e3 * idle:.1f}", f"{1e3 * alone:.1f}", f"{1e3 * (idle - alone):.1f}"])
    return table(["system", "level", "over HTTP, ms", "in process, ms", "server, ms"], lines)


def _flat(data):
    sizes = data["systems"].get("lanes", {}).get("flat")
    if not sizes:
        return ""
    words = ", ".join(f"{size / 1e6:.0f}" for size in sizes)
    return f"Memory of the server over as many requests as were asked for, at every tenth, in MB: {words}.\n"


def draw(data, file):
    """Goodput and the 95th percentile against the arrival rate, a line a system."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for system, found in data["systems"].items():
        rates = sorted(found["rates"], key=float)
        places, measured = list(map(float, rates)), [found["rates"][rate] for rate in rates]
        left.plot(places, [one["goodput"] for one in measured], marker="o", label=system)
        right.plot(places, [one["percentiles"]["95"] for one in measured], marker="o")
    left.set(xlabel="arrivals / s", ylabel="goodput / s")
    right.set(xlabel="arrivals / s", ylabel="p95 latency, s", yscale="log")
    left.legend(frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)
