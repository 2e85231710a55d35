"""Lanes on engines of numpy: whoever shares a batch, a request gets what its own session gives it."""

import pickle
import threading
from concurrent.futures import CancelledError, wait
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from numpy_engines import (
    KEY,
    SCHEDULE,
    SHAPE,
    SIGMAS,
    STEPS,
    NumpyContext,
    NumpyEngine,
    X,
    compute,
    forecast,
    load,
    noise,
    prologue,
    prompt,
)

from cachec.compiler.methods.adams import Adams
from cachec.compiler.methods.taylor import Taylor
from cachec.compiler.tables.coefficients import ForecastTable
from cachec.compiler.tables.lower import lower_advance, lower_table
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import parse_schedule
from cachec.runtime.abi import COMPUTE, FORECAST, GUIDE, PROLOGUE
from cachec.runtime.device import Host
from cachec.runtime.errors import DeadlineError, EngineError, InputError, NotFiniteError
from cachec.runtime.lane_costs import Costs
from cachec.runtime.lane_policy import Policy
from cachec.runtime.lane_ports import Ports
from cachec.runtime.lane_simulator import poisson, simulate
from cachec.runtime.lanes import Lanes
from cachec.runtime.program import UNCACHED
from cachec.runtime.specs import Signature, TensorSpec

LEVELS = ("default", UNCACHED)
ORDERS = ("fifo", "shortest", "deadline")
MARK = 50.0  # in a prompt: the request is to go wrong


def wide(cut, **options):
    """Engines that take batches of 8."""
    bundle = load(cut, **options)
    bundle.target.sizes["batch"] = (1, 2, 8)
    return bundle


def alone(bundle, seed, level, conditions=None):
    return bundle.session(level=level).run(conditions or prompt(seed), noise(seed))


def check(bundle, ticket, seed, conditions=None):
    np.testing.assert_allclose(ticket.result(0), alone(bundle, seed, ticket.level, conditions), atol=1e-6)


def marked(seed):
    return {"prompt": np.full_like(prompt(seed)["prompt"], MARK)}


def goes_wrong(latents, delta, shift, prompt):
    made = compute(latents, delta, shift, prompt)
    made["next_latents"][prompt[:, 0] == MARK] = np.nan
    return made


def breaks(latents, delta, shift, prompt):
    if (prompt == MARK).any():
        raise EngineError("there is no memory")
    return compute(latents, delta, shift, prompt)


@pytest.mark.parametrize("cut", ["hidden", "output"])
@pytest.mark.parametrize("policy", ORDERS)
@pytest.mark.parametrize("buckets", [(1, 2, 4), (8,)])
def test_requests_of_all_levels_get_what_their_sessions_give(cut, policy, buckets):
    bundle = wide(cut)
    lanes = Lanes(bundle, lanes=5, buckets=buckets, policy=policy)
    tickets = []
    for seed in range(12):
        tickets.append(lanes.submit(prompt(seed), seed=seed, level=LEVELS[seed % 3 == 0]))
        if seed % 2:
            lanes.tick()
    lanes.run_until_idle()
    for seed, ticket in enumerate(tickets):
        check(bundle, ticket, seed)
        assert ticket.step == ticket.num_steps
    assert (lanes.num_queued, lanes.num_running, lanes.tick()) == (0, 0, None)


@pytest.mark.parametrize("cut", ["hidden", "output"])
def test_neighbours_change_no_bit_in_one_bucket(cut):
    bundle, results = load(cut), []
    for others in ([], [2], [3, 4, 5]):
        lanes = Lanes(bundle, buckets=(4,), policy=Policy("fifo", 4))
        ticket = lanes.submit(prompt(1), seed=1)
        for other in others:
            lanes.submit(prompt(other), seed=other, level=LEVELS[other % 2])
        rows = [lanes.tick().rows for _ in range(2)]
        assert rows == [1 + len(others)] * 2
        lanes.run_until_idle()
        results.append(ticket.result(0))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_requests_may_begin_later():
    bundle = load("hidden")
    lanes = Lanes(bundle, starts=(3, 5), policy=Policy("fifo", 4))
    wheres = [("default", 3), (UNCACHED, 5), ("default", 0)]
    tickets = [lanes.submit(prompt(1), noise=noise(1), level=level, start=start) for level, start in wheres]
    assert lanes.tick().rows == 3
    lanes.run_until_idle()
    for (level, start), ticket in zip(wheres, tickets, strict=True):
        wanted = bundle.session(level=level, start=start).run(prompt(1), noise(1))
        np.testing.assert_allclose(ticket.result(0), wanted, atol=1e-6)
    with pytest.raises(InputError, match="start is 3, and no seed stands for latents of that noise level"):
        lanes.submit(prompt(1), seed=1, start=3)
    with pytest.raises(InputError, match="start is 4, which these lanes were not made for"):
        lanes.submit(prompt(1), seed=1, start=4)
    with pytest.raises(InputError, match="begins at step 9; this program has steps 0 to 7"):
        Lanes(bundle, starts=(9,)).submit(prompt(1), noise=noise(1), start=9)


