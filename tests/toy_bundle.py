"""The toy DiT compiled by hand, without a pipeline around it: real bundles on both cuts.

Hidden cut: Taylor of order 1, eager engines. Output cut: Adams-Bashforth with other time steps, any back end.
"""

import functools

import numpy as np
import torch
from toy import ToyDiT, example_inputs

from cachec.compiler.graphs.build_engines import build_targets, planned_sources
from cachec.compiler.graphs.capture import capture_model, capture_predictor
from cachec.compiler.graphs.costs import memory_facts
from cachec.compiler.graphs.export import plan_engines
from cachec.compiler.graphs.prepare import compute_only, engine, linear
from cachec.compiler.methods.adams import Adams
from cachec.compiler.methods.taylor import Taylor
from cachec.compiler.tables.coefficients import AdvanceTable
from cachec.compiler.tables.lower import lower_advance, lower_table, lower_uncached
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import Schedule
from cachec.engines.targets import TargetName
from cachec.passes import canonical_passes, cast_passes, inline_passes, run_passes, split_passes
from cachec.passes.base import outputs
from cachec.runtime.abi import COMPUTE
from cachec.runtime.build_options import BuildOptions
from cachec.runtime.bundle import Manifest
from cachec.runtime.engine import HOST
from cachec.runtime.model_io import ModelIO
from cachec.runtime.noise import GENERATOR
from cachec.runtime.program import UNCACHED, ProgramKey, hash_sigmas
from cachec.runtime.sizes import size_ranges
from cachec.runtime.write import BundleWriter

STEPS = 10
SIGMAS = np.linspace(1, 0, STEPS + 1, dtype=np.float32)
SCHEDULE = Schedule(STEPS, (0, 2, 3, 6))  # forecasts step 1 while only one slot is written
LAST_BLOCK = "blocks.2"
KEY = ProgramKey(STEPS, hash_sigmas(SIGMAS), {"height": 6, "width": 8, "text_tokens": 0})


IO = ModelIO("latents", "timestep", ("prompt",))


@functools.cache
def captured_toy(*, head_axis):
    """Passes never change what they are given, so that all share it."""
    return run_passes(capture_model(ToyDiT(head_axis=head_axis).eval(), example_inputs()), [canonical_passes()])


@functools.cache
def split_toy(*, head_axis=False, dtype=torch.float32):
    return run_passes(captured_toy(head_axis=head_axis), [cast_passes(dtype), split_passes(LAST_BLOCK)])


def split(model, inputs, block, dtype=torch.float32):
    """A model captured and split."""
    return run_passes(capture_model(model, inputs), [canonical_passes(), cast_passes(dtype), split_passes(block)])


def captured(predictor, window, dtype=torch.float32):
    with torch.no_grad():
        return capture_predictor(predictor.eval(), window, example_inputs()["latents"].to(dtype), STEPS)


def histories(window, *, feeds_back=False):
    return {step: SCHEDULE.history(step, window, feeds_back=feeds_back) for step in SCHEDULE.forecast}


def add_predictor(split, predictor, window):
    """Split graphs with the predictor inside."""
    dtype = outputs(split.modules[COMPUTE])["feature"].meta["val"].dtype
    return run_passes(split, [inline_passes(captured(predictor, window, dtype))])


def toy_program():
    return lower_table(Taylor(order=1).table(SCHEDULE, SIGMAS, None), KEY, Sampling(SIGMAS, SIGMAS[:-1]))


def output_table():
    """Rows of Adams-Bashforth 2 and time steps that are not the sampler's."""
    rows = Adams(2).table(SCHEDULE, SIGMAS, None).coefficients
    return AdvanceTable(SCHEDULE, rows, np.array([0.97, 0.77, 0.68, 0.41]))


def write_toy_bundle(split, out):
    method = Taylor(order=1)
    graphs = linear(split)
    return write_bundle(graphs, toy_program(), method, out)


def write_output_bundle(split, out, backend="eager", hoist="all", device=HOST, slots=None):
    program = lower_advance(output_table(), KEY, Sampling(SIGMAS, SIGMAS[:-1]))
    return write_bundle(compute_only(split), program, Adams(2), out, backend, hoist, device, slots=slots)


def write_bundle(
    graphs,
    program,
    method,
    out,
    backends="eager",
    hoist="all",
    device=HOST,
    *,
    velocities=True,
    slots=None,
    uncached=None,
    more=(),
):
    """``backends``: one name or several. ``more``: further programs by level."""
    precision = str(outputs(graphs.modules[COMPUTE])["feature"].meta["val"].dtype).removeprefix("torch.")
    uncached = uncached or lower_uncached(KEY, Sampling(SIGMAS, SIGMAS[:-1]))
    graphs = engine(graphs, IO, hoist=hoist, velocities=velocities, slots=slots)
    plans = plan_engines(graphs, example_inputs(), "latents", STEPS)
    with BundleWriter(out, force=False) as writer:
        (sources,) = planned_sources({"8x6": plans}, writer, precision)
        options = BuildOptions(sizes=size_ranges(STEPS, 4, max_batch=3))
        names = [backends] if isinstance(backends, str) else backends
        targets = build_targets([TargetName(name) for name in names], sources, writer, device, options)
        levels = {"default": program, **dict(more), UNCACHED: uncached}
        programs = {level: writer.add_program(level, one) for level, one in levels.items()}
        writer.commit(
            Manifest(
                model={"name": "toy", "source": "tests", "weights_sha256": "0" * 64},
                io={"latents": "latents", "timestep": "timestep", "conditions": ["prompt"]},
                method={"name": method.name, "options": method.options(), "fold": "static", "predictor": None},
                settings={
                    "height": 6,
                    "width": 8,
                    "text_tokens": 0,
                    "steps": STEPS,
                    "guidance": 1.0,
                    "block": LAST_BLOCK,
                },
                noise=GENERATOR,
                targets=targets,
                programs=programs,
                files=writer.files,
                facts={"memory": memory_facts(graphs), "hoisted": {}},
            )
        )
    return out


def eager_velocity(inputs):
    with torch.no_grad():
        return ToyDiT().eval()(**inputs)
