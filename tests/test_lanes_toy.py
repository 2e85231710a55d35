"""Lanes on real engines: 64 requests that come, go and fail change nothing of what the others get from sessions.

On ONNX Runtime that is bit for bit what a session of its own gives each. PyTorch rounds otherwise in batches of another size:
bit for bit it is what sessions of eight samples give, in batches of eight, and nearly so in others.
"""

from concurrent.futures import CancelledError

import numpy as np
import pytest
from toy import TOKENS, WIDTH
from toy_bundle import KEY, split_toy, toy_program, write_bundle

import cachec
from cachec.compiler.graphs.prepare import linear
from cachec.compiler.methods.taylor import Taylor
from cachec.compiler.tables.lower import lower_table
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.engine import HOST
from cachec.runtime.errors import EngineError
from cachec.runtime.lane_policy import Policy
from cachec.runtime.lanes import Lanes
from cachec.runtime.noise import make_noise
from cachec.runtime.program import UNCACHED, ProgramKey, hash_sigmas

LEVELS = ("default", "short", UNCACHED)
COUNT = 64
FAILING, CANCELLED = range(5, COUNT, 9), range(3, COUNT, 7)
ROUNDING = 1e-5  # of latents between -6 and 6


def short_program():
    """Five steps, of which two are forecast in one call."""
    sigmas = np.linspace(1, 0, 6, dtype=np.float32)
    table = Taylor(order=1).table(Schedule(5, (0, 1, 3)), sigmas, None)
    return lower_table(table, ProgramKey(5, hash_sigmas(sigmas), KEY.sizes, level="short"), Sampling(sigmas, sigmas[:-1]))


@pytest.fixture(scope="module", params=["ort", "eager"])
def bundle(request, once):
    def write(out):
        graphs = linear(split_toy(head_axis=True))
        write_bundle(graphs, toy_program(), Taylor(order=1), out, request.param, more={"short": short_program()})

    with cachec.load(once(f"lanes-{request.param}.cachec", write)) as loaded:
        yield loaded


def conditions(seed, *, fails=False):
    values = np.random.default_rng(seed).standard_normal((1, WIDTH)).astype(np.float32)
    return {"prompt": np.full_like(values, 3e38) if fails else values}


def rows_are_exact(bundle):
    return bundle.engines["compute"].rows_are_exact(HOST)


@pytest.fixture(scope="module")
def wanted(bundle):
    """What each request gets from a session of its own, or where rows are not exact, from one for eight requests."""
    rows, made = 1 if rows_are_exact(bundle) else 8, {}
    for place, level in enumerate(LEVELS):
        session, seeds = bundle.session(level=level, batch=rows), range(place, COUNT, 3)
        for begin in range(0, len(seeds), rows):
            some = np.resize(seeds[begin : begin + rows], rows)  # repeated where there are too few
            given = np.concatenate([conditions(seed)["prompt"] for seed in some])
            noise = np.stack([make_noise(int(seed), (TOKENS, WIDTH)) for seed in some])
            made |= dict(zip(some.tolist(), session.run({"prompt": given}, noise)[:, None].copy(), strict=True))
    return made


def submit(lanes, seed):
    return lanes.submit(conditions(seed, fails=seed in FAILING), seed=seed, level=LEVELS[seed % 3])


@pytest.mark.parametrize("buckets", [(8,), (1, 2, 4, 8)], ids=str)
@pytest.mark.parametrize("policy", [Policy("fifo", 8), Policy("shortest"), Policy("deadline", 3)], ids=str)
def test_requests_that_come_go_and_fail_change_nothing_of_the_others(bundle, wanted, policy, buckets):
    off = 0 if rows_are_exact(bundle) or buckets == (8,) else ROUNDING
    lanes, draw, tickets, ticks = Lanes(bundle, buckets=buckets, policy=policy), np.random.default_rng(1), [], []
    while len(tickets) < COUNT:
        tickets += [submit(lanes, seed) for seed in range(len(tickets), min(COUNT, len(tickets) + draw.integers(1, 9)))]
        ticks += [lanes.tick() for _ in range(draw.integers(1, 4))]
        for seed in set(CANCELLED) & set(range(len(tickets))):
            tickets[seed].cancel()
    lanes.run_until_idle()
    cancelled = [seed for seed, ticket in enumerate(tickets) if ticket.future.cancelled()]
    assert len(cancelled) > 4
    for seed in set(range(COUNT)) - set(cancelled):
        if seed in FAILING:
            with pytest.raises(EngineError, match=f"latents of request {seed} hold NaN or infinity after step 0"):
                tickets[seed].result(0)
        else:
            np.testing.assert_allclose(tickets[seed].result(0), wanted[seed], rtol=0, atol=off)
    for seed in cancelled:
        with pytest.raises(CancelledError):
            tickets[seed].result(0)
    assert any(len({ticket.level for ticket in tick.tickets}) > 1 for tick in ticks if tick), "levels share a batch"


def test_what_each_gets_differs(wanted):
    assert len({one.tobytes() for one in wanted.values()}) == COUNT