def test_requests_come_and_go_at_any_tick():
    lanes = Lanes(load("hidden"), lanes=2, policy=Policy("fifo", 4))
    first = lanes.submit(prompt(1), seed=1)
    assert [ticket.number for ticket in lanes.tick().tickets] == [first.number]
    second, third = (lanes.submit(prompt(seed), noise=noise(seed)) for seed in (2, 3))
    assert [ticket.number for ticket in lanes.tick().tickets] == [first.number, second.number], "there are two lanes"
    assert (lanes.num_running, lanes.num_queued) == (2, 1)
    assert first.cancel()
    assert [ticket.number for ticket in lanes.tick().tickets] == [second.number, third.number]
    assert second.cancel()
    lanes.run_until_idle()
    check(load("hidden"), third, 3)
    assert not third.cancel()
    with pytest.raises(CancelledError):
        first.result(0)


def test_a_request_may_be_cancelled_in_its_last_tick():
    tickets, calls = [], []

    def cancel_at_last(**given):
        calls.append(1)
        if tickets and len(calls) == len(load("hidden").programs["default"].compute_steps):
            assert tickets[0].cancel()
        return compute(**given)

    lanes = Lanes(load("hidden", compute=cancel_at_last))
    calls.clear()
    tickets.append(lanes.submit(prompt(1), seed=1))
    lanes.run_until_idle()
    assert tickets[0].future.cancelled()
    assert lanes.num_running == 0


def test_who_waits_for_several_hears_of_a_cancelled_one():
    lanes = Lanes(load("hidden"))
    tickets = [lanes.submit(prompt(seed), seed=seed) for seed in (1, 2)]
    assert tickets[0].cancel()
    lanes.tick()
    assert wait([ticket.future for ticket in tickets], timeout=0).done == {tickets[0].future}


class Behind(Host):
    """Works beside the host, and tells late that it failed."""

    beside_host, fails = True, False

    def synchronize(self):
        if self.fails:
            raise EngineError("it has fallen off the bus")


def test_a_device_that_fails_behind_the_host_ends_the_requests_of_its_tick():
    device = Behind()
    lanes = Lanes(load("hidden", device=device), policy=Policy("fifo", 4))
    tickets = [lanes.submit(prompt(seed), seed=seed) for seed in (1, 2)]
    device.fails = True
    assert set(lanes.tick().ended) == set(tickets)
    for ticket in tickets:
        with pytest.raises(EngineError, match=f"request {ticket.number}: it has fallen off the bus"):
            ticket.result(0)
    assert lanes.num_running == 0


@pytest.mark.parametrize("kind", ["NaN", "error"])
def test_a_request_that_fails_fails_alone_and_by_name(kind, caplog):
    lanes = Lanes(load("hidden", compute=goes_wrong if kind == "NaN" else breaks), policy=Policy("fifo", 4))
    tickets = [lanes.submit(marked(seed) if seed == 1 else prompt(seed), seed=seed) for seed in range(4)]
    assert tickets[1] in lanes.tick().ended
    lanes.run_until_idle()
    for seed in (0, 2, 3):
        check(load("hidden"), tickets[seed], seed)
    message = "latents of request 1 hold NaN or infinity after step 1" if kind == "NaN" else "request 1: there is no memory"
    with pytest.raises(EngineError, match=message):
        tickets[1].result(0)
    assert ("tried one by one" in caplog.text) == (kind == "error")
    again = lanes.submit(prompt(1), seed=1)
    lanes.run_until_idle()
    check(load("hidden"), again, 1)


