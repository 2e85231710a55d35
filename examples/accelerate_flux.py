"""Accelerate a FluxPipeline in memory: the same call as before, and some of its steps are forecast.

Runs on tiny-flux, which comes with cachec, in half a minute on a CPU; with a real model only ``from_pretrained`` changes.
"""

import time

import torch
from diffusers import FluxPipeline

import cachec
from cachec.compiler.models import TINY_FLUX_DIR

STEPS = 12
CALL = {
    "prompt": "a laughing face with short blue hair in a red tee",
    "height": 128,
    "width": 128,
    "num_inference_steps": STEPS,
}


def run(pipe: FluxPipeline) -> tuple[torch.Tensor, float]:
    """Latents, and the seconds that they took."""
    start, generator = time.perf_counter(), torch.Generator().manual_seed(0)
    latents = pipe(**CALL, max_sequence_length=24, output_type="latent", generator=generator).images
    return latents, time.perf_counter() - start


def main() -> None:
    """Before and after."""
    pipe = FluxPipeline.from_pretrained(TINY_FLUX_DIR)
    plain, plain_seconds = run(pipe)
    cachec.accelerate(pipe, method="taylor", steps=STEPS, budget=6, height=128, width=128, text_tokens=24, compiled=False)
    fast, seconds = run(pipe)
    computed = pipe.transformer.program.compute_steps
    error = float((fast - plain).norm() / plain.norm())
    print(f"computed steps {', '.join(map(str, computed))} of {STEPS}")
    print(f"{plain_seconds:.1f} s before, {seconds:.1f} s now; relative error of the latents {error:.3f}")
    pipe.transformer = pipe.transformer.original  # the way back


if __name__ == "__main__":
    main()
