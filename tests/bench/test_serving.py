"""The serving bench's loads, plan, page and what the simulator is told; on servers and figures that were made up."""

import asyncio
import json
from dataclasses import replace
from math import inf

import pytest

from bench.serving_chart import full_loads
from bench.serving_loads import Load, bounded, good, percentile, play
from bench.serving_plan import EXACT, ORDERS, SETTINGS, loads_of, plan
from bench.serving_report import write
from bench.serving_told import constants, on_gpu, pack, server_seconds, slower, told, unpack, whole
from cachec.runtime.lane_costs import Costs, Meeting
from cachec.runtime.lane_policy import Job, Kind, Stage, tick_seconds

COSTS = Costs({"m": {1: 0.1, 2: 0.16, 4: 0.3, 8: 0.55}, "f": {1: 0.01, 2: 0.01}}, tick=0.002, request=0.001, call=0.001)
RUN, AFTER = Meeting("m", 1, meets=(b"a", 1), computes=True), Meeting("f", 1, meets=(b"b", 2), asks=True)
KINDS = {
    "high": Kind([Stage((RUN, AFTER))] * 6, COSTS),
    "balanced": Kind([Stage((RUN, AFTER))] * 4, COSTS),
    "fast": Kind([Stage((RUN,))] * 2, COSTS),
}
SLOW = {name: Kind([Stage((RUN,))] * 20, COSTS) for name in KINDS}
SMALL = replace(SETTINGS["tiny-flux"], count=60, few=20, flat=100)


def test_arrivals_are_the_same_for_all_who_are_asked():
    load = Load(4.0, 2000, ("a", "b"), keeps_up=True)
    arrivals = load.arrivals()
    assert arrivals == replace(load, mix="other").arrivals()
    assert arrivals[-1][0] == pytest.approx(500, rel=0.1)
    assert sum(kind == "a" for _, kind in arrivals) == pytest.approx(1000, rel=0.1)
    assert [percentile([3, 1, 2, 4], percent) for percent in (25, 50, 51, 100)] == [1, 2, 3, 4]


async def played(load, limits, **options):
    """What a server makes of it that answers ``fast``, refuses ``late`` and leaves ``never`` waiting."""

    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split()[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length"))
        asked = json.loads(await reader.readexactly(length))
        if asked["quality"] == "never":
            await reader.read()
        elif asked["quality"] == "late":
            writer.write(b'HTTP/1.1 429 Too Many\r\nA: b\r\n\r\n{"code": "deadline"}')
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n{}")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        return await play(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", load, limits, **options)


def test_who_cannot_be_in_time_any_more_is_not_waited_for():
    load = Load(200.0, 40, ("fast", "never"), keeps_up=False)
    found = asyncio.run(played(load, {"fast": 0.5, "never": 0.5}))
    assert set(zip(found["kinds"], found["how"], strict=True)) == {("fast", "made"), ("never", "cut")}
    late = [latency for latency, how in zip(found["latencies"], found["how"], strict=True) if how == "cut"]
    assert min(late) >= 0.5 - 1e-3
    count = found["how"].count("made")
    assert good(found, {"fast": 1e6, "never": 1e6}) == pytest.approx(count / found["window"])
    assert [bounded(found, percent)[1] for percent in (10, 99)] == [False, True]


def test_who_is_refused_was_not_good_and_has_no_latency():
    found = asyncio.run(
        played(
            Load(200.0, 20, ("fast", "late"), keeps_up=True), {"fast": 5.0, "late": 5.0}, deadlines={"fast": 5.0, "late": 5.0}
        )
    )
    assert set(zip(found["kinds"], found["how"], strict=True)) == {("fast", "made"), ("late", "refused")}
    assert good(found, {"fast": 1e6, "late": 1e6}) == pytest.approx(found["how"].count("made") / found["window"])
    with pytest.raises(RuntimeError, match="deadline"):
        asyncio.run(played(Load(200.0, 5, ("late",), keeps_up=True), {"late": 5.0}))


