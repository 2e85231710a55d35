"""What the serving bench's figures come to: targets met or missed, whose gain it is, the simulator beside the server, a GPU."""

from itertools import product

from bench.serving_chart import full_loads
from bench.serving_loads import WITHIN, bounded, good
from bench.serving_plan import CACHED, ORDERS, WITH_EXACT
from bench.serving_told import ALIKE, ASIDE, GPUS, LINEAR, constants, on_gpu, server_seconds, slower, told
from bench.speed_report import table

GPU = """By the simulator; nothing was run. These levels at step times that others published, every other call at {aside:g} %
of a step, no server. How much longer a batch takes there is not published: as k steps of one, which a GPU that one sample
keeps busy comes near to, and as on this machine. Goodput is within {within:g} times the system's own time alone, which is the
deadline but for *lanes fifo*. Levels *and exact*: one request of ten computes every step. Rates are shares of what one request
at a time can serve; with another step time all seconds are as many times as long, and nothing else changes.
"""
TOLD = """Told / measured. The simulator's constants come from calls timed when the lanes were made, from requests that came one
by one, and from closed loops (where there are any, those right before and after a load), no Poisson load. *Ticks*: how many
times as long they took in the load as in those loops; a machine that others share is not always as fast, and a simulator does
not know. {when} of *lanes* ticks took {scale:.2f} of what their calls do by themselves; a request took {before:.1f}
ms before lanes, {after:.1f} after them, {http:.1f} of HTTP. {beside} (every system has its own).
"""
BESIDE = (0.9, 1.1)
OVER_WHOLE, OVER_UNCACHED, OVERHEAD, NEAR, GROWN = 1.3, 4.0, 3e-3, 0.1, 0.01
STEADY = 0.05  # so much longer or shorter ticks may take in a load than in the loops beside it


def at_saturation(data, system, setting):
    """The system's load of mixed levels just beyond what lanes serve, if it was played."""
    rate = float(f"{setting.at * data['systems']['lanes']['busy']['rate']:.3g}")
    return next((one for one in full_loads(data, system) if one["rate"] == rate), None)


def verdicts(data, setting, told_beside):
    """Every target, what was reached, and whether that is enough; what was not measured is said.

    ``told_beside``: all of :func:`compared`, here and for :func:`simulator`.
    """
    systems, lines = data["systems"], []
    idle = systems["lanes"]["idle"]
    ours, whole, single = (at_saturation(data, system, setting) for system in ("lanes", "whole requests", "one at a time"))
    where = f"at {ours['rate']:g} arrivals / s, " if ours else ""

    def ratio(one, other):
        return one / other if other else float("inf")

    if ours and whole:
        reached = ratio(good(ours, idle), good(whole, idle))
        lines.append([f"goodput {where}over whole requests", f"≥ {OVER_WHOLE:g}", f"{reached:.2f}",
                      _met(reached >= OVER_WHOLE)])  # fmt: skip
    balanced = [one for one in systems["lanes"]["loads"].values() if one["mix"] == "balanced"]
    slow = full_loads(data, "lanes uncached")
    if balanced and slow:
        best = max(good(one, idle) for one in balanced)
        other = max(good(one, systems["lanes uncached"]["idle"]) for one in slow)
        reached = ratio(best, other)
        lines.append(["own goodput at level balanced over lanes uncached, each at its best rate",
                      f"≥ {OVER_UNCACHED:g}", f"{reached:.2f}", _met(reached >= OVER_UNCACHED)])  # fmt: skip
    if ours and single:
        reached = ratio(good(ours, idle), good(single, idle))
        lines.append([f"goodput {where}over one at a time", "as it is", f"{reached:.2f}", ""])
    mixed = [_with_exact(systems.get(system, {})) for system in ("lanes", "whole requests")]
    if all(mixed):
        reached = ratio(*(good(one, idle) for one in mixed))
        lines.append([f"goodput at {mixed[0]['rate']:g} arrivals / s, one of ten exact, over whole requests",
                      f"≥ {OVER_WHOLE:g}", f"{reached:.2f}", _met(reached >= OVER_WHOLE)])  # fmt: skip
    server = server_seconds(systems["lanes"])
    lines.append(["server's own time a request, mean over levels", f"≤ {1e3 * OVERHEAD:g} ms", f"{1e3 * server:.1f} ms",
                  _met(server <= OVERHEAD)])  # fmt: skip
    if sizes := systems["lanes"].get("flat"):
        late, after = sizes[-1]
        half = next(one for one in sizes if 2 * one[0] >= late)  # overloads take memory that is used again
        for early, before in (sizes[1], half):
            lines.append([f"memory after {late:,} requests over that after {early:,}", f"flat: within {100 * GROWN:g} %",
                          f"{100 * (after / before - 1):+.1f} %", _met(after / before - 1 <= GROWN)])  # fmt: skip
    held = [(slower(one), parts) for _, one, _, parts in told_beside]
    steady = [parts for longer, parts in held if longer and abs(longer - 1) <= STEADY]
    beside = f"in the loads whose ticks took as long as in the loops beside them, within {100 * STEADY:g} %"
    for what, some in (("in all loads", [parts for _, parts in held]), (beside, steady)):
        if off := [abs(one) for parts in some for one in parts.values() if one is not None]:
            reached = f"{100 * max(off):.0f} %; {sum(one <= NEAR for one in off)} within"
            lines.append([f"simulator beside server, the furthest of {len(off)} figures {what}", f"within {100 * NEAR:g} %",
                          reached, _met(max(off) <= NEAR)])  # fmt: skip
    return table(["", "asked", "reached", ""], lines)


