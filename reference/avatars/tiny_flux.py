"""Train the transformer of tiny-flux on avatars: ``python -m reference.avatars.tiny_flux --out build/reference``."""

from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn

from reference.avatars import loop
from reference.avatars.attributes import MAX_WORDS, vocabulary
from reference.avatars.autoencoder import save_sheet, to_pictures
from reference.avatars.flow import Condition, Plan, Trainer, adaptive_norms, sample
from reference.avatars.latents import LATENT_SIDE, Latents
from reference.networks import SHIFT, build_transformer, image_ids, pack
from reference.text import build_clip, build_t5, encode

TEXT_TOKENS = MAX_WORDS  # max_sequence_length of the pipeline call
CLIP_TOKENS = MAX_WORDS + 4
SHEET = 16


def unpack(tokens: Tensor) -> Tensor:
    """FLUX's tokens [B, 64, 64] to latents [B, 16, 16, 16]: the reverse of ``pack``."""
    side = LATENT_SIDE // 2
    patches = tokens.view(len(tokens), side, side, -1, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, LATENT_SIDE, LATENT_SIDE)


class FluxLearner:
    """FLUX at width 192, with the frozen text encoders."""

    def __init__(self) -> None:
        words = vocabulary()
        self.clip, self.t5 = build_clip(words, CLIP_TOKENS), build_t5(words)
        self.ids = {"txt_ids": torch.zeros(TEXT_TOKENS, 3), "img_ids": image_ids()}

    def build(self) -> nn.Module:
        network = build_transformer()
        adaptive_norms(network)
        return network

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


class Watch:
    """Held-out loss, and a sheet of held-out captions beside the checkpoint: ``NAME-STEP.png``, guidance by two evaluations."""

    def __init__(self, name: str, trainer: Trainer, held: Latents, out: Path) -> None:
        self.name, self.trainer, self.held, self.out = name, trainer, held, out
        self.clean = pack(held.take(np.arange(64)))
        self.noise = torch.randn(SHEET, *self.clean.shape[1:], generator=torch.Generator().manual_seed(3))

    def __call__(self, step: int) -> dict[str, float]:
        captions, network = self.held.captions, self.trainer.average.network
        tokens = sample(self.trainer.learner, network, self.noise, captions[:SHEET], scale=3.5, steps=20, shift=SHIFT)
        save_sheet(to_pictures(self.held.decode(unpack(tokens))), self.out / f"{self.name}-{step:05d}.png")
        return {"held_out_loss": round(self.trainer.held_out_loss(self.clean, captions[: len(self.clean)]), 5)}


@click.command()
@loop.options
@click.option("--steps", default=6200, show_default=True, help="Updates in all, both stages.")
@click.option("--distill-steps", default=250, show_default=True, help="How many of them distil guidance.")
@click.option("--batch", default=32, show_default=True)
def main(out: Path, steps: int, distill_steps: int, batch: int, threads: int) -> None:
    """Train on cached latents; log held-out loss and draw held-out captions every twenty minutes."""
    torch.set_num_threads(threads)
    torch.manual_seed(2)
    learner = FluxLearner()
    plan = Plan(steps, batch, distill_steps, out / "tiny-flux-stage-one.pt")
    trainer = Trainer(learner, PackedPictures(Latents("pictures", out)), plan)
    watch = Watch("tiny-flux", trainer, Latents("held-out", out), out)
    loop.Training("tiny-flux", out, steps, trainer.parts, trainer.update, watch, seed=2).run()


if __name__ == "__main__":
    main()