def test_kinds_come_back_from_json_as_they_were():
    kinds = unpack(json.loads(json.dumps(pack(KINDS))))
    for jobs in ([("high", 0), ("balanced", 1)], [("fast", 0), ("fast", 1)], [("high", 5)]):
        ours, theirs = (
            [Job(place, some[name], stage=stage) for place, (name, stage) in enumerate(jobs)] for some in (KINDS, kinds)
        )
        assert tick_seconds(ours) == pytest.approx(tick_seconds(theirs))
    assert unpack(pack(KINDS), 2.0)["high"].alone[0] == pytest.approx(2 * KINDS["high"].alone[0])


def test_whole_requests_wait_for_all_of_their_batch():
    one = Kind([Stage((RUN,))] * 2, Costs({"m": {1: 1.0, 2: 1.5}}))
    longer = Kind([Stage((RUN,))] * 4, Costs({"m": {1: 1.0, 2: 1.5}}))
    arrivals = [(0.0, "one", 9.0), (0.5, "longer", 9.0), (0.6, "one", 5.0), (0.7, "one", 5.0), (0.8, "one", 6.9), (3, "one", 8)]
    told = whole(arrivals, {"one": one, "longer": longer}, 2)
    assert told == pytest.approx([2, 5 + 4 - 0.5, 5 - 0.6, 5 - 0.7, inf, inf]), "one would be late, and one make another late"


def made_up(system, kinds, slower=1.0, *, in_turns=False):
    """What a run would have kept, of a server that is told by the simulator's own figures."""
    alone = {name: {"before": 0.01, "lanes": 1.1 * kind.alone[0], "after": 0.02, "reckoned": kind.alone[0]}
             for name, kind in kinds.items()}  # fmt: skip
    return {
        "facts": {"kinds": list(kinds), "lanes": 8, "policy": ["shortest" if system in ORDERS else "deadline", None],
                  "in_turns": in_turns, "seconds": {name: kind.alone[0] for name, kind in kinds.items()}, "alone": alone,
                  "packed": pack(kinds | {EXACT: SLOW["high"]})},
        "idle": {name: one["lanes"] + 0.032 for name, one in alone.items()} | {EXACT: 3.0},
        "over": dict.fromkeys(kinds, 0.002),
        "busy": {"rate": 3.0 / slower, "took": 30.0, "count": 90, "seconds": 11.0 * 1.2, "reckoned": 10.0, "before": 4.0,
                 "after": 8.0, "ticks": 9, "rows": 9},
        "loads": {},
    }  # fmt: skip


def filled(setting):
    data = {"model": "tiny-flux", "where": {"cpu": "a chip", "cores": 2, "memory_gib": 8, "date": "2026-01-01"}, "systems": {}}
    for system in setting.systems:
        uncached = system in ("lanes uncached", "diffusers eager")
        data["systems"][system] = made_up(system, SLOW if uncached else KINDS, 5.0 if uncached else 1.0)
    first = data["systems"]["lanes"]
    for system, found in data["systems"].items():
        for load in loads_of(system, setting, first, found):
            arrivals = load.arrivals()
            latencies = [0.5 + 0.01 * place for place in range(load.count)]
            found["loads"][load.name] = {
                "rate": load.rate, "count": load.count, "mix": load.mix, "moments": [moment for moment, _ in arrivals],
                "kinds": [kind for _, kind in arrivals], "latencies": latencies, "window": arrivals[-1][0],
                "how": ["made" if load.keeps_up or place % 3 else "cut" for place in range(load.count)], "throughput": 1.0,
                "deadlines": None if system in ORDERS else {kind: 3 * one for kind, one in found["idle"].items()},
            }  # fmt: skip
    return data


def test_constants_are_those_that_were_put_in():
    scale, desk, http = constants(made_up("lanes", KINDS))
    assert scale == pytest.approx(1.1)
    assert (desk.before, desk.after, http) == pytest.approx((0.01, 0.02, 0.002))
    assert desk.dragged == pytest.approx(12 / (90 * 0.03))
    share = 12 / 30
    assert 1 / (1 - share + share / desk.drags) == pytest.approx(1.2), "so much longer ticks are in the mean"
    found = made_up("lanes", KINDS, in_turns=True)
    scale, desk, http = constants(found)
    assert (scale, desk.before, desk.turns, http) == (pytest.approx(1.32), pytest.approx(4 / 90), True, 0)
    assert desk.after == pytest.approx(8 / 90 + (30 - 13.2 - 12) / 90), "what nobody took of the loop is in it"
    assert server_seconds(found) == pytest.approx(0.002)


