"""Train the transformer of tiny-flux on avatars: ``python -m reference.avatars.tiny_flux --out build/reference``."""

from pathlib import Path

import click
import numpy as np
import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from reference.avatars import loop
from reference.avatars.attributes import MAX_WORDS, vocabulary
from reference.avatars.autoencoder import save_sheet, to_pictures
from reference.avatars.flow import Condition, HeldOut, Plan, adaptive_norms, train
from reference.avatars.latents import Latents
from reference.avatars.networks import LATENT_SIDE, SHIFT, build_transformer, image_ids, pack
from reference.avatars.render import SIDE
from reference.avatars.text import build_clip, build_t5, encode

TEXT_TOKENS = MAX_WORDS  # max_sequence_length of the pipeline call
CLIP_TOKENS = MAX_WORDS + 4
SHEET = 16


def unpack(tokens: Tensor) -> Tensor:
    """FLUX's tokens [B, 64, 64] to latents [B, 16, 16, 16]: the reverse of ``pack``."""
    latents: Tensor = FluxPipeline._unpack_latents(tokens, SIDE, SIDE, SIDE // LATENT_SIDE)
    return latents


class FluxLearner:
    """FLUX at width 192, with the frozen text encoders."""

    def __init__(self) -> None:
        words = vocabulary()
        self.clip, self.t5 = build_clip(words, CLIP_TOKENS), build_t5(words)
        self.ids = {"txt_ids": torch.zeros(TEXT_TOKENS, 3), "img_ids": image_ids()}

    def build(self) -> nn.Module:
        return adaptive_norms(build_transformer())

    def encode(self, captions: list[str]) -> Condition:
        states, pooled = encode(captions, self.clip, self.t5, TEXT_TOKENS)
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        found: Tensor = network(hidden_states=x, timestep=sigma, guidance=guidance, return_dict=False, **condition, **self.ids)[
            0
        ]
        return found


class PackedPictures:
    """Packed latents of random training pictures."""

    def __init__(self, latents: Latents) -> None:
        self.latents = latents

    def batch(self, num: int) -> tuple[Tensor, list[str]]:
        index = np.sort(torch.randint(len(self.latents), (num,)).numpy())
        rng = np.random.default_rng(int(torch.randint(2**31, ())))
        return pack(self.latents.take(index)), self.latents.say(index, rng)


def held_out(out: Path) -> HeldOut:
    """The first held-out pictures, packed."""
    held = Latents("held-out", out)

    def save(tokens: Tensor, path: Path) -> None:
        save_sheet(to_pictures(held.decode(unpack(tokens))), path)

    return HeldOut(pack(held.take(np.arange(64))), held.captions, SHEET, SHIFT, save)


@click.command()
@loop.options
@click.option("--steps", default=2100, show_default=True, help="Updates in all, both stages.")
@click.option("--distill-steps", default=250, show_default=True, help="How many of them distil guidance.")
@click.option("--batch", default=32, show_default=True)
def main(out: Path, steps: int, distill_steps: int, batch: int, threads: int) -> None:
    """Train on cached latents; log held-out loss and draw held-out captions every twenty minutes."""
    torch.set_num_threads(threads)
    plan = Plan("tiny-flux", out, steps, batch, distill_steps)
    train(plan, FluxLearner(), PackedPictures(Latents("pictures", out)), held_out(out), seed=2)


if __name__ == "__main__":
    main()
