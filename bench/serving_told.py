"""What the simulator says of the measured server, and of step times that others have published.

Costs come from calls that lanes made when nobody was there. A server's constants come from requests that came one by one, and
from closed loops of clients, where they were played right before and after a load, which are no Poisson traces: none of a load
that is compared.
"""

from math import inf
from typing import NamedTuple

from bench.serving_loads import WITHIN, Load, good, goodput, percentile
from bench.serving_plan import EXACT, one_of_ten
from cachec.runtime.lane_costs import Costs, Meeting
from cachec.runtime.lane_policy import Kind, Policy, Stage
from cachec.runtime.lane_simulator import Arrival, Desk, simulate


def pack(kinds):
    """Kinds by name, of equal costs, as JSON."""
    meets = {}
    costs = next(iter(kinds.values())).costs

    def of(call):
        place = None if call.meets is None else meets.setdefault(call.meets, len(meets))
        return [call.name, call.rows, place, call.computes, call.asks]

    return {
        "costs": {"seconds": costs.seconds, "tick": costs.tick, "request": costs.request, "call": costs.call},
        "stages": {name: [[of(call) for call in stage.calls] for stage in kind.stages] for name, kind in kinds.items()},
    }


def unpack(packed, scale=1.0):
    """The kinds again, their costs so many times as long."""
    known = packed["costs"]
    seconds = {name: {int(rows): one for rows, one in some.items()} for name, some in known["seconds"].items()}
    costs = Costs(seconds, known["tick"], known["request"], known["call"]).scaled(scale)
    return {
        name: Kind([Stage(tuple(Meeting(*call) for call in stage)) for stage in stages], costs)
        for name, stages in packed["stages"].items()
    }


def server_seconds(found):
    """What HTTP and the server take of a request that comes alone, beside encoding, ticks and decoding; mean over levels."""
    return sum(found["over"].values()) / len(found["over"])


def constants(found, played=None):
    """(scale of lanes' costs, desk, seconds of HTTP) of a measured system, from its runs alone and a closed loop.

    ``played``: a load, whose server's own are meant, where it has any.
    In turns, what neither lanes nor desk took of the loop is the desk's, too: then the server reads and answers.
    """
    own = {"beside": found["busy"], "alone": found["facts"]["alone"], **(played or {})}
    alone, busy = own["alone"].values(), own["beside"]
    http = server_seconds(found)
    if found["facts"]["in_turns"]:
        before, after = (busy[name] / busy["count"] for name in ("before", "after"))
        rest = max(0.0, (busy["took"] - busy["seconds"]) / busy["count"] - before - after)
        return busy["seconds"] / busy["reckoned"], Desk(before, after + rest, turns=True), max(0.0, http - rest)
    scale = sum(one["lanes"] for one in alone) / sum(one["reckoned"] for one in alone)
    before, after = (sum(one[name] for one in alone) / len(alone) for name in ("before", "after"))
    share = min(0.9, (busy["before"] + busy["after"]) / busy["took"])
    longer = max(1.0, busy["seconds"] / (busy["reckoned"] * scale))
    speed = max(0.1, (1 / longer - (1 - share)) / share)
    dragged = max(1.0, (busy["before"] + busy["after"]) / (busy["count"] * (before + after)))
    return scale, Desk(before, after, max(1.0, 1 / speed), dragged), max(0.0, http)


def slower(played):
    """How many times as long ticks took in a load as in the closed loops beside it; nothing where there were none."""
    if "beside" not in played:
        return None
    did, beside = (played[name]["seconds"] / played[name]["reckoned"] for name in ("did", "beside"))
    return did / beside


def told(found, played, idle):
    """What the simulator says of a load that was played: percentiles and goodput."""
    scale, desk, http = constants(found, played)
    facts = found["facts"]
    kinds = unpack(played.get("packed", facts["packed"]), scale)
    order, width = facts["policy"]
    limits, sent = {kind: WITHIN * one for kind, one in idle.items()}, played["deadlines"] or {}
    arrivals = [Arrival(moment, kinds[kind], sent.get(kind, inf))
                for moment, kind in zip(played["moments"], played["kinds"], strict=True)]  # fmt: skip
    done = simulate(arrivals, Policy(order, width), lanes=facts["lanes"], desk=desk, refuses=True)
    latencies = [latency + http for latency in done.latencies]
    taken = [latency for latency in latencies if latency < inf]
    return {
        "percentiles": {percent: percentile(taken, percent) for percent in (50, 95, 99)},
        "goodput": goodput(latencies, played["kinds"], limits, played["window"]),
        "measured": good(played, idle),
    }


class Asked(NamedTuple):
    """A request that is to be played whole; those that are ``alike`` may share a batch. ``after``: of its own once it was."""

    number: int
    alike: str
    deadline: float
    after: float = 0.0

    @property
    def order(self):
        return self.deadline, self.number


