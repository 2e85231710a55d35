"""Train the transformer of tiny-qwen on avatars: ``python -m reference.avatars.tiny_qwen --out build/reference``.

Qwen-Image has no guidance input: a tenth of the captions is dropped, and pictures are drawn with true classifier-free
guidance. It learns the latents of tiny-flux's autoencoder; ``qwen_autoencoder`` makes one of Qwen-Image's own kind that
shares them.
"""

from pathlib import Path

import click
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor, nn

from reference.avatars import loop
from reference.avatars.attributes import vocabulary
from reference.avatars.decoder_text import build_qwen
from reference.avatars.flow import Condition, Plan, adaptive_norms, train
from reference.avatars.latents import Latents
from reference.avatars.networks import LATENT_CHANNELS, LATENT_SIDE
from reference.avatars.text import WIDTH
from reference.avatars.tiny_flux import PackedPictures, held_out


def build_transformer() -> QwenImageTransformer2DModel:
    """Qwen-Image at width 192 with six blocks."""
    return QwenImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        attention_head_dim=48,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(16, 16, 16),
    )


class QwenLearner:
    """Qwen-Image at width 192, with its frozen reader."""

    def __init__(self) -> None:
        tokenizer, reader = build_qwen(vocabulary())
        self.pipeline = QwenImagePipeline(scheduler=None, vae=None, text_encoder=reader, tokenizer=tokenizer, transformer=None)

    def build(self) -> nn.Module:
        return adaptive_norms(build_transformer())

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Condition:
        states, mask = self.pipeline.encode_prompt(captions)
        ones = torch.ones(states.shape[:2], dtype=torch.long)
        return {"encoder_hidden_states": states, "encoder_hidden_states_mask": ones if mask is None else mask}

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        del guidance  # not an input of this model
        shapes = [[(1, LATENT_SIDE // 2, LATENT_SIDE // 2)]] * len(x)
        found: Tensor = network(hidden_states=x, timestep=sigma, img_shapes=shapes, return_dict=False, **condition)[0]
        return found


@click.command()
@loop.options
@click.option("--steps", default=1500, show_default=True)
@click.option("--batch", default=32, show_default=True)
def main(out: Path, steps: int, batch: int, threads: int) -> None:
    """Train on cached latents; log held-out loss and draw held-out captions every twenty minutes."""
    torch.set_num_threads(threads)
    plan = Plan("tiny-qwen", out, steps, batch)
    train(plan, QwenLearner(), PackedPictures(Latents("pictures", out)), held_out(out), seed=4)


if __name__ == "__main__":
    main()