def test_a_load_is_told_by_the_loops_beside_it():
    found = made_up("lanes", KINDS, in_turns=True)
    load = Load(1.0, 40, tuple(KINDS), keeps_up=True)
    played = {"moments": [moment for moment, _ in load.arrivals()], "kinds": [kind for _, kind in load.arrivals()],
              "latencies": [0.1] * 40, "how": ["made"] * 40, "window": 40.0, "deadlines": None}  # fmt: skip
    assert slower(played) is None
    first, busy = told(found, played, found["idle"]), found["busy"]
    twice = busy | {name: 2 * busy[name] for name in ("seconds", "before", "after", "took")}
    played |= {"did": {"seconds": 3.0, "reckoned": 1.0}, "beside": twice}
    assert slower(played) == pytest.approx(3 / 2.64)
    assert told(found, played, found["idle"])["percentiles"][50] > 2 * first["percentiles"][50]
    costs = {"packed": pack(unpack(pack(KINDS), 0.5))}
    assert told(found, played | costs, found["idle"])["percentiles"][50] < 2 * first["percentiles"][50]


def test_a_plan_has_what_is_missing_and_its_minutes():
    data = filled(SMALL)
    lines, minutes = plan(data, SMALL)
    assert {line[-1] for line in lines if line[-2] != "memory"} == {"there"}
    gone = data["systems"]["one at a time"]["loads"]
    rate = gone.pop(next(iter(gone)))["rate"]
    loop = SMALL.beside / data["systems"]["one at a time"]["busy"]["rate"]
    load = 60 / rate + 3 * max(data["systems"]["lanes"]["idle"].values())
    assert plan(data, SMALL)[1] == pytest.approx(minutes + (load + loop + 25) / 60)


def test_the_page_has_every_part_and_names_what_is_missing(tmp_path):
    data = filled(SMALL)
    del data["systems"]["whole requests"]
    gone, _ = data["systems"]["lanes"]["loads"].popitem()
    for one in data["systems"]["lanes"]["loads"].values():
        one |= {"beside": data["systems"]["lanes"]["busy"], "did": {"seconds": 13.5, "reckoned": 10.0}}
    (tmp_path / "tiny-flux.json").write_text(json.dumps(data))
    page = write(tmp_path, tmp_path).read_text()
    for part in ("What was asked", "Against arrival rate", "Whose gain it is", "The simulator beside the server", "H100", "≥ "):
        assert part in page
    assert "| 1.02 |" in page, "how much longer ticks took in a load than in the loops beside it"
    assert "in the loads whose ticks took as long" in page
    assert all(one in page.split("Not measured: ")[1] for one in ("memory", "whole requests", f"lanes at {gone.split()[-3]}"))
    assert (tmp_path / "serving-tiny-flux.png").read_bytes().startswith(b"\x89PNG")


def test_the_simulator_is_asked_what_was_played():
    data = filled(SMALL)
    first = data["systems"]["lanes"]
    for system in ("lanes", "lanes shortest"):
        one = full_loads(data, system)[0]
        said = told(data["systems"][system], one, first["idle"])
        assert said["measured"] == good(one, first["idle"])
        assert said["percentiles"][50] >= min(first["idle"].values())
    rate, rows = on_gpu(pack(KINDS), pack(SLOW), 0.1, "k steps of one", 1.1, count=200)
    assert rate == pytest.approx(1.1 / (sum(0.1 * steps for steps in (6, 4, 2)) / 3), rel=0.05)
    assert rows["lanes"][0] > rows["lanes uncached"][0]
    assert rows["lanes fifo"][1] > 0
    less, mixed = on_gpu(pack(KINDS), pack(SLOW), 0.1, "k steps of one", 1.1, exact=True, count=200)
    assert less == pytest.approx(1.1 / (0.1 * (0.9 * 4 + 0.1 * 20)), rel=0.05)
    assert mixed["lanes"][0] > mixed["whole requests"][0], "who waits for exact ones is late"
