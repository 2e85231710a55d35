"""What rows cost that were fitted on the guided output and are applied to each branch, as the drop-in does.

    python -m bench.branches [--steps 20] [--budget 6]

The pipelines are the tests' small random ones: guidance of SD3 is linear, so that nothing is lost; Qwen-Image scales the
combination to the conditional branch's norm. Prints, for each, the relative error of the latents against the uncached run over
evaluation prompts: of guided sessions, and of the unmodified pipeline with the bundle as its transformer.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

import cachec
from cachec.compiler.models import find_model, load_model
from cachec.compiler.pipeline import compile_bundle
from cachec.compiler.request import make_request
from tests.families import FAMILIES, NEGATIVE, Family

SIZE = "48x32"
COLOURS, THINGS = ("red", "blue", "green", "grey"), ("ring", "cross", "square", "house", "bird")
FITTED = [f"a large {colour} {thing}" for colour in COLOURS for thing in THINGS]
EVALUATED = [f"two small {thing}s on {colour} ground" for colour in COLOURS[:2] for thing in THINGS[:4]]
SCALE, TEXT_TOKENS = 4.0, 24


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
    return {"guided": _apart(guided, uncached), "per branch": _apart(branches, uncached)}


def _apart(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    rows, wanted = ((one.reshape(len(one), -1)) for one in (some - others, others))
    return np.asarray(np.linalg.norm(rows, axis=1) / np.linalg.norm(wanted, axis=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.branches", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--budget", type=int, default=6)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        for family in (one for one in FAMILIES if one.name in ("sd3", "qwen-image")):
            for name, errors in measure(family, Path(work), asked.steps, asked.budget).items():
                print(f"{family.name}, {name}: mean {errors.mean():.2e}, worst {errors.max():.2e}", flush=True)
