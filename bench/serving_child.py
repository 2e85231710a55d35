"""A server for the serving bench: one of the compared systems, behind the same HTTP. Prints a line of JSON when it is up.

``python -m bench.serving_child SYSTEM BUNDLE [--threads N]``. ``GET /bench`` says what it has done so far.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from bench.serving_plan import EXACT
from bench.serving_rivals import Eager, WholeBatches, compute_all
from bench.serving_told import pack
from cachec.runtime.lane_policy import Policy
from cachec.runtime.program import UNCACHED
from cachec.serving.app import make_app
from cachec.serving.limits import Limits
from cachec.serving.server import open_one, serve
from cachec.serving.wishes import ImageWish

POLICIES = {
    "lanes": Policy("deadline"),
    "lanes uncached": Policy("deadline"),
    "one at a time": Policy("deadline"),
    "whole requests": Policy("deadline"),
    "diffusers eager": Policy("deadline"),
    "lanes fifo": Policy("fifo"),
    "lanes shortest": Policy("shortest"),
    "lanes no batch": Policy("deadline", 1),
}
LANES = 8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=POLICIES)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--alone", type=int, default=15, help="Requests of a kind without HTTP, for the server's overhead.")
    given = parser.parse_args()
    lanes = 1 if given.system == "one at a time" else LANES
    policy = POLICIES[given.system]
    one = open_one(given.bundle, lanes=lanes, policy=policy, strengths=(), threads=given.threads)
    asked = kinds(one)
    known = {kind: one.lanes.kind(level, steps=steps) for kind, (level, steps) in asked.items()}
    uncached = {kind: one.lanes.kind(UNCACHED, steps=steps) for kind, (_, steps) in asked.items()}
    facts = {"kinds": list(asked), "lanes": lanes, "policy": [policy.order, policy.width], "in_turns": one.in_turns,
             "seconds": {kind: each.alone[0] for kind, each in known.items()}}  # fmt: skip
    if given.system == "lanes uncached":
        compute_all(one)
    if given.system == "whole requests":
        one.lanes = WholeBatches(one, most=LANES)
        for level, steps in (*asked.values(), (UNCACHED, None)):
            chosen = choose(one, level, steps)
            one.lanes.bind((chosen.size, chosen.steps, level))
    elif given.system == "diffusers eager":
        one.lanes = Eager(one)
    one.warm_up()
    facts["alone"] = measure_alone(one, asked, given.alone)
    facts["packed"] = pack((uncached if given.system == "lanes uncached" else known) | {EXACT: one.lanes.kind(UNCACHED)})
    app = make_app([one], limits=Limits(queue=100_000, seconds=3600))
    count(one, app)
    serve(app, port=0, told=lambda where: print(json.dumps({"url": where.rpartition(" ")[2], **facts}), flush=True))


def kinds(one):
    """(level, steps) of every cached program, by what it is called; steps are named where there are several."""
    several = len({each.steps for each in one.variants}) > 1
    pairs = [(level, each.steps) for each in one.variants for level in each.programs if level != UNCACHED]
    return {f"{level}/{steps}" if several else level: (level, steps) for level, steps in pairs}


def choose(one, level, steps=None):
    """A request of this level."""
    wish = ImageWish(prompt="a sad face with short blue hair", quality=level, num_inference_steps=steps)
    return one.choose(wish, Limits(), lambda: 0)


def measure_alone(one, asked, many):
    """Seconds of a request without HTTP, in the median, by kind: before the lanes, in them, after them, and by their costs."""
    medians = {}
    for kind, (level, steps) in asked.items():
        took, reckoned = [], 0.0
        for seed in range(many):
            moments = [time.perf_counter()]
            choice = choose(one, level, steps)
            given = one.conditions(choice)
            moments.append(time.perf_counter())
            ticket = one.lanes.submit(given, seed=seed, level=level, steps=steps, size=choice.size)
            ticks = list(iter(one.lanes.tick, None))
            moments.append(time.perf_counter())
            one.finish(choice, np.asarray(ticket.result(0)))
            moments.append(time.perf_counter())
            took.append(np.diff(moments))
            reckoned = sum(tick.reckoned for tick in ticks)
        parts = [statistics.median(column) for column in zip(*took, strict=True)]
        medians[kind] = dict(zip(("before", "lanes", "after"), map(float, parts), strict=True)) | {"reckoned": reckoned}
    return medians


def count(one, app):
    """Let the server say what it has done: of ticks, and around lanes, the requests' waiting not counted."""
    desk, done = app.state.desk, {"ticks": 0, "rows": 0, "seconds": 0.0, "reckoned": 0.0, "before": 0.0, "after": 0.0}
    note = desk.ticker._note

    def noted(place, tick):
        done["ticks"] += 1
        for name in ("rows", "seconds", "reckoned"):
            done[name] += getattr(tick, name)
        note(place, tick)

    def timed(name, function):
        def call(*given):
            begun = time.perf_counter()
            try:
                return function(*given)
            finally:
                done[name] += time.perf_counter() - begun

        return call

    desk.ticker._note = noted
    one.conditions, one.finish = timed("before", one.conditions), timed("after", one.finish)

    @app.get("/bench")
    async def bench():
        return {"present": desk.num_present, **done}


if __name__ == "__main__":
    main()
