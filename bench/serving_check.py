"""The simulator beside real lanes on one thread's processor time: who else uses the machine counts little.

``python -m bench.serving_check BUNDLE``. Lanes are driven in this process on a clock that is this thread's processor time, and
leaps to the next arrival when there is nothing to do. Costs are those that lanes measure when they are made, each call alone,
scaled to what ticks took at a load of a fifth, of other arrivals: what is compared sets none of them. It says how near costs
and grouping come to what lanes do, and nothing of a server.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from bench.serving_child import choose
from bench.serving_loads import percentile
from cachec.runtime.lane_policy import Policy
from cachec.runtime.lane_simulator import poisson, simulate
from cachec.runtime.lanes import Lanes
from cachec.runtime.program import UNCACHED
from cachec.serving.server import open_one

LOADS, ORDERS = (0.5, 0.9, 1.5), ("fifo", "shortest", "deadline")


class Clock:
    """This thread's seconds of processor time since it began, less pauses, more leaps."""

    def __init__(self) -> None:
        self._offset = -time.thread_time()
        self._paused: float | None = None

    def __call__(self) -> float:
        return self._offset + time.thread_time() if self._paused is None else self._paused

    def pause(self) -> None:
        self._paused = self()

    def go_on(self, at: float | None = None) -> None:
        """From ``at``, or where it was paused."""
        now = self() if at is None else at
        self._paused, self._offset = None, now - time.thread_time()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--orders", default=",".join(ORDERS))
    parser.add_argument("--lanes", type=int, default=8)
    given = parser.parse_args()
    one = open_one(given.bundle, strengths=(), threads=1)
    conditions = one.conditions(choose(one, one.loaded.default_level))
    for order in given.orders.split(","):
        clock = Clock()
        levels = [level for level in one.levels if level != UNCACHED]
        lanes = Lanes(one.loaded, lanes=given.lanes, policy=order, clock=clock)
        for load in LOADS:  # calibrated again before each: processor time, too, depends on who else uses the caches
            costs = lanes.costs.scaled(seen(conditions, lanes, clock, levels))
            lanes = Lanes(one.loaded, lanes=given.lanes, policy=order, clock=clock, costs=costs)
            found = compare(conditions, lanes, clock, levels, order, load, given)
            print(json.dumps(found), flush=True)


def seen(conditions, lanes, clock, levels, count=12):
    """How many times as long as their costs ticks take, at a fifth of what would keep lanes busy."""
    kinds = {lanes.kind(level): level for level in levels}
    mean = sum(kind.alone[0] for kind in kinds) / len(kinds)
    arrivals = poisson(0.2 / mean, count, list(kinds), seed=5)
    _, ticks = play(conditions, lanes, clock, [(one.time, kinds[one.kind], np.inf) for one in arrivals])
    return sum(tick.seconds for tick in ticks) / sum(tick.reckoned for tick in ticks)


def compare(conditions, lanes, clock, levels, order, load, given):
    """Both at ``load`` times what would keep lanes busy if nothing was shared."""
    kinds = {lanes.kind(level): level for level in levels}
    mean = sum(kind.alone[0] for kind in kinds) / len(kinds)
    arrivals = poisson(load / mean, given.requests, list(kinds), seed=17, within=100 * mean if order == "deadline" else np.inf)
    told = simulate(arrivals, Policy(order), lanes=given.lanes)
    latencies, ticks = play(conditions, lanes, clock, [(one.time, kinds[one.kind], one.within) for one in arrivals])
    found = {"order": order, "load": load, "per_tick": sum(map(len, (tick.tickets for tick in ticks))) / len(ticks)}
    found["ticks"] = sum(tick.seconds for tick in ticks) / sum(tick.reckoned for tick in ticks)
    for percent in (50, 95, 99):
        found[f"p{percent}"] = [percentile(latencies, percent), percentile(told.latencies, percent)]
    found["mean"] = [float(np.mean(latencies)), float(np.mean(told.latencies))]
    return {name: [*(round(one, 4) for one in value), round(value[1] / value[0] - 1, 3)] if isinstance(value, list) else value
            for name, value in found.items()}  # fmt: skip


def play(conditions, lanes, clock, arrivals):
    """Latencies of lanes that get these (moment, level, within), and their ticks."""
    clock.pause()
    clock.go_on(at=0.0)
    tickets, ends, ticks, place = {}, {}, [], 0
    while len(ends) < len(arrivals):
        clock.pause()
        now = clock()
        if lanes.num_queued + lanes.num_running == 0:
            now = max(now, arrivals[place][0])
        while place < len(arrivals) and arrivals[place][0] <= now:
            moment, level, within = arrivals[place]
            tickets[lanes.submit(conditions, seed=place, level=level, deadline=moment + within - now)] = place
            place += 1
        clock.go_on(at=now)
        tick = lanes.tick()
        ticks.append(tick)
        ends |= {tickets[one]: clock() - arrivals[tickets[one]][0] for one in tick.ended}
    return [ends[place] for place in range(len(arrivals))], ticks


if __name__ == "__main__":
    main()