def next_batch(queue, most):
    """The most urgent one, with as many like it as fit into a batch; and the others."""
    ordered = sorted(queue, key=lambda one: one.order)
    chosen = [one for one in ordered if one.alike == ordered[0].alike][:most]
    return chosen, [one for one in ordered if all(one is not each for each in chosen)]


def late_ones(queue, clock, most, seconds):
    """Who will not be in time if nobody comes any more, by their order. ``seconds``: of so many that are alike."""
    late = set()
    while queue:
        chosen, queue = next_batch(queue, most)
        clock += seconds(chosen[0].alike, len(chosen))
        for one in chosen:
            clock += one.after
            late |= {one.order} if clock > one.deadline else set()
    return late


def together(kind, many):
    """What so many requests of a kind take together from their first step to their last, by their calls' costs."""
    return sum(kind.costs.of(call.name, call.rows * many) for stage in kind.stages for call in stage.calls)


def whole(arrivals, kinds, most):
    """Latencies where requests of one kind are played together from their first step to their last, the most urgent first.

    ``arrivals``: (moment, kind, deadline). Who cannot be in time is refused, and never done.
    """
    queue, ends, now, place = [], {}, 0.0, 0

    def seconds(kind, many):
        return together(kinds[kind], many)

    while place < len(arrivals) or queue:
        while place < len(arrivals) and (arrivals[place][0] <= now or not queue):
            moment, kind, deadline = arrivals[place]
            now, one = max(now, moment), Asked(place, kind, deadline)
            queue += [] if late_ones([*queue, one], now, most, seconds) else [one]
            place += 1
        if queue:
            chosen, queue = next_batch(queue, most)
            now += seconds(chosen[0].alike, len(chosen))
            ends |= dict.fromkeys((one.number for one in chosen), now)
    return [ends.get(place, inf) - arrivals[place][0] for place in range(len(arrivals))]


GPUS = {  # seconds of a step of one sample, and who says so
    "FLUX.1-dev, 1024x1024": (
        0.1289,
        "6.45 s for 50 on one H100, without a cache, in sglang's performance baselines, 2026-10-18",
    ),
}
ASIDE = 0.003  # of a step: what forecasts and moves are reckoned to take
ALIKE, LINEAR = "as on this machine", "k steps of one"


def on_gpu(packed, uncached, step, law, share, *, exact=False, count=1000):
    """What the simulator says of each system at ``share`` of what one request at a time could do, by a step's seconds.

    ``law``: what a batch of k costs; ``exact``: one request of ten computes every step.
    The rate; and goodput and 95th percentile of those who were taken, if any, by system.
    """
    cached, slow = ({name: _timed(kind, step, law) for name, kind in unpack(one).items()} for one in (packed, uncached))
    drawn = tuple(cached)
    if exact:
        every, costs = next(iter(slow.values())), next(iter(cached.values())).costs
        cached, slow, drawn = cached | {EXACT: Kind(every.stages, costs)}, slow | {EXACT: every}, one_of_ten(drawn)
    mean = sum(cached[kind].alone[0] for kind in drawn) / len(drawn)
    load = Load(share / mean, count, drawn, keeps_up=False)
    moments, rows = load.arrivals(), {}

    def limits(kinds):
        return {name: WITHIN * kind.alone[0] for name, kind in kinds.items()}

    def note(name, latencies, kinds):
        good = goodput(latencies, [kind for _, kind in moments], limits(kinds), moments[-1][0])
        taken = [one for one in latencies if one < inf]
        rows[name] = good, percentile(taken, 95) if taken else None

    for name, kinds, policy, lanes in (
        ("lanes", cached, Policy("deadline"), 8),
        ("lanes no batch", cached, Policy("deadline", 1), 8),
        ("lanes fifo", cached, Policy("fifo"), 8),
        ("one at a time", cached, Policy("deadline"), 1),
        ("lanes uncached", slow, Policy("deadline"), 8),
    ):
        within = dict.fromkeys(kinds, inf) if policy.order == "fifo" else limits(kinds)
        arrivals = [Arrival(moment, kinds[kind], within[kind]) for moment, kind in moments]
        note(name, simulate(arrivals, policy, lanes=lanes, refuses=True).latencies, kinds)
    dated = [(moment, kind, moment + limits(cached)[kind]) for moment, kind in moments]
    note("whole requests", whole(dated, cached, 8), cached)
    return load.rate, rows


def _timed(kind, step, law):
    """The same stages at a step's seconds, with all other calls a small share of it."""
    costs = kind.costs
    runs = {stage.run.name for stage in kind.stages}
    seconds = {}
    for name, some in costs.seconds.items():
        one = step if name in runs else ASIDE * step
        least = min(some)
        seconds[name] = {rows: one * (rows if law == LINEAR else some[rows] / some[least]) for rows in some}
    return Kind(kind.stages, Costs(seconds))
