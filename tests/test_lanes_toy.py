"""Lanes on ONNX Runtime: 64 requests that come, go and fail are bit for bit what sessions give."""

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
from cachec.runtime.errors import EngineError
from cachec.runtime.lane_policy import Policy
from cachec.runtime.lanes import Lanes
from cachec.runtime.noise import make_noise
from cachec.runtime.program import UNCACHED, ProgramKey, hash_sigmas

LEVELS = ("default", "short", UNCACHED)
COUNT = 64
FAILING, CANCELLED = range(5, COUNT, 9), range(3, COUNT, 7)


def short_program():
    """Five steps, of which two are forecast in one call."""
    sigmas = np.linspace(1, 0, 6, dtype=np.float32)
    table = Taylor(order=1).table(Schedule(5, (0, 1, 3)), sigmas, None)
    return lower_table(table, ProgramKey(5, hash_sigmas(sigmas), KEY.sizes, level="short"), Sampling(sigmas, sigmas[:-1]))


@pytest.fixture(scope="module")
def bundle(once):
    def write(out):
        graphs = linear(split_toy(head_axis=True))
        write_bundle(graphs, toy_program(), Taylor(order=1), out, "ort", more={"short": short_program()})

    with cachec.load(once("lanes.cachec", write)) as loaded:
        yield loaded


def conditions(seed, *, fails=False):
    values = np.random.default_rng(seed).standard_normal((1, WIDTH)).astype(np.float32)
    return {"prompt": np.full_like(values, 3e38) if fails else values}


@pytest.fixture(scope="module")
def alone(bundle):
    """What a session of its own gives each request."""
    sessions = {level: bundle.session(level=level) for level in LEVELS}
    noise = [make_noise(seed, (TOKENS, WIDTH))[None] for seed in range(COUNT)]
    return [sessions[LEVELS[seed % 3]].run(conditions(seed), noise[seed]) for seed in range(COUNT)]


def submit(lanes, seed):
    return lanes.submit(conditions(seed, fails=seed in FAILING), seed=seed, level=LEVELS[seed % 3])


@pytest.mark.parametrize("buckets", [(8,), (1, 2, 4, 8)], ids=str)
@pytest.mark.parametrize("policy", [Policy("fifo", 8), Policy("shortest"), Policy("deadline", 3)], ids=str)
def test_requests_that_come_go_and_fail_change_no_bit_of_the_others(bundle, alone, policy, buckets):
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
            np.testing.assert_array_equal(tickets[seed].result(0), alone[seed])
    for seed in cancelled:
        with pytest.raises(CancelledError):
            tickets[seed].result(0)
    assert any(len({ticket.level for ticket in tick.tickets}) > 1 for tick in ticks if tick), "levels share a batch"


def test_what_each_gets_differs(alone):
    assert len({one.tobytes() for one in alone}) == COUNT
