"""The toy DiT compiled by hand, without a pipeline around it: split, Taylor of order 1, eager engines, a real bundle."""

import platform

import numpy as np
import torch
from toy import ToyDiT, example_inputs

from cachec.compiler.capture import capture_model, capture_predictor
from cachec.compiler.export import plan_engines
from cachec.compiler.lower import lower_table
from cachec.compiler.methods.taylor import Taylor
from cachec.compiler.schedule import Schedule
from cachec.compiler.table import compose
from cachec.compiler.write import BundleWriter
from cachec.engines.eager import EagerEngine
from cachec.passes import forecast_passes, run_passes, split_passes
from cachec.runtime.bundle import Artifact, Manifest, Target
from cachec.runtime.noise import GENERATOR
from cachec.runtime.program import ProgramKey, hash_sigmas

STEPS = 10
SIGMAS = np.linspace(1, 0, STEPS + 1, dtype=np.float32)
SCHEDULE = Schedule(STEPS, (0, 2, 3, 6))  # forecasts step 1 while only one slot is written
LAST_BLOCK = "blocks.2"


def split_toy():
    return run_passes(capture_model(ToyDiT().eval(), example_inputs()), split_passes(LAST_BLOCK))


def captured(predictor, window):
    with torch.no_grad():
        return capture_predictor(predictor.eval(), window, example_inputs()["latents"], STEPS)


def histories(window, *, feeds_back=False):
    return {step: SCHEDULE.history(step, window, feeds_back=feeds_back) for step in SCHEDULE.forecast}


def add_predictor(split, predictor, window, *, feeds_back=False, fold=True):
    passes = forecast_passes(
        captured(predictor, window), torch.from_numpy(SIGMAS), histories(window, feeds_back=feeds_back), fold=fold
    )
    return run_passes(split, passes)


def toy_program(graphs):
    table = compose(graphs.rows.coefficients.numpy(), graphs.rows.bias.numpy(), SCHEDULE, feeds_back=False)
    key = ProgramKey(STEPS, hash_sigmas(SIGMAS), height=6, width=8, text_tokens=0)
    return lower_table(table, key, SIGMAS, SIGMAS[:-1])


def write_toy_bundle(split, out):
    method = Taylor(order=1)
    graphs = add_predictor(split, method.predictor(None), method.window)
    plans = plan_engines(graphs, example_inputs(), STEPS)
    with BundleWriter(out, force=False) as writer:
        signatures = {plan.name: plan.signature for plan in plans}
        paths = EagerEngine.build({plan.name: plan.program for plan in plans}, signatures, writer.directory("engines"))
        engines = {name: Artifact(writer.seal(path), signatures[name]) for name, path in paths.items()}
        programs = {"default": writer.add_program("default", toy_program(graphs))}
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
                    "cut": LAST_BLOCK,
                },
                noise=GENERATOR,
                targets=(Target("eager", EagerEngine.version(), platform.system().lower(), "float32", "6x8", engines),),
                programs=programs,
                files=writer.files,
            )
        )
    return out


def eager_velocity(inputs):
    with torch.no_grad():
        return ToyDiT().eval()(**inputs)
