"""A bundle from disk in an unmodified image-to-image pipeline.

A strength below 1 begins in the middle: what forecasts would be made of and was not computed is computed. Runs on tiny-flux.
"""

import tempfile
from pathlib import Path

import torch
from diffusers import FluxImg2ImgPipeline

import cachec
from cachec.compiler.models import TINY_FLUX_DIR

STEPS = 8


def run(pipe: FluxImg2ImgPipeline, strength: float) -> torch.Tensor:
    """Latents."""
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    latents: torch.Tensor = pipe(
        prompt="a laughing face with blue hair", image=image, strength=strength, height=128, width=128,
        num_inference_steps=STEPS, guidance_scale=3.5, max_sequence_length=24, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    return latents


def main() -> None:
    """Before and after."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"height": 128, "width": 128, "text_tokens": 24}
        made = cachec.compile_model("tiny-flux", Path(folder) / "tiny.cachec", method="taylor", steps=STEPS, budget=4, **sizes)
        pipe = FluxImg2ImgPipeline.from_pretrained(TINY_FLUX_DIR)
        for strength in (1.0, 0.5):
            plain = run(pipe, strength)
            pipe.transformer = cachec.load(made).as_transformer(pipe.transformer, pipeline=pipe)
            error = float((run(pipe, strength) - plain).norm() / plain.norm())
            print(f"strength {strength}: relative error of the latents {error:.3f}")
            pipe.transformer = pipe.transformer.original


if __name__ == "__main__":
    main()
