"""True guidance with a negative prompt: both branches are forecast, each from its own slots. Runs on tiny-flux."""

import torch
from diffusers import FluxPipeline

import cachec
from cachec.compiler.models import TINY_FLUX_DIR

STEPS = 8


def run(pipe: FluxPipeline, scale: float) -> torch.Tensor:
    """Latents under a guidance scale."""
    latents: torch.Tensor = pipe(
        prompt="a laughing face with blue hair", negative_prompt="a bald person", true_cfg_scale=scale, height=128, width=128,
        num_inference_steps=STEPS, max_sequence_length=24, output_type="latent", generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    return latents


def main() -> None:
    """Before and after."""
    pipe = FluxPipeline.from_pretrained(TINY_FLUX_DIR)
    scales = (1.0, 2.0)
    plain = [run(pipe, scale) for scale in scales]
    cachec.accelerate(pipe, method="taylor", steps=STEPS, budget=4, height=128, width=128, text_tokens=24, compiled=False)
    for scale, wanted in zip(scales, plain, strict=True):
        error = float((run(pipe, scale) - wanted).norm() / wanted.norm())
        print(f"true_cfg_scale {scale}: relative error of the latents {error:.3f}")


if __name__ == "__main__":
    main()
