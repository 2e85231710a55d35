"""Ticks and the work around them, where they want the same cores."""

import asyncio
import threading
import time

import pytest
from toy_server import ToyPictures, running, toy_loaded, toy_served

from cachec.serving import server
from cachec.serving.desk import Desk
from cachec.serving.limits import Limits
from cachec.serving.ticker import KEPT, Ticker
from cachec.serving.turns import Turns


def in_thread(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_a_tick_waits_for_what_is_ahead_and_what_comes_for_the_tick():
    turns, told = Turns(on=True), []

    def tick():
        with turns.tick():
            told.append("ticks")
            ticking.set()
            go_on.wait(10)
            told.append("ticked")

    ticking, go_on = threading.Event(), threading.Event()
    turns.come()
    ticks = in_thread(tick)
    assert not ticking.wait(0.05), "something is ahead"
    turns.wait()
    turns.go()
    assert ticking.wait(10)
    turns.come()
    works = in_thread(lambda: (turns.wait(), told.append("works"), turns.go()))
    works.join(0.05)
    assert works.is_alive(), "a tick is on its way"
    go_on.set()
    for one in (ticks, works):
        one.join(10)
    assert told == ["ticks", "ticked", "works"]
    with turns.tick():
        pass


def test_who_has_cores_of_its_own_waits_for_nobody():
    turns, told = Turns(on=False), []

    def both():
        turns.come()
        with turns.tick():
            turns.wait()
            told.append("at once")

    in_thread(both).join(10)
    assert told == ["at once"]


@pytest.mark.parametrize("in_turns", [True, False])
def test_work_that_is_cancelled_before_it_began_keeps_no_tick_waiting(in_turns):
    async def ask(desk):
        async with desk.open():
            blocked = asyncio.create_task(desk.apart(time.sleep, 0.1))
            queued = asyncio.create_task(desk.apart(never.append, 1))
            await asyncio.sleep(0)
            queued.cancel()
            await blocked
            wish = desk.find(None)
            return await asyncio.wait_for(asyncio.to_thread(in_a_tick, desk, wish), 10)

    def in_a_tick(desk, served):
        given = served.pictures.encode(["a"])
        return desk.ticker.submit(lambda: served.lanes.submit(given, seed=0)).result(10)

    never = []
    made = asyncio.run(ask(Desk([toy_served(in_turns=in_turns)], Limits())))
    assert not never
    assert made.shape[0] == 1


def test_what_is_done_is_decoded_before_the_next_tick():
    class Told(ToyPictures):
        def decode(self, latents, *, size=None):
            events.append("decode")
            return super().decode(latents, size=size)

    events = []
    with running(toy_served(pictures=Told, in_turns=True, lanes=4)) as server:
        events.clear()
        note = server.desk.ticker._note
        server.desk.ticker._note = lambda place, tick: (events.append(len(tick.ended)), note(place, tick))
        answers = []
        asking = [in_thread(lambda: answers.append(server.generate()[0])) for _ in range(8)]
        for one in asking:
            one.join(10)
        seen = events.copy()
        assert server.generate(n=3)[0] == 200, "the first sample of a request waits for the others' ticks"
    assert answers == [200] * 8
    done, decoded = 0, 0
    for one in seen:
        if one == "decode":
            decoded += 1
        else:
            assert decoded == done, "a tick came between"
            done += one
    assert (done, decoded) == (8, 8)


def test_only_what_follows_an_end_counts_as_its_own():
    served = toy_served()
    ticker = Ticker([served.lanes], lambda place, tick: None, Turns(on=True))
    ticker.submit(lambda: served.lanes.submit(served.pictures.encode(["a"]), seed=0))  # somebody waits
    assert ticker.seconds_between is None
    for ended, gap in ((1, 0.0), (0, 100.0), (0, 700.0), (2, 700.0), (0, 200.0)):
        ticker._reckon(time.monotonic() + gap, ended)
    assert ticker.seconds_between == pytest.approx((KEPT * 100 + 200) / (KEPT * 1 + 2), rel=1e-3)


def test_a_place_ahead_is_let_go_whatever_came_first():
    turns = Turns(on=True)
    early, late = turns.hold(), turns.hold()
    early.let_go()
    early.take()
    late.take()
    late.take()
    late.let_go()
    late.let_go()
    assert turns._ahead == 0


@pytest.mark.parametrize(
    ("threads", "beside", "wanted"), [(None, False, True), (2, False, False), (3, False, True), (None, True, False)]
)
def test_engines_take_turns_where_two_of_them_want_more_cores_than_there_are(monkeypatch, threads, beside, wanted):
    monkeypatch.setattr(server, "num_cores", lambda: 4)
    loaded = toy_loaded()
    monkeypatch.setattr(type(next(iter(loaded.engines.values())).device), "beside_host", beside)
    assert server.want_same_cores(loaded, threads) is wanted
