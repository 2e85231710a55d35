"""A server for the serving bench: one of the compared systems, behind the same HTTP. Prints a line of JSON when it is up.

``python -m bench.serving_child SYSTEM BUNDLE [--threads N]``
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from bench.serving_rivals import Eager, WholeBatches, compute_all
from cachec.serving.app import make_app
from cachec.serving.limits import Limits
from cachec.serving.server import open_one, serve
from cachec.serving.wishes import ImageWish

SYSTEMS = ("lanes", "lanes uncached", "one at a time", "whole requests", "diffusers eager")
LANES = 8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--policy", default="shortest")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--alone", type=int, default=15, help="Requests without HTTP, for the server's overhead.")
    given = parser.parse_args()
    lanes = 1 if given.system == "one at a time" else LANES
    one = open_one(given.bundle, lanes=lanes, policy=given.policy, threads=given.threads)
    if given.system == "whole requests":
        one.lanes = WholeBatches(one, most=LANES)
    elif given.system == "diffusers eager":
        one.lanes = Eager(one)
    alone = {} if given.system == "diffusers eager" else measure_alone(one, given.alone)
    seconds = {level: one.lanes.kind(level).alone[0] for level in one.levels}
    if given.system == "lanes uncached":
        compute_all(one)
    app = make_app([one], limits=Limits(queue=100_000, seconds=3600))

    def told(where: str) -> None:
        facts = {"url": where.rpartition(" ")[2], "levels": one.levels, "seconds": seconds, "alone": alone}
        print(json.dumps(facts), flush=True)

    serve(app, port=0, told=told)


def choose(one, level):
    """A request of this level."""
    return one.choose(ImageWish(prompt="a sad face with short blue hair", quality=level), Limits(), lambda: 0)


def measure_alone(one, count):
    """Seconds of a request without HTTP, in the median, by level: encode, denoise, decode, PNG."""
    medians = {}
    for level in one.levels:
        took = []
        for seed in range(count):
            begun = time.perf_counter()
            given = one.conditions(choose(one, level))
            ticket = one.lanes.submit(given, seed=seed, level=level)
            one.lanes.run_until_idle()
            one.pictures.to_png(one.pictures.decode(np.asarray(ticket.result(0)))[0])
            took.append(time.perf_counter() - begun)
        medians[level] = statistics.median(took)
    return medians


if __name__ == "__main__":
    main()
