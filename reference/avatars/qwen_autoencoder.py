"""Qwen-Image's kind of autoencoder for the latents that are there already: ``python -m reference.avatars.qwen_autoencoder``.

Its encoder learns what tiny-flux's encoder says, its decoder what these latents show: so one set of latents serves two
models. Its networks are causal in time; a picture is one frame.
"""

from pathlib import Path

import click
import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage

from reference.avatars import loop
from reference.avatars.autoencoder import (
    CROP,
    Descent,
    corner,
    difference,
    psnr,
    save_sheet,
    to_input,
    to_pictures,
)
from reference.avatars.latents import Latents
from reference.avatars.networks import LATENT_CHANNELS
from reference.avatars.render import SIDE


def build_autoencoder() -> AutoencoderKLQwenImage:
    """2.9 M parameters; latents are normalised as they are."""
    return AutoencoderKLQwenImage(
        base_dim=10,
        dim_mult=[1, 2, 4, 8],
        num_res_blocks=1,
        temperal_downsample=[False] * 3,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


class Trainer(Descent):
    """Pictures with their latents, and the two halves of the autoencoder."""

    def __init__(self, latents: Latents, steps: int, batch: int) -> None:
        super().__init__(build_autoencoder(), steps)
        self.latents, self.batch = latents, batch

    def update(self, step: int) -> float:
        index = np.sort(torch.randint(len(self.latents), (self.batch,)).numpy())
        top, left = corner(SIDE, CROP, 8)
        x = to_input(self.latents.pictures[index, top : top + CROP, left : left + CROP])[:, :, None]
        z = self.latents.take(index)[:, :, None, top // 8 : (top + CROP) // 8, left // 8 : (left + CROP) // 8]
        inner = self.vae.encode(x).latent_dist.mode()[..., 1:-1, 1:-1] - z[..., 1:-1, 1:-1]  # borders saw more than the crop
        loss = difference(self.vae.decode(z).sample[:, :, 0], x[:, :, 0])
        self.down(loss + inner.square().mean())
        return float(loss.item())


@click.command()
@loop.options
@click.option("--steps", default=2000, show_default=True)
@click.option("--batch", default=6, show_default=True)
def main(out: Path, steps: int, batch: int, threads: int) -> None:
    """Train on cached latents and write it to OUT/vae-qwen."""
    torch.set_num_threads(threads)
    torch.manual_seed(6)
    trainer = Trainer(Latents("pictures", out), steps, batch)
    held = Latents("held-out", out)
    z = held.take(np.arange(16))[:, :, None]

    @torch.no_grad()
    def watch(step: int) -> dict[str, float]:
        found = to_pictures(trainer.vae.decode(z).sample[:, :, 0])
        save_sheet(np.stack([held.pictures[:16], found], 1).reshape(-1, SIDE, SIDE, 3), out / "vae-qwen.png")
        return {"held_out_psnr": psnr(found, held.pictures[:16])}

    loop.Training("autoencoder-qwen", out, steps, trainer.parts, trainer.update, watch, seed=6).run()
    trainer.vae.save_pretrained(out / "vae-qwen")


if __name__ == "__main__":
    main()