class FullHost(Host):
    """Fails with ``error`` for what is marked."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def upload(self, value, buffer):
        if (np.asarray(value) == MARK).all():
            raise self.error("the copy fails")
        super().upload(value, buffer)


@pytest.mark.parametrize("error", [EngineError, NotFiniteError])
def test_a_request_that_does_not_get_to_the_device_fails_alone(error):
    lanes = Lanes(load("hidden", device=FullHost(error)), policy=Policy("fifo", 4))
    tickets = [lanes.submit(marked(seed) if seed == 1 else prompt(seed), seed=seed) for seed in range(3)]
    assert lanes.tick().ended == (tickets[1],)
    lanes.run_until_idle()
    with pytest.raises(EngineError, match="request 1: the copy fails") as caught:
        tickets[1].result(0)
    assert caught.type is error  # health asks which
    for seed in (0, 2):
        check(load("hidden"), tickets[seed], seed)


def guide(negative, positive, guidance_scale):
    return {"velocity": negative + guidance_scale[:, None, None] * (positive - negative)}


def mixed_bundle(cut="output"):
    """Guided and unguided programs over the same engines; at some steps of ``half`` the negative branch is forecast."""
    bundle, sampling = wide(cut), Sampling(SIGMAS, SIGMAS[:-1])
    guided, half = (
        lower_advance(Adams(2).table(schedule, SIGMAS, None), replace(KEY, guided=True), sampling)
        for schedule in (SCHEDULE, parse_schedule("0 2c 3 6c", STEPS))
    )
    specs = [TensorSpec(name, X, "float32") for name in ("negative", "positive", "velocity")]
    scale = TensorSpec("guidance_scale", ("batch",), "float32")
    engines = {**bundle.engines, GUIDE: NumpyEngine(guide, Signature((*specs[:2], scale), (specs[2],)))}
    return replace(bundle, engines=engines, programs={**bundle.programs, "guided": guided, "half": half})


def test_guided_requests_are_two_rows_beside_others():
    bundle = mixed_bundle()
    lanes = Lanes(bundle, policy=Policy("fifo", 8))
    given = {
        seed: {**prompt(seed), "negative_prompt": prompt(9)["prompt"], "guidance_scale": np.full(1, seed, np.float32)}
        for seed in (1, 2)
    } | {3: prompt(3)}
    levels = {1: "guided", 2: "half", 3: "default"}
    tickets = {seed: lanes.submit(given[seed], seed=seed, level=level) for seed, level in levels.items()}
    assert [lanes.tick().rows for _ in range(3)] == [5, 4, 5]
    lanes.run_until_idle()
    for seed, ticket in tickets.items():
        check(bundle, ticket, seed, given[seed])


def forecast_rows(coefficients, bias, features, **given):
    """Each row by weights of its own: those of one row after the other by the engine that has one for all."""
    rows = [
        forecast(
            features=features[:, row : row + 1], coefficients=coefficients[:, row : row + 1], bias=bias[:, row],
            deltas=given["deltas"], latents=given["latents"][row : row + 1], scale=given["scale"][:, row : row + 1],
        )
        for row in range(features.shape[1])
    ]  # fmt: skip
    return {name: np.concatenate([one[name] for one in rows], axis) for name, axis in (("velocities", 1), ("next_latents", 0))}


def test_branches_with_numbers_of_their_own_share_calls_with_others():
    bundle, key = mixed_bundle("hidden"), replace(KEY, guided=True)
    own = bundle.engines[FORECAST].signature
    wide_specs = {"coefficients": ("forecasts", "batch", "slots"), "bias": ("forecasts", "batch")}
    inputs = tuple(replace(spec, shape=wide_specs.get(spec.name, spec.shape)) for spec in own.inputs)
    engines = {**bundle.engines, FORECAST: NumpyEngine(forecast_rows, Signature(inputs, own.outputs))}
    tables = [Taylor(order).table(SCHEDULE, SIGMAS, None) for order in (0, 1)]
    tables[0].bias[1], tables[1].bias[1] = 0.3, -0.2
    programs = {
        name: lower_table(table, replace(key, level=name), Sampling(SIGMAS, SIGMAS[:-1]))
        for name, table in (("both", ForecastTable.of_branches(*tables)), ("one", tables[1]))
    }
    bundle = replace(bundle, engines=engines, programs={**bundle.programs, **programs})
    lanes, given = Lanes(bundle, policy=Policy("fifo", 8)), {"negative_prompt": prompt(9)["prompt"]}
    asked = {seed: {**prompt(seed), **given, "guidance_scale": np.full(1, 1.5 * seed, np.float32)} for seed in (1, 2, 3)}
    tickets = {seed: lanes.submit(asked[seed], seed=seed, level=("one", "both", "both")[seed - 1]) for seed in asked}
    assert lanes.tick().rows == 6
    lanes.run_until_idle()
    for seed, ticket in tickets.items():
        check(bundle, ticket, seed, asked[seed])
    assert np.abs(alone(bundle, 2, "one", asked[2]) - alone(bundle, 2, "both", asked[2])).max() > 1e-3


def positioned_bundle(calls):
    """What the prologue makes of ``positions``, which have no batch axis, goes to every step."""
    bundle, positions = load("hidden"), TensorSpec("positions", (SHAPE[0],), "float32")

    def prologue_too(positions, **given):
        return {**prologue(**given), "compute_wave": np.sin(positions)}

    def compute_too(latents, wave, **given):
        calls.append(len(latents))
        return compute(latents + wave[:, None], **given)

    before, step = bundle.engines[PROLOGUE].signature, bundle.engines[COMPUTE].signature
    wave = replace(positions, name="compute_wave")
    engines = {
        PROLOGUE: NumpyEngine(prologue_too, Signature((*before.inputs, positions), (*before.outputs, wave))),
        COMPUTE: NumpyEngine(compute_too, Signature((*step.inputs, replace(wave, name="wave")), step.outputs)),
    }
    bundle.manifest.io["conditions"] = ["prompt", "positions"]
    return replace(bundle, engines={**bundle.engines, **engines})


def test_cheap_calls_share_a_batch_only_where_that_is_quicker():
    calls = []

    def counted(**given):
        calls.append(len(given["latents"]))
        return forecast(**given)

    bundle = load("hidden", forecast=counted)
    seconds = Lanes(bundle).costs.seconds
    for gains, wanted in ((True, {2}), (False, {1})):
        made_up = {
            name: {bucket: 1.0 if gains or name == COMPUTE else bucket**2 for bucket in some} for name, some in seconds.items()
        }
        lanes = Lanes(bundle, costs=Costs(made_up), policy=Policy("fifo", 4))
        tickets = [lanes.submit(prompt(seed), seed=seed) for seed in range(2)]
        calls.clear()
        lanes.run_until_idle()
        assert set(calls) == wanted
        for seed, ticket in enumerate(tickets):
            check(bundle, ticket, seed)


def test_what_has_no_batch_axis_is_the_same_for_all_who_share():
    calls = []
    bundle = positioned_bundle(calls)
    lanes = Lanes(bundle, policy=Policy("fifo", 4))
    given = [{**prompt(seed), "positions": np.full(SHAPE[0], seed % 2, np.float32)} for seed in range(3)]
    tickets = [lanes.submit(one, seed=seed, level=LEVELS[seed == 2]) for seed, one in enumerate(given)]
    calls.clear()
    lanes.tick()
    assert calls == [2, 1], "across levels, but not across positions"
    lanes.run_until_idle()
    for seed, ticket in enumerate(tickets):
        check(bundle, ticket, seed, given[seed])


class CountingHost(Host):
    """Counts what it is asked to allocate."""

    taken = 0

    def empty(self, shape, dtype):
        self.taken += 1
        return super().empty(shape, dtype)


def test_nothing_is_allocated_or_bound_in_a_tick(monkeypatch):
    device, bound = CountingHost(), []
    bind = NumpyContext.bind
    monkeypatch.setattr(NumpyContext, "bind", lambda *args: bound.append(1) or bind(*args))
    lanes = Lanes(load("hidden", device=device))
    before = device.taken, len(bound)
    assert device.taken == 3, "constants, lanes, batches"
    for seed in range(10):
        lanes.submit(prompt(seed), seed=seed, level=LEVELS[seed % 2])
        lanes.tick()
    lanes.run_until_idle()
    assert (device.taken, len(bound)) == before


class PoisonedHost(Host):
    """Memory is NaN until something is written there."""

    def empty(self, shape, dtype):
        memory = super().empty(shape, dtype)
        memory.view(np.uint8)[...] = 255
        return memory


def test_only_what_was_written_is_read_also_in_rows_that_are_left_over():
    seen = []

    def look(latents, delta, shift, prompt):
        seen.append(all(np.isfinite(one).all() for one in (latents, delta, shift, prompt)))
        return compute(latents, delta, shift, prompt)

    bundle = load("hidden", device=PoisonedHost(), compute=look)
    lanes = Lanes(bundle, buckets=(4,))
    seen.clear()
    tickets = [lanes.submit(prompt(seed), seed=seed) for seed in range(3)]
    lanes.run_until_idle()
    assert seen
    assert all(seen)
    for seed, ticket in enumerate(tickets):
        check(load("hidden"), ticket, seed)


def made_up(bundle):
    """Costs of a second for each run of the model, in batches of any size, and nothing for all else."""
    seconds = Lanes(bundle).costs.seconds
    return Costs({name: dict.fromkeys(some, float(name == COMPUTE)) for name, some in seconds.items()})


def test_a_request_that_cannot_be_in_time_is_refused_with_the_time_it_takes():
    bundle, now = load("hidden"), [100.0]
    costs = made_up(bundle)
    lanes = Lanes(bundle, lanes=2, costs=costs, policy=Policy("deadline", 1), clock=lambda: now[0])
    for level, seconds in (("default", 4), (UNCACHED, 8)):
        assert lanes.kind(level).alone[0] == seconds
        with pytest.raises(DeadlineError, match=f"deadline is in 3.9 s, but the request would take {seconds} s") as caught:
            lanes.submit(prompt(1), seed=1, level=level, deadline=3.9)
        assert caught.value.seconds == seconds
    lanes.submit(prompt(1), seed=1, deadline=4.5)
    with pytest.raises(DeadlineError, match=r"in 7 s, but the request would take 8 s, 4 s of them its own"):
        lanes.submit(prompt(2), seed=2, deadline=7)
    with pytest.raises(DeadlineError, match=r"requests .* would miss their deadlines"):
        lanes.submit(prompt(2), seed=2, deadline=4.2)
    assert pickle.loads(pickle.dumps(caught.value)).seconds == caught.value.seconds
    assert lanes.submit(prompt(4), seed=4, deadline=4.4 * 2).cancel()  # in nobody's way from now on
    lanes.submit(prompt(2), seed=2, deadline=8.1)
    lanes.submit(prompt(3), seed=3, deadline=np.inf)
    ends = []
    while tick := lanes.tick():
        now[0] += tick.reckoned
        ends += [now[0]] * len(tick.ended)
    assert ends == [104, 108, 112]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("load_of", [0.5, 0.9, 1.5])
def test_the_simulator_tells_when_each_is_done(order, load_of, monkeypatch):
    """On a clock that every call that is really made moves on by what it costs."""
    bundle, now, batches = load("hidden"), [0.0], []
    seconds = Lanes(bundle).costs.seconds
    costs = Costs({name: {size: (0.3 + 0.1 * size) * (1 if name == COMPUTE else 0.1) for size in some}
                   for name, some in seconds.items()})  # fmt: skip
    lanes = Lanes(bundle, lanes=3, costs=costs, policy=order, clock=lambda: now[0])
    run = Ports.run

    def timed(ports, port, bucket, ends):
        now[0] += costs.seconds[port.name][bucket]
        batches.append((port.computes, len(ends)))
        run(ports, port, bucket, ends)

    monkeypatch.setattr(lanes, "_run", partial(timed, lanes._ports))
    kinds = {lanes.kind(level): level for level in LEVELS}
    rate = load_of / lanes.kind().alone[0]
    arrivals = poisson(rate, 40, list(kinds), 3, within=200 / rate)
    told, places, ends, place = simulate(arrivals, Policy(order), lanes=3), {}, {}, 0
    while len(ends) < len(arrivals):
        at = now[0]
        while place < len(arrivals) and arrivals[place].time <= at:
            now[0] = arrivals[place].time
            ticket = lanes.submit(prompt(place), seed=place, level=kinds[arrivals[place].kind], deadline=200 / rate)
            places[ticket.number] = place
            place += 1
        now[0] = at
        tick = lanes.tick()
        if tick is None:
            now[0] = arrivals[place].time
            continue
        assert tick.seconds == pytest.approx(tick.reckoned)
        ends |= {places[ticket.number]: now[0] for ticket in tick.ended}
    assert ends == pytest.approx(told.ends)
    shared = {computes for computes, many in batches if many > 1}
    assert shared == {True, False} if load_of > 1 else True in shared


def test_requests_may_come_from_other_threads():
    bundle = load("hidden")
    lanes, tickets = Lanes(bundle, lanes=3), {}

    def send(first):
        for seed in range(first, first + 5):
            tickets[seed] = lanes.submit(prompt(seed), seed=seed)

    threads = [threading.Thread(target=send, args=(first,)) for first in (0, 5, 10)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or lanes.num_queued + lanes.num_running:
        if lanes.wait(0.01):
            lanes.tick()
    for seed, ticket in tickets.items():
        check(bundle, ticket, seed)
    assert len(tickets) == 15


def test_a_request_keeps_nothing_of_what_it_was_given():
    bundle = load("hidden")
    lanes, conditions, start = Lanes(bundle), prompt(1), noise(1)
    ticket = lanes.submit(conditions, noise=start)
    conditions["prompt"][:], start[:] = np.nan, np.nan
    lanes.run_until_idle()
    check(bundle, ticket, 1)


BAD = {
    "level": ({"level": "fast"}, "unknown level 'fast'"),
    "both": ({"noise": noise(1)}, "either noise or a seed"),
    "neither": ({"seed": None}, "either noise or a seed"),
    "seed": ({"seed": -1}, "seed is -1"),
    "shape": ({"seed": None, "noise": noise(1, 2)}, r"'latents' has shape \[2, 3, 4\], expected \[1, 3, 4\]"),
    "NaN": ({"seed": None, "noise": np.full((1, *SHAPE), np.nan, np.float32)}, "'latents' holds NaN"),
    "late": ({"deadline": float("nan")}, "deadline is in nan s; it must be later than now"),
    "missing": ({"conditions": {}}, "conditions are .'prompt'., got"),
    "batch": ({"conditions": prompt(1, 2)}, "'prompt' has shape"),
}


@pytest.fixture(scope="module")
def idle():
    return Lanes(load("hidden"))


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD.keys())
def test_bad_requests_are_refused_and_leave_nothing(idle, given, message):
    with pytest.raises(InputError, match=message):
        idle.submit(**{"conditions": prompt(1), "seed": 1, **given})
    assert not idle.wait(0)
    assert idle.num_queued == 0


def test_impossible_lanes_are_refused():
    for message, given in {
        "there are 0 lanes": {"lanes": 0},
        "there must be one of each": {"buckets": ()},
        r"buckets are \[1, 8\]; the engines of .* take up to 5 rows": {"buckets": (1, 8)},
        "unknown policy 'lifo'": {"policy": "lifo"},
        r"costs lack prologue .* in batches of \[1, 4\]": {"buckets": (1, 4), "costs": Costs({COMPUTE: {1: 1.0}})},
    }.items():
        with pytest.raises(InputError, match=message):
            Lanes(replace(load("hidden"), programs={UNCACHED: load("hidden").programs[UNCACHED]}), **given)
    with pytest.raises(InputError, match=r"buckets are \[1\], but a request has 2 rows"):
        Lanes(mixed_bundle(), buckets=(1,))
    with pytest.raises(InputError, match="lanes cannot be pickled"):
        pickle.dumps(Lanes(load("hidden")))


def test_costs_of_other_lanes_may_be_of_more_batches():
    bundle = load("hidden")
    lanes = Lanes(bundle, buckets=(1, 4), costs=Lanes(bundle, buckets=(1, 2, 4)).costs, policy=Policy("fifo", 2))
    tickets = [lanes.submit(prompt(seed), seed=seed) for seed in (1, 2)]
    lanes.run_until_idle()
    for seed, ticket in enumerate(tickets, 1):
        check(bundle, ticket, seed)


def test_engines_of_one_batch_run_requests_one_by_one():
    bundle = load("output")
    fixed = {name: NumpyEngine(engine._native, at_one(engine.signature)) for name, engine in bundle.engines.items()}
    key = replace(bundle.programs["default"].key, batch=1)
    fixed_bundle = replace(bundle, engines=fixed, programs={"default": replace(bundle.programs["default"], key=key)})
    lanes = Lanes(fixed_bundle, policy=Policy("fifo", 4))
    tickets = [lanes.submit(prompt(seed), seed=seed) for seed in range(3)]
    lanes.run_until_idle()
    for seed, ticket in enumerate(tickets):
        check(bundle, ticket, seed)
    program = replace(bundle.programs["default"], key=replace(key, batch=2))
    with pytest.raises(InputError, match="compiled for batches of 2: lanes take requests of one"):
        Lanes(replace(fixed_bundle, programs={"default": program}))


def at_one(signature):
    def fix(specs):
        return tuple(replace(spec, shape=tuple(1 if dim == "batch" else dim for dim in spec.shape)) for spec in specs)

    return Signature(fix(signature.inputs), fix(signature.outputs))