def _with_exact(found):
    """Its load with exact requests, if it was played."""
    return next((one for one in found.get("loads", {}).values() if one["mix"] == WITH_EXACT), None)


def _met(yes):
    return "met" if yes else "**missed**"


def gains(data, setting):
    """The same arrivals to every system, one thing changed at a time."""
    idle, lines = data["systems"]["lanes"]["idle"], []
    ours = at_saturation(data, "lanes", setting)
    if ours is None:
        return "Not measured.\n"
    changed = {
        "lanes": "",
        "lanes uncached": "the cache",
        "lanes no batch": "the batch",
        "lanes fifo": "deadlines: first come, first served",
        "lanes shortest": "deadlines: who has the least left is first",
        "one at a time": "batch, and changing one's mind between steps",
        "whole requests": "changing one's mind between steps, mixed levels in a batch",
    }
    base = good(ours, idle)
    for system, what in changed.items():
        if (one := at_saturation(data, system, setting)) is None:
            continue
        value, (p50, is_open), (p95, p95_open) = good(one, idle), bounded(one, 50), bounded(one, 95)
        times = f"{base / value:.2f}" if value else "only lanes have any"
        lines.append([system, what, f"{value:.2f}", times if what else "", f"{'≥ ' * is_open}{p50:.3g}",
                      f"{'≥ ' * p95_open}{p95:.3g}"])  # fmt: skip
    words = f"Mixed levels, {ours['count']} requests at {ours['rate']:g} a second, {setting.at:g} of lanes' closed loop:\n"
    header = ["system", "what it lacks or has otherwise", "goodput / s", "lanes over it", "p50, s", "p95, s"]
    return f"{words}\n" + table(header, lines)


def compared(data):
    """(system, load, what the simulator says, how far off by name) of all loads that it can be held to.

    Percentiles that are known from below are left out.
    """
    for system in ("lanes", *ORDERS, "lanes no batch", CACHED[1], "lanes uncached"):
        found = data["systems"].get(system, {})
        for one in sorted(found.get("loads", {}).values(), key=lambda one: (one["mix"], -one["count"], one["rate"])):
            said = told(found, one, data["systems"]["lanes"]["idle"])
            parts = {"goodput": said["goodput"] / said["measured"] - 1 if said["measured"] else None}
            for percent in (50, 95, 99):
                value, is_open = bounded(one, percent)
                parts[f"p{percent}"] = None if is_open else said["percentiles"][percent] / value - 1
            yield system, one, said, parts


def simulator(data, told_beside):
    """Measured and told, side by side."""
    lines = []
    for system, one, said, parts in told_beside:
        cells = []
        for name in ("goodput", "p50", "p95", "p99"):
            value = said["goodput"] if name == "goodput" else said["percentiles"][int(name[1:])]
            real = said["measured"] if name == "goodput" else bounded(one, int(name[1:]))[0]
            off = parts[name]
            cells.append(f"{value:.3g} / {real:.3g}" + (" (cut)" if off is None else f" ({100 * off:+.0f} %)"))
        longer = slower(one)
        lines.append([system, one["mix"], one["count"], f"{one['rate']:g}", *cells, f"{longer:.2f}" if longer else ""])
    scale, desk, http = constants(data["systems"]["lanes"])
    when = "In the first closed loop" if desk.turns else "In requests alone"
    beside = f"Lanes are {desk.drags:.2f} times as slow while the desk works, the desk {desk.dragged:.2f} times while lanes do"
    if desk.turns:
        beside = "Lanes and desk take turns; what neither took of the loop is in what comes after the lanes"
    words = TOLD.format(
        when=when, scale=scale, before=1e3 * desk.before, after=1e3 * desk.after, http=1e3 * http, beside=beside
    )
    header = ["system", "levels", "requests", "arrivals / s", "goodput / s", "p50, s", "p95, s", "p99, s", "ticks"]
    return f"{words}\n" + table(header, lines)


def gpu(data):
    """The simulator at step times that others have published."""
    lanes, slow = (data["systems"].get(system, {}) for system in ("lanes", "lanes uncached"))
    if "facts" not in slow:
        return "Not measured.\n"
    parts = [GPU.format(aside=100 * ASIDE, within=WITHIN)]
    lines = []
    for name, (step, source) in GPUS.items():
        parts.append(f"* {name}: {1e3 * step:g} ms a step: {source}.")
        for exact, law, share in product((False, True), (LINEAR, ALIKE), BESIDE):
            rate, rows = on_gpu(lanes["facts"]["packed"], slow["facts"]["packed"], step, law, share, exact=exact)
            where = [name, "and exact" if exact else "cached", law, f"{share:g} ({rate:.3g} / s)"]
            lines += [[*where, system, f"{value:.3g}", f"{p95:.3g}" if p95 else ""] for system, (value, p95) in rows.items()]
    header = ["model", "levels", "a batch takes", "arrivals", "system", "goodput / s", "p95, s"]
    return "\n".join(parts) + "\n\n" + table(header, lines)
