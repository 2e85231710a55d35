"""What both branches of guidance are worth, in relative errors of latents against the uncached run: docs/models.md.

    python -m bench.branches [--steps 20] [--budget 6]

First, what rows cost that were fitted on the guided output and are applied to each branch, as the drop-in does: of guided
sessions, and of the unmodified pipeline with the bundle as its transformer. The pipelines are the tests' small random ones:
guidance of SD3 is linear, so that nothing is lost; Qwen-Image scales the combination to the conditional branch's norm.

Then steps that compute one branch alone, beside whole ones at as much work: tiny-flux on its evaluation captions, guided once
more, which it was not trained for.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import cachec
from cachec.compiler.calibration.calibration import relative_errors
from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.calibration.prompts import default_prompts
from cachec.compiler.graphs.prepare import prepare
from cachec.compiler.methods.adams import Adams
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import Settings
from cachec.compiler.pipeline import compile_bundle
from cachec.compiler.request import make_request
from cachec.compiler.tables.lower import lower, lower_uncached
from cachec.compiler.tables.schedule import Schedule, uniform_schedule
from cachec.runtime.program import ProgramKey, hash_sigmas
from tests.families import FAMILIES, NEGATIVE, Family

SIZE = "48x32"
COLOURS, THINGS = ("red", "blue", "green", "grey"), ("ring", "cross", "square", "house", "bird")
FITTED = [f"a large {colour} {thing}" for colour in COLOURS for thing in THINGS]
EVALUATED = [f"two small {thing}s on {colour} ground" for colour in COLOURS[:2] for thing in THINGS[:4]]
SCALE, TEXT_TOKENS = 4.0, 24
SECOND_SCALE = 2.5  # true_cfg_scale


def measure(family: Family, work: Path, steps: int, budget: int) -> dict[str, np.ndarray]:
    """Relative errors [P] of the latents: of guided sessions, and of the drop-in."""
    family.make().save_pretrained(directory := work / family.name)
    (prompts := work / "prompts.txt").write_text("\n".join(FITTED))
    request = make_request(
        (spec := find_model(str(directory))), method="gram", budget=budget, steps=str(steps), size=SIZE,
        text_tokens=TEXT_TOKENS, guidance=SCALE, prompts=prompts, targets=("ort",),
    )  # fmt: skip
    bundle = work / f"{family.name}.cachec"
    compile_bundle(model := load_model(spec), request, bundle, force=True)
    settings = request.settings
    conditions = model.encode(EVALUATED, settings, model.conditions(settings), [NEGATIVE] * len(EVALUATED))
    shape = model.example_inputs(settings)[model.io.latents].shape[1:]
    noise = np.random.default_rng(1).standard_normal((len(EVALUATED), *shape)).astype(np.float32)
    uncached = model.generate(conditions, noise, settings)
    with cachec.load(bundle) as loaded:
        guided = loaded.session(batch=len(noise)).run(conditions, noise)
        model.pipeline.transformer = loaded.as_transformer(model.pipeline.transformer, pipeline=model.pipeline)
        branches = model.generate(conditions, noise, settings)
    return {"guided": relative_errors(guided, uncached), "per branch": relative_errors(branches, uncached)}


def measure_one_branch(steps: int) -> Iterator[tuple[Schedule, np.ndarray]]:
    """Schedules of tiny-flux, and their relative errors [P]."""
    model = load_model(spec := find_model("tiny-flux"))
    settings = Settings(spec.height, spec.width, spec.text_tokens, spec.guidance, steps, "float32", true_cfg_scale=SECOND_SCALE)
    prompts, sampling = default_prompts("avatars", "eval")[:64], model.sampling(settings)
    conditions = model.encode(prompts, settings, model.conditions(settings), [""] * len(prompts))
    evaluator = GraphEvaluator(prepare(model, settings), model.io)
    key = ProgramKey(steps, hash_sigmas(sampling.sigmas), {}, guided=True)
    shape = model.example_inputs(settings)[model.io.latents].shape[1:]
    noise = np.random.default_rng(0).standard_normal((len(prompts), *shape)).astype(np.float32)
    uncached = evaluator.play(lower_uncached(key, sampling), noise, conditions)
    ten, twelve = (uniform_schedule(steps, count).compute for count in (10, 12))
    alternating, late = tuple(step for place, step in enumerate(ten) if place > 2 and place % 2), twelve[len(twelve) // 2 :]
    for compute, alone in (
        (uniform_schedule(steps, 8).compute, ()), (uniform_schedule(steps, 9).compute, ()), (ten, alternating), (twelve, late),
    ):  # fmt: skip
        schedule = Schedule(steps, compute, alone)
        program = lower(Adams(2).table(schedule, sampling.levels("output"), None), key, sampling)
        yield schedule, relative_errors(evaluator.play(program, noise, conditions), uncached)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.branches", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--budget", type=int, default=6)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        for family in (one for one in FAMILIES if one.name in ("sd3", "qwen-image")):
            for name, errors in measure(family, Path(work), asked.steps, asked.budget).items():
                print(f"{family.name}, {name}: mean {errors.mean():.2e}, worst {errors.max():.2e}", flush=True)
    for schedule, errors in measure_one_branch(asked.steps):
        said = f"mean {errors.mean():.1%}, 95th percentile {np.percentile(errors, 95):.1%}, worst {errors.max():.1%}"
        print(f"{schedule.work:g} steps' work, {schedule}: {said}", flush=True)
